"""How likely a model finds each of many given answers: what the tasks of the harness ask.

A token's score depends only on the tokens before it in its row, not on the other rows, the batch size or the number
of ranks (in fp32 up to 1e-6 of a sum; in bf16, kernels round differently for each batch shape). Sums are fp64.
There is one forward pass per distinct input, and logits exist for the scored positions only, a chunk at a time. Rows
that differ only in their last token, such as the answers A, B, C, D, are one input.

Letters: B rows, S positions, D model width, V vocabulary, N scored tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lingua.data.held_out import ScoredRow
from lingua.model.generate import group

CHUNK_TOKENS = 4096  # positions whose logits exist at once


class Score(NamedTuple):
    """Of a row's scored tokens."""

    nats: float
    """-log p, summed."""
    n_tokens: int
    is_greedy: bool
    """Each of them is the likeliest."""


class _Head:
    """Takes the place of a loss: scores chosen positions of the last hidden states."""

    def __init__(self, rows: Tensor, positions: Tensor, targets: Tensor) -> None:
        self._rows, self._positions, self._targets = rows, positions, targets  # (N,) each

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden (B, S, D), weight (V, D) -> (nats (N,) fp64, whether the likeliest (N,))."""
        nats, greedy = [], []
        for start in range(0, len(self._targets), CHUNK_TOKENS):
            here = slice(start, start + CHUNK_TOKENS)
            targets = self._targets[here]
            x = hidden[self._rows[here], self._positions[here]].to(weight.dtype)  # (n, D)
            logits = (x @ weight.t())[:, :vocab_size].float()  # (n, V)
            of_target = logits.gather(1, targets[:, None]).squeeze(1)
            nats.append((torch.logsumexp(logits, 1) - of_target).double())
            greedy.append(logits.argmax(1) == targets)
        return torch.cat(nats), torch.cat(greedy)


class Scorer:
    """Scores rows with a model as it is. `beat` is called before each batch."""

    def __init__(self, model: nn.Module, max_tokens: int, beat: Callable[[], None] = lambda: None) -> None:
        """`max_tokens` of one batch, padding included; a row that is longer is a batch by itself."""
        self.model = model
        self.context: int = model.args.max_seqlen  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        self.beat = beat
        self._max_tokens = max_tokens

    @torch.no_grad()
    def score(self, rows: Sequence[ScoredRow]) -> list[Score]:
        """Return one score per row, in order. Raises ValueError for a row that is longer than the model's context."""
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
        head = _Head(rows.to(device), positions.to(device), targets.to(device))
        nats, greedy = self.model(tokens, labels=tokens, loss=head)
        parts = zip(flat, nats.cpu().split(counts), greedy.cpu().split(counts), strict=True)
        return [(number, Score(n.sum().item(), len(n), bool(g.all()))) for (_, number, _), n, g in parts]
