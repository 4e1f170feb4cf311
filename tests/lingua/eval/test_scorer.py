"""Scores against a plain loop over tokens; the same for any batch size."""

from __future__ import annotations

import random

import pytest
import torch

from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.data.held_out import ScoredRow
from lingua.eval.scorer import Scorer

CONTEXT = 24


def tiny(dtype: torch.dtype = torch.float32) -> LMTransformer:
    args = LMTransformerArgs(
        dim=16, n_layers=2, n_heads=2, multiple_of=8, vocab_size=258, max_seqlen=CONTEXT, init_base_std=0.3
    )
    model = LMTransformer(args)
    model.init_weights(1)
    return model.to(dtype)


@torch.no_grad()
def plainly(model: LMTransformer, row: ScoredRow) -> tuple[float, bool]:
    """One token after the other, each with a forward pass of its own."""
    nats, greedy = 0.0, True
    for at in range(row.first, len(row.ids)):
        logits = model(torch.tensor([row.ids[:at]]))
        assert isinstance(logits, torch.Tensor)
        log_p = logits[0, -1].double().log_softmax(-1)
        nats -= log_p[row.ids[at]].item()
        greedy &= int(log_p.argmax()) == row.ids[at]
    return nats, greedy


def some_rows() -> list[ScoredRow]:
    draw = random.Random(3)
    rows = [ScoredRow([draw.randrange(256) for _ in range(n)], draw.randrange(1, n)) for n in (2, 3, 9, 17, 25, 25)]
    alternatives = [ScoredRow([*rows[3].ids[:-1], letter], 16) for letter in (65, 66, 67)]  # one input
    return [*rows, *alternatives, rows[2]]


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_scores_are_those_of_a_plain_loop(max_tokens: int) -> None:
    model, rows = tiny(), some_rows()
    model.train()
    passes: list[int] = []
    scorer = Scorer(model, max_tokens, beat=lambda: passes.append(1))
    for row, score in zip(rows, scorer.score(rows), strict=True):
        nats, greedy = plainly(model, row)
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert (score.is_greedy, score.n_tokens) == (greedy, len(row.ids) - row.first)
    assert len(passes) == {1: 6, 40: 4, 10_000: 1}[max_tokens]
    assert model.training


def test_the_likeliest_continuation_is_called_greedy() -> None:
    model, ids = tiny(), [1, 2, 3]
    for _ in range(3):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))
        assert isinstance(logits, torch.Tensor)
        ids.append(int(logits[0, -1].argmax()))
    scores = Scorer(model, 100).score([ScoredRow(ids, 3), ScoredRow([*ids[:-1], (ids[-1] + 1) % 258], 3)])
    assert [score.is_greedy for score in scores] == [True, False]


def test_nothing_in_nothing_out_and_a_row_that_is_too_long_is_refused() -> None:
    scorer = Scorer(tiny(), 100)
    assert scorer.score([]) == []
    for row in (ScoredRow([1] * (CONTEXT + 2), 1), ScoredRow([1, 2], 2), ScoredRow([1, 2], 0)):
        with pytest.raises(ValueError, match="row 0"):
            scorer.score([row])
