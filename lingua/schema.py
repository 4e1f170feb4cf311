"""Args of the rooms that import torch, kept torch-free so that `lingua check` starts fast and needs no GPU.

Each class belongs to the room named in its docstring. Arithmetic that only needs the config lives beside it
(parameter counts, FLOPs per token), so that the check, the trainer and the benchmarks cannot disagree.

Letters: B rows, S positions, D model width (`dim`), H heads, L layers, V vocabulary.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lingua.args import Args, Part, Text, register

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AttnImpl = Literal[
    "auto", "sdpa", "sdpa_cudnn_first", "sdpa_flash", "sdpa_cudnn", "flex", "varlen", "xformers", "flash_attn", "eager"
]

# -- model (lingua/transformer.py, apps/main/transformer.py) ----------------------------------------------------


class RopeScalingArgs(Args):
    """Llama 3's stretching of rotary frequencies for contexts longer than those trained on (Llama 3.1 model card)."""

    factor: Annotated[float, Field(ge=1)] = 32.0
    """How much longer the context becomes."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """Wavelengths above original_max_position_embeddings / this are divided by `factor`."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """Wavelengths below original_max_position_embeddings / this stay as they are; between, interpolated."""
    original_max_position_embeddings: PositiveInt = 8192
    """Context length, in positions, that the frequencies were made for."""
    rope_type: Literal["llama3"] = "llama3"
    """Only Llama 3's rule is known."""


class ModelArgs(Part):
    """What every model has, whatever its type: the loop, the check and the exporters read only this."""

    type: str = "llama"
    """Which registered model; own ones come by `plugins`."""
    vocab_size: Annotated[int, Field(ge=-1)] = -1
    """V. -1: the tokenizer's."""
    max_seqlen: PositiveInt = 1024
    """Longest S the model is built for; training raises it to data.seq_len."""
    seed: int | None = None
    """Seed of the initial weights. Null: the run's `seed`."""

    def n_params(self) -> int:
        """Parameters in all. Needs vocab_size >= 1."""
        raise NotImplementedError

    def n_params_non_embedding(self) -> int:
        """Parameters without input embedding and output head."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward FLOPs per token, recomputation not counted."""
        raise NotImplementedError

    def recomputed_flops_per_token(self, seq_len: int, blocks: bool, attention: bool) -> float | None:
        """FLOPs per token of computing `blocks`, or only their `attention` kernels, once more. None: not known."""
        return None


