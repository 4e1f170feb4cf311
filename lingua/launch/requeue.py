"""Whether a job that ended goes back into the queue: one pure function, `judge`, and the table it stands for.

Promise: what a person ended stays ended; what Slurm took away comes back; what failed comes back as long as each try
gets further than the one before, and at most `max_retries` times in a row otherwise. What a restart must meet again
(a wrong config, NaN, too little memory) does not come back.
Cost: none.
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
    """How one start of a job ended."""

    exit_code: int | None
    """The highest of all ranks. None: they were still running when Slurm's time was nearly up."""
    stop: Mapping[str, Any] | None = None
    """This start's stop.json. None: it left none."""
    kinds: frozenset[str] = frozenset()
    """Kinds of failure that ranks reported."""
    occupied: bool = False
    """Another job owns the run folder."""
    cancelled: bool = False
    """Slurm is ending the job already."""
    steps_gained: int = 0
    """Step of the newest checkpoint now, less that at the start."""
    fruitless: int = 0
    """Starts before this one, in a row, that failed and gained no step."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job."""

    requeue: bool
    why: str
    exit_code: int
    fruitless: int = 0
    """Failed starts in a row that gained nothing, this one included."""


def judge(outcome: Outcome, max_retries: int) -> Verdict:
    """Go back into the queue or stay ended. A launcher may have swallowed the exit code, so stop.json speaks first."""
    stop = outcome.stop or {}
    code = stop.get("exit_code", outcome.exit_code)
    code = EXIT_REQUEUE if code is None else int(code)
    kinds = outcome.kinds | ({stop["kind"]} if stop.get("kind") else set())
    if outcome.cancelled:
        return Verdict(False, "the job is being ended, by scancel or by Slurm itself", code)
    if code == EXIT_FINISHED:
        return Verdict(False, "the run is finished", code)
    if code == EXIT_INTERRUPTED:
        return Verdict(False, "a person stopped the run", code)
    if code == EXIT_BAD_CONFIG:
        return Verdict(False, "the config is wrong", code)
    if outcome.occupied:
        return Verdict(False, "another job trains in this run folder", code)
    hopeless = sorted(kind for kind in kinds if kind in KINDS and not KINDS[kind].restart_may_help)
    if hopeless:
        return Verdict(False, f"a restart would meet the same failure again ({', '.join(hopeless)})", code)
    if code == _KILLED_BY_SIGTERM or (code == EXIT_REQUEUE and stop.get("signal") == "SIGTERM"):
        return Verdict(True, "Slurm took the nodes away", code, outcome.fruitless)
    fruitless = 0 if outcome.steps_gained > 0 else outcome.fruitless + 1
    how = "the time was up" if code == EXIT_REQUEUE else f"it failed with {_spell(code)}"
    if fruitless > max_retries:
        return Verdict(False, f"{how}, and {fruitless} starts in a row gained no step; see the logs", code, fruitless)
    if fruitless:
        return Verdict(True, f"{how} without a step gained; try {fruitless} of {max_retries}", code, fruitless)
    return Verdict(True, f"{how} after {outcome.steps_gained} steps", code)


def _spell(code: int) -> str:
    """`exit code 1`, or the signal behind a shell's 128 + n."""
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"
