"""The block of mLSTM (arXiv 2503.13427, figure 2). Parameter names are xlstm's own, which are Hugging Face's too.

Letters: B rows, S positions, D model width, H heads, N keys of a head, P values of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingua.model.context import ForwardContext
from lingua.model.kernels import kernel_of, mlstm_by_kernels
from lingua.model.recurrence import mlstm
from lingua.model.transformer import build_norm

from .args import MLSTMArgs


class Gate(nn.Module):
    """c tanh((weight x + bias) / c) per head, in fp32; drawn as 0 with a given bias."""

    def __init__(self, args: MLSTMArgs, *, forget: bool) -> None:
        super().__init__()
        self.args, self.forget = args, forget
        self.weight = nn.Parameter(torch.empty(args.n_heads, args.dim))
        self.bias = nn.Parameter(torch.empty(args.n_heads))

    def reset_parameters(self) -> None:
        self.weight.zero_()
        if self.forget:
            self.bias.copy_(torch.linspace(3.0, 6.0, len(self.bias)))  # xlstm: most is kept at first
        else:
            self.bias.fill_(self.args.igate_bias_init_range)

    def forward(self, x: Tensor) -> Tensor:
        cap = self.args.gate_soft_cap
        return cap * torch.tanh(functional.linear(x, self.weight, self.bias).float() / cap)  # (B, S, H)


class HeadNorm(nn.Module):
    """LayerNorm over each head, without bias; in fp32, returned in x's type."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, H, P) -> (B, S, H P)."""
        return functional.layer_norm(x.float(), x.shape[-1:], eps=self.eps).flatten(-2) * self.weight.float()


class MLSTM(nn.Module):
    """A matrix memory with exponential gates; see `lingua.model.recurrence.mlstm`."""

    def __init__(self, args: MLSTMArgs, layer: int) -> None:
        super().__init__()
        self.args, self.layer = args, layer
        self.q = nn.Linear(args.dim, args.qk_width, bias=False)
        self.k = nn.Linear(args.dim, args.qk_width, bias=False)
        self.v = nn.Linear(args.dim, args.v_width, bias=False)
        self.ogate_preact = nn.Linear(args.dim, args.v_width, bias=False)
        self.igate_preact = Gate(args, forget=False)
        self.fgate_preact = Gate(args, forget=True)
        self.multihead_norm = HeadNorm(args.v_width, args.norm_eps)
        self.out_proj = nn.Linear(args.v_width, args.dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (self.args.n_heads, -1)) for w in (self.q, self.k, self.v))  # (B, S, H, N or P)
        input_gate, forget_gate = self.igate_preact(x), self.fgate_preact(x)
        if ctx.real is not None:  # padding: nothing comes in, nothing is forgotten
            padded = ~ctx.real.unsqueeze(-1)
            input_gate = input_gate.masked_fill(padded, float("-inf"))
            forget_gate = forget_gate.masked_fill(padded, float("inf"))
        chunk = self.args.chunk_size
        if ctx.cache is None and kernel_of(self.args, x, ctx) == "mlstm_kernels":  # cached passes are short, or padded
            h = mlstm_by_kernels(q, k, v, input_gate, forget_gate, chunk)
        else:
            h, state = mlstm(q, k, v, input_gate, forget_gate, ctx.starts, ctx.state(self.layer), chunk)
            ctx.keep(self.layer, *state)
        gate = self.ogate_preact(x).sigmoid()
        return self.out_proj(gate * self.multihead_norm(h).type_as(x))


class SwiGLU(nn.Module):
    """proj_down(silu(proj_up_gate x) * proj_up x)."""

    def __init__(self, args: MLSTMArgs) -> None:
        super().__init__()
        self.proj_up_gate = nn.Linear(args.dim, args.ffn_width, bias=False)
        self.proj_up = nn.Linear(args.dim, args.ffn_width, bias=False)
        self.proj_down = nn.Linear(args.ffn_width, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_down(functional.silu(self.proj_up_gate(x)) * self.proj_up(x))


class MLSTMBlock(nn.Module):
    """An mLSTM and a feed-forward layer, each after a norm and added to the stream."""

    def __init__(self, args: MLSTMArgs, layer: int) -> None:
        super().__init__()
        self.norm_mlstm = build_norm(args, args.dim)
        self.mlstm_layer = MLSTM(args, layer)
        self.norm_ffn = build_norm(args, args.dim)
        self.ffn = SwiGLU(args)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + self.mlstm_layer(self.norm_mlstm(x), ctx)
        return x + self.ffn(self.norm_ffn(x))
