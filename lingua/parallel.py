"""One function that turns a model into a parallel one: activation checkpointing, compile, FSDP2 or replicas.

Promise: parameters and optimizer stay fp32 and keep their names, whatever the layout; reductions are fp32; weights
that are tied stay one tensor. One code path for replicas, full shards and their product (HSDP): FSDP2 on a mesh of
(dp_replicate, dp_shard). A single process needs no FSDP and gets autocast instead.
Cost: with several ranks, what FSDP2 costs; on one rank, nothing.

The model says where it can be cut: `model.layers` is a ModuleDict or ModuleList of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lingua.distributed import World
from lingua.schema import DistributedArgs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# What selective checkpointing keeps: the expensive products and attention; the cheap rest is computed again.
_KEPT_OPERATORS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    kept = operator in _KEPT_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute_in_backward(block: nn.Module, **choice: Callable[[], Any]) -> None:
    """Activation checkpointing by replacing `forward`, so that parameter names stay as they are."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, **choice)


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of the model's layers, in order."""
    layers = model.get_submodule("layers")
    return list(layers.named_children())


def parallelize(model: nn.Module, args: DistributedArgs, world: World) -> nn.Module:
    """Make `model` (on any device, also meta) ready for this world; returns it, changed in place.

    Raises ValueError for a layout that is not built yet.
    """
    if args.tp_size > 1:
        raise ValueError(f"distributed.tp_size {args.tp_size}: tensor parallelism is not available; use tp_size=1")
    if args.float8_recipe is not None:
        raise ValueError(f"distributed.float8_recipe {args.float8_recipe}: float8 is not available; leave it null")
    if args.model_dtype == "fp16":
        raise ValueError("distributed.model_dtype fp16 needs loss scaling, which is not available; use bf16 or fp32")
    for _, block in blocks_of(model):
        if args.full_activation_checkpointing:
            _recompute_in_backward(block)
        elif args.selective_activation_checkpointing:
            _recompute_in_backward(block, context_fn=partial(create_selective_checkpoint_contexts, _policy))
        if args.compile:
            block.compile()
    if args.compile:
        torch._dynamo.config.recompile_limit = args.compile_cache_size_limit
    if world.mesh is not None:
        mesh = world.mesh["dp_replicate", "dp_shard"]
        policy = MixedPrecisionPolicy(
            param_dtype=None if args.model_dtype == "fp32" else DTYPES[args.model_dtype],
            reduce_dtype=torch.float32,
        )
        for _, block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=args.fsdp_type == "full_shard")
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def forward_precision(model: nn.Module, args: DistributedArgs, device: torch.device) -> AbstractContextManager:
    """Context of every forward pass: autocast where FSDP2 does not already choose the type."""
    if isinstance(model, FSDPModule) or args.model_dtype == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[args.model_dtype])


def reshard(model: nn.Module) -> None:
    """Put the shards back in place of gathered parameters, which a forward pass without a backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward reduces gradients over ranks; the last micro step of a step must."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def set_matmul_precision(args: DistributedArgs) -> None:
    """Process-wide choices for matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = args.matmul_allow_tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = args.allow_bf16_reduced_precision_reduction


def recomputed(args: DistributedArgs, attn_impl: str) -> tuple[bool, bool]:
    """What backward computes again: (blocks, attention kernels). Selective: kernels that _KEPT_OPERATORS lacks."""
    selective = args.selective_activation_checkpointing and attn_impl not in ("sdpa", "sdpa_flash", "sdpa_cudnn")
    return args.full_activation_checkpointing, args.full_activation_checkpointing or selective
