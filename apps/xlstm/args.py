"""Config of mLSTM (xLSTM, arXiv 2405.04517; the block of arXiv 2503.13427). Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from lingua.config.base import PositiveInt, part_of, register
from lingua.config.keys import train
from lingua.config.keys.model import DecoderArgs, KernelArgs, ModelArgs, rounded_width


class XLSTMArgs(DecoderArgs):
    """Initial values of all blocks."""

    residual_outputs: ClassVar[tuple[str, ...]] = ("proj_down.weight",)

    def initial_std(self, name: str, shape: Any) -> float:
        """Return xlstm-jax's std: sqrt(2 / 5D) (arXiv 1910.05895); 2 / (L sqrt D) at branch ends; 0 at output gates."""
        if name.endswith("ogate_preact.weight"):
            return 0.0
        if not name.endswith(self.residual_outputs):
            return self.init_base_std or (2 / (5 * self.dim)) ** 0.5
        return (self.init_base_std or 2 / (self.n_layers * self.dim**0.5)) / self.depth_factor(name)


@register("model", "mlstm")
class MLSTMArgs(XLSTMArgs, KernelArgs):
    """mLSTM and a feed-forward layer per block; its own keys have xlstm's names."""

    block: ClassVar[str] = "apps.xlstm.mlstm:MLSTMBlock"
    hugging_face: ClassVar[str] = "apps.xlstm.huggingface:XLSTM"
    residual_outputs: ClassVar[tuple[str, ...]] = ("out_proj.weight", "proj_down.weight")
    kernels: ClassVar[tuple[str, ...]] = ("mlstm_kernels",)

    type: Literal["mlstm"] = "mlstm"
    n_heads: PositiveInt = 4
    """H."""
    qk_dim_factor: Annotated[float, Field(gt=0)] = 0.5
    """Total width of queries (and of keys), as a multiple of dim."""
    v_dim_factor: Annotated[float, Field(gt=0)] = 1.0
    """Total width of values, as a multiple of dim."""
    ffn_proj_factor: Annotated[float, Field(gt=0)] = 2.667
    """Width of the feed-forward layer, as a multiple of dim."""
    ffn_round_up_to_multiple_of: PositiveInt = 64
    """The derived feed-forward width is rounded up to a multiple of this."""
    hidden_dim: PositiveInt | None = None
    """Width of the feed-forward layer. Null: derived."""
    gate_soft_cap: Annotated[float, Field(gt=0)] = 15.0
    """c in c tanh(gate / c) for input and forget gates before their activations."""
    output_logit_soft_cap: Annotated[float, Field(gt=0)] | None = 30.0
    """The same for logits. Null: no cap."""
    igate_bias_init_range: Annotated[float, Field(le=0)] = -10.0
    """Initial bias of the input gates."""
    chunk_size: PositiveInt = 64
    """Positions computed at once; changes memory and speed, not the function."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    kernel: Literal["auto", "torch", "mlstm_kernels"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Kernel of the recurrence; a named one is used, or refused with the reason. auto: on a GPU an installed package
    that fits, else torch."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        for name, width in (("qk_dim_factor", self.qk_width), ("v_dim_factor", self.v_width)):
            if width < 1 or width % self.n_heads:
                raise ValueError(f"{name} * dim is {width}, not a multiple of n_heads {self.n_heads}; change one")
        return self

    def kernel_unfit(self, kernel: str, device_type: str, *, documents: bool, deterministic: bool) -> str | None:
        unfit = super().kernel_unfit(kernel, device_type, documents=documents, deterministic=deterministic)
        if unfit or kernel == "torch":
            return unfit
        if documents:
            return "it cannot reset its memory where a document begins (data.doc_mask)"
        sizes = {"a head's keys": self.qk_width // self.n_heads, "a head's values": self.v_width // self.n_heads}
        for what, size in (sizes | {"model.chunk_size": self.chunk_size}).items():
            if size < 16 or size & (size - 1):
                return f"it needs powers of two from 16 on, and {what} is {size}"
        return None

    @property
    def logit_soft_cap(self) -> float | None:
        return self.output_logit_soft_cap

    @property
    def qk_width(self) -> int:
        return int(self.dim * self.qk_dim_factor)

    @property
    def v_width(self) -> int:
        return int(self.dim * self.v_dim_factor)

    @property
    def ffn_width(self) -> int:
        if self.hidden_dim is not None:
            return self.hidden_dim
        multiple = self.ffn_round_up_to_multiple_of
        return -(-int(self.dim * self.ffn_proj_factor) // multiple) * multiple

    def block_params(self) -> int:
        projections = self.dim * (2 * self.qk_width + 2 * self.v_width) + self.v_width * self.dim
        gates = 2 * (self.dim + 1) * self.n_heads
        return projections + gates + self.v_width + 3 * self.dim * self.ffn_width + self.norm_params(2 * self.dim)

    def mixing_flops_per_token(self, seq_len: int) -> float:
        """Return 12 H N P: update and read of the memory, 2 H N P each, forward and twice backward; no chunking."""
        return 12 * self.qk_width * self.v_width / self.n_heads


class ConvolvedArgs(XLSTMArgs):
    """Keys of both blocks of arXiv 2405.04517."""

    n_heads: PositiveInt = 4
    """H."""
    conv_size: Annotated[int, Field(ge=2, le=4)] = 4
    """Taps of the convolution with bias before the gates (mLSTM: before queries and keys)."""
    proj_factor: Annotated[float, Field(gt=0)] = 2.0
    """Width of the block (sLSTM: of its feed-forward layer), as a multiple of dim; rounded up to a multiple of 64."""

    @property
    def width(self) -> int:
        return rounded_width(self.proj_factor * self.dim, None, 64)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        what, width = (
            ("dim", self.dim) if isinstance(self, SLSTMArgs) else ("proj_factor * dim, rounded up,", self.width)
        )
        if width % self.n_heads:
            raise ValueError(f"{what} is {width}, not a multiple of n_heads {self.n_heads}; change one")
        return self


@register("model", "mlstm_v0")
class MLSTMV0Args(ConvolvedArgs):
    """The mLSTM block of the first paper (arXiv 2405.04517, figure 11), with the memory inside an up-projection."""

    block: ClassVar[str] = "apps.xlstm.v0:MLSTMV0Block"

    type: Literal["mlstm_v0"] = "mlstm_v0"
    qkv_proj_blocksize: PositiveInt = 4
    """Block size of the block-diagonal projections to queries, keys and values, in channels."""
    chunk_size: PositiveInt = 64
    """Positions computed at once; changes memory and speed, not the function."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.width % self.qkv_proj_blocksize:
            raise ValueError(
                f"the width {self.width} is not a multiple of qkv_proj_blocksize {self.qkv_proj_blocksize}"
            )
        return self

    def block_params(self) -> int:
        of_channels = 3 * self.qkv_proj_blocksize + self.conv_size + 1 + 2  # qkv; taps and bias; norm and skip
        gates = 2 * (3 * self.width + 1) * self.n_heads
        return self.width * (3 * self.dim + of_channels) + gates + self.norm_params(self.dim)

    def mixing_flops_per_token(self, seq_len: int) -> float:
        return 12 * self.width * self.width / self.n_heads


