"""Atomic file operations that survive a crash.

When `write_whole` returns, the file is on disk under its final name, folder entry included; until then the name has the
old content or does not exist. Nothing here follows a symbolic link in the last part of a path that it writes or
deletes. Each file and each folder costs one fsync: milliseconds on a local disk, tens of milliseconds on a shared one.

Checkpoints change the disk only through `Files`; tests replace its operations to fail or die at each one in turn.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

Buffer = bytes | bytearray | memoryview
BLOCK_BYTES = mmap.PAGESIZE
"""Alignment that O_DIRECT needs: pages on Lustre, disk blocks on local file systems."""


class ConfigError(ValueError):
    """A config error that its author can fix. `problems` holds one complete sentence per finding."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunError(RuntimeError):
    """A problem outside the program that its user can fix. The message is one sentence with the remedy."""


class CommandError(RunError):
    """Something that a command names does not exist, or exists already: the command is wrong."""


_FULL = (errno.ENOSPC, errno.EDQUOT)
_TO_MEND = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOSYS, errno.EOPNOTSUPP,  # a file system that lacks the operation lacks it next time too
)  # fmt: skip


class DiskError(RunError):
    """An OSError as a sentence. It keeps the errno and the path, also when pickled for other ranks."""

    def __init__(self, message: str, number: int | None = None, path: str | None = None) -> None:
        super().__init__(message)
        self.errno, self.path = number, path

    @classmethod
    def of(cls, error: OSError, message: str | None = None) -> DiskError:
        path = error.filename
        return cls(message or str(error), error.errno, None if path is None else os.fsdecode(path))

    @property
    def kind(self) -> str:
        """The kind of failure (`run.failure`): a full or wrong disk needs a person, others may be transient."""
        if self.errno in _FULL:
            return "disk_full"
        return "setup" if self.errno in _TO_MEND else "disk"

    @property
    def may_pass(self) -> bool:
        return self.kind == "disk"


