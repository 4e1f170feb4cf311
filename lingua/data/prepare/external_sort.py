"""Shuffle documents globally within a memory budget: an external sort by random keys.

Promise: the output is a pure function of (seed, input files in order, number of chunks). Memory budget, number of
processes, kills and restarts change nothing. Every good line is written once, byte for byte, with one newline.

A document's key is a 64-bit hash of (seed, number of its file, number of its line). All documents in ascending order of
key are the shuffled data set; the first ones are held out, the others are cut into chunks of equal count. An example
with 2 files, 1 held-out document, 2 chunks:

    file 0   a(key 71) b(12) c(40)     run 0   b12 c40 a71    held out  b
    file 1   d(key 55) e(33)           run 1   e33 d55        chunk 0   e c    chunk 1   d a

1. `sort_file` reads an input once, in windows that fit the budget; each window becomes a *run*, sorted by key.
2. `write_output` takes one key range, split until it fits the budget, from every run, sorts it and writes it.
Both are independent per file: each may run in a separate process, and each leaves a mark when it is done.

Cost: every byte is read twice and written twice, in large pieces. If all inputs are plain jsonl and fit the budget,
runs are views of the mapped files (`map_file`), and every byte is written once. Memory: the window, `DOC_BYTES` per
document in it, and `FIXED_BYTES`.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash

from lingua.data.blocked_source import PLAIN_TEXT, TextFields
from lingua.data.prepare.counts import MAX_EXAMPLES, WRONG, Counts, LongLineError, judge
from lingua.files import DISK, Files, RunError, read_json, write_json

DOC_BYTES = 96
"""Memory per document of a window: start, end, key, rank, and temporaries of the sort."""
FIXED_BYTES = 48 << 20
"""Memory for blocks in flight and allocator slack, in addition to the window."""
BATCH_BYTES = 1 << 20
MAX_WINDOW_BYTES = 8 << 30
_BATCH_DOCS = 4096
_MIN_WINDOW_BYTES = 1 << 16
KEY_END = 1 << 64
FREE_LINE_BYTES = 8 << 20
"""Lines up to this long are parsed within `FIXED_BYTES`."""
_PARSED = 5
"""Memory that parsing a line takes, as a multiple of its bytes: a copy, and a string with 4 bytes per character."""
_BOM = b"\xef\xbb\xbf"


def cost_bytes(n_bytes: int, n_docs: int) -> int:
    """Return the memory that a window of this size takes."""
    return n_bytes + DOC_BYTES * n_docs


def keys_of(seed: int, file_number: int, lines: np.ndarray) -> np.ndarray:
    """Return the keys (uint64) of a file's lines: splitmix64 (Steele, Lea, Flood 2014) from a hash of seed and file."""
    start = xxhash.xxh3_64_intdigest(f"{seed}/{file_number}".encode())
    with np.errstate(over="ignore"):
        mixed = np.uint64(start) + lines.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


# -- lines -----------------------------------------------------------------------------------------------------------


