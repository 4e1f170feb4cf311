"""The sLSTM block (arXiv 2405.04517, figure 10): sequential over positions, since outputs feed back into the gates.

Letters: B rows, S positions, D model width, H heads, E channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingua.model.context import ForwardContext
from lingua.model.recurrence import causal_conv, init_taps
from lingua.model.transformer import ResidualBlock, build_norm

from .args import SLSTMArgs
from .mlstm import HeadNorm
from .v0 import BlockLinear


@torch.compiler.disable  # it would be unrolled, which takes minutes to compile
def slstm(
    gates: Tensor,  # (S, H, B, 4 E): i, f, z, o without feedback
    recurrent: Tensor,  # (H, E, 4 E)
    state: tuple[Tensor, ...],  # y, c, n, m before the first position, (H, B, E) each
    starts: Tensor | None,  # (B, S) bool
    real: Tensor | None,  # (B, S) bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return all outputs y, (S, H, B, E), and the state after the last position (arXiv 2405.04517, eq. 8-17).

    m = max(log sigmoid(f) + m, i), c = f' c + i' tanh(z), n = f' n + i', y = sigmoid(o) c / n, with
    f' = exp(log sigmoid(f) + m_{t-1} - m) and i' = exp(i - m). m only keeps numbers small: it has no gradient.
    """
    outputs = []
    for t, gate in enumerate(gates):
        y, c, n, m = state
        if starts is not None:
            y, c, n, m = (each.masked_fill(starts[:, t, None], empty) for each, empty in zip(state, EMPTY, strict=True))
        i, f, z, o = torch.baddbmm(gate, y, recurrent).chunk(4, dim=-1)
        f = functional.logsigmoid(f) + m
        m = torch.maximum(f, i).detach()
        kept, added = (f - m).exp(), (i - m).exp()
        c, n = kept * c + added * z.tanh(), kept * n + added
        after = o.sigmoid() * c / n, c, n, m
        if real is not None:  # padding keeps the state
            after = tuple(torch.where(real[:, t, None], new, old) for new, old in zip(after, state, strict=True))
        state = after
        outputs.append(state[0])
    return torch.stack(outputs), state


EMPTY = (0.0, 0.0, 0.0, float("-inf"))
"""y, c, n and m at the start of a document; the first m is i."""


class SLSTM(nn.Module):
    """i and f from silu(conv x), z and o from x, separately for each head; then a norm per head."""

    def __init__(self, args: SLSTMArgs, layer: int) -> None:
        super().__init__()
        self.args, self.layer = args, layer
        dim, heads = args.dim, args.n_heads
        self.conv_weight = nn.Parameter(torch.empty(dim, args.conv_size))
        self.conv_bias = nn.Parameter(torch.empty(dim))
        size, std = dim // heads, args.initial_std("", ())
        self.igate, self.fgate, self.zgate, self.ogate = (BlockLinear(heads, size, std) for _ in range(4))
        self.recurrent = nn.Parameter(torch.empty(heads, size, 4 * size))
        self.gate_bias = nn.Parameter(torch.empty(heads, 1, 4 * size))
        self.multihead_norm = HeadNorm(dim, args.norm_eps)

    def reset_parameters(self) -> None:
        init_taps(self.conv_weight, self.args.init_base_std)
        for zeroed in (self.conv_bias, self.recurrent, self.gate_bias):
            zeroed.zero_()
        size = self.recurrent.shape[1]
        depth, place = self.layer / max(self.args.n_layers - 1, 1), torch.arange(size) / max(size - 1, 1)
        self.gate_bias[..., size : 2 * size] = 5 - 12 * place ** (0.3 + 1.3 * depth)  # f's, as in xlstm

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        conv_state, *state = ctx.state(self.layer) or (None,)
        mixed, conv_state = causal_conv(x, self.conv_weight, self.conv_bias, ctx.starts, ctx.real, conv_state)
        mixed = functional.silu(mixed)
        each = self.igate(mixed), self.fgate(mixed), self.zgate(x), self.ogate(x)
        heads = [gate.unflatten(-1, (self.args.n_heads, -1)) for gate in each]  # (B, S, H, E)
        gates = torch.cat(heads, dim=-1).permute(1, 2, 0, 3).float() + self.gate_bias.float()  # (S, H, B, 4 E)
        before = [s.transpose(0, 1) for s in state] or [
            torch.full_like(gates[0, ..., : x.shape[-1] // self.args.n_heads], empty) for empty in EMPTY
        ]
        y, after = slstm(gates, self.recurrent.float(), tuple(before), ctx.starts, ctx.real)  # pyright: ignore[reportCallIssue]
        ctx.keep(self.layer, conv_state, *(s.transpose(0, 1) for s in after))
        return self.multihead_norm(y.permute(2, 0, 1, 3)).type_as(x)


class SLSTMBlock(ResidualBlock):
    """sLSTM and a gated feed-forward layer with GELU."""

    branches = (("xlstm_norm", "xlstm", SLSTM),)

    def __init__(self, args: SLSTMArgs, layer: int) -> None:
        super().__init__(args, layer)
        self.ffn_norm = build_norm(args, args.dim)
        self.proj_up = nn.Linear(args.dim, 2 * args.width, bias=False)
        self.proj_down = nn.Linear(args.width, args.dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = super().forward(x, ctx)
        gate, up = self.proj_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.proj_down(functional.gelu(gate) * up)
