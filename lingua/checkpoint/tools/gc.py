"""Find and remove what is not needed any more among a run's checkpoints. Torch-free.

Finding writes nothing. Removing owns the run as an attempt does, so that no trainer can begin or continue meanwhile,
and finishes or removes what an older attempt left half done. Retention follows the run's config, and deletes only after
a newer checkpoint was read and verified. Memory in /dev/shm of this user's dead runs on this machine is freed too,
unless it holds a snapshot that the run's next attempt would save.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lingua.checkpoint import layout, pins, publish, retention
from lingua.checkpoint.lookup import Checkpoint, root_of, run_root
from lingua.checkpoint.shm.area import SERVICE_LOCK, SHM, TRAINER_LOCK, ServedRun, ShmArea, base
from lingua.checkpoint.shm.drain import BEAT_S, busy_writers
from lingua.checkpoint.shm.moved import left_behind
from lingua.checkpoint.tools.status import leases, moving, set_aside, tree_facts
from lingua.config.base import ConfigError
from lingua.config.frozen import read_frozen
from lingua.files import DISK, Files, RunError, entries
from lingua.run.lock import Owner, RunLock, living_attempt, run_in, this_process
from lingua.run.place import why_not_ours
from lingua.scheduler import this_job

log = logging.getLogger(__name__)

SILENT_S = 4 * BEAT_S
"""A checkpoint service on another machine whose heartbeat is older than this is considered dead."""


@dataclass(frozen=True)
class Garbage:
    """Something that can be removed."""

    path: Path
    why: str
    size_bytes: int
    remove: Callable[[], None] | None
    """None if opening our staging dir removes it."""


def survey_garbage(
    run_dir: Path, attempt: int = 0, *, now: Callable[[], float] = time.time, files: Files = DISK
) -> list[Garbage]:
    """List all that can be removed. `attempt`: the number of the one that would remove it."""
    root = run_root(run_dir)
    return [
        *_leftovers(root),
        *(_tree(found.path, f"set aside: {found.what}", files) for found in set_aside(root)),
        *(_tree(found.path, f"set aside: {found.what}", files) for found in set_aside(run_dir / layout.EVALS)),
        *_given_up(run_dir, root, attempt, now(), files),
        *(_tree(pin.path, "an expired pin", files) for pin in leases(root) if pin.expires_at <= now()),
        *_memory(run_dir, files),
    ]


def _tree(path: Path, why: str, files: Files) -> Garbage:
    remove = files.remove_tree if path.is_dir() and not path.is_symlink() else files.remove
    return Garbage(path, why, tree_facts(path)[0], partial(remove, path))


def _leftovers(root: Path) -> Iterator[Garbage]:
    """List what earlier attempts have left in their staging dirs."""
    why = {"coming": "half written", "trash": "half removed", "unmarked": "not a checkpoint, will be set aside"}
    for number, staging_dir in layout.staging_dirs(root):
        for found in moving(staging_dir):
            yield Garbage(found.path, f"{why[found.what]} (attempt {number})", found.size_bytes, None)
        for mark in layout.temporaries(staging_dir):
            if mark.is_mark and mark.kind == "coming" and mark.step in layout.unmarked_folders(root):
                yield Garbage(mark.path, f"complete except for its mark (attempt {number}), will be published", 0, None)


def _given_up(run_dir: Path, root: Path, attempt: int, now_s: float, files: Files) -> Iterator[Garbage]:
    """List what retention would delete by the run's config, given the newest checkpoint that verifies."""
    found, done = retention.frozen_periods(run_dir), layout.done_steps(root)
    if found is None:
        return
    args, _ = found
    held = pins.held_steps(run_dir, root, now_s)

    def decide(verified: list[int]) -> list[int]:
        return retention.to_delete(done, args, verified=verified, pinned=held.steps)

    if not decide(done[-1:]):
        return
    for step in decide(_newest_intact(root, done)):
        size_bytes, _ = tree_facts(layout.folder(root, step))
        remove = partial(publish.retire, root, step, attempt, files=files)
        yield Garbage(layout.folder(root, step), "retention", size_bytes, remove)


