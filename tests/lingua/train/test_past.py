from pathlib import Path
from typing import Any

import pytest

from lingua.config.base import ConfigError
from lingua.files import write_json
from lingua.run.metrics import last_line
from lingua.train.past import Past, check_step, nothing_before, read_past
from lingua.train.replay import Numbers, _numbers
from tests.checkpoints import make_run, publish_step


def past(lines: dict[int, list[int]], freq: int = 1, **more: Any) -> Past:
    """`lines`: attempt -> steps that it reported."""
    records = [{"global_step": step, "incarnation": attempt} for attempt, steps in lines.items() for step in steps]
    given = {"newest_attempt": max(lines, default=1), "run_dir": Path("run"), "root": Path("run/checkpoints")} | more
    return Past(**given, freq=freq, records=records)


# Attempt 1 trained to 25, attempt 2 went back to 20, attempt 3 died before its first line.
TWICE: dict[int, list[int]] = {1: [5, 10, 15, 20, 25], 2: [25, 30]}


@pytest.mark.parametrize(
    ("lines", "freq", "newest", "step", "attempt"),
    [
        ({1: [1, 2, 3]}, 1, 1, 2, 1),
        ({1: [1, 2, 3], 2: [3, 4]}, 1, 2, 3, 2),  # trained twice: the newest
        ({1: [1, 2, 3], 2: [3, 4]}, 1, 2, 2, 1),
        ({1: [1, 2, 3], 2: [3, 4]}, 1, 2, 5, 2),  # ended that attempt, and is in no line
        (TWICE, 5, 2, 23, 2),  # in no line: attempt 2 can have come by
        (TWICE, 5, 2, 20, 1),
        (TWICE, 5, 2, 19, 1),
        (TWICE, 5, 2, 33, 2),
        (TWICE, 5, 3, 36, 3),  # behind all that was reported
        ({}, 10, 4, 3, 4),
        ({1: [1, 2, 3, 4], 2: [3]}, 1, 2, 4, 1),  # it no longer counts, but nobody else has trained it
    ],
)
def test_who_trained_a_step(lines: dict[int, list[int]], freq: int, newest: int, step: int, attempt: int) -> None:
    assert past(lines, freq, newest_attempt=newest).attempt_of(step) == attempt


def test_what_was_reported_of_a_step_on_the_way_to_a_start() -> None:
    run = past({1: [1, 2, 3], 3: [2, 3], 2: [3]})

    def by(step: int, attempt: int) -> int | None:
        record = run.on_the_way(step, attempt)
        return None if record is None else record["incarnation"]

    assert [by(1, 3), by(2, 3), by(2, 2), by(3, 2), by(4, 3)] == [1, 3, 1, 2, None]
    assert run.reported(2, 2) is None  # of the step itself only the attempt's own word counts
    assert run.reported(2, 3) == {"global_step": 2, "incarnation": 3}


def test_only_checkpoints_that_the_start_can_have_come_by_lie_before_a_step() -> None:
    run = past({}, published={10: 1, 20: 1, 30: 2, 40: 3})
    assert run.before(35, 3) == [30, 20, 10]
    assert run.before(35, 1) == [20, 10]
    assert run.before(30, 3) == [20, 10]
    assert run.before(10, 3) == []


@pytest.mark.parametrize(
    ("attempt", "name"), [(1, "config.0002.yaml"), (2, "config.0002.yaml"), (3, "config.0003.yaml")]
)
def test_the_config_of_a_start_is_that_kept_of_it_or_of_the_last_start_with_the_same(
    tmp_path: Path, attempt: int, name: str
) -> None:
    for kept in ("config.0002.yaml", "config.0003.yaml", "config.origin.yaml", "config.yaml"):
        (tmp_path / kept).touch()
    assert past({}, run_dir=tmp_path).config_of(attempt) == tmp_path / name
    assert past({}, run_dir=tmp_path).config_of(4) == tmp_path / "config.yaml"


def test_a_step_that_was_never_trained_is_refused() -> None:
    run = past({1: [10, 20]}, 10)
    check_step(run, 30, 100)  # may have ended the run without a line
    with pytest.raises(ConfigError, match="has reached step 30 at most"):
        check_step(run, 31, 100)
    with pytest.raises(ConfigError, match="has 25 steps; choose one of them"):
        check_step(run, 26, 25)


def test_it_is_said_which_checkpoints_are_left_and_what_helps() -> None:
    text = str(nothing_before(past({}, published={50: 1, 60: 1}), 30, 1))
    assert "which has 50, 60" in text
    assert "--from 0" in text
    assert "29 steps" in text
    assert "checkpoint.keep_every" in text
    assert "lingua fork" in text


def test_what_a_run_folder_remembers(tmp_path: Path) -> None:
    root = make_run(tmp_path, 10)
    publish_step(root, 20, incarnation=1)
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 20, "incarnation": 1}\n{"global_step": 30, "incar')
    write_json(tmp_path / "stop.json", {"reason": "error", "step": 24})
    run = read_past(tmp_path)
    assert (run.published, run.newest_attempt, run.ended_at) == ({10: 1, 20: 1}, 1, 24)
    assert run.reported(20, 1) is not None
    assert run.reported(20, 2) is None
    assert run.reached == 25


def test_lines_and_records_of_wrong_types_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, 10)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text() + "logging: {freq: often}\n")
    lines = [
        '{"global_step": 20, "incarnation": 1, "loss/out": "low", "optim/lr": 0.5}',
        '{"global_step": "30", "incarnation": 1}',
        '{"global_step": 30, "incarnation": null}',
        '{"global_step": 30.5, "incarnation": 1}',
        "[20, 1]",
        "3",
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_json(tmp_path / "stop.json", {"reason": "error", "step": "24"})
    (tmp_path / "logs").mkdir()
    failure = {"kind": "bug", "type": "E", "message": [], "traceback": "", "rank": 0, "step": {}, "incarnation": 1}
    write_json(tmp_path / "logs" / "error_0.json", failure | {"host": "", "time": "", "because_of_rank": None})
    run = read_past(tmp_path)
    assert ([record["global_step"] for record in run.records], run.freq, run.ended_at) == ([20], 1, 0)
    record = run.reported(20, 1)
    assert record is not None
    assert _numbers(record) == Numbers(None, None, 0.5)
    assert last_line(tmp_path / "metrics.jsonl") == {"global_step": 20, "incarnation": 1, "optim/lr": 0.5}
