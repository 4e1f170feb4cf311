"""Pins run out, with and without a reader that renews them; what waits for an evaluation is held, but not for ever."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lingua.checkpoint import layout, pins, publish
from lingua.checkpoint.pins import Follower, awaited, held_steps, pinned, verdict
from lingua.checkpoint.tools.gc import survey_garbage
from lingua.files import RunError, write_json
from tests.checkpoints import make_run
from tests.fakes import Clock

EVERY_2 = Follower(every=2, max_pinned_s=100.0, seen_at_s=1000.0)


@pytest.mark.parametrize(
    ("judged", "follower", "now_s", "held", "overdue"),
    [
        ([], None, 1000, [], []),  # nobody evaluates
        ([], EVERY_2, 1000, [2, 4], []),
        ([2], EVERY_2, 1000, [4], []),
        ([], EVERY_2, 1003, [4], [2]),  # 2 was published at 902
        ([2, 4], EVERY_2, 1050, [], []),
        ([], EVERY_2, 1100, [], [2, 4]),
        ([], EVERY_2, 1101, [], []),  # the evaluator has not shown itself for too long: nobody is missed
        ([], Follower(0, 100.0, 1000.0), 1000, [], []),
    ],
)
def test_what_waits_for_an_evaluation(
    judged: list[int], follower: Follower | None, now_s: float, held: list[int], overdue: list[int]
) -> None:
    published = {step: 900.0 + step for step in (1, 2, 3, 4)}
    found = awaited(published, judged, follower, now_s)
    assert (sorted(found.steps), sorted(found.overdue)) == (held, overdue)


def test_a_verdict_counts_for_the_checkpoint_that_it_names(tmp_path: Path) -> None:
    root = make_run(tmp_path, 2)
    folder = layout.evaluation(tmp_path, 2)
    folder.mkdir(parents=True)
    assert verdict(tmp_path, root, 2) is None
    for attempt, expected in ((0, None), (1, "given_up")):
        write_json(folder / layout.FAILED, {"incarnation": attempt})
        assert verdict(tmp_path, root, 2) == expected
    (folder / layout.RESULTS).write_text("[1")
    assert verdict(tmp_path, root, 2) == "given_up"
    write_json(folder / layout.RESULTS, {"incarnation": 1})
    assert verdict(tmp_path, root, 2) == "evaluated"


def test_retention_waits_for_the_follower_and_garbage_too(tmp_path: Path) -> None:
    root = make_run(tmp_path, 2, 3, 4, 5, dump={"every": 1, "keep": 1}, eval={"every": 2, "keep": 1})
    now_s = publish.mark_facts(root, 5)["created_at"]

    def given_up() -> list[str]:
        return [item.path.name for item in survey_garbage(tmp_path, now=lambda: now_s) if item.why == "retention"]

    assert given_up() == ["0000000002", "0000000003"]
    pins.follow(tmp_path, Follower(2, 3600.0, now_s))
    assert held_steps(tmp_path, root, now_s).steps == {2, 4}
    assert given_up() == ["0000000003"]
    publish.pin(root, 3, "me", now_s + 1)
    assert given_up() == []
    (tmp_path / layout.EVALS / layout.FOLLOWER).write_text("{}")
    with pytest.raises(RunError, match="is not an evaluator's record"):
        held_steps(tmp_path, root, now_s)


def test_a_pin_is_renewed_in_time_and_no_sooner(tmp_path: Path) -> None:
    root, clock = make_run(tmp_path, 1), Clock()
    with pinned(root, 1, "test", lease_s=100.0, now=clock.now) as renew:
        (path,) = (root / layout.PINS).iterdir()
        before = path.stat().st_ino
        clock.sleep(20)
        renew()
        assert path.stat().st_ino == before
        clock.sleep(20)
        renew()
        assert publish.pinned_steps(root, 1139.0) == {1}
        assert publish.pinned_steps(root, 1141.0) == set()
    assert publish.pinned_steps(root, 0) == set()


def test_a_limit_ends_it_loudly_and_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, clock = make_run(tmp_path, 1), Clock()
    with caplog.at_level(logging.ERROR), pinned(root, 1, "eval", lease_s=100.0, limit_s=250.0, now=clock.now) as renew:
        for _ in range(40):
            clock.sleep(10)
            renew()
            held = clock.now_s < 1250
            assert publish.pinned_steps(root, clock.now_s) == ({1} if held else set())
    assert caplog.text.count("STEP 1 IS NO LONGER PINNED") == 1
