"""The table of `requeue.judge`: what comes back into the queue, and what stays ended."""

import pytest

from lingua.launch.requeue import Outcome, judge
from lingua.run.failure import KINDS

SAVED = {"reason": "signal", "exit_code": 75, "signal": "SIGUSR2"}
TAKEN = {"reason": "signal", "exit_code": 75, "signal": "SIGTERM"}
BUG = {"reason": "error", "exit_code": 1, "error": "RuntimeError: ..."}


@pytest.mark.parametrize(
    ("outcome", "requeue", "exit_code", "fruitless"),
    [
        # through
        (Outcome(0), False, 0, 0),
        (Outcome(0, {"reason": "finished", "exit_code": 0}, steps_gained=9), False, 0, 0),
        # taken away by Slurm: as often as it likes
        (Outcome(75, TAKEN), True, 75, 0),
        (Outcome(75, TAKEN, fruitless=3), True, 75, 3),
        (Outcome(143), True, 143, 0),  # killed while it imported torch
        # the time limit: only while it gets on
        (Outcome(75, SAVED, steps_gained=10, fruitless=2), True, 75, 0),
        (Outcome(75, SAVED, steps_gained=0, fruitless=2), True, 75, 3),
        (Outcome(75, SAVED, steps_gained=0, fruitless=3), False, 75, 4),
        (Outcome(None, steps_gained=10), True, 75, 0),  # still saving when the time was up
        (Outcome(None, fruitless=3), False, 75, 4),
        # a launcher swallowed the code
        (Outcome(1, SAVED, steps_gained=10), True, 75, 0),
        (Outcome(137, SAVED, steps_gained=10), True, 75, 0),
        # failures that may pass: a crash, a hang, a lost node, a killed rank
        (Outcome(1, BUG, steps_gained=100), True, 1, 0),
        (Outcome(1, BUG), True, 1, 1),
        (Outcome(76, {"reason": "error", "exit_code": 76, "kind": "hang"}), True, 76, 1),
        (Outcome(137), True, 137, 1),
        (Outcome(1, BUG, fruitless=2), True, 1, 3),
        (Outcome(1, BUG, fruitless=3), False, 1, 4),
        (Outcome(1, BUG, fruitless=3, steps_gained=1), True, 1, 0),
        # failures that a restart meets again, and those that may pass
        (Outcome(2), False, 2, 0),
        *(
            (Outcome(1, {**BUG, "kind": kind}, steps_gained=100), facts.restart_may_help, 1, 0)
            for kind, facts in KINDS.items()
        ),
        (Outcome(1, {**BUG, "kind": "of another version"}, steps_gained=100), True, 1, 0),
        (Outcome(1, BUG, kinds=frozenset({"nccl", "oom"}), steps_gained=100), False, 1, 0),
        (Outcome(1, {**BUG, "kind": "nccl"}, steps_gained=100), True, 1, 0),
        # people
        (Outcome(130, {"reason": "signal", "exit_code": 130, "signal": "SIGINT"}), False, 130, 0),
        (Outcome(130, {"reason": "asked", "exit_code": 130}), False, 130, 0),
        (Outcome(75, TAKEN, cancelled=True), False, 75, 0),
        (Outcome(75, SAVED, cancelled=True, steps_gained=10), False, 75, 0),
        (Outcome(None, cancelled=True), False, 75, 0),
        (Outcome(1, occupied=True), False, 1, 0),
    ],
)
def test_what_comes_back(outcome: Outcome, requeue: bool, exit_code: int, fruitless: int):
    verdict = judge(outcome, max_retries=3)
    assert (verdict.requeue, verdict.exit_code, verdict.fruitless) == (requeue, exit_code, fruitless)
    assert verdict.why


def test_without_retries_the_first_failure_ends_the_job():
    assert not judge(Outcome(1, BUG), max_retries=0).requeue
    assert judge(Outcome(1, BUG, steps_gained=1), max_retries=0).requeue


def test_the_signal_behind_an_exit_code_is_named():
    assert judge(Outcome(137, steps_gained=5), 3).why == "it failed with SIGKILL after 5 steps"
    assert judge(Outcome(1), 3).why == "it failed with exit code 1 without a step gained; retry 1 of 3"
