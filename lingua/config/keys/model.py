"""Keys of `model:` and `loss:`, and the arithmetic that needs only the config."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from lingua.config.base import Anything, Args, ConfigError, Part, PositiveInt, parts, register

AttnImpl = Literal[
    "auto", "sdpa", "sdpa_cudnn_first", "sdpa_flash", "sdpa_cudnn", "flex", "varlen", "xformers", "flash_attn", "eager"
]

# What lingua/model/attention.py refuses on every device; the rest depends on the device and is checked at the start.
_NO_MASK = ("sdpa_flash", "sdpa_cudnn", "sdpa_cudnn_first")
_GPU_ONLY = ("sdpa_cudnn", "sdpa_cudnn_first", "flex", "varlen", "xformers", "flash_attn")
_NOT_DETERMINISTIC = ("sdpa_cudnn", "sdpa_cudnn_first", "xformers")  # atomic additions in backward


class RopeScalingArgs(Args):
    """Llama 3's scaling of rotary frequencies for contexts longer than those trained on (Llama 3.1 model card)."""

    factor: Annotated[float, Field(ge=1)] = 32.0
    """How much longer the context becomes."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """Wavelengths above original_max_position_embeddings / this are divided by `factor`."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """Wavelengths below original_max_position_embeddings / this are unchanged; those between are interpolated."""
    original_max_position_embeddings: PositiveInt = 8192
    """Context length, in positions, that the frequencies were trained for."""
    rope_type: Literal["llama3"] = "llama3"
    """Only Llama 3's rule is supported."""


TIME_WAVES = 16
"""Number of features that encode the share of masked tokens for `model.time_input`."""


def rounded_width(width: float, multiplier: float | None, multiple_of: int) -> int:
    """Return a hidden width: scaled by the multiplier, then rounded up."""
    width = int(width)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


class ModelArgs(Part):
    """Keys of every model type; the training loop, the check and the exporters read only these."""

    hugging_face: ClassVar[str] = ""
    """ "module:class" of its converter (lingua/model/huggingface.py). Empty: Hugging Face has no such model."""

    type: str = "llama"
    """Registered model type; `plugins` add more."""
    vocab_size: Annotated[int, Field(ge=-1)] = -1
    """V. -1: the tokenizer's."""
    max_seqlen: PositiveInt = 1024
    """Maximum S of the model; training raises it to data.seq_len."""
    seed: int | None = None
    """Seed of the initial weights. Null: the run's `seed`."""

    @property
    def n_labels(self) -> int:
        """Number of following tokens that each position learns to predict; data.n_views is one more."""
        return 1

    @property
    def attention(self) -> LlamaArgs | None:
        """Args of the attention layers, or None if there are none."""
        return None

    def oddities(self, args: Any) -> Iterator[tuple[str, str]]:
        """Yield (key, sentence) for what works but may cost more than expected: warnings of `lingua check`."""
        yield from ()

    def n_params(self) -> int:
        """Return the number of parameters. Needs vocab_size >= 1."""
        raise NotImplementedError

    def n_params_non_embedding(self) -> int:
        """Return the number of parameters without input embedding and output head."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs per token of forward and backward, without recomputation."""
        raise NotImplementedError

    def recomputed_flops_per_token(self, seq_len: int, blocks: bool, attention: bool) -> float | None:
        """Return the FLOPs per token of recomputing `blocks`, or only their `attention` kernels; None if unknown."""
        return None