class Files:
    """The operations that change a disk. Each either happens or raises OSError."""

    def create(self, path: Path) -> int:
        """Open a new or emptied file for writing and return its descriptor."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)  # the umask decides, as for every file of a run folder

    def reserve(self, path: Path, n_bytes: int) -> int:
        """Open a file to overwrite in place and return its descriptor. Space for its first `n_bytes` is allocated."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size < n_bytes:
                with naming(path):
                    os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def write(self, descriptor: int, data: Buffer) -> None:
        """Write all of `data`, repeating short writes."""
        view = memoryview(data).cast("B")
        while len(view):
            whole_bytes = len(view) // BLOCK_BYTES * BLOCK_BYTES or len(view)
            try:
                view = view[os.write(descriptor, view[:whole_bytes]) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not use_page_cache(descriptor):
                    raise

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def mkdir(self, path: Path) -> None:
        """Make a folder in an existing one. Accepts an existing folder, but not a link to one."""
        path.mkdir(exist_ok=True)
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))

    def fsync_dir(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, atomically, also on NFS. Fails if the name is taken."""
        os.link(source, target)

    def remove(self, path: Path, folder: int | None = None) -> None:
        """Remove a file or link. `folder`: descriptor of its parent, if the parent's path cannot be trusted."""
        with naming(path, always=True):
            os.unlink(path if folder is None else path.name, dir_fd=folder)

    def rmdir(self, path: Path, folder: int | None = None) -> None:
        """Remove an empty folder. `folder`: as in `remove`."""
        with naming(path, always=True):
            os.rmdir(path if folder is None else path.name, dir_fd=folder)

    def remove_tree(self, path: Path, parent: int | None = None) -> None:
        """Remove a folder and its contents, one operation at a time. Links, also `path` itself, are not followed."""
        name = path if parent is None else path.name
        if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            self.remove(path, parent)
            return
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            with os.scandir(folder) as entries:
                inside = [(path / entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for child, is_folder in inside:
                (self.remove_tree if is_folder else self.remove)(child, folder)
        finally:
            os.close(folder)
        self.rmdir(path, parent)


DISK = Files()


def no_follow(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=no_follow)`, but not through a link with its name."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def remove_leftover(path: Path, *, files: Files = DISK) -> None:
    """Remove a file, link or folder that a dead process or somebody else left under this name, if there is one."""
    with suppress(FileNotFoundError):
        (files.remove_tree if stat.S_ISDIR(path.lstat().st_mode) else files.remove)(path)


def own_temporary(path: Path, *, files: Files = DISK) -> Path:
    """Return this process's temporary name beside `path`; remove those of dead processes of this machine."""
    begin = f".{path.name}.tmp-{socket.gethostname()}-"
    for left in entries(path.parent):
        pid = left.name.removeprefix(begin)
        is_left = left.name.startswith(begin) and pid.isdecimal() and not Path("/proc", pid).exists()
        with suppress(FileNotFoundError):  # a living process may have just renamed its own, or removed this one too
            if is_left and left.lstat().st_uid == os.geteuid():
                remove_leftover(left, files=files)
    temporary = path.with_name(f"{begin}{os.getpid()}")
    remove_leftover(temporary, files=files)  # of a dead process that had our pid
    return temporary


def skip_page_cache(descriptor: int) -> None:
    """Bypass the page cache for aligned whole blocks from now on (O_DIRECT, open(2)).

    Other data, and all data on a file system without O_DIRECT, still goes through the page cache.
    """
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)


def use_page_cache(descriptor: int) -> bool:
    """End `skip_page_cache`; return False if it was not on."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)


@contextmanager
def naming(path: Path, *, always: bool = False) -> Iterator[None]:
    """Add the file's path to an OSError raised here that has none, or `always`."""
    try:
        yield
    except OSError as error:
        if always or error.filename is None:
            error.filename = str(path)
        raise


def make_folders(path: Path, *, files: Files = DISK) -> None:
    """Make a folder and its missing parents."""
    if not path.parent.exists():
        make_folders(path.parent, files=files)
    files.mkdir(path)


def write_whole(path: Path, data: Buffer | str, mode: int | None = None, *, files: Files = DISK) -> None:
    """Write a file atomically: temporary name, fsync, rename, fsync of the folder.

    `mode`: permission bits; None leaves them to the umask.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        descriptor = files.create(temporary)
        try:
            with naming(path):
                if mode is not None:
                    os.fchmod(descriptor, mode)
                files.write(descriptor, content)
                files.fsync(descriptor)
        finally:
            files.close(descriptor)
        files.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    files.fsync_dir(path.parent)


def write_reserved(room: Path, path: Path, data: bytes) -> None:
    """Write into `room`, whose bytes are allocated, and rename it to `path`: a full disk cannot refuse that."""
    descriptor = os.open(room, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        DISK.write(descriptor, data)
        os.ftruncate(descriptor, len(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(room, path)


def write_json(path: Path, value: Any, *, files: Files = DISK) -> None:
    """Write an indented JSON document with `write_whole`."""
    write_whole(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE), files=files)


def read_bytes(path: Path) -> bytes:
    """Return a file's content. Every OSError names the file, even one from reading."""
    with naming(path):
        return path.read_bytes()


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises OSError, or RunError with the file's name if it is not JSON."""
    try:
        return orjson.loads(read_bytes(path))
    except orjson.JSONDecodeError as error:
        raise RunError(f"{path} is not valid JSON ({error}); it is damaged or was edited") from None


def json_object_in(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if it is missing or damaged."""
    with suppress(OSError, RunError):
        record = read_json(path)
        return record if isinstance(record, dict) else None
    return None


@contextmanager
def whole_folder(path: Path, *, files: Files = DISK) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` at the end of the block, or remove it on an error.

    Its files must be durable when the block ends. Leftovers of killed processes of this machine are removed. Raises
    CommandError if `path` exists, RunError if another process creates it meanwhile.
    """
    path = path.absolute()
    if path.exists() or path.is_symlink():
        raise CommandError(f"{path} already exists; choose a new folder, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = own_temporary(path, files=files)
    files.mkdir(temporary)
    try:
        yield temporary
        files.fsync_dir(temporary)
        try:
            files.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise RunError(f"another process created {path} meanwhile; choose a new folder") from error
    except BaseException:
        if temporary.exists():
            files.remove_tree(temporary)
        raise
    files.fsync_dir(path.parent)


def free_bytes(path: Path) -> int:
    """Return the free bytes for this user on the file system of `path` (existing or not). Quotas are not visible."""
    return shutil.disk_usage(_existing(path)).free


def is_short_of_inodes(path: Path) -> bool:
    """Return whether the file system of `path` (existing or not) has almost no inodes left."""
    facts = os.statvfs(_existing(path))
    return 0 <= facts.f_favail < 64 and facts.f_files > 0  # some file systems do not count them


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def make_folder(path: Path, what: str) -> Path:
    """Ensure that `path` is a writable folder. Raises RunError, which names the setting `what`, if it is not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # without a name that others could have planted
    except OSError as error:
        raise DiskError.of(
            error, f"{what}: cannot write to {path} ({error.strerror}); choose another folder or fix its permissions"
        ) from None
    return path


def is_plain_file(path: Path) -> bool:
    """Return whether `path` is a regular file and not a link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def entries(folder: Path) -> Iterator[Path]:
    """Yield a folder's entries by name; none if there is no folder."""
    try:
        yield from sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return


def plural(n: int, one: str, many: str = "") -> str:
    """Count things: (1, "file") -> "1 file", (2000, "file") -> "2,000 files"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def human_bytes(n_bytes: float) -> str:
    """Format a size: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


class ProcessLock:
    """A file lock that a process holds until it dies; children do not inherit it (fcntl(2), record locks).

    Open each path only once per process: closing any descriptor of the file releases the lock.
    """

    _FLOCK = struct.Struct("hhqqi")  # struct flock of 64-bit Linux: type, whence, start, length, pid

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)

    def take(self, *, shared: bool = False) -> bool:
        """Try to take the lock; return whether this process holds it."""
        try:
            fcntl.lockf(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def holder(self) -> int | None:
        """Return the pid of another process that holds the lock, or None. Does not take the lock."""
        asked = self._FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = self._FLOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else pid

    def is_current(self) -> bool:
        """Return whether the path still leads to the opened file."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.lstat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)


def raise_if(error: RunError | None) -> None:
    if error is not None:
        raise error