@register("model", "slstm")
class SLSTMArgs(ConvolvedArgs):
    """sLSTM (arXiv 2405.04517, figure 10) and a feed-forward layer: earlier outputs feed back into the gates."""

    block: ClassVar[str] = "apps.xlstm.slstm:SLSTMBlock"

    type: Literal["slstm"] = "slstm"
    proj_factor: Annotated[float, Field(gt=0)] = 1.3

    def oddities(self, args: Any) -> Iterator[tuple[str, str]]:
        text = (
            "slstm computes one position after another: on a CPU core a block took 2.2 times as long as mlstm's, with"
        )
        yield "model", f"{text} half the parameters (a GPU: far more); a few layers of it in a hybrid may be enough"

    def block_params(self) -> int:
        gates = 4 * (2 * self.dim**2 // self.n_heads + self.dim)
        ffn = 3 * self.dim * self.width
        return gates + self.dim * (self.conv_size + 2) + ffn + self.norm_params(2 * self.dim)

    def mixing_flops_per_token(self, seq_len: int) -> float:
        """Count a product and a sum per number of cell and normalizer, forward and twice backward."""
        return 12 * self.dim


class TrainArgs(train.TrainArgs):
    """The config of a run."""

    app: str = __package__ or "apps.xlstm"
    """Package of the app that trains the run."""
    model: Annotated[SerializeAsAny[ModelArgs], part_of("model", MLSTMArgs)] = MLSTMArgs()