class LlamaArgs(ModelArgs):
    """Llama-type decoder, built from the blocks of lingua/transformer.py. An app's own Args say who builds it."""

    type: Literal["llama"] = "llama"
    vocab_multiple_of: PositiveInt = 1
    """Embedding and head get rows up to a multiple of this, which kernels like (64 or 128). The additional ones are no
    tokens: they have no probability, no gradient and no place in what is exported for others."""
    dim: PositiveInt = 512
    """D."""
    n_layers: PositiveInt = 8
    """L."""
    n_heads: PositiveInt | None = None
    """H. Null: dim / head_dim."""
    head_dim: PositiveInt | None = None
    """Width of a head. Null: dim / n_heads."""
    n_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention). Null: n_heads."""
    hidden_dim: PositiveInt | None = None
    """Width of the feed-forward layer. Null: 8/3 dim times ffn_dim_multiplier, rounded up to multiple_of."""
    ffn_dim_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Stretches the derived feed-forward width; ignored when hidden_dim is given."""
    multiple_of: PositiveInt = 256
    """The derived feed-forward width is a multiple of this."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScalingArgs | None = None
    """Llama 3's frequency scaling. Null: none."""
    init_base_std: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of initial weights. Null: fan_in ** -0.5."""
    init_std_factor: Literal["disabled", "global_depth", "current_depth", "dim_ratio"] = "disabled"
    """Divides the std of residual outputs by: 1 | sqrt(2(L+1)) | sqrt(2(l+1)) | D/4096."""
    weight_tying: bool = False
    """Input embedding and output head are one parameter."""
    qk_norm: bool = False
    """RMSNorm on queries and keys of each head, before rotation."""
    sliding_window: PositiveInt | None = None
    """Each position sees itself and the sliding_window - 1 before it. Null: all before it."""
    attn_impl: AttnImpl = "auto"
    """Attention kernel; what is named is used, or refused with the reason. sdpa: torch's choice; sdpa_cudnn_first: the
    same, but cuDNN's wherever it can; varlen: torch's flash kernel on packed documents. auto: the fastest that fits."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.n_heads is None and self.head_dim is None:
            raise ValueError("needs n_heads or head_dim, and neither is given; set model.n_heads")
        if self.n_heads is None and self.dim % (self.head_dim or 1):
            raise ValueError(f"dim {self.dim} is not a multiple of head_dim {self.head_dim}; set n_heads too")
        if self.head_dim is None and self.dim % (self.n_heads or 1):
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}; set head_dim too")
        if self.heads % self.kv_heads:
            raise ValueError(f"n_heads {self.heads} is not a multiple of n_kv_heads {self.kv_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim {self.head_width} is odd; rotary positions turn pairs")
        return self

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head: V, padded."""
        return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of

    @property
    def heads(self) -> int:
        return self.n_heads or self.dim // (self.head_dim or 1)

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // (self.n_heads or 1)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        """Llama's rule: two thirds of 4D (SwiGLU has three matrices), stretched, rounded up."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * ((width + self.multiple_of - 1) // self.multiple_of)

    def n_params_non_embedding(self) -> int:
        attention = 2 * self.dim * self.head_width * (self.heads + self.kv_heads)
        norms = 2 * self.dim + (2 * self.head_width if self.qk_norm else 0)
        return self.n_layers * (attention + 3 * self.dim * self.ffn_width + norms) + self.dim

    def n_params(self) -> int:
        embeddings = self.vocab_rows * self.dim * (1 if self.weight_tying else 2)
        return self.n_params_non_embedding() + embeddings

    def flops_per_token(self, seq_len: int) -> float:
        """6N + 12LHQS (PaLM, arXiv 2204.02311, appendix B), N = all parameters but the input embedding's lookup.

        Attention is not halved for causality; with a sliding window, S is the window. Padded rows of the vocabulary
        (`vocab_multiple_of`) are computed with and not counted.
        """
        n_matmul = self.n_params_non_embedding() + self.vocab_size * self.dim
        seen = min(seq_len, self.sliding_window or seq_len)
        return 6 * n_matmul + 12 * self.n_layers * self.heads * self.head_width * seen

    def recomputed_flops_per_token(self, seq_len: int, blocks: bool, attention: bool) -> float:
        """One more forward pass of all blocks, 2N_blocks + 4LHQS, or of their attention kernels alone, 4LHQS.

        A forward pass is a third of forward and backward (PaLM, as above; "hardware FLOPs" as in arXiv 2205.05198, A).
        The last product of a block is not made again: backward needs its inputs only (torch stops there).
        """
        again = self.n_params_non_embedding() - self.n_layers * self.dim * self.ffn_width
        seen = min(seq_len, self.sliding_window or seq_len)
        kernels = 4 * self.n_layers * self.heads * self.head_width * seen
        return (2 * again if blocks else 0) + (kernels if blocks or attention else 0)


# -- loss (lingua/loss.py) ---------------------------------------------------------------------------------------


@register("loss", "cross_entropy")
class CrossEntropyArgs(Part):
    """Next-token cross-entropy (lingua/loss.py)."""

    builder: ClassVar[str] = "lingua.loss:CrossEntropy"
    splits_words: ClassVar[bool] = True  # takes a head whose words are spread over ranks: tensor parallelism

    type: Literal["cross_entropy"] = "cross_entropy"
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-partition term that keeps logits small (PaLM uses 1e-4). 0: none."""
    chunk_tokens: Annotated[int, Field(ge=0)] = 4096
    """Logits are made for this many positions at a time, so the whole (B*S, V) never exists. 0: at once."""


# -- optimizer (lingua/optim.py, lingua/muon.py) -----------------------------------------------------------------


class OptimArgs(Part):
    """What every optimizer has: learning rate, schedule, clipping, and what to do about a step gone wrong."""

    type: str = "adamw"
    """Which registered optimizer."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, per step and lr."""
    decay_all: bool = False
    """Decay norms and embeddings too (lingua did). false: matrices of the blocks and the head only."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient, once per step. 0: no clipping."""
    scheduler: str = "cosine"
    """Schedule of the learning rate: constant, linear, inv_sqrt, cosine, wsd, or one of a plugin's."""
    warmup: Annotated[int, Field(ge=0)] = 2000
    """Steps of linear warm-up from 0."""
    lr_min_ratio: Fraction = 0.1
    """The schedule ends at lr times this."""
    cycle_length: Annotated[float, Field(gt=0)] = 1.0
    """cosine: length of a cycle as a share of the run."""
    cosine_theta: Annotated[float, Field(gt=0)] = 1.0
    """cosine: exponent on the progress within a cycle."""
    annealing_step: Annotated[int, Field(ge=0)] = 1000
    """inv_sqrt: steps of the final linear annealing."""
    decay_fraction: Fraction = 0.1
    """wsd: share of the run spent decaying."""
    exp_factor: Annotated[float, Field(gt=0)] = 0.5
    """inv_sqrt: exponent of the decay."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop before the optimizer moves, or skip that step. With
    distributed.model_dtype fp16 a gradient that overflows is always skipped, until the loss scale has fallen to 1."""
    max_skips: Annotated[int, Field(ge=0)] = 10
    """With `skip`: steps that may be skipped in a row before the run stops."""

    def state_bytes(self, n_params: int, n_in_matrices: int) -> int:
        """Bytes of the optimizer's state, to plan with; unless it says otherwise, two fp32 moments as AdamW's.

        `n_in_matrices`: those of the parameters that are in the matrices of the blocks.
        """
        return 8 * n_params


