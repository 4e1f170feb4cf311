"""What may be deleted, by tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingua.checkpoint.retention import is_due, kept_at_once, kept_for_good, to_delete
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery

Period = tuple[int, int]
"""Every, keep."""
NEVER = (0, 0)


def args(dump: Period, evaluation: Period = NEVER, keep_every: int = 0) -> CheckpointArgs:
    first, second = (SaveEvery(every=every, keep=keep) for every, keep in (dump, evaluation))
    return CheckpointArgs(dump=first, eval=second, keep_every=keep_every)


@pytest.mark.parametrize(
    ("done", "dump", "evaluation", "pinned", "deleted"),
    [
        ([], (1, 1), NEVER, [], []),
        ([5], (1, 1), NEVER, [], []),
        ([1, 2, 3], (1, 1), NEVER, [], [1, 2]),
        ([1, 2, 3], (1, 2), NEVER, [], [1]),
        ([1, 2, 3], (1, 0), NEVER, [], []),
        ([1, 2, 3], (1, -1), NEVER, [], []),
        ([1, 2, 3], (1, 1), NEVER, [1], [2]),
        # keep <= 0 means all, evaluated or not
        ([4, 6, 8, 12, 16, 18], (4, 1), (6, -1), [], [4, 8]),
        ([4, 6, 8, 12, 16, 18], (4, 1), (6, 1), [], [4, 6, 8, 12]),
        # 12 belongs to both periods
        ([4, 6, 8, 12], (4, 1), (6, 1), [], [4, 6, 8]),
        # a stop at 7 counts as a dump, and goes when a newer dump is there
        ([4, 7], (4, 1), NEVER, [], [4]),
        ([7, 8], (4, 1), NEVER, [], [7]),
        ([6, 7], (4, 1), (6, 1), [], []),
        # without any period there are stops and the last one only
        ([3, 9], NEVER, NEVER, [], []),
        ([3, 9], (0, 1), NEVER, [], [3]),
    ],
)
def test_table(done: list[int], dump: Period, evaluation: Period, pinned: list[int], deleted: list[int]) -> None:
    assert to_delete(done, args(dump, evaluation), verified=done[-1:], pinned=pinned) == deleted


def test_the_newest_verified_stays_even_if_newer_ones_are_unchecked() -> None:
    assert to_delete([1, 2, 3], args((1, 1)), verified=[1]) == [2]


STEPS = st.sets(st.integers(1, 60))
PERIODS = st.tuples(st.integers(-1, 12), st.integers(-1, 4))


@settings(deadline=None)
@given(STEPS, PERIODS, PERIODS, STEPS, STEPS)
def test_promises(done: set[int], dump: Period, evaluation: Period, verified: set[int], pinned: set[int]) -> None:
    deleted = set(to_delete(done, args(dump, evaluation), verified=verified, pinned=pinned))
    assert deleted <= done - pinned
    if done:
        assert max(done) not in deleted
    if verified & done:
        assert max(verified & done) not in deleted
    again = to_delete(done - deleted, args(dump, evaluation), verified=verified, pinned=pinned)
    assert again == []


def test_milestones_stay_for_good() -> None:
    done = [4, 6, 8, 10, 12, 16, 18, 20]
    assert to_delete(done, args((4, 1), (6, 1), 10), verified=[20]) == [4, 6, 8, 12, 16]
    assert to_delete(done, args((4, 1), (6, 1)), verified=[20]) == [4, 6, 8, 10, 12, 16]


@pytest.mark.parametrize(("steps", "kept"), [("log2", [1, 2, 4, 8, 16]), ([3, 7], [3, 7]), ([], [])])
def test_chosen_steps_are_saved_and_stay_for_good(steps: Any, kept: list[int]) -> None:
    chosen = args((6, 1)).model_copy(update={"steps": steps})
    due = [step for step in range(20) if is_due(step, chosen)]
    assert due == sorted({*kept, 6, 12, 18})
    assert set(due) - set(to_delete(due, chosen, verified=due)) == {*kept, 18}
    assert kept_at_once(chosen, n_steps=19) == 2 + len(kept)


def test_due() -> None:
    assert [step for step in range(13) if is_due(step, args((4, 1), keep_every=5))] == [4, 5, 8, 10, 12]
    assert [step for step in range(13) if is_due(step, args((4, 1), (6, 1)))] == [4, 6, 8, 12]
    assert not any(is_due(step, args((0, 1), (-1, 1))) for step in range(10))


def test_kept_at_once() -> None:
    assert kept_at_once(args((1, 1), (2, 3))) == 5
    assert kept_at_once(args((1, 0), (2, 3))) is None
    assert kept_at_once(args((1, 1))) == 2
    assert kept_at_once(args(NEVER)) == 2
    assert kept_at_once(args((1, 1), keep_every=10), n_steps=35) == 5


def test_what_is_kept_for_good_is_named_and_only_if_the_run_gets_there() -> None:
    one_of_two = args((500, 2), (1000, 0))
    assert (kept_for_good(one_of_two), kept_at_once(one_of_two)) == (["checkpoint.eval"], None)
    assert (kept_for_good(one_of_two, 999), kept_at_once(one_of_two, 999)) == ([], 3)
    assert kept_for_good(args((500, 0), (1000, -1))) == ["checkpoint.dump", "checkpoint.eval"]
