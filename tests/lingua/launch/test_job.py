"""What a job does inside Slurm, as far as no Slurm is needed: commands as words, and what its end is judged by."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

import lingua.launch.job
from lingua import scheduler
from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.config.keys.launch import LaunchEnvArgs, LauncherArgs
from lingua.files import RunError, read_json, write_json
from lingua.launch.job import (
    HeldJob,
    Holder,
    freeze_job,
    node_check_command,
    owned_by_another,
    rank_variables,
    ranks_command,
    read_bad_nodes,
    read_job,
    service_command,
)
from lingua.launch.requeue import Outcome
from lingua.run.failure import failure_of, record
from lingua.run.folder import archive_exit_records
from lingua.slurm import Allocation, JobState
from tests.trainer import TINY

ROOT = Path(__file__).parents[3]


def job(run_dir: Path = Path("/runs/100%"), n_nodes: int = 2, **more: object) -> HeldJob:
    facts = {
        "run_dir": run_dir, "checkpoints": run_dir / "checkpoints", "app": "apps.main", "launcher": LauncherArgs(),
        "n_ranks": 4 * n_nodes, "train_words": ["/runs/job.yaml"], "shm": None,
        "allocation": Allocation("7", restarts=0, n_nodes=n_nodes, n_tasks=4 * n_nodes, cpus_per_task=20),
    } | more  # fmt: skip
    return HeldJob(**facts)  # pyright: ignore[reportArgumentType]


def test_one_task_per_rank_sees_all_gpus_and_outlives_its_neighbours():
    words = ranks_command(job())
    assert words[0] == "srun"
    for option in ("--ntasks=8", "--cpus-per-task=20", "--kill-on-bad-exit=0", "--export=ALL"):
        assert option in words
    assert "--output=/runs/100%%/logs/%j.%t.out" in words, "a % of the path is no pattern of Slurm's"
    assert words[-3:] == ["-m", "apps.main.train", "/runs/job.yaml"]


def test_one_task_per_node_starts_the_ranks_below_it():
    words = ranks_command(job(launcher=LauncherArgs(tasks_per_node="per_node")))
    assert {"--ntasks=2", "--cpus-per-task=80"} <= set(words)
    assert words[words.index("lingua.launch.local_ranks") :][1] == "4"


def test_nodes_are_checked_by_as_many_tasks_as_ranks():
    assert node_check_command(job()) is None
    words = node_check_command(job(launcher=LauncherArgs(node_check=True, tasks_per_node="per_node")))
    assert words is not None
    assert {"--ntasks=8", "lingua.selfcheck.node_check", "--dir=/runs/100%"} <= set(words)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", {}),
        ("a warning\n", {}),
        (
            '{"bad_nodes": ["n7", "n9"], "problems": {"n7": ["disk"], "n9": ["a", "b"]}}',
            {"n7": ["disk"], "n9": ["a", "b"]},
        ),
        ('[Gloo] Rank 0\n{broken\n{"bad_nodes": ["n7"], "problems": {"n7": ["disk"]}}', {"n7": ["disk"]}),
        ('{"bad_nodes": [], "problems": {"network": ["rank 0: gloo"]}}', {}),
    ],
)
def test_what_the_node_check_says(said: str, expected: dict[str, list[str]]):
    assert read_bad_nodes(said) == expected


def test_the_service_is_a_step_of_its_own_that_holds_nothing():
    assert service_command(job()) is None
    words = service_command(job(shm="/dev/shm"))
    assert words is not None
    assert {"--overlap", "--mem=0", "--ntasks=2", "--nodes=2", "--input=none"} <= set(words)
    at = words.index("lingua.checkpoint.shm.service")
    assert words[at + 1 : at + 4] == ["/runs/100%", "--shm", "/dev/shm"]
    assert words[-1] == "--linger-s=0", "a job in its grace has no time to wait for ranks that never come"


def test_variables_of_the_config_win_over_the_shell():
    env = LaunchEnvArgs(set={"NCCL_DEBUG": "INFO"}, unset=["NCCL_IB_DISABLE"])
    shell = {"SLURM_GPU_BIND": "single:1", "NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "WARN", "HOME": "/h"}
    variables = rank_variables(job(n_nodes=1, launcher=LauncherArgs(env=env)), shell)
    port = variables.pop("MASTER_PORT")
    assert variables == {"HOME": "/h", "NCCL_DEBUG": "INFO", "MASTER_ADDR": "127.0.0.1"}
    assert 20_000 <= int(port) < 32_000


def test_a_meeting_point_is_nobody_elses():
    """Two clusters may have jobs of one number. Neither listens while the other looks: its ranks still import torch."""

    def port(run_dir: str) -> int:
        return int(rank_variables(job(Path(run_dir), n_nodes=1), {})["MASTER_PORT"])

    first = port("/runs/a")
    assert port("/runs/b") != first
    with socket.socket() as listener:
        listener.bind(("", first))
        assert port("/runs/a") != first


def test_a_job_file_brings_back_what_was_frozen(hostile_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    run_dir = hostile_dir / "run"
    words = [*TINY, f"dump_dir={json.dumps(str(run_dir))}", "launcher.max_retries=7", "--accept-change"]
    line = parse_command_line(words, ["accept-change"])
    job_file = freeze_job(lingua.launch.job.load(line, 2), line, ROOT, "7")
    read = read_job(job_file, None)
    assert (read.run_dir, read.app, read.n_ranks, read.launcher.max_retries) == (run_dir, "apps.main", 2, 7)
    assert read.train_words == [str(run_dir / "jobs" / "7.yaml"), "--accept-change"]
    assert ranks_command(read)[0] != "srun", "outside Slurm there is no srun"


def test_a_job_that_was_never_frozen(tmp_path: Path):
    with pytest.raises(RunError, match=r"99\.yaml is missing: no such job or point was frozen.*submit it again"):
        read_job(tmp_path / "99.json", None)


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ([], False),
        ([{"slurm_job_id": "7"}], False),
        ([{"slurm_job_id": "8"}], True),
        ([{"slurm_job_id": "8", "released": True}], False),
        ([{"slurm_job_id": "8"}, {"slurm_job_id": "7"}], False),
        ([{"slurm_job_id": ""}], True),
    ],
)
def test_whose_run_it_is(tmp_path: Path, owners: list[dict[str, object]], expected: bool):
    folder = tmp_path / "incarnations"
    folder.mkdir()
    (folder / ".5-6.json").write_text("a draft")
    for n, owner in enumerate(owners, 1):
        write_json(folder / f"{n:010d}.json", owner)
    assert owned_by_another(tmp_path, "7") == expected


class Controller:
    """Slurm's answers, and the jobs that were sent back."""

    def __init__(self) -> None:
        self.state, self.refuses, self.requeued = JobState("RUNNING"), False, []

    def requeue(self, job_id: str, exclude: Sequence[str]) -> None:
        if self.refuses:
            raise RunError("scontrol requeue was refused: Access denied")
        self.requeued.append((job_id, list(exclude)))


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    answers = Controller()
    monkeypatch.setattr(scheduler, "job_state", lambda job_id: answers.state)
    monkeypatch.setattr(scheduler, "requeue", answers.requeue)
    return answers