class DecoderArgs(ModelArgs):
    """Embedding, a stack of blocks, norm and head (lingua/model/decoder.py).

    A family adds its keys, and `block`, `block_params`, `mixing_flops_per_token` and `residual_outputs`.
    """

    builder: ClassVar[str] = "lingua.model.decoder:Decoder"
    block: ClassVar[str]
    """ "module:class" of its blocks, which take (args, layer)."""
    residual_outputs: ClassVar[tuple[str, ...]] = ()
    """Endings of the names of the matrices whose products are added to the residual stream."""

    vocab_multiple_of: PositiveInt = 1
    """Pad the rows of embedding and head to a multiple of this, for faster kernels (64 or 128). Padded rows have no
    probability and no gradient, and are not exported."""
    dim: PositiveInt = 512
    """D."""
    n_layers: PositiveInt = 8
    """L."""
    norm: Literal["rms", "layer"] = "rms"
    """Norms of the residual stream. rms: RMSNorm; layer: LayerNorm with weight and bias."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of every norm."""
    init_base_std: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of initial weights. Null: fan_in ** -0.5."""
    init_std_factor: Literal["disabled", "global_depth", "current_depth", "dim_ratio"] = "disabled"
    """Divide the std of residual outputs by 1 | sqrt(2(L+1)) | sqrt(2(l+1)) | D/4096."""
    weight_tying: bool = False
    """Share one parameter between input embedding and output head."""
    mask_token: bool = False
    """Add a row for [MASK] to embedding and head. Its id is vocab_size; it has no probability."""
    time_input: bool = False
    """With mask_token: the masked share of a row is an input too, as time is in other diffusion models."""

    def of_layer(self, layer: int) -> DecoderArgs:
        """Return the Args of one layer's block: self, unless layers differ."""
        return self

    @property
    def logit_soft_cap(self) -> float | None:
        """c in logits = c tanh(logits / c), or None."""
        return None

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head: V, plus [MASK] if there is one, padded."""
        return -(-(self.vocab_size + self.mask_token) // self.vocab_multiple_of) * self.vocab_multiple_of

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        if self.time_input and (not self.mask_token or args.distributed.tp_size > 1):
            why = (
                "distributed.tp_size is above 1" if self.mask_token else "model.mask_token is false: nothing is hidden"
            )
            yield "model.time_input", f"model.time_input is true, but {why}; set it to false"
        if (tp_size := args.distributed.tp_size) > 1 and self.attention is not self:
            key = "distributed.tp_size"
            yield (
                key,
                f"{key} is {tp_size}, but model.type {self.type} cannot be split over ranks; set it to 1, use FSDP",
            )

    # -- what `lingua check` counts; the built model must agree

    def norm_params(self, width: int) -> int:
        """Return the number of parameters of a norm over `width` numbers."""
        return (2 if self.norm == "layer" else 1) * width  # weight and bias

    def block_params(self) -> int:
        """Return the number of parameters of one block."""
        raise self._lacks("block_params", "the parameters of one block")

    def mixing_flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs per token of mixing positions in one block, forward and backward: not 6 per parameter."""
        raise self._lacks("mixing_flops_per_token", "FLOPs of one block per token that are not 6 per parameter")

    def _lacks(self, method: str, what: str) -> ConfigError:
        own = f"{type(self).__module__}.{type(self).__name__}"
        return ConfigError(f"model.type {self.type}: {own} has no {method}(); add it: {what}")

    def n_params_non_embedding(self) -> int:
        blocks = sum(self.of_layer(layer).block_params() for layer in range(self.n_layers))
        return blocks + self.norm_params(self.dim) + self.time_input * TIME_WAVES * self.dim

    def n_params(self) -> int:
        embeddings = self.vocab_rows * self.dim * (1 if self.weight_tying else 2)
        return self.n_params_non_embedding() + embeddings

    def flops_per_token(self, seq_len: int) -> float:
        """6N plus mixing of positions, N = all parameters but the input embedding's lookup (PaLM, arXiv 2204.02311, B).

        Padded rows of the vocabulary (`vocab_multiple_of`) are not counted, although they are computed.
        """
        n_matmul = self.n_params_non_embedding() + self.vocab_size * self.dim
        mixing = sum(self.of_layer(layer).mixing_flops_per_token(seq_len) for layer in range(self.n_layers))
        return 6 * n_matmul + mixing

    # -- initial values

    def initial_std(self, name: str, shape: Sequence[int]) -> float:
        """Return the standard deviation of a matrix's initial values, which are truncated at 3 of them."""
        fan_in = self.dim if "embed" in name else shape[-1]
        std = self.init_base_std or fan_in**-0.5
        return std / self.depth_factor(name) if name.endswith(self.residual_outputs) else std

    def depth_factor(self, name: str) -> float:
        """Return the divisor of `init_std_factor` for a parameter named layers.<l>.<...>."""
        layer = int(name.split("layers.")[1].split(".")[0])
        return {
            "disabled": 1.0,
            "global_depth": (2 * (self.n_layers + 1)) ** 0.5,
            "current_depth": (2 * (layer + 1)) ** 0.5,
            "dim_ratio": self.dim / 4096,
        }[self.init_std_factor]


KERNELS = {
    "mamba_ssm": "uv pip install --no-build-isolation mamba-ssm",
    "fla": "uv pip install flash-linear-attention",
    "mlstm_kernels": "uv pip install mlstm-kernels",
}
"""Packages with kernels for recurrences, and the commands that install them."""
INSTALLED_KERNELS = frozenset(name for name in KERNELS if importlib.util.find_spec(name) is not None)


