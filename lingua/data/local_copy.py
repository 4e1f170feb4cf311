"""`data.stage_to`: copy the sources once per machine to a fast folder, such as /dev/shm, and read them there.

The rows are the same as without it. One process of a machine copies, the others wait for it. Only a complete copy is
used; an existing one, of a crashed attempt or another run, is reused. The last process to end normally removes it; the
next start removes what killed ones left. Other users cannot read it.
Cost: the bytes of the sources, which in /dev/shm are memory; free space is checked first. One pass of reading.

    <stage_to>/lingua-<uid>/          mode 0700
        lock                          held by the process that copies or removes
        data-<key>/<number>/...       a source's files; key: hash of their paths, sizes, times, first and last bytes
        data-<key>/users              locked by each process that uses it; the kernel releases the lock
        data-<key>/complete           written last: boot id, since after a crash of the machine files may be incomplete
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from lingua.config.keys.data import DataArgs, SourceArgs, SyntheticArgs
from lingua.data.blocked_source import edges
from lingua.data.held_out import held_out_file
from lingua.data.sources import check_manifests, source_class
from lingua.files import DiskError, RunError, free_bytes, human_bytes, make_folder

log = logging.getLogger(__name__)

_SPARE_BYTES = 64 << 20  # left free for other users of /dev/shm


class StagedFile(NamedTuple):
    """A file to copy."""

    path: Path
    source: str  # the source's number
    size: int


@contextlib.contextmanager
def staged(args: DataArgs) -> Iterator[DataArgs]:
    """Yield the args with the sources in the fast folder, for the duration of the block; unchanged without `stage_to`.

    Raises RunError if there is no space or the folder is not ours, DataError or ConfigError for bad sources.
    """
    if args.stage_to is None:
        yield args
        return
    check_manifests(args)
    files = list(_files(args))
    root = _own_folder(Path(args.stage_to))
    folder = root / f"data-{_key(files)}"
    with _locked(root):
        _reclaim(root, keep=folder)
        if not _is_complete(folder, files):
            _copy(folder, files, args.stage_to)
        users = _lock(folder / "users", fcntl.LOCK_SH)
    try:
        yield _moved(args, folder)
    finally:
        os.close(users)
        with _locked(root):
            _remove_unused(folder)


def _moved(args: DataArgs, folder: Path) -> DataArgs:
    sources: list[SourceArgs | SyntheticArgs] = []
    for number, source in enumerate(args.read_sources()):
        if isinstance(source, SyntheticArgs):
            sources.append(source)
            continue
        path, copy = Path(source.path), folder / f"{number:03d}"
        sources.append(source.model_copy(update={"path": str(copy if path.is_dir() else copy / path.name)}))
    changes: dict[str, Any] = {"sources": [s for s in sources if s.weight], "root_dir": None, "stage_to": None}
    return args.model_copy(update={**changes, "resting": [s for s in sources if not s.weight]})


def _files(args: DataArgs) -> Iterator[StagedFile]:
    """Yield the files that are read, their side files and held-out files."""
    for number, source in enumerate(args.read_sources()):
        if isinstance(source, SyntheticArgs):
            continue
        path, kind = Path(source.path), source_class(source.format)
        files = kind.find_files(path)
        held_out = held_out_file(path)
        for file in [*files, *kind.side_files(files), *([held_out] if held_out else [])]:
            yield StagedFile(file, f"{number:03d}", file.stat().st_size)


def _key(files: list[StagedFile]) -> str:
    hasher = xxhash.xxh3_64()
    for path, source, size in files:
        facts = (str(path.resolve()), source, size, path.stat().st_mtime_ns, edges(path, size))
        hasher.update(repr(facts).encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()


def _own_folder(stage_to: Path) -> Path:
    """Make <stage_to>/lingua-<uid>, ensure that nobody else owns or can write to it, and return it."""
    root = make_folder(stage_to, "data.stage_to") / f"lingua-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    facts = root.lstat()
    if root.is_symlink() or not root.is_dir() or facts.st_uid != os.getuid():
        raise RunError(f"data.stage_to: {root} belongs to another user; choose another folder")
    root.chmod(0o700)
    return root


# -- copying -------------------------------------------------------------------------------------------------------


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_complete(folder: Path, files: list[StagedFile]) -> bool:
    try:
        if (folder / "complete").read_text() != _boot_id():
            return False
        return all((folder / source / path.name).stat().st_size == size for path, source, size in files)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _copy(folder: Path, files: list[StagedFile], stage_to: str) -> None:
    _remove(folder)
    total = sum(file.size for file in files)
    free = free_bytes(folder)
    if total + _SPARE_BYTES > free:
        raise RunError(
            f"data.stage_to: {stage_to} has {human_bytes(free)} free and the sources take {human_bytes(total)}; "
            "choose another folder, or set data.stage_to=null to read them in place"
        )
    log.info("copying %s of data to %s", human_bytes(total), folder)
    try:
        folder.mkdir(mode=0o700)
        for path, source, size in files:
            (folder / source).mkdir(exist_ok=True)
            target = folder / source / path.name
            shutil.copyfile(path, target)
            if target.stat().st_size != size or edges(target, size) != edges(path, size):
                raise RunError(f"{path}: changed while it was copied to {target}; it must not change during a run")
        (folder / "users").touch()
        (folder / "complete").write_text(_boot_id())
    except OSError as error:
        _remove(folder)
        text = f"data.stage_to: cannot copy to {folder} ({error.strerror}); choose another folder"
        raise DiskError.of(error, text) from error
    log.info("copied the data to %s", folder)


# -- locks and removal ---------------------------------------------------------------------------------------------


def _lock(path: Path, how: int) -> int:
    """Return a locked descriptor. Raises BlockingIOError with LOCK_NB if another process holds the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock for copying and removing."""
    try:
        descriptor = _lock(root / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process that copies to or removes from %s", root)
        descriptor = _lock(root / "lock", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _reclaim(root: Path, keep: Path) -> None:
    """Remove copies that killed processes left."""
    for folder in root.glob("data-*"):
        if folder != keep:
            _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    """Remove a folder that no living process uses; the caller holds the lock."""
    try:
        users = _lock(folder / "users", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return
    os.close(users)
    _remove(folder)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            (folder / "complete").unlink()
        shutil.rmtree(folder, ignore_errors=True)
