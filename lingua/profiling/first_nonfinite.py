"""Find where a step went wrong: the first module whose values are not finite, and gradient norms by layer.

The model is unchanged afterwards. Watching waits for the device once per module and pass, so it is for examining a
single step, not for training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


@dataclass
class Watch:
    """The first values that were not finite, or None. Call `clear` before the next pass."""

    forward: str | None = None
    backward: str | None = None

    def clear(self) -> None:
        self.forward = self.backward = None


@contextmanager
def first_nonfinite(model: nn.Module) -> Iterator[Watch]:
    """Watch every module inside the block. Run compiled modules eagerly, or their submodules are not seen."""
    watch = Watch()
    handles = [
        module.register_forward_hook(partial(_look, watch, _describe(name, module)), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _describe(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _look(watch: Watch, what: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Check a module's output. Hooks of inner modules run before those of outer ones, so the innermost is found."""
    outputs = list(_tensors(output))
    if watch.forward is None and not all(map(_is_finite, outputs)):
        came_in = not all(map(_is_finite, _tensors([args, kwargs])))
        watch.forward = f"{what}: its input" if came_in else f"{what}: its output"
    for tensor in outputs:
        if tensor.requires_grad:
            tensor.register_hook(partial(_look_back, watch, what))


def _look_back(watch: Watch, what: str, gradient: Tensor) -> None:
    if watch.backward is None and not _is_finite(gradient):
        watch.backward = f"{what}: the gradient of its output"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


# -- parameters and gradients --------------------------------------------------------------------------------------


def nonfinite_names(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors with values that are not finite."""
    return [name for name, tensor in named if tensor.is_floating_point() and not _is_finite(tensor)]


def group_of(name: str) -> str:
    """Return the layer of a parameter: `layers.3.attention.wq.weight` -> `layers.3`, `norm.weight` -> `norm`."""
    numbered = re.match(r"\w+\.\d+(?=\.)", name)
    return numbered[0] if numbered else name.partition(".")[0]


@torch.no_grad()
def grad_norms(model: nn.Module) -> dict[str, float]:
    """Return the gradient norm of each layer, in the model's order."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(group_of(name), []).append(parameter.grad)
    return {name: get_total_norm(gradients).item() for name, gradients in groups.items()}