def held(run_dir: Path, restarts: int = 0, **more: Any) -> Holder:
    """The holder of an attempt that Slurm has requeued so often; reading a fact twice costs no time."""
    facts: dict[str, Any] = {"allocation": Allocation("7", restarts, 2, 8, 20)} | more
    return Holder(job(run_dir, **facts), sleep=lambda seconds: None)


def test_a_bad_node_is_avoided_from_then_on(tmp_path: Path, controller: Controller):
    holder = held(tmp_path)
    write_json(tmp_path / "stop.json", {"reason": "error", "exit_code": 1, "kind": "device", "bad_nodes": ["n3"]})
    assert holder.act(holder.outcome(1)) == 1
    assert controller.requeued == [("7", ["n3"])]
    again = held(tmp_path, 1)
    assert again.outcome(1).fruitless == 1
    assert again.outcome(1).stop is None, "stop.json is that of the attempt before"
    again.act(Outcome(75, {"exit_code": 75, "signal": "SIGTERM", "bad_nodes": ["n1"]}))
    assert controller.requeued[-1] == ("7", ["n1", "n3"])
    assert held(tmp_path).outcome(1).fruitless == 0, "a new job of the same number starts to count again"


def test_a_task_of_an_array_goes_back_alone(tmp_path: Path, controller: Controller):
    """And its run folder need not have a folder of jobs: a sweep keeps the job files of its points."""
    holder = held(tmp_path, allocation=Allocation("30", 0, 1, 1, 1, array_task="30_3"))
    holder.act(Outcome(75, {"exit_code": 75, "signal": "SIGTERM"}))
    assert controller.requeued == [("30_3", [])]
    assert (tmp_path / "jobs" / "30.tries.json").is_file()


