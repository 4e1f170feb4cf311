"""Find the checkpoints that retention must not delete: pinned by readers, or waiting for evaluation. Torch-free.

Nothing is held forever. A pin expires unless its reader renews it, and a pin with a limit is not renewed beyond it,
which is logged as an error. A checkpoint waits for its evaluation from its publication on, even while no evaluator
runs, but for at most `max_pinned_s`; none waits once no evaluator has been seen for that long. So an evaluator and a
full disk cannot deadlock.
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
"""How long a pin outlives a reader that was killed."""


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
    """Keep retention from deleting a step inside the block; yields a function that renews the lease, cheap to call.

    `limit_s`: the pin is never renewed beyond that. If the run may not be written to, a warning says so, and the block
    runs without a pin. Raises RunError if the step is gone already.
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
        elif now() >= ends_s and limit_s is not None and not reported:
            reported.append(True)
            log.error(
                "STEP %d IS NO LONGER PINNED: %s has held it for %.1f h, the limit; retention may delete it now",
                step, why, limit_s / 3600,
            )  # fmt: skip

    reported: list[bool] = []
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


# -- checkpoints that wait for an evaluation -----------------------------------------------------------------------


@dataclass(frozen=True)
class Follower:
    """An evaluator's request to retention; rewritten regularly as its heartbeat."""

    every: int
    """Steps between the checkpoints that it evaluates."""
    max_pinned_s: float
    """How long after its publication a checkpoint waits."""
    seen_at_s: float
    """Seconds since the epoch."""


Verdict = Literal["evaluated", "given_up"]


def verdict(run_dir: Path, root: Path, step: int) -> Verdict | None:
    """Return the outcome of a published step's evaluation, or None if it is still to come.

    An evaluation of another checkpoint of that step, from before the run was set back, does not count.
    """
    folder, attempt = layout.evaluation(run_dir, step), publish.attempt_of(root, step)
    files: tuple[tuple[str, Verdict], ...] = ((layout.RESULTS, "evaluated"), (layout.FAILED, "given_up"))
    return next((found for name, found in files if _attempt_in(folder / name) == attempt), None)


def _attempt_in(path: Path) -> int | None:
    try:
        return read_json(path).get("incarnation")
    except (OSError, RunError, AttributeError):  # absent, or not ours
        return None


def follow(run_dir: Path, follower: Follower, *, files: Files = DISK) -> None:
    """Announce to retention that these checkpoints will be evaluated. Raises OSError."""
    make_folders(run_dir / layout.EVALS, files=files)
    write_json(run_dir / layout.EVALS / layout.FOLLOWER, asdict(follower), files=files)


def read_follower(run_dir: Path) -> Follower | None:
    """Return the evaluator of a run, or None if it never had one. Raises RunError or OSError if that is unreadable."""
    path = run_dir / layout.EVALS / layout.FOLLOWER
    try:
        content: Any = read_json(path)
        return Follower(int(content["every"]), float(content["max_pinned_s"]), float(content["seen_at_s"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, ValueError):
        raise RunError(f"{path} is not an evaluator's record; remove it") from None


@dataclass(frozen=True)
class Held:
    """Steps that retention must keep."""

    steps: set[int]
    overdue: set[int]
    """Steps without an evaluation that were held for the maximum time."""


def awaited(published: Mapping[int, float], judged: Collection[int], follower: Follower | None, now_s: float) -> Held:
    """Choose the steps that wait for their evaluation. `published`: step -> time; `judged`: those with an outcome."""
    if follower is None or now_s - follower.seen_at_s > follower.max_pinned_s:
        return Held(set(), set())
    owed = {step for step in published if is_multiple(step, follower.every) and step not in judged}
    late = {step for step in owed if now_s - published[step] > follower.max_pinned_s}
    return Held(owed - late, late)


def held_steps(run_dir: Path, root: Path, now_s: float) -> Held:
    """Return the steps that retention must keep. Raises RunError or OSError if unreadable: delete nothing then."""
    waiting = Held(set(), set())
    if (follower := read_follower(run_dir)) is not None:
        published = {s: float(publish.mark_facts(root, s).get("created_at", now_s)) for s in layout.done_steps(root)}
        judged = [step for step in published if verdict(run_dir, root, step)]
        waiting = awaited(published, judged, follower, now_s)
    return Held(waiting.steps | publish.pinned_steps(root, now_s), waiting.overdue)


def overdue_message(step: int) -> str:
    """Return the error for a step that retention deletes because its evaluation took too long to come."""
    return f"CHECKPOINT {step} IS DELETED WITHOUT AN EVALUATION: it has waited for longer than eval.max_pinned_hours"
