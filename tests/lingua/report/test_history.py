"""What counts after a rollback, where the time went, and a history put together from what is left."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingua.files import write_json
from lingua.report.charts import pictures_of
from lingua.report.facts import read_run
from lingua.report.history import (
    LOSS,
    MEAN_LOSS,
    SPENT,
    TOKENS,
    TRAINED_S,
    History,
    PastAttempt,
    Scores,
    end_in_words,
    in_order,
    limits_of,
    read_history,
    that_count,
)
from lingua.report.series import STEP, WHEN
from lingua.report.status import state_of
from lingua.run.lock import Owner, this_process

T0 = 1_700_000_000.0


def iso(at_s: float) -> str:
    return datetime.fromtimestamp(T0 + at_s, tz=UTC).isoformat()


def attempt(number: int, first_step: int | None, **more: Any) -> PastAttempt:
    return PastAttempt(number, Owner(), first_step=first_step, **more)


@pytest.mark.parametrize(
    ("first_steps", "limits"),
    [
        ([0], [float("inf")]),
        ([0, 200], [200, float("inf")]),
        ([0, 200, 100], [100, 100, float("inf")]),  # a checkpoint was set aside
        ([0, 100, 200], [100, 200, float("inf")]),
        ([0, None, 50], [50, 50, float("inf")]),  # one that never came to a step
        ([0, 100, None], [100, float("inf"), float("inf")]),
    ],
)
def test_the_work_of_a_start_counts_up_to_where_later_ones_went_on(first_steps: list[int | None], limits: list[float]):
    attempts = [attempt(i + 1, step) for i, step in enumerate(first_steps)]
    found = limits_of(attempts)
    assert [found[one.number] for one in attempts] == limits
    unknown = Scores(10**9, 99, 0.0, {})  # of an attempt that left no other trace
    assert that_count(found, [unknown]) == [unknown]


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        (None, "killed"),
        ({"reason": "finished"}, "finished"),
        ({"reason": "signal", "signal": "SIGTERM"}, "stopped by SIGTERM"),
        ({"reason": "asked"}, "stopped by `lingua stop`"),
        ({"reason": "error", "kind": "nan"}, "failed (nan)"),
        ({}, "not known"),
    ],
)
def test_how_a_start_ended(stop: dict[str, Any] | None, told: str):
    assert end_in_words(stop) == told


def test_no_start_reaches_into_the_next():
    attempts = [attempt(1, 0, began_s=0.0, ended_s=900.0), attempt(2, 5, began_s=20.0, ended_s=40.0)]
    assert [one.ended_s for one in in_order(attempts)] == [20.0, 40.0]


def make_run(path: Path) -> Path:
    """Attempt 1 trains to step 8 and is killed, attempt 2 goes on from 4 and finishes at 10; a line every two steps.

    A step takes 2 s, of which 0.5 s are a wait for data.
    """
    (path / "config.yaml").write_text("name: x\nsteps: 10\n")
    (path / "incarnations").mkdir()
    for number, facts in ((1, {"began_at": T0, "released": False}), (2, {"began_at": T0 + 60, "released": True})):
        released = {"released_at": T0 + 85} if number == 2 else {}
        write_json(path / "incarnations" / f"{number:010d}.json", {"host": f"n{number}", **facts, **released})
    os.utime(path / "incarnations" / "0000000001.json", (T0 + 40, T0 + 40))
    write_json(path / "stop.json", {"reason": "finished", "exit_code": 0, "step": 10})

    def lines(number: int, begun_s: float, steps: range) -> list[dict[str, Any]]:
        return [
            {
                STEP: step, "incarnation": number, WHEN: iso(begun_s + 2 * (step - steps.start + 2)),
                "loss/out": 5 - step / 10 + number / 100, "speed/curr_iter_time": 2.0, "speed/data_load_time": 0.5,
                "optim/total_tokens": 64 * step,
            }
            for step in steps
        ]  # fmt: skip

    both = [*lines(1, 10, range(2, 9, 2)), *lines(2, 65, range(6, 11, 2))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in both) + '{"global_step": 1')
    notes = [
        {STEP: 0, "event": "begun", "incarnation": 1, WHEN: iso(10)},
        {STEP: 4, "event": "staged", "seconds": 0.25, "bytes": 100, "incarnation": 1, WHEN: iso(18)},
        {STEP: 4, "event": "published", "seconds": 0.1, "incarnation": 1, WHEN: iso(19)},
        {STEP: 8, "event": "staged", "seconds": 0.25, "bytes": 100, "incarnation": 1, WHEN: iso(27)},
        {STEP: 4, "event": "begun", "incarnation": 2, WHEN: iso(65)},
        {STEP: 8, "event": "failed", "error": "the disk is full", "incarnation": 2, WHEN: iso(75)},
        {STEP: 10, "event": "published", "synchronous": True, "seconds": 1.4, "incarnation": 2, WHEN: iso(79)},
    ]
    (path / "metrics.checkpoint.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    validations = [
        {STEP: step, "web/bpb": bpb, "seconds": 3.0, "incarnation": number, WHEN: iso(at_s)}
        for step, bpb, number, at_s in ((0, 9.0, 1, 8), (6, 5.0, 1, 25), (6, 4.0, 2, 72), (10, 3.0, 2, 82))
    ]
    (path / "metrics.validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validations))
    samples = [
        {STEP: step, "prompt": "def ", "text": f"sample <b>{number}</b>\x1b[2J of {step}", "incarnation": number}
        for step, number in ((4, 1), (6, 1), (6, 2), (10, 2))
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (path / "checkpoints").mkdir()
    mark = {"step": 10, "incarnation": 2, "created_at": T0 + 80, "seconds": 1.5, "bytes": 100}
    write_json(path / "checkpoints" / "checkpoint_0000000010.done", mark)
    (path / "evals" / "0000000010").mkdir(parents=True)
    record = {"global_step": 10, "incarnation": 2, "seconds": 7.0, "created_at": T0 + 99, "metrics": {}}
    write_json(path / "evals" / "0000000010" / "results.json", record)
    evaluations = [
        {STEP: step, "eval/x/acc": score, "incarnation": number, WHEN: iso(99)}
        for step, score, number in ((8, 0.1, 1), (10, 0.5, 2))
    ]
    (path / "metrics.eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    return path


def history_of(path: Path, now_s: float = T0 + 1000) -> History:
    return read_history(replace(read_run(path), now_s=now_s), this_process())


def test_after_a_rollback_the_newer_start_counts(tmp_path: Path):
    run = history_of(make_run(tmp_path))
    assert run.metrics[STEP].tolist() == [2, 4, 6, 8, 10]
    assert run.metrics["incarnation"].tolist() == [1, 1, 2, 2, 2]
    assert run.undone[STEP].tolist() == [6, 8]
    assert [(one.step, one.values["web/bpb"]) for one in run.validations] == [(0, 9.0), (6, 4.0), (10, 3.0)]
    assert [(one.step, one.values) for one in run.evaluations] == [(10, {"eval/x/acc": 0.5})]


def test_a_curve_of_losses_is_that_of_means_where_the_lines_have_them(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    lines = [{STEP: 10, "loss/out": 3.0}, {STEP: 20, "loss/out": 2.0, "loss/mean": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line | {"incarnation": 1}) + "\n" for line in lines))
    run = history_of(tmp_path)
    assert (run.metrics[MEAN_LOSS].tolist(), run.metrics[LOSS].tolist()) == ([3.0, 2.5], [3.0, 2.0])
    assert pictures_of([run], ["x"])[0].note == "mean of neighbouring steps"


def test_what_a_rewind_undid_does_not_count(tmp_path: Path):
    note = {STEP: 2, "event": "rewind", "incarnation": 1, WHEN: iso(19)}
    with (make_run(tmp_path) / "metrics.checkpoint.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")
    run = history_of(tmp_path)
    assert run.metrics[STEP].tolist() == [2, 6, 8, 10]
    assert run.undone[STEP].tolist() == [4, 6, 8]


def test_starts_and_what_happened_to_checkpoints(tmp_path: Path):
    run = history_of(make_run(tmp_path))
    told = [(s.number, s.owner.host, s.first_step, s.last_step, s.end) for s in run.attempts]
    assert told == [(1, "n1", 0, 8, "killed"), (2, "n2", 4, 10, "finished")]
    assert [(e.kind, e.step, e.attempt, e.at_s - T0) for e in run.events] == [
        ("staged", 4, 1, 18), ("published", 4, 1, 19), ("staged", 8, 1, 27), ("failed", 8, 2, 75),
        ("published", 10, 2, 80), ("evaluated", 10, 2, 99),
    ]  # fmt: skip
    assert [event.why for event in run.events] == ["", "", "", "the disk is full", "synchronous", ""]


def test_where_the_time_went(tmp_path: Path):
    run = history_of(make_run(tmp_path))
    first, second = run.spent
    assert first == {
        "training": 6.0, "loading": 2.0,  # 4 steps that count
        "lost": 8.0 + 40 - 26,  # 4 that do not, and what came after the last line, at 26 s
        "saving": 0.5, "validating": 6.0, "starting": 7.0, "other": 0.0, "idle": 20.0,
    }  # fmt: skip
    assert second["training"] + second["loading"] == 12.0
    assert (second["starting"], second["validating"], second["idle"]) == (5.0, 6.0, 0.0)
    assert sum(second.values()) == 25.0  # 60 to 85
    assert run.seconds == {kind: first[kind] + second[kind] for kind in SPENT}


def test_the_start_up_is_the_one_that_was_logged(tmp_path: Path):
    path = make_run(tmp_path)
    before = history_of(path).seconds
    parts = {"python": 5.0, "data": 4.0, "first step": 1.5}
    note = {STEP: 0, "event": "trained", "seconds": 10.5, "parts": parts, "incarnation": 1, WHEN: iso(12)}
    with (path / "metrics.checkpoint.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")
    run = history_of(path)
    assert run.began_s == T0 + 10 - 3 - 9  # the process: before the first step at 10 s, and a validation of 3 s
    assert run.spent[0]["starting"] == 10.5
    assert run.spent[0]["training"] + run.spent[0]["loading"] == 8 - 1.5  # no second counts twice
    assert sum(run.seconds.values()) == sum(before.values()) + 2


def test_curves_over_time_and_tokens(tmp_path: Path):
    run = history_of(make_run(tmp_path))
    assert run.metrics[TRAINED_S].tolist() == [4, 8, 12, 16, 20]  # without what was trained in vain
    assert run.at(np.array([0, 5, 6, 10]), TRAINED_S).tolist() == [0, 10, 12, 20]
    assert run.at(np.array([0, 10, 99]), TOKENS).tolist() == [0, 640, 640]
    (tmp_path / "metrics.jsonl").unlink()
    assert np.isnan(history_of(tmp_path).at(np.array([5]), TOKENS)).all()


def test_runs_from_before_such_notes_were_taken(tmp_path: Path):
    path = make_run(tmp_path)
    (path / "metrics.checkpoint.jsonl").unlink()
    for file in (path / "incarnations").iterdir():
        write_json(file, {"host": "n"})
        os.utime(file, (T0 + 40, T0 + 40) if file.stem.endswith("1") else (T0 + 85, T0 + 85))
    run = history_of(path)
    assert [(one.first_step, one.end) for one in run.attempts] == [(0, "killed"), (4, "finished")]
    assert run.metrics[STEP].tolist() == [2, 4, 6, 8, 10]
    assert run.seconds["saving"] == run.seconds["starting"] == 0.0  # a gap, and no wrong figure


@pytest.mark.parametrize("name", ["", "metrics.jsonl", "incarnations", "stop.json", "evals", "config.yaml"])
def test_what_is_missing_or_damaged_leaves_a_gap(tmp_path: Path, name: str):
    path = make_run(tmp_path)
    if name == "":
        for file in [f for f in path.rglob("*") if f.is_file()]:
            file.write_bytes(b"\x00{[")
    elif name in ("evals", "incarnations"):
        (path / name).rename(path / "gone")
    else:
        (path / name).unlink()
    run = history_of(path)
    assert len(run.attempts) == 2  # their files are there, or lines of metrics tell of them
    assert len(run.metrics) == (0 if name in ("", "metrics.jsonl") else 5)


def test_a_run_that_has_just_begun(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "incarnations").mkdir()
    me = this_process()
    write_json(tmp_path / "incarnations" / "0000000001.json", asdict(me) | {"began_at": T0, "released": False})
    run = read_history(replace(read_run(tmp_path), now_s=T0 + 30), me)
    assert (state_of(run.facts, me), [one.end for one in run.attempts]) == ("starting", ["running"])
    assert run.seconds["starting"] == sum(run.seconds.values()) == 30.0
