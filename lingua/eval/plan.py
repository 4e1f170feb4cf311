"""Decide which checkpoints need an evaluation, and what an evaluator does next: pure functions. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lingua.checkpoint.pins import Verdict
from lingua.config.keys.checkpoint import SaveEvery
from lingua.config.keys.eval import EvalArgs

MAX_KILLED = 8
"""Killed attempts in a row after which the checkpoint itself is considered to be the cause."""
ENDED_SILENT_S = 600.0
"""How long an evaluator waits for another attempt of a run that ended unfinished."""


class EvalAttempt(NamedTuple):
    """One attempt at an evaluation."""

    end: Literal["running", "failed", "stopped", "killed", "found"]
    """stopped: its evaluator was asked to stop; killed: it ended without a record; found: the results exist, but the
    checkpoint is not published yet."""
    at_s: float
    """Time of its end, or of the last heartbeat of one that was killed."""
    why: str = ""


@dataclass(frozen=True)
class Candidate:
    """A published checkpoint that is due, and the state of its evaluation."""

    step: int
    published_at_s: float
    verdict: Verdict | None = None
    is_logged: bool = False
    """Its line is in metrics.eval.jsonl."""
    attempts: tuple[EvalAttempt, ...] = ()
    is_found: bool = False
    """Its results exist already (`layout.found`) and only need to be adopted."""

    @property
    def is_owed(self) -> bool:
        """Whether the verdict or its line in metrics.eval.jsonl is missing."""
        return self.verdict is None or (self.verdict == "evaluated" and not self.is_logged)

    @property
    def is_busy(self) -> bool:
        return any(one.end == "running" for one in self.attempts)

    @property
    def failures(self) -> list[EvalAttempt]:
        return [one for one in self.attempts if one.end == "failed"]

    @property
    def n_killed(self) -> int:
        """Number of killed attempts in a row, up to the newest."""
        others = (n for n, one in enumerate(reversed(self.attempts)) if one.end != "killed")
        return next(others, len(self.attempts))


class RunState(NamedTuple):
    """State of the run that saves the checkpoints."""

    has_ended: bool
    """It recorded its end and does not ask to be requeued."""
    finished: bool
    """It reached its last step."""
    silent_s: float
    """Seconds since its last heartbeat; 0 while it trains."""


class Decision(NamedTuple):
    """The next action of an evaluator."""

    act: Literal["record", "adopt", "give_up", "evaluate", "wait", "end"]
    step: int = -1
    why: str = ""


def is_due(step: int, period: SaveEvery, n_steps: int | None) -> bool:
    """Return whether a checkpoint must be evaluated: by `checkpoint.eval.every`, or as the run's last."""
    return period.is_due(step) or (step > 0 and step == n_steps)


def decide(
    candidates: Sequence[Candidate], run: RunState, args: EvalArgs, now_s: float, max_killed: int = MAX_KILLED
) -> Decision:
    """Return the next action. `candidates`: all that are due, in any order."""
    free = [one for one in sorted(candidates, key=lambda c: c.step) if not one.is_busy]
    owed = [one for one in free if one.verdict is None]
    for one in free:
        if one.verdict == "evaluated" and not one.is_logged:
            return Decision("record", one.step)
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
        hours = run.silent_s / 3600
        return Decision("end", why=f"nothing is left to evaluate, and the run has been silent for {hours:.1f} h")
    return Decision("wait")


def hopeless(candidate: Candidate, max_tries: int, max_killed: int = MAX_KILLED) -> str | None:
    """Return why to give up on a checkpoint, or None."""
    failures = candidate.failures
    if len(failures) >= max_tries:
        last = failures[-1].why
        return last if len(failures) == 1 else f"{len(failures)} attempts failed, the last with: {last}"
    if candidate.n_killed >= max_killed:
        return f"{candidate.n_killed} evaluators in a row were killed while they evaluated it; is there enough memory?"
    return None


def not_before_s(candidate: Candidate, backoff_s: float) -> float:
    """Return the time from which a checkpoint may be evaluated again: backoff_s * 2**(n-1) after the n-th failure."""
    failures = candidate.failures
    return failures[-1].at_s + backoff_s * 2 ** (len(failures) - 1) if failures else 0.0
