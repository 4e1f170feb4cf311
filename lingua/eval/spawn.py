"""The evaluator that a run starts by itself, and the job that takes over from it when the run has ended. Torch-free.

Promise: a run has one such evaluator at a time, known by a lock in `evals/` and found again by the next start. It is a
process of its own session beside rank 0 and holds no GPU while it waits. Within a Slurm job it submits a job for each
checkpoint, dies with the job at the latest, and the next start starts another; when the run has ended for good and
evaluations are owed, a job of one core takes over, which ends with the last of them. Elsewhere it evaluates itself,
outlives the run, and ends by itself. Nothing of this ever ends the run: what goes wrong is logged, with the remedy.
Cost: a process without torch (in Slurm); a look at a small file per checkpoint.

    evals/incarnations/0000000003.json    the evaluator that was started third: who, and is it alive
          follow.sh                       what the last job runs
    logs/evaluator.log 17.evaluator.out   what evaluators say; what the last job says
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lingua.checkpoint import layout
from lingua.checkpoint.lookup import run_root
from lingua.config.base import ConfigError
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.launch import JobArgs, LauncherArgs, ResourceArgs
from lingua.eval.evaluator import Evaluator
from lingua.files import RunError, make_folder, write_whole
from lingua.logger import RANK_LOGS
from lingua.run.code_snapshot import FOLDER as CODE
from lingua.run.lock import OccupiedError, RunLock, living_attempt, this_process
from lingua.slurm import Runner, code_lines, job_script, log_pattern, outside_job, run_command, submit, this_job

log = logging.getLogger(__name__)

LOG_FILE = "evaluator.log"
SCRIPT = "follow.sh"
LEAVE_S = 5.0
"""For the evaluator to leave before the last job is submitted."""
LAST_JOB_MEM = "1G"
# Where a process stands among ranks: an evaluator is none of them.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
             "MASTER_PORT")  # fmt: skip


# -- decisions -----------------------------------------------------------------------------------------------------


def follower_environment(env: Mapping[str, str], devices: str | None) -> dict[str, str]:
    """The environment of an evaluator that a rank starts: of no rank, in no job, with the GPUs `devices`.

    None: it says nothing of GPUs, since the jobs that are submitted from there would inherit it.
    """
    kept = {
        name: value
        for name, value in outside_job(env).items()
        if name not in _OF_RANKS and not name.startswith("TORCHELASTIC_")
    }
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), env.get("PYTHONPATH")]))
    kept.pop("CUDA_VISIBLE_DEVICES", None)
    return {**kept, "PYTHONPATH": path} | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})


def devices_beside(env: Mapping[str, str], n_gpus: int, n_ranks: int, wanted: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of an evaluator on the machine of `n_ranks` ranks, which see `n_gpus`: the first one that
    they leave free. Empty: none is wanted; None: there is none.
    """
    if wanted == 0:
        return ""
    seen = env["CUDA_VISIBLE_DEVICES"].split(",") if env.get("CUDA_VISIBLE_DEVICES") else list(map(str, range(n_gpus)))
    return seen[n_ranks] if n_ranks < len(seen) else None


def follow_command(run_dir: Path, app: str, *, by_jobs: bool) -> list[str]:
    """Return the command of an evaluator that a run starts."""
    how = ["--slurm"] if by_jobs else []
    return [sys.executable, "-u", "-m", f"{app}.eval", f"follow={run_dir}", *how, "--alone"]


# -- one at a time -------------------------------------------------------------------------------------------------


