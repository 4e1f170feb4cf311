import base64
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingua.config.keys.data import DataArgs, TokenizerArgs
from lingua.config.keys.eval import HeldOutArgs
from lingua.data.blocked_source import Document, TextFields
from lingua.data.held_out import (
    IGNORED,
    HeldOutText,
    Wording,
    by_document,
    equal_shares,
    held_out_file,
    held_out_texts,
    packed,
    padded,
    windows,
)
from lingua.data.pack import PIECE_CHARS
from lingua.tokenizer import ByteTokenizer, build_tokenizer
from tests.corpora import FailingTokenizer


class NoBegin(ByteTokenizer):
    bos_id = None


class NoSpecial(NoBegin):
    eos_id = None


WORDING = Wording(ByteTokenizer())


def ids_of_text(text: str, wording: Wording = WORDING) -> list[int]:
    return wording.ids(Document(text, 0, 0, 0), lambda *failure: pytest.fail(str(failure)))[0]


def write(path: Path, *texts: str) -> HeldOutText:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return HeldOutText("x", path)


def test_rows_hold_whole_documents_and_score_each_token_once(tmp_path: Path):
    found = packed(write(tmp_path / "x", "abc", "defg", "h" * 50), WORDING, max_rows=4, seq_len=4)
    tokens, labels = padded(found.rows, 3, 4)
    assert tokens.tolist() == [[256, 97, 98, 99], [257, 256, 100, 101], [102, 103, 0, 0]]
    assert labels.tolist() == [[97, 98, 99, 257], [256, 100, 101, 102], [103, 257, IGNORED, IGNORED]]
    assert (found.n_bytes, found.n_documents) == (7, 2), "the third document would not fit"


@pytest.mark.parametrize(
    ("wording", "ids", "stream"),
    [
        (WORDING, [256, 97, 257], [256, 97, 257, 256, 98, 257]),
        (Wording(ByteTokenizer(), add_bos=False), [257, 97, 257], [257, 97, 257, 98, 257]),
        (Wording(ByteTokenizer(), add_eos=False), [256, 97], [256, 97, 256, 98]),
        (Wording(NoBegin()), [257, 97, 257], [257, 97, 257, 98, 257]),
        (Wording(NoSpecial()), [97], [97, 98]),
    ],
)
def test_documents_begin_and_end_as_in_training(tmp_path: Path, wording: Wording, ids: list[int], stream: list[int]):
    """Also of tokenizers that have no such tokens."""
    assert ids_of_text("a", wording) == ids
    (row,) = packed(write(tmp_path / "x", "a", "b"), wording, max_rows=1, seq_len=8).rows
    assert row.ids == stream


def test_a_first_document_that_is_too_long_is_cut(tmp_path: Path):
    found = packed(write(tmp_path / "x", "h" * 50), WORDING, max_rows=2, seq_len=8)
    assert found.n_bytes == sum(len(row.ids) - 1 for row in found.rows)
    assert 0 < found.n_bytes <= 16


@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_ranks_share_all_rows_and_take_the_same_number_of_steps(tmp_path: Path, dp_size: int, batch_size: int):
    rows = packed(write(tmp_path / "x", *["some text " * 3] * 9), WORDING, max_rows=1000, seq_len=16).rows
    shares = [list(equal_shares(rows, 16, rank, dp_size, batch_size)) for rank in range(dp_size)]
    assert len({len(share) for share in shares}) == 1
    scored = np.concatenate([labels for share in shares for _, labels in share])
    expected = padded(rows, len(rows), 16)[1]
    assert sorted(map(tuple, scored[(scored != IGNORED).any(1)])) == sorted(map(tuple, expected))


@given(st.integers(0, 70), st.integers(1, 20), st.data())
def test_windows_score_each_token_once_with_enough_before_it(n_tokens: int, context: int, data: st.DataObject):
    stride = data.draw(st.integers(1, context))
    scored = []
    for start, end, first in windows(n_tokens, context, stride):
        assert 0 <= start < end <= n_tokens
        assert end - start <= context + 1
        scored += range(start + first, end)
        assert start == 0 or first >= context + 1 - stride
    assert scored == list(range(1, n_tokens))


