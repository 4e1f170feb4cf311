"""What of a run's checkpoints nobody needs any more, and its removal. Torch-free.

Promise: looking writes nothing. Removing owns the run meanwhile, as a start of its own: no trainer can begin or go on
beside it, and whatever an older start left half done is finished or cleared as a trainer would. What retention gives
up, it gives up by the run's own config, and only beside a checkpoint that was read and verifies.
Memory in /dev/shm of this user's dead runs on this machine goes too, unless it holds a snapshot that only the run's
next start can save.
Cost: where retention would delete something, the newest checkpoint is read once.
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
from lingua.checkpoint.shm.area import SERVICE_LOCK, SHM, TRAINER_LOCK, Region, base
from lingua.checkpoint.shm.drain import BEAT_S, busy_writers
from lingua.checkpoint.tools.status import leases, moving, set_aside, tree_facts
from lingua.config.base import ConfigError
from lingua.config.frozen import read_frozen
from lingua.files import DISK, Files, RunError, entries
from lingua.run.lock import Owner, RunLock, living_attempt, this_process
from lingua.slurm import this_job

log = logging.getLogger(__name__)

SILENT_S = 4 * BEAT_S
"""A checkpoint service on another machine that has not shown itself for so long is taken for dead."""


@dataclass(frozen=True)
class Item:
    """Something that can go."""

    path: Path
    why: str
    size_bytes: int
    remove: Callable[[], None] | None
    """None: it goes when a passage is opened for the one who removes."""


def survey_garbage(
    run_dir: Path, incarnation: int = 0, *, now: Callable[[], float] = time.time, files: Files = DISK
) -> list[Item]:
    """All that can go. `incarnation`: the start on whose behalf it would be removed."""
    root = run_root(run_dir)
    return [
        *_leftovers(root),
        *(_tree(found.path, f"set aside: {found.what}", files) for found in set_aside(root)),
        *(_tree(found.path, f"set aside: {found.what}", files) for found in set_aside(run_dir / layout.EVALS)),
        *_given_up(run_dir, root, incarnation, now(), files),
        *(_tree(pin.path, "a pin that has run out", files) for pin in leases(root) if pin.expires_at <= now()),
        *_memory(run_dir, files),
    ]


def _tree(path: Path, why: str, files: Files) -> Item:
    remove = files.remove_tree if path.is_dir() and not path.is_symlink() else files.remove
    return Item(path, why, tree_facts(path)[0], partial(remove, path))


def _leftovers(root: Path) -> Iterator[Item]:
    """What earlier starts have left in their passages."""
    why = {"coming": "half written", "trash": "half removed", "unmarked": "no checkpoint, will be set aside"}
    for number, passage in layout.passages(root):
        for found in moving(passage):
            yield Item(found.path, f"{why[found.what]} (start {number})", found.size_bytes, None)
        for mark in layout.temporaries(passage):
            if mark.is_mark and mark.kind == "coming" and mark.step in layout.unmarked_folders(root):
                yield Item(mark.path, f"complete but for its mark (start {number}), will be published", 0, None)


def _given_up(run_dir: Path, root: Path, incarnation: int, now_s: float, files: Files) -> Iterator[Item]:
    """What retention would delete by the run's config, beside the newest checkpoint that verifies."""
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
        remove = partial(publish.retire, root, step, incarnation, files=files)
        yield Item(layout.folder(root, step), "retention", size_bytes, remove)


def _memory(run_dir: Path, files: Files) -> Iterator[Item]:
    """Memory of this machine that this user's dead runs hold. What a run's next attempt would still save stays."""
    shm = ((read_frozen(run_dir) or {}).get("checkpoint") or {}).get("shm_path")
    for folder in entries(base(Path(shm or SHM))):
        region = Region(folder)
        if folder.is_symlink() or not folder.is_dir() or _is_held(region):
            continue
        try:
            owner = Path(region.session.read()["run_dir"])
        except (OSError, TypeError, KeyError):
            owner = Path("unknown")
        root = owner / layout.CHECKPOINTS
        with suppress(ConfigError):  # another run's config is none of our business
            root = root_of(owner)
        unsaved = {found[0].step for slot in region.slots() if (found := slot.complete())}
        if not owner.is_dir() or unsaved <= set(layout.done_steps(root)):
            size_bytes = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
            yield Item(folder, f"memory of {owner}", size_bytes, partial(region.remove, files=files))


def _is_held(region: Region) -> bool:
    """Return whether a rank or a service lives in an area."""
    for name in (TRAINER_LOCK, SERVICE_LOCK):
        if (region.folder / name).exists():
            lock = region.lock(name)
            try:
                if lock.holder() is not None:
                    return True
            finally:
                lock.close()
    return False


def _newest_intact(root: Path, done: list[int]) -> list[int]:
    """The newest step that verifies. Raises RunError when none does: until a person has looked, all stay."""
    for step in reversed(done):
        checkpoint = Checkpoint(layout.folder(root, step), root, step)
        log.info("reading %s: older ones are given up only if it is intact", checkpoint)
        if not (problems := checkpoint.damage()):
            return [step]
        log.warning("%s does not verify: %s", checkpoint, "; ".join(problems))
    raise RunError(f"no checkpoint in {root} verifies, so nothing is removed; look at the disk")


def why_not_now(run_dir: Path, now: Callable[[], float] = time.time) -> str | None:
    """Why nothing may be removed at this moment; None: it may. Only reads."""
    if owner := living_attempt(run_dir, now=now):
        return f"{run_dir} is being trained by {owner}; stop that one first"
    for path, (beat, alive) in busy_writers(run_root(run_dir), sys.maxsize, _me()).items():
        if alive or now() - beat < SILENT_S:
            return f"{run_dir} is not being trained, but its checkpoint service still writes {path.name}; wait for it"
    return None


def _me() -> Owner:
    return this_process(*this_job(os.environ))


def remove_garbage(
    run_dir: Path,
    said: Callable[[list[Item]], None],
    *,
    now: Callable[[], float] = time.time,
    files: Files = DISK,
) -> int:
    """Remove all that can go; `said` hears of it first. Returns the bytes freed. Raises RunError, OccupiedError."""
    root = run_root(run_dir)
    if reason := why_not_now(run_dir, now):
        raise RunError(reason)
    with RunLock(run_dir, _me()) as lock:
        root.mkdir(parents=True, exist_ok=True)  # of a run that never saved
        items = survey_garbage(run_dir, lock.attempt, now=now, files=files)
        said(items)
        publish.open_passage(root, lock.attempt, files=files)
        for item in items:
            lock.check()
            if item.remove is not None:
                item.remove()
        files.rmdir(layout.passage(root, lock.attempt))
    return sum(item.size_bytes for item in items)
