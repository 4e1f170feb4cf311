"""The evaluator that a run starts: one at a time, found again, dismissed, and succeeded by a last job."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from apps.main.eval import main
from lingua.checkpoint import layout
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.launch import JobArgs, LauncherArgs
from lingua.eval.spawn import (
    Beside,
    alone,
    devices_beside,
    follow_command,
    follower_environment,
    owed_steps,
)
from lingua.files import RunError, make_folder, write_json
from lingua.run.lock import living_attempt
from tests.checkpoints import make_run


@pytest.mark.parametrize(
    ("env", "n_gpus", "n_ranks", "wanted", "expected"),
    [
        ({}, 0, 1, 0, ""),
        ({}, 8, 7, 1, "7"),
        ({}, 8, 8, 1, None),
        ({}, 0, 1, 1, None),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6"}, 3, 2, 1, "6"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6"}, 3, 2, 0, ""),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, 1, 2, None),
    ],
)
def test_which_gpu_is_free(env: dict[str, str], n_gpus: int, n_ranks: int, wanted: int, expected: str | None) -> None:
    assert devices_beside(env, n_gpus, n_ranks, wanted) == expected


def test_it_is_no_rank_and_in_no_job() -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "TORCHELASTIC_RUN_ID": "x", "SLURM_JOB_ID": "7"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "us", "HOME": "/home/me"}
    found = follower_environment({**ranks, **kept, "CUDA_VISIBLE_DEVICES": "0"}, None)
    assert found.pop("PYTHONPATH")
    assert found == kept | {"LINGUA_TRUST": "1"}  # whoever started the run chose its code
    assert follower_environment({}, "")["CUDA_VISIBLE_DEVICES"] == ""


class Started:
    """A process that was not started."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.commands: list[Sequence[str]] = []

    def start(self, command: Sequence[str], env: Mapping[str, str], log_file: Path) -> Any:
        self.commands.append(command)
        return self

    def poll(self) -> int | None:
        return self.exit_code

    def terminate(self) -> None:
        self.exit_code = -15

    def wait(self, timeout: float | None = None) -> int:
        assert self.exit_code is not None
        return self.exit_code


def due_run(run_dir: Path) -> Path:
    root = make_run(run_dir, 2, 3, eval={"every": 2, "keep": 1})
    (root / layout.RUN_ID).write_text("cafe")
    return run_dir


def every_second(step: int) -> bool:
    return step % 2 == 0


def own(run_dir: Path, process: Started, **more: Any) -> Beside:
    return Beside(run_dir, "apps.main", EvalArgs(), every_second, start=process.start, **{"slurm": None, **more})


def test_one_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.eval.command.start_logging", lambda **kwargs: None)
    process = Started()
    ours = own(due_run(tmp_path), process)
    with alone(tmp_path) as is_ours:  # of an earlier start
        assert is_ours
        assert living_attempt(tmp_path / layout.EVALS)
        with alone(tmp_path) as is_second:
            assert not is_second
        ours.ensure()
        assert process.commands == []
        assert main([f"follow={tmp_path}", "--slurm", "--alone"]) == 0, "a second one leaves"
    assert not living_attempt(tmp_path / layout.EVALS)
    for _ in range(2):
        ours.ensure()
    assert process.commands == [follow_command(tmp_path, "apps.main", by_jobs=False)]
    process.exit_code = 1
    ours.ensure()
    assert len(process.commands) == 2
    assert f"ended with exit code 1; see {tmp_path}/logs/evaluator.log" in caplog.text


def test_what_cannot_be_started_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    one = Beside(due_run(tmp_path), "apps.main", EvalArgs(), every_second, None, start=refuse)
    one.ensure()
    assert f"start `lingua eval --follow {tmp_path}`" in caplog.text


def test_the_last_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said: list[list[str]] = []
    queue = [""]

    def slurm(words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        said.append(list(words))
        return queue[0] if words[0] == "squeue" else "17;cluster\n"

    process = Started()
    asked = JobArgs(partition="night", time="90", gpus=8, exclusive=True, directives=["--reservation=night"])
    run_dir = due_run(tmp_path / "100%")
    ours = own(run_dir, process, slurm=asked, run=slurm)
    ours.ensure()
    assert process.commands == [follow_command(run_dir, "apps.main", by_jobs=True)]
    ours.end(0)
    assert process.exit_code == -15, "its lock must be free"
    assert [words[0] for words in said] == ["squeue", "sbatch"]
    assert said[1][-2] == f"--output={tmp_path}/100%%/logs/%j.evaluator.out"
    text = (run_dir / "evals/follow.sh").read_text()
    named = ("job-name=follow-cafe", "ntasks-per-node=1", "cpus-per-task=1", "partition=night", "time=90")
    for option in (*named, "exclusive", "reservation=night"):
        assert f"#SBATCH --{option}\n" in text
    assert "gpus" not in text
    queue[0] = "16\n"
    ours.end(0)
    assert said[-1][0] == "squeue", "it is there already"

    def down(words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        raise RunError("sbatch gave no answer")

    own(run_dir, Started(), slurm=JobArgs(), run=down).end(0)
    assert f"start `lingua eval --follow {run_dir} --slurm`" in caplog.text
    folder = make_folder(layout.evaluation(run_dir, 2), "evals")
    write_json(folder / layout.FAILED, {"incarnation": 1, "reason": "no luck"})
    assert owed_steps(run_dir, EvalArgs()) == []
    n_said = len(said)
    ours.end(0)
    assert len(said) == n_said, "nothing is owed"


def test_the_last_job_s_script_runs_as_written(hostile_dir: Path) -> None:
    tools = hostile_dir / "bin"
    tools.mkdir()
    one = Beside(hostile_dir, "apps.main", EvalArgs(), every_second, JobArgs(), base_dir=hostile_dir)
    text = one.render("follow-cafe", LauncherArgs(gpus=0))
    script = hostile_dir / "follow.sh"
    script.write_text(text.replace("\nexec ", "\nprintf '%s|' \"$PWD\" "))
    done = subprocess.run(["bash", str(script)], env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = follow_command(hostile_dir, "apps.main", by_jobs=True)
    assert done.stdout == "".join(f"{word}|" for word in (hostile_dir, *words))
