"""The factor that keeps fp16 gradients out of fp16's underflow, found by trial; needed by `model_dtype: fp16` only.

Promise: the host never waits for the device; all ranks have the same factor, since they agree on whether the gradient
was finite; it is part of a checkpoint, so a resumed run is bitwise the same. What overflows costs its step and halves
the factor. At the factor's minimum, or with a loss that is not finite itself, it is no matter of scaling any more: with
`on_nonfinite: stop` the optimizer moves no more from that step on, although the host hears of it a step later. Ranks
whose own loss was finite may move once more in that time; the run then ends and nothing of it is saved.
Cost: a few kernels on scalars per step; the gradient is brought back by the division that clips it.

Constants are those of torch.amp.GradScaler (its docs, "init_scale", "growth_factor", "backoff_factor",
"growth_interval"); the minimum is that of Megatron-LM (`--min-loss-scale 1.0`), GradScaler has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INITIAL = 2.0**16
GROWTH = 2.0
BACKOFF = 0.5
GROWTH_INTERVAL_STEPS = 2000
MINIMUM = 1.0


class LossScale:
    """The factor of the loss, as a scalar on the device."""

    def __init__(self, device: torch.device, saved: Mapping[str, Any] | None = None) -> None:
        saved = saved or {"factor": INITIAL, "good_steps": 0}
        self.factor = torch.full((), saved["factor"], dtype=torch.float32, device=device)
        self._good_steps = torch.full((), saved["good_steps"], dtype=torch.int32, device=device)

    def can_mend(self, loss: Tensor) -> Tensor:
        """`is_overflow` on the device: loss and result are scalars there."""
        return loss.isfinite() & (self.factor > MINIMUM)

    def update(self, finite: Tensor) -> None:
        """After a step: halve the factor if its gradient was not finite, double it after enough that were."""
        overflow = (~finite).float()
        torch._amp_update_scale_(self.factor, self._good_steps, overflow, GROWTH, BACKOFF, GROWTH_INTERVAL_STEPS)
        self.factor.clamp_(min=MINIMUM)

    def state(self) -> dict[str, float | int]:
        """What to make an equal one from, JSON-able; waits for the device."""
        return {"factor": self.factor.item(), "good_steps": int(self._good_steps.item())}


def is_overflow(loss_sum: float, factor: float) -> bool:
    """Whether a gradient that is not finite, of a step with this loss and factor, calls for a smaller factor only."""
    return math.isfinite(loss_sum) and factor > MINIMUM
