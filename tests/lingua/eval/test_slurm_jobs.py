"""An evaluation in a job of its own, with a Slurm made of a dictionary: found again, retried, cancelled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lingua.checkpoint import layout, publish
from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.launch import JobArgs
from lingua.config.keys.train import TrainArgs
from lingua.eval.command import EvalRequest, follow_by_jobs, read_command_line
from lingua.eval.evaluator import Evaluator, write_results
from lingua.eval.slurm_jobs import EvalJobs
from lingua.files import CommandError, RunError, read_json, write_json
from lingua.run.metrics import read_metrics
from tests.checkpoints import make_run, publish_step
from tests.fakes import Clock


class Slurm:
    """Answers squeue, sbatch and scancel. A job ends after `looks` looks, by what `act` does in its folder."""

    def __init__(self, looks: int = 2) -> None:
        self.looks = looks
        self.jobs: dict[str, tuple[Path, int]] = {}
        self.submitted: list[Path] = []
        self.cancelled: list[str] = []
        self.answers = True

    def act(self, folder: Path) -> None:
        write_results(folder, {"ckpt": "x"}, {"loss": float(int(folder.parent.name)), "details": {"said": "more"}})

    def run(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        if not self.answers:
            raise RunError("squeue gave no answer")
        options = dict(word.lstrip("-").split("=", 1) for word in words[1:] if "=" in word and word.startswith("--"))
        if words[0] == "sbatch":
            folder = Path(options["chdir"])
            text = (folder / "run.sh").read_text()
            name = next(line.partition("=")[2] for line in text.splitlines() if "--job-name=" in line)
            self.jobs[name] = (folder, self.looks)
            self.submitted.append(folder)
            return f"{len(self.submitted)};cluster\n"
        name = options["name"]
        if words[0] == "scancel":
            self.cancelled.append(name)
            return ""
        if name not in self.jobs:
            return ""
        folder, left = self.jobs[name]
        self.jobs[name] = (folder, left - 1)
        if left > 0:
            return "17\n"
        del self.jobs[name]
        self.act(folder)
        return ""


def finished_run(run_dir: Path, *steps: int) -> Path:
    root = make_run(run_dir, *steps, eval={"every": 2, "keep": 1})
    write_json(run_dir / "stop.json", {"reason": "finished", "exit_code": 0})
    (root / layout.RUN_ID).write_text("cafe")
    return root


def follower(
    run_dir: Path, slurm: Slurm, clock: Clock, sleep: Callable[[float], None] | None = None, **args: float
) -> Evaluator:
    sleep = sleep or clock.sleep
    launcher = JobArgs(gpus=1)
    jobs = EvalJobs(run_dir, "apps.main", ["limit=3"], launcher, run_dir, run=slurm.run, sleep=sleep, now=clock.now)
    eval_args = EvalArgs.model_validate({"max_tries": 2, "backoff_s": 1.0} | args)
    return Evaluator(run_dir, eval_args, jobs.measure, now=clock.now, sleep=sleep)


@pytest.fixture
def clock() -> Clock:
    return Clock(1.9e9)


def test_each_checkpoint_has_a_job_and_its_results_are_taken_over(tmp_path: Path, clock: Clock) -> None:
    finished_run(tmp_path, 1, 2, 4)
    slurm = Slurm()
    follower(tmp_path, slurm, clock, max_pinned_hours=1e6).follow()
    assert [folder.parent.name for folder in slurm.submitted] == ["0000000002", "0000000004"]
    assert [(line["global_step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.eval.jsonl")] == [
        (2, 2.0),
        (4, 4.0),
    ]
    assert read_json(tmp_path / "evals/0000000002/results.json")["details"] == {"said": "more"}
    assert slurm.cancelled == []


class Killed(BaseException):
    pass


def test_a_follower_that_was_killed_finds_its_job(tmp_path: Path, clock: Clock) -> None:
    finished_run(tmp_path, 2)
    slurm = Slurm(looks=10)

    def die(seconds: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        follower(tmp_path, slurm, clock, die).follow()
    follower(tmp_path, slurm, clock).follow()
    assert len(slurm.submitted) == 1
    assert len(read_metrics(tmp_path / "metrics.eval.jsonl")) == 1


def test_a_job_that_fails_is_tried_again_then_given_up_with_its_own_words(tmp_path: Path, clock: Clock) -> None:
    finished_run(tmp_path, 2)
    slurm = Slurm()
    slurm.act = lambda folder: (folder / "slurm-1.out").write_text("loading\nrank 0 error: no such task\n")  # pyright: ignore[reportAttributeAccessIssue]
    follower(tmp_path, slurm, clock).follow()
    assert len(slurm.submitted) == 2
    assert (
        "its job ended without results: no such task" in read_json(tmp_path / "evals/0000000002/failed.json")["reason"]
    )


def test_nothing_is_submitted_while_slurm_does_not_answer(tmp_path: Path, clock: Clock) -> None:
    finished_run(tmp_path, 2)
    slurm = Slurm()
    slurm.answers = False
    one = follower(tmp_path, slurm, clock)
    one.tick()
    assert slurm.submitted == []
    slurm.answers = True
    clock.sleep(5)
    one.follow()
    assert len(slurm.submitted) == 1


def test_a_job_that_takes_too_long_is_cancelled(tmp_path: Path, clock: Clock) -> None:
    finished_run(tmp_path, 2)
    slurm = Slurm(looks=10**6)
    follower(tmp_path, slurm, clock, timeout_hours=0.1, max_tries=1).follow()
    assert slurm.cancelled == ["eval-cafe-2-1"]
    assert "longer than eval.timeout_hours" in read_json(tmp_path / "evals/0000000002/failed.json")["reason"]


def test_the_results_of_another_checkpoint_of_that_step_are_not_taken(tmp_path: Path, clock: Clock) -> None:
    root = finished_run(tmp_path, 2)
    slurm = Slurm()
    late = layout.evaluation(tmp_path, 2) / "start-1"
    publish.set_aside(tmp_path, root, 2, "later")
    publish.open_staging_dir(root, 2)
    publish_step(root, 2, incarnation=2)
    late.mkdir(parents=True)
    slurm.act(late)  # of the start before
    follower(tmp_path, slurm, clock).follow()
    assert [folder.name for folder in slurm.submitted] == ["start-2"]


NIGHT = {"mem": "64G", "partition": "night"}


@pytest.mark.parametrize(
    ("config", "nodes", "gpus", "cpus", "time"),
    [
        ({}, 1, 1, 16, "90"),
        ({"async_eval_gpus": 0}, 1, 0, 16, "90"),
        ({"async_eval_gpus": 8}, 1, 8, 16, "90"),
        ({"async_eval_gpus": 9}, 2, 5, 16, "90"),
        ({"slurm": NIGHT | {"ngpu": 16, "ncpu": 4}}, 2, 8, 4, ""),
        ({"async_eval_gpus": 8, "eval": {"launcher": NIGHT | {"time": "2:00:00"}}}, 1, 8, 16, "2:00:00"),
        ({"async_eval_gpus": 8, "eval": {"launcher": NIGHT | {"nodes": 2}}}, 2, 4, 16, ""),
        ({"async_eval_gpus": 16, "eval": {"launcher": NIGHT | {"nodes": 1}}}, 2, 8, 16, ""),
        ({"async_eval_gpus": 8, "eval": {"launcher": NIGHT | {"gpus": 4, "nodes": 2, "cpus_per_gpu": 2}}}, 2, 4, 2, ""),
    ],
)
def test_what_an_evaluation_job_asks_for(config: dict[str, Any], nodes: int, gpus: int, cpus: int, time: str) -> None:
    """The section slurm is an older spelling of eval.launcher, which counts where both are set."""
    asked = TrainArgs.model_validate({"slurm": NIGHT | {"time": 90}} | config).evaluation_job()
    expected = {"nodes": nodes, "gpus": gpus, "cpus_per_gpu": cpus, "time": time}
    assert asked == JobArgs.model_validate(expected | NIGHT)


def test_the_script_runs_as_written_wherever_it_lies(hostile_dir: Path) -> None:
    """srun and python are stand-ins that print what they are given."""
    (hostile_dir / "code").mkdir()
    tools = hostile_dir / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"$@"\n')
    python = tools / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$PYTHONPATH" "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    jobs = EvalJobs(hostile_dir, "apps.main", ["name=a b"], JobArgs(gpus=2), hostile_dir, python=python)
    script = hostile_dir / "run.sh"
    script.write_text(jobs.render(hostile_dir / "start-1", "eval-cafe-2-1", 2))
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": ""}
    said = subprocess.run([shutil.which("bash") or "bash", str(script)], env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    words = ["-u", "-m", "apps.main.eval", f"ckpt={hostile_dir}@2", f"dump_dir={hostile_dir}/start-1", "name=a b"]
    assert said.stdout == "".join(f"{word}\n" for word in (hostile_dir, hostile_dir / "code", *words))
    text = script.read_text()
    assert "#SBATCH --gpus-per-node=2\n" in text
    (step,) = [line for line in text.splitlines() if "srun" in line]
    (cpus,) = [line.partition(" ")[2] for line in text.splitlines() if "--cpus-per-task" in line and "#SBATCH" in line]
    assert f" {cpus} " in step  # which srun does not take over from the job


def request_of(*words: str) -> EvalRequest:
    return read_command_line(parse_command_line(words, ["once"]))


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("validation.max_rows=2", "unknown key validation.max_rows; did you mean validation.max_steps?"),
        ("dataset_dir=x", "unknown key eval.dataset_dir: use eval.validation.root_dir"),
        ("validation.max_steps=x", "eval.validation.max_steps is 'x'; it must be a whole number"),
    ],
)
def test_a_wrong_word_is_said_as_it_was_typed(tmp_path: Path, word: str, sentence: str) -> None:
    make_run(tmp_path, 2)
    with pytest.raises(ConfigError) as caught:
        request_of(f"ckpt={tmp_path}", word).compose()
    (problem,) = caught.value.problems
    assert problem.startswith(f"command line: {sentence}")


def test_the_command_takes_all_from_the_runs_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = make_run(tmp_path, 2, eval={"every": 2, "keep": 1})
    (root / layout.RUN_ID).write_text("cafe")
    with (tmp_path / "config.yaml").open("a") as config:
        config.write("async_eval_gpus: 4\nslurm: {partition: night}\neval: {max_tries: 1}\n")
    slurm = Slurm(looks=0)
    assert follow_by_jobs(request_of(f"follow={tmp_path}", "newest_first=true", "--once"), slurm.run) == 0
    text = (slurm.submitted[0] / "run.sh").read_text()
    for option in ("--gpus-per-node=4", "--partition=night", "--no-requeue"):
        assert f"#SBATCH {option}\n" in text
    assert text.rstrip().endswith("newest_first=true")
    for words, sentence in [
        (["follow=.", "config.yaml"], "change it by KEY=VALUE"),
        (["follow=checkpoints"], "not a run"),
        (["ckpt=."], "write follow=RUN"),
    ]:
        with pytest.raises((ConfigError, CommandError), match=sentence):
            follow_by_jobs(request_of(*words))


def test_a_signal_to_the_ranks_of_a_job_does_not_end_the_evaluator_beside_them(tmp_path: Path):
    root = make_run(tmp_path, 2, eval={"every": 2, "keep": 1})
    (root / layout.RUN_ID).write_text("cafe")
    heard: list[int] = []
    slurm = Slurm(looks=0)
    act = slurm.act

    def struck(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)  # scancel --signal=USR1 JOB
        act(folder)

    slurm.act = struck
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        assert follow_by_jobs(request_of(f"follow={tmp_path}", "--once"), slurm.run) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert slurm.submitted
    assert not heard
