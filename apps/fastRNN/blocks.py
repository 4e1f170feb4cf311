"""Blocks of minGRU, minLSTM (arXiv 2410.01201) and Hawk (arXiv 2402.19427), each with a linear scan per channel.

Parameter names are Meta Lingua's, so its weights load.

Letters: B rows, S positions, D model width, H heads, R channels of the recurrence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingua.model.context import ForwardContext
from lingua.model.kernels import kernel_of, linear_scan_by_fla
from lingua.model.recurrence import causal_conv, init_taps, linear_scan
from lingua.model.transformer import FeedForward, ResidualBlock

from .args import HawkArgs, MinGRUArgs, MinLSTMArgs, RecurrentArgs

_LRU_SCALE = 8.0
"""c of the paper, equation 4."""
_MAX_SQRT_GRADIENT = 1000.0
"""The bound in Griffin's own code (recurrentgemma, torch/layers.py)."""


class Recurrence(nn.Module):
    """Base of the three: an optional convolution and the scan, each with a state between passes."""

    def __init__(self, args: RecurrentArgs, layer: int, conv_width: int) -> None:
        super().__init__()
        self.args, self.layer = args, layer
        self.conv_weight = nn.Parameter(torch.empty(conv_width, args.conv_size)) if args.conv_size else None

    def reset_parameters(self) -> None:
        if self.conv_weight is not None:
            init_taps(self.conv_weight, self.args.init_base_std)

    def conv(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Return silu(convolution of x), or x if there is none; and its last inputs, (B, K - 1, channels)."""
        if self.conv_weight is None:
            return x, x[:, :0]
        before, _ = ctx.state(self.layer) or (None, None)
        y, after = causal_conv(x, self.conv_weight, None, ctx.starts, ctx.real, before)
        return functional.silu(y), after

    def scan(self, a: Tensor, b: Tensor, conv_state: Tensor, ctx: ForwardContext) -> Tensor:
        """Return s_t = a_t s_{t-1} + b_t within documents, (B, S, R) in fp32, and keep the state for the next pass."""
        _, state = ctx.state(self.layer) or (None, None)
        if ctx.starts is not None:
            a = a.masked_fill(ctx.starts.unsqueeze(-1), 0.0)
        if ctx.real is not None:
            a = a.masked_fill(~ctx.real.unsqueeze(-1), 1.0)
            b = b.masked_fill(~ctx.real.unsqueeze(-1), 0.0)
        states = linear_scan_by_fla(a, b, state) if kernel_of(self.args, a, ctx) == "fla" else linear_scan(a, b, state)
        ctx.keep(self.layer, conv_state, states[:, -1])
        return states


class GRU(Recurrence):
    """z = sigmoid(conv(wz x)), s = (1 - z) s + z wh_tilde x, out = wo(s * silu(w x))."""

    def __init__(self, args: MinGRUArgs, layer: int) -> None:
        super().__init__(args, layer, args.width)
        self.w = nn.Linear(args.dim, args.width, bias=False)
        self.wz = nn.Linear(args.dim, args.width, bias=False)
        self.wh_tilde = nn.Linear(args.dim, args.width, bias=False)
        self.wo = nn.Linear(args.width, args.dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        gate, conv_state = self.conv(self.wz(x), ctx)
        z = gate.float().sigmoid()
        states = self.scan(1 - z, z * self.wh_tilde(x).float(), conv_state, ctx)
        return self.wo(states.type_as(x) * functional.silu(self.w(x)))


class LSTM(Recurrence):
    """f, i = sigmoid(conv(wfi x)); s = f/(f + i) s + i/(f + i) wh_tilde x, out = wo(s * silu(w x))."""

    def __init__(self, args: MinLSTMArgs, layer: int) -> None:
        super().__init__(args, layer, 2 * args.width)
        self.w = nn.Linear(args.dim, args.width, bias=False)
        self.wfi = nn.Linear(args.dim, 2 * args.width, bias=False)
        self.wh_tilde = nn.Linear(args.dim, args.width, bias=False)
        self.wo = nn.Linear(args.width, args.dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        gates, conv_state = self.conv(self.wfi(x), ctx)
        of_heads = gates.float().sigmoid().unflatten(-1, (self.args.n_heads, 2, -1))  # f and i of each head in turn
        f, i = (each.flatten(-2) for each in of_heads.unbind(-2))  # (B, S, R)
        total = f + i + 1e-4  # Meta Lingua's epsilon
        states = self.scan(f / total, i / total * self.wh_tilde(x).float(), conv_state, ctx)
        return self.wo(states.type_as(x) * functional.silu(self.w(x)))


class RGLRU(Recurrence):
    """log a = -8 sigmoid(a_gate x) softplus(a); s = a s + sqrt(1 - a^2) sigmoid(input_gate x) x, x after the conv."""

    def __init__(self, args: HawkArgs, layer: int) -> None:
        super().__init__(args, layer, args.width)
        self.a = nn.Parameter(torch.empty(args.width // args.n_heads))
        self.input_gate = nn.Linear(args.width, args.width, bias=False)
        self.a_gate = nn.Linear(args.width, args.width, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.a.uniform_(0.9**2, 0.999**2).log_().mul_(0.5)  # a^8 between 0.9 and 0.999 (paper, section 2.4)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x, conv_state = self.conv(x, ctx)
        rate = functional.softplus(self.a.float()).repeat(self.args.n_heads)  # (R,)
        log_a = -_LRU_SCALE * self.a_gate(x).float().sigmoid() * rate
        step: Any = _BoundedSqrt.apply(-torch.expm1(2 * log_a))
        return self.scan(log_a.exp(), step * self.input_gate(x).float().sigmoid() * x.float(), conv_state, ctx)


class _BoundedSqrt(torch.autograd.Function):
    """sqrt with a gradient of at most _MAX_SQRT_GRADIENT."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return grads[0] * (4 * x).clamp(min=_MAX_SQRT_GRADIENT**-2).rsqrt()


class RGLRUBlock(nn.Module):
    """x + wo(rglru(wx x) * silu(wy x))."""

    def __init__(self, args: HawkArgs, layer: int) -> None:
        super().__init__()
        self.wy = nn.Linear(args.dim, args.width, bias=False)
        self.wx = nn.Linear(args.dim, args.width, bias=False)
        self.rglru = RGLRU(args, layer)
        self.wo = nn.Linear(args.width, args.dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        states = self.rglru(self.wx(x), ctx)
        return x + self.wo(states.type_as(x) * functional.silu(self.wy(x)))


class GRUBlock(ResidualBlock):
    branches = (("gru_norm", "gru", GRU),)


class LSTMBlock(ResidualBlock):
    branches = (("lstm_norm", "lstm", LSTM),)


class HawkBlock(ResidualBlock):
    """As in Meta Lingua, the recurrent half also adds its own input, which is the norm's output."""

    branches = (("rlgru_norm", "rlgru_block", RGLRUBlock), ("ffn_norm", "feed_forward", FeedForward))