def test_what_ranks_report_counts_also_where_stop_json_does_not_have_it(tmp_path: Path, controller: Controller):
    failures = [failure_of(OSError("away"), rank=n, step=1, incarnation=n) for n in (1, 2)]
    record(tmp_path, failures[0])
    holder = held(tmp_path)
    assert holder.outcome(1).kinds == frozenset(), "that is of the attempt before"
    record(tmp_path, replace(failures[1], kind="oom"))
    assert holder.outcome(1).kinds == {"oom"}
    holder.act(holder.outcome(1))
    assert controller.requeued == [], "a restart would fail again"


@pytest.mark.parametrize("why", ["cancelled", "switched off", "refused"])
def test_a_job_that_does_not_go_back_keeps_its_exit_code(tmp_path: Path, controller: Controller, why: str):
    controller.refuses = why == "refused"
    controller.state = JobState("COMPLETING" if why == "cancelled" else "RUNNING")
    holder = held(tmp_path, launcher=LauncherArgs(requeue=why != "switched off"))
    write_json(tmp_path / "stop.json", {"reason": "signal", "exit_code": 75, "signal": "SIGTERM"})
    assert holder.act(holder.outcome(75)) == 75
    assert controller.requeued == []


def test_progress_is_counted_in_published_steps(tmp_path: Path, controller: Controller):
    marks = tmp_path / "checkpoints"
    marks.mkdir()
    (marks / "checkpoint_0000000010.done").touch()
    holder = held(tmp_path)
    (marks / "checkpoint_0000000025.done").touch()
    assert holder.outcome(1).steps_gained == 15


def test_progress_is_counted_where_the_checkpoints_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words = [*TINY, f"dump_dir={tmp_path / 'run'}", f"checkpoint.path={tmp_path / 'disk'}"]
    line = parse_command_line(words, ["accept-change"])
    holder = Holder(read_job(freeze_job(lingua.launch.job.load(line, 1), line, ROOT, "7"), None))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "checkpoint_0000000025.done").touch()
    assert holder.outcome(1).steps_gained == 25


class Step:
    """A step that ends with this code, or, with None, does not."""

    def __init__(self, exit_code: int | None) -> None:
        self.exit_code = exit_code

    def wait(self, timeout: float | None) -> int:
        if self.exit_code is None:
            raise subprocess.TimeoutExpired("srun", timeout or 0)
        return self.exit_code

    def poll(self) -> int | None:
        return None


