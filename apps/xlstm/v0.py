"""The mLSTM block of the first paper (arXiv 2405.04517, figure 11).

Letters: B rows, S positions, D model width, W width of the block, H heads, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingua.model.context import ForwardContext
from lingua.model.recurrence import causal_conv, init_taps, mlstm
from lingua.model.transformer import ResidualBlock

from .args import MLSTMV0Args
from .mlstm import FORGET_BIASES, Gate, HeadNorm, over_padding


class BlockLinear(nn.Module):
    """A linear layer per block of `size` channels, without bias."""

    def __init__(self, n_blocks: int, size: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(n_blocks, size, size))  # out, in

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=self.std, a=-3 * self.std, b=3 * self.std)

    def forward(self, x: Tensor) -> Tensor:
        n_blocks, size, _ = self.weight.shape
        return torch.einsum("bsni,noi->bsno", x.unflatten(-1, (n_blocks, size)), self.weight).flatten(-2)


class MLSTMV0(nn.Module):
    """x, z = up u; q, k from silu(conv x), v from x; down((norm(mLSTM) + skip * silu(conv x)) * silu(z))."""

    def __init__(self, args: MLSTMV0Args, layer: int) -> None:
        super().__init__()
        self.args, self.layer, width = args, layer, args.width
        self.proj_up = nn.Linear(args.dim, 2 * width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(width, args.conv_size))
        self.conv_bias = nn.Parameter(torch.empty(width))
        blocks = width // args.qkv_proj_blocksize, args.qkv_proj_blocksize, args.initial_std("", ())
        self.q_proj, self.k_proj, self.v_proj = BlockLinear(*blocks), BlockLinear(*blocks), BlockLinear(*blocks)
        self.igate_preact = Gate(3 * width, args.n_heads, (0.0, 0.0), cap=None)
        self.fgate_preact = Gate(3 * width, args.n_heads, FORGET_BIASES, cap=None)
        self.multihead_norm = HeadNorm(width, args.norm_eps)
        self.learnable_skip = nn.Parameter(torch.empty(width))
        self.proj_down = nn.Linear(width, args.dim, bias=False)

    def reset_parameters(self) -> None:
        init_taps(self.conv_weight, self.args.init_base_std)
        self.conv_bias.zero_()
        self.learnable_skip.fill_(1.0)

    def forward(self, u: Tensor, ctx: ForwardContext) -> Tensor:
        conv_state, *state = ctx.state(self.layer) or (None,)
        x, z = self.proj_up(u).chunk(2, dim=-1)  # (B, S, W)
        mixed, conv_state = causal_conv(x, self.conv_weight, self.conv_bias, ctx.starts, ctx.real, conv_state)
        mixed = functional.silu(mixed)
        qkv = self.q_proj(mixed), self.k_proj(mixed), self.v_proj(x)
        seen = torch.cat(qkv, dim=-1)
        gates = over_padding(self.igate_preact(seen), self.fgate_preact(seen), ctx)
        q, k, v = (each.unflatten(-1, (self.args.n_heads, -1)) for each in qkv)
        h, state = mlstm(q, k, v, *gates, ctx.starts, tuple(state) or None, self.args.chunk_size)
        ctx.keep(self.layer, conv_state, *state)
        h = self.multihead_norm(h).type_as(mixed) + self.learnable_skip * mixed
        return self.proj_down(h * functional.silu(z))


class MLSTMV0Block(ResidualBlock):
    branches = (("xlstm_norm", "xlstm", MLSTMV0),)
