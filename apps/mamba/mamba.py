"""A block of Mamba-2 (arXiv 2405.21060). Parameter names are Meta Lingua's, so its weights load.

Letters: B rows, S positions, D model width, H heads, P channels of a head, G groups, N state per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingua.model.context import ForwardContext
from lingua.model.kernels import decayed_attention_by_fla, kernel_of, state_space_by_mamba_ssm
from lingua.model.recurrence import causal_conv, decayed_attention, init_taps
from lingua.model.transformer import ResidualBlock, RMSNorm

from .args import Mamba2Args


class SSM(nn.Module):
    """S_t = exp(dt A) S_{t-1} + dt B x^T, y = C S + D x per head; then norm(y * silu(z)) and a projection."""

    def __init__(self, args: Mamba2Args, layer: int) -> None:
        super().__init__()
        self.args, self.layer = args, layer
        width, heads, groups = args.width, args.n_heads, args.n_groups
        self.split = [width, width, groups * args.state_dim, groups * args.state_dim, heads]  # z, x, B, C, dt
        self.in_proj = nn.Linear(args.dim, sum(self.split), bias=False)
        self.conv_weight = self._parameter(args.conv_width, args.conv_size) if args.conv_size else None
        self.conv_bias = self._parameter(args.conv_width) if args.conv_size and args.conv_bias else None
        self.init_states = (
            self._parameter(heads, width // heads, args.state_dim) if args.learnable_init_states else None
        )
        self.dt_bias = self._parameter(heads) if args.dt_bias else None
        self.A_log = self._parameter(heads)
        self.D = self._parameter(*((heads, width // heads) if args.D_has_head_dim else (heads,)))
        self.ssm_norm = RMSNorm(width, args.norm_eps)
        self.out_proj = nn.Linear(width, args.dim, bias=False)

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape))

    def reset_parameters(self) -> None:
        args, init = self.args, self.args.init_args
        self.A_log.uniform_(init.A_init_min, init.A_init_max).log_()
        self.D.fill_(1.0)
        if self.dt_bias is not None:
            dt = self.dt_bias.uniform_(init.dt_min, init.dt_max).clamp_(min=init.dt_init_floor)
            dt.add_(torch.log(-torch.expm1(-dt)))  # softplus of the bias is dt
        if self.conv_weight is not None:
            init_taps(self.conv_weight, args.init_base_std)
        for zeroed in (self.conv_bias, self.init_states):
            if zeroed is not None:
                zeroed.zero_()

    def forward(self, u: Tensor, ctx: ForwardContext) -> Tensor:
        args = self.args
        conv_state, state = ctx.state(self.layer) or (None, None)
        z, mixed, dt = self.in_proj(u).split([self.split[0], args.conv_width, args.n_heads], dim=-1)
        if self.conv_weight is not None:
            mixed, conv_state = causal_conv(mixed, self.conv_weight, self.conv_bias, ctx.starts, ctx.real, conv_state)
            mixed = functional.silu(mixed)
        x, keys, queries = mixed.split(self.split[1:4], dim=-1)
        x = x.unflatten(-1, (args.n_heads, -1))  # (B, S, H, P)
        keys, queries = (each.unflatten(-1, (args.n_groups, -1)) for each in (keys, queries))  # (B, S, G, N)
        dt = functional.softplus(dt.float() + (0.0 if self.dt_bias is None else self.dt_bias.float()))  # (B, S, H)
        if ctx.real is not None:
            dt = dt * ctx.real.unsqueeze(-1)  # a step of 0 keeps the state
        y, state = self.state_space(x, keys, queries, dt, ctx, state)
        y = y + x.float() * self.D.float().view(args.n_heads, -1)
        ctx.keep(self.layer, mixed[:, :0] if conv_state is None else conv_state, state)
        gated = y.flatten(-2) * functional.silu(z.float())
        return self.out_proj(self.ssm_norm(gated.type_as(u)))

    def state_space(
        self, x: Tensor, keys: Tensor, queries: Tensor, dt: Tensor, ctx: ForwardContext, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (C S, (B, S, H, P) in fp32; the state after the last position, (B, H, N, P))."""
        a = -self.A_log.float().exp()
        if state is None and self.init_states is not None:
            state = self.init_states.float().transpose(-1, -2).expand(len(x), -1, -1, -1)
        kernel, chunk = kernel_of(self.args, x, ctx), self.args.ssm_chunk_size
        if kernel == "mamba_ssm":
            return state_space_by_mamba_ssm(x, dt, a, keys, queries, ctx.starts, state, chunk)
        values, log_decay = x.float() * dt.unsqueeze(-1), a * dt
        if kernel == "fla":
            return decayed_attention_by_fla(queries, keys, values, log_decay, ctx.starts, state)
        return decayed_attention(queries, keys, values, log_decay, ctx.starts, state, chunk)


class MambaBlock(ResidualBlock):
    branches = (("ssm_norm", "ssm", SSM),)
