"""Tensor parallelism: one model over several ranks, each with a part of the heads, the feed-forward and the vocabulary.

The computed function and the parameter names do not change. Every parameter is split or copied by a rule below, or the
model is refused. Between blocks each rank holds a part of the positions (sequence parallelism), so that norms and the
residual stream are split too. Each block takes two all-gathers and two reduce-scatters of the stream (B, S, D) in
forward, and as many in backward; the gathered inputs of attention and feed-forward are kept for backward. Each step
takes an all-reduce of each norm's gradient.

    stream (B, S/t, D) -> norm -> gather (B, S, D) -> wq wk wv | w1 w3 by rows -> own heads | own width -> wo | w2 by
    columns -> reduce-scatter (B, S/t, D) -> + stream

Letters: B rows, S positions, D model width, V vocabulary, t tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

_BY_POSITION = Shard(1)


class GatherPositions(ParallelStyle):
    """Gather all positions of the stream, a module's first argument; backward reduce-scatters."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(_gather)
        return module


def _gather(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    stream, *rest = inputs
    gathered = stream.redistribute(placements=[Replicate()])
    if stream.shape[1] % stream.device_mesh.size():  # only in generation; training has even parts
        # Unpadding returns a view that torch wrongly reports as contiguous, hence the clone.
        gathered = gathered.clone(memory_format=torch.contiguous_format)
    return gathered, *rest


class VocabParallelEmbedding(RowwiseParallel):
    """An embedding split by rows of the vocabulary, which waits for the reduction of its output.

    Otherwise a block would be compiled twice: for a pending stream and for a finished one.
    """

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        return outputs.redistribute(placements=output_layouts)


class SplitByRows(ColwiseParallel):
    """A weight split by rows; inputs and outputs of its module do not change."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._partition_linear_fn)


# The stream stays a DTensor from block to block: it knows its length, so positions need not divide evenly.
_NORM = SequenceParallel(sequence_dim=1)
_HEAD_NORM = SequenceParallel(sequence_dim=2, use_local_output=True)  # (B, S, heads, E): each rank has its heads
_TO_OWN = ColwiseParallel()
_FROM_OWN = RowwiseParallel(output_layouts=_BY_POSITION, use_local_output=False)

BLOCKS: Mapping[str, ParallelStyle] = {
    r"tok_embeddings": VocabParallelEmbedding(
        input_layouts=Replicate(), output_layouts=_BY_POSITION, use_local_output=False
    ),
    r"layers\.\d+\.(attention_norm|ffn_norm)|norm": _NORM,
    r"layers\.\d+\.(attention|feed_forward)": GatherPositions(),
    r"layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])": _TO_OWN,
    r"layers\.\d+\.(attention\.wo|feed_forward\.w2)": _FROM_OWN,
    r"layers\.\d+\.attention\.[qk]_norm": _HEAD_NORM,
    r"output|heads\.\d+": SplitByRows(),  # by vocabulary; the loss and `logits` know it
}
"""Pattern of a module's full name -> how it is split. For the blocks of lingua/model/transformer.py."""


def split_model(model: nn.Module, mesh: DeviceMesh, rules: Mapping[str, ParallelStyle] = BLOCKS) -> None:
    """Spread `model` (on any device, also meta) over the ranks of a one-dimensional mesh, in place.

    Raises ValueError for a parameter that no rule covers.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, _ in model.named_modules():
        styles = [style for pattern, style in rules.items() if re.fullmatch(pattern, name)]
        if styles:
            plan[name] = styles[0]
    parallelize_module(model, mesh, plan)
    left = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if left:
        raise ValueError(
            f"distributed.tp_size is {mesh.size()}, but lingua/distributed/tensor_parallel.py has no rule for {left[0]}"
            f"{f' and {len(left) - 1} more' if left[1:] else ''}; add one, or use tp_size=1"
        )