def test_a_job_that_is_still_running_when_its_time_is_up_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limits = iter([None, 1.0])  # extended once, then over
    monkeypatch.setattr(scheduler, "job_state", lambda job_id: JobState("RUNNING", ends_at_s=next(limits)))
    assert held(tmp_path)._wait(Step(None)) is None  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("preempted", "left_s", "is_up"), [(False, 10, True), (False, 20, False), (True, 1, True), (True, 10, False)]
)
def test_a_grace_has_a_smaller_reserve_than_a_time_limit(
    tmp_path: Path, controller: Controller, preempted: bool, left_s: float, is_up: bool
):
    controller.state = JobState("RUNNING", preempted, time.time() + left_s)
    waited = held(tmp_path)._wait(Step(0))  # pyright: ignore[reportArgumentType]
    assert waited == (None if is_up else 0)


def test_outside_slurm_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scheduler, "job_state", lambda job_id: pytest.fail("there is no Slurm"))
    holder = held(tmp_path, allocation=None)
    assert holder.act(holder.outcome(75)) == 75
    assert os.listdir(tmp_path) == []


# -- what goes wrong in the job's own code -------------------------------------------------------------------------

TERM = {"reason": "signal", "exit_code": 75, "signal": "SIGTERM", "step": 3}
USR2 = {"reason": "signal", "exit_code": 75, "signal": "SIGUSR2", "step": 3}
FAILED = {"reason": "error", "exit_code": 1, "kind": "nccl", "error": "RankError: rank 1 is gone"}
ENDS: dict[str, tuple[int | None, dict[str, Any] | None, bool]] = {
    # exit code of the ranks, what they say at their end, whether they came as far as the run folder
    "TERM": (75, TERM, True),
    "USR2": (75, USR2, True),
    "another rank fails": (1, FAILED, True),
    "KILL": (137, None, True),
    "KILL while torch is imported": (137, None, False),
    "the time is up": (None, None, True),
}