class LineScan:
    """Finds the documents of one file in a buffer that grows and moves; counts the other lines."""

    def __init__(self, name: str, fields: TextFields = PLAIN_TEXT, spare_bytes: int | None = None) -> None:
        """`spare_bytes`: memory for parsing a line; longer ones raise LongLineError."""
        self.counts = Counts()
        self._name, self._fields, self._keys = name, fields, fields.keys
        self._longest = None if spare_bytes is None else max(spare_bytes // _PARSED, FREE_LINE_BYTES)
        self._n_lines = 0
        self.clear()

    def clear(self) -> None:
        self.starts, self.ends, self.lines = array("Q"), array("Q"), array("Q")

    def scan(self, buffer: mmap.mmap, view: memoryview, start: int, end: int, *, last: bool) -> int:
        """Scan the complete lines of buffer[start:end]; return where the rest begins."""
        while start < end:
            stop = buffer.find(b"\n", start, end)
            if stop < 0:
                if not last:
                    return start
                stop = end
            first, after = start, stop
            if not self._n_lines and view[start : start + 3] == _BOM:
                first += 3
            if after > first and view[after - 1] == 13:  # CRLF
                after -= 1
            if self._longest is not None and after - first > self._longest:
                raise LongLineError.of(self._name, self._longest)
            kind = judge(view[first:after], self._keys) if after > first else "blank"
            setattr(self.counts, kind, getattr(self.counts, kind) + 1)
            if kind == "documents":
                self.starts.append(first)
                self.ends.append(after)
                self.lines.append(self._n_lines)
            elif kind in WRONG and len(self.counts.examples) < MAX_EXAMPLES:
                self.counts.examples.append(f"{self._name}:{self._n_lines + 1}: {WRONG[kind].format(self._fields)}")
            self._n_lines += 1
            start = stop + 1
        return min(start, end)

    def documents(self, view: memoryview, seed: int, file_number: int) -> Documents:
        """Return the documents found since the last `clear`, in ascending order of key."""
        starts, ends, lines = (np.frombuffer(array, np.uint64) for array in (self.starts, self.ends, self.lines))
        keys = keys_of(seed, file_number, lines)
        order = np.argsort(keys, kind="stable")
        return Documents(view, keys[order], starts[order], ends[order])


@dataclass
class Documents:
    """Lines in memory: their keys, and the places of their bytes without the newline."""

    view: memoryview
    keys: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Cumulative bytes of the documents, newlines included."""
        return np.cumsum(self.ends - self.starts + np.uint64(1))


# -- runs ------------------------------------------------------------------------------------------------------------


class SortedRun:
    """Documents of a file, or of a window of it, in ascending order of key."""

    keys: np.ndarray
    sizes: np.ndarray
    """Cumulative bytes of the documents, newlines included."""

    @property
    def n_bytes(self) -> int:
        return self.n_bytes_of(0, len(self.keys))

    def n_bytes_of(self, first: int, last: int) -> int:
        """Return the bytes of documents [first, last)."""
        return int(self.sizes[last - 1]) - (int(self.sizes[first - 1]) if first else 0) if last > first else 0

    def n_below(self, key: int) -> int:
        """Return the number of documents with a smaller key."""
        return len(self.keys) if key >= KEY_END else int(np.searchsorted(self.keys, np.uint64(key)))

    def take(self, first: int, last: int, window: memoryview) -> Documents:
        """Return documents [first, last); if their bytes are not in memory, read them to the begin of the window."""
        raise NotImplementedError


class DiskRun(SortedRun):
    """A sorted window on disk: lines, zero padding to 8, keys (uint64), `sizes` (uint64)."""

    def __init__(self, path: Path, n_docs: int, n_bytes: int) -> None:
        self._path, self._keys_at = path, -(-n_bytes // 8) * 8
        # Mapped: a binary search touches only a few pages.
        self.keys, self.sizes = np.memmap(path, np.uint64, "r", self._keys_at, (2, n_docs))

    def take(self, first: int, last: int, window: memoryview) -> Documents:
        before = self.n_bytes_of(0, first)
        with self._path.open("rb", buffering=0) as file:
            file.seek(before)
            _fill(file, window[: self.n_bytes_of(first, last)])
        count, n_docs = last - first, len(self.keys)  # read, because mapped pages would stay resident
        keys = np.fromfile(self._path, np.uint64, count, offset=self._keys_at + 8 * first)
        ends = np.fromfile(self._path, np.uint64, count, offset=self._keys_at + 8 * (n_docs + first))
        ends -= np.uint64(before)
        starts = np.concatenate([np.zeros(1, np.uint64), ends[:-1]])
        return Documents(window, keys, starts, ends - np.uint64(1))


class MappedRun(SortedRun):
    """A whole plain file, mapped from the page cache without a copy."""

    def __init__(self, documents: Documents) -> None:
        self._documents, self.keys, self.sizes = documents, documents.keys, documents.sizes

    def take(self, first: int, last: int, window: memoryview) -> Documents:
        found = self._documents
        return Documents(found.view, found.keys[first:last], found.starts[first:last], found.ends[first:last])


def _fill(file: object, memory: memoryview) -> None:
    while len(memory):
        n_read = file.readinto(memory)  # pyright: ignore[reportAttributeAccessIssue] - a raw file
        if not n_read:
            raise RunError(f"{getattr(file, 'name', file)} is shorter than its mark says; remove its folder")
        memory = memory[n_read:]


def map_file(
    path: Path, name: str, file_number: int, seed: int, fields: TextFields = PLAIN_TEXT, spare_bytes: int | None = None
) -> tuple[MappedRun | None, Counts]:
    """Map a plain jsonl file as a run, without a copy; None if it has no document. `spare_bytes`: see LineScan."""
    scan = LineScan(name, fields, spare_bytes)
    if size := path.stat().st_size:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(buffer)
        scan.scan(buffer, view, 0, size, last=True)
        if scan.starts:
            return MappedRun(scan.documents(view, seed, file_number)), scan.counts
    return None, scan.counts


def mark_of(folder: Path, file_number: int) -> Path:
    """Return the file that exists once a file's runs are complete."""
    return folder / f"{file_number:06d}.done.json"


def load_runs(folder: Path, n_files: int) -> tuple[list[SortedRun], Counts]:
    """Open all runs of a folder, in the order of the files, with the counts of all files."""
    runs: list[SortedRun] = []
    counts = Counts()
    for number in range(n_files):
        mark = read_json(mark_of(folder, number))
        counts.add(Counts(**mark["counts"]))
        runs += [DiskRun(folder / name, docs, n_bytes) for name, docs, n_bytes in mark["runs"]]
    return runs, counts


def sort_file(
    blocks: Iterable[bytes],
    name: str,
    file_number: int,
    folder: Path,
    *,
    seed: int,
    memory_bytes: int,
    fields: TextFields = PLAIN_TEXT,
    files: Files = DISK,
) -> Counts:
    """Sort the lines of one input into runs in `folder`, and mark them as done. Raises LongLineError."""
    window_bytes = min(max(memory_bytes - FIXED_BYTES, _MIN_WINDOW_BYTES), MAX_WINDOW_BYTES)
    memory = _window(window_bytes)
    view = memoryview(memory)
    scan = LineScan(name, fields)
    runs: list[tuple[str, int, int]] = []
    used = seen = 0  # filled bytes of the window; scanned bytes of it

    def close_window() -> None:
        """Write the scanned lines as a run; move the incomplete line to the front."""
        nonlocal used, seen
        if scan.starts:
            run = folder / f"{file_number:06d}-{len(runs):06d}.run"
            runs.append((run.name, *_write_run(run, scan.documents(view, seed, file_number), files)))
        scan.clear()
        view[: used - seen] = view[seen:used]
        used, seen = used - seen, 0

    for block in blocks:
        rest = memoryview(block)
        while len(rest):
            begun = used - seen  # bytes of an incomplete line
            parsing = _PARSED * begun if begun > FREE_LINE_BYTES else 0
            if cost_bytes(used, len(scan.starts)) + parsing >= window_bytes:
                if not seen:
                    raise LongLineError.of(name, used)
                close_window()
            part = rest[: min(window_bytes - used, BATCH_BYTES)]
            view[used : used + len(part)] = part
            used, rest = used + len(part), rest[len(part) :]
            seen = scan.scan(memory, view, seen, used, last=False)
    seen = scan.scan(memory, view, seen, used, last=True)
    close_window()
    write_json(mark_of(folder, file_number), {"counts": asdict(scan.counts), "runs": runs}, files=files)
    return scan.counts


_windows: list[mmap.mmap] = []


def _window(n_bytes: int) -> mmap.mmap:
    """Return this process's one large buffer, kept because the first touch of memory is the most costly part here."""
    if not _windows or len(_windows[0]) < n_bytes:
        _windows.clear()
        window = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # memory is taken on touch
        window.madvise(mmap.MADV_HUGEPAGE)
        _windows.append(window)
    return _windows[0]


def drop_window() -> None:
    _windows.clear()


def _write_run(path: Path, documents: Documents, files: Files) -> tuple[int, int]:
    """Write a run; return the numbers of documents and bytes."""
    sizes = documents.sizes
    n_bytes = int(sizes[-1])
    index = (np.zeros(-n_bytes % 8, np.uint8), documents.keys, sizes)
    write_file(path, chain(_batches(_in_order([documents])), (part.tobytes() for part in index)), files)
    return len(sizes), n_bytes


def write_file(path: Path, parts: Iterable[bytes | memoryview], files: Files) -> str:
    """Write a file durably; return the XXH3-128 of its content."""
    digest = xxhash.xxh3_128()
    descriptor = files.create(path)
    try:
        for part in parts:
            files.write(descriptor, part)
            digest.update(part)
        files.fsync(descriptor)
    finally:
        files.close(descriptor)
    return digest.hexdigest()


def _in_order(parts: Sequence[Documents]) -> Iterator[memoryview]:
    """Yield the lines in ascending order of key. Equal keys keep the order of the parts, which is that of the input."""
    order = np.argsort(_joined([part.keys for part in parts]), kind="stable")
    starts = _joined([part.starts for part in parts])
    ends = _joined([part.ends for part in parts])
    part_of = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part.keys) for part in parts])
    for first in range(0, len(order), _BATCH_DOCS):
        batch = order[first : first + _BATCH_DOCS]
        columns = (column[batch].tolist() for column in (part_of, starts, ends))
        for number, start, end in zip(*columns, strict=True):
            yield parts[number].view[start:end]


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)  # a window's index has no room for a copy


