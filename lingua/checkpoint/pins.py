"""What retention must leave alone for others: pins of readers, and what a run's evaluator has yet to judge. Torch-free.

Promise: nothing is held for ever. A pin runs out unless its reader renews it, and one with a limit is not renewed
beyond that, loudly. Checkpoints that wait for an evaluation are held from the moment they are published, also while
no evaluator runs, but each for `max_pinned_s` at most, and none once no evaluator has shown itself for so long: an
evaluator and a full disk cannot wait for each other.
Cost: a small file per pin and renewal; of the evaluations two looks per checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lingua.checkpoint import layout, publish
from lingua.config.keys.checkpoint import is_multiple
from lingua.files import DISK, Files, RunError, make_folders, read_json, write_json

log = logging.getLogger(__name__)

LEASE_S = 6 * 3600.0
"""Of a reader that was killed, until retention may go on."""


@contextmanager
def pinned(
    root: Path,
    step: int,
    why: str,
    *,
    lease_s: float = LEASE_S,
    limit_s: float | None = None,
    now: Callable[[], float] = time.time,
) -> Iterator[Callable[[], None]]:
    """Keep retention from a step inside the block; yields what renews the lease, cheap to call often.

    `limit_s`: the pin is never renewed beyond that. Raises RunError: the step is gone already. Where the run may not
    be written to, that is said, and the block goes on without.
    """
    reader, began_s = f"{why}-{socket.gethostname()}-{os.getpid()}", now()
    ends_s = float("inf") if limit_s is None else began_s + limit_s
    until_s = min(began_s + lease_s, ends_s)

    def renew() -> None:
        nonlocal until_s
        if until_s - now() > 0.75 * lease_s:
            return
        if until_s < ends_s:
            until_s = min(now() + lease_s, ends_s)
            publish.pin(root, step, reader, until_s)
        elif now() >= ends_s and limit_s is not None and not said:
            said.append(True)
            log.error(
                "STEP %d IS PINNED NO LONGER: %s has held it for %.1f h, the limit; retention may delete it now",
                step, why, limit_s / 3600,
            )  # fmt: skip

    said: list[bool] = []
    try:
        path = publish.pin(root, step, reader, until_s)
    except OSError as error:
        log.warning("step %d is not pinned (%s): the run's retention may delete it meanwhile", step, error.strerror)
        yield lambda: None
        return
    try:
        if not layout.done_mark(root, step).exists():
            raise RunError(f"step {step} is gone: the run's retention has just deleted it; take another one")
        yield renew
    finally:
        path.unlink(missing_ok=True)


# -- what waits for an evaluation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Follower:
    """What a run's evaluator tells retention; it says so again from time to time."""

    every: int
    """It judges the checkpoints of these steps."""
    max_pinned_s: float
    """For so long, from its publication, a checkpoint waits for it."""
    seen_at_s: float
    """Seconds since the epoch."""


Verdict = Literal["evaluated", "given_up"]


def verdict(run_dir: Path, root: Path, step: int) -> Verdict | None:
    """What has become of the evaluation of a published step; None: it is owed.

    What was said of another checkpoint of that step, before the run went back, does not count.
    """
    folder, incarnation = layout.evaluation(run_dir, step), publish.incarnation_of(root, step)
    files: tuple[tuple[str, Verdict], ...] = ((layout.RESULTS, "evaluated"), (layout.FAILED, "given_up"))
    return next((found for name, found in files if _incarnation_in(folder / name) == incarnation), None)


def _incarnation_in(path: Path) -> int | None:
    try:
        return read_json(path).get("incarnation")
    except (OSError, RunError, AttributeError):  # absent, or not ours: then it says nothing about a checkpoint
        return None


def follow(run_dir: Path, follower: Follower, *, files: Files = DISK) -> None:
    """Tell retention that these checkpoints will be evaluated. Raises OSError."""
    make_folders(run_dir / layout.EVALS, files=files)
    write_json(run_dir / layout.EVALS / layout.FOLLOWER, asdict(follower), files=files)


def read_follower(run_dir: Path) -> Follower | None:
    """The evaluator of a run, if it ever had one. Raises RunError or OSError when that cannot be read."""
    path = run_dir / layout.EVALS / layout.FOLLOWER
    try:
        content: Any = read_json(path)
        return Follower(int(content["every"]), float(content["max_pinned_s"]), float(content["seen_at_s"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, ValueError):
        raise RunError(f"{path} does not say what an evaluator waits for; remove it") from None


@dataclass(frozen=True)
class Held:
    """Steps that retention leaves alone for others."""

    steps: set[int]
    overdue: set[int]
    """Still without an evaluation, and held long enough."""


def awaited(published: Mapping[int, float], judged: Collection[int], follower: Follower | None, now_s: float) -> Held:
    """Of published steps (and when they were) those that wait for their evaluation. `judged`: have their verdict."""
    if follower is None or now_s - follower.seen_at_s > follower.max_pinned_s:
        return Held(set(), set())
    owed = {step for step in published if is_multiple(step, follower.every) and step not in judged}
    late = {step for step in owed if now_s - published[step] > follower.max_pinned_s}
    return Held(owed - late, late)


def held_steps(run_dir: Path, root: Path, now_s: float) -> Held:
    """All that retention leaves alone. Raises RunError or OSError where that cannot be read: then nothing may go."""
    waiting = Held(set(), set())
    if (follower := read_follower(run_dir)) is not None:
        published = {s: float(publish.mark_facts(root, s).get("created_at", now_s)) for s in layout.done_steps(root)}
        judged = [step for step in published if verdict(run_dir, root, step)]
        waiting = awaited(published, judged, follower, now_s)
    return Held(waiting.steps | publish.pinned_steps(root, now_s), waiting.overdue)


def farewell(step: int) -> str:
    """What is said when retention deletes a step that waited for its evaluation for too long."""
    return f"CHECKPOINT {step} GOES WITHOUT AN EVALUATION: it has waited for longer than eval.max_pinned_hours"