class AdamArgs(OptimArgs):
    """What AdamW needs, alone or as a part of another optimizer."""

    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""


@register("optim", "adamw")
class AdamWArgs(AdamArgs):
    """AdamW (lingua/optim.py)."""

    builder: ClassVar[str] = "lingua.optim:build_adamw"

    type: Literal["adamw"] = "adamw"


@register("optim", "muon")
class MuonArgs(AdamArgs):
    """Muon for the matrices of the blocks, AdamW for embeddings, head and vectors (lingua/muon.py)."""

    builder: ClassVar[str] = "lingua.muon:build_muon"

    type: Literal["muon"] = "muon"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the momentum of the matrices (Keller Jordan)."""
    nesterov: bool = True
    """Orthogonalise the gradient mixed with the momentum, instead of the momentum alone."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Newton-Schulz iterations that make a matrix orthogonal, or nearly so."""
    ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of these iterations and of what ranks exchange for them. auto: bf16 on a GPU, fp32 on a CPU."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Multiplies a matrix's update. match_rms_adamw: 0.2 sqrt(max(rows, columns)), so that lr and weight_decay of AdamW
    carry over (Moonlight, arXiv 2502.16982); original: sqrt(max(1, rows / columns)), for which lr is about 0.02."""
    adamw_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """AdamW's part learns at lr times this. With `scale: original` about 0.015 (3e-4 beside 0.02)."""

    def state_bytes(self, n_params: int, n_in_matrices: int) -> int:
        return 4 * n_in_matrices + super().state_bytes(n_params - n_in_matrices, 0)


# -- processes and parallelism (lingua/distributed.py, lingua/parallel.py) -----------------------------------------


