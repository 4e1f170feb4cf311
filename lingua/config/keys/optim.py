"""Keys of `optim:`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lingua.config.base import Args, Fraction, Part, Text, register


class SpikeArgs(Args):
    """What counts as a loss spike, and what to do about it."""

    threshold: Annotated[float, Field(gt=0)] = 6.0
    """How far above the mean of the preceding steps the loss is, in their standard deviations."""
    window: Annotated[int, Field(ge=2)] = 128
    """Number of preceding steps compared with. Until there are this many, nothing counts as a spike."""
    action: Literal["warn", "skip", "rewind"] = "warn"
    """warn: write a line to the log. skip: leave out the optimizer step, as for on_nonfinite. rewind: go back to the
    newest checkpoint before the step and skip its rows."""


class RewindArgs(Args):
    """How a run goes back if on_spike or on_nonfinite says `rewind`."""

    steps: Annotated[int, Field(ge=1)] = 1
    """Steps whose rows are skipped: the one that went wrong and those after it."""
    limit: Annotated[int, Field(ge=1)] = 3
    """Rewinds allowed within limit_steps; then the run stops, and `lingua why` says so."""
    limit_steps: Annotated[int, Field(ge=1)] = 1000
    """Steps in which `limit` is counted."""


class OptimArgs(Part):
    """Keys of every optimizer: learning rate, schedule, clipping, and what to do about a step that went wrong."""

    type: str = "adamw"
    """Registered optimizer."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay: each step shrinks weights by lr times this."""
    decay_all: bool = False
    """Decay norms and embeddings too, as Meta Lingua does. false: only matrices of the blocks and the head."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Maximum norm of the whole gradient, applied once per step. 0: no clipping."""
    scheduler: str = "cosine"
    """Learning rate schedule: constant, linear, linear_to_zero, inv_sqrt, cosine, wsd, or a plugin's."""
    warmup: Annotated[int, Field(ge=0)] = 2000
    """Steps of linear warmup from 0."""
    lr_min_ratio: Fraction = 0.1
    """Final learning rate of the schedule, as a multiple of lr."""
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
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay, or (1 + n) / (10 + n) at step n if that is
    less. RUN@STEP:ema names its weights. Costs 4 bytes per parameter. Null: none."""
    frozen: list[Text] = []
    """Name patterns of parameters that are not trained: tok_embeddings.*, layers.0.*. Their gradients are computed but
    not used."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """What to do if the loss or a gradient is not finite: stop before the optimizer step, skip that step, or go back to
    the newest checkpoint before it and skip its rows. With distributed.model_dtype fp16, a gradient that overflows is
    always skipped, until the loss scale has fallen to 1."""
    max_skips: Annotated[int, Field(ge=0)] = 10
    """With `skip`: maximum steps skipped in a row before the run stops."""
    on_spike: SpikeArgs = SpikeArgs()
    """A loss far above the preceding ones."""
    rewind: RewindArgs = RewindArgs()
    """How `rewind` works."""

    def state_bytes(self, n_params: int, n_in_matrices: int) -> int:
        """Estimate the bytes of the optimizer's state; here for two fp32 moments, as AdamW has.

        `n_in_matrices`: number of the parameters in matrices of the blocks.
        """
        return 8 * n_params

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        saves, asks = args.checkpoint, {"on_nonfinite": self.on_nonfinite, "on_spike.action": self.on_spike.action}
        if max(saves.dump.every, saves.eval.every, saves.keep_every) <= 0 and not saves.steps:
            for key, action in asks.items():
                if action == "rewind":
                    text = f"optim.{key} is rewind, but the config asks for no checkpoint to go back to"
                    yield f"optim.{key}", f"{text}; set checkpoint.dump.every"


class AdamArgs(OptimArgs):
    """Keys of AdamW, alone or as part of another optimizer."""

    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment."""


@register("optim", "adamw")
class AdamWArgs(AdamArgs):
    """AdamW (lingua/optim/adamw.py)."""

    builder: ClassVar[str] = "lingua.optim.adamw:build_adamw"

    type: Literal["adamw"] = "adamw"
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the moments between steps. bf16: saves 4 bytes per parameter and rounds once per step, as DeepSeek-V3 did
    (arXiv 2412.19437, section 3.3.3); beta2 must be at most 0.98."""

    @model_validator(mode="after")
    def _moves_in_bf16(self) -> Self:
        # bf16 has 8 bits: a second moment within 2^-8 / (1 - beta2) of a squared gradient, relative to itself, stays.
        if self.state_dtype == "bf16" and self.beta2 > 0.98:
            text = f"state_dtype bf16 with beta2 {self.beta2:g}: rounding would keep the second moment from moving"
            raise ValueError(f"{text}; set beta2 to 0.98 or less, or state_dtype to fp32")
        return self

    def state_bytes(self, n_params: int, n_in_matrices: int) -> int:
        return super().state_bytes(n_params, n_in_matrices) // (2 if self.state_dtype == "bf16" else 1)


@register("optim", "muon")
class MuonArgs(AdamArgs):
    """Muon for the matrices of the blocks, AdamW for embeddings, head and vectors (lingua/optim/muon.py)."""

    builder: ClassVar[str] = "lingua.optim.muon:build_muon"

    type: Literal["muon"] = "muon"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of the matrices (Keller Jordan)."""
    nesterov: bool = True
    """Orthogonalize the gradient mixed with the momentum, instead of the momentum alone."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Newton-Schulz iterations that make a matrix nearly orthogonal."""
    ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of these iterations and of what ranks exchange. auto: bf16 on a GPU, fp32 on a CPU."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of a matrix's update. match_rms_adamw: 0.2 sqrt(max(rows, columns)), so that lr and weight_decay of AdamW
    carry over (Moonlight, arXiv 2502.16982); original: sqrt(max(1, rows / columns)), for which lr is about 0.02."""
    adamw_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of AdamW's part, as a multiple of lr. With `scale: original` about 0.015 (3e-4 / 0.02)."""

    def state_bytes(self, n_params: int, n_in_matrices: int) -> int:
        return 4 * n_in_matrices + super().state_bytes(n_params - n_in_matrices, 0)

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(args)
        if (tp_size := args.distributed.tp_size) > 1:
            text = f"optim.type is muon, which needs whole rows of matrices, but distributed.tp_size is {tp_size}"
            yield "optim.type", f"{text}; use tp_size 1 and full_shard, or optim.type adamw"