@pytest.mark.parametrize("first", ENDS)
def test_however_three_attempts_end_the_job_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: Controller, first: str
):
    """Each attempt archives the records of the one before, so that nothing is taken for its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 216 jobs
    for n, others in enumerate(itertools.product(ENDS, repeat=2)):
        controller.requeued.clear()
        run_attempts(tmp_path / str(n), [first, *others])
        assert len(controller.requeued) == 3, others


def run_attempts(run_dir: Path, ends: Sequence[str]) -> None:
    """Attempts of one job that end like this."""
    began = 0
    (run_dir / "incarnations").mkdir(parents=True)
    for restarts, end in enumerate(ends):
        exit_code, stop, opens_the_folder = ENDS[end]
        holder = held(run_dir, restarts)
        if opens_the_folder:
            began += 1
            write_json(run_dir / "incarnations" / f"{began:010d}.json", {"slurm_job_id": "7"})
            archive_exit_records(run_dir, began - 1)
        if stop is not None:
            write_json(run_dir / "stop.json", stop)
        outcome = holder.outcome(exit_code)
        assert outcome.stop == stop
        assert holder.act(outcome) == (75 if exit_code is None else exit_code)


FILES = ("stop.json", "jobs/7.tries.json", "incarnations/0000000001.json", "logs/error_0.json")


@pytest.mark.parametrize("how", ["", "{", "[]", "null", '"x"', '{"exit_code": "x", "fruitless": "x"}', "a folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_does_not_end_the_job(tmp_path: Path, controller: Controller, name: str, how: str):
    holder, path = held(tmp_path, 1), tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if how == "a folder" else path.write_text(how)
    assert holder.act(holder.outcome(137)) == 137
    assert controller.requeued == [("7", [])]


def raising(error: Exception) -> Callable[..., NoReturn]:
    def fail(*args: object, **more: object) -> NoReturn:
        raise error

    return fail


LOOKS = ("read_json", "read_failures", "owned_by_another", "done_steps", "attempt_files", "job_state", "_identity")
WRITES = ("write_json", "make_folder")
STEPS = ("rank_variables", "node_check_command", "ranks_command", "service_command", "read_bad_nodes")


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EAGAIN, "RunError", "a bug"])
@pytest.mark.parametrize("name", [*LOOKS, *WRITES, *STEPS])
def test_whatever_fails_in_the_jobs_own_code_it_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: Controller, name: str, error: int | str
):
    """Each function that `hold` calls fails, from before its first line to its last."""
    (tmp_path / "jobs").mkdir()
    write_json(tmp_path / "stop.json", TERM)
    write_json(tmp_path / "jobs" / "7.tries.json", {"fruitless": 0, "avoid": []})
    raised = OSError(error, "x") if isinstance(error, int) else RunError("x") if error == "RunError" else KeyError("x")
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: subprocess.CompletedProcess(words, 1, b"{}"))
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: Step(137))
    monkeypatch.setattr(scheduler if name == "job_state" else lingua.launch.job, name, raising(raised))
    holder = held(tmp_path, 1, launcher=LauncherArgs(node_check=True), shm="/dev/shm")
    assert holder.hold({"PATH": os.environ["PATH"]}) in (1, 75, 137)
    assert controller.requeued == [("7", [])]


@pytest.mark.usefixtures("controller")
def test_a_fact_that_comes_at_the_second_look_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    holder = held(tmp_path)
    write_json(tmp_path / "stop.json", USR2)
    answers: list[Exception | None] = [OSError(errno.ESTALE, "Stale file handle"), None]

    def read(path: Path) -> Any:
        if path.name == "stop.json" and (error := answers.pop(0)) is not None:
            raise error
        return read_json(path)

    monkeypatch.setattr(lingua.launch.job, "read_json", read)
    assert holder.outcome(1).stop == USR2


def test_retries_that_cannot_be_counted_do_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: Controller):
    """A read-only run folder must not requeue a job forever; what Slurm takes away comes back though."""
    monkeypatch.setattr(lingua.launch.job, "write_json", raising(OSError(errno.EROFS, "Read-only file system")))
    for restarts in range(6):
        held(tmp_path, restarts).act(Outcome(1))
    assert len(controller.requeued) == LauncherArgs().max_retries
    held(tmp_path, 6).act(Outcome(75, TERM))
    assert len(controller.requeued) == LauncherArgs().max_retries + 1


@pytest.mark.parametrize("words", [["begin"], ["hold", "jobs/7.json"]])
def test_numbers_of_tasks_that_contradict_each_other_are_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, controller: Controller, words: list[str]
):
    monkeypatch.setattr(logging, "basicConfig", lambda **more: None)
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "2", "CONFIG_FILE": "x.yaml"}
    monkeypatch.setattr(os, "environ", env)
    with pytest.raises(ConfigError, match="--ntasks=1, but --ntasks-per-node=2 on --nodes=1 makes 2; leave out"):
        lingua.launch.job.main(words)
    assert controller.requeued == []


@pytest.mark.parametrize(
    ("error", "restarts", "comes_back"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), 0, True),
        (OSError(errno.EIO, "Input/output error"), 2, True),
        (OSError(errno.EIO, "Input/output error"), 3, False),  # a count of the failures alone cannot be had
        (KeyError("a bug of ours"), 0, True),
        (RunError("jobs/7.yaml is missing: no such job; submit it again"), 0, False),
    ],
)
def test_a_job_that_cannot_read_what_it_is(
    monkeypatch: pytest.MonkeyPatch, controller: Controller, error: Exception, restarts: int, comes_back: bool
):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **more: None)
    monkeypatch.setattr(lingua.launch.job, "read_job", raising(error))
    monkeypatch.setattr(os, "environ", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)})
    if comes_back:
        assert lingua.launch.job.main(["hold", "jobs/7.json"]) == 1
    else:
        with pytest.raises(type(error)):
            lingua.launch.job.main(["hold", "jobs/7.json"])
    assert controller.requeued == ([("7", [])] if comes_back else [])