class KernelArgs(DecoderArgs):
    """A family whose recurrence other packages can compute, too (lingua/model/kernels.py). It adds a key `kernel`."""

    kernels: ClassVar[tuple[str, ...]]
    """Kernels that can compute it, the fastest first."""
    kernel: str = "auto"

    def kernel_unfit(self, kernel: str, device_type: str, *, documents: bool, deterministic: bool) -> str | None:
        """Return why a kernel cannot compute these blocks, or None."""
        if kernel == "torch":
            return None
        if kernel not in INSTALLED_KERNELS:
            return f"the package {kernel} is not installed; install it with `{KERNELS[kernel]}`"
        if device_type != "cuda":
            return f"it runs on CUDA only, and the device is {device_type}"
        return "its gradients may differ from run to run (deterministic: true)" if deterministic else None

    def kernel_refused(self, reason: str | None) -> str:
        """Return the error for a named kernel that does not fit."""
        return f"model.kernel is {self.kernel} (for {self.type}), but {reason}; or use auto"

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(args)
        if self.kernel != "auto":
            device_type = "cpu" if args.device == "cpu" else "cuda"  # auto: the training machine may have a GPU
            here = {"documents": args.data.doc_mask, "deterministic": args.deterministic}
            if (reason := self.kernel_unfit(self.kernel, device_type, **here)) is not None:
                yield "model.kernel", self.kernel_refused(reason)


class LlamaArgs(DecoderArgs):
    """Llama-style decoder, built from the blocks of lingua/model/transformer.py."""

    block: ClassVar[str] = "lingua.model.transformer:TransformerBlock"
    hugging_face: ClassVar[str] = "lingua.model.huggingface:Llama"
    residual_outputs: ClassVar[tuple[str, ...]] = ("attention.wo.weight", "feed_forward.w2.weight")

    type: Literal["llama"] = "llama"
    n_heads: PositiveInt | None = None
    """H. Null: dim / head_dim."""
    head_dim: PositiveInt | None = None
    """Dimension of a head. Null: dim / n_heads."""
    n_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention). Null: n_heads."""
    hidden_dim: PositiveInt | None = None
    """Width of the feed-forward layer. Null: 8/3 dim times ffn_dim_multiplier, rounded up to multiple_of."""
    ffn_dim_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Scales the derived feed-forward width; ignored if hidden_dim is set."""
    multiple_of: PositiveInt = 256
    """The derived feed-forward width is rounded up to a multiple of this."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScalingArgs | None = None
    """Llama 3's frequency scaling. Null: none."""
    qk_norm: bool = False
    """Normalize queries and keys of each head before rotation."""
    causal: bool = True
    """Each position sees only those before it. false: its whole row or document, as masked diffusion needs."""
    sliding_window: PositiveInt | None = None
    """Each position sees itself and the sliding_window - 1 before it. Null: all before it."""
    attn_impl: AttnImpl = "auto"
    """Attention kernel; a named one is used, or refused with the reason. sdpa: torch's choice; sdpa_cudnn_first: the
    same, but cuDNN's if possible; varlen: torch's flash kernel on packed documents. auto: the fastest that fits."""

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
        yield from super().conflicts(args)
        if not self.causal and "causal" not in args.objective.asks_of_model:
            text = f"model.causal is false, but with loss.type {args.loss.type} each position would see its label"
            yield "model.causal", f"{text}; set it to true, or loss.type to masked_diffusion"
        if not self.causal and self.sliding_window is not None:
            text = f"model.sliding_window is {self.sliding_window}, which looks back only, but model.causal is false"
            yield "model.sliding_window", f"{text}; set it to null"
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
    def attention(self) -> LlamaArgs:
        return self

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
        """Width by Llama's rule: two thirds of 4D (SwiGLU has three matrices), scaled, rounded up."""
        return self.hidden_dim or rounded_width(8 * self.dim / 3, self.ffn_dim_multiplier, self.multiple_of)

    def block_params(self) -> int:
        attention = 2 * self.dim * self.head_width * (self.heads + self.kv_heads)
        norms = 2 * self.dim + (2 * self.head_width if self.qk_norm else 0)
        return attention + 3 * self.dim * self.ffn_width + self.norm_params(norms)

    def mixing_flops_per_token(self, seq_len: int) -> float:
        """Return 12HQS (PaLM, as above), not halved for causality; with a sliding window, S is the window."""
        return 12 * self.heads * self.head_width * min(seq_len, self.sliding_window or seq_len)

    def recomputed_flops_per_token(self, seq_len: int, blocks: bool, attention: bool) -> float:
        """Count one more forward pass of all blocks, 2N_blocks + 4LHQS, or of their attention kernels alone, 4LHQS.

        A forward pass is a third of forward and backward (PaLM, as above; "hardware FLOPs" as in arXiv 2205.05198, A).
        A block's last product is not recomputed: backward needs only its inputs (torch stops there).
        """
        again = self.n_params_non_embedding() - self.n_layers * self.dim * self.ffn_width
        seen = min(seq_len, self.sliding_window or seq_len)
        kernels = 4 * self.n_layers * self.heads * self.head_width * seen
        return (2 * again if blocks else 0) + (kernels if blocks or attention else 0)