@contextmanager
def alone(run_dir: Path) -> Iterator[bool]:
    """Be the evaluator that the run has started; False: there is one already. Raises RunError: nobody may write."""
    lock = RunLock(make_folder(run_dir / layout.EVALS, "evals"), this_process(*this_job(os.environ)), doing="evaluated")
    try:
        lock.acquire()
    except OccupiedError as error:
        log.info("this run has its evaluator: %s", error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_there(run_dir: Path) -> bool:
    """Whether the run has an evaluator that it started. Only reads."""
    return living_attempt(run_dir / layout.EVALS) is not None


def owed_steps(run_dir: Path, args: EvalArgs) -> list[int]:
    """Published steps that wait for their evaluation, or for its line."""
    never = Evaluator(run_dir, args, lambda checkpoint, beat: {})
    return [one.step for one in never.candidates() if one.is_owed]


# -- the run's side ------------------------------------------------------------------------------------------------


class Process(Protocol):
    """The part of a started process used here."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def start_process(command: Sequence[str], env: Mapping[str, str], log_file: Path) -> Process:
    """In a session of its own: signals to the terminal or to the ranks do not reach it."""
    make_folder(log_file.parent, "dump_dir")
    with log_file.open("ab") as said:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )


@dataclass
class OwnEvaluator:
    """Rank 0's view of the evaluator of its run."""

    run_dir: Path
    """Absolute."""
    app: str
    args: EvalArgs
    slurm: JobArgs | None
    """What a job of an evaluation asks for. None: not within a Slurm job."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of an evaluator that evaluates itself."""
    base_dir: Path = field(default_factory=Path.cwd)
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    start: Callable[[Sequence[str], Mapping[str, str], Path], Process] = start_process
    run: Runner = run_command
    _process: Process | None = None

    @property
    def log_file(self) -> Path:
        return self.run_dir / RANK_LOGS / LOG_FILE

    def ensure(self) -> None:
        """Start an evaluator unless there is one."""
        if self._process is not None and (exit_code := self._process.poll()) is not None:
            self._process = None
            if exit_code:
                log.warning("the evaluator of this run ended with exit code %d; see %s", exit_code, self.log_file)
        try:
            if self._process is not None or is_there(self.run_dir):
                return
            command = follow_command(self.run_dir, self.app, by_jobs=self.slurm is not None)
            self._process = self.start(command, follower_environment(self.env, self.devices), self.log_file)
        except (OSError, RunError) as error:
            log.error("this run's evaluator cannot be started: %s; %s", error, self._remedy)
            return
        log.info("the evaluator of this run is started; it says more in %s", self.log_file)

    def hand_over(self) -> None:
        """The run has ended for good: whoever evaluates what is owed is not within this job."""
        try:
            owed = owed_steps(self.run_dir, self.args)
            if not owed:
                return
            if self.slurm is None:
                self.ensure()  # it may have died since the last save
                log.info("steps %s are still to be evaluated; that goes on beside, see %s", owed, self.log_file)
                return
            self._dismiss()
            log.info("steps %s are still to be evaluated; job %s sees to that", owed, self._submit(self.slurm))
        except (OSError, RunError, ConfigError) as error:
            log.error("what is not evaluated yet will not be by itself: %s; %s", error, self._remedy)

    @property
    def _remedy(self) -> str:
        how = " --slurm" if self.slurm is not None else ""
        return f"start `lingua eval --follow {self.run_dir}{how}`"

    def _dismiss(self) -> None:
        """Within a job the evaluator would die with it: it leaves now, so that its lock is free."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            log.warning("the evaluator does not leave; the last job waits for its end")

    def _submit(self, evaluation: JobArgs) -> str:
        """Submit the last job, unless it waits or runs already; returns its id."""
        shared = evaluation.model_dump(include={*ResourceArgs.model_fields, "time"})
        small = {"nodes": 1, "gpus": 0, "cpus_per_gpu": 1, "mem": LAST_JOB_MEM, "signal_s": 0}
        asked = LauncherArgs.model_validate(shared | small)
        name = f"follow-{(run_root(self.run_dir) / layout.RUN_ID).read_text().strip()}"
        script = make_folder(self.run_dir / layout.EVALS, "evals") / SCRIPT
        write_whole(script, self.render(name, asked), mode=0o755)
        output = log_pattern(self.run_dir / RANK_LOGS, "evaluator")
        env = follower_environment(self.env, None)
        return submit(script, asked, script.parent, output=output, once=name, env=env, run=self.run)

    def render(self, name: str, asked: LauncherArgs) -> str:
        """The text of the last job's script."""
        code = self.run_dir / CODE if (self.run_dir / CODE).is_dir() else Path(__file__).parents[2]
        command = follow_command(self.run_dir, self.app, by_jobs=True)
        return job_script(name, asked, code_lines(self.base_dir, code, command))
