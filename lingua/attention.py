"""Attention by the kernel that the config names, or a refusal that says why and what would work here.

Promise: `resolve_attn_impl` decides before a model is built; what it returns is what runs. All kernels compute the
same function: causal, with `window` only the last `window` positions, with document numbers only the own document.
Cost: sdpa and eager need a (B, 1, S, S) mask of booleans for documents, (1, 1, S, S) for a window; flex a block mask.

Letters: B rows, S query positions, T key positions, H heads, K key/value heads (K divides H), E head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingua.args import ConfigError
from lingua.schema import LlamaArgs

HALF = (torch.float16, torch.bfloat16)
Mask = Any
"""None: causal and nothing else; a boolean tensor (B or 1, 1, S, T), True where seen; or flex's BlockMask."""

# -- the decision ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """All that the choice of a kernel depends on."""

    device_type: str
    capability: tuple[int, int]
    """CUDA compute capability; (0, 0) elsewhere."""
    dtype: torch.dtype
    head_dim: int
    doc_mask: bool
    window: bool
    installed: frozenset[str]
    """Which of xformers and flash_attn can be imported."""
    deterministic: bool = False
    """Whether gradients must be equal from run to run."""


def _not_cuda(place: Place, least: tuple[int, int]) -> str | None:
    if place.device_type != "cuda":
        return f"it runs on CUDA only, and the device is {place.device_type}"
    if place.capability < least:
        have, need = (".".join(map(str, version)) for version in (place.capability, least))
        return f"it needs compute capability {need}, and this GPU has {have}"
    return None


def _not_half(place: Place) -> str | None:
    return None if place.dtype in HALF else f"it computes in bf16 or fp16 only, and the model in {place.dtype}"


def _masked(place: Place, window: bool) -> str | None:
    if place.doc_mask:
        return "it takes no document mask (data.doc_mask)"
    return "it takes no sliding window (model.sliding_window)" if place.window and not window else None


def _too_wide(place: Place, most: int) -> str | None:
    if place.head_dim > most or place.head_dim % 8:
        return f"head_dim is {place.head_dim}; it needs a multiple of 8 up to {most}"
    return None


def _varies(place: Place) -> str | None:
    """For kernels whose backward adds up in any order, and that torch's deterministic mode cannot change.

    torch's own flash and memory-efficient kernels obey it (its notes on randomness, "CUDA SDPA"), flash_attn takes an
    argument (2.4.1 on), flex has each gradient summed by one program (no atomics in its backward template).
    """
    return "its gradients differ from run to run (deterministic: true)" if place.deterministic else None


def _missing(place: Place, package: str) -> str | None:
    return None if package in place.installed else f"the package {package} is not installed"


def refusal(impl: str, place: Place) -> str | None:
    """Why this kernel cannot be used here; None if it can."""
    match impl:
        case "sdpa" | "eager":
            return None
        case "sdpa_flash":
            on_gpu = _not_cuda(place, (8, 0)) or _not_half(place) or _masked(place, window=False)
            return _masked(place, window=False) if place.device_type == "cpu" else on_gpu or _too_wide(place, 256)
        case "sdpa_cudnn_first":
            unfit = _not_cuda(place, (9, 0)) or _not_half(place) or _masked(place, window=False)
            return unfit or _varies(place)
        case "sdpa_cudnn":
            unfit = _not_cuda(place, (8, 0)) or _not_half(place) or _masked(place, window=False)
            return unfit or _too_wide(place, 128) or _varies(place)
        case "flex":
            return _not_cuda(place, (7, 5))
        case "xformers":
            unfit = _missing(place, "xformers") or _not_cuda(place, (8, 0)) or _not_half(place)
            return unfit or _masked(place, window=True) or _too_wide(place, 256) or _varies(place)
        case "flash_attn":
            unfit = _missing(place, "flash_attn") or _not_cuda(place, (8, 0)) or _not_half(place)
            return unfit or _masked(place, window=True) or _too_wide(place, 256)
    return "there is no such implementation"


# Fastest first, where masks are wanted and where they are not. sdpa leaves it to torch, which takes flash before cuDNN;
# on Hopper cuDNN's kernels are 1.7 to 2.3 times as fast in training shapes, on Ampere, Ada and Blackwell they are not
# (huggingface/transformers, pull request 48163, six GPUs).
_BEST_MASKED = ("flex", "sdpa")
_BEST_CAUSAL = ("sdpa",)
_BEST_CAUSAL_ON_HOPPER = ("sdpa_cudnn_first", "sdpa")
ALL_IMPLS = ("sdpa", "sdpa_cudnn_first", "sdpa_flash", "sdpa_cudnn", "flex", "xformers", "flash_attn", "eager")


