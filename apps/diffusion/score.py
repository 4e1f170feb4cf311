"""Estimate an upper bound of the nats of a text under a masked diffusion model, with a standard error.

    -log p(x) <= mean over l = 1 .. L, and over sets of l of the L scored tokens, of
                 L/l * sum over the set of -log p(token | all tokens not in the set)

(LLaDA, arXiv 2502.09992, equation 6.) Prompts, and the first token of a text, are never masked. Of n samples, sample j
masks exactly l tokens, with l spread evenly: (j + u)/n of the way from 1 to L, for a u of the row. This has a far lower
variance than masking each token independently (see the README). If a text has at most n sets, all of them are used.

The masking depends only on (seed, text), or (seed, prompt) if there is one, so that answers of the same length to a
question are compared with the same places masked. Batches hold rows of one length, since padding would be seen.

Letters: B rows, S positions, L scored tokens of a row, N masked positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from lingua.data.held_out import ScoredRow
from lingua.data.mix import draw
from lingua.data.pack import ids_of
from lingua.eval.scorer import Head, Score, Scorer
from lingua.train.learner import Run

from .args import MaskedDiffusionArgs
from .objective import uniform

_SALT_OFFSET, _SALT_PLACES = 111, 112


class Sample(NamedTuple):
    """A masked part of a row, and the weight of its loss in the bound."""

    hidden: np.ndarray
    weight: float


class Bound(NamedTuple):
    """The bound of a row."""

    nats: float
    variance: float
    n_samples: int
    """0: it is exact."""


def scored_places(row: ScoredRow) -> np.ndarray:
    """Return the positions of a row that are scored: those from `first` on, without prompts (~id)."""
    return np.flatnonzero(np.asarray(row.ids)[row.first :] >= 0) + row.first


def is_small(n_places: int, n_samples: int) -> bool:
    """Return whether all sets of `n_places` tokens are used."""
    return n_places < 63 and 2**n_places - 1 <= n_samples


def samples_of(row: ScoredRow, n_samples: int, seed: int) -> Iterator[Sample]:
    """Yield the maskings of a row; the losses of masked tokens, times the weights, add up to the bound."""
    places = scored_places(row)
    n = len(places)
    if is_small(n, n_samples):
        for size in range(1, n + 1):
            for chosen in itertools.combinations(places, size):
                yield Sample(np.array(chosen), 1 / (size * math.comb(n, size)))
        return
    known = row.ids[: row.first] if row.first > 1 else row.ids
    key = xxhash.xxh3_64_intdigest(np.asarray(known, np.int64).tobytes())
    offset = draw(_SALT_OFFSET, seed, key) / 2**64
    for j in range(n_samples):
        size = 1 + int((j + offset) / n_samples * n)
        order = np.argsort(uniform(n, _SALT_PLACES, seed, key, n, j), kind="stable")
        yield Sample(np.sort(places[order[:size]]), n / size / n_samples)


def bound_of(terms: Sequence[float], is_exact: bool) -> Bound:
    """Return the bound from its weighted losses, in the order of the samples.

    Sizes rise from sample to sample, so the variance is computed between adjacent samples, to exclude the effect of
    size. Since the first and the last sample have only one neighbor, their differences count twice.
    """
    if is_exact:
        return Bound(math.fsum(terms), 0.0, 0)
    squares = np.square(np.diff(np.asarray(terms, np.float64)))
    return Bound(math.fsum(terms), float(squares.sum() + squares[0] + squares[-1]) / 2, len(terms))


class Copy(NamedTuple):
    """A row with a part of it masked."""

    row: int
    """Index of the row."""
    ids: np.ndarray
    sample: Sample


def batches_of(rows: Sequence[ScoredRow], n_samples: int, seed: int, max_tokens: int) -> Iterator[list[Copy]]:
    """Yield batches of copies of rows of one length, at most `max_tokens` tokens each; those of a row are in order."""
    batch: list[Copy] = []
    for number in sorted(range(len(rows)), key=lambda n: -len(rows[n].ids)):
        ids = ids_of(np.asarray(rows[number].ids))
        for sample in samples_of(rows[number], n_samples, seed):
            if batch and (len(batch[0].ids) != len(ids) or (len(batch) + 1) * len(ids) > max_tokens):
                yield batch
                batch = []
            batch.append(Copy(number, ids, sample))
    if batch:
        yield batch


def answers(
    model: nn.Module, ids: np.ndarray, hidden: Sequence[np.ndarray], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `Head` for the masked tokens of each row of `ids` (B, S)."""
    rows = torch.from_numpy(np.repeat(np.arange(len(ids)), [len(places) for places in hidden])).to(device)
    places = torch.from_numpy(np.concatenate(hidden)).to(device)
    tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
    head = Head(rows, places, tokens[rows, places])
    tokens[rows, places] = model.args.vocab_size  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model(tokens, labels=tokens, loss=head)


