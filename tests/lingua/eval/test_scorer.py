"""Scores against a plain loop over tokens; the same for any batch size, any order and any number of ranks."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.eval.scorer import Loss, Row, Scorer, Wording, score_documents, windows
from lingua.tokenizer import ByteTokenizer
from tests.ranks import run_on_ranks

CONTEXT = 24


def tiny(dtype: torch.dtype = torch.float32) -> LMTransformer:
    args = LMTransformerArgs(
        dim=16, n_layers=2, n_heads=2, multiple_of=8, vocab_size=258, max_seqlen=CONTEXT, init_base_std=0.3
    )
    model = LMTransformer(args)
    model.init_weights(1)
    return model.to(dtype)


@given(st.integers(0, 70), st.integers(1, 20), st.data())
def test_windows_score_each_token_once_with_enough_before_it(n_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    scored = []
    for start, end, first in windows(n_tokens, context, stride):
        assert 0 <= start < end <= n_tokens
        assert end - start <= context + 1
        scored += range(start + first, end)
        assert start == 0 or first >= context + 1 - stride
    assert scored == list(range(1, n_tokens))


@torch.no_grad()
def plainly(model: LMTransformer, row: Row) -> tuple[float, bool]:
    """One token after the other, each with a forward pass of its own."""
    nats, greedy = 0.0, True
    for at in range(row.first, len(row.ids)):
        logits = model(torch.tensor([row.ids[:at]]))
        assert isinstance(logits, torch.Tensor)
        log_p = logits[0, -1].double().log_softmax(-1)
        nats -= log_p[row.ids[at]].item()
        greedy &= int(log_p.argmax()) == row.ids[at]
    return nats, greedy


def some_rows() -> list[Row]:
    draw = random.Random(3)
    rows = [Row([draw.randrange(256) for _ in range(n)], draw.randrange(1, n)) for n in (2, 3, 9, 17, 25, 25)]
    alternatives = [Row([*rows[3].ids[:-1], letter], 16) for letter in (65, 66, 67)]  # one input
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
    scores = Scorer(model, 100).score([Row(ids, 3), Row([*ids[:-1], (ids[-1] + 1) % 258], 3)])
    assert [score.is_greedy for score in scores] == [True, False]


def test_nothing_in_nothing_out_and_a_row_that_is_too_long_is_refused() -> None:
    scorer = Scorer(tiny(), 100)
    assert scorer.score([]) == []
    for row in (Row([1] * (CONTEXT + 2), 1), Row([1, 2], 2), Row([1, 2], 0)):
        with pytest.raises(ValueError, match="row 0"):
            scorer.score([row])


# -- held-out text -------------------------------------------------------------------------------------------------

WORDING = Wording(ByteTokenizer())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(5)
    texts = ["".join(draw.choice("abc é\n") for _ in range(draw.randrange(1, 70))) for _ in range(6)]
    path = tmp_path_factory.mktemp("held") / "x.val.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "no json\n{}\n")
    return path


def test_the_loss_of_whole_documents(file: Path) -> None:
    model = tiny()
    loss = score_documents(Scorer(model, 200), file, WORDING, stride=6)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()[:6]]
    nats = 0.0
    for text in texts:
        ids = WORDING.ids(text)
        assert (ids[0], ids[-1]) == (256, 257)
        nats += sum(plainly(model, Row(ids[a:b], first))[0] for a, b, first in windows(len(ids), CONTEXT, 6))
    n_bytes = sum(len(text.encode()) for text in texts)
    assert loss.nats == pytest.approx(nats, rel=1e-6)
    assert (loss.n_tokens, loss.n_bytes, loss.n_documents) == (n_bytes + 6, n_bytes, 6)
    found = loss.metrics("validation/x")
    assert found["validation/x/nll"] == loss.nats / loss.n_tokens
    assert found["validation/x/ppl"] == math.exp(loss.nats / loss.n_tokens)
    assert found["validation/x/bpb"] == loss.nats / math.log(2) / n_bytes


def test_the_same_number_on_any_batch_size_and_any_number_of_ranks(file: Path) -> None:
    model = tiny()
    expected = score_documents(Scorer(model, 1), file, WORDING)
    for max_tokens in (50, 333, 10_000):
        loss = score_documents(Scorer(model, max_tokens), file, WORDING)
        assert loss.nats == pytest.approx(expected.nats, rel=1e-6)
    for n in (2, 3):
        shares = run_on_ranks(lambda r, n=n: score_documents(Scorer(model, 77), file, WORDING, share=(r, n)), n)
        assert sum(share.nats for share in shares) == pytest.approx(expected.nats, rel=1e-6)
        for count in ("n_tokens", "n_bytes", "n_documents"):
            assert sum(getattr(share, count) for share in shares) == getattr(expected, count)


def test_more_context_is_not_worse_counted(file: Path) -> None:
    """Each token is scored once, whatever the stride; only what stands before it differs."""
    scorer = Scorer(tiny(), 500)
    losses = [score_documents(scorer, file, WORDING, stride=stride) for stride in (1, 12, None, 24, 99)]
    assert {loss.n_tokens for loss in losses} == {losses[0].n_tokens}
    assert losses[1] == losses[2]  # half of the context
    assert losses[3] == losses[4]  # all of it
    assert losses[0].nats != losses[3].nats


def test_the_first_so_many_documents(file: Path) -> None:
    scorer = Scorer(tiny(), 500)
    two = [score_documents(scorer, file, WORDING, max_documents=5, share=(rank, 2)) for rank in (0, 1)]
    assert [loss.n_documents for loss in two] == [3, 2]


class NoBegin(ByteTokenizer):
    bos_id = None


@pytest.mark.parametrize(
    ("wording", "first", "last"),
    [
        (Wording(ByteTokenizer(), add_bos=False), 257, 257),
        (Wording(ByteTokenizer(), add_eos=False), 256, ord("b")),
        (Wording(NoBegin()), 257, 257),
    ],
)
def test_documents_begin_and_end_as_in_training(wording: Wording, first: int, last: int) -> None:
    ids = wording.ids("ab")
    assert (ids[0], ids[-1]) == (first, last)


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="validation/x: there is no text to score"):
        Loss().metrics("validation/x")