def test_ranks_divide_the_first_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lingua.data.held_out.BLOCK_TOKENS", 4)
    text = write(tmp_path / "x", *"abcdefg")
    for rank, documents in enumerate(("ace", "bd")):
        parts = list(by_document(text, WORDING, context=8, max_documents=5, share=(rank, 2)))
        assert [row.ids[1] for part in parts for row in part.rows] == list(documents.encode())
        assert sum(part.n_documents for part in parts) == sum(part.n_bytes for part in parts) == len(documents)


def test_a_file_without_text_is_named(tmp_path: Path):
    (tmp_path / "x.val.jsonl").write_bytes(b'not json\n{"text": ""}\n{"other": 1}\n')
    with pytest.raises(ValueError, match=r"x\.val\.jsonl: no text"):
        packed(HeldOutText("x", tmp_path / "x.val.jsonl"), WORDING, max_rows=1, seq_len=4)


def test_a_million_blanks_are_tokenized_in_pieces_as_in_training(tmp_path: Path):
    """tiktoken's split gives up on them as a whole."""
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (tmp_path / "ranks").write_text(ranks)
    tokenizer = build_tokenizer(TokenizerArgs(name="tiktoken", path=str(tmp_path / "ranks"), split="cl100k"))
    text = write(tmp_path / "x", " " * 1_000_000, "abc")
    (found,) = by_document(text, Wording(tokenizer), context=1 << 21)
    assert (found.n_bytes, found.n_documents, found.n_skipped) == (1_000_003, 2, 0)
    assert sum(len(row.ids) - row.first for row in found.rows) == 1_000_003 + 2  # and the end tokens
    assert packed(text, Wording(tokenizer), max_rows=1, seq_len=8).n_bytes == 1 + 3, "a document too long is cut"


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_text_on_which_the_tokenizer_fails_is_skipped_and_counted(tmp_path: Path, loss_on: str):
    """Of a longer document only the piece that fails is lost."""
    texts = ["a!", "ab", "x" * PIECE_CHARS + "!" * PIECE_CHARS + "z", "cd"]
    lines = [{"text": text} if loss_on == "all" else {"prompt": "?", "completion": text} for text in texts]
    (tmp_path / "x").write_bytes(b"no json\n" + b"".join(orjson.dumps(line) + b"\n" for line in lines))
    text = HeldOutText("x", tmp_path / "x", TextFields(None, loss_on))
    wording = Wording(FailingTokenizer())
    for found in (
        packed(text, wording, max_rows=3, seq_len=PIECE_CHARS),
        *by_document(text, wording, context=PIECE_CHARS),
    ):
        assert (found.n_bytes, found.n_documents, found.n_skipped) == (2 + PIECE_CHARS + 1 + 2, 3, 3)
    parts = [part for rank in range(2) for part in by_document(text, wording, context=8, share=(rank, 2))]
    assert [sum(getattr(part, name) for part in parts) for name in ("n_documents", "n_skipped")] == [3, 3]


def test_failures_without_end_do_not_end_a_run(tmp_path: Path):
    text = write(tmp_path / "x", "ab", *["!" * (2 * PIECE_CHARS)] * 2, *["!"] * 2000)
    (found,) = by_document(text, Wording(FailingTokenizer()), context=8)
    assert (found.n_bytes, found.n_documents, found.n_skipped) == (2, 1, 2004)


def test_the_held_out_file_lies_beside_the_chunks(tmp_path: Path):
    assert held_out_file(tmp_path) is None
    write(tmp_path / "x.val.jsonl", "a")
    assert held_out_file(tmp_path) == tmp_path / "x.val.jsonl"
    assert held_out_file(tmp_path / "x.val.jsonl") is None


def test_of_a_folder_with_token_files_beside_the_text_the_text_is_scored(tmp_path: Path):
    write(tmp_path / "a.jsonl", "abc")
    (tmp_path / "a.jsonl.tokens").write_bytes(b"")
    args = HeldOutArgs(use_val_from_train_src=False, root_dir=str(tmp_path.parent), sources=[tmp_path.name])
    (found,) = held_out_texts(DataArgs(), args)
    assert found.file == tmp_path / "a.jsonl"
