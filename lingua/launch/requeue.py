"""Decide whether a job that ended is requeued: one pure function, `judge`.

A job that a person ended is not requeued; one that Slurm preempted is. A failed job is requeued as long as each attempt
gains steps, otherwise at most `max_retries` times in a row. A job that would fail again in the same way (a wrong
config, NaN, too little memory) is not requeued.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lingua.run.failure import KINDS
from lingua.run.folder import EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_REQUEUE

EXIT_BAD_CONFIG = 2
_KILLED_BY_SIGTERM = 128 + signal.SIGTERM  # a rank that had only begun to import


@dataclass(frozen=True)
class Outcome:
    """The end of one attempt of a job."""

    exit_code: int | None
    """The highest of all ranks; None if they were still running when Slurm's time was nearly up."""
    stop: Mapping[str, Any] | None = None
    """The stop.json of this attempt, or None if it wrote none."""
    kinds: frozenset[str] = frozenset()
    """Kinds of failure that the ranks reported."""
    occupied: bool = False
    """Another job owns the run folder."""
    cancelled: bool = False
    """Slurm is already ending the job."""
    steps_gained: int = 0
    """Step of the newest checkpoint now, minus that when the attempt began."""
    fruitless: int = 0
    """Number of failed attempts in a row, before this one, that gained no step."""


@dataclass(frozen=True)
class RequeueDecision:
    """Whether to requeue the job, and why."""

    requeue: bool
    why: str
    exit_code: int
    fruitless: int = 0
    """Number of failed attempts in a row that gained no step, including this one."""


def judge(outcome: Outcome, max_retries: int) -> RequeueDecision:
    """Decide by the end of the attempt. stop.json overrides the exit code, which a launcher may have replaced."""
    stop = outcome.stop or {}
    code = stop.get("exit_code", outcome.exit_code)
    code = EXIT_REQUEUE if code is None else int(code)
    kinds = outcome.kinds | ({stop["kind"]} if stop.get("kind") else set())
    hopeless = sorted(kind for kind in kinds if kind in KINDS and not KINDS[kind].restart_may_help)
    ends = (
        (outcome.cancelled, "the job is being ended, by a person or by Slurm itself"),
        (code == EXIT_FINISHED, "the run is finished"),
        (code == EXIT_INTERRUPTED, "a person stopped the run"),
        (code == EXIT_BAD_CONFIG, "the config is wrong"),
        (outcome.occupied, "another job trains in this run folder"),
        (hopeless, f"a restart would meet the same failure again ({', '.join(hopeless)})"),
    )
    for met, why in ends:
        if met:
            return RequeueDecision(False, why, code)
    if code == _KILLED_BY_SIGTERM or (code == EXIT_REQUEUE and stop.get("signal") == "SIGTERM"):
        return RequeueDecision(True, "Slurm took the nodes away", code, outcome.fruitless)
    fruitless = 0 if outcome.steps_gained > 0 else outcome.fruitless + 1
    how = "the time was up" if code == EXIT_REQUEUE else f"it failed with {_spell(code)}"
    if fruitless > max_retries:
        why = f"{how}, and {fruitless} attempts in a row gained no step; see the logs"
    elif fruitless:
        why = f"{how} without a step gained; retry {fruitless} of {max_retries}"
    else:
        why = f"{how} after {outcome.steps_gained} steps"
    return RequeueDecision(fruitless <= max_retries, why, code, fruitless)


def _spell(code: int) -> str:
    """Return `exit code 1`, or the name of the signal for a shell's 128 + n."""
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"
