"""`format: arrow`: a data set written by `save_to_disk` of Hugging Face's datasets, or arrow files of its cache.

A record batch (1000 rows, say) is a block, like a row group of parquet, cut into parts where lanes need more. Files are
read in the order of `state.json`. Positions in a file are row numbers.
Cost: nothing to prepare; the files are mapped into memory, and one slice of about 64 KiB per lane is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from lingua.config.base import ConfigError
from lingua.data.blocked_source import DataError, SourceFile, find_files, name_key
from lingua.data.parquet import ParquetSource, text_columns, values_per_batch
from lingua.files import json_object_in

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_PARTS = 16  # slices of parquet's batch: a slice costs little, and rows that are decoded beyond a block are wasted
_END = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowSource(ParquetSource):
    """arrow files in blocks of rows."""

    suffix = ".arrow"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._batches: list[dict[int, pa.RecordBatch]] = []  # by file: the batches by their first row
        super().__init__(*args, **kwargs)

    @classmethod
    def find_files(cls, path: Path) -> list[Path]:
        if (path / _SPLITS).is_file():
            splits = (json_object_in(path / _SPLITS) or {}).get("splits") or ["train"]
            raise ConfigError(f"{path}: holds the splits {', '.join(splits)}; name one: {path / splits[0]}")
        if not (path / _STATE).is_file():
            return find_files(path, cls.suffix, "name a folder that `save_to_disk` wrote")
        try:
            state = json_object_in(path / _STATE) or {}
            names = [one["filename"] for one in state["_data_files"]]
        except (KeyError, TypeError):
            raise DataError(f"{path / _STATE}: does not name the files of a data set; save it again") from None
        if state.get("_indices_data_files"):
            raise ConfigError(f"{path}: its rows are in an order of their own; write them out with save_to_disk")
        return [path / name for name in names]

    @classmethod
    def side_files(cls, files: Sequence[Path]) -> list[Path]:
        return [state for folder in {file.parent for file in files} if (state := folder / _STATE).is_file()]

    @classmethod
    def schema(cls, path: Path) -> pa.Schema:
        return read_batches(path)[0]

    def open_files(self, paths: Sequence[Path]) -> list[SourceFile]:
        files = []
        for path in paths:
            schema, batches = read_batches(path)
            columns, begins = text_columns(path, schema, self.fields), [0, *accumulate(b.num_rows for b in batches)]
            if begins[-1]:
                files.append(SourceFile(path, begins[-1], name_key(path.name), path.stat().st_size))
                self._groups.append(begins)
                self._columns.append(columns)
                self._batches.append(dict(zip(begins, batches, strict=False)))
        return files

    @property
    def warning(self) -> str | None:
        return None  # a slice is decoded without the rows before it

    def group_begin(self, file: int, row: int) -> int:
        return row  # a slice may begin anywhere

    def batches(self, file: int, row: int) -> Iterator[pa.RecordBatch]:
        first = super().group_begin(file, row)
        batch = self._batches[file][first].select(self._columns[file])
        n_rows = -(-values_per_batch(batch.num_rows, batch.nbytes) // _PARTS)
        return (batch.slice(begin, n_rows) for begin in range(row - first, batch.num_rows, n_rows))


def read_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Return the schema and the batches with rows of a mapped file. Raises DataError if it is damaged."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(_END)))
            if (end := file.read()) != _END and not end.endswith(b"ARROW1"):
                raise pa.ArrowInvalid("its end is missing")
        mapped = pa.memory_map(str(path))
        if end == _END:
            with pa.ipc.open_stream(mapped) as stream:
                return stream.schema, [batch for batch in stream if batch.num_rows]
        with pa.ipc.open_file(mapped) as whole:
            batches = [whole.get_batch(number) for number in range(whole.num_record_batches)]
            return whole.schema, [batch for batch in batches if batch.num_rows]
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: not a whole arrow file ({error}); copy it again or fix data.sources") from error
