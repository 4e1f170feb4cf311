"""Global shuffle of documents within a memory budget: an external sort by random keys.

Promise: the output is a pure function of (seed, input files in order, number of chunks). Memory budget, number of
processes, kills and restarts change nothing. Every good line comes out once, byte for byte, ended by one newline.

A document's key is a 64-bit mix of (seed, number of its file, number of its line): counter-based, so no generator has a
history. All documents in ascending order of key are the shuffled data set; the first ones are held out, the others
are cut into chunks of equal count. Worked example, 2 files, 1 held out, 2 chunks:

    file 0   a(key 71) b(12) c(40)     run 0   b12 c40 a71    held out  b
    file 1   d(key 55) e(33)           run 1   e33 d55        chunk 0   e c    chunk 1   d a

1. `sort_file` reads an input once, in windows that fit the budget; each window becomes a *run*, sorted by key.
2. `write_output` takes one key range, cut finer until it fits the budget, from every run, sorts it and writes it.
Both are independent per file: each may run in a process of its own, and each leaves a mark when it is through.

Cost: every byte is read twice and written twice, always in large pieces. Where all inputs are plain jsonl and fit the
budget, runs are views of the mapped files (`map_file`), and every byte is written once. Memory: the window plus
`DOC_BYTES` per document in it, plus `FIXED_BYTES`.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson
import xxhash

from lingua.files import DISK, Files, RunError, human_bytes, read_json, write_json

DOC_BYTES = 96
"""Index kept per document of a window: start, end, key, rank, and what sorting them needs."""
FIXED_BYTES = 48 << 20
"""Blocks in flight and allocator slack beside the window."""
BATCH_BYTES = 1 << 20
MAX_WINDOW_BYTES = 8 << 30
_BATCH_DOCS = 4096
_MIN_WINDOW_BYTES = 1 << 16
KEY_END = 1 << 64
TEXT_KEYS = ("text", "content")
_MAX_EXAMPLES = 10
_BOM = b"\xef\xbb\xbf"


def cost_bytes(n_bytes: int, n_docs: int) -> int:
    """Memory that a window of this size takes."""
    return n_bytes + DOC_BYTES * n_docs


def keys_of(seed: int, file_number: int, lines: np.ndarray) -> np.ndarray:
    """Keys (uint64) of a file's lines: splitmix64 (Steele, Lea, Flood 2014), started at a hash of seed and file."""
    start = xxhash.xxh3_64_intdigest(f"{seed}/{file_number}".encode())
    with np.errstate(over="ignore"):
        mixed = np.uint64(start) + lines.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


