"""What ranks send in a step: counted, and no more than needed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from apps.main.transformer import LMTransformer
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.model import CrossEntropyArgs
from lingua.distributed.parallelize import begin_micro_step, blocks_of, reshard
from lingua.model.loss import CrossEntropy
from tests import layouts
from tests.layouts import Layout
from tests.ranks import run_on_ranks

N_LAYERS, VOCAB, SEQ_LEN = 3, 257, 8
N_GROUPS = N_LAYERS + 3  # of parameters that FSDP2 sends together: embedding, blocks, head, and the rest
LOSS = CrossEntropy(CrossEntropyArgs())
NAMES = {
    "c10d::_allgather_base_": "gather",
    "c10d::_reduce_scatter_base_": "scatter",
    "c10d::allreduce_": "reduce",
    "_c10d_functional::all_gather_into_tensor": "gather of tp",
    "_c10d_functional::reduce_scatter_tensor": "scatter of tp",
    "_c10d_functional::all_reduce": "reduce of tp",
}


SEND_NOTHING = ("wait", "_wrap_tensor_autograd")  # the latter from torch 2.11 on


class Sent(TorchDispatchMode):
    """Counts the collectives that are begun inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.sizes: list[tuple[str, int]] = []
        """What was sent in turn, and how many elements the whole has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in NAMES:
            self.counts[NAMES[name]] += 1
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.sizes.append((NAMES[name], max((x.numel() for x in tensors), default=0)))
        elif name.startswith(("c10d::", "_c10d_functional::")) and not any(word in name for word in SEND_NOTHING):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def build(shape: tuple[int, int, int], args: DistributedArgs, **more: Any) -> LMTransformer:
    sizes: dict[str, Any] = {"dim": 16, "n_layers": N_LAYERS, "n_heads": 2, "n_kv_heads": 2, "qk_norm": False, **more}
    return layouts.build(Layout(*shape).world(), args, **sizes)


def step(model: LMTransformer, args: DistributedArgs, n_micro_steps: int) -> tuple[Counter[str], list[Tensor]]:
    """What was sent in a step, and the whole gradients."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    with Sent() as sent:
        for micro_step in range(n_micro_steps):
            begin_micro_step(model, args, is_last=micro_step == n_micro_steps - 1)
            rows = torch.randint(0, VOCAB, (1, SEQ_LEN + 1), generator=generator)
            loss, _ = model(rows[:, :-1], labels=rows[:, 1:], loss=LOSS)
            loss.backward()
    gradients = [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]
    model.zero_grad()
    return sent.counts, gradients


FULL: dict[str, Any] = {"fsdp_type": "full_shard", "model_dtype": "fp32"}
KEEP: dict[str, Any] = {"keep_gathered": True}
SHARDED: dict[str, Any] = {"accumulate_sharded": True}


def table(shape: tuple[int, int, int], n: int) -> list[tuple[dict[str, Any], Counter[str]]]:
    """(layout, what a step of n micro steps may send)."""
    if shape[1] == 1:
        return [({"model_dtype": "fp32"}, Counter({"reduce": N_GROUPS}))]
    replicas = {"reduce": N_GROUPS} if shape[0] > 1 else {}
    twice = N_GROUPS + N_LAYERS  # what is not a block stays from forward to backward
    return [
        (FULL, Counter({"gather": n * twice, "scatter": N_GROUPS, **replicas})),
        (FULL | KEEP, Counter({"gather": N_GROUPS, "scatter": N_GROUPS, **replicas})),
        (FULL | SHARDED, Counter({"gather": n * twice, "scatter": n * N_GROUPS, **replicas})),
        (FULL | KEEP | SHARDED, Counter({"gather": N_GROUPS, "scatter": n * N_GROUPS, **replicas})),
    ]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((1, 2, 1), 3),
        ((2, 1, 1), 3),
        pytest.param((1, 2, 1), 1, marks=pytest.mark.soak),
        pytest.param((2, 2, 1), 3, marks=pytest.mark.soak),
    ],
)
def test_micro_steps_send_what_the_layout_needs_and_no_more(shape: tuple[int, int, int], n: int) -> None:
    layouts = [(DistributedArgs(**keys), expected) for keys, expected in table(shape, n)]

    def on_rank(rank: int) -> None:
        gradients: list[list[Tensor]] = []
        for args, expected in layouts:
            model = build(shape, args)
            found: list[Tensor] = []
            for _ in range(2):  # the second step must be as the first
                counts, found = step(model, args, n)
                assert counts == expected, args
            gradients.append(found)
        for ours, keys in zip(gradients, layouts, strict=True):
            for one, other in zip(ours, gradients[0], strict=True):
                if keys[0].accumulate_sharded:  # another order of the sums
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(one, other)

    run_on_ranks(on_rank, shape[0] * shape[1])


