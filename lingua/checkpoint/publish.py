"""Publish, verify and delete checkpoints atomically: all readers see a checkpoint, or none does. Torch-free.

The mark appears last, after all bytes and names are on the disk and match the checksums that were computed from
memory. A published folder is never changed, only removed whole: its mark first, then its name. Each function may be
killed at any line; the next attempt's `open_staging_dir` finishes or removes what is left.

Stages:   incarnation-2/0000000004/model.00000.distcp ...   write_hashed, by every rank
          incarnation-2/0000000004/manifest.json            publish: sizes are checked, all is synced,
          incarnation-2/checkpoint_0000000004.done            the mark is ready (from here on nothing needs room),
          0000000004/                                       the folder gets its name
          checkpoint_0000000004.done                        and then its mark
          incarnation-5/checkpoint_0000000004.done.trash    retire: unmarked,
          incarnation-5/0000000004.trash/                   renamed, removed, the old mark last

Fence: whatever changes a checkpoint's names goes through the staging dir of the writer's own attempt. A newer attempt
renames that folder, empties it and removes it. If a writer of an older attempt then continues, even one that was
stopped between two lines, each of its renames lacks a source or a target: it can neither publish nor delete. Emptying
matters on NFS, where a client may still hold the folder's handle.
"""

from __future__ import annotations

import errno
import logging
import mmap
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orjson
import xxhash

from lingua.checkpoint import layout
from lingua.checkpoint.documents import MANIFEST_VERSION, ManifestDocument, MarkDocument, read_run_id
from lingua.checkpoint.verified import CHUNK_BYTES, VERIFY_THREADS, FileFacts, Manifest, differs, pieces_of
from lingua.config.base import judged
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
    is_short_of_inodes,
    naming,
    read_bytes,
    read_json,
    skip_page_cache,
    write_json,
    write_whole,
)

log = logging.getLogger(__name__)

M = TypeVar("M", ManifestDocument, MarkDocument)


class DamagedError(RunError):
    """A checkpoint that differs from what was written."""


class ForeignError(DamagedError):
    """A checkpoint of another run than the one that owns the folder."""


# -- writing -----------------------------------------------------------------------------------------------------


def write_hashed(
    path: Path, parts: Iterable[Buffer], *, direct_io: bool = False, readback: bool = False, files: Files = DISK
) -> FileFacts:
    """Write a file durably and hash what is written; with `readback` also read it again from the disk."""
    descriptor, facts = write_unsynced(path, parts, direct_io=direct_io, files=files)
    sync_written(descriptor, path, facts, readback=readback, files=files)
    return facts


def write_unsynced(
    path: Path, parts: Iterable[Buffer], *, direct_io: bool = False, files: Files = DISK
) -> tuple[int, FileFacts]:
    """Write a file and hash what is written; return its open descriptor for `sync_written`.

    `direct_io`: bypass the page cache for parts that are whole pages (`in_pages` makes them so).
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
    """Copy the bytes into chunks of whole pages, except for the last; a chunk is valid until the next is taken."""
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
        raise OSError(errno.EIO, f"the disk returned something else than was written ({problem})", str(path))


def manifest_bytes(step: int, attempt: int, facts: Manifest, run_id: str | None = None) -> bytes:
    """Return the text of `manifest.json`; equal facts of one run give equal bytes."""
    listed = {name: {"bytes": fact.size_bytes, "xxh3_128": fact.xxh3_128} for name, fact in sorted(facts.items())}
    document = {"version": MANIFEST_VERSION, "step": step, "incarnation": attempt, "run_id": run_id, "files": listed}
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def publish(
    root: Path,
    step: int,
    attempt: int,
    facts: Manifest,
    *,
    run_id: str | None = None,
    seconds: float = 0.0,
    files: Files = DISK,
) -> None:
    """Turn the complete staged folder of `step` into a checkpoint. Raises OSError, and then nothing is published.

    `facts`: of every file, from the ranks that wrote them; `run_id`: None for a copy, which is not bound to a run.
    """
    target, mark = layout.folder(root, step), layout.done_mark(root, step)
    source, draft = layout.coming(target, attempt), layout.coming(mark, attempt)
    for name, fact in facts.items():
        _must_be_there(source / name, fact)
    for half in source.glob(f".{layout.MANIFEST}.tmp-*"):  # a process of this attempt died here
        files.remove(half)
    manifest = manifest_bytes(step, attempt, facts, run_id)
    write_whole(source / layout.MANIFEST, manifest, files=files)  # syncs the folder too
    if target.exists() or target.is_symlink():  # a user's copy, or the remains of one set aside: not ours to delete
        log.warning("%s has no mark and is in the way of a new checkpoint; it is set aside", target)
        files.rename(target, layout.going(target, attempt, "unmarked"))
        files.rename(layout.going(target, attempt, "unmarked"), layout.aside(target, "unmarked"))
    facts_of_mark = {
        "version": MANIFEST_VERSION,
        "step": step,
        "incarnation": attempt,
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
    """Return an error that tells people what is wrong with the disk."""
    return DiskError.of(error, disk_sentence(error, root, needed_bytes))


def disk_sentence(error: OSError, root: Path, needed_bytes: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        try:
            n_free = free_bytes(root)
            free = human_bytes(n_free)
            # What was written is removed by now, so that a few inodes may be free again.
            if error.errno == errno.ENOSPC and n_free >= needed_bytes and is_short_of_inodes(root):
                return f"the disk has no inodes left at {root} (bytes: {free} free); remove files that nobody needs"
        except OSError:
            free = "unknown"
        return f"{reason} at {root} ({free} free, a checkpoint takes {human_bytes(needed_bytes)}); make room"
    return f"{error.filename or root}: {error.strerror or error}"


def abandon(root: Path, step: int, attempt: int, *, files: Files = DISK) -> None:
    """Remove what a failed write or publish has left, if the disk allows it. Never raises OSError."""
    target, mark = layout.folder(root, step), layout.done_mark(root, step)
    source, draft = layout.coming(target, attempt), layout.coming(mark, attempt)
    try:
        for is_ours in (mark, draft):  # without either, a folder of that name is not ours
            if is_ours.exists():
                _unmark_and_remove(root, step, is_ours, attempt, files)
        if source.exists():
            _remove_via_trash(source, layout.going(target, attempt), files)
    except OSError as error:
        log.warning("cannot clear what is left of step %d's failed checkpoint: %s", step, error)


# -- verifying ---------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Read sizes and checksums of a checkpoint folder's files. Raises DamagedError."""
    return _listed(read_manifest_document(folder))


