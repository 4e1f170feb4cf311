"""AdamW, the clip of the whole gradient, and a step that a device-side flag can hold back.

Promise: norms and embeddings are not decayed unless `decay_all` asks for it; a step whose gradient is not finite
leaves parameters, moments and counters as they are, bit for bit, although the host has not looked yet.
Cost: no host sync; fused kernels on CPU and CUDA. One pass over the gradients for the norm; they are clipped within the
update, which reads 16 and writes 16 bytes per parameter, all fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lingua.config.keys.optim import AdamWArgs


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Matrices of the blocks and the head are decayed; vectors (norms) and embedding tables are not."""
    return parameter.ndim >= 2 and "embed" not in name


def build_adamw(args: AdamWArgs, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW over one group that is decayed and one that is not, each in the order given."""
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not named:
        raise ValueError("the model has no parameter to train")
    groups = [
        {
            "params": [(name, p) for name, p in named if (args.decay_all or is_decayed(name, p)) == decayed],
            "weight_decay": args.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda") for _, parameter in named),
    )


class Gradient(NamedTuple):
    """What is known of the gradient of all ranks: scalars on the device."""

    norm: Tensor
    """Before clipping, without a loss scale."""
    finite: Tensor
    divisor: Tensor | None
    """What it is to be divided by before it moves anything, fp32; None: nothing."""


@torch.no_grad()
def measure_gradient(parameters: Iterable[nn.Parameter], clip: float, loss_scale: Tensor | None = None) -> Gradient:
    """The norm over all ranks, and the divisor that brings it down to at most `clip` (0: leaves it). Collective.

    `loss_scale`: a factor that is in the gradients, and is a part of the divisor. The gradients stay as they are.
    """
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm.float()
    divisor = loss_scale
    if loss_scale is not None:
        norm = norm / loss_scale
    if clip > 0:
        excess = torch.clamp((norm + 1e-6) / clip, min=1.0)
        divisor = excess if loss_scale is None else excess * loss_scale
    return Gradient(norm, torch.isfinite(norm), divisor)


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, finite: Tensor, divisor: Tensor | None) -> None:
    """One update by the gradients over `divisor` at this learning rate, or none at all where `finite` says False.

    Both are scalars on the device. What the gradients are afterwards is the optimizer's affair.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # Fused kernels look at both themselves, so the host need not wait, and no pass over the gradients is added.
        with amp_scaling(optimizer, found_inf=(~finite).float(), grad_scale=divisor):
            optimizer.step()
    elif bool(finite):  # an optimizer without fused kernels costs one host sync, and one pass
        for group in optimizer.param_groups:
            divide_gradients(group["params"], divisor)
        optimizer.step()


def divide_gradients(parameters: Iterable[nn.Parameter], divisor: Tensor | None) -> None:
    """In place, what this rank has of them; None: by nothing."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if divisor is not None and grads:
        torch._foreach_div_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], divisor)


@contextmanager
def amp_scaling(optimizer: torch.optim.Optimizer, **given: Tensor | None) -> Iterator[None]:
    """Hand `found_inf` and `grad_scale` to the fused kernels of a step, as GradScaler does: one with `found_inf` 1
    changes nothing, any other takes the gradients divided by `grad_scale`. None: not given."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        setattr(optimizer, name, value)
    try:
        yield
    finally:
        for name in given:
            delattr(optimizer, name)