@pytest.mark.ranks
def test_tensor_parallel_micro_steps_send_the_stream_and_the_gradients_of_norms() -> None:
    args = DistributedArgs(tp_size=2, model_dtype="fp32")

    def on_rank(rank: int) -> list[Counter[str]]:
        model = build((1, 1, 2), args)
        return [step(model, args, n)[0] for n in (1, 2)]

    # Two of each per block; the embedding scatters, the head gathers; the loss exchanges largest logits and sums.
    once = {"gather of tp": 2 * (2 * N_LAYERS + 1), "scatter of tp": 2 * (2 * N_LAYERS + 1)}
    once["reduce"] = 2
    norms = Counter({"reduce of tp": 2 * N_LAYERS + 1})  # their gradients, in the last micro step
    twice = Counter({name: 2 * n for name, n in once.items()})
    assert run_on_ranks(on_rank, 2) == [[Counter(once) + norms, twice + norms]] * 2


@pytest.mark.ranks
def test_a_block_is_gathered_while_the_one_before_it_computes() -> None:
    def on_rank(rank: int) -> list[int]:
        model = build((1, 2, 1), DistributedArgs(**FULL))
        gathered_before: list[int] = []
        with Sent() as sent:
            for _, block in blocks_of(model):
                block.register_forward_pre_hook(lambda *_: gathered_before.append(sent.counts["gather"]))
            with torch.no_grad():
                model(torch.zeros(1, SEQ_LEN, dtype=torch.int64))
        reshard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert isinstance(model, FSDPModule)
        return gathered_before

    # The rest, the embedding and block 0 before any block; at each block what follows is under way, too.
    assert run_on_ranks(on_rank, 2) == [[4, 5, 6]] * 2


def size_of(*modules: nn.Module) -> int:
    """Elements that FSDP2 sends for them: each parameter is padded to a multiple of two rows."""
    parameters = [p for module in modules for p in module.parameters()]
    return sum((len(p) + len(p) % 2) * (p.numel() // len(p)) for p in parameters)


@pytest.mark.ranks
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_sent_as_soon_as_backward_has_it_and_the_embedding_last(tied: bool) -> None:
    def on_rank(rank: int) -> None:
        args = DistributedArgs(**FULL)
        model = build((1, 2, 1), args, weight_tying=tied)
        block, norm = size_of(model.layers[0]), size_of(model.norm)
        embedding, head = size_of(model.tok_embeddings), 0 if model.output is None else size_of(model.output)
        forward = [norm, embedding, *[block] * N_LAYERS, head]
        backward = [head, *[block] * N_LAYERS, embedding, norm]
        if tied:
            forward, backward = [embedding + norm, *[block] * N_LAYERS], [*[block] * N_LAYERS, embedding + norm]
        with Sent() as sent:
            begin_micro_step(model, args, is_last=True)
            rows = torch.zeros(1, SEQ_LEN + 1, dtype=torch.int64)
            loss, _ = model(rows[:, :-1], labels=rows[:, 1:], loss=LOSS)
            assert sent.sizes == [("gather", size) for size in forward]
            loss.backward()
        behind = sent.sizes[len(forward) :]
        assert [size for kind, size in behind if kind == "gather"] == [block] * N_LAYERS
        assert sorted(size for kind, size in behind if kind == "scatter") == sorted(backward)
        scatters = [size for kind, size in behind if kind == "scatter"]
        assert scatters[: N_LAYERS + (not tied)] == backward[: N_LAYERS + (not tied)]

    run_on_ranks(on_rank, 2)


@pytest.mark.parametrize("key", ["keep_gathered", "accumulate_sharded"])
def test_keys_about_shards_need_shards(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is about shards"):
        DistributedArgs.model_validate({key: True})
