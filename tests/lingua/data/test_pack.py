"""Pieces, rows, windows and rows passed over, for one lane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lingua.config.keys.data import DataArgs, TokenizerArgs
from lingua.data.blocked_source import BadLines, DataError, OpenedData
from lingua.data.jsonl import JsonlSource
from lingua.data.mix import DocumentStream
from lingua.data.pack import PIECE_CHARS, Lane, contains, merged, piece_end
from lingua.tokenizer import ByteTokenizer, build_tokenizer
from tests.corpora import FailingTokenizer, assert_loader_resumes, data_args, documents, write_source

BOS, EOS = 256, 257


def opened(source: JsonlSource, **changed: Any) -> OpenedData:
    return OpenedData(DataArgs(seed=1, **changed), 1, [source], source.bad)


def make_lane(
    source: JsonlSource, seq_len: int, state: dict[str, Any] | None = None, tokenizer: Any = None, **changed: Any
) -> Lane:
    return Lane(0, opened(source, seq_len=seq_len, **changed), tokenizer or ByteTokenizer(), state)


def stream_of(source: JsonlSource, n: int, bos: bool = True, eos: bool = True) -> list[int]:
    """The first n tokens, put together by hand."""
    ids: list[int] = []
    wanted = DocumentStream(0, opened(source))
    while len(ids) < n:
        ids += [BOS] * bos + list(wanted.next().text.encode()) + [EOS] * eos
    return ids[:n]


# -- pieces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("", 0),
        ("x" * PIECE_CHARS, PIECE_CHARS),
        ("x" * (PIECE_CHARS + 1), PIECE_CHARS),
        ("x" * 200_000 + "\n" + "x" * 50_000 + " " + "x" * 50_000, 200_001),
        ("x" * 200_000 + " " + "x" * 100_000, 200_000),
        ("x\n" + " x" + "x" * 300_000, PIECE_CHARS),
    ],
)
def test_where_a_piece_ends(text: str, end: int) -> None:
    assert piece_end(text, 0) == end


@given(st.text(alphabet="x \n", max_size=50), st.integers(0, 700_000))
def test_pieces_cover_the_text_and_are_bounded(some: str, n: int) -> None:
    text = some + "y" * n + some
    at = 0
    while at < len(text):
        end = piece_end(text, at)
        assert at < end <= at + PIECE_CHARS
        at = end
    assert at == len(text)


# -- rows ----------------------------------------------------------------------------------------------------------


def test_the_worked_example(tmp_path: Path) -> None:
    source = JsonlSource("s", write_source(tmp_path, "s", ["a", "bb", "ccc", "dd", "e"], n_files=1), 1)
    source.cut_bytes(10_000)  # one block: documents in the order of the file
    lane = make_lane(source, 4, doc_mask=True)
    a, b, c = (ord(letter) for letter in "abc")
    expected = [
        ([BOS, a, EOS, BOS, b], [0, 0, 0, 1]),
        ([b, b, EOS, BOS, c], [0, 0, 0, 1]),
        ([c, c, c, EOS, BOS], [0, 0, 0, 0]),
    ]
    for tokens, doc_ids in expected:
        row = lane.next()
        assert row.tokens.tolist() == tokens
        assert row.doc_ids is not None
        assert row.doc_ids.tolist() == doc_ids


@pytest.mark.parametrize("n_views", [1, 2, 4])
@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
def test_rows_are_the_stream_cut_every_seq_len(tmp_path: Path, n_views: int, bos: bool, eos: bool) -> None:
    source = JsonlSource("s", write_source(tmp_path, "s", documents("d", 30)), 1)
    stream = stream_of(source, 2000, bos, eos)
    lane = make_lane(source, 13, n_views=n_views, add_bos=bos, add_eos=eos)
    for k in range(100):
        row = lane.next()
        assert row.tokens.tolist() == stream[13 * k : 13 * k + 13 + n_views - 1]
        assert row.number == k
        assert row.doc_ids is None


def test_long_documents_resume_within_and_between_their_pieces(tmp_path: Path) -> None:
    texts = ["first", "é\n" * 300_000, "last"]
    source = JsonlSource("s", write_source(tmp_path, "s", texts, n_files=1), 1)
    args = data_args(tmp_path, sources={"s": 1.0}, lanes=1, batch_size=1, seq_len=100_003)
    assert_loader_resumes(args, 20, tail=2, dp_rank=0, dp_size=1)
    lane = make_lane(source, 100_003)
    made = np.concatenate([lane.next().tokens[:-1] for _ in range(15)]).tolist()
    assert made == stream_of(source, len(made))


def test_state_is_small_and_holds_no_data(tmp_path: Path) -> None:
    source = JsonlSource("s", write_source(tmp_path, "s", ["x" * 100_000]), 1)
    lane = make_lane(source, 16)
    lane.next()
    assert lane.position().state() == {
        "rows": 1,
        "pick": 1,
        "source": "s",
        "tapes": {"s": [lane.position().state()["tapes"]["s"][0], 0]},
        "char": 0,
        "token": 16,
        "hash": f"{0:016x}",
        "ids": f"{0:016x}",
    }


def test_the_running_hash_tells_other_pieces_apart(tmp_path: Path) -> None:
    hashes = set()
    for name, texts in (("a", ["one", "two"]), ("b", ["one", "two"]), ("c", ["once", "two"])):
        source = JsonlSource(name, write_source(tmp_path, name, texts, n_files=1), 1)
        lane = make_lane(source, 20)
        lane.next()
        hashes.add(lane.position().state()["hash"])
    assert len(hashes) == 3


# -- window, rows passed over --------------------------------------------------------------------------------------


def test_a_window_shuffles_its_rows_and_loses_none(tmp_path: Path) -> None:
    source = JsonlSource("s", write_source(tmp_path, "s", documents("d", 30)), 1)
    plain, shuffled = (make_lane(source, 16, shuffle_window=window) for window in (0, 8))
    for _ in range(4):
        before = [plain.next().tokens.tolist() for _ in range(8)]
        after = [shuffled.next().tokens.tolist() for _ in range(8)]
        assert before != after
        assert sorted(before) == sorted(after)


def test_skipped_rows_are_left_out_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    source = JsonlSource("s", write_source(tmp_path, "s", documents("d", 30)), 1)
    plain = make_lane(source, 16)
    every = {row.number: row.tokens.tolist() for row in (plain.next() for _ in range(20))}
    skipping = make_lane(source, 16, skip_rows=[[8, 9], [2, 4], [4, 5]])
    kept = {row.number: row.tokens.tolist() for row in (skipping.next() for _ in range(14))}
    assert kept == {number: row for number, row in every.items() if number not in (2, 3, 4, 5, 8, 9)}


def test_ranges() -> None:
    ranges = merged([[5, 7], [0, 1], [6, 9], [2, 2], [20, 20]])
    assert ranges == [(0, 2), (5, 9), (20, 20)]
    assert [n for n in range(25) if contains(ranges, n)] == [0, 1, 2, 5, 6, 7, 8, 9, 20]
    assert not contains([], 3)


def test_a_long_document_has_the_tokens_of_the_uncut_text(tmp_path: Path) -> None:
    """SentencePiece puts a blank before each text, so also before each piece."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words here", "and more words there"] * 9), model_prefix=str(tmp_path / "m"),
        vocab_size=60, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = build_tokenizer(TokenizerArgs(name="sp", path=str(tmp_path / "m.model")))
    for line in ("some words here\n", "some words here "):
        text = line * (PIECE_CHARS // len(line) + 9)
        whole = tokenizer.encode(text, True, True)
        source = JsonlSource("s", write_source(tmp_path, "s", [text], n_files=1), 1)
        row = make_lane(source, len(whole), n_views=1, tokenizer=tokenizer).next()
        assert row.tokens.tolist() == whole.tolist()


# -- text that the tokenizer gives up on ---------------------------------------------------------------------------


def test_a_document_that_panics_the_tokenizer_is_a_bad_line(tmp_path: Path) -> None:
    source = JsonlSource("s", write_source(tmp_path, "s", ["ab", "c!", "de"], n_files=1), 1)
    source.cut_bytes(10_000)
    lane = make_lane(source, 8, n_views=1, tokenizer=FailingTokenizer())
    assert lane.next().tokens.tolist() == [BOS, *b"ab", EOS, BOS, *b"de", EOS]
    assert source.bad.kinds["tokenizer"] >= 1


def test_a_long_document_loses_only_the_piece_that_panics(tmp_path: Path) -> None:
    pieces = ["x" * PIECE_CHARS, "!" * PIECE_CHARS, "z"]
    source = JsonlSource("s", write_source(tmp_path, "s", ["".join(pieces)], n_files=1), 1)
    lane = make_lane(source, PIECE_CHARS + 3, n_views=1, tokenizer=FailingTokenizer())
    assert bytes(lane.next().tokens[1:-1].astype(np.uint8)) == (pieces[0] + pieces[2]).encode()
    assert source.bad.kinds == {"tokenizer": 1}


def test_a_panic_may_stop_the_run_with_the_place(tmp_path: Path) -> None:
    source = JsonlSource("s", write_source(tmp_path, "s", ["ab", "c!"], n_files=1), 1)
    source.bad = BadLines("error")
    with pytest.raises(DataError, match=r"s\.chunk\.00\.jsonl, byte 15: the tokenizer failed: stack.*on_bad_line"):
        make_lane(source, 20, n_views=1, tokenizer=FailingTokenizer()).next()
