"""Config of minGRU, minLSTM and Hawk. Keys are Meta Lingua's. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from lingua.config.base import PositiveInt, part_of, register
from lingua.config.keys import train
from lingua.config.keys.model import KernelArgs, ModelArgs, rounded_width


class RecurrentArgs(KernelArgs):
    """Keys that the three families share."""

    kernels: ClassVar[tuple[str, ...]] = ("fla",)

    n_heads: PositiveInt = 1
    """Heads, which determine how gates are laid out (minLSTM) or shared (Hawk); must divide the hidden width."""
    multiple_of: PositiveInt = 256
    """Derived hidden widths are rounded up to a multiple of this."""
    ffn_dim_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Scales the derived hidden width; for Hawk, that of its feed-forward layer."""
    conv_size: Annotated[int, Field(ge=2, le=4)] | None = None
    """Taps of the convolution over positions before the gates (Hawk: before the recurrence). Null: none."""
    kernel: Literal["auto", "torch", "fla"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Kernel of the recurrence; a named one is used, or refused with the reason. auto: on a GPU an installed package
    that fits, else torch."""

    @property
    def width(self) -> int:
        """Channels of the recurrence: twice D, scaled and rounded up."""
        return rounded_width(2 * self.dim, self.ffn_dim_multiplier, self.multiple_of)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.n_heads:
            raise ValueError(f"the hidden width {self.width} is not a multiple of n_heads {self.n_heads}; change one")
        return self

    def mixing_flops_per_token(self, seq_len: int) -> float:
        """Count one product and one sum per channel, forward and twice backward."""
        return 6 * self.width


@register("model", "mingru")
class MinGRUArgs(RecurrentArgs):
    """minGRU (arXiv 2410.01201) as in Meta Lingua: gated by silu(w x), without the paper's g on the candidate."""

    block: ClassVar[str] = "apps.fastRNN.blocks:GRUBlock"
    residual_outputs: ClassVar[tuple[str, ...]] = ("gru.wo.weight",)

    type: Literal["mingru"] = "mingru"

    def block_params(self) -> int:
        return self.width * (4 * self.dim + (self.conv_size or 0)) + self.norm_params(self.dim)


@register("model", "minlstm")
class MinLSTMArgs(RecurrentArgs):
    """minLSTM (arXiv 2410.01201) as in Meta Lingua."""

    block: ClassVar[str] = "apps.fastRNN.blocks:LSTMBlock"
    residual_outputs: ClassVar[tuple[str, ...]] = ("lstm.wo.weight",)

    type: Literal["minlstm"] = "minlstm"

    def block_params(self) -> int:
        return self.width * (5 * self.dim + 2 * (self.conv_size or 0)) + self.norm_params(self.dim)


@register("model", "hawk")
class HawkArgs(RecurrentArgs):
    """Hawk (arXiv 2402.19427) as in Meta Lingua: dense gates without bias, and a feed-forward layer."""

    block: ClassVar[str] = "apps.fastRNN.blocks:HawkBlock"

    type: Literal["hawk"] = "hawk"
    lru_dim_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Scales the width of the recurrence, which is 4/3 dim rounded up to multiple_of."""

    @property
    def width(self) -> int:
        return rounded_width(int(4 / 3 * self.dim), self.lru_dim_multiplier, self.multiple_of)

    @property
    def ffn_width(self) -> int:
        return rounded_width(8 * self.dim / 3, self.ffn_dim_multiplier, self.multiple_of)

    def block_params(self) -> int:
        recurrence = self.width * (3 * self.dim + 2 * self.width + (self.conv_size or 0)) + self.width // self.n_heads
        return recurrence + 3 * self.dim * self.ffn_width + self.norm_params(2 * self.dim)

    def initial_std(self, name: str, shape: Any) -> float:
        """Return the std as Meta Lingua does: `init_std_factor` divides every matrix of the block's recurrent half."""
        std = self.init_base_std or (self.dim if "embed" in name else shape[-1]) ** -0.5
        return std / self.depth_factor(name) if "rlgru_block" in name else std


class TrainArgs(train.TrainArgs):
    """The config of a run."""

    app: str = __package__ or "apps.fastRNN"
    """Package of the app that trains the run."""
    model: Annotated[SerializeAsAny[ModelArgs], part_of("model", MinGRUArgs)] = MinGRUArgs()