# -- which lines are documents ---------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What became of the lines of some files."""

    documents: int = 0
    blank: int = 0
    not_json: int = 0
    no_text: int = 0
    empty: int = 0
    examples: list[str] = field(default_factory=list)
    """`file:line: what is wrong` of the first few."""

    @property
    def bad(self) -> int:
        return self.not_json + self.no_text + self.empty

    def add(self, other: Counts) -> None:
        for name in ("documents", "blank", "not_json", "no_text", "empty"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = (self.examples + other.examples)[:_MAX_EXAMPLES]


def judge(line: memoryview) -> str:
    """`documents`, or the name of the count that says why a line is none."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "blank" if not bytes(line).strip() else "not_json"
    if not isinstance(value, dict):
        return "not_json"
    text = next((value[key] for key in TEXT_KEYS if key in value), None)
    if not isinstance(text, str):
        return "no_text"
    return "documents" if text else "empty"


_WRONG = {"not_json": "no JSON object", "no_text": "no text or content that is a string", "empty": "empty text"}


class LineScan:
    """Finds the documents of one file in a buffer that grows and moves; counts what is none."""

    def __init__(self, name: str) -> None:
        self.counts = Counts()
        self._name = name
        self._n_lines = 0
        self.clear()

    def clear(self) -> None:
        self.starts, self.ends, self.lines = array("Q"), array("Q"), array("Q")

    def scan(self, buffer: mmap.mmap, view: memoryview, start: int, end: int, *, last: bool) -> int:
        """Look at the whole lines of buffer[start:end]; returns where the first one not looked at begins."""
        find = buffer.find
        while start < end:
            stop = find(b"\n", start, end)
            if stop < 0:
                if not last:
                    return start
                stop = end
            first, after = start, stop
            if not self._n_lines and view[start : start + 3] == _BOM:
                first += 3
            if after > first and view[after - 1] == 13:  # CRLF
                after -= 1
            kind = judge(view[first:after]) if after > first else "blank"
            if kind == "documents":
                self.starts.append(first)
                self.ends.append(after)
                self.lines.append(self._n_lines)
            else:
                self._count(kind)
            self._n_lines += 1
            start = stop + 1
        return min(start, end)

    def index(self, seed: int, file_number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(keys, starts, ends) of the documents found since the last `clear`, in ascending order of key."""
        self.counts.documents += len(self.lines)
        keys = keys_of(seed, file_number, np.frombuffer(self.lines, np.uint64))
        order = np.argsort(keys, kind="stable")
        starts, ends = np.frombuffer(self.starts, np.uint64), np.frombuffer(self.ends, np.uint64)
        return keys[order], starts[order], ends[order]

    def _count(self, kind: str) -> None:
        setattr(self.counts, kind, getattr(self.counts, kind) + 1)
        if kind in _WRONG and len(self.counts.examples) < _MAX_EXAMPLES:
            self.counts.examples.append(f"{self._name}:{self._n_lines + 1}: {_WRONG[kind]}")


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class DiskRun:
    """A sorted window on disk: lines, zero padding to 8, keys (uint64), end of each line (uint64)."""

    path: Path
    n_docs: int
    n_bytes: int
    """Of the lines, newlines included."""

    @property
    def _keys_at(self) -> int:
        return -(-self.n_bytes // 8) * 8

    @property
    def _ends_at(self) -> int:
        return self._keys_at + 8 * self.n_docs

    @cached_property
    def keys(self) -> np.ndarray:
        """Mapped: a binary search touches a few of its pages."""
        return np.memmap(self.path, np.uint64, "r", self._keys_at, (self.n_docs,))

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.memmap(self.path, np.uint64, "r", self._ends_at, (self.n_docs,))

    def end_of(self, n_docs: int) -> int:
        """Bytes of the first `n_docs` documents."""
        return int(self._ends[n_docs - 1]) if n_docs else 0

    def take(self, first: int, last: int, window: memoryview, at: int) -> Taken:
        """Documents [first, last); their bytes go to window[at:]."""
        begin = self.end_of(first)
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            _fill(file, window[at : at + self.end_of(last) - begin])
        keys = np.fromfile(self.path, np.uint64, last - first, offset=self._keys_at + 8 * first)
        ends = np.fromfile(self.path, np.uint64, last - first, offset=self._ends_at + 8 * first)
        ends = ends - np.uint64(begin) + np.uint64(at)
        starts = np.concatenate([np.array([at], np.uint64), ends[:-1]])
        return Taken(window, keys, starts, ends - np.uint64(1))


class MappedRun:
    """A whole plain file in the page cache; nothing is copied."""

    def __init__(self, view: memoryview, keys: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.keys, self._starts, self._ends, self._view = keys, starts, ends, view
        self._bytes = np.cumsum(ends - starts + np.uint64(1))
        self.n_docs, self.n_bytes = len(keys), int(self._bytes[-1])

    def end_of(self, n_docs: int) -> int:
        return int(self._bytes[n_docs - 1]) if n_docs else 0

    def take(self, first: int, last: int, window: memoryview, at: int) -> Taken:
        return Taken(self._view, self.keys[first:last], self._starts[first:last], self._ends[first:last])


@dataclass
class Taken:
    """Documents of one run: where their bytes are, newline left out."""

    view: memoryview
    keys: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


Run = DiskRun | MappedRun


def _fill(file: object, memory: memoryview) -> None:
    while len(memory):
        n_read = file.readinto(memory)  # pyright: ignore[reportAttributeAccessIssue] - a raw file
        if not n_read:
            raise RunError(f"{getattr(file, 'name', file)} is shorter than its mark says; remove its folder")
        memory = memory[n_read:]


def map_file(path: Path, name: str, file_number: int, seed: int) -> tuple[MappedRun | None, Counts]:
    """The run of a plain jsonl file, without copying it. None: no document in it."""
    scan = LineScan(name)
    size = path.stat().st_size
    if not size:
        return None, scan.counts
    with path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = memoryview(buffer)
    scan.scan(buffer, view, 0, size, last=True)
    if not scan.starts:
        return None, scan.counts
    return MappedRun(view, *scan.index(seed, file_number)), scan.counts


def mark_of(folder: Path, file_number: int) -> Path:
    """Says that a file's runs are complete."""
    return folder / f"{file_number:06d}.done.json"


def load_runs(folder: Path, n_files: int) -> tuple[list[Run], Counts]:
    """All runs of a folder, in the order of the files."""
    runs: list[Run] = []
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
    files: Files = DISK,
) -> Counts:
    """Turn the lines of one input into sorted runs in `folder`, and mark them. Raises RunError for a line too large."""
    window_bytes = min(max(memory_bytes - FIXED_BYTES, _MIN_WINDOW_BYTES), MAX_WINDOW_BYTES)
    memory = _window(window_bytes)
    view = memoryview(memory)
    scan = LineScan(name)
    runs: list[tuple[str, int, int]] = []
    used = seen = 0  # bytes of the window that are filled; bytes of it that are looked at

    def close_window() -> None:
        """What is looked at becomes a run; the begun line moves to the front."""
        nonlocal used, seen
        if scan.starts:
            run = folder / f"{file_number:06d}-{len(runs):06d}.run"
            runs.append((run.name, *_write_run(run, view, *scan.index(seed, file_number), files)))
        scan.clear()
        view[: used - seen] = view[seen:used]
        used, seen = used - seen, 0

    for block in blocks:
        rest = memoryview(block)
        while len(rest):
            if cost_bytes(used, len(scan.starts)) >= window_bytes:
                if not seen:
                    raise RunError(
                        f"{name}: a line of more than {human_bytes(window_bytes)} does not fit into the memory "
                        "that was allowed; allow more (MEMORY)"
                    )
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
    """The one large buffer of this process. Kept, because the first touch of memory costs more than all else here."""
    if not _windows or len(_windows[0]) < n_bytes:
        _windows.clear()
        window = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # exists where it is touched
        window.madvise(mmap.MADV_HUGEPAGE)
        _windows.append(window)
    return _windows[0]


def drop_window() -> None:
    """Give the buffer back."""
    _windows.clear()


def _write_run(
    path: Path, view: memoryview, keys: np.ndarray, starts: np.ndarray, ends: np.ndarray, files: Files
) -> tuple[int, int]:
    """Returns documents and bytes."""
    n_bytes = 0
    descriptor = files.create(path)
    try:
        for batch in _batches(_lines(view, starts, ends)):
            files.write(descriptor, batch)
            n_bytes += len(batch)
        for part in (np.zeros(-n_bytes % 8, np.uint8), keys, np.cumsum(ends - starts + np.uint64(1))):
            files.write(descriptor, part.tobytes())
        files.fsync(descriptor)
    finally:
        files.close(descriptor)
    return len(keys), n_bytes


def _lines(view: memoryview, starts: np.ndarray, ends: np.ndarray) -> Iterator[memoryview]:
    for first in range(0, len(starts), _BATCH_DOCS):
        part = slice(first, first + _BATCH_DOCS)
        for start, end in zip(starts[part].tolist(), ends[part].tolist(), strict=True):
            yield view[start:end]


def _batches(lines: Iterable[memoryview]) -> Iterator[bytes]:
    """Lines, newlines added, joined to pieces that are worth a write."""
    held: list[memoryview | bytes] = []
    n_bytes = 0
    for line in lines:
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
    """Documents for validation: `per_chunk` for each chunk, but at most one in a hundred (at least 1 of 2 or more)."""
    if n_docs < 2:
        return 0
    return min(per_chunk * n_chunks, max(n_docs // 100, 1))


def plan_outputs(runs: Sequence[Run], dataset: str, *, n_chunks: int, val_per_chunk: int) -> list[Output]:
    """Key ranges of the held-out file and of the chunks. No chunk is empty: there are fewer of them if need be."""
    n_docs = sum(run.n_docs for run in runs)
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


def _n_below(run: Run, key: int) -> int:
    return run.n_docs if key >= KEY_END else int(np.searchsorted(run.keys, np.uint64(key)))


def _key_at_rank(runs: Sequence[Run], rank: int) -> int:
    """The smallest key that has `rank` documents below it."""
    low, high = 0, KEY_END
    while low < high:
        middle = (low + high) // 2
        if sum(_n_below(run, middle) for run in runs) >= rank:
            high = middle
        else:
            low = middle + 1
    return low


def _size(runs: Sequence[Run], low: int, high: int) -> tuple[int, int]:
    """Documents and bytes of a key range."""
    n_docs = n_bytes = 0
    for run in runs:
        first, last = _n_below(run, low), _n_below(run, high)
        n_docs += last - first
        n_bytes += run.end_of(last) - run.end_of(first)
    return n_docs, n_bytes


def _fitting(runs: Sequence[Run], low: int, high: int, memory_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(low, high, bytes) of ranges, in order, that fit the memory; an empty range is left out."""
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
    runs: Sequence[Run],
    output: Output,
    path: Path,
    *,
    memory_bytes: int,
    files: Files = DISK,
    wrote: Callable[[int], None] = lambda _: None,
) -> str:
    """Write one output under its final name, whole or not at all; returns its XXH3-128."""
    window_bytes = min(max(memory_bytes - FIXED_BYTES, _MIN_WINDOW_BYTES), MAX_WINDOW_BYTES)
    digest = xxhash.xxh3_128()
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = files.create(temporary)
    try:
        try:
            for low, high, n_bytes in _fitting(runs, output.low, output.high, window_bytes):
                for batch in _batches(_sorted_lines(runs, low, high, n_bytes)):
                    files.write(descriptor, batch)
                    digest.update(batch)
                    wrote(len(batch))
            files.fsync(descriptor)
        finally:
            files.close(descriptor)
        files.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    files.fsync_dir(path.parent)
    return digest.hexdigest()


def _sorted_lines(runs: Sequence[Run], low: int, high: int, n_bytes: int) -> Iterator[memoryview]:
    """Lines of a key range in order. Equal keys keep the order of the runs, which is that of the input."""
    window = memoryview(_window(n_bytes) if any(isinstance(run, DiskRun) for run in runs) else b"")
    taken: list[Taken] = []
    at = 0
    for run in runs:
        first, last = _n_below(run, low), _n_below(run, high)
        if first < last:
            taken.append(run.take(first, last, window, at))
            at += run.end_of(last) - run.end_of(first)
    order = np.argsort(np.concatenate([part.keys for part in taken]), kind="stable")
    starts = np.concatenate([part.starts for part in taken])
    ends = np.concatenate([part.ends for part in taken])
    run_of = np.repeat(np.arange(len(taken), dtype=np.uint32), [len(part.keys) for part in taken])
    views = [part.view for part in taken]
    for first in range(0, len(order), _BATCH_DOCS):
        batch = order[first : first + _BATCH_DOCS]
        for number, start, end in zip(
            run_of[batch].tolist(), starts[batch].tolist(), ends[batch].tolist(), strict=True
        ):
            yield views[number][start:end]