class DistributedArgs(Args):
    """How the run is spread over devices."""

    dp_replicate: PositiveInt | None = None
    """Data-parallel copies. Null: world size / (dp_shard * tp_size)."""
    dp_shard: PositiveInt | None = None
    """Ranks that share one sharded copy. Null: with full_shard what dp_replicate leaves, otherwise 1."""
    tp_size: PositiveInt = 1
    """Ranks that share each row: heads, feed-forward and words are split over them, positions between the blocks."""
    fsdp_type: Literal["no_shard", "full_shard"] = "no_shard"
    """no_shard: replicas; full_shard: parameters, gradients and optimizer sharded (FSDP2)."""
    keep_gathered: bool = False
    """full_shard: gather the parameters once per step, not twice per micro step; 2 more bytes of each (bf16)."""
    accumulate_sharded: bool = False
    """full_shard: reduce gradients in every micro step, not once per step; 4 bytes less of each while accumulating."""
    model_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of parameters in forward and backward; the optimizer's copy and reductions stay fp32. fp16, for GPUs without
    bf16, scales the loss by a factor that is found by itself: a step that overflows is skipped and halves it."""
    compile: bool = False
    """torch.compile the blocks, and the loss."""
    compile_scope: Literal["block", "model"] = "block"
    """block: each by itself, all sharing one compiled code; model: all at once, slow to compile, one process only."""
    compile_cache: Text | None = "auto"
    """Folder of the node's own where compiled code is kept for its ranks and for later starts. auto: below /var/tmp,
    private to the user. Null: torch's own choice. TORCHINDUCTOR_CACHE_DIR in the environment wins."""
    compile_cache_size_limit: PositiveInt = 8
    """Versions of compiled code (train, validate, other numbers of rows) before torch falls back to eager."""
    selective_activation_checkpointing: bool = False
    """Recompute the cheap operators of each block in backward."""
    full_activation_checkpointing: bool = False
    """Recompute each whole block in backward."""
    float8_recipe: Literal["rowwise", "tensorwise"] | None = None
    """Matrix products of matching layers in float8 (Ada and Hopper GPUs on). rowwise: a scale per row, more exact;
    tensorwise: one per tensor, faster. Null: none."""
    float8_filter: Text = r"layers\.[0-9]+\."
    """Regular expression, searched for in the names of the blocks' linear layers (layers.0.attention.wq): those are
    float8. Widths that are no multiple of 16 leave a layer as it is."""
    matmul_allow_tf32: bool = False
    """fp32 products may use TF32."""
    allow_bf16_reduced_precision_reduction: bool = True
    """bf16 products may accumulate in reduced precision."""
    detect_anomaly: bool = False
    """torch's anomaly detection: the run ends in the backward pass of the first NaN, whatever optim.on_nonfinite and
    fp16's loss scale would do; slow."""
    spawn_method: Literal["fork", "spawn", "forkserver"] = "forkserver"
    """Kept so that lingua's configs load; loader workers never import torch and need no choice."""
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
        if self.selective_activation_checkpointing and self.full_activation_checkpointing:
            raise ValueError("selective_ and full_activation_checkpointing exclude each other; choose one")
        try:
            re.compile(self.float8_filter)
        except re.error as error:
            raise ValueError(f"float8_filter {self.float8_filter!r} is no regular expression: {error}") from error
        return self

    def degrees(self, world_size: int) -> tuple[int, int, int]:
        """(dp_replicate, dp_shard, tp_size) for this many ranks.

        Raises ValueError with the sizes that fit when they do not multiply to world_size.
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
    """Environment variables set before torch starts. What the user's shell has set already wins."""

    MKL_SERVICE_FORCE_INTEL: Text = "GNU"
    """Threading layer of MKL."""
    OMP_NUM_THREADS: Text = "auto"
    """Threads per process of CPU kernels. auto: 1 beside a GPU, otherwise the machine's cores over its ranks."""
    MKL_NUM_THREADS: Text = "auto"
    """The same for MKL."""
    ENABLE_INTRA_NODE_COMM: Text = "1"
    """NCCL paths inside a node."""
    TORCH_NCCL_AVOID_RECORD_STREAMS: Text = "1"
    """Less memory held by collectives."""
    NCCL_IB_TIMEOUT: Text = "22"
    """InfiniBand time-out exponent."""
    NCCL_DEBUG: Text = "WARN"
    """How much NCCL prints."""
    TORCH_NCCL_ASYNC_ERROR_HANDLING: Text = "1"
    """A failed collective ends the process instead of hanging."""


# -- checkpoints (lingua/checkpoint/) ------------------------------------------------------------------------------


class SaveEvery(Args):
    """A period of checkpoints and how many of them to keep."""

    every: Annotated[int, Field(ge=-1)] = 1000
    """Steps between two. 0 or -1: none but the last."""
    keep: Annotated[int, Field(ge=-1)] = 0
    """Newest ones kept. 0 or -1: all."""


