"""When a run counts as hung: the decision, on a clock that only the test moves."""

import pytest

from lingua.config.keys.watchdog import WatchdogArgs
from lingua.run.watchdog import Heartbeat
from tests.fakes import Clock

ARGS = WatchdogArgs(step_factor=10, min_s=60, other_s=1000)


def at_pace(step_s: float, n_steps: int = 20, first_step_s: float = 500.0) -> tuple[Heartbeat, Clock]:
    """A run after n steps, the first of which took long."""
    clock = Clock()
    heartbeat = Heartbeat(ARGS, clock.now)
    for step in range(1, n_steps + 1):
        clock.now_s += first_step_s if step == 1 else step_s
        assert heartbeat.overdue() is None
        heartbeat.beat(step)
    return heartbeat, clock


@pytest.mark.parametrize(
    ("step_s", "limit_s"),
    [(0.1, 60), (6, 60), (7, 70), (100, 1000), (300, 3000)],  # never below min_s, else ten steps
)
def test_a_step_is_judged_by_the_runs_own_pace(step_s: float, limit_s: float):
    heartbeat, clock = at_pace(step_s)
    clock.now_s += limit_s
    assert heartbeat.overdue() is None
    clock.now_s += 1
    sentence = f"no step ended within {limit_s} s after step 20; a step takes {step_s:.3g} s (watchdog)"
    assert heartbeat.overdue() == sentence


def test_a_start_has_time_to_compile():
    clock = Clock()
    heartbeat = Heartbeat(ARGS, clock.now)
    assert heartbeat.starting
    clock.now_s += 999
    assert heartbeat.overdue() is None
    clock.now_s += 2
    assert "did not finish its first steps within 1000 s" in (heartbeat.overdue() or "")


def test_the_first_steps_may_compile_again_and_are_no_measure():
    heartbeat, _ = at_pace(0.1, n_steps=5)
    assert not heartbeat.starting
    assert heartbeat.limit_s == 1000
    heartbeat.beat(6)
    assert heartbeat.limit_s == 60


def test_one_slow_step_changes_little():
    heartbeat, clock = at_pace(7)
    clock.now_s += 65
    heartbeat.beat(21)
    assert heartbeat.limit_s == 70


def test_validation_and_checkpoints_have_a_limit_of_their_own_and_do_not_count_as_a_step():
    heartbeat, clock = at_pace(1)
    with heartbeat.during("validation"):
        clock.now_s += 999
        assert heartbeat.overdue() is None
        clock.now_s += 2
        assert heartbeat.overdue() == "the validation at step 20 did not end within 1000 s (watchdog.other_s)"
    assert heartbeat.overdue() is None
    clock.now_s += 1
    heartbeat.beat(21)
    assert heartbeat.limit_s == 60
    clock.now_s += 61
    assert heartbeat.overdue() is not None


def test_without_a_watchdog_nothing_is_overdue():
    clock = Clock()
    heartbeat = Heartbeat(None, clock.now)
    clock.now_s += 1e9
    assert heartbeat.overdue() is None
    assert heartbeat.limit_s == float("inf")
