"""Compute attention with the kernel that the config names, or refuse it with the reason and alternatives.

`resolve_attn_impl` decides before a model is built, and the kernel that it returns is the one that runs. All kernels
compute the same function: causal unless the model is bidirectional, limited to the last `window` positions if there is
a window, and to the same document if there are documents.

For documents, sdpa and eager need a (B, 1, S, S) boolean mask, flex a block mask; for a window a (1, 1, S, S) mask.
varlen, flash_attn and xformers get the positions at which documents begin, computed on the host: 4 bytes per document.

Letters: B rows, S query positions, T key positions, H heads, K key/value heads (K divides H), E head width.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from lingua.config.base import ConfigError
from lingua.config.keys.model import LlamaArgs

HALF = (torch.float16, torch.bfloat16)
Mask = Any
"""None: only causality, or nothing if not causal; a boolean tensor (B or 1, 1, S, T), True where visible; flex's
BlockMask; xformers' bias; or int32 (N + 1,), the starts of N sequences in the concatenated rows."""

_VARLEN_TAKES = frozenset(inspect.signature(varlen_attn).parameters)
"""torch 2.10 has `is_causal` and no window, 2.11 `window_size`, 2.12 also `enable_gqa`. The flash kernels of all three
share key heads (pytorch/torchtitan, pull request 2259)."""

# -- the decision ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelConditions:
    """Everything that the choice of a kernel depends on."""

    device_type: str
    capability: tuple[int, int]
    """CUDA compute capability; (0, 0) elsewhere."""
    dtype: torch.dtype
    head_dim: int
    doc_mask: bool
    window: bool
    installed: frozenset[str]
    """Those of xformers and flash_attn that can be imported."""
    deterministic: bool = False
    """Whether gradients must be equal from run to run."""
    varlen_windows: bool = "window_size" in _VARLEN_TAKES
    """Whether torch's varlen_attn supports sliding windows."""


def _not_cuda(here: KernelConditions, least: tuple[int, int]) -> str | None:
    if here.device_type != "cuda":
        return f"it runs on CUDA only, and the device is {here.device_type}"
    if here.capability < least:
        have, need = (".".join(map(str, version)) for version in (here.capability, least))
        return f"it needs compute capability {need}, and this GPU has {have}"
    return None


def _not_half(here: KernelConditions) -> str | None:
    return None if here.dtype in HALF else f"it computes in bf16 or fp16 only, and the model in {here.dtype}"


def _masked(here: KernelConditions) -> str | None:
    if here.doc_mask:
        return "it takes no document mask (data.doc_mask)"
    return "it takes no sliding window (model.sliding_window)" if here.window else None


def _no_window(here: KernelConditions) -> str | None:
    if here.window and not here.varlen_windows:
        return f"that of torch {torch.__version__} takes no sliding window (model.sliding_window)"
    return None


def _too_wide(here: KernelConditions, most: int) -> str | None:
    if here.head_dim > most or here.head_dim % 8:
        return f"head_dim is {here.head_dim}; it needs a multiple of 8 up to {most}"
    return None


def _varies(here: KernelConditions) -> str | None:
    """Refuse kernels whose backward sums in any order and that torch's deterministic mode cannot change.

    torch's own flash and memory-efficient kernels obey it (its notes on randomness, "CUDA SDPA"; varlen is the former),
    flash_attn takes an argument (since 2.4.1), and flex sums each gradient in one program (no atomics in its backward
    template). cuDNN's kernel refuses in torch 2.10 (check_cudnn_deterministic in sdp_utils.cpp), so flash runs instead.
    """
    return "its gradients differ from run to run (deterministic: true)" if here.deterministic else None


def _missing(here: KernelConditions, package: str) -> str | None:
    return None if package in here.installed else f"the package {package} is not installed"


def refusal(impl: str, here: KernelConditions) -> str | None:
    """Return why this kernel cannot be used here, or None if it can."""
    match impl:
        case "sdpa" | "eager":
            return None
        case "sdpa_flash":
            on_gpu = _not_cuda(here, (8, 0)) or _not_half(here) or _masked(here)
            return _masked(here) if here.device_type == "cpu" else on_gpu or _too_wide(here, 256)
        case "sdpa_cudnn_first":
            return _not_cuda(here, (9, 0)) or _not_half(here) or _masked(here) or _varies(here)
        case "sdpa_cudnn":
            unfit = _not_cuda(here, (8, 0)) or _not_half(here) or _masked(here)
            return unfit or _too_wide(here, 128) or _varies(here)
        case "flex":
            return _not_cuda(here, (7, 5))
        case "varlen":
            return _not_cuda(here, (8, 0)) or _not_half(here) or _no_window(here) or _too_wide(here, 256)
        case "xformers":
            unfit = _missing(here, "xformers") or _not_cuda(here, (8, 0)) or _not_half(here)
            return unfit or _too_wide(here, 256) or _varies(here)
        case "flash_attn":
            unfit = _missing(here, "flash_attn") or _not_cuda(here, (8, 0)) or _not_half(here)
            return unfit or _too_wide(here, 256)
    return "there is no such implementation"


