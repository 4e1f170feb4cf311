"""A file is there whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from lingua.files import (
    BLOCK_BYTES,
    DISK,
    Files,
    ProcessLock,
    RunError,
    free_bytes,
    human_bytes,
    is_plain_file,
    is_short_of_inodes,
    make_folder,
    own_temporary,
    read_json,
    skip_page_cache,
    whole_folder,
    write_json,
    write_whole,
)
from tests.fakes import FaultyFiles, KillFiles
from tests.ranks import exit_code_of


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name has everything a name may have."""
    folder = tmp_path / "run 'one' \"two\"\n$HOME *"
    folder.mkdir()
    return folder


def test_write_whole(odd: Path) -> None:
    path = odd / "file.json"
    write_whole(path, "first")
    write_whole(path, memoryview(b"second"))
    assert path.read_bytes() == b"second"
    assert os.listdir(odd) == ["file.json"]


def test_modes_follow_the_umask_unless_given(odd: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(odd / "shared", "")
        write_whole(odd / "private", "", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((odd / "shared").stat().st_mode) == 0o640
    assert stat.S_IMODE((odd / "private").stat().st_mode) == 0o600


def test_old_or_new_at_every_failure_and_kill(odd: Path) -> None:
    path = odd / "file"
    counting = FaultyFiles()
    write_whole(path, "old", files=counting)
    for n in range(1, counting.n_done + 1):
        write_whole(path, "old")
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "new", files=FaultyFiles(n))
        assert path.read_text() in ("old", "new")
        assert os.listdir(odd) == ["file"]
    for n in range(1, counting.n_done + 1):
        write_whole(path, "old")
        assert exit_code_of(lambda n=n: write_whole(path, "new", files=KillFiles(n))) == KillFiles.KILLED
        assert path.read_text() in ("old", "new")


def test_a_disk_that_takes_a_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    write_whole(tmp_path / "file", b"0123456789")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def is_past_the_page_cache(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize(
    ("sizes", "stays"),
    [
        ([BLOCK_BYTES], True),
        ([3 * BLOCK_BYTES, BLOCK_BYTES], True),
        ([BLOCK_BYTES, 1], False),
        ([BLOCK_BYTES + 513, 7, 2 * BLOCK_BYTES], False),
        ([5], False),
        ([0], True),
    ],
)
def test_past_the_page_cache_every_byte_arrives(tmp_path: Path, sizes: list[int], stays: bool) -> None:
    descriptor = DISK.create(tmp_path / "file")
    skip_page_cache(descriptor)
    if not is_past_the_page_cache(descriptor):
        pytest.skip(f"the file system of {tmp_path} has a page cache only")
    whole = b""
    for size in sizes:
        pages = mmap.mmap(-1, size or 1)
        pages.write(os.urandom(size))
        DISK.write(descriptor, memoryview(pages)[:size])
        whole += pages[:size]
    assert is_past_the_page_cache(descriptor) is stays
    DISK.close(descriptor)
    assert (tmp_path / "file").read_bytes() == whole


def test_memory_between_pages_goes_through_the_page_cache(tmp_path: Path) -> None:
    descriptor = DISK.create(tmp_path / "file")
    skip_page_cache(descriptor)
    pages = mmap.mmap(-1, 2 * BLOCK_BYTES)
    pages.write(os.urandom(2 * BLOCK_BYTES))
    DISK.write(descriptor, memoryview(pages)[1 : 1 + BLOCK_BYTES])
    DISK.close(descriptor)
    assert (tmp_path / "file").read_bytes() == pages[1 : 1 + BLOCK_BYTES]


def test_a_file_system_without_another_way_has_its_page_cache(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, command: int, *value: int) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, *value)

    real = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    descriptor = DISK.create(shm / "file")
    skip_page_cache(descriptor)
    DISK.write(descriptor, b"x" * 5000)
    DISK.close(descriptor)
    assert (shm / "file").read_bytes() == b"x" * 5000


def test_a_write_that_is_wrong_for_another_reason_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        DISK.write(descriptor, b"x")
    os.close(descriptor)


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        DISK.create(tmp_path / "link")
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(OSError, match="symbolic link"):
        DISK.mkdir(tmp_path / "folder")
    write_whole(tmp_path / "link", "new")  # takes the link's place
    assert (tmp_path / "target").read_text() == "precious"
    assert is_plain_file(tmp_path / "link")


def test_json(odd: Path) -> None:
    write_json(odd / "a.json", {"a": [1, "ü"]})
    assert read_json(odd / "a.json") == {"a": [1, "ü"]}
    (odd / "b.json").write_text('{"a":')
    with pytest.raises(RunError, match=r"b\.json is not valid JSON"):
        read_json(odd / "b.json")


def test_remove_tree_keeps_what_links_point_at(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "precious" / "file")
    Files().remove_tree(tmp_path / "tree")
    assert os.listdir(tmp_path) == ["precious"]
    (tmp_path / "archived").symlink_to(tmp_path / "precious")
    Files().remove_tree(tmp_path / "archived")  # the top itself is a link: a checkpoint that was moved and linked back
    assert os.listdir(tmp_path) == ["precious"]
    assert os.listdir(tmp_path / "precious") == ["file"]


def test_a_folder_that_turns_into_a_link_while_a_tree_is_removed_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    for folder in ("tree", "tree/deep"):
        (tmp_path / folder / "file").write_text("")

    class Swapping(Files):
        """Somebody swaps the folder whose file is removed first for a link."""

        def remove(self, path: Path, folder: int | None = None) -> None:
            if not (tmp_path / "moved").exists():
                path.parent.rename(tmp_path / "moved")
                path.parent.symlink_to(tmp_path / "precious")
            super().remove(path, folder)

    with pytest.raises(OSError, match=str(tmp_path / "tree")):
        Swapping().remove_tree(tmp_path / "tree")
    assert os.listdir(tmp_path / "precious") == ["file"]


def test_planted_links_are_neither_written_through_nor_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("text")
    shared = tmp_path / "shared"
    shared.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    for pid in (os.getpid(), dead.pid):
        (shared / f".new.tmp-{host}-{pid}").symlink_to(precious)
        (shared / f".writable-{pid}").symlink_to(precious / "file")
    make_folder(shared, "dump_dir")
    with whole_folder(shared / "new") as folder:
        write_whole(folder / "a", "a")
    assert (precious / "file").read_text() == "text"
    assert os.listdir(shared / "new") == ["a"]


def test_temporary_files_of_dead_processes_go_and_those_of_others_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    gone = [tmp_path / f".new.tmp-{host}-{pid}" for pid in (dead.pid, os.getpid())]
    kept = [tmp_path / f".new.tmp-{host}-{os.getppid()}", tmp_path / f".new.tmp-elsewhere-{dead.pid}"]
    for path in (*gone, *kept):
        path.write_text("half")
    assert own_temporary(tmp_path / "new") == gone[1]
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_make_folder(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b", "dump_dir").is_dir()
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"^dump_dir: cannot write to .*file.c \(Not a directory\); choose another folder"
    ):
        make_folder(tmp_path / "file" / "c", "dump_dir")


def test_numbers(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet" / "there") > 0
    assert [human_bytes(n) for n in (0, 1023, 1536, 90e9, 2**41)] == ["0 B", "1023 B", "1.5 KiB", "83.8 GiB", "2.0 TiB"]


# -- locks ---------------------------------------------------------------------------------------------------------


def test_a_lock_is_for_one_process_or_for_all_that_share_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def others_can_take(*, shared: bool) -> bool:
        def act() -> None:
            assert ProcessLock(path).take(shared=shared)

        return exit_code_of(act) == 0

    lock = ProcessLock(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert others_can_take(shared=False)
    assert lock.take(shared=True)
    assert others_can_take(shared=True)
    assert not others_can_take(shared=False)
    assert lock.take()
    assert not others_can_take(shared=True)
    lock.release()
    assert others_can_take(shared=False)
    assert lock.take()
    lock.close()
    assert others_can_take(shared=False)


def test_who_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = ProcessLock(path)
    me = os.getpid()

    def asked_by_another(expected: int | None) -> bool:
        def act() -> None:
            assert ProcessLock(path).holder() == expected

        return exit_code_of(act) == 0

    assert asked_by_another(None)
    for shared in (True, False):
        assert lock.take(shared=shared)
        assert asked_by_another(me)
        assert asked_by_another(me), "asking takes nothing and frees nothing"
    assert lock.holder() is None, "of others"


def test_a_death_frees_a_lock_and_a_child_does_not_inherit_it(tmp_path: Path) -> None:
    lock = ProcessLock(tmp_path / "lock")

    def take_and_die() -> None:
        assert lock.take()
        os._exit(7)

    assert exit_code_of(take_and_die) == 7
    assert lock.take()

    def child() -> None:
        assert lock.holder() is not None
        assert not lock.take()

    assert exit_code_of(child) == 0


def test_a_lock_whose_file_was_replaced(tmp_path: Path) -> None:
    lock = ProcessLock(tmp_path / "lock")
    assert lock.is_current()
    (tmp_path / "lock").unlink()
    assert not lock.is_current()
    other = ProcessLock(tmp_path / "lock")
    assert other.is_current()
    assert not lock.is_current()
    (tmp_path / "link").symlink_to(tmp_path / "lock")
    with pytest.raises(OSError, match="symbolic link"):
        ProcessLock(tmp_path / "link")
    lock.close()
    other.close()


def test_a_folder_that_a_living_process_just_finished_is_nobody_s_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = tmp_path / f".new.tmp-{socket.gethostname()}-{os.getppid()}"
    monkeypatch.setattr("lingua.files.entries", lambda folder: iter([renamed]))
    with whole_folder(tmp_path / "new") as folder:
        assert folder.is_dir()


@pytest.mark.soak
def test_a_folder_is_there_whole_or_not_at_all(odd: Path) -> None:
    def make(files: Files) -> None:
        with whole_folder(odd / "above" / "new", files=files) as folder:
            for name in "ab":
                write_whole(folder / name, name, files=files)

    counting = FaultyFiles()
    make(counting)
    DISK.remove_tree(odd / "above")
    for n in range(1, counting.n_done + 1):
        assert exit_code_of(lambda n=n: make(KillFiles(n))) == KillFiles.KILLED
        if (odd / "above" / "new").exists():
            DISK.remove_tree(odd / "above" / "new")
        with pytest.raises(OSError, match="No space"):
            make(FaultyFiles(n))  # clears what the dead one left, and what it makes itself
        there = [path.name for path in (odd / "above").iterdir()]
        assert there in ([], ["new"])  # whole, but the folder above could not be synced
        for name in there:
            assert sorted(os.listdir(odd / "above" / name)) == ["a", "b"]
            DISK.remove_tree(odd / "above" / name)
    make(DISK)
    assert os.listdir(odd / "above") == ["new"]
    with pytest.raises(RunError, match="already exists; choose a new folder"):
        make(DISK)


@pytest.mark.parametrize(("n_files", "n_free", "short"), [(1000, 0, True), (1000, 500, False), (0, 0, False)])
def test_inodes_are_counted_where_the_file_system_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_files: int, n_free: int, short: bool
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=n_files, f_favail=n_free))
    assert is_short_of_inodes(tmp_path / "not" / "there") is short
