"""Exact attention for packed sequences on the CPU, in the place of kernels that need a GPU.

What calls it is the real thing where that is installed: torch's and xformers' own functions, with their checks, their
autograd formulas and what they tell torch.compile; only the operator at their bottom is exchanged, for the CPU.

Letters: T positions of all sequences, H heads, K key/value heads, E head width, N sequences.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lingua.model.attention import RowDocuments, document_bounds

CALLS: list[dict[str, Any]] = []
"""What the stand-in operators were told, newest last."""

BOTH_WAYS = -2
"""In the place of the number of positions seen before the own: those after it are seen, too."""

Piece = tuple[slice, Tensor, Tensor, Tensor]


def row_documents(doc_ids: np.ndarray | Sequence[Sequence[int]], device: str = "cpu") -> RowDocuments:
    """Of document numbers (B, S), as a trainer makes them."""
    numbers = np.asarray(doc_ids, dtype=np.int32)
    return RowDocuments(torch.from_numpy(numbers).to(device), torch.from_numpy(document_bounds(numbers)).to(device))


def _pieces(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, left: int) -> Iterator[Piece]:
    """(positions, weights (H, S, S), keys and values (H, S, E)) of each sequence. left: positions seen before the own;
    below 0: all."""
    group = q.shape[1] // k.shape[1]
    assert bounds.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == len(q) == len(k) == len(v)
    for begin, end in pairwise(bounds.tolist()):
        here = slice(begin, end)
        keys, values = (each[here].repeat_interleave(group, dim=1).transpose(0, 1) for each in (k, v))
        seen = torch.ones(end - begin, end - begin, dtype=torch.bool)
        seen = seen if left == BOTH_WAYS else seen.tril()
        if left >= 0:
            seen = seen.triu(-left)
        scores = q[here].transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
        yield here, scores.masked_fill(~seen, float("-inf")).softmax(-1), keys, values


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, left: int) -> Tensor:
    """q (T, H, E), k and v (T, K, E), bounds (N + 1,) -> (T, H, E)."""
    out = torch.empty_like(q)
    for here, weights, _, values in _pieces(q, k, v, bounds, left):
        out[here] = (weights @ values).transpose(0, 1)
    return out


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, left: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for here, weights, keys, values in _pieces(q, k, v, bounds, left):
        upstream = grad[here].transpose(0, 1)  # (H, S, E)
        d_weights = upstream @ values.transpose(1, 2)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        queries = q[here].transpose(0, 1)
        dq[here] = (d_scores @ keys).transpose(0, 1)
        for gradient, of_heads in ((dk, d_scores.transpose(1, 2) @ queries), (dv, weights.transpose(1, 2) @ upstream)):
            gradient[here] = of_heads.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
    return dq, dk, dv


def _left(causal: bool, window_size: Sequence[int]) -> int:
    return window_size[0] if causal or window_size[1] == 0 else BOTH_WAYS


def _lse(q: Tensor) -> Tensor:
    return q.new_zeros(q.shape[1], len(q), dtype=torch.float32)


@cache
def give_varlen_a_cpu() -> None:
    """Have torch's varlen_attn run on the CPU, in this process, for good."""
    from torch.nn.attention import varlen

    def run(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=(-1, -1), **_
    ):
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k >= cu_seq_q.diff().max()
        CALLS.append({"varlen": len(cu_seq_q) - 1})
        out = forward(query, key, value, cu_seq_q, _left(is_causal, window_size))
        return out, _lse(query), torch.zeros(2, dtype=torch.uint64)

    def run_back(
        grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state, scale=None,
        window_size=(-1, -1), **_,
    ):  # fmt: skip
        return backward(grad_out, query, key, value, cu_seq_q, _left(is_causal, window_size))

    varlen._varlen_attn.register_kernel("cpu")(run)
    varlen._varlen_attn_backward.register_kernel("cpu")(run_back)


def give_xformers_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have xformers' flash operators run on the CPU; a test without xformers is skipped."""
    flash = pytest.importorskip("xformers.ops.fmha.flash")
    if not hasattr(flash, "_flash_fwd"):
        pytest.skip("xformers finds no flash kernels here")
    for operator in (flash.FwOp, flash.BwOp):
        monkeypatch.setattr(operator, "SUPPORTED_DEVICES", {"cpu"})
        monkeypatch.setattr(operator, "SUPPORTED_DTYPES", {torch.float32})
    _give_xformers_operators_a_cpu()


@cache
def _give_xformers_operators_a_cpu() -> None:
    from xformers.ops.fmha import flash

    def run(
        query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, p, softmax_scale,
        is_causal, window_left, window_right, return_softmax, block_tables,
    ):  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
        assert window_right <= 0
        out = forward(query, key, value, cu_seqlens_q, _left(is_causal, (window_left, window_right)))
        return out, _lse(query), torch.zeros(2, dtype=torch.int64)

    def run_back(
        grads_share_storage, grad, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        p, softmax_scale, is_causal, window_left, window_right, rng_state,
    ):  # fmt: skip
        return backward(grad, query, key, value, cu_seqlens_q, _left(is_causal, (window_left, window_right)))

    flash._flash_fwd.register_kernel("cpu")(run)
    flash._flash_bwd.register_kernel("cpu")(run_back)


class Exact(torch.autograd.Function):
    """forward and backward above, as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, left):
        ctx.save_for_backward(q, k, v, bounds)
        ctx.left = left
        return forward(q, k, v, bounds, left)

    @staticmethod
    def backward(ctx, *grad_outputs):
        q, k, v, bounds = ctx.saved_tensors
        return *backward(grad_outputs[0], q, k, v, bounds, ctx.left), None, None


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """With the arguments of flash_attn 2.8."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
    CALLS.append({"deterministic": deterministic, "window_size": window_size})
    return Exact.apply(q, k, v, cu_seqlens_q, _left(causal, window_size))


def install_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package flash_attn with this one function; no other that is called."""
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # pyright: ignore[reportAttributeAccessIssue]
    package.flash_attn_func = None  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
