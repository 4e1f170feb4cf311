"""What is read of a file is what lies there, however the file system gives it, and little of it is in memory."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lingua.checkpoint import verified
from lingua.checkpoint.verified import BUFFERS, FileFacts, differs, pieces_of
from lingua.files import BLOCK_BYTES

PRead = Callable[[int, Sequence[memoryview], int], int]
CONTENT = os.urandom(10 * BLOCK_BYTES + 123)
SPANS = [(0, None), (0, 1), (1, 2), (BLOCK_BYTES - 1, 5 * BLOCK_BYTES + 1), (BLOCK_BYTES, 10**9), (10**9, None), (7, 7)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "CHUNK_BYTES", 2 * BLOCK_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


def read(path: Path, begin: int = 0, end: int | None = None, *, direct_io: bool = True) -> bytes:
    return b"".join(bytes(piece) for piece in pieces_of(path, begin, end, direct_io=direct_io))


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize(("begin", "end"), SPANS)
def test_it_is_what_lies_there(path: Path, begin: int, end: int | None, direct_io: bool) -> None:
    assert read(path, begin, end, direct_io=direct_io) == CONTENT[begin:end]


def refuses_direct(preadv: PRead) -> PRead:
    """A file system that takes the flag and then refuses, once for each thread that reads."""
    refused: set[int] = set()

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset not in refused:
            refused.add(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return preadv(descriptor, buffers, offset)

    return read


def gives_little(preadv: PRead) -> PRead:
    """A file system whose reads end within a block; then the next one is not aligned."""

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset % BLOCK_BYTES and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        n_read = preadv(descriptor, buffers, offset)
        return min(n_read, 1000)

    return read


@pytest.mark.parametrize("kind", [refuses_direct, gives_little])
def test_a_file_system_that_reads_in_its_own_way(
    path: Path, kind: Callable[[PRead], PRead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", kind(os.preadv))
    assert read(path) == CONTENT


def test_memory_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = list[int](), verified._buffer
    monkeypatch.setattr(verified, "_buffer", lambda n_bytes: made.append(n_bytes) or make(n_bytes))
    assert read(path) == CONTENT
    assert 0 < len(made) <= BUFFERS
    assert set(made) == {2 * BLOCK_BYTES}


def test_what_differs_is_said(path: Path) -> None:
    fact, seen = FileFacts.of(memoryview(CONTENT)), bytearray()
    assert differs("file", pieces_of(path), fact, seen.extend) is None
    assert seen == CONTENT
    path.write_bytes(CONTENT[:-1])
    assert differs("file", pieces_of(path), fact) == f"file has {len(CONTENT) - 1} bytes instead of {len(CONTENT)}"
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert differs("file", pieces_of(path), fact) == "file does not have the content it was written with"


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EINVAL])
def test_only_a_disk_that_has_lost_it_shows_damage(path: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "preadv", fail)
    fact = FileFacts.of(memoryview(CONTENT))
    if error == errno.EIO:
        assert differs("file", pieces_of(path), fact) == "file cannot be read (Input/output error)"
    else:
        with pytest.raises(OSError, match=os.strerror(error)) as caught:
            differs("file", pieces_of(path), fact)
        assert caught.value.filename == str(path)
