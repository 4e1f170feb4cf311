"""Keys of `model:` and `loss:`, with the arithmetic that needs only the config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lingua.config.base import Args, Part, PositiveInt, register

AttnImpl = Literal[
    "auto", "sdpa", "sdpa_cudnn_first", "sdpa_flash", "sdpa_cudnn", "flex", "varlen", "xformers", "flash_attn", "eager"
]

# What lingua/model/attention.py refuses on every device; the rest depends on the device and is checked at the start.
_NO_MASK = ("sdpa_flash", "sdpa_cudnn", "sdpa_cudnn_first")
_GPU_ONLY = ("sdpa_cudnn", "sdpa_cudnn_first", "flex", "varlen", "xformers", "flash_attn")
_NOT_DETERMINISTIC = ("sdpa_cudnn", "sdpa_cudnn_first", "xformers")  # atomic additions in backward


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
    """Llama-type decoder, built from the blocks of lingua/model/transformer.py. An app's own Args say who builds it."""

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
    norm: Literal["rms", "layer"] = "rms"
    """Kind of every norm. rms: RMSNorm; layer: LayerNorm with weight and bias."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of every norm."""
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
    """Norm on queries and keys of each head, before rotation."""
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
            heads = self.n_heads or 1
            near = " or ".join(str(dim) for dim in (self.dim // heads * heads, -(-self.dim // heads) * heads) if dim)
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {heads}; use {near}, or set head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"n_heads {self.heads} is not a multiple of n_kv_heads {self.kv_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim {self.head_width} is odd; rotary positions turn pairs")
        return self

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        impl, key = self.attn_impl, "model.attn_impl"
        if impl in _NO_MASK and (args.data.doc_mask or self.sliding_window is not None):
            asked = "data.doc_mask" if args.data.doc_mask else "model.sliding_window"
            yield key, f"{key} is {impl}, which cannot do {asked}; use flex, sdpa or auto"
        if args.deterministic and impl in _NOT_DETERMINISTIC:
            yield key, f"deterministic is true, but {key} {impl} adds gradients up in any order; use sdpa, flex or auto"
        if args.device == "cpu" and impl in _GPU_ONLY:
            yield key, f"{key} is {impl}, which needs a GPU, but device is cpu; use auto"
        tp_size, key = args.distributed.tp_size, "distributed.tp_size"
        for what, n in (("heads", self.heads), ("key-value heads", self.kv_heads)):
            if n % tp_size:
                yield key, f"{key} is {tp_size}, which does not divide the model's {n} {what}; change one"
        if self.ffn_width % tp_size:
            width = f"the width {self.ffn_width} of the feed-forward layer"
            yield key, f"{key} is {tp_size}, which does not divide {width}; set model.multiple_of"

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
        in_norms = (self.n_layers * norms + self.dim) * (2 if self.norm == "layer" else 1)  # weight and bias
        return self.n_layers * (attention + 3 * self.dim * self.ffn_width) + in_norms

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


@register("loss", "cross_entropy")
class CrossEntropyArgs(Part):
    """Next-token cross-entropy (lingua/model/loss.py)."""

    builder: ClassVar[str] = "lingua.model.loss:CrossEntropy"
    vocab_parallel: ClassVar[bool] = True  # takes a head whose words are spread over ranks: tensor parallelism

    type: Literal["cross_entropy"] = "cross_entropy"
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-partition term that keeps logits small (PaLM uses 1e-4). 0: none."""
    chunk_tokens: Annotated[int, Field(ge=0)] = 4096
    """Logits are made for this many positions at a time, so the whole (B*S, V) never exists. 0: at once."""