def choose(impl: str, place: Place) -> str:
    """The kernel that runs for `attn_impl: <impl>`. Raises ConfigError if what is named cannot be had."""
    if impl == "auto":
        causal = _BEST_CAUSAL_ON_HOPPER if place.capability[0] == 9 else _BEST_CAUSAL
        best = _BEST_MASKED if place.doc_mask or place.window else causal
        return next(each for each in best if refusal(each, place) is None)
    reason = refusal(impl, place)
    if reason is None:
        return impl
    fitting = [each for each in ALL_IMPLS if refusal(each, place) is None]
    raise ConfigError(f"model.attn_impl {impl}: {reason}; here these work: {', '.join(fitting)} (or auto)")


@cache
def installed() -> frozenset[str]:
    return frozenset(name for name in ("xformers", "flash_attn") if importlib.util.find_spec(name) is not None)


def resolve_attn_impl(args: LlamaArgs, device_type: str, dtype: torch.dtype, doc_mask: bool) -> str:
    """The kernel for this model on this machine: never "auto". Raises ConfigError with the reason and what fits."""
    place = Place(
        device_type=device_type,
        capability=torch.cuda.get_device_capability() if device_type == "cuda" else (0, 0),
        dtype=dtype,
        head_dim=args.head_width,
        doc_mask=doc_mask,
        window=args.sliding_window is not None,
        installed=installed(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return choose(args.attn_impl, place)


# -- masks ---------------------------------------------------------------------------------------------------------


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether the position `key` is seen from the position `query`; both broadcast."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def build_mask(impl: str, seq_len: int, window: int | None, doc_ids: Tensor | None, device: torch.device) -> Mask:
    """The mask of a pass over whole rows; doc_ids (B, S): equal numbers may see each other."""
    if doc_ids is None and (window is None or window >= seq_len or impl in ("xformers", "flash_attn")):
        return None  # a plain causal pass, or a kernel that knows windows itself
    if impl == "flex":
        return _block_mask(seq_len, window, doc_ids, device)
    positions = torch.arange(seq_len, device=device)
    seen = visible(positions[:, None], positions, window)  # (S, S)
    if doc_ids is None:
        return seen[None, None]
    return (seen & (doc_ids[:, :, None] == doc_ids[:, None, :]))[:, None]  # (B, 1, S, S)


def _block_mask(seq_len: int, window: int | None, doc_ids: Tensor | None, device: torch.device) -> Mask:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        causal = visible(q, k, window)
        return causal if doc_ids is None else causal & (doc_ids[b, q] == doc_ids[b, k])

    rows = None if doc_ids is None else len(doc_ids)
    return create_block_mask(seen, rows, None, seq_len, seq_len, device=str(device))


# -- kernels -------------------------------------------------------------------------------------------------------


def attend(impl: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None) -> Tensor:
    """q (B, S, H, E), k and v (B, T, K, E) -> (B, S, H, E)."""
    if window is not None and mask is None and window >= q.shape[1]:
        window = None
    return _KERNELS[impl](q, k, v, mask, window)


def _for_each_head(k: Tensor, n_heads: int) -> Tensor:
    """(B, K, T, E) -> (B, H, T, E): each key/value head serves H / K neighbouring query heads."""
    return k if k.shape[1] == n_heads else k.repeat_interleave(n_heads // k.shape[1], dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, heads, positions, E)
    grouped = k.shape[1] != q.shape[1]
    # Only the plain causal kernels of CUDA share key heads; with a mask, enable_gqa would mean the slow fallback.
    shared = grouped and mask is None and q.device.type == "cuda"
    if grouped and not shared:
        k, v = _for_each_head(k, q.shape[1]), _for_each_head(v, q.shape[1])
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
    return out.transpose(1, 2)


def _sdpa_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(q, k, v, mask, window)


_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _sdpa_cudnn_first(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None) -> Tensor:
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):  # an order, no restriction: what cuDNN cannot do, others do
        return _sdpa(q, k, v, mask, window)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    k, v = _for_each_head(k, q.shape[1]), _for_each_head(v, q.shape[1])
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, H, S, T)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # pyright: ignore[reportReturnType]


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if mask is None:
        mask = _block_mask(q.shape[2], None, None, q.device)
    out = _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None) -> Tensor:
    from xformers.ops import fmha

    bias = fmha.attn_bias.LowerTriangularMask() if window is None else _local_bias(window)
    k, v = (_for_each_head(each.transpose(1, 2), q.shape[2]).transpose(1, 2) for each in (k, v))
    return fmha.memory_efficient_attention(q, k, v, attn_bias=bias)


def _local_bias(window: int) -> Any:
    from xformers.ops import fmha

    return fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=window - 1, window_right=0)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    reach = (-1, -1) if window is None else (window - 1, 0)
    repeatable = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(q, k, v, causal=True, window_size=reach, deterministic=repeatable)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask, int | None], Tensor]] = {
    "sdpa": _sdpa,
    "sdpa_cudnn_first": _sdpa_cudnn_first,
    "sdpa_flash": partial(_sdpa_by, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa_by, SDPBackend.CUDNN_ATTENTION),
    "flex": _flex,
    "xformers": _xformers,
    "flash_attn": _flash_attn,
    "eager": _eager,
}
