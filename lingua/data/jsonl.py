"""Documents of jsonl files, by block of bytes.

Promise: a document belongs to the block its line begins in, so the blocks of a source hold each document once,
whatever their size. A line that is no JSON object with text is skipped and counted, or stops the run, as
`data.on_bad_line` says; either way file and byte offset are told. A byte order mark, CRLF and a missing last newline
are no faults.
Cost: one descriptor per file (at most 256 open), one buffer of at most 272 KiB per lane and source, and the line in
hand; beyond the JSON parser about 1 us per line.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash

from lingua.config.base import ConfigError
from lingua.data.mix import DataError as DataError
from lingua.data.mix import Document, Reader, block_bytes, name_key

logger = logging.getLogger(__name__)

_READ_BYTES = 256 << 10
_SLACK_BYTES = 16 << 10  # beyond the block, where its last line usually ends
_LONG_READ_BYTES = 8 << 20  # in lines that do not end
_OPEN_FILES = 256
_MIN_LINES = 1000  # before the share of bad lines means something
_BOM = b"\xef\xbb\xbf"


class BadLines:
    """Counts what this process has read, and does with a bad line what the config says."""

    def __init__(self, on_bad_line: str = "skip", max_fraction: float = 1.0) -> None:
        self._stop, self._max_fraction = on_bad_line == "error", max_fraction
        self.lines = 0
        self.kinds: Counter[str] = Counter()
        self._told: set[Path] = set()

    def report(self, kind: str, path: Path, offset: int, detail: str) -> None:
        """One bad line: `kind` for the counters, `detail` for people. Raises DataError if that is one too many."""
        self.kinds[kind] += 1
        where = f"{path}, byte {offset}: {detail}"
        if self._stop:
            raise DataError(f"{where}; mend the line, or set data.on_bad_line: skip")
        if path not in self._told:
            self._told.add(path)
            logger.warning("%s; skipped (further ones of this file are only counted)", where)
        bad = self.kinds.total()
        if self.lines >= _MIN_LINES and bad > self._max_fraction * self.lines:
            raise DataError(
                f"{bad} of {self.lines} lines are bad, more than data.max_bad_fraction = {self._max_fraction} "
                f"({dict(self.kinds)}); the last one: {where}; mend the data, or raise data.max_bad_fraction"
            )

    def counts(self) -> dict[str, int]:
        return {"lines": self.lines, **self.kinds}


# -- files ---------------------------------------------------------------------------------------------------------


def find_files(path: Path) -> list[Path]:
    """Files of a source by name: the path, or a folder's `*.chunk.*.jsonl`, else its `*.jsonl` but `*.val.jsonl`."""
    if path.is_file():
        names = [path]
    elif path.is_dir():
        every = sorted(path.iterdir(), key=lambda p: p.name)
        jsonl = [p for p in every if p.name.endswith(".jsonl") and not p.name.endswith(".val.jsonl")]
        packed = [p for p in every if p.suffix in (".gz", ".zst") and p.name.endswith((".jsonl.gz", ".jsonl.zst"))]
        missing = [p for p in packed if p.with_suffix("") not in every]
        names = [p for p in jsonl if ".chunk." in p.name] or jsonl
        names += missing
    else:
        raise ConfigError(f"{path}: no such file or folder; mend data.sources or data.root_dir")
    for file in names:
        if file.suffix in (".gz", ".zst"):
            tool = "gunzip -k" if file.suffix == ".gz" else "zstd -d"
            raise ConfigError(
                f"{file}: a compressed file has no positions to go on from after a restart; unpack it once: "
                f"`{tool} {file}` (setup/download_prepare_hf_data.py does so by itself)"
            )
    if not names:
        raise ConfigError(f"{path}: no *.jsonl file in this folder; mend data.sources or data.root_dir")
    return names


class File(NamedTuple):
    """A jsonl file, or what was made from one: `size` and `key` (of the name) are the jsonl file's."""

    path: Path
    size: int
    key: int


def edges(path: Path, size: int) -> str:
    """Hash of the first and last 4 KiB of a file."""
    with path.open("rb") as stream:
        hasher = xxhash.xxh3_64(stream.read(4096))
        stream.seek(max(0, size - 4096))
        hasher.update(stream.read(4096))
    return hasher.hexdigest()


