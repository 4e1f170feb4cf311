"""AdamW. Norms and embeddings are decayed only if `optim.decay_all` asks for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lingua.config.keys.optim import AdamWArgs


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether it multiplies vectors: two axes and the name `weight`. A table of taps or states has another."""
    return parameter.ndim == 2 and name.endswith(".weight")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether it is a matrix of the blocks or the head; all else and embedding tables are not decayed."""
    return is_matrix(name, parameter) and "embed" not in name


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