@register("model", "hybrid")
class HybridArgs(DecoderArgs):
    """Blocks of several families in one stack."""

    type: Literal["hybrid"] = "hybrid"
    layers: Annotated[list[str], Field(min_length=1)] = ["attention"]
    """Kind of each layer, repeated up to n_layers: attention (a Llama block), or a model.type."""
    blocks: dict[str, Anything] = {}
    """Keys of each kind, as in its own `model:` section: {attention: {n_heads: 4}, mamba2: {n_heads: 8}}."""
    n_heads: PositiveInt | None = None
    """Number of heads of the kinds whose `blocks` do not set it."""
    attn_impl: AttnImpl = "auto"
    """Attention kernel, as for a Llama."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if unused := sorted(self.blocks.keys() - set(self.layers)):
            raise ValueError(f"blocks.{unused[0]} is used by no layer; add {unused[0]} to layers, or remove it")
        families = {name for name, part in parts("model").items() if part.builder == self.builder}
        known = families - {self.type} | {"attention"}
        for kind in dict.fromkeys(self.layers):
            if kind not in known:
                raise ValueError(f"layers: unknown kind {kind}; known: {', '.join(sorted(known))}")
            try:
                self.of_kind(kind)
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(map(str, ("blocks", kind, *first["loc"])))
                raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None
        return self

    def of_kind(self, kind: str) -> DecoderArgs:
        """Return the Args of one kind of layer: the shared keys and its own."""
        family: Any = LlamaArgs if kind == "attention" else parts("model")[kind]
        shared: dict[str, Any] = {name: getattr(self, name) for name in DecoderArgs.model_fields if name != "type"}
        if self.n_heads is not None and "n_heads" in family.model_fields:
            shared["n_heads"] = self.n_heads
        if kind == "attention":
            shared["attn_impl"] = self.attn_impl
        return family.model_validate(shared | self.blocks.get(kind, {}))

    def of_layer(self, layer: int) -> DecoderArgs:
        return self.of_kind(self.layers[layer % len(self.layers)])

    @property
    def attention(self) -> LlamaArgs | None:
        found = self.of_kind("attention") if "attention" in self.layers else None
        assert found is None or isinstance(found, LlamaArgs)
        return found

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(args)
        for kind in dict.fromkeys(self.layers):
            yield from self.of_kind(kind).conflicts(args)

    def oddities(self, args: Any) -> Iterator[tuple[str, str]]:
        for kind in dict.fromkeys(self.layers):
            yield from self.of_kind(kind).oddities(args)


class LossArgs(Part):
    """An objective: what a model learns to predict, and what that needs of the model, of scoring and of sampling.

    The defaults are for the next token.
    """

    vocab_parallel: ClassVar[bool] = False
    """Works with a head whose vocabulary is split over ranks (tensor parallelism)."""
    asks_of_model: ClassVar[Mapping[str, Any]] = {}
    """Keys of the section `model` that it needs, with their values; they are set if the config leaves them out."""
    validation: ClassVar[str] = "lingua.train.validate:next_token_loss"
    """Sums the loss of held-out rows during training, over all ranks."""
    scorer: ClassVar[str] = "lingua.eval.scorer:Scorer"
    """Scores given texts in an evaluation."""
    generator: ClassVar[str] = "lingua.model.generate:Generator"
    """Answers prompts."""

    def scored_tokens(self, seq_len: int) -> int:
        """Return the number of tokens of a text that a row of S positions scores."""
        return seq_len


@register("loss", "cross_entropy")
class CrossEntropyArgs(LossArgs):
    """Next-token cross-entropy (lingua/model/loss.py)."""

    builder: ClassVar[str] = "lingua.model.loss:CrossEntropy"
    vocab_parallel: ClassVar[bool] = True

    type: Literal["cross_entropy"] = "cross_entropy"
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-partition term that keeps logits small (PaLM uses 1e-4). 0: none."""
    chunk_tokens: Annotated[int, Field(ge=0)] = 4096
    """Compute logits for this many positions at a time, so that the whole (B*S, V) never exists. 0: all at once."""
