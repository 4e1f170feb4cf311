from pathlib import Path

import numpy as np
import orjson
import pytest

from lingua.data.held_out import IGNORED, held_out_file, read_held_out


class ByteTokenizer:
    """One token per byte; begin 256, end 257."""

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]:
        return [256] * add_bos + list(text.encode()) + [257] * add_eos


def write(path: Path, *texts: str) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


def test_rows_hold_whole_documents_and_score_each_token_once(tmp_path: Path):
    file = write(tmp_path / "x.val.jsonl", "abc", "defg", "h" * 50)
    rows = read_held_out("x", file, ByteTokenizer(), max_rows=4, seq_len=4)
    assert rows.tokens.tolist() == [[256, 97, 98, 99], [257, 256, 100, 101], [102, 103, 0, 0]]
    assert rows.labels.tolist() == [[97, 98, 99, 257], [256, 100, 101, 102], [103, 257, IGNORED, IGNORED]]
    assert rows.n_bytes == 7  # the third document would not fit


def test_a_first_document_that_is_too_long_is_cut(tmp_path: Path):
    file = write(tmp_path / "x.val.jsonl", "h" * 50)
    rows = read_held_out("x", file, ByteTokenizer(), max_rows=2, seq_len=8)
    assert rows.n_bytes == int((rows.labels != IGNORED).sum())
    assert 0 < rows.n_bytes <= 16


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_ranks_share_all_rows_and_take_the_same_number_of_steps(tmp_path: Path, dp_size: int, batch_size: int):
    file = write(tmp_path / "x.val.jsonl", *("some text " * 3 for _ in range(9)))
    rows = read_held_out("x", file, ByteTokenizer(), max_rows=1000, seq_len=16)
    shares = [list(rows.share(rank, dp_size, batch_size)) for rank in range(dp_size)]
    assert len({len(share) for share in shares}) == 1
    scored = np.concatenate([labels for share in shares for _, labels in share])
    assert (scored != IGNORED).sum() == (rows.labels != IGNORED).sum()
    assert sorted(map(tuple, scored[(scored != IGNORED).any(1)])) == sorted(map(tuple, rows.labels))


def test_a_file_without_text_is_named(tmp_path: Path):
    (tmp_path / "x.val.jsonl").write_bytes(b'not json\n{"text": ""}\n{"other": 1}\n')
    with pytest.raises(ValueError, match=r"x\.val\.jsonl: no text"):
        read_held_out("x", tmp_path / "x.val.jsonl", ByteTokenizer(), max_rows=1, seq_len=4)


def test_the_held_out_file_lies_beside_the_chunks(tmp_path: Path):
    assert held_out_file(tmp_path) is None
    write(tmp_path / "x.val.jsonl", "a")
    assert held_out_file(tmp_path) == tmp_path / "x.val.jsonl"
    assert held_out_file(tmp_path / "x.val.jsonl") is None
