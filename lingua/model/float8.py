"""Linear layers in float8: forward and both backward products are torch's `_scaled_mm`.

Parameters keep their names, types and values, so checkpoints, FSDP2, activation checkpointing and torch.compile see an
ordinary linear layer. FSDP2 gathers the weight in `model_dtype`; each rank casts it here. Scales are computed from the
current tensors, so there is no state. Values that are not finite stay so.

Each operand is read once more to find its largest magnitude. This costs less than the products save only if
torch.compile fuses it (torchao's README says the same). Activations are saved for backward in their own type.

Letters: N positions, I and O a layer's inputs and outputs, K the dimension that a product sums over.

Not run on CUDA yet. On a CPU, torch 2.10 has the kernel for `tensorwise`; tests emulate `rowwise` with CUDA's rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

MULTIPLE = 16
"""K and the columns of the right operand (torch's check: "trailing dimension of mat1 to be divisible by 16")."""
_LEAST = 1e-30
"""Lower bound of the magnitude that a scale is computed from, for rows of zeros. Gradients of a mean over millions of
positions have rows far below torchao's 1e-12; fp32 overflows at 57344 / 3.4e38 = 1.7e-34."""


@dataclass(frozen=True)
class Recipe:
    """How operands are scaled and summed. Source of both: torchao, float8/config.py, recipes of the same names."""

    per_row: bool
    """One scale per row along K, a power of two so that scaling itself does not round; else one per tensor."""
    gradient: torch.dtype
    """Type of the gradient in both backward products; weights and activations are always e4m3."""
    fast_forward: bool
    """Sum in the tensor cores' own precision (`use_fast_accum`) in forward."""
    fast_backward: bool
    """The same in backward. Hopper's rowwise kernels are fast only with it."""

    def out_dtype(self, wanted: torch.dtype) -> torch.dtype:
        """Return the output type of a product: always bf16 with scales per row."""
        return torch.bfloat16 if self.per_row else wanted


RECIPES: dict[Literal["tensorwise", "rowwise"], Recipe] = {
    "tensorwise": Recipe(per_row=False, gradient=torch.float8_e5m2, fast_forward=True, fast_backward=False),
    "rowwise": Recipe(per_row=True, gradient=torch.float8_e4m3fn, fast_forward=True, fast_backward=True),
}


def refusal(device_type: str, capability: tuple[int, int]) -> str | None:
    """Return why float8 cannot be used on this device, or None if it can."""
    if device_type != "cuda":
        return f"float8 products need a CUDA device, and the device is {device_type}"
    if capability < (8, 9):
        have = ".".join(map(str, capability))
        return f"float8 products need compute capability 8.9 (Ada, Hopper), and this GPU has {have}"
    return None


# -- products --------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, dtype: torch.dtype, per_row: bool) -> tuple[Tensor, Tensor]:
    """Return (x as float8, row-major; fp32 scale that restores it), the scale (rows, 1), or () for the whole tensor."""
    largest = x.abs().amax(dim=1, keepdim=True) if per_row else x.abs().amax()
    factor = torch.finfo(dtype).max / largest.float().clamp(min=_LEAST)
    if per_row:
        factor = (factor.view(torch.int32) & 0x7F800000).view(torch.float32)  # exponent only: rounded down to 2**n
    # No `clamp`: finite values exceed the largest one by at most fp32's rounding, which casting removes.
    return (x.float() * factor).to(dtype).contiguous(), factor.reciprocal()


def scaled_product(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, **how: Any) -> Tensor:
    """Return left (M, K) times right (N, K) transposed, both float8 and row-major: (M, N)."""
    return torch._scaled_mm(left, right.t(), scale_a=left_scale, scale_b=right_scale.t(), **how)


def product(
    left: Tensor, right: Tensor, left_dtype: torch.dtype, recipe: Recipe, fast: bool, out: torch.dtype
) -> Tensor:
    """Return left (M, K) times right (N, K) transposed, computed in float8: (M, N) of type `out`."""
    a, scale_a = quantize(left, left_dtype, recipe.per_row)
    b, scale_b = quantize(right, torch.float8_e4m3fn, recipe.per_row)
    made = scaled_product(a, b, scale_a, scale_b, out_dtype=recipe.out_dtype(out), use_fast_accum=fast)
    return made.to(out)


class _Float8Product(torch.autograd.Function):
    """x (N, I) times weight (O, I) transposed. Saves the inputs: quantizing again is cheaper than keeping both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.recipe = dtype, recipe
        # Round the weight to the model's type first, as FSDP2 does when it gathers: the same in every layout.
        return product(x.to(dtype), weight.to(dtype), torch.float8_e4m3fn, recipe, recipe.fast_forward, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        recipe, dtype, grad = ctx.recipe, ctx.dtype, grads[0].to(ctx.dtype)  # (N, O)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = product(grad, weight.to(dtype).t(), recipe.gradient, recipe, recipe.fast_backward, dtype).to(x.dtype)
        if ctx.needs_input_grad[1]:
            # K is N here: rows of zeros make it a multiple of 16 and do not change the product.
            missing = -len(grad) % MULTIPLE
            grad, x = (functional.pad(each, (0, 0, 0, missing)) if missing else each for each in (grad, x.to(dtype)))
            of_weight = product(grad.t(), x.t(), recipe.gradient, recipe, recipe.fast_backward, dtype).to(weight.dtype)
        return of_x, of_weight, None, None


class Float8Linear(nn.Linear):
    """nn.Linear with float8 products, under autocast too, with the parameters of the layer that it replaces."""

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        rows = x.flatten(0, -2)  # (N, I)
        out: Any = _Float8Product.apply(rows, self.weight, dtype, self.recipe)
        out = out.unflatten(0, x.shape[:-1])  # (..., O)
        return out if self.bias is None else out + self.bias.to(dtype)


# -- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """Names of the linear layers that now compute in float8, and of those that cannot."""

    float8: list[str]
    unfit: list[str]
    """Layers that match, but have a width that is not a multiple of 16; they are unchanged."""

    def __str__(self) -> str:
        text = f"float8 in {len(self.float8)} linear layers"
        if self.unfit:
            some = ", ".join(self.unfit[:3]) + (", ..." if len(self.unfit) > 3 else "")
            text += f"; {len(self.unfit)} stay as they are, for a width is no multiple of {MULTIPLE}: {some}"
        return text


def convert(model: nn.Module, recipe: Literal["tensorwise", "rowwise"], pattern: str) -> Converted:
    """Replace the linear layers of the blocks whose names match `pattern`, in place.

    Layers outside the blocks stay: the loss computes the head's product. Raises ValueError if nothing is replaced.
    """
    layers = {
        f"layers.{name}": module
        for name, module in model.get_submodule("layers").named_modules()
        if isinstance(module, nn.Linear)
    }
    matched = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
    if not matched:
        some = ", ".join(list(layers)[:3])
        raise ValueError(f"distributed.float8_filter {pattern!r} matches no linear layer of the blocks, such as {some}")
    fit = {name: layer for name, layer in matched.items() if _fits(layer)}
    if not fit:
        name, layer = next(iter(matched.items()))
        raise ValueError(
            f"distributed.float8_recipe {recipe}: no layer has widths that are multiples of {MULTIPLE} ({name} has "
            f"{layer.in_features} and {layer.out_features}); change model.dim and hidden_dim, or leave it null"
        )
    for name, layer in fit.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Float8Linear(layer, RECIPES[recipe]))
    return Converted(list(fit), [name for name in matched if name not in fit])


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
