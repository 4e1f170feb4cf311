"""Config of Mamba-2. Keys are Meta Lingua's; additional ones are marked. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from lingua.config.base import Args, PositiveInt, part_of, register
from lingua.config.keys import train
from lingua.config.keys.model import KernelArgs, ModelArgs, rounded_width


class InitArgs(Args):
    """Initial values of A and of the bias of dt (arXiv 2405.21060, section 7, and Meta Lingua's apps/mamba)."""

    dt_max: Annotated[float, Field(gt=0)] = 0.1
    """Maximum initial step size, with dt_bias."""
    dt_min: Annotated[float, Field(gt=0)] = 0.001
    """Minimum initial step size."""
    dt_init_floor: Annotated[float, Field(gt=0)] = 1e-4
    """Smaller initial step sizes are raised to this."""
    A_init_min: Annotated[float, Field(gt=0)] = 1.0
    """-A of each head is drawn between this and A_init_max."""
    A_init_max: Annotated[float, Field(gt=0)] = 16.0
    """Maximum initial -A."""


@register("model", "mamba2")
class Mamba2Args(KernelArgs):
    """Mamba-2 (arXiv 2405.21060): blocks of state space duality, without feed-forward layers."""

    block: ClassVar[str] = "apps.mamba.mamba:MambaBlock"
    hugging_face: ClassVar[str] = "apps.mamba.huggingface:Mamba2"
    residual_outputs: ClassVar[tuple[str, ...]] = ("ssm.out_proj.weight",)
    kernels: ClassVar[tuple[str, ...]] = ("mamba_ssm", "fla")

    type: Literal["mamba2"] = "mamba2"
    n_heads: PositiveInt = 8
    """H."""
    hidden_dim: PositiveInt | None = None
    """Width of all heads, H P. Null: 2 dim times ffn_dim_multiplier, rounded up to multiple_of. Not in Meta Lingua."""
    ffn_dim_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Scales the derived hidden_dim."""
    multiple_of: PositiveInt = 256
    """The derived hidden_dim is rounded up to a multiple of this."""
    state_dim: PositiveInt = 128
    """N: state size per channel."""
    n_groups: PositiveInt = 1
    """G: heads of a group share B and C."""
    conv_size: Annotated[int, Field(ge=2, le=4)] | None = None
    """Taps of the convolution over x, B and C before the recurrence. Null: none."""
    conv_bias: bool = False
    """Give the convolution a bias. (Not in Meta Lingua; for Hugging Face's models.)"""
    dt_bias: bool = False
    """Give the step size of each head a bias."""
    D_has_head_dim: bool = False
    """Give the skip connection a weight per channel instead of per head."""
    learnable_init_states: bool = False
    """Make the state before each row a parameter."""
    ssm_chunk_size: PositiveInt = 256
    """Positions computed at once; changes memory and speed, not the function."""
    init_args: InitArgs = InitArgs()
    kernel: Literal["auto", "torch", "mamba_ssm", "fla"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Kernel of the recurrence; a named one is used, or refused with the reason. auto: on a GPU an installed package
    that fits, else torch."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.n_heads:
            raise ValueError(f"the hidden width {self.width} is not a multiple of n_heads {self.n_heads}; change one")
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_groups {self.n_groups}; change one")
        return self

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(args)
        if self.learnable_init_states and args.data.doc_mask:
            key, other = "data.doc_mask", "model.learnable_init_states"
            yield key, f"{key} is true, but {other} holds for the first document of a row only; set one to false"

    @property
    def width(self) -> int:
        return self.hidden_dim or rounded_width(2 * self.dim, self.ffn_dim_multiplier, self.multiple_of)

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.width + 2 * self.n_groups * self.state_dim

    def block_params(self) -> int:
        projections = self.dim * (self.width + self.conv_width + self.n_heads) + self.width * self.dim
        conv = self.conv_width * ((self.conv_size or 0) + (1 if self.conv_size and self.conv_bias else 0))
        of_heads = self.n_heads * (1 + int(self.dt_bias)) + (self.width if self.D_has_head_dim else self.n_heads)
        states = self.width * self.state_dim if self.learnable_init_states else 0
        return projections + conv + of_heads + states + self.width + self.norm_params(self.dim)

    def mixing_flops_per_token(self, seq_len: int) -> float:
        """Return 12 H P N: update and read of the state, 2 H P N each, forward and twice backward; no chunking."""
        return 12 * self.width * self.state_dim


class TrainArgs(train.TrainArgs):
    """The config of a run."""

    app: str = __package__ or "apps.mamba"
    """Package of the app that trains the run."""
    model: Annotated[SerializeAsAny[ModelArgs], part_of("model", Mamba2Args)] = Mamba2Args()
