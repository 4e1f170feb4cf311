"""AdamW, optionally with moments in bf16. Norms and embeddings are decayed only with `optim.decay_all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lingua.config.keys.optim import AdamWArgs


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a matrix: two axes and the name `weight`; tables of taps or states have others."""
    return parameter.ndim == 2 and name.endswith(".weight")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is decayed: matrices of the blocks and the head, not embeddings or vectors."""
    return is_matrix(name, parameter) and "embed" not in name


def build_adamw(args: AdamWArgs, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Build AdamW with a group that is decayed and one that is not, each in the given order."""
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
    groups = [group for group in groups if group["params"]]
    if args.state_dtype == "bf16":
        return LowPrecisionAdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.epsilon)
    return torch.optim.AdamW(
        groups,
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda") for _, parameter in named),
    )


class LowPrecisionAdamW(torch.optim.AdamW):
    """AdamW with moments stored in bf16; each step computes in fp32, with the moments before they are rounded.

    It takes `found_inf` and `grad_scale` like torch's fused kernels (`amp_scaling`), so the host need not wait. On a
    GPU a step is compiled into one pass, which moves 20 bytes per parameter instead of the 28 of AdamW in fp32.
    """

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters from their gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; torch casts it to the parameters' type, so cast the moments back."""
        super().load_state_dict(state_dict)
        for slots in self.state.values():
            slots.update({key: slots[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")})

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        slots, device = self.state[parameter], parameter.device
        if "exp_avg" not in slots:
            slots["step"] = torch.zeros((), dtype=torch.float32, device=device)
            slots["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            slots["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        zero = torch.zeros((), dtype=torch.float32, device=device)
        moves = 1 - getattr(self, "found_inf", zero)
        slots["step"] += moves
        apply = _compiled_move() if device.type == "cuda" else _move
        apply(
            _flat(parameter),
            _flat(grad),
            _flat(slots["exp_avg"]),
            _flat(slots["exp_avg_sq"]),
            slots["step"],
            moves.bool(),
            torch.full_like(zero, group["lr"]),
            getattr(self, "grad_scale", zero + 1),
            group["betas"],
            group["eps"],
            group["weight_decay"],
        )


def _move(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    moves: Tensor,
    lr: Tensor,
    divisor: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Do one step in place, or none where `moves` is False. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    grad = grad.float() / divisor
    mean = torch.lerp(exp_avg.float(), grad, 1 - betas[0])
    square = torch.lerp(exp_avg_sq.float(), grad * grad, 1 - betas[1])
    root = (square / (1 - betas[1] ** step)).sqrt() + eps
    moved = parameter * (1 - lr * weight_decay) - lr * mean / (1 - betas[0] ** step) / root
    for old, new in ((parameter, moved), (exp_avg, mean), (exp_avg_sq, square)):
        old.copy_(torch.where(moves, new.to(old.dtype), old))


@cache
def _compiled_move() -> Callable[..., None]:
    return torch.compile(_move, dynamic=True)


def _flat(tensor: Tensor) -> Tensor:
    """Return this rank's part, flattened so that one compiled code serves tensors of any shape."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
