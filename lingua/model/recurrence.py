"""Recurrences over positions, computed in parallel: elementwise, with a matrix state, and short convolutions.

Every function takes rows of any length, resets its state where `starts` marks the start of a document, and returns the
state after the last position, so that a row can be computed in parts. Memory is linear in the length of a row.

Letters: B rows, S positions, C positions of a chunk, n chunks, H heads, G groups of heads, N keys and P values of a
head, D channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# -- elementwise ---------------------------------------------------------------------------------------------------


def linear_scan(a: Tensor, b: Tensor, state: Tensor | None = None) -> Tensor:
    """Return all s_t = a_t s_{t-1} + b_t, (B, S, ...).

    a, b: (B, S, ...) of one shape, a 0 where a document begins. state: (B, ...) before the first position; None is 0.
    """
    if state is not None:
        b = torch.cat((b[:, :1] + a[:, :1] * state.unsqueeze(1), b[:, 1:]), dim=1)
    found: Any = _LinearScan.apply(a, b)
    return found


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """Scan from 0 along dim 1 by halving (Blelloch 1990, "Prefix sums"): 2 S products in 2 log2 S steps."""
    n = b.shape[1]
    if n == 1:
        return b
    even = n - n % 2
    first_a, second_a = a[:, :even:2], a[:, 1:even:2]
    first_b, second_b = b[:, :even:2], b[:, 1:even:2]
    odd = _scan(second_a * first_a, second_a * first_b + second_b)  # states at 1, 3, 5, ...
    out = torch.empty_like(b)
    out[:, 0] = b[:, 0]
    out[:, 1:even:2] = odd
    out[:, 2::2] = a[:, 2::2] * odd[:, : (n - 1) // 2] + b[:, 2::2]
    return out


class _LinearScan(torch.autograd.Function):
    """The gradient of a linear scan is a linear scan from the right (Martin and Cundy, arXiv 1709.04057)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        states = _scan(a, b)
        ctx.save_for_backward(a, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        a, states = ctx.saved_tensors
        following = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), dim=1)  # a_{t+1}
        grad_b = _scan(following.flip(1), grad.flip(1)).flip(1)
        before = torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), dim=1)  # s_{t-1}
        return grad_b * before, grad_b


