"""Keys of `optim:`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lingua.config.base import Args, Fraction, Part, Text, register


class SpikeArgs(Args):
    """What counts as a spike of the loss, and what to do about one."""

    threshold: Annotated[float, Field(gt=0)] = 6.0
    """How far the loss is above the mean of the steps before, in their standard deviations."""
    window: Annotated[int, Field(ge=2)] = 128
    """How many steps before it are looked at. Without as many there is no spike."""
    action: Literal["warn", "skip", "rewind"] = "warn"
    """warn: a line in the log. skip: the optimizer does not move, as for on_nonfinite. rewind: go back to the newest
    checkpoint before the step and pass over its rows."""


class RewindArgs(Args):
    """How a run goes back, with `rewind` in on_spike or on_nonfinite."""

    steps: Annotated[int, Field(ge=1)] = 1
    """Steps whose rows are passed over: the one that went wrong and those after it."""
    limit: Annotated[int, Field(ge=1)] = 3
    """How often a run may go back within limit_steps; then it stops, and `lingua why` tells."""
    limit_steps: Annotated[int, Field(ge=1)] = 1000
    """Steps in which `limit` is counted."""


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
    """Schedule of the learning rate: constant, linear, linear_to_zero, inv_sqrt, cosine, wsd, or one of a plugin's."""
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
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights, with this decay; below it in the first steps: step n decays by
    (1 + n) / (10 + n) at most. RUN@STEP:ema names its weights. Costs 4 bytes per parameter. Null: none."""
    frozen: list[Text] = []
    """Parameters that do not move, by name: tok_embeddings.*, layers.0.*. Their gradients are computed and left out."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient that is not finite: stop before the optimizer moves, skip that step, or go back to the newest
    checkpoint before it and pass over its rows. With distributed.model_dtype fp16 a gradient that overflows is always
    skipped, until the loss scale has fallen to 1."""
    max_skips: Annotated[int, Field(ge=0)] = 10
    """With `skip`: steps that may be skipped in a row before the run stops."""
    on_spike: SpikeArgs = SpikeArgs()
    """A loss far above those before it."""
    rewind: RewindArgs = RewindArgs()
    """How `rewind` goes."""

    def state_bytes(self, n_params: int, n_in_matrices: int) -> int:
        """Bytes of the optimizer's state, to plan with; unless it says otherwise, two fp32 moments as AdamW's.

        `n_in_matrices`: those of the parameters that are in the matrices of the blocks.
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
    """What AdamW needs, alone or as a part of another optimizer."""

    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""


@register("optim", "adamw")
class AdamWArgs(AdamArgs):
    """AdamW (lingua/optim/adamw.py)."""

    builder: ClassVar[str] = "lingua.optim.adamw:build_adamw"

    type: Literal["adamw"] = "adamw"
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the moments between steps. bf16: 4 bytes less of each parameter, rounded once per step, as DeepSeek-V3
    was trained (arXiv 2412.19437, section 3.3.3); beta2 at most 0.98."""

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

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(args)
        if (tp_size := args.distributed.tp_size) > 1:
            text = f"optim.type is muon, which needs whole rows of matrices, but distributed.tp_size is {tp_size}"
            yield "optim.type", f"{text}; use tp_size 1 and full_shard, or optim.type adamw"
