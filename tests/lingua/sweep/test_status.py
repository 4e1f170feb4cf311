"""States of points, what is started again, and the figures that rank them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from lingua.files import RunError
from lingua.report.facts import RunFacts
from lingua.run.lock import Attempt, Owner, this_process
from lingua.slurm import QueuedJob
from lingua.sweep.status import (
    LOSS_IS,
    PointStatus,
    as_record,
    best_of,
    notes,
    ranked_by,
    read_points,
    smoothed,
    state_of_point,
    table,
    to_rerun,
)
from lingua.sweep.sweep import Submission, Sweep

ME = Owner("here", "boot", "pids", 7, "1")
ELSEWHERE = replace(ME, host="there", slurm_job_id="41")


def point(number: int = 1, state: str = "finished", **more: Any) -> PointStatus:
    facts: dict[str, Any] = {
        "point": number, "values": {"optim.lr": number / 1000}, "run": f"out/s/{number}", "state": state, "kind": None,
        "cause": "", "step": 100, "n_steps": 100, "loss": 3.0 + number, "best": 2.5, "best_step": 90, "held_out": None,
        "held_out_step": None, "job": f"4711_{number}", "job_state": "", "busy": state in ("queued", "running"),
    }  # fmt: skip
    return PointStatus(**facts | more)


def facts(
    stop: dict[str, Any] | None, job: QueuedJob | None, *, started: bool = True, released: bool = True
) -> RunFacts:
    attempt = Attempt(1, ELSEWHERE, released) if started else None
    return RunFacts(Path("run"), attempt=attempt, stop=stop, job=job)


def job(state: str, job_id: str = "41") -> QueuedJob:
    return QueuedJob(job_id, state, array_task="41_1")


SAVED = {"reason": "signal", "exit_code": 75}
FAILED = {"reason": "error", "exit_code": 1, "kind": "nan"}


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (facts(None, None, started=False), "new"),
        (facts(None, job("PENDING"), started=False), "queued"),
        (facts(None, job("RUNNING"), started=False), "starting"),
        (facts(None, job("FAILED"), started=False), "failed"),  # before it had a run folder
        (facts(FAILED, None), "failed"),
        (facts(FAILED, job("RUNNING")), "failed"),  # its job is about to end
        (facts(FAILED, job("RUNNING", "52")), "starting"),  # started again
        (facts(FAILED, job("PENDING", "52")), "queued"),
        (facts(SAVED, job("PENDING")), "queued"),
        (facts(SAVED, job("CANCELLED")), "saved"),
        (facts({"reason": "finished", "exit_code": 0}, job("RUNNING")), "finished"),  # a checkpoint is still written
        (facts(None, job("RUNNING"), released=False), "starting"),
        (facts(None, job("NODE_FAIL")), "killed"),
    ],
)
def test_states(seen: RunFacts, state: str):
    assert state_of_point(seen, ME) == state


@pytest.mark.parametrize(
    ("named", "skipped", "chosen"),
    [
        ([], [], [2, 3, 4, 8]),
        ([], ["nan"], [3, 4, 8]),
        ([7, 2], [], [2, 7]),
        ([2], ["nan"], []),
    ],
)
def test_what_is_started_again(named: list[int], skipped: list[str], chosen: list[int]):
    points = [
        point(1),
        point(2, "failed", kind="nan"),
        point(3, "killed"),
        point(4, "new"),
        point(5, "running"),
        point(6, "queued"),
        point(7, "stopped"),
        point(8, "saved"),
        point(9, "failed", kind="nccl", busy=True),  # its job has not decided yet whether it comes back
    ]
    if chosen:
        assert to_rerun(points, named, skipped) == chosen
    else:
        with pytest.raises(RunError, match="nothing to start again"):
            to_rerun(points, named, skipped)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ([], "nothing to start again: of 3 points 2 finished, 1 running"),
        ([1], "point 1 is finished, so it cannot be started again"),
        ([3], "point 3 is running, so it cannot be started again"),
        ([4], "there is no point 4; the points are 1 to 3"),
    ],
)
def test_what_is_not_started_again(named: list[int], sentence: str):
    with pytest.raises(RunError, match=sentence):
        to_rerun([point(1), point(2), point(3, "running")], named)


def test_the_best_is_a_finished_one_by_one_figure_for_all():
    points = [point(1, loss=3.0), point(2, loss=2.9), point(3, "running", loss=1.0)]
    best = best_of(points)
    assert (ranked_by(points), best and best.point) == ("loss", 2)
    points = [
        replace(point(1), held_out=1.0, held_out_step=100),
        replace(point(2), loss=1.0, held_out=1.1, held_out_step=100),
        point(3, "failed", held_out=0.1, held_out_step=10),
    ]
    best = best_of(points)
    assert (ranked_by(points), best and best.point) == ("held_out", 1)
    assert ranked_by([replace(points[0], held_out_step=50), points[1]]) == "loss", "not held out after the last step"
    assert best_of([point(1, "failed"), point(2, loss=None)]) is None


@pytest.mark.parametrize(
    ("losses", "averages"),
    [([], []), ([3.0], [3.0]), ([3.0, 2.0], [3.0, 2.0]), ([4.0, 2.0] * 20, [4.0, *[3.0] * 39])],
)
def test_a_running_average_over_a_twentieth(losses: list[float], averages: list[float]):
    assert smoothed(losses) == averages


def run_folder(folder: Path, losses: list[float | None], stop: dict[str, Any] | None, job_id: str = "") -> None:
    (folder / "incarnations").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\nsteps: 3\n")
    owner = {"host": "gone", "pid": 1, "slurm_job_id": job_id, "incarnation": 1, "released": stop is not None}
    (folder / "incarnations" / "0000000001.json").write_bytes(orjson.dumps(owner))
    os.utime(folder / "incarnations" / "0000000001.json", (0, 0))
    lines = [{"global_step": i, "loss/out": x, "optim/total_tokens": 64 * i} for i, x in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if stop is not None:
        (folder / "stop.json").write_bytes(orjson.dumps(stop))


def test_a_sweep_is_read_and_told(tmp_path: Path):
    values = [{"optim.lr": lr, "model": "llama_1B"} for lr in (1e-3, 3e-4, 1.0, 3.0)]
    sweep = Sweep(tmp_path, "rates", ["exp.yaml"], list(values[0]), values, None, [Submission("41", [1, 2, 3, 4])])
    finished = {"reason": "finished", "exit_code": 0, "step": 3}
    run_folder(tmp_path / "1", [5.0, 4.0, 3.0], finished, "42")
    (tmp_path / "1" / "metrics.validation.jsonl").write_text(
        '{"global_step": 3, "a/bpb": 1.0, "b/bpb": 2.0, "a/nll": 9.0}\n{"global_step": 4, "a/bpb": null}\n'
    )
    run_folder(tmp_path / "2", [5.0, None, 4.5], None, "43")
    run_folder(tmp_path / "3", [6.0], {**FAILED, "step": 2, "error": "the loss is nan\nand more"}, "44")
    queue = {
        "41_2": QueuedJob("43", "PENDING", array_task="41_2"),
        "41_4": QueuedJob("41", "PENDING", array_task="41_4"),
    }
    read = read_points(sweep, queue, this_process())
    points = [each for each, _ in read]
    assert [(p.state, p.busy, p.job) for p in points] == [
        ("finished", False, "41_1"),
        ("queued", True, "41_2"),
        ("failed", False, "41_3"),
        ("queued", True, "41_4"),
    ]
    assert [curve.tokens for _, curve in read] == [[64, 128, 192], [64, 192], [64], []]
    assert (points[0].held_out, points[0].held_out_step, points[2].cause) == (1.5, 3, "nan: the loss is nan")
    columns, rows, right = table(sweep, points)
    assert columns == ["point", "lr", "model", "state", "step", "of", "loss", "best", "held-out", "job"]
    assert set(columns) - set(right) == {"state", "job"}
    assert rows == [
        ("1", "0.001", "llama_1B", "finished", "3", "3", "3.0000", "3.0000", "1.5000", "41_1"),
        ("2", "0.0003", "llama_1B", "queued", "3", "3", "4.5000", "4.5000", "-", "41_2 PENDING"),
        ("3", "1", "llama_1B", "failed (nan)", "2", "3", "6.0000", "6.0000", "-", "41_3"),
        ("4", "3", "llama_1B", "queued", "-", "-", "-", "-", "-", "41_4 PENDING"),
    ]
    assert notes(points) == [
        f"loss: {LOSS_IS}; best: its lowest",
        "held-out: bits per byte, the mean of the sources",
        f"best of those finished: point 1, held-out 1.5000, {tmp_path / '1'}",
    ]
    told = as_record(sweep, points)
    assert (told["best"], told["ranked_by"], told["points"][2]["kind"]) == (1, "held_out", "nan")
