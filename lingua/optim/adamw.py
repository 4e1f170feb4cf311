"""AdamW, optionally with moments in bf16. Norms and embeddings are decayed only with `optim.decay_all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
            if moved := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._step_group(moved, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; torch casts it to the parameters' type, so cast the moments back."""
        super().load_state_dict(state_dict)
        for slots in self.state.values():
            slots.update({key: slots[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")})

    def _step_group(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update the counters of all parameters in a few kernels, then each parameter in one kernel."""
        one = torch.ones((), dtype=torch.float32, device=parameters[0].device)
        moves = one - getattr(self, "found_inf", torch.zeros_like(one))
        slots = [self._slots_of(parameter) for parameter in parameters]
        steps = [each["step"] for each in slots]
        torch._foreach_add_(steps, [moves] * len(steps))
        corrections = zip(*(_bias_corrections(beta, steps) for beta in group["betas"]), strict=True)
        lr, betas = group["lr"], group["betas"]
        # Tensors: of Python's numbers the compiler would make fp64 tensors on the host, or constants.
        numbers = [one * x for x in (lr, 1 - lr * group["weight_decay"], 1 - betas[0], 1 - betas[1], group["eps"])]
        common = moves.bool(), getattr(self, "grad_scale", one), *numbers
        apply: Callable[..., None] = _compiled_move() if one.device.type == "cuda" else _move
        for parameter, each, of_step in zip(parameters, slots, corrections, strict=True):
            grad: Any = parameter.grad
            if (flat := _flat(parameter)).numel():  # a rank may have no part of a small one
                apply(flat, *map(_flat, (grad, each["exp_avg"], each["exp_avg_sq"])), *of_step, *common)

    def _slots_of(self, parameter: Tensor) -> dict[str, Tensor]:
        slots = self.state[parameter]
        if "exp_avg" not in slots:
            slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            slots["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            slots["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return slots


def _bias_corrections(beta: float, steps: list[Tensor]) -> Sequence[Tensor]:
    """Return 1 - beta ** step of each."""
    powers = torch._foreach_pow(beta, steps)
    torch._foreach_neg_(powers)
    torch._foreach_add_(powers, 1.0)
    return powers


def _move(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mean_correction: Tensor,
    square_correction: Tensor,
    moves: Tensor,
    divisor: Tensor,
    lr: Tensor,
    kept: Tensor,
    mean_share: Tensor,
    square_share: Tensor,
    eps: Tensor,
) -> None:
    """Do one step in place, or none if `moves` is False. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    grad = grad.float() / divisor
    mean = torch.lerp(exp_avg.float(), grad, mean_share)
    square = torch.lerp(exp_avg_sq.float(), grad * grad, square_share)
    root = (square / square_correction).sqrt() + eps
    moved = parameter * kept - lr * mean / mean_correction / root
    for old, new in ((parameter, moved), (exp_avg, mean), (exp_avg_sq, square)):
        old.copy_(torch.where(moves, new.to(old.dtype), old))


@cache
def _compiled_move() -> Callable[..., None]:
    return torch.compile(_move, dynamic=True)


def _flat(tensor: Tensor) -> Tensor:
    """Return this rank's part, flattened and, as `data`, no view: compiled code is then the same for any shape.

    Of a view, such as a gradient of FSDP2, the compiler would also look at the tensor behind it.
    """
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1).data