def read_manifest_document(folder: Path) -> ManifestDocument:
    """Read the manifest of a checkpoint folder. Raises DamagedError."""
    return _parse(ManifestDocument, folder / layout.MANIFEST, _read(folder / layout.MANIFEST), "manifest")


def read_marked_manifest(root: Path, step: int) -> Manifest:
    """Read the manifest of a published checkpoint, and check that it, the mark and their paths agree.

    Raises DamagedError; ForeignError if another run saved the checkpoint.
    """
    mark_path, path = layout.done_mark(root, step), layout.folder(root, step) / layout.MANIFEST
    mark = _parse(MarkDocument, mark_path, _read(mark_path), "mark")
    content = _read(path)
    if mark.step != step or xxhash.xxh3_128_hexdigest(content) != mark.manifest_xxh3_128:
        raise DamagedError(f"{path} does not match the checksum in {mark_path.name}")
    manifest = _parse(ManifestDocument, path, content, "manifest")
    if (manifest.step, manifest.incarnation) != (step, mark.incarnation):
        there, here = (f"step {of.step} by attempt {of.incarnation}" for of in (manifest, mark))
        raise DamagedError(f"{path} is of {there}, but {mark_path.name} of {here}")
    if manifest.run_id is not None and (run_id := read_run_id(root)) not in (None, manifest.run_id):
        raise ForeignError(
            f"{path} is of the run {manifest.run_id}, but {root / layout.RUN_ID} says {run_id}; put that back, or "
            "begin a run of its own with checkpoint.init_ckpt_path"
        )
    return _listed(manifest)


def mark_facts(root: Path, step: int) -> dict[str, Any]:
    """Read a mark (step, incarnation, bytes, seconds, ...); empty if it is damaged."""
    path = layout.done_mark(root, step)
    try:
        return dict(_parse(MarkDocument, path, read_bytes(path), "mark"))
    except (OSError, DamagedError):
        return {}


def attempt_of(root: Path, step: int) -> int:
    """Return the attempt that published a step; 0 if its mark is damaged."""
    return mark_facts(root, step).get("incarnation", 0)


def _parse(model: type[M], path: Path, content: bytes, what: str) -> M:
    try:
        return judged(model, orjson.loads(content))
    except ValueError as error:  # of JSON too
        raise DamagedError(f"{path} is not a checkpoint's {what} ({error})") from None


def _listed(manifest: ManifestDocument) -> Manifest:
    return {name: FileFacts(file.bytes, file.xxh3_128) for name, file in manifest.files.items()}


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
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
    """Compare a checkpoint folder with its manifest, reading every byte in parallel; return a sentence per problem.

    `sizes_only`: compare only names and sizes. `advance` is called with the bytes read, from any thread. Raises OSError
    if a file cannot be read for reasons that do not show it is damaged (no permission, stale handle).
    """
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        found = pool.map(lambda item: _differs(folder / item[0], item[1], sizes_only, advance), sorted(facts.items()))
        return [problem for problem in found if problem]


def _differs(
    path: Path, fact: FileFacts, size_only: bool = False, advance: Callable[[int], object] = lambda n_bytes: None
) -> str | None:
    if not is_plain_file(path):
        return f"{path.name} is missing or not a plain file"
    if (size_bytes := path.stat().st_size) != fact.size_bytes:
        return fact.wrong_size(path.name, size_bytes)
    return None if size_only else differs(path.name, pieces_of(path), fact, lambda piece: advance(len(piece)))


# -- removing ---------------------------------------------------------------------------------------------------


