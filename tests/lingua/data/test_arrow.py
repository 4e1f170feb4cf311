"""`arrow`: what Hugging Face's datasets saved, its order, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from lingua.config.base import ConfigError
from lingua.data.arrow import ArrowSource
from lingua.data.blocked_source import DataError, TextFields
from lingua.data.sources import class_of_files
from tests.corpora import write_dataset
from tests.lingua.data.test_parquet import texts_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(("n_lanes", "n_files"), [(1, 1), (3, 2), (100, 2)])
def test_a_saved_data_set_gives_its_rows_in_order(tmp_path: Path, n_lanes: int, n_files: int) -> None:
    texts = [f"{n} é" for n in range(40)]
    write_dataset(tmp_path / "s", {"id": list(range(40)), "content": texts}, n_files)
    source = ArrowSource("s", tmp_path / "s", n_lanes)
    assert (texts_of(source), len(source.files), source.warning) == (texts, n_files, None)
    assert source.n_blocks == 40 if n_lanes > 2 else source.n_blocks < 40
    reader = source.reader()
    assert reader.document(source.n_blocks - 1, -1) == ArrowSource("s", tmp_path / "s", n_lanes).reader().document(
        source.n_blocks - 1, -1
    )
    assert [path.name for path in ArrowSource.side_files([file.path for file in source.files])] == ["state.json"]
    assert class_of_files(tmp_path / "s") is ArrowSource


def test_the_state_names_the_files_and_their_order(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "s", {"text": ["a", "b", "", None, "c"]}, 2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "cache-0123.arrow").write_bytes(b"of datasets.map")
    source = ArrowSource("s", folder, 1)
    assert texts_of(source) == ["a", "b", "c"]
    assert source.bad.kinds == {"empty": 1, "no_text": 1}
    (folder / "state.json").write_text(json.dumps(state | {"_data_files": state["_data_files"][::-1]}))
    assert texts_of(ArrowSource("s", folder, 1)) == ["c", "a", "b"]
    for wrong, message in (
        ({"_data_files": 3}, "does not name the files of a data set"),
        (state | {"_indices_data_files": [{"filename": "i.arrow"}]}, "an order of their own"),
    ):
        (folder / "state.json").write_text(json.dumps(wrong))
        with pytest.raises((ConfigError, DataError), match=message):
            ArrowSource("s", folder, 1)


def test_files_that_are_cut_or_hold_no_text_are_refused_and_splits_are_named(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "s", {"text": ["a"] * 20}, 1)
    path = next(folder.glob("*.arrow"))
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[: len(whole) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"\.arrow: not a whole arrow file"):
            ArrowSource("s", folder, 1)
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match="no column 'body', only text"):
        ArrowSource.check_files(folder, TextFields("body"))
    ArrowSource.check_files(folder, TextFields())
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=f"holds the splits train, test; name one: {tmp_path}/train"):
        ArrowSource.find_files(tmp_path)


def test_arrow_files_of_the_other_kind_are_read(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as file:
        file.write_table(table)
    assert texts_of(ArrowSource("s", tmp_path, 1)) == ["a", "b"]
