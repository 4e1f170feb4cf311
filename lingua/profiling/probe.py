"""Compute statistics of activations, weights, gradients and attention per layer, every `probe_freq` steps.

A probed run equals a run without probes bit for bit. Activations and attention are measured in a separate forward pass
over the step's last micro batch, between backward and update: eager, without gradients, with hooks that are removed
afterwards. The training step itself does not change, so nothing is recompiled, and random states are kept. Statistics
cover the whole model and the data of all ranks, in any layout: local sums are added over all ranks. (What several ranks
share, a shard or a batch, is counted several times on both sides of a mean, which cancels.)

A probed step takes one more forward pass of one micro step, reads each weight and gradient four times, and waits once
for the device: 1.6 times a plain step (27M parameters, batch of 4 x 256, no accumulation, two busy CPU cores, both in
one process); less with accumulation. This time is included in `speed/*`.

Attention is sampled: PROBED_ROWS rows per rank, PROBED_QUERIES positions of each, evenly spread and including the last,
all heads, against every key that they see. Scores exist for CHUNK of these positions at a time, so memory grows with
H * S and not with H * S * S.

Letters: B rows, S positions, H heads, K key/value heads, E head width, C query positions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lingua.distributed.parallelize import blocks_of, reshard
from lingua.model.attention import visible
from lingua.model.transformer import Attention

PROBED_ROWS = 2
PROBED_QUERIES = 128
CHUNK = 32
PIECE = 1 << 22
"""Elements of a tensor copied to fp32 at a time."""

_OF_TENSORS = ("mean", "std", "rms", "absmax")
STATS = {
    "activation": _OF_TENSORS,
    "weight": _OF_TENSORS,
    "grad": _OF_TENSORS,
    "attn_logits": ("mean", "std", "max", "absmax"),
    "attn_entropy": ("mean", "std", "min", "max"),
}
"""Statistics kept of each quantity. attn_logits: scaled scores of visible keys, before the softmax; attn_entropy: in
nats, of a query's distribution over its keys."""


# -- sums ----------------------------------------------------------------------------------------------------------


class Tally:
    """Sums and extremes by name, on the device; the same names in the same order on all ranks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}  # fp64 (number, sum, sum of squares)
        self._peaks: dict[str, Tensor] = {}  # fp64 (largest, -smallest)

    def add(self, name: str, values: Tensor) -> None:
        """Add all elements of a tensor, or this rank's of a sharded one."""
        values = _local(values.detach())
        if not values.numel():  # a parameter with fewer rows than ranks
            self._put(name, 0, *values.new_tensor((0.0, 0.0, -math.inf, math.inf), dtype=torch.float32))
            return
        low, high = values.aminmax()
        mean = values.mean(dtype=torch.float32)
        # Squares of deviations, since sums of squares in fp32 would hide the spread of norm weights, all near 1.
        pieces = values.flatten().split(PIECE)
        deviations = torch.stack([torch.linalg.vector_norm(piece.float() - mean) for piece in pieces])
        squares = deviations.double().square().sum() + mean.double().square() * values.numel()
        self._put(name, values.numel(), mean.double() * values.numel(), squares, high, low)

    def add_where(self, name: str, values: Tensor, counted: Tensor) -> None:
        """Add the elements of `values` for which `counted` (broadcast) is true; at least one is."""
        zeroed = values.masked_fill(~counted, 0.0)
        number = counted.expand_as(values).sum()
        high = values.masked_fill(~counted, -math.inf).amax()
        low = values.masked_fill(~counted, math.inf).amin()
        self._put(name, number, zeroed.sum(), zeroed.square().sum(), high, low)

    def _put(self, name: str, number: Tensor | int, total: Tensor, squares: Tensor, high: Tensor, low: Tensor) -> None:
        sums = torch.stack([self._scalar(number), self._scalar(total), self._scalar(squares)])
        peaks = torch.stack([self._scalar(high), -self._scalar(low)])
        if name in self._sums:
            sums, peaks = sums + self._sums[name], torch.maximum(peaks, self._peaks[name])
        self._sums[name], self._peaks[name] = sums, peaks

    def _scalar(self, value: Tensor | int) -> Tensor:
        if isinstance(value, Tensor):
            return value.double()
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def read(self) -> dict[str, float]:
        """Return `{"<name>/<stat>": value}` over all ranks, finite values only. Collective; waits for the device.

        Names end in a quantity of `STATS`.
        """
        if not self._sums:
            return {}
        sums, peaks = torch.stack(list(self._sums.values())), torch.stack(list(self._peaks.values()))
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        figures: dict[str, float] = {}
        for name, (number, total, squares), (high, below) in zip(
            self._sums, sums.tolist(), peaks.tolist(), strict=True
        ):
            known = stats_of(number, total, squares, high, -below)
            kept = {stat: known[stat] for stat in STATS[name.rpartition("/")[2]]}
            figures |= {f"{name}/{stat}": float(f"{x:.6g}") for stat, x in kept.items() if math.isfinite(x)}
        return figures


