"""A model over several ranks computes what it computes on one: losses, gradients, logits, text."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from apps.main.transformer import LMTransformer
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.model import CrossEntropyArgs
from lingua.distributed import parallelize
from lingua.distributed.compile import compile_model
from lingua.distributed.process_group import World
from lingua.distributed.tensor_parallel import split_model
from lingua.model.loss import CrossEntropy
from tests import layouts
from tests.layouts import Layout, whole
from tests.packed_kernels import give_varlen_a_cpu, row_documents
from tests.ranks import run_on_ranks

VOCAB, ROWS, SEQ_LEN = 259, 4, 24  # of bytes; neither 2 nor 4 divides it
LOSS = CrossEntropy(CrossEntropyArgs(chunk_tokens=20, z_loss=1e-3))
Shape = tuple[int, int, int]
"""dp_replicate, dp_shard, tp."""


def build(shape: Shape, keys: dict[str, Any], layout: dict[str, Any]) -> tuple[LMTransformer, World]:
    world = Layout(*shape).world()
    args = DistributedArgs(**{"fsdp_type": "full_shard", "model_dtype": "fp32", "tp_size": shape[2], **layout})
    return layouts.build(world, args, vocab_size=VOCAB, **keys), world


Found = tuple[Tensor, dict[str, Tensor], Tensor]


def compute(shape: Shape, keys: dict[str, Any], layout: dict[str, Any], uneven: bool = True) -> Found:
    """(mean loss of this rank's rows, weights and gradients whole, logits of uneven rows)."""
    give_varlen_a_cpu()
    model, world = build(shape, keys, layout)
    rows = torch.randint(0, VOCAB, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    rows = rows[world.dp_rank :: world.dp_size]
    documents = row_documents([[0] * 10 + [1] * (SEQ_LEN - 10)] * len(rows))
    labels = rows[:, 1:].clone()
    labels[:, :3] = -100
    loss_sum, n_tokens = model(rows[:, :-1], labels=labels, documents=documents, loss=LOSS)
    loss = loss_sum / n_tokens
    loss.backward()
    tensors = {f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    tensors |= {name: whole(p) for name, p in model.named_parameters()}
    if not uneven:
        return loss.detach(), tensors, torch.zeros(())
    with torch.no_grad():
        logits = model(torch.arange(14).view(2, 7))
    return loss.detach(), tensors, logits


def assert_alike(found: list[Found], expected: Found) -> None:
    loss, tensors, logits = expected
    torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(), loss)
    for _, their_tensors, their_logits in found:
        assert their_tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            if name.startswith("gradient"):
                torch.testing.assert_close(their_tensors[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
            else:
                assert torch.equal(their_tensors[name], tensor), name  # initial weights: bit for bit
        torch.testing.assert_close(their_logits, logits, rtol=1e-4, atol=1e-5)


ONE: Shape = (1, 1, 1)
TIED = {"weight_tying": True}


@pytest.mark.ranks
@pytest.mark.parametrize(("impl", "norm"), [pytest.param("sdpa", "rms", marks=pytest.mark.soak), ("varlen", "layer")])
def test_two_ranks_compute_what_one_computes(impl: str, norm: str) -> None:
    keys, layout = {"norm": norm, **TIED}, {"full_activation_checkpointing": True}
    found = run_on_ranks(lambda rank: compute((1, 1, 2), {"attn_impl": impl, **keys}, layout), 2)
    assert_alike(found, compute(ONE, keys, {}))


@pytest.mark.ranks
@pytest.mark.soak
@pytest.mark.parametrize(
    ("shape", "keys", "layout"),
    [
        ((1, 2, 2), {}, {}),
        ((2, 1, 2), TIED, {}),
        ((1, 2, 2), {"head_dim": 16, "hidden_dim": 40, "n_kv_heads": 4, "qk_norm": False}, {}),
        ((1, 2, 2), {"sliding_window": 5, **TIED}, {"selective_activation_checkpointing": True}),
    ],
)
def test_four_ranks_compute_what_one_computes(shape: Shape, keys: dict[str, Any], layout: dict[str, Any]) -> None:
    found = run_on_ranks(lambda rank: compute(shape, keys, layout, uneven=False), 4)
    assert_alike(found, compute(ONE, keys, {}, uneven=False))


@pytest.mark.ranks
@pytest.mark.soak
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_compute_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all blocks: what differs from block to block would be compiled again and again.

    On the CPU Inductor makes 18 kernels of a block and its backward, seconds of g++ each: minutes on two busy cores.
    """
    monkeypatch.setattr(parallelize, "compile_model", partial(compile_model, backend=backend))

    def on_rank(rank: int) -> Found:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()  # a forked rank has those of the tests before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, while it traces
            found = compute((1, 1, 2), TIED, {"compile": True}, uneven=False)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        return found

    assert_alike(run_on_ranks(on_rank, 2, timeout_s=840), compute(ONE, TIED, {}, uneven=False))


@pytest.mark.ranks
@pytest.mark.soak
def test_four_tensor_parallel_ranks_split_heads_to_one_each() -> None:
    keys = {"n_kv_heads": 4, "weight_tying": True}
    assert_alike(run_on_ranks(lambda rank: compute((1, 1, 4), keys, {}), 4), compute(ONE, keys, {}))


@pytest.mark.ranks
@pytest.mark.soak
@pytest.mark.parametrize(("shape", "impl"), [((1, 1, 2), "sdpa"), ((1, 2, 1), "varlen")])
def test_bf16_stays_near_fp32(shape: Shape, impl: str) -> None:
    """Under FSDP2, which casts the tensors that a block is given: bounds of documents are none of them."""
    loss, tensors, _ = compute(ONE, {}, {})
    results = run_on_ranks(lambda rank: compute(shape, {"attn_impl": impl}, {"model_dtype": "bf16"}), 2)
    assert sum(found_loss.item() for found_loss, _, _ in results) / 2 == pytest.approx(loss.item(), rel=0.02)
    for _, found, _ in results:
        for name, tensor in tensors.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - tensor).norm() <= 0.1 * tensor.norm(), name


@pytest.mark.ranks
def test_a_rank_holds_a_part_of_everything_but_the_norms() -> None:
    def on_rank(rank: int) -> dict[str, tuple[int, ...]]:
        model, _ = build((1, 1, 2), {}, {})
        return {n: tuple(p.to_local().shape) for n, p in model.named_parameters() if isinstance(p, DTensor)}

    first, second = run_on_ranks(on_rank, 2)
    assert first.keys() == {name for name, _ in build(ONE, {}, {})[0].named_parameters()}
    assert (first["tok_embeddings.weight"], second["tok_embeddings.weight"]) == ((130, 32), (129, 32))
    assert (first["output.weight"], second["output.weight"]) == ((130, 32), (129, 32))
    block = {name.removeprefix("layers.1."): shape for name, shape in second.items() if "layers.1." in name}
    assert block == {
        "attention.wq.weight": (16, 32), "attention.wk.weight": (8, 32), "attention.wv.weight": (8, 32),
        "attention.wo.weight": (32, 16), "attention.q_norm.weight": (8,), "attention.k_norm.weight": (8,),
        "feed_forward.w1.weight": (44, 32), "feed_forward.w3.weight": (44, 32), "feed_forward.w2.weight": (32, 44),
        "attention_norm.weight": (32,), "ffn_norm.weight": (32,),
    }  # fmt: skip


def test_a_model_with_a_parameter_that_no_rule_covers_is_refused() -> None:
    def on_rank(rank: int) -> str:
        model, _ = build(ONE, {}, {})
        model.gate = nn.Linear(3, 3)
        with pytest.raises(ValueError, match="tp_size") as caught:
            split_model(model, init_device_mesh("cpu", (2,)))
        return str(caught.value)

    assert set(run_on_ranks(on_rank, 2)) == {
        "distributed.tp_size is 2, but lingua/distributed/tensor_parallel.py has no rule for gate.weight and 1 more; "
        "add one, or use tp_size=1"
    }
