"""What an evaluator does next: decisions by tables."""

from __future__ import annotations

from typing import Any

import pytest

from lingua.config.keys.checkpoint import SaveEvery
from lingua.config.keys.eval import EvalArgs
from lingua.eval.plan import MAX_KILLED, Candidate, EvalAttempt, RunState, decide, is_due, not_before_s

TRAINING = RunState(has_ended=False, finished=False, silent_s=0.0)
FINISHED = RunState(has_ended=True, finished=True, silent_s=0.0)
ARGS = EvalArgs(max_tries=2, backoff_s=10.0, idle_hours=2.0)


def a(step: int, *ends: str, **more: Any) -> Candidate:
    """A candidate whose attempts ended so, all at 100 s."""
    attempts = tuple(EvalAttempt(end, 100.0, "no luck") for end in ends)  # pyright: ignore[reportArgumentType]
    return Candidate(step, 0.0, attempts=attempts, **more)


DONE = {"verdict": "evaluated", "is_logged": True}


@pytest.mark.parametrize(
    ("candidates", "run", "changes", "now_s", "expected"),
    [
        ([], TRAINING, {}, 0, ("wait", -1)),
        ([], FINISHED, {}, 0, ("end", -1)),
        ([a(4), a(2)], TRAINING, {}, 0, ("evaluate", 2)),
        ([a(4), a(2)], FINISHED, {}, 0, ("evaluate", 2)),
        ([a(4), a(2)], TRAINING, {"newest_first": True}, 0, ("evaluate", 4)),
        ([a(2, **DONE), a(4)], TRAINING, {}, 0, ("evaluate", 4)),
        ([a(2, **DONE), a(4, **DONE)], FINISHED, {}, 0, ("end", -1)),
        # two evaluators share the work
        ([a(2, "running"), a(4)], TRAINING, {}, 0, ("evaluate", 4)),
        ([a(2, "running")], FINISHED, {}, 0, ("wait", -1)),
        ([a(2, "killed", "running"), a(4, **DONE)], FINISHED, {}, 0, ("wait", -1)),
        # results without their line: a kill came in between
        ([a(2, verdict="evaluated"), a(4)], TRAINING, {"newest_first": True}, 0, ("record", 2)),
        ([a(2, "running", verdict="evaluated")], FINISHED, {}, 0, ("wait", -1)),
        # found already: by a job, or in training
        ([a(2, "found", is_found=True), a(4)], TRAINING, {"newest_first": True}, 0, ("adopt", 2)),
        ([a(2, *["killed"] * MAX_KILLED, is_found=True)], TRAINING, {}, 0, ("adopt", 2)),
        ([a(2, "found")], TRAINING, {}, 0, ("evaluate", 2)),
        ([a(2, "running", is_found=True)], FINISHED, {}, 0, ("wait", -1)),
        # again, later and later, and others meanwhile
        ([a(2, "failed")], FINISHED, {}, 109, ("wait", -1)),
        ([a(2, "failed"), a(4)], FINISHED, {}, 109, ("evaluate", 4)),
        ([a(2, "failed")], FINISHED, {}, 110, ("evaluate", 2)),
        ([a(2, "failed", "failed")], FINISHED, {}, 100, ("give_up", 2)),
        ([a(2, "failed", "failed")], FINISHED, {"max_tries": 3}, 119, ("wait", -1)),
        ([a(2, "failed", "failed")], FINISHED, {"max_tries": 3}, 120, ("evaluate", 2)),
        ([a(2, "failed", "failed", verdict="given_up")], FINISHED, {}, 100, ("end", -1)),
        # a kill is nobody's fault, a stop neither
        ([a(2, "killed", "stopped", "killed")], TRAINING, {}, 0, ("evaluate", 2)),
        ([a(2, *["killed"] * MAX_KILLED)], TRAINING, {}, 0, ("give_up", 2)),
        ([a(2, *["killed"] * MAX_KILLED, "stopped")], TRAINING, {}, 0, ("evaluate", 2)),
        # the end of a run that does not finish
        ([], RunState(False, False, 7199.0), {}, 0, ("wait", -1)),
        ([], RunState(False, False, 7200.0), {}, 0, ("end", -1)),
        ([], RunState(True, False, 599.0), {}, 0, ("wait", -1)),
        ([], RunState(True, False, 600.0), {}, 0, ("end", -1)),
        ([a(2)], RunState(True, False, 1e9), {}, 0, ("evaluate", 2)),
        ([a(2, "failed")], RunState(True, False, 1e9), {}, 101, ("wait", -1)),
    ],
)
def test_what_to_do_next(
    candidates: list[Candidate], run: RunState, changes: dict[str, Any], now_s: float, expected: tuple[str, int]
) -> None:
    assert decide(candidates, run, ARGS.model_copy(update=changes), now_s)[:2] == expected


def test_in_training_fewer_kills_are_enough() -> None:
    candidates = [a(2, "killed", "killed", "killed")]
    assert decide(candidates, TRAINING, ARGS, 0)[:2] == ("evaluate", 2)
    assert decide(candidates, TRAINING, ARGS, 0, max_killed=3)[:2] == ("give_up", 2)


def test_pauses_double() -> None:
    pauses = [not_before_s(a(2, *["failed"] * n), 10.0) for n in range(5)]
    assert pauses == [0.0, 110.0, 120.0, 140.0, 180.0]


def test_due_are_those_of_the_period_and_the_last() -> None:
    assert [step for step in range(13) if is_due(step, SaveEvery(every=4), 10)] == [4, 8, 10, 12]
    assert [step for step in range(13) if is_due(step, SaveEvery(every=0), 10)] == [10]
