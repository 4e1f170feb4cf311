"""`parquet`: the rows of the same jsonl, odd columns, bad rows, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from lingua.config.base import ConfigError
from lingua.config.keys.data import SourceArgs
from lingua.data.blocked_source import BadLines, BlockedSource, DataError, TextFields
from lingua.data.held_out import HeldOutText, held_out_file
from lingua.data.loader import build_loader
from lingua.data.parquet import ParquetSource
from lingua.data.sources import class_of_files, estimate_tokens
from tests.corpora import data_args, documents, write_parquet, write_source


def texts_of(source: BlockedSource) -> list[str]:
    return [document.text for document in source.documents()]


def test_the_same_documents_give_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    texts = documents("d", 90)
    write_source(tmp_path, "lines", texts, n_files=2)
    for n in (0, 1):
        write_parquet(tmp_path / "rows" / f"rows.chunk.{n:02d}.parquet", {"text": texts[n::2]}, row_group_size=40)
    found = []
    for path, form in (("lines", "mmap_jsonl"), ("rows", "parquet")):  # 16 blocks for each of 6 lanes: a row each
        sources = [SourceArgs.model_validate({"path": path, "name": "s", "format": form})]
        args = data_args(tmp_path, sources=sources, lanes=6)
        with build_loader(args, rows_per_step=6) as loader:
            found.append([next(loader).views.tolist() for _ in range(40)])
        assert estimate_tokens(args) == sum(len(text.encode()) + 2 for text in texts)
    assert found[0] == found[1]


@pytest.mark.parametrize(("n_lanes", "sizes"), [(1, [3] * 13 + [1, 4, 4, 4]), (4, [1] * 52), (100, [1] * 52)])
def test_row_groups_are_blocks_and_are_cut_where_lanes_need_more(
    tmp_path: Path, n_lanes: int, sizes: list[int]
) -> None:
    write_parquet(tmp_path / "s" / "a.parquet", {"text": [str(n) for n in range(40)]}, row_group_size=3)
    write_parquet(tmp_path / "s" / "b.parquet", {"text": [str(n) for n in range(40, 52)]}, row_group_size=12)
    source = ParquetSource("s", tmp_path / "s", n_lanes)
    blocks = [source.block(block) for block in range(source.n_blocks)]
    assert [end - begin for _, begin, end in blocks] == sizes
    assert texts_of(source) == [str(n) for n in range(52)]
    reader = source.reader()
    assert reader.document(source.n_blocks - 1, -1) is not None
    assert reader.document(0, 0) == ParquetSource("s", tmp_path / "s", n_lanes).reader().document(0, -1)  # and back
    source.close()


@pytest.mark.parametrize(("n_chars", "n_rows"), [(10, 256), (40_000, 26), (2 << 20, 1)])
def test_a_batch_of_long_documents_has_fewer_rows(tmp_path: Path, n_chars: int, n_rows: int) -> None:
    texts = [f"{n:04d}".ljust(n_chars, "x") for n in range(300 if n_rows > 1 else 2)]
    wide = ["y" * n_chars + str(n) for n, _ in enumerate(texts)]  # is not read, so it does not count
    write_parquet(tmp_path / "s.parquet", {"text": texts, "wide": wide}, row_group_size=300)
    source = ParquetSource("s", tmp_path / "s.parquet", 1)
    assert next(source.batches(0, 0)).num_rows == pytest.approx(n_rows, rel=0.05)
    assert texts_of(source) == texts


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_kind_of_text_column_is_decoded_and_bad_rows_are_counted(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a", None, "", "bé"], pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    write_parquet(tmp_path / "s.parquet", {"content": column, "id": [1, 2, 3, 4]})
    source = ParquetSource("s", tmp_path / "s.parquet", 1)
    assert texts_of(source) == ["a", "bé"]
    assert source.bad.counts() == {"lines": 4, "no_text": 1, "empty": 1}


def test_broken_utf8_is_a_bad_row_and_may_stop_the_run(tmp_path: Path) -> None:
    for name, kind in (("binary", pa.binary()), ("string", pa.string())):  # Arrow itself checks neither
        values = pa.array([b"a", b"\xff", b"b"], pa.binary())
        column = pa.Array.from_buffers(kind, 3, values.buffers())
        write_parquet(tmp_path / f"{name}.parquet", {"text": column})
        source = ParquetSource("s", tmp_path / f"{name}.parquet", 1)
        assert texts_of(source) == ["a", "b"]
        assert source.bad.kinds == {"not_utf8": 1}
        with pytest.raises(DataError, match=rf"{name}.parquet, row 1: no UTF-8 .*on_bad_line: skip"):
            texts_of(ParquetSource("s", tmp_path / f"{name}.parquet", 1, bad=BadLines("error")))


@pytest.mark.parametrize(
    ("columns", "text_key", "error", "message"),
    [
        ({"id": [1], "url": ["u"]}, None, ConfigError, "no column 'text' or 'content', only id, url; .*text_key"),
        ({"text": ["a"]}, "body", ConfigError, "no column 'body', only text"),
        ({"text": [[1, 2]]}, None, ConfigError, r"column 'text' holds list<.*>, not text"),
        ({"text": pa.array([], pa.string())}, None, DataError, "all files of source 's' are empty"),
        ({"text": [None, ""]}, None, DataError, "source 's' has no document with 'text' or 'content' in 2 lines"),
    ],
)
def test_files_without_text_are_refused(
    tmp_path: Path, columns: dict[str, Any], text_key: str | None, error: type[Exception], message: str
) -> None:
    write_parquet(tmp_path / "s" / "s.parquet", columns)
    with pytest.raises(error, match=message):
        ParquetSource("s", tmp_path / "s", 1, fields=TextFields(text_key)).check()


@pytest.mark.parametrize("key", ["a", "a.b"])
def test_a_column_with_a_dot_is_not_taken_for_part_of_another(tmp_path: Path, key: str) -> None:
    """pyarrow reads b of a struct a as a.b, and a.b.c where a.b is asked for."""
    whole = pa.array([{"b": 1}, {"b": 2}]) if key == "a.b" else ["x", "y"]
    columns = {"a": whole, "a.b": ["x", "y"], "a.b.c": [3, 4], "a.c": [5, 6]}
    write_parquet(tmp_path / "s.parquet", columns)
    assert texts_of(ParquetSource("s", tmp_path, 1, fields=TextFields(key))) == ["x", "y"]


def test_a_row_group_is_decoded_once_on_the_way_through_it_and_large_ones_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [str(n) for n in range(640)]
    write_parquet(tmp_path / "s" / "s.parquet", {"text": texts}, row_group_size=640)
    source = ParquetSource("s", tmp_path / "s", 4)
    begun: list[int] = []
    batches = source.batches
    monkeypatch.setattr(source, "batches", lambda file, row: (begun.append(row), batches(file, row))[1])
    assert source.n_blocks == 64
    assert texts_of(source) == texts
    assert begun == [0]
    reader = source.reader()
    assert [document.text for block in (40, 3, 5) if (document := reader.document(block, -1))] == ["400", "30", "50"]
    assert begun == [0, 0, 0]
    args = data_args(tmp_path, sources=[SourceArgs(path="s", format="parquet")], lanes=4)
    build_loader(args, rows_per_step=4).close()
    assert "source s: its row groups are so large that each row is decoded 32 times; write them with" in caplog.text


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ConfigError, match=r"twice\.parquet: two columns are called 'text'; rename one"):
        ParquetSource("s", tmp_path / "twice.parquet", 1)


def test_files_that_are_damaged_or_change_are_reported_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "s" / "s.parquet", {"text": [f"{n} " * 5000 for n in range(64)]}, 8)
    source = ParquetSource("s", tmp_path / "s", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"s\.parquet: not a whole parquet file"):
        texts_of(source)
    with pytest.raises(DataError, match=r"s\.parquet: not a whole parquet file"):
        ParquetSource("s", tmp_path / "s", 1)


def test_hidden_and_held_out_files_are_not_trained_on(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    write_parquet(tmp_path / "a.val.parquet", {"text": ["held", None, "out"]})
    (tmp_path / "._a.parquet").write_bytes(b"of another system")
    (tmp_path / "._a.jsonl.tokens").write_bytes(b"of another system")
    (tmp_path / "b.parquet").mkdir()
    assert class_of_files(tmp_path).__name__ == "ParquetSource"
    assert texts_of(ParquetSource("s", tmp_path, 1)) == ["a"]
    assert held_out_file(tmp_path) == tmp_path / "a.val.parquet"
    with HeldOutText("s", tmp_path / "a.val.parquet").open() as source:
        assert texts_of(source) == ["held", "out"]
