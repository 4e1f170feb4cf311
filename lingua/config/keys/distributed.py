"""Keys of `distributed:` and `env:`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lingua.config.base import Args, PositiveInt, Text


class DistributedArgs(Args):
    """How the run is spread over devices."""

    dp_replicate: PositiveInt | None = None
    """Data-parallel copies. Null: world size / (dp_shard * tp_size)."""
    dp_shard: PositiveInt | None = None
    """Ranks that share one sharded copy. Null: what dp_replicate leaves with full_shard, otherwise 1."""
    tp_size: PositiveInt = 1
    """Tensor-parallel ranks: they share each row. Heads, feed-forward layers and vocabulary are split over them, and
    positions between blocks."""
    fsdp_type: Literal["no_shard", "full_shard"] = "no_shard"
    """no_shard: replicas; full_shard: parameters, gradients and optimizer sharded (FSDP2)."""
    keep_gathered: bool = False
    """full_shard: gather parameters once per step, not twice per micro step; costs 2 bytes per parameter (bf16)."""
    accumulate_sharded: bool = False
    """full_shard: reduce gradients in every micro step, not once per step; saves up to 4 bytes per parameter."""
    model_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of parameters in forward and backward; the optimizer's copy and reductions stay fp32. fp16, for GPUs without
    bf16, scales the loss dynamically: a step that overflows is skipped and halves the scale."""
    compile: bool = False
    """torch.compile the blocks and the loss."""
    compile_scope: Literal["block", "model"] = "block"
    """block: each block, with one compiled code for all; model: the whole model, slow to compile, one process only."""
    compile_cache: Text | None = "auto"
    """Node-local folder that keeps compiled code for the node's ranks and for later attempts. auto: under /var/tmp,
    private to the user. Null: torch's choice. TORCHINDUCTOR_CACHE_DIR in the environment wins."""
    compile_cache_size_limit: PositiveInt = 8
    """Versions of compiled code (training, validation, other numbers of rows) before torch falls back to eager."""
    selective_activation_checkpointing: bool = False
    """Recompute the cheap operators of each block in the backward pass."""
    full_activation_checkpointing: bool = False
    """Recompute each whole block in the backward pass."""
    activation_memory_budget: Annotated[float, Field(ge=0, le=1)] | None = None
    """With compile: share of the tensors for backward that the compiler may keep, 0 (a block's input) to 1 (its own
    choice); it recomputes those that cost the fewest FLOPs (torch/_functorch/config.py). Null: torch's choice."""
    float8_recipe: Literal["rowwise", "tensorwise"] | None = None
    """Compute matrix products of matching layers in float8 (Ada, Hopper and newer GPUs). rowwise: one scale per row,
    more accurate; tensorwise: one per tensor, faster. Null: none."""
    float8_filter: Text = r"layers\.[0-9]+\."
    """Regular expression searched for in the names of the blocks' linear layers (layers.0.attention.wq); those that
    match are float8, if their widths are multiples of 16."""
    matmul_allow_tf32: bool = False
    """fp32 products may use TF32."""
    allow_bf16_reduced_precision_reduction: bool = True
    """bf16 products may accumulate in reduced precision."""
    detect_anomaly: bool = False
    """torch's anomaly detection: the run ends in the backward pass of the first NaN, whatever optim.on_nonfinite says
    and fp16's loss scale would do; slow."""
    timeout_s: PositiveInt = 600
    """A collective that waits longer than this ends the run."""

    @model_validator(mode="after")
    def _shards_fit(self) -> Self:
        if self.fsdp_type == "no_shard" and (self.dp_shard or 1) > 1:
            raise ValueError(f"dp_shard {self.dp_shard} shards nothing with fsdp_type no_shard; use full_shard")
        for key in ("keep_gathered", "accumulate_sharded"):
            if self.fsdp_type == "no_shard" and getattr(self, key):
                raise ValueError(
                    f"{key} is about shards, which fsdp_type no_shard has none of; use full_shard, or drop it"
                )
        ways = ["selective_activation_checkpointing", "full_activation_checkpointing", "activation_memory_budget"]
        chosen = [key for key in ways if getattr(self, key) not in (False, None)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; choose one")
        if self.activation_memory_budget is not None and not self.compile:
            raise ValueError("activation_memory_budget is for the compiler; set compile to true, or drop it")
        try:
            re.compile(self.float8_filter)
        except re.error as error:
            raise ValueError(f"float8_filter {self.float8_filter!r} is no regular expression: {error}") from error
        return self

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        key = "distributed.float8_recipe"
        if self.float8_recipe is not None and args.device == "cpu":
            yield key, f"{key} is {self.float8_recipe}, which needs a GPU, but device is cpu; leave it null"
        if self.float8_recipe is not None and self.tp_size > 1:
            text = f"{key} is {self.float8_recipe}, which does not know tensor parallelism"
            yield key, f"{text}; leave it null, or set distributed.tp_size=1"

    def degrees(self, world_size: int) -> tuple[int, int, int]:
        """Return (dp_replicate, dp_shard, tp_size) for this many ranks; a dp_replicate for another number is replaced.

        Raises ValueError if tp_size or dp_shard does not divide the ranks.
        """
        if world_size % self.tp_size:
            raise ValueError(f"tp_size {self.tp_size} does not divide {world_size} ranks")
        data_parallel = world_size // self.tp_size
        shard, replicate = self.dp_shard, self.dp_replicate
        if shard is None:
            left = data_parallel // replicate if replicate and data_parallel % replicate == 0 else data_parallel
            shard = left if self.fsdp_type == "full_shard" else 1
        if replicate is None or replicate * shard != data_parallel:
            if data_parallel % shard:
                raise ValueError(f"dp_shard {shard} does not divide {data_parallel} data-parallel ranks")
            replicate = data_parallel // shard
        return replicate, shard, self.tp_size


class EnvironmentArgs(Args):
    """Environment variables set before torch starts; null sets none. Variables that the user's shell has set win."""

    MKL_SERVICE_FORCE_INTEL: Text | None = None
    """Threading layer of MKL, for numpy from conda."""
    OMP_NUM_THREADS: Text = "auto"
    """Threads per process for CPU kernels. auto: 1 with a GPU, as torchrun sets; otherwise the machine's cores divided
    by its ranks."""
    MKL_NUM_THREADS: Text = "auto"
    """The same for MKL."""
    ENABLE_INTRA_NODE_COMM: Text | None = None
    """1: a prototype of torch's (c10d/symm_mem/intra_node_comm.hpp) does small all-reduces within a node instead of
    NCCL; no timeout covers it."""
    TORCH_NCCL_AVOID_RECORD_STREAMS: Text | None = None
    """Deprecated: torch 2.10 always does what 1 asked for (libtorch_cuda warns so)."""
    NCCL_IB_TIMEOUT: Text = "22"
    """InfiniBand: 4.096 us * 2^22 = 17 s per try, so that a link that is busy for seconds does not end a run;
    facebookresearch/lingua sets the same. NCCL's default: 18 to 20, depending on version (src/transport/net_ib.cc)."""
    NCCL_DEBUG: Text = "WARN"
    """How much NCCL prints (NCCL's documentation, "Environment Variables"). WARN: why a collective failed."""
    TORCH_NCCL_ASYNC_ERROR_HANDLING: Text | None = None
    """What torch does after a failed collective. Its default, 3, ends the process; 1 aborts the communicator first,
    which may hang (c10d/ProcessGroupNCCL.hpp; torch's documentation, "ProcessGroupNCCL Environment Variables")."""