# The fastest first, with and without masks. sdpa leaves the choice to torch, which prefers flash to cuDNN; on Hopper
# cuDNN's kernels are 1.7 to 2.3 times as fast in training shapes, on Ampere, Ada and Blackwell they are not
# (huggingface/transformers, pull request 48163, six GPUs). With documents flex beats varlen: 0.72 + 1.56 against
# 0.77 + 1.96 ms, forward and backward of Llama 3 8B (pytorch/torchtitan, pull request 2000).
_BEST_MASKED = ("flex", "sdpa")
_BEST_CAUSAL = ("sdpa",)
_BEST_CAUSAL_ON_HOPPER = ("sdpa_cudnn_first", "sdpa")
ALL_IMPLS = (
    "sdpa",
    "sdpa_cudnn_first",
    "sdpa_flash",
    "sdpa_cudnn",
    "flex",
    "varlen",
    "xformers",
    "flash_attn",
    "eager",
)


def choose(impl: str, here: KernelConditions) -> str:
    """Return the kernel that runs for `attn_impl: <impl>`. Raises ConfigError if a named kernel cannot run here."""
    if impl == "auto":
        causal = _BEST_CAUSAL_ON_HOPPER if here.capability[0] == 9 else _BEST_CAUSAL
        best = _BEST_MASKED if here.doc_mask or here.window else causal
        return next(each for each in best if refusal(each, here) is None)
    reason = refusal(impl, here)
    if reason is None:
        return impl
    fitting = [each for each in ALL_IMPLS if refusal(each, here) is None]
    raise ConfigError(f"model.attn_impl {impl}: {reason}; here these work: {', '.join(fitting)} (or auto)")


@cache
def installed() -> frozenset[str]:
    return frozenset(name for name in ("xformers", "flash_attn") if importlib.util.find_spec(name) is not None)