def stats_of(number: float, total: float, squares: float, high: float, low: float) -> dict[str, float]:
    """Return statistics of `number` values from their sum, sum of squares, maximum and minimum; NaN for no values."""
    if not number:
        return dict.fromkeys(("mean", "std", "rms", "max", "min", "absmax"), math.nan)
    mean, square = total / number, squares / number
    return {
        "mean": mean,
        "std": math.sqrt(max(square - mean * mean, 0.0)) if math.isfinite(square) else math.nan,
        "rms": math.sqrt(square) if square >= 0 else math.nan,
        "max": high,
        "min": low,
        "absmax": max(high, -low),
    }


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, after pending sums over ranks."""
    if not isinstance(tensor, DTensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        tensor = tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
        assert isinstance(tensor, DTensor)
    return tensor.to_local()


# -- attention -----------------------------------------------------------------------------------------------------


def probed_positions(seq_len: int) -> Tensor:
    """Return at most PROBED_QUERIES positions, evenly spread and including the last one, which sees the most keys."""
    n = min(PROBED_QUERIES, seq_len)
    return torch.arange(1, n + 1) * seq_len // n - 1


def tally_attention(
    tally: Tally,
    name: str,
    q: Tensor,  # (B, S, H, E), rotated
    k: Tensor,  # (B, S, K, E)
    window: int | None,
    doc_ids: Tensor | None,  # (B, S)
    causal: bool = True,
) -> None:
    """Add the inputs of softmax and the entropy of its outputs, for a sample of rows and positions."""
    keys = torch.arange(q.shape[1], device=q.device)
    for row in range(min(PROBED_ROWS, len(q))):
        row_k = k[row].float()  # (S, K, E)
        for queries in probed_positions(q.shape[1]).to(q.device).split(CHUNK):
            seen = visible(queries[:, None], keys, window) | (not causal)  # (C, S)
            if doc_ids is not None:
                seen = seen & (doc_ids[row, queries, None] == doc_ids[row])
            grouped = q[row, queries].float().unflatten(1, (k.shape[2], -1))  # (C, K, H/K, E)
            scores = torch.einsum("ckge,ske->kgcs", grouped, row_k) * q.shape[-1] ** -0.5  # (K, H/K, C, S)
            tally.add_where(f"{name}/attn_logits", scores, seen)
            shares = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
            tally.add(f"{name}/attn_entropy", torch.special.entr(shares).sum(dim=-1))  # (K, H/K, C)


# -- the probe -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def probe(
    model: nn.Module, device: torch.device, forward: Callable[[], object], doc_ids: Tensor | None
) -> dict[str, float]:
    """Return `{"probe/<module>/<quantity>/<stat>": value}` of a model with gradients. Collective.

    `forward` runs the model on the batch with document numbers `doc_ids`. Gradients are those of the whole step, before
    clipping.
    """
    tally = Tally(device)
    rng = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(rng), eager(model), _watched(model, tally, device, doc_ids):
        forward()
    reshard(model)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        tally.add(f"probe/{module}/weight", parameter)
        if parameter.grad is not None:
            tally.add(f"probe/{module}/grad", parameter.grad)
    return tally.read()


def watched_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of each block and of its parts that contain matrices: attention, feed-forward, ..."""
    for name, block in blocks_of(model):
        yield f"layers.{name}", block
        for part_name, part in block.named_children():
            if any(parameter.ndim >= 2 for parameter in part.parameters()):
                yield f"layers.{name}.{part_name}", part


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run modules uncompiled inside this context: hooks are called, and nothing is compiled."""
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


@contextmanager
def _watched(model: nn.Module, tally: Tally, device: torch.device, doc_ids: Tensor | None) -> Iterator[None]:
    """Add the outputs of the watched modules to the tally inside this context."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for tensor in _tensors(output):
                tally.add(f"probe/{name}/activation", tensor)
            if isinstance(module, Attention):
                q, k, _ = module.project(*args)
                with torch.autocast(device.type, enabled=False):
                    tally_attention(tally, f"probe/{name}", q, k, args[1].window, doc_ids, args[1].causal)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in watched_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterable[Tensor]:
    """Return the floating-point tensors of an output, which may be a tensor or, in a user's model, a tuple."""
    outputs = output if isinstance(output, tuple | list) else (output,)
    return (each for each in outputs if isinstance(each, Tensor) and each.is_floating_point())