def fingerprint(files: Iterable[tuple[str, int, str]], text_key: str | None = None) -> str:
    """Hash over (name, size, edges) of the files, and which field is read; their folder is free."""
    hasher = xxhash.xxh3_64((text_key or "").encode("utf-8", "surrogateescape"))
    for name, size, edge in files:
        hasher.update(f"{name}\0{size}\0{edge}\0".encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()


class Tape(ABC):
    """Files cut into blocks of bytes; what the formats of sources share."""

    def __init__(
        self, name: str, files: Sequence[File], n_lanes: int, *, weight: float = 1.0, bad: BadLines | None = None
    ) -> None:
        self.name, self.weight, self.key = name, weight, name_key(name)
        self.bad = bad or BadLines()
        self.files = [file for file in files if file.size > 0]
        if not self.files:
            where = f"{files[0].path.parent}: " if files else ""
            raise DataError(f"{where}all files of source {name!r} are empty; mend data.sources or prepare the data")
        self.size_bytes = sum(file.size for file in self.files)
        self.cut(block_bytes(self.size_bytes, n_lanes))

    def cut(self, block_bytes: int) -> None:
        """Lay out the blocks; none crosses from one file to the next."""
        self.block_bytes = block_bytes
        self.lay([-(-file.size // block_bytes) for file in self.files])

    def lay(self, counts: Sequence[int]) -> None:
        """Number the blocks through, given how many each file has."""
        self._first_block = [0, *itertools.accumulate(counts)]
        self.n_blocks = self._first_block[-1]

    def place(self, block: int) -> tuple[int, int]:
        """File index, and the block's number within that file."""
        file = bisect.bisect_right(self._first_block, block) - 1
        return file, block - self._first_block[file]

    def block(self, block: int) -> tuple[int, int, int]:
        """File index, first byte and end of a block."""
        file, index = self.place(block)
        start = index * self.block_bytes
        return file, start, min(start + self.block_bytes, self.files[file].size)

    def path_of(self, file_key: int) -> Path:
        """The file that a document says it is from."""
        return next(file.path for file in self.files if file.key == file_key)

    def bad_text(self, document: Document, detail: str) -> None:
        """The tokenizer gave up on a piece of this document."""
        self.bad.report("tokenizer", self.path_of(document.file_key), document.start, detail)

    def check(self) -> None:
        """Refuse a source without any document: its lanes would look for one for ever. Usually reads one line."""
        bad, self.bad = self.bad, BadLines()
        self.bad._told.update(file.path for file in self.files)  # silent: lanes will meet these lines again
        try:
            reader = self.reader()
            if not any(reader.document(block, -1) for block in range(self.n_blocks)):
                raise DataError(
                    f"{self.files[0].path.parent}: source {self.name!r} has no document in {self.bad.lines} lines "
                    f"({dict(self.bad.kinds)}); look at data.sources and text_key"
                )
        finally:
            self.bad = bad

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents or their order do."""

    @abstractmethod
    def reader(self) -> Reader:
        """One lane's view of the tape."""

    @abstractmethod
    def close(self) -> None:
        """Give back descriptors; harmless twice."""


class JsonlSource(Tape):
    """The tape of jsonl files."""

    def __init__(
        self,
        name: str,
        path: Path,
        n_lanes: int,
        *,
        weight: float = 1.0,
        text_key: str | None = None,
        bad: BadLines | None = None,
    ) -> None:
        self._text_key = text_key
        self._keys = (text_key,) if text_key else ("text", "content")
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._fingerprint: str | None = None
        files = [File(file, file.stat().st_size, name_key(file.name)) for file in find_files(path)]
        super().__init__(name, files, n_lanes, weight=weight, bad=bad)

    @property
    def n_open(self) -> int:
        """Descriptors held."""
        return len(self._descriptors)

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            files = ((file.path.name, file.size, edges(file.path, file.size)) for file in self.files)
            self._fingerprint = fingerprint(files, self._text_key)
        return self._fingerprint

    def pread(self, file: int, n_bytes: int, offset: int) -> bytes:
        """At least one byte, or DataError."""
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = self._descriptors[file] = os.open(self.files[file].path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(descriptor, n_bytes, offset)
        if not data:
            path, size, _ = self.files[file]
            raise DataError(f"{path}: ends at byte {offset}, had {size} bytes before; it must not change during a run")
        return data

    def text(self, line: bytes, file: int, offset: int) -> str | None:
        """Text of a line, or None when it is bad."""
        bad = self.bad
        bad.lines += 1
        if offset == 0 and line.startswith(_BOM):
            line = line[len(_BOM) :]
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            kind, detail = ("not_json", f"no JSON ({error})") if line.strip() else ("blank", "a blank line")
        else:
            text = self._field(record)
            if type(text) is str and text:
                return text
            if text == "":
                kind, detail = "empty", "an empty document"
            else:
                kind, detail = "no_text", f"no JSON object with a string in {' or '.join(map(repr, self._keys))}"
        bad.report(kind, self.files[file].path, offset, detail)
        return None

    def _field(self, record: Any) -> Any:
        if type(record) is not dict:
            return None
        return next((record[key] for key in self._keys if key in record), None)

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
        """The first document of the block that begins at or after `offset` (-1: the block's begin); None: no more."""
        source = self._source
        if block != self._block:
            self._block, self._data, self._start = block, b"", 0
            self._file, self._first, self._last = source.block(block)
        if offset < 0:
            offset = self._first_line()
        while offset < self._last:
            line, end = self._line(offset)
            text = source.text(line, self._file, offset)
            if text is not None:
                return Document(text, source.files[self._file].key, offset, end)
            offset = end
        self._block, self._data = -1, b""
        return None

    def _first_line(self) -> int:
        """Where the first line that begins in the block does; the block's end or more if none does."""
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
        """The line at `offset` without its newline, and where the next one begins."""
        if not 0 <= offset - self._start < len(self._data):
            self._fill(offset, self._last + _SLACK_BYTES - offset)
        begin = offset - self._start
        found = self._data.find(b"\n", begin)
        if found >= 0:
            return self._data[begin:found], self._start + found + 1
        return self._long_line(begin)

    def _long_line(self, begin: int) -> tuple[bytes, int]:
        """A line that goes on beyond the buffer."""
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