def set_aside(run_dir: Path, root: Path, step: int, reason: str, *, files: Files = DISK) -> None:
    """Rename a published checkpoint and its evaluation out of the way; nothing is deleted.

    The evaluation is renamed first: if a crash left it, it would count for the next checkpoint of the step.
    """
    for path in (layout.evaluation(run_dir, step), layout.done_mark(root, step), layout.folder(root, step)):
        if path.exists() or path.is_symlink():
            files.rename(path, layout.aside(path, reason))
            files.fsync_dir(path.parent)


def retire(root: Path, step: int, attempt: int, *, files: Files = DISK) -> None:
    """Delete a published checkpoint for retention. Raises OSError."""
    _unmark_and_remove(root, step, layout.done_mark(root, step), attempt, files)


def open_staging_dir(root: Path, attempt: int, *, files: Files = DISK) -> None:
    """Close the staging dirs of earlier attempts, finishing or removing what they left, and open this one's.

    Call under the run's lock, before the first save. Raises OSError if this attempt's cannot be opened.
    """
    for number, staging_dir in layout.staging_dirs(root):
        if number > attempt:
            continue
        try:
            _close(root, staging_dir, files)
        except OSError as error:
            log.warning("cannot remove the leftover %s: %s", staging_dir, error)
    files.mkdir(layout.staging_dir(root, attempt))
    files.fsync_dir(root)
    for step in layout.unmarked_folders(root):
        log.warning("%s has no .done mark, so it is not a checkpoint; it is ignored", layout.folder(root, step))


def resume(root: Path, step: int, attempt: int, *, files: Files = DISK) -> None:
    """Finish the renames of a step that a killed process of this same attempt began. Raises OSError."""
    found = [t for t in layout.temporaries(layout.staging_dir(root, attempt)) if t.step == step]
    for temporary in sorted(found, key=lambda t: not t.is_mark):
        _finish(root, temporary, files)
    trash = layout.going(layout.folder(root, step), attempt)
    if trash.exists():
        files.remove_tree(trash)


def _close(root: Path, staging_dir: Path, files: Files) -> None:
    closed = staging_dir if staging_dir.suffix else staging_dir.with_name(f"{staging_dir.name}.closed")
    if staging_dir != closed:
        if closed.exists():
            _close(root, closed, files)
        files.rename(staging_dir, closed)
        files.fsync_dir(root)
    for attempt in range(3):
        found = layout.temporaries(closed)
        for temporary in sorted(found, key=lambda t: not t.is_mark):  # marks first: a folder is judged by its mark
            _finish(root, temporary, files)
        try:
            files.remove_tree(closed)  # including folders that are half written or half removed
            return
        except FileNotFoundError:  # another process is removing it too, or a late writer has moved something
            if not closed.exists():
                return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == 2:
                raise


def _finish(root: Path, found: layout.Temporary, files: Files) -> None:
    """Finish what a killed process began with one folder or mark in its staging dir."""
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
    else:  # only the last rename is missing: the checkpoint is complete
        files.rename(found.path, mark)
        files.fsync_dir(root)
        log.info("checkpoint %d of an earlier attempt lacked only its mark; now it has one", found.step)


def _unmark_and_remove(root: Path, step: int, mark: Path, attempt: int, files: Files) -> None:
    """Unmark a folder and remove it; the mark's new name lets `_finish` complete this after a crash."""
    folder, doomed = layout.folder(root, step), layout.going(layout.done_mark(root, step), attempt)
    if mark != doomed:
        files.rename(mark, doomed)
        files.fsync_dir(root)
    if folder.exists() or folder.is_symlink():  # of a link, whatever it leads to, only the link goes
        _remove_via_trash(folder, layout.going(folder, attempt), files)
    files.remove(doomed)


def _remove_via_trash(path: Path, trash: Path, files: Files) -> None:
    if path != trash:
        if trash.exists():
            files.remove_tree(trash)
        files.rename(path, trash)
    files.remove_tree(trash)


# -- pins --------------------------------------------------------------------------------------------------------


def pin(root: Path, step: int, reader: str, expires_at: float) -> Path:
    """Pin `step` until `expires_at` (seconds since the epoch) or until the returned file is removed.

    The reader must then check that the mark is still there. `reader` becomes part of a file name.
    """
    path = root / layout.PINS / f"{layout.step_name(step)}.{reader}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"step": step, "expires_at": expires_at})
    return path


def pinned_steps(root: Path, now: float) -> set[int]:
    """Return the steps with a lease that has not expired. Raises RunError or OSError for one that is unreadable."""
    steps: set[int] = set()
    for path in entries(root / layout.PINS):
        if path.suffix != ".json" or path.name.startswith("."):
            continue
        try:
            lease = read_json(path)
            step, expires_at = int(lease["step"]), float(lease["expires_at"])
        except FileNotFoundError:  # its reader has just ended
            continue
        except (KeyError, TypeError, ValueError):
            raise RunError(f"{path} is not a lease; remove it") from None
        if expires_at > now:
            steps.add(step)
    return steps
