"""A run folder read: whole, half there, damaged."""

from pathlib import Path

import pytest

from lingua.files import write_json
from lingua.report.facts import read_run
from lingua.run.failure import failure_of, record
from lingua.run.find import find_runs
from lingua.run.lock import RunLock


def make_run(path: Path) -> Path:
    with RunLock(path) as lock:
        assert lock.attempt == 1
    (path / "config.yaml").write_text("name: x\nsteps: 10\n")
    return path


def test_an_empty_folder_says_nothing(tmp_path: Path):
    facts = read_run(tmp_path)
    assert (facts.attempt, facts.stop, facts.metrics, facts.checkpoint, facts.failures) == (None, None, None, None, ())


def test_everything_that_is_there(tmp_path: Path):
    run = make_run(tmp_path)
    (run / "logs").mkdir()
    write_json(run / "logs" / "stop.0001.json", {"reason": "signal"})
    RunLock(run).acquire()
    write_json(run / "stop.json", {"reason": "error", "kind": "data"})
    record(run, failure_of(ValueError("x"), rank=1, step=3, incarnation=2))
    (run / "metrics.jsonl").write_text('{"global_step": 1}\n{"global_step": 2}\n{"global_st')
    (run / "metrics.validation.jsonl").write_text('{"global_step": 2, "web/bpb": 1.5}\n')
    (run / "checkpoints").mkdir()
    for step in (5, 10):
        (run / "checkpoints" / f"checkpoint_{step:010d}.done").write_text("{}")
    for step in (5, 10):
        (run / "evals" / f"{step:010d}").mkdir(parents=True)
    write_json(run / "evals" / "0000000005" / "results.json", {})
    facts = read_run(run)
    assert facts.attempt is not None
    assert (facts.attempt.number, facts.attempt.released) == (2, False)
    assert facts.earlier == ({"reason": "signal"},)
    assert facts.stop == {"reason": "error", "kind": "data"}
    assert [failure.rank for failure in facts.failures] == [1]
    assert facts.metrics == {"global_step": 2}
    assert facts.validation == {"global_step": 2, "web/bpb": 1.5}
    assert (facts.checkpoint, facts.evaluated_step, facts.name) == (10, 5, "x")


def test_checkpoints_on_another_disk_are_found(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(f"checkpoint: {{path: {tmp_path / 'big'}}}\n")
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "checkpoint_0000000007.done").write_text("{}")
    assert read_run(run).checkpoint == 7


def test_damaged_files_say_nothing(tmp_path: Path):
    run = make_run(tmp_path)
    for name in ("stop.json", "config.yaml", "metrics.jsonl", "incarnations/0000000001.json"):
        (run / name).write_text("{\x00[")
    facts = read_run(run)
    assert (facts.attempt, facts.stop, facts.config, facts.metrics) == (None, None, {}, None)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "name: !!python/object/apply:os.getcwd []",
        "seed: 2026-99-99",
        "\x00",
        "a: " + "[" * 5000 + "]" * 5000,
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    ],
)
def test_one_broken_config_hides_no_other_run(tmp_path: Path, text: str):
    for name in ("broken", "good"):
        (tmp_path / name / "incarnations").mkdir(parents=True)
    (tmp_path / "broken" / "config.yaml").write_text(text)
    (tmp_path / "good" / "config.yaml").write_text("name: good")
    broken, good = (read_run(run) for run in find_runs(tmp_path))
    assert (broken.config, good.config) == ({}, {"name": "good"})


def test_runs_are_found_below_a_folder_and_not_inside_a_run(tmp_path: Path):
    for name in ("a", "sweep/tasks/b", "a/inside", "1/2/3/4/5/deep"):
        make_run(tmp_path / name)
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a", "sweep/tasks/b"]
    assert find_runs(tmp_path / "nothing") == []
