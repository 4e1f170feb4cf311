"""Update the parameters once: gradient norm, clipping, the loss scale of fp16, and a flag that skips a bad step.

A step whose gradient is not finite leaves parameters, moments and counters unchanged, bit for bit, without the host: it
never waits for the device. The norm takes one pass over the gradients. Clipping happens inside the update, which reads
16 and writes 16 bytes per parameter, all fp32.

The loss scale multiplies the loss so that fp16 gradients do not underflow. All ranks have the same scale because they
agree on whether the gradient was finite. A step that overflows is skipped and halves the scale. At the smallest scale,
or if the loss itself is not finite, a smaller scale cannot help: with `on_nonfinite: stop` the optimizer then stops
updating, although the host learns of it one step later. A rank whose own loss was finite may update once more until
then; the run ends and nothing of that is saved.

The constants are those of torch.amp.GradScaler (its docs, "init_scale", "growth_factor", "backoff_factor",
"growth_interval"); the minimum is Megatron-LM's (`--min-loss-scale 1.0`), since GradScaler has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lingua.config.keys.optim import OptimArgs
from lingua.optim.ema import move_ema

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
        """Return `is_overflow` as a scalar on the device, for a loss there."""
        return loss.isfinite() & (self.factor > MINIMUM)

    def update(self, finite: Tensor) -> None:
        """Halve the factor after a gradient that was not finite, double it after enough finite ones."""
        overflow = (~finite).float()
        torch._amp_update_scale_(self.factor, self._good_steps, overflow, GROWTH, BACKOFF, GROWTH_INTERVAL_STEPS)
        self.factor.clamp_(min=MINIMUM)

    def state(self) -> dict[str, float | int]:
        """Return the state to restore from, as JSON values. Waits for the device."""
        return {"factor": self.factor.item(), "good_steps": int(self._good_steps.item())}


def is_overflow(loss_sum: float, factor: float) -> bool:
    """Return whether a smaller factor would help a step with this loss whose gradient is not finite."""
    return math.isfinite(loss_sum) and factor > MINIMUM


class Gradient(NamedTuple):
    """Facts about the gradient of all ranks: scalars on the device."""

    norm: Tensor
    """The norm before clipping, without the scale."""
    finite: Tensor
    divisor: Tensor | None
    """Divisor of the gradient in the update, fp32, or None."""


@torch.no_grad()
def grad_norm_and_clip_coef(parameters: Iterable[nn.Parameter], clip: float, scale: Tensor | None = None) -> Gradient:
    """Return the norm over all ranks, and the divisor that clips it to `clip` (0: no clipping). Collective.

    `scale`: a factor that is in the gradients and becomes part of the divisor. The gradients are not changed.
    """
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm.float()
    divisor = scale
    if scale is not None:
        norm = norm / scale
    if clip > 0:
        excess = torch.clamp((norm + 1e-6) / clip, min=1.0)
        divisor = excess if scale is None else excess * scale
    return Gradient(norm, torch.isfinite(norm), divisor)


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, moves: Tensor, divisor: Tensor | None) -> None:
    """Do one update with the gradients divided by `divisor` at this learning rate, or none if `moves` is False.

    Both are scalars on the device. The optimizer may leave any values in the gradients.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # Fused kernels read both themselves, so the host need not wait, and no pass over the gradients is added.
        with amp_scaling(optimizer, found_inf=(~moves).float(), grad_scale=divisor):
            optimizer.step()
    elif bool(moves):  # an optimizer without fused kernels costs one host sync, and one pass
        for group in optimizer.param_groups:
            divide_gradients(group["params"], divisor)
        optimizer.step()


def divide_gradients(parameters: Iterable[nn.Parameter], divisor: Tensor | None) -> None:
    """Divide this rank's gradients in place, unless `divisor` is None."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if divisor is not None and grads:
        torch._foreach_div_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], divisor)


@contextmanager
def amp_scaling(optimizer: torch.optim.Optimizer, **given: Tensor | None) -> Iterator[None]:
    """Pass `found_inf` and `grad_scale`, if not None, to the fused kernels of a step, as GradScaler does.

    A step with `found_inf` 1 changes nothing; any other divides the gradients by `grad_scale`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        setattr(optimizer, name, value)
    try:
        yield
    finally:
        for name in given:
            delattr(optimizer, name)


class Updater:
    """An optimizer with everything around its step: loss scale, clipping, and skipping of steps that went wrong."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        args: OptimArgs,
        device: torch.device,
        loss_scale: LossScale | None = None,
        frozen: Sequence[nn.Parameter] = (),
    ) -> None:
        """`frozen`: parameters whose gradients are not used."""
        self.loss_scale = loss_scale
        self.halted = torch.zeros((), dtype=torch.bool, device=device)
        """Once set (never with `on_nonfinite: skip`), the optimizer does not update any more."""
        self._optimizer, self._parameters, self._args, self._frozen = optimizer, list(parameters), args, frozen

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`, scaled."""
        (loss if self.loss_scale is None else loss * self.loss_scale.factor).backward()

    def scale(self, normaliser: Tensor) -> Tensor:
        """Return the factor in the gradients of a loss that was multiplied by `normaliser`."""
        return normaliser if self.loss_scale is None else normaliser * self.loss_scale.factor

    def gradient(self, normaliser: Tensor) -> Gradient:
        """Measure the gradient over all ranks of a loss that was multiplied by `normaliser`. Collective."""
        for parameter in self._frozen:
            parameter.grad = None  # so neither the norm nor the optimizer sees it
        return grad_norm_and_clip_coef(self._parameters, self._args.clip, self.scale(normaliser))

    def step(
        self, lr: float, gradient: Gradient, loss: Tensor, *, step: int = 1, limit: float = math.inf
    ) -> dict[str, Tensor]:
        """Update the parameters, unless the step went wrong, and clear the gradients. `step`: its number, from 1.

        `limit`: a mean loss of the ranks above it is a spike and skips the update; collective if it is finite.
        Returns the numbers to report: gradient norm, whether the update was skipped and why, the loss scale of fp16.
        """
        norm, finite, divisor = gradient
        report = {"optim/grad_norm": norm}
        if self.loss_scale is not None:
            report["optim/loss_scale"] = self.loss_scale.factor.clone()
        if self._args.on_nonfinite != "skip":
            self.halted |= ~finite if self.loss_scale is None else ~finite & ~self.loss_scale.can_mend(loss)
        moves = finite & ~self.halted
        if limit < math.inf:
            mean = loss.detach().clone()
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            report["spiked"] = mean > limit
            moves &= ~report["spiked"]
        optimizer_step(self._optimizer, lr, moves, divisor)
        if self._args.ema is not None:
            move_ema(self._optimizer, self._parameters, self._args.ema, step, moves)
        self._optimizer.zero_grad()
        if self.loss_scale is not None:
            self.loss_scale.update(finite)
        return report | {"unmoved": ~moves}
