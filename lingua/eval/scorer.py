"""Compute log-likelihoods of given answers, for the harness's tasks, and of held-out text.

A token's score depends only on the tokens before it in its row, not on other rows, the batch size or the number of
ranks (in fp32 up to 1e-6 of a sum; in bf16, kernels round differently for each batch shape). Sums are fp64. There is
one forward pass per distinct input, and logits exist only for the scored positions, one chunk at a time. Rows that
differ only in their last token, such as the answers A, B, C, D, are one input.

Letters: B rows, S positions, D model width, V vocabulary, N scored tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lingua.config.keys.model import CrossEntropyArgs, LossArgs
from lingua.data.held_out import ScoredRow, padded
from lingua.model.decoder import full_tensor
from lingua.model.generate import group
from lingua.model.loss import IGNORE, CrossEntropy
from lingua.train.validate import sum_of_losses

NO_ESTIMATE = torch.zeros(2, dtype=torch.float64)
"""Variance and samples of an exact score."""
CHUNK_TOKENS = 4096  # positions whose logits exist at once


class Score(NamedTuple):
    """Score of a row's scored tokens."""

    nats: float
    """-log p, summed."""
    n_tokens: int
    is_greedy: bool
    """Whether each of them is the likeliest token."""
    variance: float = 0.0
    """Variance of `nats`, if they are an estimate."""
    n_samples: int = 0
    """Number of passes that `nats` is estimated from. 0: it is exact."""


class Head:
    """Stands in for a loss: scores chosen positions of the last hidden states."""

    def __init__(self, rows: Tensor, positions: Tensor, targets: Tensor) -> None:
        self._rows, self._positions, self._targets = rows, positions, targets  # (N,) each

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        vocab_size: int | None = None,
        soft_cap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (nats (N,) fp64, whether the target is the likeliest, log p of the likeliest).

        From hidden (B, S, D) and weight (V, D); collective if they are split over ranks.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        hidden, weight = full_tensor(hidden), full_tensor(weight)
        for start in range(0, len(self._targets), CHUNK_TOKENS):
            here = slice(start, start + CHUNK_TOKENS)
            targets = self._targets[here]
            x = hidden[self._rows[here], self._positions[here]].to(weight.dtype)  # (n, D)
            logits = (x @ weight.t())[:, :vocab_size].float()  # (n, V)
            logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
            of_target = logits.gather(1, targets[:, None]).squeeze(1)
            log_z, (most, likeliest) = torch.logsumexp(logits, 1), logits.max(1)
            found.append(((log_z - of_target).double(), likeliest == targets, most - log_z))
        nats, greedy, surest = map(torch.cat, zip(*found, strict=True))
        return nats, greedy, surest


class Scorer:
    """Scores rows with a model, without changing it. `beat` is called before each batch."""

    def __init__(
        self,
        model: nn.Module,
        max_tokens: int,
        beat: Callable[[], None] = lambda: None,
        args: LossArgs | None = None,
    ) -> None:
        """`max_tokens`: of a batch, including padding; a longer row is a batch by itself."""
        self.model = model
        self.context: int = model.args.max_seqlen  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        self.beat = beat
        self._max_tokens = max_tokens

    def total(self, rows: Sequence[ScoredRow]) -> Tensor:
        """Return (nats, scored tokens, variance, samples) of held-out rows, summed, fp64 on the host."""
        batches = self._batches(rows)
        device = next(self.model.parameters()).device
        return torch.cat([sum_of_losses(self.model, _loss_where_scored, batches, device, self.beat).cpu(), NO_ESTIMATE])

    def _batches(self, rows: Sequence[ScoredRow]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield batches of rows of similar length."""
        for numbers in group([len(row.ids) - 1 for row in rows], 0, self._max_tokens):
            chosen = [rows[n] for n in numbers]
            yield padded(chosen, len(chosen), max(len(row.ids) for row in chosen) - 1)

    @torch.no_grad()
    def score(self, rows: Sequence[ScoredRow]) -> list[Score]:
        """Return one score per row, in order. Raises ValueError for a row longer than the model's context."""
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)  # input -> rows
        for number, row in enumerate(rows):
            if not 1 <= row.first < len(row.ids) <= self.context + 1:
                raise ValueError(f"row {number} has {len(row.ids)} tokens, scored from {row.first}; {self.context=}")
            alike[tuple(row.ids[:-1])].append(number)
        inputs, scores = list(alike), dict[int, Score]()
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in group([len(one) for one in inputs], 0, self._max_tokens):
                self.beat()
                chosen = [inputs[n] for n in batch]
                scores |= self._score_batch(chosen, [[(n, rows[n]) for n in alike[one]] for one in chosen])
        finally:
            self.model.train(was_training)
        return [scores[n] for n in range(len(rows))]

    def _score_batch(
        self, inputs: list[tuple[int, ...]], asked: list[list[tuple[int, ScoredRow]]]
    ) -> Iterable[tuple[int, Score]]:
        device = next(self.model.parameters()).device
        width = max(map(len, inputs))
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in inputs], device=device)  # (B, S)
        flat = [(b, number, row) for b, of_input in enumerate(asked) for number, row in of_input]
        counts = [len(row.ids) - row.first for _, _, row in flat]
        rows = torch.tensor([b for (b, _, _), count in zip(flat, counts, strict=True) for _ in range(count)])
        positions = torch.tensor([at for _, _, row in flat for at in range(row.first - 1, len(row.ids) - 1)])
        targets = torch.tensor([token for _, _, row in flat for token in row.ids[row.first :]])
        head = Head(rows.to(device), positions.to(device), targets.to(device))
        nats, greedy, _ = self.model(tokens, labels=tokens, loss=head)
        parts = zip(flat, nats.cpu().split(counts), greedy.cpu().split(counts), strict=True)
        return [(number, Score(n.sum().item(), len(n), bool(g.all()))) for (_, number, _), n, g in parts]


def _loss_where_scored(hidden: Tensor, weight: Tensor, labels: Tensor, **keys: Any) -> tuple[Tensor, Tensor]:
    """Return the loss as `CrossEntropy` does, but without logits for unscored positions, since windows overlap."""
    scored = labels != IGNORE  # (B, S)
    return CrossEntropy(CrossEntropyArgs())(hidden[scored], weight, labels[scored], **keys)
