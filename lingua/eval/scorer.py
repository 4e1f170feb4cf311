"""How likely a model finds given tokens: the one way in which held-out text and questions with answers are scored.

Promise: a token's score depends on what stands before it in its row, and on neither the other rows, the batch size nor
the number of ranks (in fp32 up to 1e-6 of a sum; in bf16 kernels round as the shape of a batch has it). Sums are fp64.
Cost: one forward pass per distinct input, batches alike in length; logits for the scored positions only, a chunk at a
time. Rows that differ in their last token alone, such as the answers A, B, C, D, are one input.

Letters: B rows, S positions, D model width, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lingua.data.held_out import read_texts
from lingua.model.generate import group
from lingua.tokenizer import Tokenizer

CHUNK_TOKENS = 4096  # logits of so many positions at once
BLOCK_TOKENS = 1 << 20  # of held-out text in memory, and sorted by length, at once


class Row(NamedTuple):
    """Tokens of which those from `first` on (at least 1) are scored."""

    ids: Sequence[int]
    first: int


class Score(NamedTuple):
    """Of a row's scored tokens."""

    nats: float
    """-log p, summed."""
    n_tokens: int
    is_greedy: bool
    """Each of them is the likeliest."""


def windows(n_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first): rows of at most context + 1 tokens that score tokens 1 to n_tokens - 1 once each.

    What does not fit into the first row is scored in steps of `stride`, with at least context + 1 - stride before it.
    """
    assert 1 <= stride <= context
    end = min(n_tokens, context + 1)
    if n_tokens > 1:
        yield 0, end, 1
    while end < n_tokens:
        scored_from, end = end, min(n_tokens, end + stride)
        start = max(0, end - context - 1)
        yield start, end, scored_from - start


class _Head:
    """Takes the place of a loss: scores chosen positions of the last hidden states."""

    def __init__(self, rows: Tensor, positions: Tensor, targets: Tensor) -> None:
        self._rows, self._positions, self._targets = rows, positions, targets  # (N,) each

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, *, n_words: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden (B, S, D), weight (V, D) -> (nats (N,) fp64, whether the likeliest (N,))."""
        nats, greedy = [], []
        for start in range(0, len(self._targets), CHUNK_TOKENS):
            here = slice(start, start + CHUNK_TOKENS)
            targets = self._targets[here]
            x = hidden[self._rows[here], self._positions[here]].to(weight.dtype)  # (n, D)
            logits = (x @ weight.t())[:, :n_words].float()  # (n, V)
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
    def score(self, rows: Sequence[Row]) -> list[Score]:
        """One score per row, in order. Raises ValueError for a row that is longer than the model's context."""
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
        self, inputs: list[tuple[int, ...]], asked: list[list[tuple[int, Row]]]
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


# -- held-out text -------------------------------------------------------------------------------------------------


@dataclass
class Loss:
    """Of held-out text; parts of it add up."""

    nats: float = 0.0
    n_tokens: int = 0
    n_bytes: int = 0
    """UTF-8 bytes of the text."""
    n_documents: int = 0

    def metrics(self, prefix: str) -> dict[str, float]:
        """Nats per token, perplexity, bits per byte, and what they are of. Raises ValueError where there is no text."""
        if not self.n_bytes or not self.n_tokens:
            raise ValueError(f"{prefix}: there is no text to score")
        nll = self.nats / self.n_tokens
        found = {
            "nll": nll,
            "ppl": math.exp(min(nll, 700.0)),
            "bpb": self.nats / math.log(2) / self.n_bytes,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
            "n_documents": self.n_documents,
        }
        return {f"{prefix}/{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class Wording:
    """How a document becomes tokens: as in training."""

    tokenizer: Tokenizer
    add_bos: bool = True
    add_eos: bool = True

    @property
    def prefix(self) -> int | None:
        """What stands before a document's first token: the begin token, or in runs without one the end of the last."""
        tokenizer = self.tokenizer
        return tokenizer.bos_id if self.add_bos and tokenizer.bos_id is not None else tokenizer.eos_id

    def ids(self, text: str) -> list[int]:
        """The document's tokens, its prefix first; where there is none, its first token is not scored."""
        add_eos = self.add_eos and self.tokenizer.eos_id is not None
        ids = self.tokenizer.encode(text, add_bos=False, add_eos=add_eos).tolist()
        return ids if self.prefix is None else [self.prefix, *ids]


def score_documents(
    scorer: Scorer,
    file: Path,
    wording: Wording,
    *,
    text_key: str | None = None,
    max_documents: int | None = None,
    stride: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Loss:
    """The loss of a jsonl file's documents, whole, each by itself. `share`: (rank, ranks) that divide them."""
    step, total = min(stride or max(1, scorer.context // 2), scorer.context), Loss()
    rows: list[Row] = []
    n_waiting = 0

    def settle() -> None:
        scores = scorer.score(rows)
        total.nats += math.fsum(score.nats for score in scores)
        total.n_tokens += sum(score.n_tokens for score in scores)
        rows.clear()

    rank, n_ranks = share
    for number, text in enumerate(read_texts(file, text_key)):
        if number == max_documents:
            break
        if number % n_ranks != rank:
            continue
        ids = wording.ids(text)
        rows += [Row(ids[start:end], first) for start, end, first in windows(len(ids), scorer.context, step)]
        total.n_bytes += len(text.encode())
        total.n_documents += 1
        n_waiting += len(ids)
        if n_waiting >= BLOCK_TOKENS:
            settle()
            n_waiting = 0
    settle()
    return total
