"""Parallelize a model: tensor parallelism, activation checkpointing, compile, FSDP2.

Parameters and optimizer stay fp32 and keep their names in every layout; reductions are fp32; tied weights stay one
tensor. Replicas, full shards and their product (HSDP) share one code path: FSDP2 on a mesh of (dp_replicate, dp_shard),
on top of tensor parallelism. A single process needs no FSDP and gets autocast. Communication per block in a step of n
micro steps:

    replicas                      one all-reduce of the gradient
    full shards                   2n all-gathers of the parameters, one reduce-scatter of the gradient
      keep_gathered               1 all-gather; 2 bytes per parameter more (bf16)
      accumulate_sharded          n reduce-scatters; the gradient of n > 1 is not held whole: 4 bytes per parameter less
    HSDP                          as full shards, and one all-reduce of the reduced gradient

The model's structure defines the groups: `model.layers` is a ModuleDict or ModuleList of blocks, and a `Head` is the
output layer. Embedding and heads are gathered once per micro step with full shards; a head's gradient is sent as soon
as backward begins, overlapped with the blocks' work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lingua.config.keys.distributed import DistributedArgs
from lingua.distributed.compile import compile_model
from lingua.distributed.process_group import World
from lingua.distributed.tensor_parallel import split_model
from lingua.model import float8
from lingua.model.decoder import Head

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Selective checkpointing keeps the expensive products and attention, and recomputes the cheap rest.
_KEPT_OPERATORS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def _policy(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    kept = operator in _KEPT_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute_in_backward(block: nn.Module, **choice: Callable[[], Any]) -> None:
    """Checkpoint a block's activations by replacing `forward`, so that parameter names stay as they are.

    `forward` is a function of this file, not a `partial`: torch.compile begins at the first frame that is not torch's
    own, and would find none below `checkpoint`.
    """
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, **choice, **kwargs)

    block.forward = forward


def _use_float8(model: nn.Module, args: DistributedArgs, device: torch.device) -> None:
    """Compute the products of matching layers in float8. Raises ValueError if the device cannot."""
    assert args.float8_recipe is not None
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    reason = float8.refusal(device.type, capability)
    if reason is not None:
        raise ValueError(f"distributed.float8_recipe {args.float8_recipe}: {reason}; leave it null here")
    log.info("%s", float8.convert(model, args.float8_recipe, args.float8_filter))


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, block) of the model's layers, in order."""
    layers = model.get_submodule("layers")
    return list(layers.named_children())


def parallelize(model: nn.Module, args: DistributedArgs, world: World) -> nn.Module:
    """Prepare `model` (on any device, also meta) for this world, in place; return it.

    Raises ValueError for a layout that is not built yet.
    """
    if args.float8_recipe is not None:
        _use_float8(model, args, world.device)
    if world.mesh is not None and args.tp_size > 1:
        split_model(model, world.mesh["tp"])
    for _, block in blocks_of(model):
        if args.full_activation_checkpointing:
            _recompute_in_backward(block)
        elif args.selective_activation_checkpointing:
            _recompute_in_backward(block, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    if args.compile:
        if args.compile_scope == "model" and world.mesh is not None:
            raise ValueError("distributed.compile_scope model needs one process: FSDP2 works between blocks; use block")
        compile_model(model, (block for _, block in blocks_of(model)), args)
    if world.mesh is not None:
        mesh = _data_mesh(world.mesh)
        reshard_after_forward = args.fsdp_type == "full_shard" and not args.keep_gathered
        policy = MixedPrecisionPolicy(
            param_dtype=None if args.model_dtype == "fp32" else DTYPES[args.model_dtype],
            reduce_dtype=torch.float32,
        )
        groups = _groups(model)
        for group in groups:  # backward begins with the heads
            drop = reshard_after_forward and not isinstance(group, Head)
            fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=drop)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        _gather_ahead(model, groups)
    return model


def _groups(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters are sent together, in the order of forward; the root sends the rest.

    An embedding that is also the head is left to the root: it is used at both ends.
    """
    heads = [module for module in model.modules() if isinstance(module, Head)]
    embeddings = [module for module in model.children() if isinstance(module, nn.Embedding)] if heads else []
    return [*embeddings, *(block for _, block in blocks_of(model)), *heads]


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the data-parallel axes; without replicas only one, or FSDP2 would reduce over a group of one rank."""
    return mesh["dp_replicate", "dp_shard"] if mesh.size(0) > 1 else mesh["dp_shard"]


def _gather_ahead(model: nn.Module, groups: Sequence[nn.Module]) -> None:
    """Begin to gather a group's parameters before the previous group computes.

    Otherwise that begins when the host reaches the group, which is too late if the host is not far ahead of the device.
    In backward FSDP2 prefetches by itself. Cost: the gathered parameters of one more group.
    """
    for module, following in pairwise([model, *groups]):
        assert isinstance(module, FSDPModule)
        assert isinstance(following, FSDPModule)
        module.set_modules_to_forward_prefetch([following])
        if isinstance(following, nn.Embedding):
            following.set_unshard_in_backward(False)  # its gradient needs no weights


def forward_precision(model: nn.Module, args: DistributedArgs, device: torch.device) -> AbstractContextManager:
    """Return the context of every forward pass: autocast, unless FSDP2 already chooses the dtype."""
    if isinstance(model, FSDPModule) or args.model_dtype == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[args.model_dtype])


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters that a forward pass without a backward leaves."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def begin_micro_step(model: nn.Module, args: DistributedArgs, is_last: bool) -> None:
    """Call before each micro step; communication that can wait for the last one of a step is deferred to it."""
    if not isinstance(model, FSDPModule):
        return
    if args.accumulate_sharded:
        model.set_requires_all_reduce(is_last)  # with HSDP: among the replicas
    else:
        model.set_requires_gradient_sync(is_last)
    # Parameters do not change before the update. If forward has left all of them gathered, keeping them is free.
    model.set_reshard_after_backward(is_last or (args.fsdp_type == "full_shard" and not args.keep_gathered))


def set_matmul_precision(args: DistributedArgs) -> None:
    """Set process-wide options of matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = args.matmul_allow_tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = args.allow_bf16_reduced_precision_reduction


def recomputed(args: DistributedArgs, attn_impl: str) -> tuple[bool, bool]:
    """Return what backward recomputes: (blocks, attention kernels). Selective: kernels that _KEPT_OPERATORS lacks."""
    selective = args.selective_activation_checkpointing and not attn_impl.startswith(("sdpa", "varlen"))
    return args.full_activation_checkpointing, args.full_activation_checkpointing or selective
