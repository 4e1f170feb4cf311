import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lingua.config.keys.model import CrossEntropyArgs
from lingua.model.loss import IGNORE, CrossEntropy

N_ROWS, SEQ_LEN, DIM, VOCAB = 2, 9, 8, 21


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N_ROWS, SEQ_LEN, DIM, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (N_ROWS, SEQ_LEN), generator=generator)
    labels[0, :3] = IGNORE
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    logits = functional.linear(hidden, weight).float().flatten(0, 1)
    loss = functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    return loss + z_loss * torch.logsumexp(logits, -1)[labels.flatten() != IGNORE].square().sum()


def value_and_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, leaves)]


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 18, 1000])
def test_value_and_gradients_equal_plain_cross_entropy(chunk_tokens: int, z_loss: float) -> None:
    hidden, weight, labels = inputs()
    loss, n_tokens = CrossEntropy(CrossEntropyArgs(chunk_tokens=chunk_tokens, z_loss=z_loss))(hidden, weight, labels)
    assert (loss.dtype, n_tokens.item()) == (torch.float32, N_ROWS * SEQ_LEN - 3)
    expected = value_and_gradients(reference(hidden, weight, labels, z_loss), hidden, weight)
    for ours, theirs in zip(value_and_gradients(loss, hidden, weight), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler meets its own old parts
@pytest.mark.parametrize(("dtype", "z_loss"), [(torch.bfloat16, 0.01)])
def test_compiled_it_is_the_same(dtype: torch.dtype, z_loss: float) -> None:
    hidden, weight, labels = inputs(dtype)
    args = CrossEntropyArgs(chunk_tokens=9, z_loss=z_loss)
    plain, compiled = CrossEntropy(args), CrossEntropy(args)
    compiled.compile()
    expected = value_and_gradients(plain(hidden, weight, labels)[0], hidden, weight)
    found = value_and_gradients(compiled(hidden, weight, labels)[0], hidden, weight)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradient_agrees_with_finite_differences() -> None:
    hidden, weight, labels = inputs()
    loss = CrossEntropy(CrossEntropyArgs(chunk_tokens=5, z_loss=0.1))
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / weight.numel() ** 0.5
    (gradient,) = torch.autograd.grad(loss(hidden, weight, labels)[0], weight)
    step = 1e-2
    with torch.no_grad():
        up, down = (loss(hidden, weight + sign * step * direction, labels)[0] for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-3)


def test_ignored_positions_count_for_nothing() -> None:
    hidden, weight, labels = inputs()
    loss, n_tokens = CrossEntropy(CrossEntropyArgs(z_loss=0.1))(hidden, weight, torch.full_like(labels, IGNORE))
    assert (loss.item(), n_tokens.item()) == (0.0, 0)
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        loss, _ = CrossEntropy(CrossEntropyArgs())(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, labels, 0.0))


def test_a_second_backward_is_refused() -> None:
    hidden, weight, labels = inputs()
    loss, _ = CrossEntropy(CrossEntropyArgs())(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_label_that_is_no_word_is_an_error() -> None:
    hidden, weight, labels = inputs()
    labels[1, 2] = VOCAB
    with pytest.raises(RuntimeError, match="out of bounds"):
        CrossEntropy(CrossEntropyArgs())(hidden, weight, labels)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_products_keep_an_fp32_sum(autocast: bool) -> None:
    hidden, weight, labels = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, _ = CrossEntropy(CrossEntropyArgs(chunk_tokens=4))(hidden, weight, labels)
    assert loss.dtype == torch.float32
    for ours, theirs, leaf in zip(
        value_and_gradients(loss, hidden, weight),
        value_and_gradients(reference(hidden, weight, labels, 0.0), hidden, weight),
        (loss, hidden, weight),
        strict=True,
    ):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.3)


def test_in_fp16_many_positions_of_one_label_do_not_overflow_the_heads_gradient():
    """4096 positions that all miss the same label sum to more than fp16 holds, whatever the loss is scaled by."""
    hidden = torch.full((1, 4096, 4), 30.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 4, dtype=torch.float32, requires_grad=True)
    loss = CrossEntropy(CrossEntropyArgs(chunk_tokens=4096))
    with torch.autocast("cpu", dtype=torch.float16):
        loss_sum, n_tokens = loss(hidden, weight, torch.full((1, 4096), 3))
    (loss_sum / n_tokens).backward()
    assert weight.grad is not None
    expected = torch.full((8, 4), 30 / 8)  # (p - 1 at the label) * hidden, p = 1/8
    expected[3] -= 30
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=0)
