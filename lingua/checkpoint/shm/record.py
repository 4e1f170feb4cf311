"""Small documents in memory that are always readable whole and are written without allocating. Torch-free."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from lingua.files import DISK, Files

HEAD_BYTES = 64
"""At most this many bytes of a line, its number and checksum, come before the document."""


@dataclass(frozen=True)
class Record:
    """A small JSON document that is overwritten in place, so that a full file system cannot refuse it.

    The file is allocated once and has two halves. Each holds one line: a number, a checksum and a document. A write
    goes to the half that does not hold the newest document; a reader takes the newest line whose checksum is right. So
    if a process dies or reads in the middle of a write, the document is whole: the new one or the old one. One writer.
    """

    path: Path
    half_bytes: int

    def reserve(self, *, files: Files = DISK) -> None:
        """Allocate the file, unless it exists, so that `write` needs neither bytes nor an inode. Raises OSError."""
        files.close(files.reserve(self.path, 2 * self.half_bytes))

    def fits(self, value: Any) -> bool:
        return HEAD_BYTES + len(orjson.dumps(value)) <= self.half_bytes

    def write(self, value: Any, *, files: Files = DISK) -> None:
        """Replace the document. Raises OSError, and then it is unchanged."""
        if not self.fits(value):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(self.path))
        descriptor = files.reserve(self.path, 2 * self.half_bytes)
        try:
            number = self._newest()[0] + 1
            head, text = b"%d" % number, orjson.dumps(value)
            os.lseek(descriptor, number % 2 * self.half_bytes, os.SEEK_SET)
            files.write(descriptor, b"%s %s %s\n" % (head, _checksum(head, text), text))
        finally:
            files.close(descriptor)

    def read(self) -> Any:
        """Return the newest document, or None before the first one. Raises FileNotFoundError."""
        return orjson.loads(self._newest()[1])

    def n_writes(self) -> int:
        """Return how often the document was written; 0 without a file."""
        try:
            return self._newest()[0]
        except FileNotFoundError:
            return 0

    def _newest(self) -> tuple[int, bytes]:
        found = [(0, b"null")]
        with self.path.open("rb") as file:
            for start in (0, self.half_bytes):
                file.seek(start)
                head, _, rest = file.readline(self.half_bytes).removesuffix(b"\n").partition(b" ")
                checksum, _, text = rest.partition(b" ")
                if checksum == _checksum(head, text):
                    found.append((int(head), text))
        return max(found)


def _checksum(head: bytes, text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(head + b" " + text).encode()
