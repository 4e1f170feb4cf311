"""AdamW, the clip of the whole gradient, and a step that a device-side flag can hold back.

Promise: norms and embeddings are not decayed unless `decay_all` asks for it; a step whose gradient is not finite
leaves parameters, moments and counters as they are, bit for bit, although the host has not looked yet.
Cost: no host sync; fused kernels on CPU and CUDA, one pass over the gradients for the norm and one for the clip.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lingua.schema import AdamWArgs


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


@torch.no_grad()
def clip_and_check(
    parameters: Iterable[nn.Parameter], clip: float, loss_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale the gradients so that their norm over all ranks is at most `clip` (0: leave them).

    `loss_scale`: a factor that is in the gradients and is taken out of them. Returns (norm before clipping, whether it
    is finite) as scalars on the device.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if loss_scale is not None:
        norm = norm / loss_scale
    factor = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip > 0 else None
    if loss_scale is not None:
        factor = 1 / loss_scale if factor is None else factor / loss_scale
    if factor is not None:
        torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], factor)
    return norm, torch.isfinite(norm)


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, finite: Tensor) -> None:
    """One update at this learning rate, or none at all where `finite` (a scalar on the device) says False."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # What GradScaler does: fused kernels look at `found_inf` themselves, so the host need not wait for it.
        optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
    elif bool(finite):  # an optimizer without fused kernels costs one host sync
        optimizer.step()
