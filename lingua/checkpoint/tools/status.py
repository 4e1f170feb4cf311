"""What is there of a run's checkpoints, and whether one that is waited for can still come. Torch-free.

Promise: only looks: nothing is written, so a colleague's run may be looked at, and one that is being trained.
Cost: listings and the small files; of checkpoints only names and sizes are judged, `lingua ckpt verify` reads them.
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
"""How long after a run's end its checkpoint service may still publish what it has not begun to write."""
POLL_S = 5.0


# -- listing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pin:
    """A reader's lease."""

    path: Path
    step: int
    reader: str
    expires_at: float
    """Seconds since the epoch; 0 where it cannot be read."""


@dataclass(frozen=True)
class Published:
    """A checkpoint with a mark."""

    step: int
    kinds: list[str]
    """Of dump, eval, milestone; stop: of none, so the run ended or was stopped there. Empty: there is no config."""
    size_bytes: int
    created_at: float
    incarnation: int | None
    """The start that saved it; None where the mark cannot be read."""
    seconds: float | None
    """From the snapshot to the mark."""
    pinned_by: list[str]
    problems: list[str]
    """What names and sizes show to be wrong; empty says nothing about the content."""


@dataclass(frozen=True)
class Moving:
    """A folder on its way in or out, or one that was set aside."""

    path: Path
    step: int
    what: str
    """coming, trash, unmarked; or the reason why it was set aside."""
    size_bytes: int
    changed_at: float


@dataclass(frozen=True)
class Survey:
    """All that is there of a run's checkpoints."""

    run_dir: Path
    root: Path
    trained_by: str | None
    """The attempt that owns the run now; None: nobody."""
    published: list[Published]
    moving: list[Moving] = field(default_factory=list)
    set_aside: list[Moving] = field(default_factory=list)
    unmarked: list[int] = field(default_factory=list)
    """Folders with a final name and no mark: no checkpoints."""


def survey(run_dir: Path, now: Callable[[], float] = time.time) -> Survey:
    """Look at a run. Raises RunError when it is none."""
    root = run_root(run_dir)
    owner, periods = living_attempt(run_dir, now=now), frozen_periods(run_dir)
    args = periods[0] if periods else None
    pins = [pin for pin in leases(root) if pin.expires_at > now()]
    return Survey(
        run_dir,
        root,
        None if owner is None else str(owner),
        [found for step in layout.done_steps(root) if (found := _published(root, step, args, pins)) is not None],
        [found for _, passage in layout.passages(root) for found in moving(passage)],
        list(set_aside(root)),
        layout.unmarked_folders(root),
    )


def _published(root: Path, step: int, args: CheckpointArgs | None, pins: Collection[Pin]) -> Published | None:
    """None: retention was faster."""
    checkpoint = Checkpoint(layout.folder(root, step), root, step)
    try:
        mark = read_json(layout.done_mark(root, step))
        size_bytes, created_at = int(mark["bytes"]), float(mark["created_at"])
        incarnation, seconds = int(mark["incarnation"]), float(mark["seconds"])
    except FileNotFoundError:
        return None
    except (RunError, ValueError, KeyError, TypeError):  # what is wrong with it, its damage tells
        size_bytes, created_at = tree_facts(checkpoint.folder)
        incarnation, seconds = None, None
    try:
        problems = checkpoint.damage(sizes_only=True)
    except OSError as error:
        problems = [f"it cannot be looked at: {error}"]
    return Published(
        step,
        kinds(step, args) if args else [],
        size_bytes,
        created_at,
        incarnation,
        seconds,
        [pin.reader for pin in pins if pin.step == step],
        problems,
    )


def leases(root: Path) -> Iterator[Pin]:
    """All pins, run out or not; one that cannot be read is taken for run out."""
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


def moving(passage: Path) -> Iterator[Moving]:
    """Folders in a passage."""
    for found in layout.temporaries(passage):
        if not found.is_mark:
            yield Moving(found.path, found.step, found.kind, *tree_facts(found.path))


def set_aside(folder: Path) -> Iterator[Moving]:
    """What was set aside among the checkpoints, or among the evaluations."""
    for path in entries(folder):
        if parsed := layout.parse_aside(path.name):
            yield Moving(path, *parsed, *tree_facts(path))


def tree_facts(path: Path) -> tuple[int, float]:
    """(bytes, time of the newest change) of a file or a folder with all that is in it; links are not followed."""
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
    """Why a step will not be published, as far as can be told; None: it may still come.

    `stop`: stop.json of a run that has ended, and not just now.
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
    """Wait until a step is published; None: it is; otherwise why it is not. Raises RunError when there is no run."""
    began_s = now()
    while True:
        root = run_root(run_dir)
        done = layout.done_steps(root)  # a listing: NFS may remember for long that a single name was absent
        if step in done:
            return None
        is_coming = any(found.step == step for _, folder in layout.passages(root) for found in moving(folder))
        if reason := why_never(step, done, is_coming, _stop_of(run_dir, now())):
            return reason
        left_s = POLL_S if timeout_s is None else min(POLL_S, began_s + timeout_s - now())
        if left_s <= 0:
            return f"it is not published after {timeout_s:g} s; the run has {some_steps(done)}"
        sleep(left_s)


def _stop_of(run_dir: Path, now_s: float) -> Mapping[str, Any] | None:
    """How the run ended; None while it has not, or has only just."""
    path = run_dir / STOP_FILE
    try:
        settled = now_s - path.stat().st_mtime > SETTLE_S
        return read_json(path) if settled else None
    except FileNotFoundError:
        return None
