"""Labels of rows, and the cross-entropy of a model's predictions, computed from hidden states in chunks.

The log-softmax is in fp32 whatever the model's type. The loss returns the sum over positions and their number, so that
the caller can divide by the labels of a whole step; labels of -100 do not count. Nothing syncs the host.

Only `chunk_tokens` * V fp32 logits exist at a time. Gradients are computed in the forward pass while a chunk's logits
exist: nothing is computed twice (three matrix products per chunk), and one (V, D) fp32 gradient is held until backward.
If compiled, a chunk's logits exist only in the model's type, and are read three times instead of about ten.
Under tensor parallelism each rank has V/t of the logits. The hidden states of all positions are gathered once, their
gradients are reduce-scattered once, and ranks exchange two numbers per position.

Letters: B rows, S positions, D model width, V vocabulary, N = B*S, n positions of a chunk, t tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lingua.config.keys.model import CrossEntropyArgs, ModelArgs

IGNORE = -100
_FP16_ROOM = 64.0
"""Divisor against overflow: fp16 ends at 65504, and the head's gradient sums chunk_tokens positions in one product."""


LossOfLogits = Callable[[Tensor, Tensor, Tensor | None, int | None, float, bool], tuple[Tensor, Tensor | None]]
"""(logits, labels, weights, vocab_size, z_loss, with_grad) -> (loss sum, gradient): see `VocabShard.loss_of_logits`."""


class Question(NamedTuple):
    """Inputs and labels of a micro batch, on the host."""

    tokens: np.ndarray  # (B, S)
    labels: np.ndarray  # (B, S), or (n_labels, B, S); IGNORE for no label
    weights: np.ndarray | None = None  # (B, S) fp32: factor of each label's loss; None: 1


class Turn(NamedTuple):
    """The place of a micro batch in its run."""

    step: int
    """Number of updates before it."""
    rows: np.ndarray
    """Its row numbers, (B,)."""
    rows_per_step: int
    """G."""


Ask = Callable[[np.ndarray, ModelArgs, Turn], Question]
"""(views, the model's keys, turn) -> question. A loss may have its own method `ask`; the others use `next_tokens`."""


def next_tokens(views: np.ndarray, model: ModelArgs, turn: Turn) -> Question:
    """Ask for the `n_labels` tokens after each position. `views`: (n_views, B, S), each shifted by one token."""
    return Question(views[0], views[1] if model.n_labels == 1 else views[1 : 1 + model.n_labels])


