"""Blocks of a Llama-style decoder: norm, rotary positions, attention, feed-forward.

Parameter names, and the rotation of adjacent pairs, are Meta Lingua's, so its weights load. Norms, rotation and softmax
compute in fp32 under both autocast and FSDP2's mixed precision. Nothing here syncs the host or breaks a graph.

Letters: B rows, S positions, T cached positions, D model width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingua.config.keys.model import DecoderArgs, LlamaArgs, RopeScalingArgs
from lingua.model.attention import attend, visible
from lingua.model.context import ForwardContext

# -- rotary positions --------------------------------------------------------------------------------------------


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScalingArgs | None) -> Tensor:
    """Return the radians per position of each pair, fp64 (E/2,) on the CPU."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    frequencies = theta ** (-pairs / head_dim)
    if scaling is None:
        return frequencies
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones are unchanged, those between are blended.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (turns >= high).double() if low == high else ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class RotaryEmbedding(nn.Module):
    """Table of cosines and sines, fp32, not part of the state dict."""

    cos: Tensor  # (max_seqlen, E/2)
    sin: Tensor

    def __init__(self, args: LlamaArgs) -> None:
        super().__init__()
        self.args = args
        for name in ("cos", "sin"):
            table = torch.empty(args.max_seqlen, args.head_width // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        if not self.cos.is_meta:
            self.fill()

    def fill(self) -> None:
        """Compute the table in fp32, whatever `to_empty` or `.to(dtype)` made of it."""
        args, device = self.args, self.cos.device
        frequencies = rotary_frequencies(args.head_width, args.rope_theta, args.rope_scaling)
        angles = torch.outer(torch.arange(args.max_seqlen, dtype=torch.float64, device="cpu"), frequencies)
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def turn_by(self, theta: float) -> None:
        """Recompute the table if the base of the frequencies changes."""
        if theta != self.args.rope_theta:
            self.args = self.args.model_copy(update={"rope_theta": theta})
            self.fill()

    def forward(self, seq_len: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of the first seq_len positions, (S, E/2), or of positions (B, S), (B, S, E/2)."""
        if positions is not None:
            return self.cos[positions], self.sin[positions]
        if seq_len > len(self.cos):
            raise ValueError(
                f"rows of {seq_len} positions, but the model is built for model.max_seqlen={len(self.cos)}"
            )
        return self.cos[:seq_len], self.sin[:seq_len]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of x (B, S, heads, E) by their angles; in fp32, returned in x's type."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (S or B S, 1, E/2)
    if torch.compiler.is_compiling():  # fused into one kernel, which inductor cannot do for complex numbers
        first, second = pairs[..., 0], pairs[..., 1]  # (B, S, heads, E/2)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    else:  # the same result with one operator in forward and one in backward
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos.float(), sin.float()))
    return turned.flatten(-2).type_as(x)


# -- blocks --------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32, returned in x's type."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias, in fp32, returned in x's type."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return functional.layer_norm(x.float(), self.weight.shape, weight, bias, self.eps).type_as(x)


def build_norm(args: DecoderArgs, dim: int) -> nn.Module:
    """Build a norm of the kind that `model.norm` names."""
    return {"rms": RMSNorm, "layer": LayerNorm}[args.norm](dim, args.norm_eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, args: LlamaArgs, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_width
        self.wq = nn.Linear(args.dim, args.heads * args.head_width, bias=False)
        self.wk = nn.Linear(args.dim, args.kv_heads * args.head_width, bias=False)
        self.wv = nn.Linear(args.dim, args.kv_heads * args.head_width, bias=False)
        self.wo = nn.Linear(args.heads * args.head_width, args.dim, bias=False)
        self.q_norm = build_norm(args, args.head_width) if args.qk_norm else None
        self.k_norm = build_norm(args, args.head_width) if args.qk_norm else None

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        q, k, v = self.project(x, ctx)
        if ctx.cache is not None and ctx.positions is not None:
            k, v = ctx.cache.update(self.layer, ctx.positions, k, v)
        out = attend(ctx.impl, q, k, v, ctx.mask, ctx.window, ctx.causal)  # (B, S, H, E)
        return self.wo(out.flatten(-2))

    def project(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, S, D) to rotated q (B, S, H, E) and k (B, S, K, E), and v (B, S, K, E)."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, S, heads, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        assert ctx.angles is not None, "a model with attention has angles"
        return rotate(q, *ctx.angles), rotate(k, *ctx.angles), v


class ResidualBlock(nn.Module):
    """A sequence of modules, each after a norm and added to the residual stream."""

    branches: ClassVar[Sequence[tuple[str, str, Callable[[Any, int], nn.Module]]]]
    """Names of norm and module, as in the weights, and a builder of the module from (args, layer). The module is called
    with (x, ctx)."""

    def __init__(self, args: Any, layer: int) -> None:
        super().__init__()
        for norm, name, build in self.branches:
            self.add_module(norm, build_norm(args, args.dim))
            self.add_module(name, build(args, layer))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for norm, name, _ in self.branches:
            x = x + getattr(self, name)(getattr(self, norm)(x), ctx)
        return x


class FeedForwardArgs(Protocol):
    """The Args that a feed-forward layer needs."""

    @property
    def dim(self) -> int: ...

    @property
    def ffn_width(self) -> int: ...


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: FeedForwardArgs, layer: int | None = None) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_width, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_width, bias=False)
        self.w2 = nn.Linear(args.ffn_width, args.dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, args: LlamaArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = build_norm(args, args.dim)
        self.ffn_norm = build_norm(args, args.dim)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + self.attention(self.attention_norm(x), ctx)  # (B, S, D)
        return x + self.feed_forward(self.ffn_norm(x))


def cached_mask(positions: Tensor, n_slots: int, window: int | None) -> Tensor:
    """Return which of n_slots cache slots queries at positions (B, S) see: (B, 1, S, T) bool."""
    slots = torch.arange(n_slots, device=positions.device)
    return visible(positions[:, None, :, None], slots, window)
