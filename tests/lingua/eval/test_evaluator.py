"""Each checkpoint is evaluated once: evaluators that fail, die, race and are overtaken."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lingua.checkpoint import layout, publish, retention
from lingua.checkpoint.lookup import Checkpoint
from lingua.checkpoint.pins import held_steps
from lingua.config.base import ConfigError
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.config.keys.eval import EvalArgs
from lingua.eval.command import training_id
from lingua.eval.evaluator import Beat, Evaluator, Stopped
from lingua.eval.plan import MAX_KILLED
from lingua.files import DISK, Files, read_json, write_json
from lingua.run.metrics import read_metrics
from tests.checkpoints import make_run, publish_step
from tests.fakes import At, Clock, FaultyFiles, KillFiles
from tests.ranks import exit_code_of

BEGAN_S = time.time()
POLL_S = EvalArgs().poll_s


# -- whole evaluators ----------------------------------------------------------------------------------------------


def finished_run(run_dir: Path, *steps: int) -> Path:
    """A run of which every second step is to be evaluated."""
    root = make_run(run_dir, *steps, eval={"every": 2, "keep": 1})
    write_json(run_dir / "stop.json", {"reason": "finished", "exit_code": 0})
    return root


def measure(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
    beat()
    assert checkpoint.damage() == []
    return {"loss": float(checkpoint.step or 0), "details": {"more": "said"}}


def held(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
    """Measures what is not published, or is somewhere else."""
    beat()
    return {"loss": float(checkpoint.step or 0), "samples": {"task": [1]}}


def raising(error: Exception) -> Callable[..., Any]:
    def fail(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        raise error

    return fail


never = raising(AssertionError("it is evaluated already"))


def die(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
    os._exit(9)


def evaluator(run_dir: Path, do: Callable[..., Any] = measure, files: Files = DISK, **more: Any) -> Evaluator:
    args = EvalArgs(max_tries=2, backoff_s=10.0, **more.pop("args", {}))
    clock = more.pop("clock", None) or Clock(BEGAN_S)
    return Evaluator(run_dir, args, do, files=files, now=clock.now, sleep=clock.sleep, **more)


def results(run_dir: Path) -> dict[int, float]:
    files = sorted((run_dir / "evals").glob("*/results.json"))
    return {int(file.parent.name): read_json(file)["metrics"]["loss"] for file in files}


def lines(run_dir: Path) -> list[int]:
    return [record["global_step"] for record in read_metrics(run_dir / "metrics.eval.jsonl")]


def test_each_once_then_it_ends(tmp_path: Path) -> None:
    finished_run(tmp_path, 1, 2, 3, 4)
    heard: list[Mapping[str, Any]] = []
    assert "finished" in evaluator(tmp_path, on_record=heard.append).follow()
    assert results(tmp_path) == {2: 2.0, 4: 4.0}
    assert heard == [{"global_step": 2, "loss": 2.0}, {"global_step": 4, "loss": 4.0}]
    written = read_json(tmp_path / "evals/0000000002/results.json")
    assert (written["global_step"], written["incarnation"], written["details"]) == (2, 1, {"more": "said"})
    (first, _) = read_metrics(tmp_path / "metrics.eval.jsonl")
    assert (first["loss"], first["incarnation"]) == (2.0, 1)
    assert "created_at" in first
    evaluator(tmp_path, never).follow()
    assert lines(tmp_path) == [2, 4]


def test_new_checkpoints_are_seen_by_their_mark(tmp_path: Path) -> None:
    began_s = time.time()  # marks bear the real time
    root, clock = make_run(tmp_path, 2, eval={"every": 2, "keep": 1}), Clock(began_s)
    (layout.folder(root, 6)).mkdir()  # no mark: not there
    one = evaluator(tmp_path, clock=clock, args={"idle_hours": 1.0})
    assert [one.tick()[:2] for _ in range(2)] == [("evaluate", 2), ("wait", -1)]
    publish_step(root, 4)
    assert one.tick()[:2] == ("evaluate", 4)
    assert "silent" in one.follow()
    assert clock.now_s - began_s == pytest.approx(3600, abs=2 * POLL_S)
    assert sorted(results(tmp_path)) == [2, 4]


def test_once_does_not_wait(tmp_path: Path) -> None:
    make_run(tmp_path, 2, 4, eval={"every": 2, "keep": 1})
    evaluator(tmp_path, args={"newest_first": True}).follow(once=True)
    assert lines(tmp_path) == [4, 2]


def test_what_fails_is_tried_again_then_given_up_and_let_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, clock, tried = finished_run(tmp_path, 2, 4), Clock(BEGAN_S), []

    def fail_on_2(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        tried.append((checkpoint.step, clock.now_s - BEGAN_S))
        if checkpoint.step == 2:
            raise ValueError("no such task")
        return {"loss": 4.0}

    evaluator(tmp_path, fail_on_2, clock=clock).follow()
    assert tried == [(2, 0.0), (4, 0.0), (2, POLL_S)]
    said = read_json(tmp_path / "evals/0000000002/failed.json")
    assert said["reason"] == "2 attempts failed, the last with: ValueError: no such task"
    assert "STEP 2 IS NOT EVALUATED" in caplog.text
    assert held_steps(tmp_path, root, clock.now_s).steps == set()
    assert lines(tmp_path) == [4]
    (tmp_path / "evals/0000000002").rename(tmp_path / "evals/elsewhere")
    evaluator(tmp_path).follow()
    assert sorted(results(tmp_path)) == [2, 4]


def test_an_evaluation_ends_in_time(tmp_path: Path) -> None:
    finished_run(tmp_path, 2)
    clock = Clock(BEGAN_S)

    def dawdle(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        while True:
            clock.sleep(600)
            beat()

    evaluator(tmp_path, dawdle, clock=clock, args={"timeout_hours": 3.0}).follow()
    assert "longer than eval.timeout_hours=3" in read_json(tmp_path / "evals/0000000002/failed.json")["reason"]


def test_a_stop_is_heeded_between_two_batches_and_is_no_failure(tmp_path: Path) -> None:
    finished_run(tmp_path, 2)
    asked: list[bool] = []

    def ask(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        asked.append(True)
        beat()
        raise AssertionError("not reached")

    for _ in range(4):
        asked.clear()
        assert evaluator(tmp_path, ask, stopping=lambda: bool(asked)).follow() == "asked to stop"
    evaluator(tmp_path).follow()
    assert results(tmp_path) == {2: 2.0}


def test_a_wrong_config_is_not_tried_with_every_checkpoint(tmp_path: Path) -> None:
    finished_run(tmp_path, 2, 4)
    with pytest.raises(ConfigError):
        evaluator(tmp_path, raising(ConfigError("eval.harness.tasks: no such task"))).follow()
    evaluator(tmp_path).follow()
    assert lines(tmp_path) == [2, 4]


def test_the_tracking_id_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    root = finished_run(tmp_path, 2)
    state = layout.folder(root, 2) / layout.train_state_file(0)
    assert training_id(tmp_path, 2) is None  # not the state of a run
    write_json(state, {"shared": {"tracking_id": "ab12"}})
    assert training_id(tmp_path, 2) == "ab12"
    assert training_id(tmp_path, 3) is None


# -- several evaluators --------------------------------------------------------------------------------------------


def test_two_share_the_work(tmp_path: Path) -> None:
    finished_run(tmp_path, 2, 4, 6, 8)
    first_did, second_did = [], []
    second = evaluator(tmp_path, lambda checkpoint, beat: second_did.append(checkpoint.step) or {"loss": 0.0})

    def first_measure(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        first_did.append(checkpoint.step)
        second.tick()
        beat()
        return {"loss": 0.0}

    evaluator(tmp_path, first_measure).follow()
    assert (first_did, second_did) == ([2, 6], [4, 8])
    assert sorted(lines(tmp_path)) == [2, 4, 6, 8]


def test_one_that_was_overtaken_while_it_slept_says_nothing(tmp_path: Path) -> None:
    finished_run(tmp_path, 2)
    tries = tmp_path / "evals/0000000002/incarnations"

    def be_overtaken(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        write_json(tries / "0000000002.json", {"incarnation": 2, "released": False, "host": "elsewhere"})
        return {"loss": -1.0}

    one = evaluator(tmp_path, be_overtaken)
    one.tick()
    assert results(tmp_path) == {}
    assert one.tick().act == "wait"  # the other one is at it
    os.utime(tries / "0000000002.json", (1, 1))
    evaluator(tmp_path).follow()
    assert results(tmp_path) == {2: 2.0}
    assert lines(tmp_path) == [2]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "a batch later"])
def test_the_run_goes_back_meanwhile(tmp_path: Path, late: bool) -> None:
    """The evaluation of a checkpoint that was set aside is not taken for that of its successor."""
    root, clock = finished_run(tmp_path, 2), Clock(BEGAN_S)

    def go_back(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        publish.set_aside(tmp_path, root, 2, "later")
        publish.open_staging_dir(root, 2)
        publish_step(root, 2, incarnation=2)
        if late:
            clock.sleep(11)
            beat()
        return {"loss": -1.0}

    evaluator(tmp_path, go_back, clock=clock).tick()
    assert results(tmp_path) == {}
    evaluator(tmp_path).follow()
    assert results(tmp_path) == {2: 2.0}
    assert [(r["global_step"], r["incarnation"]) for r in read_metrics(tmp_path / "metrics.eval.jsonl")] == [(2, 2)]


# -- before it is published ----------------------------------------------------------------------------------------


def waiting_run(run_dir: Path) -> Path:
    """A run that has saved step 2, which nobody has published yet."""
    return make_run(run_dir, 1, eval={"every": 2, "keep": 1})


def test_what_is_found_ahead_counts_once_it_is_published(tmp_path: Path) -> None:
    root = waiting_run(tmp_path)
    one = evaluator(tmp_path, held)
    one.evaluate_ahead(2, 1)
    one.catch_up()
    assert results(tmp_path) == {}
    assert not (tmp_path / "metrics.eval.jsonl").exists()
    publish_step(root, 2)
    evaluator(tmp_path, never).catch_up(measuring=False)  # whoever looks next
    assert results(tmp_path) == {2: 2.0}
    assert lines(tmp_path) == [2]
    assert read_json(tmp_path / "evals/0000000002/samples.json") == {"task": [1]}
    assert read_json(tmp_path / "evals/0000000002/results.json").keys() >= {"seconds", "created_at", "details"}


def test_what_is_found_ahead_is_not_taken_for_another_start_s_checkpoint(tmp_path: Path) -> None:
    root = waiting_run(tmp_path)
    evaluator(tmp_path, held).evaluate_ahead(2, 1)
    publish.open_staging_dir(root, 2)
    publish_step(root, 2, incarnation=2)
    one = evaluator(tmp_path)
    one.catch_up(measuring=False)
    assert results(tmp_path) == {}
    one.catch_up()
    assert lines(tmp_path) == [2]


@pytest.mark.parametrize("error", [ValueError("no luck"), Stopped()])
def test_what_fails_ahead_is_given_up_once_it_is_published_and_a_stop_is_no_failure(
    tmp_path: Path, error: Exception
) -> None:
    root, args = waiting_run(tmp_path), EvalArgs(max_tries=1)
    Evaluator(tmp_path, args, raising(error)).evaluate_ahead(2, 1)
    publish_step(root, 2)
    Evaluator(tmp_path, args, measure).catch_up()
    failed = tmp_path / "evals/0000000002/failed.json"
    if isinstance(error, Stopped):
        assert results(tmp_path) == {2: 2.0}
        assert not failed.exists()
    else:
        assert read_json(failed)["reason"] == "ValueError: no luck"
        assert results(tmp_path) == {}


def test_a_process_that_is_ended_in_an_evaluation_says_so(tmp_path: Path) -> None:
    waiting_run(tmp_path)

    def be_ended(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        one.abandon()
        os._exit(3)

    one = evaluator(tmp_path, be_ended)
    one.abandon()  # nothing goes on
    assert exit_code_of(lambda: one.evaluate_ahead(2, 1)) == 3
    assert read_json(tmp_path / "evals/0000000002/try-0001.json")["end"] == "stopped"


# -- kills ---------------------------------------------------------------------------------------------------------


def evaluate_published(run_dir: Path, files: Files) -> None:
    evaluator(run_dir, files=files).follow()


def evaluate_ahead_and_adopt(run_dir: Path, files: Files) -> None:
    evaluator(run_dir, held, files=files).evaluate_ahead(2, 1)
    publish_step(run_dir / "checkpoints", 2)
    evaluator(run_dir, held, files=files).catch_up()


@pytest.mark.parametrize("act", [evaluate_published, pytest.param(evaluate_ahead_and_adopt, marks=pytest.mark.soak)])
def test_killed_at_every_operation_nothing_is_lost_and_none_comes_twice(
    tmp_path: Path, act: Callable[[Path, Files], None]
) -> None:
    """Before or after the publication: once it is published, the next evaluator comes to one verdict."""
    made = [2] if act is evaluate_published else []
    finished_run(tmp_path / "count", 1, *made)
    counting = FaultyFiles()
    act(tmp_path / "count", counting)
    assert counting.n_done > 10
    for kill_at in range(1, counting.n_done + 1):
        root = finished_run(run_dir := tmp_path / str(kill_at), 1, *made)
        assert exit_code_of(lambda n=kill_at, r=run_dir: act(r, KillFiles(n))) == KillFiles.KILLED
        if not layout.done_mark(root, 2).exists():
            assert results(run_dir) == {}
            publish_step(root, 2)
        assert results(run_dir) in ({}, {2: 2.0}), "whole or not there"
        evaluator(run_dir).follow()
        what = f"killed at {counting.log[kill_at - 1]}"
        assert results(run_dir) == {2: 2.0}, what
        assert lines(run_dir) == [2], what
        left = [path.name for path in (root / layout.PINS).glob("*") if not path.name.startswith(".")]
        assert publish.pinned_steps(root, BEGAN_S + 3601) == set(), left


def test_killed_between_results_and_line_or_within_the_line(tmp_path: Path) -> None:
    finished_run(tmp_path, 2, 4)
    evaluator(tmp_path).follow()
    file = tmp_path / "metrics.eval.jsonl"
    whole = file.read_bytes()
    middle = whole.index(b"\n")
    for size in (0, 1, middle - 1, middle, middle + 1, middle + 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        evaluator(tmp_path).follow()
        assert sorted(lines(tmp_path)) == [2, 4]


def test_a_checkpoint_that_kills_is_given_up(tmp_path: Path) -> None:
    finished_run(tmp_path, 2)
    for _ in range(MAX_KILLED):
        assert exit_code_of(lambda: evaluator(tmp_path, die).follow()) == 9
    evaluator(tmp_path, die).follow()
    assert "were killed while they evaluated it" in read_json(tmp_path / "evals/0000000002/failed.json")["reason"]


def test_a_full_disk_holds_it_up_and_is_not_asked_all_the_time(tmp_path: Path) -> None:
    finished_run(tmp_path, 2)
    clock = Clock(BEGAN_S)
    one = evaluator(tmp_path, files=FaultyFiles(At("create .*results.json")), clock=clock)
    one.follow()
    assert results(tmp_path) == {2: 2.0}
    assert clock.now_s - BEGAN_S == POLL_S
    read = read_json(tmp_path / "evals/0000000002/try-0001.json")
    assert (read["end"], "No space left" in read["why"]) == ("failed", True)


# -- retention -----------------------------------------------------------------------------------------------------


def retain(run_dir: Path, root: Path, now_s: float) -> list[int]:
    """What the trainer does after it has published, with `keep: 1` for both periods."""
    done = layout.done_steps(root)
    args = CheckpointArgs(dump=SaveEvery(every=1, keep=1), eval=SaveEvery(every=2, keep=1))
    gone = retention.to_delete(done, args, verified=done, pinned=held_steps(run_dir, root, now_s).steps)
    for step in gone:
        publish.retire(root, step, 1)
    return gone


@pytest.mark.parametrize("ticks_per_step", [0, 1, 2])
def test_retention_loses_no_evaluation_however_slow_the_evaluator(tmp_path: Path, ticks_per_step: int) -> None:
    """A checkpoint is published and retention asked at every operation of the evaluator, or in one go."""
    root, clock, saved = make_run(tmp_path, eval={"every": 2, "keep": 1}), Clock(BEGAN_S), []

    class Saving(Files):
        def create(self, path: Path) -> int:
            if len(saved) < 12 and not saving:
                saving.append(1)
                self.save()
                saving.clear()
            return super().create(path)

        def save(self) -> None:
            saved.append(len(saved) + 1)
            publish_step(root, saved[-1])
            retain(tmp_path, root, clock.now_s)

    saving: list[int] = []
    files = Saving()
    one = evaluator(tmp_path, files=files if ticks_per_step != 1 else DISK, clock=clock)
    one.tick()
    while len(saved) < 12:
        for _ in range(ticks_per_step):
            one.tick()
        files.save()
    write_json(tmp_path / "stop.json", {"reason": "finished", "exit_code": 0})
    one.follow()
    assert sorted(results(tmp_path)) == [2, 4, 6, 8, 10, 12]
    assert sorted(lines(tmp_path)) == [2, 4, 6, 8, 10, 12]
    retain(tmp_path, root, clock.now_s)
    assert layout.done_steps(root) == [12]


def test_a_full_disk_and_an_evaluator_that_never_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, clock = make_run(tmp_path, 2, eval={"every": 2, "keep": 1}), Clock(BEGAN_S)
    made_at_s = publish.mark_facts(root, 2)["created_at"]
    clock.now_s = made_at_s

    def hang(checkpoint: Checkpoint, beat: Beat) -> dict[str, Any]:
        publish_step(root, 3)
        publish_step(root, 4)
        hours = 0
        while retain(tmp_path, root, clock.now_s) != [2]:
            assert layout.done_steps(root) == [2, 4] if hours else True
            hours += 1
            clock.sleep(3600)
            beat()
        assert hours == 6
        raise RuntimeError("it was deleted under my hands")

    with caplog.at_level(logging.ERROR):
        one = evaluator(tmp_path, hang, clock=clock, args={"max_pinned_hours": 5.0, "timeout_hours": 48.0})
        assert one.tick()[:2] == ("evaluate", 2)
    assert "STEP 2 IS NO LONGER PINNED" in caplog.text
    assert one.candidates()[0].step == 4  # what is deleted is owed no more


def test_waiting_too_long_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path, 2, eval={"every": 2, "keep": 1})
    clock = Clock(BEGAN_S)
    one = evaluator(tmp_path, raising(ValueError()), clock=clock)
    one.tick()
    clock.sleep(25 * 3600.0)
    for _ in range(3):
        one.tick()
    assert caplog.text.count("CHECKPOINT 2 HAS WAITED FOR ITS EVALUATION") == 1
