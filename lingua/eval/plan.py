"""Which checkpoints still need an evaluation, and what an evaluator does next: pure functions. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lingua.checkpoint.pins import Verdict
from lingua.config.keys.checkpoint import SaveEvery
from lingua.config.keys.eval import EvalArgs

MAX_KILLED = 8
"""Tries that ended without a word, after which the checkpoint itself is taken for the cause."""


class Try(NamedTuple):
    """One attempt at an evaluation."""

    end: Literal["running", "failed", "stopped", "killed", "found"]
    """stopped: its evaluator was asked to leave; killed: it ended without a word; found: the results are there, and
    wait for the checkpoint's publication."""
    at_s: float
    """When it ended; of one that was killed, its last sign of life."""
    why: str = ""


@dataclass(frozen=True)
class Candidate:
    """A published checkpoint that is to be evaluated, and how far that is."""

    step: int
    published_at_s: float
    verdict: Verdict | None = None
    is_logged: bool = False
    """Its line is in metrics.eval.jsonl."""
    tries: tuple[Try, ...] = ()
    is_found: bool = False
    """Its results are there (`layout.found`), and are to become the verdict."""

    @property
    def is_owed(self) -> bool:
        """There is no verdict yet, or not its line."""
        return self.verdict is None or (self.verdict == "evaluated" and not self.is_logged)

    @property
    def is_busy(self) -> bool:
        return any(one.end == "running" for one in self.tries)

    @property
    def failures(self) -> list[Try]:
        return [one for one in self.tries if one.end == "failed"]

    @property
    def n_killed(self) -> int:
        """How many of the newest tries were killed."""
        alive = (n for n, one in enumerate(reversed(self.tries)) if one.end != "killed")
        return next(alive, len(self.tries))


class RunState(NamedTuple):
    """How the run is that makes the checkpoints."""

    has_ended: bool
    """It said so and asks for no other start."""
    finished: bool
    """It came to its last step."""
    silent_s: float
    """Since its last sign of life; 0 while it trains."""


class Decision(NamedTuple):
    """What an evaluator does next."""

    act: Literal["record", "adopt", "give_up", "evaluate", "wait", "end"]
    step: int = -1
    why: str = ""


ENDED_SILENT_S = 600.0
"""A run that has ended unfinished may be started again; for so long its evaluator waits for that."""


def is_due(step: int, period: SaveEvery, n_steps: int | None) -> bool:
    """Whether a checkpoint is to be evaluated: by `checkpoint.eval.every`, or as the run's last."""
    return period.is_due(step) or (step > 0 and step == n_steps)


def decide(
    candidates: Sequence[Candidate], run: RunState, args: EvalArgs, now_s: float, max_killed: int = MAX_KILLED
) -> Decision:
    """What to do next. `candidates`: all that are due, in any order."""
    free = [one for one in sorted(candidates, key=lambda c: c.step) if not one.is_busy]
    for one in free:
        if one.verdict == "evaluated" and not one.is_logged:
            return Decision("record", one.step)
    owed = [one for one in free if one.verdict is None]
    for one in owed:
        if one.is_found:
            return Decision("adopt", one.step)
    for one in owed:
        if why := hopeless(one, args.max_tries, max_killed):
            return Decision("give_up", one.step, why)
    ready = [one for one in owed if now_s >= not_before_s(one, args.backoff_s)]
    if ready:
        return Decision("evaluate", ready[-1 if args.newest_first else 0].step)
    if waiting := [one.step for one in candidates if one.verdict is None or one.is_busy]:
        return Decision("wait", why=f"steps {waiting} are with another evaluator, or failed a moment ago")
    if run.finished:
        return Decision("end", why="the run is finished, and nothing is left to evaluate")
    patience_s = min(ENDED_SILENT_S, 3600 * args.idle_hours) if run.has_ended else 3600 * args.idle_hours
    if run.silent_s >= patience_s:
        return Decision(
            "end", why=f"nothing is left to evaluate, and the run is silent for {run.silent_s / 3600:.1f} h"
        )
    return Decision("wait")


def hopeless(candidate: Candidate, max_tries: int, max_killed: int = MAX_KILLED) -> str | None:
    """Why a checkpoint is given up; None: it is not."""
    failures = candidate.failures
    if len(failures) >= max_tries:
        last = failures[-1].why
        return last if len(failures) == 1 else f"{len(failures)} tries failed, the last with: {last}"
    if candidate.n_killed >= max_killed:
        return f"{candidate.n_killed} evaluators in a row were killed while they were at it; is there enough memory?"
    return None


def not_before_s(candidate: Candidate, backoff_s: float) -> float:
    """When a checkpoint may be tried again: after the n-th failure, backoff_s * 2**(n-1) later."""
    failures = candidate.failures
    return failures[-1].at_s + backoff_s * 2 ** (len(failures) - 1) if failures else 0.0
