"""Every parallel form against a loop over positions, written from the equations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lingua.model.recurrence import causal_conv, decayed_attention, linear_scan, mlstm

B, H, N, P = 2, 4, 3, 5
LENGTHS = [1, 2, 7, 16, 33, 100]


def drawn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, dtype=dtype) * scale).requires_grad_()


def some_starts(seq_len: int) -> Tensor:
    starts = torch.rand(B, seq_len) < 0.2
    starts[:, 0] = True
    return starts


def near(found: Tensor, wanted: Tensor) -> None:
    """Ours computes in fp32, the loop in fp64: compare against the largest value."""
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max().clamp(min=1e-2)


def same_with_gradients(inputs: list[Tensor], ours: Callable[..., Tensor], loop: Callable[..., Tensor]) -> None:
    found, wanted = ours(*inputs), loop(*inputs)
    weights = torch.randn_like(wanted)
    near(found, wanted)
    for ours_grad, loop_grad in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        near(ours_grad, loop_grad)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("seq_len", LENGTHS)
def test_a_scan_is_a_loop(seq_len: int) -> None:
    def loop(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        states = []
        for t in range(seq_len):
            state = a[:, t] * state + b[:, t]
            states.append(state)
        return torch.stack(states, 1)

    same_with_gradients([drawn(B, seq_len, N), drawn(B, seq_len, N), drawn(B, N)], linear_scan, loop)


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("n_taps", [2, 4])
def test_a_convolution_sees_its_own_document_only(seq_len: int, n_taps: int) -> None:
    starts = some_starts(seq_len)

    def loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = []
        for row in range(B):
            for t in range(seq_len):
                y = bias
                for back in range(min(n_taps, t + 1)):
                    if starts[row, t - back + 1 : t + 1].any():
                        break
                    y = y + weight[:, n_taps - 1 - back] * x[row, t - back]
                rows.append(y)
        return torch.stack(rows).view(B, seq_len, -1)

    inputs = [drawn(B, seq_len, N), drawn(N, n_taps), drawn(N)]
    same_with_gradients(inputs, lambda x, weight, bias: causal_conv(x, weight, bias, starts)[0], loop)


@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("with_documents", [False, True])
def test_decayed_attention_is_a_loop(chunk: int, seq_len: int, scale: float, with_documents: bool) -> None:
    starts = some_starts(seq_len) if with_documents else None

    def loop(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        q, k = (each.repeat_interleave(H // 2, 2) for each in (q, k))  # two groups
        state, rows = q.new_zeros(B, H, N, P), []
        for t in range(seq_len):
            if starts is not None:
                state = state.masked_fill(starts[:, t, None, None, None], 0)
            state = (-rates[:, t].square()).exp()[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            rows.append(torch.einsum("bhk,bhkp->bhp", q[:, t], state))
        return torch.stack(rows, 1)

    inputs = [
        drawn(B, seq_len, 2, N),
        drawn(B, seq_len, 2, N),
        drawn(B, seq_len, H, P),
        drawn(B, seq_len, H, scale=scale),
    ]
    same_with_gradients(
        inputs, lambda q, k, v, rates: decayed_attention(q, k, v, -rates.square(), starts, None, chunk)[0], loop
    )


def mlstm_loop(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, starts: Tensor | None) -> Tensor:
    memory, normaliser, m = v.new_zeros(B, H, N, P), v.new_zeros(B, H, N), v.new_zeros(B, H)
    rows = []
    for t in range(q.shape[1]):
        if starts is not None:
            begins = starts[:, t, None]
            memory, normaliser = (x.masked_fill(begins.view(B, *[1] * (x.ndim - 1)), 0) for x in (memory, normaliser))
            m = m.masked_fill(begins, 0)
        forget = functional.logsigmoid(f[:, t])
        before, m = m, torch.maximum(forget + m, i[:, t])
        kept, taken = (forget + before - m).exp(), (i[:, t] - m).exp()
        memory = kept[..., None, None] * memory + taken[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        normaliser = kept[..., None] * normaliser + taken[..., None] * k[:, t]
        query = q[:, t] * N**-0.5
        least = torch.maximum((query * normaliser).sum(-1).abs(), (-m).exp()) + 1e-6
        rows.append(torch.einsum("bhk,bhkp->bhp", query, memory) / least[..., None])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("with_documents", [False, True])
def test_mlstm_is_a_loop(chunk: int, seq_len: int, scale: float, with_documents: bool) -> None:
    starts = some_starts(seq_len) if with_documents else None
    inputs = [drawn(B, seq_len, H, width) for width in (N, N, P)] + [
        drawn(B, seq_len, H, scale=scale) for _ in range(2)
    ]
    same_with_gradients(
        inputs,
        lambda q, k, v, i, f: mlstm(q, k, v, i, f, starts, None, chunk)[0],
        lambda q, k, v, i, f: mlstm_loop(q, k, v, i, f, starts),
    )


@pytest.mark.parametrize("cut", [1, 8, 13])
def test_a_row_may_be_computed_in_parts(cut: int) -> None:
    q, k, v = (torch.randn(B, 20, H, width) for width in (N, N, P))
    gates, forgets, rates = torch.randn(B, 20, H), torch.randn(B, 20, H), torch.rand(B, 20, H)
    whole, last = mlstm(q, k, v, gates, forgets, chunk=8)
    first, state = mlstm(q[:, :cut], k[:, :cut], v[:, :cut], gates[:, :cut], forgets[:, :cut], chunk=8)
    second, end = mlstm(q[:, cut:], k[:, cut:], v[:, cut:], gates[:, cut:], forgets[:, cut:], None, state, 8)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end[1], last[1])
    whole, last = decayed_attention(q, k, v, -rates, chunk=8)
    first, state = decayed_attention(q[:, :cut], k[:, :cut], v[:, :cut], -rates[:, :cut], chunk=8)
    second, end = decayed_attention(q[:, cut:], k[:, cut:], v[:, cut:], -rates[:, cut:], None, state, chunk=8)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-5)


def test_gates_at_their_limits_give_finite_numbers() -> None:
    """Soft caps hold gates within 15; without them, 80 is near what fp32's exp can take."""
    q, k, v = (torch.randn(B, 40, H, width) for width in (N, N, P))
    for i, f in ((80.0, 80.0), (-80.0, 80.0), (80.0, -80.0), (-80.0, -80.0)):
        out, _ = mlstm(q, k, v, torch.full((B, 40, H), i), torch.full((B, 40, H), f))
        assert bool(out.isfinite().all()), (i, f)


def test_memory_is_linear_in_the_row() -> None:
    """What backward keeps of a row four times as long is four times as much."""

    def kept_bytes(seq_len: int) -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        q, k, v = (drawn(1, seq_len, 1, width, dtype=torch.float32) for width in (N, N, P))
        gate, forget = (drawn(1, seq_len, 1, dtype=torch.float32) for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mlstm(q, k, v, gate, forget, chunk=16)
            decayed_attention(q, k, v, -gate.square(), chunk=16)
        return sum(sizes)

    assert kept_bytes(2048) < 4.2 * kept_bytes(512)