def causal_conv(
    x: Tensor,  # (B, S, D)
    weight: Tensor,  # (D, K), the tap of the current position last
    bias: Tensor | None = None,  # (D,)
    starts: Tensor | None = None,  # (B, S) bool
    real: Tensor | None = None,  # (B, S) bool: False where a row is padded at its end
    before: Tensor | None = None,  # (B, K - 1, D): the inputs before the first position
) -> tuple[Tensor, Tensor]:
    """Return y_t = sum_j weight_{K-1-j} x_{t-j} + bias within documents, (B, S, D), and the last K - 1 inputs."""
    n_before, seq_len = weight.shape[1] - 1, x.shape[1]
    if before is None and real is not None:
        before = x.new_zeros(len(x), n_before, x.shape[2])
    inputs = x if before is None else torch.cat((before, x), dim=1)  # (B, S or K - 1 + S, D)
    seen = None
    if starts is not None:
        document = functional.pad(starts.int().cumsum(1), (n_before, 0))
        same = [document[:, at : at + seq_len] == document[:, n_before:] for at in range(n_before)]
        seen = torch.stack(same).unsqueeze(-1)  # (K - 1, B, S, 1)
    y: Any = _CausalConv.apply(inputs, weight, seen, seq_len)
    if real is None:
        after = functional.pad(inputs[:, -n_before:], (0, 0, max(0, n_before - inputs.shape[1]), 0))
    else:
        last = real.sum(1, keepdim=True) + torch.arange(n_before, device=x.device)  # (B, K - 1)
        after = inputs.gather(1, last.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    y = y if bias is None else y + bias
    return y.type_as(x), after


def init_taps(weight: Tensor, base_std: float | None) -> None:
    """Draw the taps (D, K) of a convolution, truncated at 3 standard deviations; None: K ** -0.5, as Meta Lingua."""
    std = base_std or weight.shape[1] ** -0.5
    torch.nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


class _CausalConv(torch.autograd.Function):
    """Sum of taps in place: takes half the passes over memory that autograd would.

    inputs: (B, E + S, D), E of them before the first position: 0 or K - 1.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, seen: Tensor | None, seq_len: int) -> Tensor:
        ctx.save_for_backward(inputs, weight, seen)
        ctx.seq_len = seq_len
        y = inputs[:, -seq_len:] * weight[:, -1]
        for back in range(1, min(weight.shape[1], inputs.shape[1])):
            first, tap = _tap(back, inputs.shape[1], seq_len)
            x = inputs[:, tap] if seen is None else inputs[:, tap] * seen[-back, :, first:]
            y[:, first:].addcmul_(x, weight[:, -1 - back])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, weight, seen = ctx.saved_tensors
        grad_inputs, grad_weight = torch.zeros_like(inputs, dtype=grads[0].dtype), torch.zeros_like(weight)
        for back in range(min(weight.shape[1], inputs.shape[1])):
            first, tap = _tap(back, inputs.shape[1], ctx.seq_len)
            grad = grads[0][:, first:]
            grad = grad if seen is None or back == 0 else grad * seen[-back, :, first:]
            grad_inputs[:, tap].addcmul_(grad, weight[:, -1 - back])
            grad_weight[:, -1 - back] = (grad * inputs[:, tap]).sum((0, 1))
        return grad_inputs.type_as(inputs), grad_weight, None, None


def _tap(back: int, n_inputs: int, seq_len: int) -> tuple[int, slice]:
    """Return the first position that sees an input `back` positions earlier, and the slice of these inputs."""
    first = max(0, back - (n_inputs - seq_len))
    return first, slice(n_inputs - seq_len + first - back, n_inputs - back)


# -- matrix states -------------------------------------------------------------------------------------------------


def decayed_attention(
    q: Tensor,  # (B, S, G, N)
    k: Tensor,  # (B, S, G, N)
    v: Tensor,  # (B, S, H, P)
    log_decay: Tensor,  # (B, S, H), <= 0
    starts: Tensor | None = None,  # (B, S) bool
    state: Tensor | None = None,  # (B, H, N, P) before the first position
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return y_t = q_t S_t with S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, (B, S, H, P), and the last S, (B, H, N, P).

    Uses the chunked matrix form of state space duality (Mamba-2, arXiv 2405.21060, section 6), in fp32: attention with
    a decay mask within a chunk, a linear scan of states between chunks. The heads of a group share keys and queries.
    """
    (n_rows, seq_len, n_heads, n_values), n_groups = v.shape, q.shape[2]
    chunk, heads = min(chunk, seq_len), (n_groups, n_heads // n_groups)
    q, k = (_chunks(x.float(), chunk).unsqueeze(3) for x in (q, k))  # (B, n, G, 1, C, N)
    v = _chunks(v.float(), chunk).unflatten(2, heads)  # (B, n, G, H/G, C, P)
    total = _chunks(log_decay.float(), chunk).cumsum(-1).unflatten(2, heads)  # (B, n, G, H/G, C)
    document = _documents(starts, total, chunk)  # (B, n, 1, 1, C)
    y: Any = _DecayedProducts.apply(q, k, v, total, -total, _same(document, chunk, q.device))
    kept = _decays(total[..., -1:] - total, None if document is None else document == document[..., -1:])
    update = k.transpose(-1, -2) @ (v * kept.unsqueeze(-1))  # (B, n, G, H/G, N, P)
    reach = _decays(total, None if document is None else document == 0)  # decay of the state before the chunk
    before, last = _states(reach[..., -1].flatten(2), update.flatten(2, 3), state)
    y = y + (q @ before.unflatten(2, heads)) * reach.unsqueeze(-1)
    y = y.flatten(2, 3).transpose(2, 3).reshape(n_rows, -1, n_heads, n_values)
    return y[:, :seq_len], last


MLSTMState = tuple[Tensor, Tensor]
"""(B, H, N, P + 1): the memory with its normalizer as last column; (B, H): m, the log of its scale."""


def mlstm(
    q: Tensor,  # (B, S, H, N)
    k: Tensor,  # (B, S, H, N)
    v: Tensor,  # (B, S, H, P)
    input_gate: Tensor,  # (B, S, H), before the exponential
    forget_gate: Tensor,  # (B, S, H), before the sigmoid
    starts: Tensor | None = None,  # (B, S) bool
    state: tuple[Tensor, ...] | None = None,  # MLSTMState before the first position
    chunk: int = 64,
) -> tuple[Tensor, MLSTMState]:
    """Return the mLSTM's h, (B, S, H, P), and its state after the last position (arXiv 2503.13427, eq. 2-10; in fp32).

    With f = log sigmoid(forget_gate) and i = input_gate: m_t = max(f + m_{t-1}, i),
    C_t = exp(f + m_{t-1} - m_t) C_{t-1} + exp(i - m_t) k v^T, n_t the same with 1 in place of v,
    h = C^T q / (max(|n q|, exp(-m)) + 1e-6), q scaled by N^-1/2; C, n and m start at 0. m only keeps numbers small, so
    no gradient flows through it.
    """
    (n_rows, seq_len, n_heads, n_keys), n_values = q.shape, v.shape[-1]
    chunk = min(chunk, seq_len)
    v = torch.cat((v.float(), v.new_ones((*v.shape[:-1], 1), dtype=torch.float32)), dim=-1)
    q, k, v = (_chunks(x.float(), chunk) for x in (q.float() * n_keys**-0.5, k, v))  # (B, n, H, C, *)
    gate = _chunks(input_gate.float(), chunk, float("-inf"))  # (B, n, H, C)
    log_forget = _chunks(functional.logsigmoid(forget_gate.float()).double(), chunk)  # fp64, since sums become large
    total = log_forget.cumsum(-1)
    document = _documents(starts, total, chunk)  # (B, n, 1, C)
    seen, came = _same(document, chunk, q.device), gate - total
    with torch.no_grad():  # the largest log weight that a query sees, minus the decay up to it: (B, n, H, C)
        if document is None:
            top = came.cummax(-1).values
        else:
            top = came.float().unsqueeze(-2).masked_fill(~seen, float("-inf")).amax(-1)
    to_end, since = total[..., -1:] + came, total
    began = torch.zeros_like(total[:, :, :1], dtype=torch.bool)  # (B, n, 1, C): the document begins in this chunk
    if document is not None:
        to_end = to_end.masked_fill(document != document[..., -1:], float("-inf"))
        began = document > 0
        since = total - _at_start(total - log_forget, document)  # decay since the start of chunk or document
    memory, m = state if state is not None else (None, total.new_zeros(n_rows, n_heads))
    m_before, m_after = _scales(since[..., -1], began[..., -1], to_end.amax(-1), m.double())  # (B, n, H)
    carried = since + m_before.unsqueeze(-1).masked_fill(began, 0.0)  # (B, n, H, C)
    scale = torch.maximum(carried, total + top).detach()
    decay = _decays(since[..., -1] + m_before - m_after, ~began[..., -1])
    kept = _decays(to_end - m_after.unsqueeze(-1), None)
    update = (k * kept.unsqueeze(-1)).transpose(-1, -2) @ v  # (B, n, H, N, P + 1)
    before, last = _states(decay, update, memory)
    h: Any = _DecayedProducts.apply(q, k, v, (total - scale).float(), came.float(), seen)
    h = h + (q @ before) * _decays(carried - scale, ~began).unsqueeze(-1)
    h = h[..., :-1] / (torch.maximum(h[..., -1:].abs(), _decays(-scale, None).unsqueeze(-1)) + 1e-6)
    return h.transpose(2, 3).reshape(n_rows, -1, n_heads, n_values)[:, :seq_len], (last, m_after[:, -1].float())


def _scales(last: Tensor, began: Tensor, top: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Return m before and after each chunk, (B, n, H).

    last: (B, n, H), log decay to the end of the chunk; began: (B, n, 1), whether a document began in the chunk;
    top: (B, n, H), the largest log weight of a key at its end; m: (B, H).
    """
    scales = [m]
    with torch.no_grad():
        for at in range(last.shape[1]):
            scales.append(torch.maximum(last[:, at] + scales[-1].masked_fill(began[:, at], 0.0), top[:, at]))
    return torch.stack(scales[:-1], dim=1), torch.stack(scales[1:], dim=1)


def _states(decay: Tensor, update: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk, (B, n, H, N, P) like `update`, and the last one. decay: (B, n, H)."""
    update = update.float()  # products are half precision under autocast
    first = torch.zeros_like(update[:, 0]) if state is None else state
    found: Any = _States.apply(decay[..., None, None], update, first)
    return found


class _States(torch.autograd.Function):
    """Sequential over chunks: there are few of them, and each state is written once."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.empty_like(update)
        for at in range(update.shape[1]):
            before[:, at] = state
            state = torch.addcmul(update[:, at], decay[:, at], state)
        ctx.save_for_backward(decay, before)
        return before, state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_before, grad = grads
        decay, before = ctx.saved_tensors
        grad_update = torch.empty_like(before)
        for at in reversed(range(before.shape[1])):
            grad_update[:, at] = grad
            grad = torch.addcmul(grad_before[:, at], decay[:, at], grad)
        return (grad_update * before).sum((-1, -2), keepdim=True), grad_update, grad


class _DecayedProducts(torch.autograd.Function):
    """(q k^T * exp(rows + columns)) v over the keys that a query sees. rows: (..., C) of queries; columns: of keys.

    The gradients of rows and columns follow from y and the gradient of v, without another pass over (C, C).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, seen: Tensor) -> Tensor:
        decay = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).masked_fill_(~seen, float("-inf")).exp_()
        weight = q @ k.transpose(-1, -2) * decay  # (..., C, C)
        y = weight @ v
        ctx.save_for_backward(q, k, v, decay, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, decay, weight, y = ctx.saved_tensors
        grad = grads[0].float()  # half precision under autocast
        grad_v = weight.transpose(-1, -2) @ grad
        scores = (grad @ v.transpose(-1, -2)).mul_(decay)
        scores = scores.sum_to_size(*q.shape[:-1], k.shape[-2])  # over the heads of a group
        shares = (grad * y).sum(-1), (grad_v * v).sum(-1)
        return scores @ k, scores.transpose(-1, -2) @ q, grad_v, *shares, None


# -- chunks and documents ------------------------------------------------------------------------------------------


def _chunks(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """Cut (B, S, H, ...) into (B, n, H, C, ...), padded at the end with `fill`."""
    n_pad = -x.shape[1] % size
    if n_pad:
        x = torch.cat((x, x.new_full((x.shape[0], n_pad, *x.shape[2:]), fill)), dim=1)
    return x.unflatten(1, (-1, size)).transpose(2, 3)


def _documents(starts: Tensor | None, like: Tensor, chunk: int) -> Tensor | None:
    """Number the documents that begin in each chunk from 1, (B, n, 1, ..., C) like `like`; 0: the previous one."""
    if starts is None:
        return None
    numbers = _chunks(starts.int().unsqueeze(-1), chunk).cumsum(-1)  # (B, n, 1, C)
    return numbers.reshape(*numbers.shape[:2], *[1] * (like.ndim - 3), chunk)


def _same(document: Tensor | None, chunk: int, device: torch.device) -> Tensor:
    """Return whether a query sees a key, one that is not later and in the same document: (..., C, C)."""
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    return seen if document is None else seen & (document.unsqueeze(-1) == document.unsqueeze(-2))


def _decays(log_decay: Tensor, alive: Tensor | None) -> Tensor:
    """Return exp(log_decay) in fp32, 0 where not `alive`."""
    return (log_decay if alive is None else log_decay.masked_fill(~alive, float("-inf"))).exp().float()


def _at_start(x: Tensor, document: Tensor) -> Tensor:
    """Return x (B, n, H, C) where the position's document begins in the chunk, 0 if it began before."""
    begins = functional.pad(document[..., :-1], (1, 0)) != document  # (B, n, 1, C)
    positions = torch.arange(x.shape[-1], device=x.device)
    start = torch.where(begins, positions, 0).cummax(-1).values.expand_as(x)
    return x.gather(-1, start).masked_fill(document == 0, 0.0)
