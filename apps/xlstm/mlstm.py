"""The block of mLSTM (arXiv 2503.13427, figure 2). Parameter names are those of xlstm and Hugging Face.

Letters: B rows, S positions, D model width, H heads, N keys of a head, P values of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingua.model.context import ForwardContext
from lingua.model.kernels import kernel_of, mlstm_by_kernels
from lingua.model.recurrence import mlstm
from lingua.model.transformer import ResidualBlock

from .args import MLSTMArgs


class Gate(nn.Module):
    """c tanh((weight x + bias) / c) per head, in fp32; weight x + bias without a cap. Initially weight is 0."""

    def __init__(self, width: int, n_heads: int, biases: tuple[float, float], cap: float | None) -> None:
        super().__init__()
        self.biases, self.cap = biases, cap
        self.weight = nn.Parameter(torch.empty(n_heads, width))
        self.bias = nn.Parameter(torch.empty(n_heads))

    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.bias.copy_(torch.linspace(*self.biases, len(self.bias)))

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.linear(x, self.weight, self.bias).float()  # (B, S, H)
        return gate if self.cap is None else self.cap * torch.tanh(gate / self.cap)


FORGET_BIASES = (3.0, 6.0)
"""Initial biases of the first and last head, as in xlstm: most of the memory is kept at first."""


def over_padding(input_gate: Tensor, forget_gate: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """Return the gates (B, S, H), closed in padding so that it neither adds to the memory nor decays it."""
    if ctx.real is None:
        return input_gate, forget_gate
    padded = ~ctx.real.unsqueeze(-1)
    return input_gate.masked_fill(padded, float("-inf")), forget_gate.masked_fill(padded, float("inf"))


class HeadNorm(nn.Module):
    """LayerNorm over each head, without bias; in fp32, returned in x's type."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, S, H, P) to (B, S, H P)."""
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
        in_biases = (args.igate_bias_init_range, args.igate_bias_init_range)
        self.igate_preact = Gate(args.dim, args.n_heads, in_biases, args.gate_soft_cap)
        self.fgate_preact = Gate(args.dim, args.n_heads, FORGET_BIASES, args.gate_soft_cap)
        self.multihead_norm = HeadNorm(args.v_width, args.norm_eps)
        self.out_proj = nn.Linear(args.v_width, args.dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (self.args.n_heads, -1)) for w in (self.q, self.k, self.v))  # (B, S, H, N or P)
        input_gate, forget_gate = over_padding(self.igate_preact(x), self.fgate_preact(x), ctx)
        chunk = self.args.chunk_size
        if ctx.cache is None and kernel_of(self.args, x, ctx) == "mlstm_kernels":  # cached passes are short or padded
            h = mlstm_by_kernels(q, k, v, input_gate, forget_gate, chunk)
        else:
            h, state = mlstm(q, k, v, input_gate, forget_gate, ctx.starts, ctx.state(self.layer), chunk)
            ctx.keep(self.layer, *state)
        gate = self.ogate_preact(x).sigmoid()
        return self.out_proj(gate * self.multihead_norm(h).type_as(x))


class SwiGLU(nn.Module):
    """proj_down(silu(proj_up_gate x) * proj_up x)."""

    def __init__(self, args: MLSTMArgs, layer: int) -> None:
        super().__init__()
        self.proj_up_gate = nn.Linear(args.dim, args.ffn_width, bias=False)
        self.proj_up = nn.Linear(args.dim, args.ffn_width, bias=False)
        self.proj_down = nn.Linear(args.ffn_width, args.dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.proj_down(functional.silu(self.proj_up_gate(x)) * self.proj_up(x))


class MLSTMBlock(ResidualBlock):
    branches = (("norm_mlstm", "mlstm_layer", MLSTM), ("norm_ffn", "ffn", SwiGLU))
