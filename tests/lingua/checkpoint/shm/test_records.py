"""Records: whole or as before, whoever dies, fails or reads in the middle; and they never need room."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lingua.checkpoint.shm.area import HEAD_BYTES, Record
from tests.fakes import FaultyFiles, KillFiles
from tests.slotted import killed

HALF_BYTES = 4096


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "record", HALF_BYTES)


def test_what_was_written_last_is_read(record: Record) -> None:
    with pytest.raises(FileNotFoundError):
        record.read()
    record.reserve()
    assert record.read() is None
    for value in (
        {"step": 1},
        {"step": 2, "why": 'a line\nand "another"'},
        [3],
        None,
        {"step": 4, "long": "x" * 3000},
        5,
    ):
        record.write(value)
        record.reserve()
        assert record.read() == value
        assert Record(record.path, HALF_BYTES).read() == value


def test_a_write_takes_no_new_file_and_no_more_bytes(record: Record) -> None:
    record.reserve()
    before = record.path.stat()
    files = FaultyFiles()
    for n in range(5):
        record.write({"n": n, "long": "x" * 3000}, files=files)
    after = record.path.stat()
    assert {line.split()[0] for line in files.log} == {"reserve", "write", "close"}
    assert os.listdir(record.path.parent) == ["record"]
    assert (before.st_ino, before.st_size, before.st_blocks) == (after.st_ino, after.st_size, after.st_blocks)
    assert after.st_blocks * 512 >= 2 * HALF_BYTES


@pytest.mark.parametrize("n_written", [0, 1, 2, 3])
def test_killed_or_failing_in_a_write_it_is_as_before_or_as_after(record: Record, n_written: int) -> None:
    record.reserve()
    before = None
    for n in range(n_written):
        record.write(before := {"n": n, "long": "x" * 1000})
    after = {"n": 99, "long": "y" * 2000}
    for n, expected in ((1, before), (2, before), (3, after)):  # reserve, write, close
        assert killed(lambda n=n: record.write(after, files=KillFiles(n)))
        assert record.read() == expected
        record.write(before)
        with pytest.raises(OSError, match="Input/output error"):
            record.write(after, files=FaultyFiles(n, error=errno.EIO))
        assert record.read() == expected
        record.write(before)
        assert record.read() == before


def test_after_any_part_of_a_write_the_document_before_is_read(record: Record) -> None:
    for value in (1, 2, "longer than the first"):
        record.write(value)
    after = record.path.read_bytes()
    begin = 3 % 2 * HALF_BYTES
    end = after.index(b"\n", begin) + 1
    record.path.unlink()
    for value in (1, 2):
        record.write(value)
    for n_bytes in range(end - begin + 1):
        with record.path.open("r+b") as file:
            file.seek(begin)
            file.write(after[begin : begin + n_bytes])
        assert record.read() == ("longer than the first" if begin + n_bytes == end else 2)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"step": 1}\n', b"\0" * 100, b"1 \n", b"1 x {}\n", b"\n\n", os.urandom(9000)]
)
def test_what_is_no_record_says_nothing(record: Record, content: bytes) -> None:
    record.path.write_bytes(content)
    assert record.read() is None
    record.write({"step": 1})
    assert record.read() == {"step": 1}


def test_what_is_too_long_is_refused(record: Record) -> None:
    record.write(1)
    longest = "x" * (HALF_BYTES - HEAD_BYTES - 2)
    assert record.fits(longest)
    with pytest.raises(OSError, match=r"File too large: .*record"):
        record.write(longest + "x")
    assert record.read() == 1
    record.write(longest)
    assert record.read() == longest


def test_without_room_at_first_the_file_is_named(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*record"):
        record.reserve()


def test_a_reader_beside_a_writer_sees_whole_documents_in_order(record: Record) -> None:
    record.write([0, ""])

    def write() -> None:
        for n in range(1, 500):
            record.write([n, chr(97 + n % 26) * (n % 1500)])

    pid = os.fork()
    if pid == 0:
        try:
            write()
        finally:
            os._exit(0)
    seen, gone = 0, 0
    while not gone:
        gone = os.waitpid(pid, os.WNOHANG)[0]
        found = record.read()
        if found is not None:  # lapped twice within one read
            n, text = found
            assert n >= seen
            assert text == chr(97 + n % 26) * (n % 1500)
            seen = n
    assert record.read()[0] == 499
