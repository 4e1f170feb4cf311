"""What is compiled, how often, and where it is kept. A counting backend stands for Inductor, which takes minutes."""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.model import AttnImpl, CrossEntropyArgs
from lingua.distributed import compile as compiling
from lingua.distributed import parallelize as parallel
from lingua.distributed.compile import INDUCTOR, TRITON, compile_model, keep_compiled_code, let_length_vary
from lingua.distributed.parallelize import forward_precision, parallelize
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World
from lingua.model.attention import RowDocuments
from lingua.model.loss import CrossEntropy
from tests.packed_kernels import give_varlen_a_cpu, row_documents
from tests.ranks import exit_code_of

LOSS = CrossEntropy(CrossEntropyArgs())
SELECTIVE, FULL = {"selective_activation_checkpointing": True}, {"full_activation_checkpointing": True}


class Counting:
    """A backend that runs the graphs it is given and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    torch._dynamo.reset()
    counting = Counting()
    monkeypatch.setattr(
        parallel, "compile_model", lambda model, blocks, args: compile_model(model, blocks, args, backend=counting)
    )
    yield counting
    torch._dynamo.reset()


def build(impl: AttnImpl = "sdpa", **keys: Any) -> tuple[LMTransformer, DistributedArgs]:
    args = DistributedArgs.model_validate({"model_dtype": "fp32", **keys})
    with torch.device("meta"):
        model: Any = LMTransformer(
            LMTransformerArgs(
                dim=16, n_layers=4, n_heads=2, vocab_size=40, multiple_of=16, max_seqlen=16, attn_impl=impl
            )
        )
    model = parallelize(model, args, World(RankInfo(), torch.device("cpu"), mesh=None))
    model.to_empty(device="cpu")
    model.init_weights(1)
    return model, args


def step(
    model: LMTransformer, args: DistributedArgs, n_rows: int = 4, documents: RowDocuments | None = None
) -> dict[str, Tensor]:
    """Gradients of one batch, or without gradients nothing."""
    tokens = torch.randint(40, (n_rows, 9), generator=torch.Generator().manual_seed(0))
    with forward_precision(model, args, torch.device("cpu")), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it traces
        loss, _ = model(tokens[:, :-1], labels=tokens[:, 1:], documents=documents, loss=LOSS)
    if not torch.is_grad_enabled():
        return {}
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("keys", [pytest.param({}, marks=pytest.mark.soak), SELECTIVE, FULL])
def test_blocks_share_one_code_and_compute_what_they_did(backend: Counting, keys: dict[str, Any]):
    expected = step(*build())
    assert backend.graphs == 0
    model, args = build(compile=True, **keys)
    found = step(model, args)
    assert backend.graphs == 1  # for four layers
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.soak
@pytest.mark.parametrize("keys", [{}, SELECTIVE, FULL, {"compile_scope": "model"}])
def test_documents_in_any_number_share_one_code(backend: Counting, keys: dict[str, Any]):
    give_varlen_a_cpu()
    model, args = build("varlen", compile=True, **keys)
    plain, _ = build()
    for n_documents in (2, 1, 5, 3):
        documents = row_documents([[min(at, n_documents - 1) for at in range(8)]] * 4)
        let_length_vary(documents.bounds)
        found, expected = (step(each, args, documents=documents) for each in (model, plain))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
    assert backend.graphs == 1  # for four layers and four numbers


@pytest.mark.soak
def test_validation_adds_a_bounded_number_of_versions(backend: Counting):
    model, args = build(compile=True)
    for _ in range(2):
        step(model, args)
        model.eval()
        with torch.no_grad():
            for n_rows in (4, 3, 2, 1, 3, 4):
                step(model, args, n_rows)
        model.train()
    assert backend.graphs <= 4  # train; without gradients: four rows, any number of rows, one row
    assert torch._dynamo.config.recompile_limit == 8


@pytest.mark.soak
def test_the_whole_model_is_one_graph(backend: Counting):
    model, args = build(compile=True, compile_scope="model")
    found, expected = step(model, args), step(*build())
    assert backend.graphs == 1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_the_compiler_keeps_no_more_than_the_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch._functorch.config.activation_memory_budget", 1.0)  # and set back afterwards
    backend = "aot_eager_decomp_partition"  # Inductor's, without generated code
    monkeypatch.setattr(parallel, "compile_model", partial(compile_model, backend=backend))
    expected, kept_bytes = step(*build()), {}

    def keep(tensor: Tensor) -> Tensor:
        kept_bytes[budget] += tensor.nbytes
        return tensor

    for budget in (1.0, 0.5, 0.0):
        torch._dynamo.reset()
        kept_bytes[budget] = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = step(*build(compile=True, activation_memory_budget=budget))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)
    torch._dynamo.reset()
    assert kept_bytes[0.0] < kept_bytes[0.5] < kept_bytes[1.0]


def test_the_whole_model_needs_one_process():
    mesh: Any = object()
    model: Any = LMTransformer(LMTransformerArgs(dim=16, n_layers=1, n_heads=2, vocab_size=8))
    args = DistributedArgs(compile=True, compile_scope="model")
    with pytest.raises(ValueError, match="needs one process"):
        parallelize(model, args, World(RankInfo(), torch.device("cpu"), mesh=mesh))


@pytest.mark.parametrize("vocab_size", [None, pytest.param(37, marks=pytest.mark.soak)])
def test_a_compiled_loss_is_the_loss(vocab_size: int | None):
    hidden, weight = torch.randn(2, 8, 16), torch.randn(40, 16)
    labels = torch.randint(37, (2, 8))
    labels[0, :3] = -100
    backend, found = Counting(), []
    for compiled in (False, True):
        loss = CrossEntropy(CrossEntropyArgs(z_loss=1e-3, chunk_tokens=4))
        if compiled:
            loss.compile(backend)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss_sum, _ = loss(h, w, labels, vocab_size=vocab_size)
        loss_sum.backward()
        found.append((loss_sum, h.grad, w.grad))
    assert backend.graphs == 1  # for four chunks
    torch.testing.assert_close(found[0], found[1])


# -- where compiled code is kept -----------------------------------------------------------------------------------


def test_the_folder_is_private_and_found_again(tmp_path: Path):
    env: dict[str, str] = {}
    place = tmp_path / "deep" / "kept" / f"torch-{torch.__version__}"
    assert keep_compiled_code(str(tmp_path / "deep" / "kept"), env) == place
    assert env == {INDUCTOR: str(place / "inductor"), TRITON: str(place / "triton")}
    for folder in (place.parent, place, place / "inductor", place / "triton"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert keep_compiled_code(str(tmp_path / "deep" / "kept"), {}) == place


def test_what_the_environment_says_wins(tmp_path: Path):
    env = {INDUCTOR: "/mine"}
    assert keep_compiled_code(str(tmp_path / "kept"), env) is None
    assert env == {INDUCTOR: "/mine"}
    assert keep_compiled_code(None, {}) is None
    env = {TRITON: "/mine"}
    keep_compiled_code(str(tmp_path / "kept"), env)
    assert env[TRITON] == "/mine"


def test_what_torch_has_put_there_by_itself_does_not(tmp_path: Path):
    import torch._inductor  # noqa: F401 - sets the variable

    env = dict(os.environ)
    assert keep_compiled_code(str(tmp_path), env) is not None
    assert env[INDUCTOR].startswith(str(tmp_path))


def test_a_fork_of_a_process_that_compiled_can_compile(monkeypatch: pytest.MonkeyPatch):
    """Inductor's threads do not come along: on a machine without compiled code a forked trainer would wait for ever."""
    from torch._inductor.async_compile import AsyncCompile

    monkeypatch.setattr(AsyncCompile, "pool", lru_cache(1)(lambda: ThreadPoolExecutor(1)))

    def answer() -> None:
        AsyncCompile.pool().submit(int).result(timeout=300)

    answer()
    assert exit_code_of(answer) == 0


@pytest.mark.parametrize("trap", ["others may write", "a link", "a file", "somebody else's"])
def test_code_that_others_could_have_put_there_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str):
    kept = tmp_path / "kept"
    if trap == "others may write":
        kept.mkdir()
        kept.chmod(0o777)
    elif trap == "a link":
        kept.symlink_to(tmp_path)
    elif trap == "a file":
        kept.touch()
    else:
        kept.mkdir(mode=0o700)
        monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(ValueError, match=r"distributed\.compile_cache: .*kept is not this user's alone"):
        keep_compiled_code(str(kept), {})


def test_auto_takes_the_first_place_that_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken").chmod(0o777)
    (tmp_path / "no folder").touch()
    places = [tmp_path / "taken", tmp_path / "no folder" / "below", tmp_path / "free"]
    monkeypatch.setattr(compiling, "_places", lambda env: places)
    assert keep_compiled_code("auto", {}) == tmp_path / "free" / f"torch-{torch.__version__}"
    places.pop()
    with pytest.raises(ValueError, match=r"taken is not this user's alone.*below cannot be made.*set it to null"):
        keep_compiled_code("auto", {})
