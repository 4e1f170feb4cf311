"""Blocks of a Llama-type decoder: norm, rotary positions, attention, feed-forward, and their initial weights.

Parameter names, and the rotation of neighbouring pairs, are Meta Lingua's, so its weights load. Norms, rotation and
softmax compute in fp32 under autocast and under FSDP2's mixed precision alike. Initial weights are a function of
(seed, parameter name, shape) alone: they are the same on any number of ranks, sharded or not, but CPU and CUDA draw
different ones. Each rank draws whole tensors and keeps its shard. Nothing here syncs the host or breaks a graph.

Letters: B rows, S positions, T cached positions, D model width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from lingua.config.keys.model import LlamaArgs, RopeScalingArgs
from lingua.model.attention import Mask, attend, visible


@dataclass(eq=False)
class KVCache:
    """Keys and values of the positions seen so far; slot t of a row holds its position t.

    Rows may differ in length and are padded on the right: what padding leaves in a slot is never seen, since a query
    at position p sees slots up to p only, and the token of position p overwrites slot p before.
    """

    n_slots: int
    end: int = 0
    """Slots in use: every query of the next pass has a position below it. The caller sets it."""
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of each layer, (B, n_slots, K, E); made by the layer's first pass, in the type it computes in."""

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, S, K, E) at positions (B, S); returns all that is in use, (B, end, K, E) each."""
        if layer not in self.layers:
            shape = (len(k), self.n_slots, *k.shape[2:])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self.layers[layer]
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        keys[rows, positions], values[rows, positions] = k, v
        return keys[:, : self.end], values[:, : self.end]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, in this order."""
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}


@dataclass(eq=False)
class ForwardContext:
    """What all blocks of one forward pass share.

    One object and not loose tensors: FSDP2 casts tensor arguments of a block to bf16, and angles must stay fp32.
    """

    impl: str
    window: int | None
    cos: Tensor  # fp32 (S, E/2), or (B, S, E/2)
    sin: Tensor
    mask: Mask = None
    cache: KVCache | None = None
    positions: Tensor | None = None  # (B, S), with a cache


# -- rotary positions --------------------------------------------------------------------------------------------


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScalingArgs | None) -> Tensor:
    """Radians per position of each pair, fp64 (E/2,) on the CPU."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    frequencies = theta ** (-pairs / head_dim)
    if scaling is None:
        return frequencies
    # Llama 3.1: long waves are stretched by `factor`, short ones stay, those between are blended.
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

    def forward(self, seq_len: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows of the table for the first seq_len positions, (S, E/2), or for positions (B, S), (B, S, E/2)."""
        if positions is not None:
            return self.cos[positions], self.sin[positions]
        if seq_len > len(self.cos):
            raise ValueError(
                f"rows of {seq_len} positions, but the model is built for model.max_seqlen={len(self.cos)}"
            )
        return self.cos[:seq_len], self.sin[:seq_len]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of x (B, S, heads, E) by their angles; in fp32, returned in x's type."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (S or B S, 1, E/2)
    if torch.compiler.is_compiling():  # into one kernel; inductor makes none of complex numbers
        first, second = pairs[..., 0], pairs[..., 1]  # (B, S, heads, E/2)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    else:  # the same numbers by one operator in forward and one in backward
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


def build_norm(args: LlamaArgs, dim: int) -> nn.Module:
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
        out = attend(ctx.impl, q, k, v, ctx.mask, ctx.window)  # (B, S, H, E)
        return self.wo(out.flatten(-2))

    def project(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) -> rotated q (B, S, H, E) and k (B, S, K, E), and v (B, S, K, E)."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, S, heads, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin), v


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: LlamaArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_width, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_width, bias=False)
        self.w2 = nn.Linear(args.ffn_width, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and added to the stream."""

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
    """What queries at positions (B, S) see of n_slots cache slots: (B, 1, S, T)."""
    slots = torch.arange(n_slots, device=positions.device)
    return visible(positions[:, None, :, None], slots, window)


# -- initial weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
def init_modules(model: nn.Module, args: LlamaArgs, seed: int) -> None:
    """Give every parameter, sharded or not, its initial value: a function of (seed, name, shape) alone.

    Weights of linear layers and embeddings are drawn and their biases are 0; any other module with parameters has a
    method `reset_parameters`. Raises ValueError for one that has none.
    """
    done: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = {kind: p for kind, p in module.named_parameters(recurse=False) if p not in done}
        done |= set(own.values())
        if not own:
            continue
        if not isinstance(module, nn.Linear | nn.Embedding):
            _reset(module, own, seed, name)
            continue
        for kind, parameter in own.items():
            if kind == "bias":
                parameter.zero_()
            else:
                std = initial_std(args, f"{prefix}{kind}", parameter.shape)
                init_parameter(parameter, std, seed, f"{prefix}{kind}")


def _reset(module: nn.Module, own: Mapping[str, nn.Parameter], seed: int, name: str) -> None:
    """Let a module initialise whole tensors in place of its parameters, then give each rank its shard."""
    if not hasattr(module, "reset_parameters"):
        raise ValueError(
            f"{name or 'the model'} ({type(module).__name__}) has parameters but no reset_parameters(); "
            "add this method and give them their initial values in it"
        )
    device = next(iter(own.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_seed_of(seed, name))
        try:
            drawn = {kind: nn.Parameter(_whole_like(p)) for kind, p in own.items()}
            module._parameters.update(drawn)
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
        finally:
            module._parameters.update(own)
    for kind, parameter in own.items():
        _fill(parameter, drawn[kind])


def initial_std(args: LlamaArgs, name: str, shape: torch.Size) -> float:
    """Return the standard deviation of a matrix's initial values, which are cut off at 3 of them."""
    fan_in = args.dim if "embed" in name else shape[-1]
    std = args.init_base_std or fan_in**-0.5
    return std / _depth_factor(args, name) if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else std


def _depth_factor(args: LlamaArgs, name: str) -> float:
    layer = int(name.split("layers.")[1].split(".")[0])
    return {
        "disabled": 1.0,
        "global_depth": (2 * (args.n_layers + 1)) ** 0.5,
        "current_depth": (2 * (layer + 1)) ** 0.5,
        "dim_ratio": args.dim / 4096,
    }[args.init_std_factor]


@torch.no_grad()
def init_parameter(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill a matrix, sharded or not, with the values that (seed, name) stand for."""
    generator = torch.Generator(parameter.device).manual_seed(_seed_of(seed, name))
    drawn = _whole_like(parameter)
    nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
    _fill(parameter, drawn)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed:d}/{name}".encode(), digest_size=7).digest(), "little")


def _whole_like(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)


def _fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter. Every rank has it and takes its shard, so nothing is sent."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)