def _batches(lines: Iterable[memoryview]) -> Iterator[bytes | memoryview]:
    """Add newlines to lines and join them into pieces that are large enough for a write."""
    held: list[memoryview | bytes] = []
    n_bytes = 0
    for line in lines:
        if len(line) > BATCH_BYTES:  # not copied
            yield b"\n".join([*held, b""])
            yield from (line, b"\n")
            held, n_bytes = [], 0
            continue
        held.append(line)
        n_bytes += len(line) + 1
        if n_bytes >= BATCH_BYTES:
            held.append(b"")
            yield b"\n".join(held)
            held, n_bytes = [], 0
    if held:
        held.append(b"")
        yield b"\n".join(held)


# -- outputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """One file of the result: all documents with low <= key < high."""

    name: str
    low: int
    high: int
    n_docs: int
    n_bytes: int


def n_held_out(n_docs: int, n_chunks: int, per_chunk: int) -> int:
    """Return the number of held-out documents: `per_chunk` per chunk, at most 1% (at least 1 of 2 or more)."""
    return min(per_chunk * n_chunks, max(n_docs // 100, 1)) if n_docs > 1 else 0


def plan_outputs(runs: Sequence[SortedRun], dataset: str, *, n_chunks: int, val_per_chunk: int) -> list[Output]:
    """Choose the key ranges of the held-out file and of the chunks. No chunk is empty: there may be fewer chunks."""
    n_docs = sum(len(run.keys) for run in runs)
    val = n_held_out(n_docs, n_chunks, val_per_chunk)
    n_chunks = min(n_chunks, n_docs - val)
    ranks = [val + (n_docs - val) * chunk // n_chunks for chunk in range(n_chunks)] if n_chunks else []
    width = max(len(str(n_chunks - 1)), 2)  # readers sort by name
    names = [f"{dataset}.chunk.{chunk:0{width}d}.jsonl" for chunk in range(n_chunks)]
    if val:
        ranks, names = [0, *ranks], [f"{dataset}.val.jsonl", *names]
    lows = [0, *(_key_at_rank(runs, rank) for rank in ranks[1:])]
    return [
        Output(name, low, high, *_size(runs, low, high))
        for name, low, high in zip(names, lows, [*lows[1:], KEY_END], strict=True)
    ]


def _key_at_rank(runs: Sequence[SortedRun], rank: int) -> int:
    """Return the smallest key that has `rank` documents below it."""
    low, high = 0, KEY_END
    while low < high:
        middle = (low + high) // 2
        if sum(run.n_below(middle) for run in runs) >= rank:
            high = middle
        else:
            low = middle + 1
    return low


def _size(runs: Sequence[SortedRun], low: int, high: int) -> tuple[int, int]:
    """Return the numbers of documents and bytes in a key range."""
    spans = [(run.n_below(low), run.n_below(high)) for run in runs]
    n_bytes = sum(run.n_bytes_of(first, last) for run, (first, last) in zip(runs, spans, strict=True))
    return sum(last - first for first, last in spans), n_bytes


def _fitting(runs: Sequence[SortedRun], low: int, high: int, memory_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Split a key range until its parts fit the memory; yield (low, high, bytes) of each, in order, if not empty."""
    n_docs, n_bytes = _size(runs, low, high)
    if not n_docs:
        return
    if cost_bytes(n_bytes, n_docs) <= memory_bytes or n_docs == 1 or high - low == 1:
        yield low, high, n_bytes
        return
    middle = (low + high) // 2
    yield from _fitting(runs, low, middle, memory_bytes)
    yield from _fitting(runs, middle, high, memory_bytes)


def write_output(
    runs: Sequence[SortedRun], output: Output, path: Path, *, memory_bytes: int, files: Files = DISK
) -> str:
    """Write one output atomically under its final name; return its XXH3-128."""
    window_bytes = min(max(memory_bytes - FIXED_BYTES, _MIN_WINDOW_BYTES), MAX_WINDOW_BYTES)
    ranges = _fitting(runs, output.low, output.high, window_bytes)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # Joined per range, because the next one overwrites the window.
        batches = (_batches(_in_order(_take(runs, *each))) for each in ranges)
        digest = write_file(temporary, chain.from_iterable(batches), files)
        files.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    files.fsync_dir(path.parent)
    return digest


def _take(runs: Sequence[SortedRun], low: int, high: int, n_bytes: int) -> list[Documents]:
    """Return the documents of a key range, in the order of the runs."""
    window = memoryview(_window(n_bytes) if any(isinstance(run, DiskRun) for run in runs) else b"")
    taken = []
    for run in runs:
        first, last = run.n_below(low), run.n_below(high)
        if first < last:
            taken.append(run.take(first, last, window))
            window = window[run.n_bytes_of(first, last) :]
    return taken
