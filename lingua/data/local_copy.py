"""`data.stage_to`: the sources copied once per machine to a fast folder, /dev/shm say, and read there.

Promise: the same rows as without it. One process of a machine copies, the others wait for it. A copy is used only when
it is complete; one that is there already, from a crash of the same run or from a neighbour, is used again. The last
user that ends in good order removes it; what dead users left is removed by the next start. Others cannot read it.
Cost: the bytes of the sources, which in /dev/shm are memory; space is checked before. One pass of reading.

    <stage_to>/lingua-<uid>/          mode 0700
        lock                          held by whoever copies or removes
        data-<key>/<number>/...       a source's files; key: of the files' paths, sizes, times, first and last bytes
        data-<key>/users              locked by each user as long as it lives; the kernel knows who is dead
        data-<key>/complete           written last: boot id (what the disk of a machine that went down holds is unsure)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from lingua.config.keys.data import DataArgs, SourceArgs
from lingua.data.blocked_source import edges
from lingua.data.held_out import held_out_file
from lingua.data.sources import check_manifests, source_class
from lingua.files import DiskError, RunError, free_bytes, human_bytes, make_folder

log = logging.getLogger(__name__)

_SPARE_BYTES = 64 << 20  # left free: other users of /dev/shm need some


class StagedFile(NamedTuple):
    """A file to copy."""

    path: Path
    source: str  # its number
    size: int


@contextlib.contextmanager
def staged(args: DataArgs) -> Iterator[DataArgs]:
    """The args with the sources at their fast place, as long as the context lasts; unchanged without `stage_to`.

    Raises RunError where there is no space or the folder is not ours, DataError or ConfigError for bad sources.
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
    sources: list[SourceArgs] = []
    for number, source in enumerate(args.read_sources()):
        path, place = Path(source.path), folder / f"{number:03d}"
        sources.append(source.model_copy(update={"path": str(place if path.is_dir() else place / path.name)}))
    return args.model_copy(update={"sources": sources, "root_dir": None})


def _files(args: DataArgs) -> Iterator[StagedFile]:
    """The files that are read, with what is used beside them."""
    for number, source in enumerate(args.read_sources()):
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
    """<stage_to>/lingua-<uid>, which nobody else can write to or has put there."""
    root = make_folder(stage_to, "data.stage_to") / f"lingua-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    facts = root.lstat()
    if root.is_symlink() or not root.is_dir() or facts.st_uid != os.getuid():
        raise RunError(f"data.stage_to: {root} belongs to somebody else; choose another folder")
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
            "choose another folder, or data.stage_to=null to read them where they are"
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
    """A locked descriptor. Raises BlockingIOError where LOCK_NB is asked for and somebody holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """The right to change what is staged."""
    try:
        descriptor = _lock(root / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process that changes what is in %s", root)
        descriptor = _lock(root / "lock", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _reclaim(root: Path, keep: Path) -> None:
    """Remove what dead users left."""
    for folder in root.glob("data-*"):
        if folder != keep:
            _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    """Remove a folder that no living process uses. Call with the lock."""
    try:
        users = _lock(folder / "users", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return
    except BlockingIOError:
        return
    os.close(users)
    _remove(folder)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            (folder / "complete").unlink()
        shutil.rmtree(folder, ignore_errors=True)
