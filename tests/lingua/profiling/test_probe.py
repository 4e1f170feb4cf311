"""Statistics against plain formulas; and what a probe leaves as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import lingua.profiling.probe
from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.config.keys.model import CrossEntropyArgs
from lingua.model.loss import CrossEntropy
from lingua.profiling.probe import (
    STATS,
    Tally,
    _local,
    probe,
    probed_positions,
    stats_of,
    tally_attention,
    watched_modules,
)
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
ROWS, SEQ_LEN, HEADS, KV_HEADS, WIDTH, VOCAB = 2, 11, 4, 2, 6, 37
LOSS = CrossEntropy(CrossEntropyArgs())


def build() -> LMTransformer:
    args = LMTransformerArgs(
        dim=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seqlen=16, multiple_of=8
    )
    model = LMTransformer(args)
    model.init_weights(1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, VOCAB, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return rows[:, :-1], rows[:, 1:]


def step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    loss, _ = model(tokens, labels=labels, loss=LOSS)
    (loss / labels.numel()).backward()
    return loss.detach()


def probe_it(model: nn.Module, tokens: Tensor, labels: Tensor) -> dict[str, float]:
    return probe(model, CPU, lambda: model(tokens, labels=labels, loss=LOSS), None)


def plain_stats(values: Tensor) -> dict[str, float]:
    values = values.detach().double().flatten()
    found = {"mean": values.mean(), "std": values.std(correction=0), "rms": values.square().mean().sqrt()}
    found |= {"max": values.max(), "min": values.min(), "absmax": values.abs().max()}
    return {stat: value.item() for stat, value in found.items()}


def expected(name: str, values: Tensor) -> dict[str, Any]:
    known = plain_stats(values)
    return {f"{name}/{stat}": pytest.approx(known[stat], rel=2e-5, abs=1e-6) for stat in STATS[name.split("/")[-1]]}


# -- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_of_several_tensors_are_those_of_all_their_elements(dtype: torch.dtype):
    parts = [torch.randn(7, 3, generator=torch.Generator().manual_seed(n)).to(dtype) - 3 for n in range(3)]
    tally = Tally(CPU)
    for part in parts:
        tally.add("m/weight", part)
    assert tally.read() == expected("m/weight", torch.stack(parts))


def test_what_is_empty_or_not_finite_is_left_out():
    tally = Tally(CPU)
    tally.add("empty/weight", torch.zeros(0, 5))
    tally.add("bad/weight", torch.tensor([1.0, math.inf]))
    tally.add("worse/weight", torch.tensor([1.0, math.nan]))
    tally.add("good/weight", torch.tensor([3.0, -4.0]))
    assert tally.read() == {
        "good/weight/mean": -0.5, "good/weight/std": 3.5, "good/weight/rms": 3.53553, "good/weight/absmax": 4.0
    }  # fmt: skip


def test_the_spread_of_equal_values_is_zero_whatever_rounding_says():
    assert stats_of(3, 0.3, 0.03 - 1e-12, 0.1, 0.1)["std"] == 0.0


@pytest.mark.parametrize(("seq_len", "n", "last_gap"), [(5, 5, 1), (128, 128, 1), (2048, 128, 16), (1000, 128, 8)])
def test_sampled_positions_are_distinct_and_spread_to_the_end(seq_len: int, n: int, last_gap: int):
    positions = probed_positions(seq_len)
    assert len(positions) == n
    assert positions[-1] == seq_len - 1
    gaps = positions.diff()
    assert gaps.min() >= 1
    assert gaps.max() <= last_gap


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_figures_are_those_of_the_whole_matrix(
    window: int | None, documents: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lingua.profiling.probe, "CHUNK", 4)  # SEQ_LEN is no multiple of it
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, SEQ_LEN, HEADS, WIDTH, generator=generator)
    k = torch.randn(ROWS, SEQ_LEN, KV_HEADS, WIDTH, generator=generator)
    doc_ids = torch.tensor([[0] * 4 + [1] * 7, [0] * 11]) if documents else None

    seen = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    seen = seen & (seen.triu(1 - window) if window else seen)
    seen = seen.expand(ROWS, 1, SEQ_LEN, SEQ_LEN)
    if doc_ids is not None:
        seen = seen & (doc_ids[:, :, None] == doc_ids[:, None, :])[:, None]
    every_k = k.repeat_interleave(HEADS // KV_HEADS, dim=2)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, every_k) / math.sqrt(WIDTH)
    shares = scores.masked_fill(~seen, -math.inf).softmax(-1)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum(-1)

    tally = Tally(CPU)
    tally_attention(tally, "a", q, k, window, doc_ids)
    assert tally.read() == expected("a/attn_logits", scores[seen.expand_as(scores)]) | expected(
        "a/attn_entropy", entropy
    )


def test_scores_of_all_positions_never_exist(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    einsum = torch.einsum

    def counted(*args: Any) -> Tensor:
        out = einsum(*args)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "einsum", counted)
    seq_len = 512
    tally_attention(
        Tally(CPU), "a", torch.zeros(5, seq_len, HEADS, 2), torch.zeros(5, seq_len, KV_HEADS, 2), None, None
    )
    assert max(sizes) == HEADS * lingua.profiling.probe.CHUNK * seq_len
    assert sum(sizes) == lingua.profiling.probe.PROBED_ROWS * HEADS * lingua.profiling.probe.PROBED_QUERIES * seq_len


# -- a model -------------------------------------------------------------------------------------------------------


def test_blocks_and_their_parts_weights_and_gradients_are_seen():
    model, (tokens, labels) = build(), batch()
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, out: outputs.update({name: out.detach()})

    for name, module in watched_modules(model):
        module.register_forward_hook(note(name))
    step(model, tokens, labels)
    seen = probe_it(model, tokens, labels)
    assert list(outputs) == [f"layers.{n}{part}" for n in (0, 1) for part in (".attention", ".feed_forward", "")]
    wanted = {}
    for name, output in outputs.items():
        wanted |= expected(f"probe/{name}/activation", output)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        wanted |= expected(f"probe/{name.removesuffix('.weight')}/weight", parameter)
        wanted |= expected(f"probe/{name.removesuffix('.weight')}/grad", parameter.grad)
    attention = {key: value for key, value in seen.items() if "/attn_" in key}
    assert {key: value for key, value in seen.items() if key not in attention} == wanted
    assert len(attention) == 2 * 8
    assert attention["probe/layers.1.attention/attn_entropy/max"] <= math.log(SEQ_LEN) + 1e-5
    assert attention["probe/layers.1.attention/attn_entropy/min"] == 0.0  # a position that sees itself alone


def test_a_probe_leaves_gradients_hooks_and_random_state_as_they_were():
    model, (tokens, labels) = build(), batch()

    def draw(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + 0 * torch.rand(1)  # as a dropout would

    model.layers[0].register_forward_hook(draw)
    step(model, tokens, labels)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    hooks, state = sum(len(module._forward_hooks) for module in model.modules()), torch.get_rng_state()
    probe_it(model, tokens, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_compiled_blocks_are_seen_and_not_compiled_again():
    counter = CompileCounter()
    model, plain, (tokens, labels) = build(), build(), batch()
    for block in model.layers:
        block.compile(backend=counter)
    assert step(model, tokens, labels).item() == pytest.approx(step(plain, tokens, labels).item())
    frames = counter.frame_count
    assert frames > 0
    seen = probe_it(model, tokens, labels)
    for _ in range(2):
        step(model, tokens, labels)
        assert probe_it(model, tokens, labels).keys() == seen.keys()
    assert counter.frame_count == frames
    step(plain, tokens, labels)
    known = probe_it(plain, tokens, labels)
    kept = [key for key in known if "/grad/" not in key]
    assert {key: seen[key] for key in kept} == {key: known[key] for key in kept}


# -- ranks ---------------------------------------------------------------------------------------------------------


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [_local(parameter.grad).clone() for parameter in model.parameters() if parameter.grad is not None]


def probed_on_ranks(mesh_shape: tuple[int, int]) -> dict[str, float]:
    """A row per rank; gradients are averaged over ranks, and so is the loss."""
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    model, (tokens, labels) = build(), batch()
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    tokens, labels = tokens[rank : rank + 1], labels[rank : rank + 1]
    step(model, tokens, labels)
    before = gradients_of(model)
    seen = probe_it(model, tokens, labels)
    assert all(map(torch.equal, gradients_of(model), before))
    model.zero_grad()
    step(model, tokens, labels)  # nothing is left gathered: gradients arrive at the shards
    assert len(before) == len(list(model.parameters()))
    assert all(map(torch.equal, gradients_of(model), before))
    return seen


@pytest.mark.ranks
@pytest.mark.parametrize("mesh_shape", [(1, 2), (2, 1)])
def test_ranks_see_the_whole_model_and_batch(mesh_shape: tuple[int, int]):
    model, (tokens, labels) = build(), batch()
    step(model, tokens, labels)
    alone = probe_it(model, tokens, labels)
    for seen in run_on_ranks(lambda rank: probed_on_ranks(mesh_shape), 2):
        assert seen == pytest.approx(alone, rel=2e-5, abs=1e-7)


def sums_still_to_be_made(rank: int) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(6.0).reshape(3, 2)
    tally = Tally(CPU)
    tally.add("partial/grad", DTensor.from_local(whole * (rank + 1), mesh, [Partial()]))
    tally.add(
        "sharded/grad",
        DTensor.from_local(
            whole[:2] if rank == 0 else whole[2:], mesh, [Shard(0)], shape=whole.shape, stride=whole.stride()
        ),
    )
    tally.add("whole/grad", DTensor.from_local(whole, mesh, [Replicate()]))
    tally.add(
        "one/grad",
        DTensor.from_local(
            whole[:1] if rank == 0 else whole[:0], mesh, [Shard(0)], shape=torch.Size([1, 2]), stride=(2, 1)
        ),
    )
    return tally.read()


@pytest.mark.ranks
def test_each_placement_counts_every_element_alike():
    whole = torch.arange(6.0).reshape(3, 2)
    parts = {"partial/grad": whole * 3, "sharded/grad": whole, "whole/grad": whole, "one/grad": whole[:1]}
    known: dict[str, float] = {}
    for name, values in parts.items():
        known |= expected(name, values)
    for seen in run_on_ranks(sums_still_to_be_made, 2):
        assert seen == known
