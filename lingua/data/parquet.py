"""`format: parquet`: rows of parquet files, streamed from their row groups.

A row group is a block. If there are fewer than about 16 groups per lane, each is cut into parts of equal numbers of
rows, so that small data sets spread over the lanes too. Positions in a file are row numbers.
Cost: one batch of rows (about 1 MiB, at most 256 rows) per lane and source, and the pages that pyarrow decodes for it.
Beginning in the middle of a row group also decodes the rows before that point, unless the lane has just read them, so
groups of a few thousand rows are best; a start warns about much larger ones.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from lingua.config.base import ConfigError
from lingua.data.blocked_source import (
    BLOCKS_PER_LANE,
    BlockedSource,
    DataError,
    Document,
    Reader,
    SourceFile,
    TextFields,
    name_key,
)

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 20  # fewer rows where documents are long
_BUFFER_BYTES = 1 << 20
_OPEN_FILES = 64
_MANY_TIMES = 4  # decodings of a row per epoch that are worth a warning


class ParquetSource(BlockedSource):
    """parquet files in blocks of rows."""

    suffix = ".parquet"
    unit = "row"
    record = "row"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._groups: list[list[int]] = []  # by file: the row at which each group begins, and the number of rows
        self._columns: list[list[str]] = []  # by file: those that are read
        self._open: OrderedDict[int, parquet.ParquetFile] = OrderedDict()
        super().__init__(*args, **kwargs)

    @classmethod
    def check_files(cls, path: Path, fields: TextFields) -> None:
        first = cls.find_files(path)[0]
        text_columns(first, cls.schema(first), fields)
        super().check_files(path, fields)

    @classmethod
    def schema(cls, path: Path) -> pa.Schema:
        return open_parquet(path).schema_arrow

    def open_files(self, paths: Sequence[Path]) -> list[SourceFile]:
        files = []
        for path in paths:
            file = open_parquet(path)
            facts, columns = file.metadata, text_columns(path, file.schema_arrow, self.fields)
            if facts.num_rows:
                files.append(SourceFile(path, facts.num_rows, name_key(path.name), path.stat().st_size))
                rows = (facts.row_group(group).num_rows for group in range(facts.num_row_groups))
                self._groups.append([0, *accumulate(rows)])
                self._columns.append(columns)
        return files

    def cut(self, n_lanes: int) -> None:
        wanted = BLOCKS_PER_LANE * n_lanes
        self._begins: list[list[int]] = []  # by file: the row at which each block begins, and the number of rows
        for groups in self._groups:
            begins = []
            for first, end in pairwise(groups):
                n_rows = end - first
                n_parts = min(n_rows, max(1, n_rows * wanted // self.size))
                begins += [first + n_rows * part // n_parts for part in range(n_parts)]
            self._begins.append([*begins, groups[-1]])
        self.number_blocks([len(begins) - 1 for begins in self._begins])

    @property
    def warning(self) -> str | None:
        begun = sum(
            begin - groups[bisect.bisect_right(groups, begin) - 1]
            for groups, begins in zip(self._groups, self._begins, strict=True)
            for begin in begins[:-1]
        )
        if begun < _MANY_TIMES * self.size:
            return None
        return (
            f"source {self.name}: its row groups are so large that each row is decoded {1 + begun // self.size} times; "
            f"write them with row_group_size={max(1, self.size // self.n_blocks)}, or prepare the files as jsonl"
        )

    def block(self, block: int) -> tuple[int, int, int]:
        file, index = self.locate(block)
        return file, self._begins[file][index], self._begins[file][index + 1]

    def group_begin(self, file: int, row: int) -> int:
        """Return the first row of the row group that holds a row."""
        return self._groups[file][bisect.bisect_right(self._groups[file], row) - 1]

    def batches(self, file: int, row: int) -> Iterator[pa.RecordBatch]:
        """Yield the batches of the row group that begins at a row."""
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[file] = open_parquet(self.files[file].path)
        group, names = bisect.bisect_right(self._groups[file], row) - 1, self._columns[file]
        n_rows = rows_per_batch(self._open[file].metadata.row_group(group), names)
        batches = self._open[file].iter_batches(n_rows, row_groups=[group], columns=names, use_threads=False)
        return (batch.select(names) for batch in batches)  # asked for x, pyarrow also reads x.y

    def parse(self, record: dict[str, bytes | None], file: int, row: int) -> Document | None:
        """Return the document of a row, or count it as bad and return None."""
        self.bad.lines += 1
        try:
            texts = {name: value if value is None else value.decode() for name, value in record.items()}
        except UnicodeDecodeError as error:
            self.report_bad("not_utf8", file, row, f"no UTF-8 ({error})")
            return None
        return self.document_of(texts, file, row, row + 1)

    def reader(self) -> Reader:
        return ParquetReader(self)

    def close(self) -> None:
        self._open.clear()


class ParquetReader:
    """Reads forward through one block after another."""

    def __init__(self, source: ParquetSource) -> None:
        self._source = source
        self._block, self._file, self._begin, self._end = -1, 0, 0, 0
        self._group = (-1, -1)  # file, and first row of the row group, that the batches are of
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rows: list[dict[str, bytes | None]] = []
        self._first = 0  # row number of the first of these

    def document(self, block: int, offset: int) -> Document | None:
        source = self._source
        if block != self._block or 0 <= offset < self._first:
            self._file, self._begin, self._end = source.block(block)
            group = self._file, source.group_begin(self._file, self._begin)
            if group != self._group or max(offset, self._begin) < self._first:
                self._group, self._first, self._rows, self._batches = group, group[1], [], source.batches(*group)
            self._block = block
        row = max(offset, self._begin)
        while row < self._end:
            if row >= self._first + len(self._rows):
                self._read_to(row)
            document = source.parse(self._rows[row - self._first], self._file, row)
            if document is not None:
                return document
            row += 1
        self._block = -1
        return None

    def _read_to(self, row: int) -> None:
        """Read forward to the batch that holds a row."""
        self._first += len(self._rows)
        path = self._source.files[self._file].path
        try:
            while (batch := next(self._batches, None)) is not None:
                if row < self._first + batch.num_rows:
                    columns = [as_bytes(column) for column in batch.columns]
                    self._rows = [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
                    return
                self._first += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        raise DataError(f"{path}: ends at row {self._first}; it must not change during a run")


def open_parquet(path: Path) -> parquet.ParquetFile:
    """Open a file. Raises DataError if it is damaged or not a parquet file."""
    try:
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def rows_per_batch(group: Any, names: Sequence[str]) -> int:
    """Return how many rows of a row group to read at once, so that long documents take little memory."""
    columns = (group.column(number) for number in range(group.num_columns))
    n_bytes = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in names)
    return values_per_batch(group.num_rows, n_bytes)


def values_per_batch(n_rows: int, n_bytes: int) -> int:
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * n_rows // max(1, n_bytes)))


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return DataError(f"{path}: not a whole parquet file ({error}); copy it again or fix data.sources")


def text_columns(path: Path, schema: pa.Schema, fields: TextFields) -> list[str]:
    """Return the columns to read. Raises ConfigError if they are missing or hold no text."""
    found = [key for key in fields.keys if key in schema.names]
    if not found or (fields.has_prompt and len(found) < len(fields.keys)):
        raise ConfigError(f"{path}: no column {fields}, only {', '.join(schema.names)}; {fields.remedy}")
    found = found if fields.has_prompt else found[:1]
    for name in found:
        if schema.names.count(name) > 1:
            raise ConfigError(f"{path}: two columns are called {name!r}; rename one")
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(is_kind(kind) for is_kind in _TEXT_TYPES):
            raise ConfigError(f"{path}: column {name!r} holds {kind}, not text; {fields.remedy}")
    return found


_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)


def as_bytes(column: pa.Array) -> list[bytes | None]:
    """Return the values of a text column as bytes, to be decoded one by one: Arrow does not check for UTF-8."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()
