"""How a checkpoint comes to exist for everyone, or for no one. Torch-free; whoever writes checkpoints does it by this.

Promise: the mark appears last, after every byte and every name is on the disk and agrees with the checksums that
were taken from memory. A published folder is never changed, only taken away whole: its mark first, then its name.
Each function may be killed at any line; the next start's `open_passage` finishes or clears what that leaves.
Cost: one fsync per file, a few of folders, and the hash, which runs at memory speed.

A life:   incarnation-2/0000000004/model.00000.distcp ...   write_hashed, by every rank
          incarnation-2/0000000004/manifest.json            publish: sizes are checked, all is synced,
          incarnation-2/checkpoint_0000000004.done            the mark lies ready (from here on nothing needs room),
          0000000004/                                       the folder gets its name
          checkpoint_0000000004.done                        and then its mark
          incarnation-5/checkpoint_0000000004.done.trash    retire: unmarked,
          incarnation-5/0000000004.trash/                   renamed, removed, the old mark last

Fence: whatever changes a checkpoint's names goes through the folder of the writer's own incarnation. A newer start
renames that folder, empties it and removes it. Where a writer of an older start goes on afterwards, also one that was
frozen between two lines, each of its renames lacks a source or a target: it can neither publish nor delete. Emptying
counts on NFS, where a client may still hold the folder by its handle.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from lingua.checkpoint import layout
from lingua.files import (
    DISK,
    Buffer,
    DiskError,
    Files,
    RunError,
    entries,
    free_bytes,
    human_bytes,
    is_plain_file,
    naming,
    read_json,
    skip_page_cache,
    write_json,
    write_whole,
)

log = logging.getLogger(__name__)

VERSION = 1
CHUNK_BYTES = 16 << 20  # past the page cache a disk is fastest with large writes: 16 MiB gave 1.8 GB/s, 4 MiB 1.55
VERIFY_THREADS = min(8, os.cpu_count() or 1)


class DamagedError(RunError):
    """A checkpoint that is not what it was when it was written."""


@dataclass(frozen=True)
class FileFacts:
    """What a file must be: taken from memory, before the disk had a say."""

    size_bytes: int
    xxh3_128: str


Manifest = dict[str, FileFacts]


# -- writing -----------------------------------------------------------------------------------------------------


def write_hashed(
    path: Path, parts: Iterable[Buffer], *, direct_io: bool = False, readback: bool = False, files: Files = DISK
) -> FileFacts:
    """Write a file durably and hash what goes in; `readback` also reads it again, past the page cache."""
    descriptor, facts = write_unsynced(path, parts, direct_io=direct_io, files=files)
    sync_written(descriptor, path, facts, readback=readback, files=files)
    return facts


def write_unsynced(
    path: Path, parts: Iterable[Buffer], *, direct_io: bool = False, files: Files = DISK
) -> tuple[int, FileFacts]:
    """Write a file and hash what goes in; returns its open descriptor for `sync_written`.

    `direct_io`: past the page cache, as far as parts are whole pages (`in_pages` makes them so).
    """
    digest, size_bytes = xxhash.xxh3_128(), 0
    descriptor = files.create(path)
    try:
        if direct_io:
            skip_page_cache(descriptor)
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                digest.update(chunk)
                with naming(path):
                    files.write(descriptor, chunk)
            size_bytes += len(view)
    except BaseException:
        files.close(descriptor)
        raise
    return descriptor, FileFacts(size_bytes, digest.hexdigest())


def in_pages(parts: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes in pieces of whole pages, but for the last; each holds until the next is asked for.

    Cost: one copy in memory, and CHUNK_BYTES of it.
    """
    with memoryview(mmap.mmap(-1, CHUNK_BYTES)) as buffer:
        n_filled = 0
        for part in parts:
            view = memoryview(part).cast("B")
            while len(view):
                n_taken = min(len(view), CHUNK_BYTES - n_filled)
                buffer[n_filled : n_filled + n_taken] = view[:n_taken]
                view = view[n_taken:]
                n_filled += n_taken
                if n_filled == CHUNK_BYTES:
                    yield buffer
                    n_filled = 0
        if n_filled:
            yield buffer[:n_filled]


