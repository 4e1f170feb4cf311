"""An exponential moving average of the weights.

It is part of the optimizer's state of each parameter: saved, sharded and restored with it, bit for bit. The decay of
step n is at most (1 + n) / (10 + n), so that the first weights are soon forgotten. A skipped step does not change the
average.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

EMA = "ema"


def ema_name(parameter: str) -> str:
    """Return the name of a parameter's average in a checkpoint."""
    return f"optim.state.{parameter}.{EMA}"


def is_ema(name: str) -> bool:
    """Return whether a tensor of a checkpoint is an average."""
    return name.startswith("optim.state.") and name.endswith(f".{EMA}")


@torch.no_grad()
def begin_ema(optimizer: torch.optim.Optimizer, *, anew: bool = False) -> None:
    """Start missing averages at the current weights, or all of them if `anew`."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        slots = optimizer.state[parameter]
        if anew or EMA not in slots:
            slots[EMA] = parameter.detach().clone()


@torch.no_grad()
def move_ema(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], decay: float, step: int, moves: Tensor
) -> None:
    """Update the averages after `step` updates, unless `moves`, a flag on the device, is False."""
    share = moves.float() * (1 - min(decay, (1 + step) / (10 + step)))
    for parameter in parameters:
        average = optimizer.state[parameter].get(EMA) if parameter in optimizer.state else None
        if average is not None:  # a replay from the beginning has none
            _local(average).lerp_(_local(parameter), share.to(average.dtype))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
