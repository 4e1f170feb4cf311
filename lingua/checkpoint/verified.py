"""Read a checkpoint's files once, at the speed of the disk, and compare them with their manifest. Torch-free.

Several blocks are read at once, bypassing the page cache where the file system can, and hashed while the next ones
arrive. Memory: BUFFERS x CHUNK_BYTES per file that is being read.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lingua.files import BLOCK_BYTES, naming, skip_page_cache, use_page_cache

CHUNK_BYTES = 16 << 20  # without the page cache a disk is fastest with large blocks: 16 MiB gave 1.8 GB/s, 4 MiB 1.55
READ_AHEAD = 3
"""Blocks of a file that are read at a time."""
BUFFERS = READ_AHEAD + 2
"""More than READ_AHEAD: reads continue while one block is in use and a late one is awaited."""
VERIFY_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class FileFacts:
    """Size and checksum of a file, computed from memory, not from the disk."""

    size_bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, content: memoryview) -> FileFacts:
        """Compute the facts of a file with this content, bytes in memory."""
        digest = xxhash.xxh3_128()
        for start in range(0, len(content), CHUNK_BYTES):
            digest.update(content[start : start + CHUNK_BYTES])
        return cls(len(content), digest.hexdigest())

    def wrong_size(self, name: str, size_bytes: int) -> str:
        return f"{name} has {size_bytes} bytes instead of {self.size_bytes}"


Manifest = dict[str, FileFacts]


def pieces_of(path: Path, begin: int = 0, end: int | None = None, *, direct_io: bool = True) -> Iterator[memoryview]:
    """Yield the bytes of a file from `begin` to `end`, in order; each piece is valid until the next is taken.

    Stops at the end of the file. `direct_io`: bypass the page cache where the file system can. Raises OSError.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(descriptor).st_size
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what is read must come from the disk
            if direct_io:
                skip_page_cache(descriptor)
            yield from _pieces(descriptor, begin, size_bytes if end is None else min(end, size_bytes))
        finally:
            os.close(descriptor)


def _pieces(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    first = begin - begin % BLOCK_BYTES
    block_bytes = min(CHUNK_BYTES, max(0, -(-(end - first) // BLOCK_BYTES)) * BLOCK_BYTES)
    offsets = deque(range(first, end, CHUNK_BYTES))
    idle = [_buffer(block_bytes) for _ in range(min(BUFFERS, len(offsets)))]
    reading: deque[tuple[int, memoryview, Future[int]]] = deque()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        while offsets or reading:
            while offsets and idle:
                offset, buffer = offsets.popleft(), idle.pop()
                reading.append((offset, buffer, pool.submit(_fill, descriptor, offset, buffer, end)))
            offset, buffer, filled = reading.popleft()
            n_bytes = filled.result()
            yield buffer[max(0, begin - offset) : n_bytes]
            idle.append(buffer)


def _buffer(n_bytes: int) -> memoryview:
    """Return page-aligned memory, in huge pages if the kernel has some: the first touch of small ones takes time."""
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _fill(descriptor: int, offset: int, buffer: memoryview, end: int) -> int:
    """Read a block of a file; return how many of its bytes are before `end`."""
    n_bytes, wanted, is_second_try = 0, min(len(buffer), end - offset), False
    while n_bytes < wanted:
        try:
            n_read = os.preadv(descriptor, [buffer[n_bytes:]], offset + n_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL or is_second_try:
                raise
            use_page_cache(descriptor)  # the file system lacks O_DIRECT, or the last read ended within a block
            is_second_try = True
            continue
        if n_read == 0:
            break
        n_bytes += n_read
    return min(n_bytes, wanted)


def differs(
    name: str, pieces: Iterable[memoryview], fact: FileFacts, use: Callable[[memoryview], object] = lambda piece: None
) -> str | None:
    """Compare a file's bytes with its facts and pass each piece to `use`; return how it differs, or None.

    Raises OSError if it cannot be read for a reason other than damage.
    """
    digest, size_bytes = xxhash.xxh3_128(), 0
    try:
        for piece in pieces:
            use(piece)
            digest.update(piece)
            size_bytes += len(piece)
    except OSError as error:
        if error.errno == errno.EIO:
            return f"{name} cannot be read ({error.strerror})"
        raise
    if size_bytes != fact.size_bytes:
        return fact.wrong_size(name, size_bytes)
    return None if digest.hexdigest() == fact.xxh3_128 else f"{name} does not have the content it was written with"