def _memory(run_dir: Path, files: Files) -> Iterator[Garbage]:
    """List memory of this user's dead runs on this machine, except snapshots that a next attempt would save."""
    shm = ((read_frozen(run_dir) or {}).get("checkpoint") or {}).get("shm_path")
    own = Path(os.path.realpath(run_root(run_dir)))
    ours, newest = ServedRun(publish.read_run_id(own) or "", run_dir, own, 0), max(layout.done_steps(own), default=-1)
    for folder in entries(base(Path(shm or SHM))):
        area = ShmArea(folder)
        if folder.is_symlink() or not folder.is_dir() or _is_held(area) or left_behind(area, ours, newest):
            continue
        try:
            owner = Path(area.session.read()["run_dir"])
        except (OSError, TypeError, KeyError):
            owner = Path("unknown")
        root = owner / layout.CHECKPOINTS
        with suppress(ConfigError):  # another run's config is not ours to judge
            root = root_of(owner)
        unsaved = {found[0].step for slot in area.slots() if (found := slot.complete())}
        if not owner.is_dir() or unsaved <= set(layout.done_steps(root)):
            size_bytes = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
            yield Garbage(folder, f"memory of {owner}", size_bytes, partial(area.remove, files=files))


def _is_held(area: ShmArea) -> bool:
    for name in (TRAINER_LOCK, SERVICE_LOCK):
        if (area.folder / name).exists():
            lock = area.lock(name)
            try:
                if lock.holder() is not None:
                    return True
            finally:
                lock.close()
    return False


def _newest_intact(root: Path, done: list[int]) -> list[int]:
    """Return the newest step that verifies. Raises RunError if none does: a person must look first."""
    for step in reversed(done):
        checkpoint = Checkpoint(layout.folder(root, step), root, step)
        log.info("reading %s: older ones are deleted only if it is intact", checkpoint)
        if not (problems := checkpoint.damage()):
            return [step]
        log.warning("%s does not verify: %s", checkpoint, "; ".join(problems))
    raise RunError(f"no checkpoint in {root} verifies, so nothing is removed; check the disk")


def why_not_now(run_dir: Path, now: Callable[[], float] = time.time) -> str | None:
    """Return why nothing may be removed now, or None. Only reads."""
    if owner := living_attempt(run_dir, now=now):
        return f"{run_dir} is being trained by {owner}; stop that one first"
    for path, (beat, alive) in busy_writers(run_root(run_dir), sys.maxsize, _me()).items():
        if alive or now() - beat < SILENT_S:
            return f"{run_dir} is not being trained, but its checkpoint service still writes {path.name}; wait for it"
    return why_not_ours(run_root(run_dir), run_in(run_dir))


def _me() -> Owner:
    return this_process(*this_job(os.environ))


def remove_garbage(
    run_dir: Path,
    announce: Callable[[list[Garbage]], None],
    *,
    now: Callable[[], float] = time.time,
    files: Files = DISK,
) -> int:
    """Remove all that can be removed, after `announce`; return the bytes freed. Raises RunError, OccupiedError."""
    root = run_root(run_dir)
    if reason := why_not_now(run_dir, now):
        raise RunError(reason)
    with RunLock(run_dir, _me()) as lock:
        root.mkdir(parents=True, exist_ok=True)  # of a run that never saved
        items = survey_garbage(run_dir, lock.attempt, now=now, files=files)
        announce(items)
        publish.open_staging_dir(root, lock.attempt, files=files)
        for item in items:
            lock.check()
            if item.remove is not None:
                item.remove()
        files.rmdir(layout.staging_dir(root, lock.attempt))
    return sum(item.size_bytes for item in items)