@torch.no_grad()
def bounds(
    model: nn.Module,
    rows: Sequence[ScoredRow],
    seed: int,
    n_samples: int,
    max_tokens: int,
    before_batch: Callable[[], None],
    *,
    together: bool = False,
) -> list[Bound]:
    """Return the bound of each row. `together`: ranks share a model, so all must make the same number of passes."""
    device = next(model.parameters()).device
    terms: list[list[float]] = [[] for _ in rows]
    batches = batches_of(rows, n_samples, seed, max_tokens)
    for batch in _evened(list(batches), device) if together else batches:
        before_batch()
        hidden = [copy.sample.hidden for copy in batch] or [np.zeros(1, np.int64)]
        ids = np.stack([copy.ids for copy in batch]) if batch else np.zeros((1, 1), np.int64)
        nats = answers(model, ids, hidden, device)[0].cpu().split([len(places) for places in hidden])
        for copy, own in zip(batch, nats, strict=False):
            terms[copy.row].append(own.sum().item() * copy.sample.weight)
    small = [is_small(len(scored_places(row)), n_samples) for row in rows]
    return [bound_of(own, is_exact) for own, is_exact in zip(terms, small, strict=True)]


def _evened(batches: list[list[Copy]], device: torch.device) -> list[list[Copy]]:
    """Add empty batches, up to the number of the rank with the most. Collective."""
    if not dist.is_initialized():
        return batches
    most = torch.tensor(len(batches), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return [*batches, *([] for _ in range(int(most) - len(batches)))]


def total_of(rows: Sequence[ScoredRow], found: Sequence[Bound]) -> Tensor:
    """Return (nats, scored tokens, variance, samples), summed, fp64."""
    n_tokens = sum(len(scored_places(row)) for row in rows)
    nats, variance, n_samples = (math.fsum(values) for values in zip(*found, strict=True)) if found else (0.0,) * 3
    return torch.tensor([nats, n_tokens, variance, n_samples], dtype=torch.float64)


def validation_loss(run: Run, rows: Sequence[ScoredRow], before_batch: Callable[[], None]) -> Tensor:
    """Return (nats, scored tokens, variance, samples) of this rank's share of held-out rows, fp64. Collective."""
    world, args, data = run.world, run.args.loss, run.args.data
    assert isinstance(args, MaskedDiffusionArgs)
    mine, max_tokens = rows[world.dp_rank :: world.dp_size], data.batch_size * data.seq_len
    found = bounds(run.model, mine, args.seed or 0, args.validation_samples, max_tokens, before_batch, together=True)
    return total_of(mine, found).to(world.device)


class BoundScorer(Scorer):
    """Scores rows by bounds of their nats. `beat` is called before each batch."""

    def __init__(self, model: nn.Module, max_tokens: int, beat: Callable[[], None], args: MaskedDiffusionArgs) -> None:
        super().__init__(model, max_tokens, beat)
        self.args = args
        self.context -= 1  # a row includes its first token, which is given

    def total(self, rows: Sequence[ScoredRow]) -> Tensor:
        return total_of(rows, self._bounds(rows))

    def score(self, rows: Sequence[ScoredRow]) -> list[Score]:
        """Return scores like `Scorer.score`. Greedy: filling in the surest token, one by one, gives the row."""
        found = self._bounds(rows)
        return [
            Score(bound.nats, len(scored_places(row)), self._is_greedy(row), bound.variance, bound.n_samples)
            for row, bound in zip(rows, found, strict=True)
        ]

    def _bounds(self, rows: Sequence[ScoredRow]) -> list[Bound]:
        for number, row in enumerate(rows):
            if not 1 <= row.first < len(row.ids) <= self.context + 1:
                raise ValueError(f"row {number} has {len(row.ids)} tokens, scored from {row.first}; {self.context=}")
        was_training = self.model.training
        self.model.eval()
        try:
            return bounds(self.model, rows, self.args.seed or 0, self.args.samples, self._max_tokens, self.beat)
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def _is_greedy(self, row: ScoredRow) -> bool:
        ids, left = ids_of(np.asarray(row.ids))[None], scored_places(row)
        device = next(self.model.parameters()).device
        while len(left):
            self.beat()
            _, right, certainty = answers(self.model, ids, [left], device)
            surest = int(certainty.argmax())
            if not right[surest]:
                return False
            left = np.delete(left, surest)
        return True
