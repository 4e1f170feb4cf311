"""List a run's checkpoints, and wait for one that is not published yet. Torch-free.

Writes nothing, so it works on a colleague's run and on one that is being trained. Only names and sizes of checkpoint
files are checked; `lingua ckpt verify` reads them.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingua.checkpoint import layout
from lingua.checkpoint.lookup import Checkpoint, run_root, some_steps
from lingua.checkpoint.retention import frozen_periods, kinds
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.files import RunError, entries, read_json
from lingua.run.folder import EXIT_REQUEUE, STOP_FILE
from lingua.run.lock import living_attempt

SETTLE_S = 60.0
"""How long after a run's end its checkpoint service may still begin to write a checkpoint."""
POLL_S = 5.0


# -- listing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pin:
    """A reader's lease."""

    path: Path
    step: int
    reader: str
    expires_at: float
    """Seconds since the epoch; 0 if unreadable."""


@dataclass(frozen=True)
class Published:
    """A checkpoint with a mark."""

    step: int
    kinds: list[str]
    """dump, eval, milestone; else stop: the run ended or was stopped there. Empty without a config."""
    size_bytes: int
    created_at: float
    incarnation: int | None
    """The attempt that saved it; None if the mark is unreadable."""
    seconds: float | None
    """From the snapshot to the mark."""
    pinned_by: list[str]
    problems: list[str]
    """Problems that names and sizes show; the content is not checked."""


@dataclass(frozen=True)
class Moving:
    """A folder in a staging dir, or one that was set aside."""

    path: Path
    step: int
    what: str
    """coming, trash, unmarked, or the reason why it was set aside."""
    size_bytes: int
    changed_at: float


@dataclass(frozen=True)
class Survey:
    """A run's checkpoints, and the other content of their folder."""

    run_dir: Path
    root: Path
    trained_by: str | None
    """The attempt that owns the run now, or None."""
    published: list[Published]
    moving: list[Moving] = field(default_factory=list)
    set_aside: list[Moving] = field(default_factory=list)
    unmarked: list[int] = field(default_factory=list)
    """Folders with a final name but no mark, which are not checkpoints."""


def survey(run_dir: Path, now: Callable[[], float] = time.time) -> Survey:
    """List a run's checkpoints. Raises RunError if it is not a run."""
    root = run_root(run_dir)
    owner, periods = living_attempt(run_dir, now=now), frozen_periods(run_dir)
    args = periods[0] if periods else None
    pins = [pin for pin in leases(root) if pin.expires_at > now()]
    return Survey(
        run_dir,
        root,
        None if owner is None else str(owner),
        [found for step in layout.done_steps(root) if (found := _published(root, step, args, pins)) is not None],
        [found for _, staging_dir in layout.staging_dirs(root) for found in moving(staging_dir)],
        list(set_aside(root)),
        layout.unmarked_folders(root),
    )


def _published(root: Path, step: int, args: CheckpointArgs | None, pins: Collection[Pin]) -> Published | None:
    """Describe a published step, or return None if retention has just deleted it."""
    checkpoint = Checkpoint(layout.folder(root, step), root, step)
    try:
        mark = read_json(layout.done_mark(root, step))
        size_bytes, created_at = int(mark["bytes"]), float(mark["created_at"])
        attempt, seconds = int(mark["incarnation"]), float(mark["seconds"])
    except FileNotFoundError:
        return None
    except (RunError, ValueError, KeyError, TypeError):  # `damage` reports what is wrong with it
        size_bytes, created_at = tree_facts(checkpoint.folder)
        attempt, seconds = None, None
    try:
        problems = checkpoint.damage(sizes_only=True)
    except OSError as error:
        problems = [f"it cannot be read: {error}"]
    return Published(
        step,
        kinds(step, args) if args else [],
        size_bytes,
        created_at,
        attempt,
        seconds,
        [pin.reader for pin in pins if pin.step == step],
        problems,
    )


def leases(root: Path) -> Iterator[Pin]:
    """Yield all pins, expired or not; an unreadable one counts as expired."""
    for path in entries(root / layout.PINS):
        name, _, reader = path.name.removesuffix(".json").partition(".")
        if path.suffix != ".json" or not name:
            continue
        try:
            lease = read_json(path)
            step, expires_at = int(lease["step"]), float(lease["expires_at"])
        except (RunError, KeyError, TypeError, ValueError):
            step, expires_at = -1, 0.0
        yield Pin(path, step, reader, expires_at)


def moving(staging_dir: Path) -> Iterator[Moving]:
    """Yield the folders in a staging dir."""
    for found in layout.temporaries(staging_dir):
        if not found.is_mark:
            yield Moving(found.path, found.step, found.kind, *tree_facts(found.path))


def set_aside(folder: Path) -> Iterator[Moving]:
    """Yield what was set aside among the checkpoints, or among the evaluations."""
    for path in entries(folder):
        if parsed := layout.parse_aside(path.name):
            yield Moving(path, *parsed, *tree_facts(path))


def tree_facts(path: Path) -> tuple[int, float]:
    """Return (bytes, time of the newest change) of a file or a whole folder; links are not followed."""
    size_bytes, changed_at = 0, 0.0
    inside = [os.path.join(folder, name) for folder, folders, files in os.walk(path) for name in (*folders, *files)]
    for name in (path, *inside):
        with suppress(FileNotFoundError):  # it is just being removed
            facts = os.lstat(name)
            size_bytes += 0 if stat.S_ISDIR(facts.st_mode) else facts.st_size
            changed_at = max(changed_at, facts.st_mtime)
    return size_bytes, changed_at


# -- waiting -------------------------------------------------------------------------------------------------------


def why_never(step: int, done: Collection[int], is_coming: bool, stop: Mapping[str, Any] | None) -> str | None:
    """Return why a step will never be published, as far as is known, or None if it may still come.

    `stop`: stop.json of a run that ended more than SETTLE_S ago.
    """
    newest = max(done, default=None)
    if is_coming:
        return None
    if newest is not None and newest > step:
        return f"the run has published later steps and not this one: it has {some_steps(sorted(done))}"
    if stop is not None and stop.get("exit_code") != EXIT_REQUEUE:
        reason, last = stop.get("reason", "unknown"), stop.get("step")
        there = f"its newest checkpoint is {newest}" if newest is not None else "it has no checkpoint"
        return f"the run has ended ({reason}{'' if last is None else f', step {last}'}), and {there}"
    return None


def await_done(
    run_dir: Path,
    step: int,
    timeout_s: float | None = None,
    *,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> str | None:
    """Wait until a step is published; return None, or why it is not. Raises RunError if there is no run."""
    began_s = now()
    while True:
        root = run_root(run_dir)
        done = layout.done_steps(root)  # a listing: NFS may cache for long that a single name was absent
        if step in done:
            return None
        is_coming = any(found.step == step for _, folder in layout.staging_dirs(root) for found in moving(folder))
        if reason := why_never(step, done, is_coming, _stop_of(run_dir, now())):
            return reason
        left_s = POLL_S if timeout_s is None else min(POLL_S, began_s + timeout_s - now())
        if left_s <= 0:
            return f"it is not published after {timeout_s:g} s; the run has {some_steps(done)}"
        sleep(left_s)


def _stop_of(run_dir: Path, now_s: float) -> Mapping[str, Any] | None:
    """Return how the run ended, or None if it has not or only just has."""
    path = run_dir / STOP_FILE
    try:
        settled = now_s - path.stat().st_mtime > SETTLE_S
        return read_json(path) if settled else None
    except FileNotFoundError:
        return None