class CheckpointArgs(Args):
    """Checkpoints: when, how many, where, and what to start from."""

    dump: SaveEvery = SaveEvery()
    """Checkpoints kept for restart."""
    eval: SaveEvery = SaveEvery()
    """Checkpoints kept for evaluation."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Steps between milestones, which are saved whatever the periods say and kept for good. 0: none."""
    path: Text | None = None
    """Folder of the checkpoints. Null: <dump_dir>/checkpoints."""
    init_ckpt_path: Text | None = None
    """Weights to start from: a run, a checkpoint folder, consolidated.pth, a torch file or a Hugging Face folder."""
    init_ckpt_model_key: Text | None = None
    """Key under which the weights lie in that file or folder. Null: found by itself."""
    continue_training_from_init: bool = False
    """Take optimizer, step and data position from init_ckpt_path too."""
    reset: list[Literal["optim", "schedule", "data", "step"]] = []
    """What continue_training_from_init does not take over. optim: optimizer state; schedule: the learning rate begins
    anew at this step; data: rows from the first one on; step: steps and tokens from 0 on, the learning rate with them.
    A later start of the same run resets nothing."""
    async_save_mode: Literal["shm"] | None = None
    """shm: stage in memory and let the checkpoint service write in the background. Null: write to the disk and wait."""
    async_cleanup: bool = False
    """Delete what retention gives up in the background; with async_save_mode it always is."""
    shm_path: Text = "/dev/shm"
    """Memory file system for staging, on each node."""
    slots: Annotated[int, Field(ge=1, le=9)] = 2
    """Snapshots that a node's memory holds at once; fewer are taken where they do not fit."""
    strict: bool = False
    """Stop with an error, instead of saving synchronously, where memory does not suffice for one slot."""
    bandwidth_gb_per_s: Annotated[float, Field(gt=0)] | None = None
    """Limit on writing in the background, per node. Null: none. At the end of a run there is none."""
    drain_threads: Annotated[int, Field(ge=1, le=64)] = 4
    """Files that a node writes at once."""
    direct_io: bool = True
    """Write past the page cache where the file system can: less of the CPU, and none of the job's memory limit."""
    grace_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds that the job still has after a stop signal. Null: known from Slurm, or as many as it takes."""
    node_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long nodes wait for each other's part of a checkpoint."""
    linger_s: Annotated[float, Field(ge=0)] = 5.0
    """How long the service stays, and keeps the slots allocated, after the last rank of its node has gone."""
    disk_budget_gb: Annotated[float, Field(gt=0)] | None = None
    """What checkpoints may take on the disk (10^9 bytes); quotas are not seen otherwise. Null: what is free."""
    verify: Literal["drain", "readback"] = "drain"
    """drain: what is written is hashed and compared; readback: also read again past the page cache."""
    verify_on_load: Literal["full", "sizes"] = "full"
    """full: every byte is read and compared before a checkpoint is loaded; sizes: only names and sizes."""
    thread_debug: bool = True
    """Kept so that the fork's configs load; has no effect."""


# -- profiling (lingua/profiling.py) -------------------------------------------------------------------------------


class ProfilerArgs(Args):
    """Windows of steps that are profiled. Light: time and memory of each step, jsonl, from every rank. Heavy: a torch
    trace, and on a GPU a snapshot of its memory; steps are several times slower in it."""

    run: bool = False
    """Profile the windows below. false: only what `lingua profile` or a signal asks for."""
    trace_folder: Text = "profiling"
    """Where files go, inside the run folder."""
    light_warmup: Annotated[int, Field(ge=0)] = 10
    """Steps of a start before the light window."""
    light_steps: Annotated[int, Field(ge=0)] = 20
    """Steps of the light window. 0: none."""
    mem_warmup: Annotated[int, Field(ge=0)] = 100
    """Steps of a start before the memory window."""
    mem_steps: Annotated[int, Field(ge=0)] = 2
    """Steps of the memory window. 0: none."""
    profile_warmup: Annotated[int, Field(ge=0)] = 102
    """Steps of a start before the trace window."""
    profile_steps: Annotated[int, Field(ge=0)] = 2
    """Steps of the trace window. 0: none."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps from the begin of a window to the next of its kind. 0: one of each kind per start."""
    ranks: list[Annotated[int, Field(ge=0)]] | Literal["all"] = [0]
    """Ranks that write traces and memory snapshots."""
    signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] | None = "SIGUSR1"
    """Signal that opens a light and a heavy window of profile_steps, at least one. Null: none. One that is in
    stop_signals stops."""

    @model_validator(mode="after")
    def _windows_end(self) -> Self:
        longest = max(self.mem_steps, self.profile_steps)
        if 0 < self.every <= longest:
            raise ValueError(f"every {self.every} leaves no step between heavy windows of {longest}; raise every")
        return self


# -- generation (apps/main/generate.py) ----------------------------------------------------------------------------


class GeneratorArgs(Args):
    """Sampling from a model; the evaluator uses the same."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the most likely token always (greedy)."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the smallest set of tokens with this probability in all. Null: all."""
    top_k: PositiveInt | None = None
    """Sample from this many most likely tokens. Null: all."""
    max_gen_len: PositiveInt = 512
    """Tokens generated per prompt, at most."""
    max_tokens: PositiveInt = 1024
    """Tokens (prompts and answers, padded) in one batch, at most."""
    max_prompt_len: PositiveInt | None = None
    """Longer prompts keep their end. Null: what max_seqlen leaves."""
    until: list[Text] = []
    """Stop strings; they and what follows are not part of the answer."""
    compile_prefilling: bool = False
    """torch.compile the pass over the prompts."""
    reduce_generation_overhead: bool = False
    """torch.compile the one-token step."""
    show_progress: bool = False
    """Progress bar."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of weights and cache (on a CPU fp32 is faster)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where."""
    seed: int = 42
    """Seed of the sampling."""