def resolve_attn_impl(args: LlamaArgs, device_type: str, dtype: torch.dtype, doc_mask: bool) -> str:
    """Return the kernel for this model on this machine, never "auto". Raises ConfigError with the reason and remedy."""
    here = KernelConditions(
        device_type=device_type,
        capability=torch.cuda.get_device_capability() if device_type == "cuda" else (0, 0),
        dtype=dtype,
        head_dim=args.head_width,
        doc_mask=doc_mask,
        window=args.sliding_window is not None,
        installed=installed(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return choose(args.attn_impl, here)


# -- documents -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class RowDocuments:
    """The documents of a batch, in both forms that kernels need.

    It is one object for the same reason as ForwardContext (lingua/model/context.py).
    """

    ids: Tensor  # (B, S) int: positions of a row with equal numbers may see each other
    bounds: Tensor  # (N + 1,) int32: starts of documents in the concatenated rows, then B S

    def row(self, number: int) -> RowDocuments:
        """Return the documents of one row. Waits for the device."""
        begin, end = number * self.ids.shape[1], (number + 1) * self.ids.shape[1]
        inside = (self.bounds >= begin) & (self.bounds <= end)
        return RowDocuments(self.ids[number : number + 1], self.bounds[inside] - begin)


def document_bounds(doc_ids: np.ndarray) -> np.ndarray:
    """Return the starts of documents in the concatenated rows, then B S: int32 (N + 1,), from document numbers (B, S).

    A document that continues in the next row starts again there.
    """
    begins = np.ones(doc_ids.shape, dtype=bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return np.append(np.flatnonzero(begins), doc_ids.size).astype(np.int32)


# -- masks ---------------------------------------------------------------------------------------------------------


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return whether position `query` sees position `key`; both broadcast."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def build_mask(
    impl: str,
    shape: tuple[int, int],
    window: int | None,
    documents: RowDocuments | None,
    device: torch.device,
    causal: bool = True,
) -> Mask:
    """Return the mask of a pass over whole rows, (B, S). Windows need causal attention."""
    n_rows, seq_len = shape
    if impl in ("varlen", "xformers", "flash_attn"):  # these apply windows themselves
        if documents is not None:
            return _diagonal_bias(documents.bounds, shape, window, causal) if impl == "xformers" else documents.bounds
        rows = torch.arange(n_rows + 1, dtype=torch.int32, device=device) * seq_len
        return rows if impl == "varlen" else None
    plain = documents is None and (window is None or window >= seq_len)
    if impl == "flex" and documents is None and causal:
        return _lasting_block_mask(seq_len, None if plain else window, device)
    if plain:
        return None
    doc_ids = None if documents is None else documents.ids
    if impl == "flex":
        return _block_mask(seq_len, window, doc_ids, device, causal)
    positions = torch.arange(seq_len, device=device)
    seen = visible(positions[:, None], positions, window)  # (S, S)
    if doc_ids is None:
        return seen[None, None]
    same = doc_ids[:, :, None] == doc_ids[:, None, :]  # (B, S, S)
    return (same & seen if causal else same)[:, None]


def _diagonal_bias(bounds: Tensor, shape: tuple[int, int], window: int | None, causal: bool) -> Any:
    """Return xformers' bias for documents.

    Its list on the host holds one sequence: the kernels read only `seqstart` and `max_seqlen`, and torch.compile, which
    specializes on every number on the host, would recompile for each batch.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    n_rows, seq_len = shape
    sequences = _SeqLenInfo(seqstart=bounds, max_seqlen=seq_len, min_seqlen=1, seqstart_py=[0, n_rows * seq_len])
    bias = BlockDiagonalMask(q_seqinfo=sequences, k_seqinfo=sequences)
    if not causal:
        return bias
    return bias.make_causal() if window is None or window >= seq_len else bias.make_local_attention(window)


@lru_cache(maxsize=8)
def _lasting_block_mask(seq_len: int, window: int | None, device: torch.device) -> Mask:
    """Return the mask of causal rows without documents, which is the same in every step."""
    with torch.inference_mode(False):  # training could not use an inference tensor
        return _block_mask(seq_len, window, None, device, causal=True)


def _block_mask(seq_len: int, window: int | None, doc_ids: Tensor | None, device: torch.device, causal: bool) -> Mask:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if doc_ids is None:
            return visible(q, k, window)
        same = doc_ids[b, q] == doc_ids[b, k]
        return same & visible(q, k, window) if causal else same

    rows = None if doc_ids is None else len(doc_ids)
    return create_block_mask(seen, rows, None, seq_len, seq_len, device=str(device))


# -- kernels -------------------------------------------------------------------------------------------------------


def attend(impl: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool = True) -> Tensor:
    """Return the attention of q (B, S, H, E) over k and v (B, T, K, E): (B, S, H, E)."""
    if window is not None and window >= q.shape[1]:
        window = None
    return _KERNELS[impl](q, k, v, mask, window, causal)


def _for_each_head(k: Tensor, n_heads: int) -> Tensor:
    """Repeat (B, K, T, E) to (B, H, T, E): each key/value head serves H / K adjacent query heads."""
    return k if k.shape[1] == n_heads else k.repeat_interleave(n_heads // k.shape[1], dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, heads, positions, E)
    grouped = k.shape[1] != q.shape[1]
    # Only CUDA's plain causal kernels share key heads; with a mask, enable_gqa would use the slow fallback.
    shared = grouped and mask is None and q.device.type == "cuda"
    if grouped and not shared:
        k, v = _for_each_head(k, q.shape[1]), _for_each_head(v, q.shape[1])
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=shared
    )
    return out.transpose(1, 2)


def _sdpa_by(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool
) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(q, k, v, mask, window, causal)


_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _sdpa_cudnn_first(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool) -> Tensor:
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):  # an order, not a restriction: others do what cuDNN cannot
        return _sdpa(q, k, v, mask, window, causal)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    k, v = _for_each_head(k, q.shape[1]), _for_each_head(v, q.shape[1])
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, H, S, T)
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # pyright: ignore[reportReturnType]


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if mask is None and causal:
        mask = _lasting_block_mask(q.shape[2], None, q.device)
    out = _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2)


def _packed(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, **how: Any) -> Tensor:
    """Call a kernel on the concatenated rows, (B S, heads, E), with the starts of the sequences.

    The row length is passed as their maximum; the actual one would be a constant for torch.compile.
    """
    longest = q.shape[1]
    out = kernel(*(each.flatten(0, 1) for each in (q, k, v)), bounds, bounds, longest, longest, **how)
    return out.unflatten(0, q.shape[:2])


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool) -> Tensor:
    how: dict[str, Any] = {"is_causal": causal}
    if "window_size" in _VARLEN_TAKES:
        how = {"window_size": (-1 if window is None else window - 1, 0 if causal else -1)}
    if "enable_gqa" in _VARLEN_TAKES:
        how["enable_gqa"] = k.shape[2] != q.shape[2]
    return _packed(varlen_attn, q, k, v, mask, **how)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool) -> Tensor:
    from xformers.ops import fmha

    if k.shape[2] != q.shape[2]:
        k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], dim=2) for each in (k, v))
    if mask is not None:
        one_row = (each.flatten(0, 1).unsqueeze(0) for each in (q, k, v))  # (1, B S, H, E)
        return fmha.memory_efficient_attention(*one_row, attn_bias=mask).view(q.shape)
    bias = _local_bias(window) if window is not None else fmha.attn_bias.LowerTriangularMask() if causal else None
    return fmha.memory_efficient_attention(q, k, v, attn_bias=bias)


def _local_bias(window: int) -> Any:
    from xformers.ops import fmha

    return fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=window - 1, window_right=0)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    how: dict[str, Any] = {
        "causal": causal,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if mask is None:
        return flash_attn_func(q, k, v, **how)
    return _packed(flash_attn_varlen_func, q, k, v, mask, **how)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask, int | None, bool], Tensor]] = {
    "sdpa": _sdpa,
    "sdpa_cudnn_first": _sdpa_cudnn_first,
    "sdpa_flash": partial(_sdpa_by, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa_by, SDPBackend.CUDNN_ATTENTION),
    "flex": _flex,
    "varlen": _varlen,
    "xformers": _xformers,
    "flash_attn": _flash_attn,
    "eager": _eager,
}
