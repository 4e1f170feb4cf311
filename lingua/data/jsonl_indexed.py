"""`format: mmap_jsonl`: lines of jsonl files found by number, through a memory-mapped index of their offsets.

Every epoch of the source is a permutation of all its lines, by the seed: a global shuffle without rewriting the data.
An index that does not match its file (other size, other first or last bytes, other version, cut off) is rebuilt, beside
the file or, if that is not writable, in the user's cache, by one process of a machine at a time.
Cost: 8 bytes per line on disk, none in memory; one scan at about 1 GB/s from the page cache. Each document takes one
`pread` and 10 to 45 us for its place in the order. On a slow shared disk, shuffle the data when you prepare it
(setup/download_prepare_hf_data.py), or stage it (`data.stage_to`).

Indexes are compared with their hashes if those of a source take at most 64 MiB together. Whatever their size, each
document that is read must begin and end where a line does.

An index: 64 bytes of header (magic, version, size and edges of the file, number of lines, hash of the rest), then the
offset at which each line begins and the size of the file, 8 bytes each. Each line is a block.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from lingua.data.blocked_source import (
    HASHED_BYTES,
    BlockedSource,
    DataError,
    Document,
    Reader,
    content_hash,
    edges,
    name_key,
    whole_file,
)
from lingua.data.corpus import cache_dir
from lingua.data.jsonl import JsonlSource
from lingua.files import human_bytes

log = logging.getLogger(__name__)

SUFFIX = ".idx"
VERSION = 1
_MAGIC = b"LINGUAIX"
_HEADER = struct.Struct("<8sIIQQQQ16x")
_SCAN_BYTES = 4 << 20
_READ_BYTES = 8 << 20


class IndexHeader(NamedTuple):
    """The header of an index."""

    magic: bytes
    version: int
    header_bytes: int
    source_bytes: int
    source_edges: int
    n_lines: int
    hash: int


# -- making one ----------------------------------------------------------------------------------------------------


def index_paths(path: Path) -> tuple[Path, Path]:
    """Return where the index of a jsonl file may be: beside it, or in the user's cache."""
    whole = os.fsencode(path.resolve())
    return path.with_name(path.name + SUFFIX), cache_dir() / "index" / f"{xxhash.xxh3_64_hexdigest(whole)}{SUFFIX}"


def write_index(path: Path, target: Path, advance: Callable[[int], object] = lambda n_bytes: None) -> int:
    """Scan a jsonl file and write its index atomically; return the number of lines.

    `advance` is called with the bytes done. Raises OSError if `target` cannot be written, DataError if the file grows.
    """
    with whole_file(target) as out, path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        out.write(bytes(_HEADER.size))
        digest, n_lines = xxhash.xxh3_64(), 0
        for n_bytes, starts in _line_starts(path, file.fileno(), size):
            data = starts.tobytes()
            digest.update(data)
            out.write(data)
            n_lines += len(starts)
            advance(n_bytes)
        end = struct.pack("<q", size)
        digest.update(end)
        out.write(end)
        head = IndexHeader(_MAGIC, VERSION, _HEADER.size, size, int(edges(path, size), 16), n_lines, digest.intdigest())
        out.seek(0)
        out.write(_HEADER.pack(*head))
        if path.stat().st_size != size:
            raise DataError(f"{path}: grew while its lines were counted; wait until it is complete")
    return n_lines