def sync_written(descriptor: int, path: Path, facts: FileFacts, *, readback: bool = False, files: Files = DISK) -> None:
    """Make a written file durable and close it."""
    try:
        with naming(path):
            files.fsync(descriptor)
    finally:
        files.close(descriptor)
    if readback and (problem := _differs(path, facts)):
        raise OSError(errno.EIO, f"the disk gave back something else than was written ({problem})", str(path))


def manifest_bytes(step: int, incarnation: int, facts: Manifest) -> bytes:
    """The text of `manifest.json`; equal facts give equal bytes."""
    listed = {name: {"bytes": fact.size_bytes, "xxh3_128": fact.xxh3_128} for name, fact in sorted(facts.items())}
    document = {"version": VERSION, "step": step, "incarnation": incarnation, "files": listed}
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def publish(
    root: Path, step: int, incarnation: int, facts: Manifest, *, seconds: float = 0.0, files: Files = DISK
) -> None:
    """Turn the complete temporary folder of `step` into a checkpoint. Raises OSError, and then nothing is published.

    `facts` are those of every file, from the ranks that wrote them.
    """
    target, mark = layout.folder(root, step), layout.done_mark(root, step)
    source, draft = layout.coming(target, incarnation), layout.coming(mark, incarnation)
    for name, fact in facts.items():
        _must_be_there(source / name, fact)
    for half in source.glob(f".{layout.MANIFEST}.tmp-*"):  # a process of this start died here
        files.remove(half)
    manifest = manifest_bytes(step, incarnation, facts)
    write_whole(source / layout.MANIFEST, manifest, files=files)  # syncs the folder too
    if target.exists():  # somebody's copy, or what is left of one set aside: not ours to delete
        log.warning("%s has no mark and stands in the way of a new checkpoint; it is set aside", target)
        files.rename(target, layout.going(target, incarnation, "unmarked"))
        files.rename(layout.going(target, incarnation, "unmarked"), layout.aside(target, "unmarked"))
    facts_of_mark = {
        "version": VERSION,
        "step": step,
        "incarnation": incarnation,
        "manifest_xxh3_128": xxhash.xxh3_128_hexdigest(manifest),
        "bytes": sum(fact.size_bytes for fact in facts.values()) + len(manifest),
        "seconds": round(seconds, 3),
        "created_at": time.time(),
    }
    write_json(draft, facts_of_mark, files=files)
    files.rename(source, target)
    files.fsync_dir(root)
    files.rename(draft, mark)
    files.fsync_dir(root)


def _must_be_there(path: Path, fact: FileFacts) -> None:
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise OSError(
            errno.ENOENT,
            "a rank wrote this file but rank 0 does not see it; is the run folder on a shared disk?",
            str(path),
        ) from None
    if size_bytes != fact.size_bytes:
        raise OSError(errno.EIO, f"the file has {size_bytes} bytes, {fact.size_bytes} were written", str(path))


def disk_error(error: OSError, root: Path, needed_bytes: int) -> DiskError:
    """What is wrong with the disk, for people."""
    return DiskError.of(error, disk_sentence(error, root, needed_bytes))