class Loss(Protocol):
    """A loss, which a model calls with its last hidden states. The builder of a loss's Args returns one."""

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (fp32 sum over positions, number of positions) of hidden (B, S, D), weight (V, D), labels (B, S).

        With a padded vocabulary (`model.vocab_multiple_of`) also takes `vocab_size=`: later rows of the weight are not
        tokens. With `soft_cap=` c the logits are c tanh(logits / c) (Gemma 2, arXiv 2408.00118). `weights=` (B, S), the
        factors of the labels' losses, are given only to a loss whose `ask` returns them.
        Under tensor parallelism hidden is a DTensor split by positions and weight one split by vocabulary, and every
        rank of the mesh returns the same. A loss that supports this has `vocab_parallel = True` in its Args.
        """
        ...


class CrossEntropy:
    """-log p(label), plus z_loss * log(Z)**2, summed over positions."""

    def __init__(self, args: CrossEntropyArgs) -> None:
        self.z_loss = args.z_loss
        self.chunk_tokens = args.chunk_tokens
        self._loss_of_logits: LossOfLogits = VocabShard().loss_of_logits

    def compile(self, backend: Any = "inductor") -> None:
        """Compile the part between the matrix products into one or two kernels, which read the model's own type."""
        self._loss_of_logits = torch.compile(_loss_of_logits_in_one_pass, backend=backend, dynamic=False)

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        vocab_size: int | None = None,
        soft_cap: float | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        loss_of_logits = self._loss_of_logits
        if isinstance(weight, DTensor):
            hidden, weight, vocab_shard = _vocab_shard(hidden, weight)
            loss_of_logits = vocab_shard.loss_of_logits
        hidden, labels = hidden.flatten(0, -2), labels.flatten()  # (N, D), (N,)
        weights = None if weights is None else weights.flatten()
        chunk = self.chunk_tokens or max(1, len(labels))
        with_grad = torch.is_grad_enabled()
        loss_sum: Any = _ChunkedCrossEntropy.apply(
            hidden, weight, labels, weights, vocab_size, dtype, chunk, self.z_loss, with_grad,
            _capped(loss_of_logits, soft_cap),
        )  # fmt: skip
        return loss_sum, (labels != IGNORE).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (N,)
        weights: Tensor | None,  # (N,)
        vocab_size: int | None,
        dtype: torch.dtype,
        chunk_tokens: int,
        z_loss: float,
        with_grad: bool,
        loss_of_logits: LossOfLogits,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)
            loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
            hidden_grad = torch.empty_like(hidden) if with_grad else None
            weight_grad: Tensor | None = None
            for start in range(0, len(labels), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                x = hidden[rows].to(dtype)  # (n, D)
                own = None if weights is None else weights[rows]
                chunk_loss, logits_grad = loss_of_logits(x @ head.t(), labels[rows], own, vocab_size, z_loss, with_grad)
                loss_sum += chunk_loss
                if hidden_grad is not None and logits_grad is not None:
                    hidden_grad[rows] = logits_grad @ head
                    if dtype == torch.float16:
                        product = (logits_grad.t() @ (x / _FP16_ROOM)).float().mul_(_FP16_ROOM)  # (V, D)
                    else:
                        product = logits_grad.t() @ x  # (V, D)
                    weight_grad = product.float() if weight_grad is None else weight_grad.add_(product)
        if with_grad:
            ctx.weight_dtype = weight.dtype
            ctx.save_for_backward(hidden_grad, weight_grad)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place, so only once; autograd refuses a second backward, since the saved tensors have changed.
        of_hidden = hidden_grad.mul_(grad.to(hidden_grad.dtype)) if ctx.needs_input_grad[0] else None
        of_weight = weight_grad.mul_(grad).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return of_hidden, of_weight, *[None] * 8


# -- from logits to loss and gradient ------------------------------------------------------------------------------


def _capped(loss_of_logits: LossOfLogits, soft_cap: float | None) -> LossOfLogits:
    """Return a function for the loss of c tanh(logits / c), computed in fp32, with c = soft_cap."""
    if soft_cap is None:
        return loss_of_logits

    def capped(
        logits: Tensor, labels: Tensor, weights: Tensor | None, vocab_size: int | None, z_loss: float, with_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        bent = torch.tanh(logits.float() / soft_cap)  # (n, V/t)
        slope = 1 - bent.square() if with_grad else None
        loss, grad = loss_of_logits(bent.mul_(soft_cap), labels, weights, vocab_size, z_loss, with_grad)
        return loss, None if grad is None or slope is None else (grad * slope).to(logits.dtype)

    return capped


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: it has the logits from `first` on, the group's other ranks have the rest."""

    first: int = 0
    group: dist.ProcessGroup | None = None
    """None: this rank has the whole vocabulary."""

    def loss_of_logits(
        self,
        logits: Tensor,  # (n, V/t), of any type; overwritten
        labels: Tensor,  # (n,)
        weights: Tensor | None,  # (n,)
        vocab_size: int | None,
        z_loss: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss sum over the whole vocabulary (fp32) and its gradient (n, V/t, as the logits). Collective.

        Takes five passes over one fp32 copy of the logits, and computes the exponentials once.
        """
        dtype, logits = logits.dtype, logits.float()
        if vocab_size is not None:
            # exp(-inf) is 0: columns from vocab_size on do not affect the loss, and their gradients are exactly 0.
            logits[:, max(vocab_size - self.first, 0) :] = float("-inf")
        counted = labels != IGNORE
        target = torch.where(counted, labels, 0).long() - self.first  # (n,)
        # With the whole vocabulary, a label outside of it must be an error of `gather`, not another rank's label.
        is_own = counted if self.group is None else counted & (target >= 0) & (target < logits.shape[1])
        target = torch.where(is_own, target, 0).unsqueeze(1)  # (n, 1)
        top = logits.amax(dim=1)  # (n,)
        self._reduce(top, dist.ReduceOp.MAX)
        logits.sub_(top.unsqueeze(1))
        of_target = torch.where(is_own, logits.gather(1, target).squeeze(1), 0.0)
        powers = logits.exp_()
        sums = torch.stack([powers.sum(dim=1), of_target])  # (2, n)
        self._reduce(sums, dist.ReduceOp.SUM)
        z, of_target = sums  # of exp(logit - top); logit - top
        log_z = z.log() + top
        losses = z.log() - of_target + z_loss * log_z.square()
        share = counted.float() if weights is None else torch.where(counted, weights, 0.0)
        loss_sum = (torch.where(counted, losses, 0.0) * share).sum()
        if not with_grad:
            return loss_sum, None
        # d/dlogits = p * (1 + 2 z log Z) - onehot(label); uncounted rows: 0
        grad = powers.mul_((torch.where(counted, (1 + 2 * z_loss * log_z) / z, 0.0) * share).unsqueeze(1))
        grad.scatter_add_(1, target, -(is_own * share).unsqueeze(1))
        return loss_sum, grad.to(dtype)

    def _reduce(self, x: Tensor, how: dist.ReduceOp.RedOpType) -> None:
        if self.group is not None:
            dist.all_reduce(x, how, self.group)


def _loss_of_logits_in_one_pass(
    logits: Tensor, labels: Tensor, weights: Tensor | None, vocab_size: int | None, z_loss: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what `VocabShard().loss_of_logits` returns; written for torch.compile.

    It has no scattered write, which would split the pass over the logits, and no in-place operators, with which torch
    2.10 computed wrong losses (CPU, fp32).
    """
    dtype, logits = logits.dtype, logits.float()
    if vocab_size is not None:
        is_word = torch.arange(logits.shape[1], device=labels.device) < vocab_size
        logits = torch.where(is_word, logits, float("-inf"))
    counted = labels != IGNORE
    target = torch.where(counted, labels, 0).long().unsqueeze(1)  # (n, 1)
    log_z = torch.logsumexp(logits, dim=1)  # (n,)
    losses = log_z - logits.gather(1, target).squeeze(1) + z_loss * log_z.square()
    share = counted.float() if weights is None else torch.where(counted, weights, 0.0)
    loss_sum = (torch.where(counted, losses, 0.0) * share).sum()
    if not with_grad:
        return loss_sum, None
    scale = (torch.where(counted, 1 + 2 * z_loss * log_z, 0.0) * share).unsqueeze(1)  # (n, 1)
    grad = (logits - log_z.unsqueeze(1)).exp() * scale
    columns = torch.arange(logits.shape[1], device=logits.device)
    return loss_sum, (grad - share.unsqueeze(1) * (columns == target)).to(dtype)


def _vocab_shard(hidden: Tensor, weight: DTensor) -> tuple[Tensor, Tensor, VocabShard]:
    """Return (hidden states of all positions, this rank's rows of the weight, which rows those are). Collective."""
    assert isinstance(hidden, DTensor), "the head is split over ranks, but the stream is not"
    assert weight.placements == (Shard(0),), weight.placements
    mesh = weight.device_mesh
    # Each rank computes the gradient through its own rows; the sum over ranks is the gradient.
    everywhere = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    _, (first, _) = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    return everywhere, weight.to_local(), VocabShard(first, mesh.get_group())