def _line_starts(path: Path, descriptor: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (bytes scanned, int64 offsets at which lines begin), a few MiB at a time."""
    buffer = bytearray(_SCAN_BYTES)
    view, values = memoryview(buffer), np.frombuffer(buffer, np.uint8)
    yield 0, np.zeros(min(size, 1), np.int64)
    at = 0
    while at < size:
        n = os.preadv(descriptor, [view[: min(_SCAN_BYTES, size - at)]], at)
        if n == 0:
            raise DataError(f"{path}: ended at byte {at} of {size} while its lines were counted")
        starts = np.flatnonzero(values[:n] == ord("\n")) + (at + 1)
        at += n
        yield n, starts[:-1] if len(starts) and starts[-1] == size else starts


# -- using one -----------------------------------------------------------------------------------------------------


def read_header(index: Path, path: Path, hashed_bytes: int = HASHED_BYTES) -> IndexHeader | str:
    """Return the header of an index that fits `path`, or why it does not; an index up to `hashed_bytes` is hashed."""
    try:
        with index.open("rb") as file:
            raw, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return "it does not exist"
    if len(raw) < _HEADER.size or raw[:8] != _MAGIC:
        return "it is no index of lingua's"
    head = IndexHeader(*_HEADER.unpack(raw))
    if (head.version, head.header_bytes) != (VERSION, _HEADER.size):
        return f"it is of version {head.version}, this is {VERSION}"
    if size != _HEADER.size + 8 * (head.n_lines + 1):
        return f"it has {size} bytes for {head.n_lines} lines"
    source_bytes = path.stat().st_size
    if head.source_bytes != source_bytes:
        return f"it is of a file of {head.source_bytes} bytes, this one has {source_bytes}"
    if head.source_edges != int(edges(path, source_bytes), 16):
        return "it is of a file with other first or last bytes"
    if size <= hashed_bytes and content_hash(index, _HEADER.size) != f"{head.hash:016x}":
        return "its bytes are not as they were written"
    return head


def find_index(path: Path, hashed_bytes: int = HASHED_BYTES) -> Path:
    """Return the index of a jsonl file; make one if none fits."""
    if found := _usable(path, hashed_bytes):
        return found
    with _alone_on_this_machine(path):
        if found := _usable(path, hashed_bytes):
            return found
        beside, cached = index_paths(path)
        why = read_header(beside, path, hashed_bytes)
        log.info("%s: indexing %s (%s: %s)", path, human_bytes(path.stat().st_size), beside.name, why)
        try:
            write_index(path, beside)
        except OSError:
            cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_index(path, cached)
            return cached
        return beside


def _usable(path: Path, hashed_bytes: int) -> Path | None:
    for index in index_paths(path):
        with contextlib.suppress(PermissionError):
            if isinstance(read_header(index, path, hashed_bytes), IndexHeader):
                return index
    return None


@contextlib.contextmanager
def _alone_on_this_machine(path: Path) -> Iterator[None]:
    """Make the other ranks of this machine wait, by a lock on the data file itself."""
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # without file locks all of them make the index, which is harmless
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def map_index(path: Path, hashed_bytes: int = HASHED_BYTES) -> np.ndarray:
    """Return where each line of a jsonl file begins, and the file's size: (n_lines + 1,) int64, memory-mapped."""
    index = find_index(path, hashed_bytes)
    with index.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offsets = np.frombuffer(mapped, np.dtype("<i8"), offset=_HEADER.size)
    if offsets[0] != 0 or offsets[-1] != path.stat().st_size:
        raise DataError(f"{index}: damaged; remove it, and it will be made again")
    return offsets


class IndexedSource(JsonlSource):
    """jsonl files shuffled by line: each line is a block."""

    @classmethod
    def side_files(cls, files: Sequence[Path]) -> list[Path]:
        return [index for file in files if (index := index_paths(file)[0]).is_file()]

    @classmethod
    def sequential(cls) -> type[BlockedSource]:
        return JsonlSource

    def cut(self, n_lanes: int) -> None:
        self._lines = [map_index(file.path, HASHED_BYTES // len(self.files)) for file in self.files]
        self.number_blocks([len(lines) - 1 for lines in self._lines])

    @property
    def fingerprint(self) -> str:
        """Differs from that of the same files read as `jsonl`, since the order differs."""
        return f"{name_key('mmap_jsonl' + super().fingerprint):016x}"

    def block(self, block: int) -> tuple[int, int, int]:
        file, line = self.locate(block)
        start, end = self._lines[file][line : line + 2].tolist()
        return file, start, end

    def wrong_bytes(self) -> Iterator[str]:
        for file in self.files:
            if (index := _usable(file.path, 0)) and isinstance(why := read_header(index, file.path, 1 << 62), str):
                yield f"{index}: {why}; remove it, and it will be made again"

    def reader(self) -> Reader:
        return self

    def document(self, block: int, offset: int) -> Document | None:
        file, start, end = self.block(block)
        if offset > start:
            return None
        path, size, *_ = self.files[file]
        at = before = max(0, start - 1)  # the newline of the previous line
        is_line, parts = 0 <= start < end <= size, []
        while is_line and at < end:  # once, except for long lines
            data = self.pread(file, min(end - at, _READ_BYTES), at)
            if at == before and start > 0:
                is_line = data.startswith(b"\n")
                data, at = data[1:], start
            newline = data.find(b"\n")
            is_line = is_line and newline in (-1, end - 1 - at)
            parts.append(data)
            at += len(data)
        line = b"".join(parts)
        if not is_line or not (end == size or line.endswith(b"\n")):
            raise DataError(
                f"{path}: no line is at bytes {start} to {end}, where {_usable(path, 0)} says so; the index is damaged "
                "or the file was edited: remove the index, and it will be made again"
            )
        return self.parse(line.removesuffix(b"\n"), file, start, end)