def disk_sentence(error: OSError, root: Path, needed_bytes: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        try:
            free = human_bytes(free_bytes(root))
        except OSError:
            free = "unknown"
        return f"{reason} at {root} ({free} free, a checkpoint takes {human_bytes(needed_bytes)}); make room"
    return f"{error.filename or root}: {error.strerror or error}"


def abandon(root: Path, step: int, incarnation: int, *, files: Files = DISK) -> None:
    """After a failed write or publish: leave nothing of it, as far as the disk lets us. Never raises."""
    target, mark = layout.folder(root, step), layout.done_mark(root, step)
    source, draft = layout.coming(target, incarnation), layout.coming(mark, incarnation)
    try:
        for is_ours in (mark, draft):  # without either, a folder of that name is not ours
            if is_ours.exists():
                _take_away(root, step, is_ours, incarnation, files)
        if source.exists():
            _throw_away(source, layout.going(target, incarnation), files)
    except OSError as error:
        log.warning("cannot clear what is left of step %d's failed checkpoint: %s", step, error)


# -- judging -----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The facts a checkpoint folder states about itself. Raises DamagedError."""
    return _parse_manifest(folder, _read(folder / layout.MANIFEST))


def read_marked_manifest(root: Path, step: int) -> Manifest:
    """The facts of a published checkpoint, whose mark vouches for the manifest. Raises DamagedError."""
    mark_path, folder = layout.done_mark(root, step), layout.folder(root, step)
    try:
        mark = orjson.loads(_read(mark_path))
        expected = mark["manifest_xxh3_128"]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        raise DamagedError(f"{mark_path} is not a checkpoint's mark") from None
    content = _read(folder / layout.MANIFEST)
    if mark.get("step") != step or xxhash.xxh3_128_hexdigest(content) != expected:
        raise DamagedError(f"{folder / layout.MANIFEST} is not the one that {mark_path.name} vouches for")
    return _parse_manifest(folder, content)


def mark_facts(root: Path, step: int) -> dict[str, Any]:
    """What a mark says (step, incarnation, bytes, seconds, ...); nothing where it is damaged."""
    try:
        facts = orjson.loads(layout.done_mark(root, step).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return facts if isinstance(facts, dict) else {}


def incarnation_of(root: Path, step: int) -> int:
    """Which start published a step; 0 where its mark is damaged."""
    return mark_facts(root, step).get("incarnation", 0)


def _parse_manifest(folder: Path, content: bytes) -> Manifest:
    try:
        listed = orjson.loads(content)["files"]
        facts = {name: FileFacts(int(fact["bytes"]), str(fact["xxh3_128"])) for name, fact in listed.items()}
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
        raise DamagedError(f"{folder / layout.MANIFEST} is not a checkpoint's manifest") from None
    if bad := [name for name in facts if name != Path(name).name or name in ("", ".", "..")]:
        raise DamagedError(f"{folder / layout.MANIFEST} names {bad[0]!r}, which is no file of the folder")
    return facts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path} is missing") from None


def damage(
    folder: Path,
    facts: Manifest,
    *,
    sizes_only: bool = False,
    threads: int = VERIFY_THREADS,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> list[str]:
    """What of a checkpoint folder does not agree with its manifest, a sentence each; reads every byte, in parallel.

    `sizes_only`: looks at names and sizes, and reads nothing. `advance` hears of the bytes read, in any thread.
    Raises OSError when a file cannot be judged (no permission, stale handle): that says nothing about its content.
    """
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        found = pool.map(lambda item: _differs(folder / item[0], item[1], sizes_only, advance), sorted(facts.items()))
        return [problem for problem in found if problem]


def _differs(
    path: Path, fact: FileFacts, size_only: bool = False, advance: Callable[[int], object] = lambda n_bytes: None
) -> str | None:
    if not is_plain_file(path):
        return f"{path.name} is missing or not a plain file"
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes != fact.size_bytes:
                return f"{path.name} has {size_bytes} bytes instead of {fact.size_bytes}"
            if size_only:
                return None
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            buffer = bytearray(min(CHUNK_BYTES, size_bytes))
            while n_read := file.readinto(buffer):
                digest.update(memoryview(buffer)[:n_read])
                advance(n_read)
    except OSError as error:
        if error.errno == errno.EIO:
            return f"{path.name} cannot be read ({error.strerror})"
        raise
    return None if digest.hexdigest() == fact.xxh3_128 else f"{path.name} does not have the content it was written with"


# -- taking away -------------------------------------------------------------------------------------------------


def set_aside(run_dir: Path, root: Path, step: int, reason: str, *, files: Files = DISK) -> None:
    """Take a published checkpoint and its evaluation out of sight; nothing is deleted.

    The evaluation first: were it left by a crash, it would pass for one of the step's next checkpoint.
    """
    for path in (layout.evaluation(run_dir, step), layout.done_mark(root, step), layout.folder(root, step)):
        if path.exists() or path.is_symlink():
            files.rename(path, layout.aside(path, reason))
            files.fsync_dir(path.parent)


def retire(root: Path, step: int, incarnation: int, *, files: Files = DISK) -> None:
    """Delete a published checkpoint that retention gives up. Raises OSError."""
    _take_away(root, step, layout.done_mark(root, step), incarnation, files)


def open_passage(root: Path, incarnation: int, *, files: Files = DISK) -> None:
    """Close the passages of earlier starts, finishing or clearing what they left half done, and open this one's.

    Call under the run's lock, before the first save. Raises OSError when this start's cannot be opened.
    """
    for number, passage in layout.passages(root):
        if number > incarnation:
            continue
        try:
            _close(root, passage, files)
        except OSError as error:
            log.warning("cannot remove the leftover %s: %s", passage, error)
    files.mkdir(layout.passage(root, incarnation))
    files.fsync_dir(root)
    for step in layout.unmarked_folders(root):
        log.warning("%s has no .done mark, so it is not a checkpoint; it is ignored", layout.folder(root, step))


def resume(root: Path, step: int, incarnation: int, *, files: Files = DISK) -> None:
    """Finish what a killed process of this very start has left half done with the names of a step. Raises OSError."""
    found = [t for t in layout.temporaries(layout.passage(root, incarnation)) if t.step == step]
    for temporary in sorted(found, key=lambda t: not t.is_mark):
        _finish(root, temporary, files)
    trash = layout.going(layout.folder(root, step), incarnation)
    if trash.exists():
        files.remove_tree(trash)


def _close(root: Path, passage: Path, files: Files) -> None:
    closed = passage if passage.suffix else passage.with_name(f"{passage.name}.closed")
    if passage != closed:
        if closed.exists():
            _close(root, closed, files)
        files.rename(passage, closed)
        files.fsync_dir(root)
    for attempt in range(3):
        found = layout.temporaries(closed)
        for temporary in sorted(found, key=lambda t: not t.is_mark):  # marks first: they say what a folder is
            _finish(root, temporary, files)
        try:
            files.remove_tree(closed)  # with it goes what else lay there: folders half written or half removed
            return
        except FileNotFoundError:  # somebody removes it too, or a late writer has moved something
            if not closed.exists():
                return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == 2:
                raise


def _finish(root: Path, found: layout.Temporary, files: Files) -> None:
    """Do what is still to be done for one thing that a killed process left in its passage."""
    folder, mark = layout.folder(root, found.step), layout.done_mark(root, found.step)
    if not found.is_mark:
        if found.kind == "unmarked":
            files.rename(found.path, layout.aside(folder, "unmarked"))
    elif mark.exists() or not folder.exists():
        files.remove(found.path)
    elif found.kind == "trash":  # unmarked, but not removed
        trash = found.path.with_name(f"{folder.name}.trash")
        if trash.exists():
            files.remove_tree(trash)
        files.rename(folder, trash)
    else:  # all was on the disk but the last rename: the checkpoint is complete
        files.rename(found.path, mark)
        files.fsync_dir(root)
        log.info("checkpoint %d of an earlier start was complete but for its mark; now it has one", found.step)


def _take_away(root: Path, step: int, mark: Path, incarnation: int, files: Files) -> None:
    """Unmark a folder and remove it; the mark's new name tells `_finish` that it may finish this."""
    folder, doomed = layout.folder(root, step), layout.going(layout.done_mark(root, step), incarnation)
    if mark != doomed:
        files.rename(mark, doomed)
        files.fsync_dir(root)
    if folder.exists():
        _throw_away(folder, layout.going(folder, incarnation), files)
    files.remove(doomed)


def _throw_away(path: Path, trash: Path, files: Files) -> None:
    if path != trash:
        if trash.exists():
            files.remove_tree(trash)
        files.rename(path, trash)
    files.remove_tree(trash)


# -- pins --------------------------------------------------------------------------------------------------------


def pin(root: Path, step: int, reader: str, expires_at: float) -> Path:
    """Keep retention from `step` until `expires_at` (seconds since the epoch) or until the returned file is removed.

    The reader then looks whether the mark is still there. `reader` becomes part of a file name.
    """
    path = root / layout.PINS / f"{layout.step_name(step)}.{reader}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"step": step, "expires_at": expires_at})
    return path


def pinned_steps(root: Path, now: float) -> set[int]:
    """Steps with a lease that has not run out. Raises RunError or OSError for a lease that cannot be read."""
    steps: set[int] = set()
    for path in entries(root / layout.PINS):
        if path.suffix != ".json" or path.name.startswith("."):
            continue
        lease: Any = read_json(path)
        if not isinstance(lease, dict) or not isinstance(lease.get("step"), int):
            raise RunError(f"{path} is not a lease; remove it")
        if float(lease.get("expires_at", 0)) > now:
            steps.add(lease["step"])
    return steps
