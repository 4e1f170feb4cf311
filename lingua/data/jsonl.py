"""`format: jsonl`: lines of jsonl files, in blocks of bytes.

A line that is not a JSON object with text is skipped and counted, or stops the run, as `data.on_bad_line` says. A byte
order mark, CRLF and a missing last newline are allowed.
Cost: one descriptor per file (at most 256 open), one buffer of at most 272 KiB per lane and source, and the current
line; beyond the JSON parser about 1 us per line.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import orjson

from lingua.config.base import ConfigError
from lingua.data.blocked_source import CHECK_PATH, BlockedSource, DataError, Document, Reader, find_files
from lingua.files import naming

_READ_BYTES = 256 << 10
_SLACK_BYTES = 16 << 10  # beyond the block, where its last line usually ends
_LONG_READ_BYTES = 8 << 20  # in lines that do not end
_OPEN_FILES = 256
_BOM = b"\xef\xbb\xbf"


class JsonlSource(BlockedSource):
    """jsonl files in blocks of bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        super().__init__(*args, **kwargs)

    @classmethod
    def find_files(cls, path: Path) -> list[Path]:
        every = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
        for name in sorted(every):
            plain, _, packing = name.rpartition(".")
            is_hidden = name.startswith(".")
            if packing in ("gz", "zst") and plain.endswith(".jsonl") and plain not in every and not is_hidden:
                file = path / name if path.is_dir() else path
                raise ConfigError(
                    f"{file}: a compressed file cannot be resumed in the middle; unpack it once: "
                    f"`{'gunzip -k' if packing == 'gz' else 'zstd -d'} {file}` "
                    "(setup/download_prepare_hf_data.py does so by itself)"
                )
        holds_parquet = any(name.endswith(".parquet") for name in every)
        remedy = "it holds parquet files: set `format: parquet` in data.sources" if holds_parquet else CHECK_PATH
        return find_files(path, cls.suffix, remedy)

    @property
    def n_open(self) -> int:
        """Number of open descriptors."""
        return len(self._descriptors)

    def pread(self, file: int, n_bytes: int, offset: int) -> bytes:
        """Read at least one byte. Raises DataError if the file has become shorter."""
        path, size, *_ = self.files[file]
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = self._descriptors[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with naming(path):
            data = os.pread(descriptor, n_bytes, offset)
        if not data:
            raise DataError(f"{path}: ends at byte {offset}, had {size} bytes before; it must not change during a run")
        return data

    def parse(self, line: bytes, file: int, start: int, end: int) -> Document | None:
        """Return the document of a line, or count it as bad and return None."""
        self.bad.lines += 1
        if start == 0 and line.startswith(_BOM):
            line = line[len(_BOM) :]
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            kind, detail = ("not_json", f"no JSON ({error})") if line.strip() else ("blank", "a blank line")
            self.report_bad(kind, file, start, detail)
            return None
        return self.document_of(record, file, start, end)

    def reader(self) -> Reader:
        return JsonlReader(self)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


class JsonlReader:
    """Reads forward through one block after another."""

    def __init__(self, source: JsonlSource) -> None:
        self._source = source
        self._block, self._file, self._first, self._last = -1, 0, 0, 0
        self._data, self._start = b"", 0  # buffered bytes and their offset in the file

    def document(self, block: int, offset: int) -> Document | None:
        source = self._source
        if block != self._block:
            self._block, self._data, self._start = block, b"", 0
            self._file, self._first, self._last = source.block(block)
        if offset < 0:
            offset = self._first_line()
        while offset < self._last:
            line, end = self._line(offset)
            document = source.parse(line, self._file, offset, end)
            if document is not None:
                return document
            offset = end
        self._block, self._data = -1, b""
        return None

    def _first_line(self) -> int:
        """Return where the first line of the block begins; at or after the block's end if no line begins in it."""
        if self._first == 0:
            return 0
        at = self._first - 1
        while at < self._last - 1:
            self._fill(at, self._last + _SLACK_BYTES - at)
            found = self._data.find(b"\n")
            if found >= 0:
                return at + found + 1
            at += len(self._data)
        return self._last

    def _fill(self, at: int, want: int) -> None:
        size = self._source.files[self._file].size
        self._data = self._source.pread(self._file, min(want, _READ_BYTES + _SLACK_BYTES, size - at), at)
        self._start = at

    def _line(self, offset: int) -> tuple[bytes, int]:
        """Return the line at `offset` without its newline, and where the next one begins."""
        if not 0 <= offset - self._start < len(self._data):
            self._fill(offset, self._last + _SLACK_BYTES - offset)
        begin = offset - self._start
        found = self._data.find(b"\n", begin)
        if found >= 0:
            return self._data[begin:found], self._start + found + 1
        return self._long_line(begin)

    def _long_line(self, begin: int) -> tuple[bytes, int]:
        """Read a line that continues beyond the buffer."""
        source, file = self._source, self._file
        size = source.files[file].size
        parts = [self._data[begin:]]
        at = self._start + len(self._data)
        want = _READ_BYTES
        self._data = b""
        while at < size:
            data = source.pread(file, min(want, size - at), at)
            found = data.find(b"\n")
            if found >= 0:
                parts.append(data[:found])
                self._data, self._start = (data, at) if len(data) <= _READ_BYTES else (b"", 0)
                return b"".join(parts), at + found + 1
            parts.append(data)
            at += len(data)
            want = min(2 * want, _LONG_READ_BYTES)
        return b"".join(parts), size
