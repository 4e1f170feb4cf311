"""Start an evaluator beside a run, and a job that takes over at the run's end. Torch-free.

A run has one such evaluator at a time, known by a lock in `evals/`, which the next attempt finds again. It is a process
beside rank 0 in its own session, and holds no GPU while it waits.
- Within a Slurm job it submits one job per checkpoint. It ends with the run's job at the latest, and the next attempt
  starts another. If the run has ended for good and evaluations are still due, a job of one core takes over.
- Elsewhere it evaluates by itself, outlives the run, and ends when nothing is left to evaluate.
Its failures are logged with a remedy and never end the run.

    evals/incarnations/0000000003.json    the third evaluator: owner and heartbeat
          follow.sh                       script of the job that takes over
    logs/evaluator.log 17.evaluator.out   logs of the evaluators, and of that job
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lingua import scheduler
from lingua.checkpoint import layout
from lingua.checkpoint.documents import read_run_id
from lingua.checkpoint.lookup import run_root
from lingua.config import trust
from lingua.config.base import ConfigError
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.launch import JobArgs, LauncherArgs
from lingua.eval.evaluator import Evaluator
from lingua.files import RunError, make_folder, write_whole
from lingua.logger import RANK_LOGS
from lingua.run.code_snapshot import FOLDER as CODE
from lingua.run.folder import EXIT_REQUEUE
from lingua.run.lock import OccupiedError, RunLock, living_attempt, this_process

if TYPE_CHECKING:
    from lingua.checkpoint.manager import SaveReport

log = logging.getLogger(__name__)

LOG_FILE = "evaluator.log"
SCRIPT = "follow.sh"
LEAVE_S = 5.0
"""How long the evaluator may take to exit before the last job is submitted."""
LAST_JOB_MEM = "1G"


# -- decisions -----------------------------------------------------------------------------------------------------


def follower_environment(env: Mapping[str, str], devices: str | None) -> dict[str, str]:
    """Return the environment of an evaluator that a rank starts: outside of ranks and jobs, with the GPUs `devices`.

    None removes CUDA_VISIBLE_DEVICES, which the jobs that it submits would inherit.
    """
    kept = scheduler.outside_job(env)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), env.get("PYTHONPATH")]))
    kept.pop("CUDA_VISIBLE_DEVICES", None)
    kept |= {"PYTHONPATH": path, trust.VARIABLE: "1"}
    return kept | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})


def devices_beside(env: Mapping[str, str], n_gpus: int, n_ranks: int, wanted: int) -> str | None:
    """Return CUDA_VISIBLE_DEVICES of an evaluator beside `n_ranks` ranks that see `n_gpus`: the first free GPU.

    Returns "" if none is wanted, None if none is free.
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
    """Lock the run for its evaluator; yield False if there is another. Raises RunError without write access."""
    me = this_process(*scheduler.this_job(os.environ))
    lock = RunLock(make_folder(run_dir / layout.EVALS, "evals"), me, doing="evaluated")
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
            is_ours = True
        except OccupiedError as error:
            log.info("this run has its evaluator: %s", error)
            is_ours = False
        yield is_ours


def owed_steps(run_dir: Path, args: EvalArgs) -> list[int]:
    """Return the published steps that lack their evaluation or its line in metrics.eval.jsonl."""
    looks_only = Evaluator(run_dir, args, lambda checkpoint, beat: {})
    return [one.step for one in looks_only.candidates() if one.is_owed]


# -- the run's side ------------------------------------------------------------------------------------------------


class Evaluation:
    """Handles the evaluations of a run, called by apps/main/loop.py; this base class does nothing.

    `begin` and `saved` are collective; they return True on all ranks if a rank was asked to stop.
    """

    def begin(self) -> bool:
        """Run before the first step of this attempt, or if no step is left."""
        return False

    def saved(self, report: SaveReport, *, last: bool = False) -> bool:
        """Run after a save, before anything changes the weights. `last`: it was the run's last step."""
        return False

    def look(self) -> None:
        """Run between steps. Local, on every rank."""

    def end(self, exit_code: int) -> None:
        """Run when the run has ended with this exit code. Local, on every rank."""


def start_process(command: Sequence[str], env: Mapping[str, str], log_file: Path) -> subprocess.Popen[bytes]:
    """Start a process in its own session, which signals to the terminal or to the ranks do not reach."""
    make_folder(log_file.parent, "dump_dir")
    with log_file.open("ab") as log_output:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log_output, stderr=log_output, start_new_session=True
        )


@dataclass
class Beside(Evaluation):
    """Keeps an evaluator process (`lingua eval --follow`) running beside the run; used by rank 0."""

    run_dir: Path
    """Absolute."""
    app: str
    args: EvalArgs
    is_due: Callable[[int], bool]
    """Whether the checkpoint of a step is evaluated."""
    slurm: JobArgs | None
    """Resources of an evaluation's job. None: not within a Slurm job."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of an evaluator that evaluates by itself."""
    base_dir: Path = field(default_factory=Path.cwd)
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    start: Callable[[Sequence[str], Mapping[str, str], Path], subprocess.Popen[bytes]] = start_process
    run: scheduler.Runner = scheduler.run_command
    _process: subprocess.Popen[bytes] | None = None

    def begin(self) -> bool:
        self.ensure()
        return False

    def saved(self, report: SaveReport, *, last: bool = False) -> bool:
        if last or self.is_due(report.step):
            self.ensure()  # it may have died
        return False

    def end(self, exit_code: int) -> None:
        if exit_code != EXIT_REQUEUE:  # otherwise the next attempt starts its own
            self._hand_over()

    @property
    def log_file(self) -> Path:
        return self.run_dir / RANK_LOGS / LOG_FILE

    @property
    def _remedy(self) -> str:
        how = " --slurm" if self.slurm is not None else ""
        return f"start `lingua eval --follow {self.run_dir}{how}`"

    def ensure(self) -> None:
        """Start an evaluator unless there is one."""
        if self._process is not None and (exit_code := self._process.poll()) is not None:
            self._process = None
            if exit_code:
                log.warning("the evaluator of this run ended with exit code %d; see %s", exit_code, self.log_file)
        try:
            if self._process is not None or living_attempt(self.run_dir / layout.EVALS) is not None:
                return
            command = follow_command(self.run_dir, self.app, by_jobs=self.slurm is not None)
            self._process = self.start(command, follower_environment(self.env, self.devices), self.log_file)
        except (OSError, RunError) as error:
            log.error("this run's evaluator cannot be started: %s; %s", error, self._remedy)
            return
        log.info("started the evaluator of this run; its log is %s", self.log_file)

    def _hand_over(self) -> None:
        """Leave the remaining evaluations to an evaluator outside of this job."""
        try:
            owed = owed_steps(self.run_dir, self.args)
            if not owed:
                return
            if self.slurm is None:
                self.ensure()  # it may have died since the last save
                log.info("steps %s are still to be evaluated, in the background; see %s", owed, self.log_file)
                return
            self._dismiss()
            log.info("steps %s are still to be evaluated; job %s does that", owed, self._submit(self.slurm))
        except (OSError, RunError, ConfigError) as error:
            log.error("the evaluations that are owed will not happen by themselves: %s; %s", error, self._remedy)

    def _dismiss(self) -> None:
        """End the evaluator, which would die with this job, so that its lock is free for the next one."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            log.warning("the evaluator does not leave; the last job waits for its end")

    def _submit(self, evaluation: JobArgs) -> str:
        """Submit the last job, unless it is queued or running; return its id."""
        small = {"nodes": 1, "gpus": 0, "cpus_per_gpu": 1, "mem": LAST_JOB_MEM, "signal_s": 0}
        asked = LauncherArgs.model_validate(evaluation.model_dump() | small)
        name = f"follow-{read_run_id(run_root(self.run_dir))}"
        script = make_folder(self.run_dir / layout.EVALS, "evals") / SCRIPT
        write_whole(script, self.render(name, asked), mode=0o700)
        output = scheduler.log_pattern(self.run_dir / RANK_LOGS, "evaluator")
        env = follower_environment(self.env, None)
        return scheduler.submit(
            script, asked.model_dump(), script.parent, output=output, once=name, env=env, run=self.run
        )

    def render(self, name: str, asked: LauncherArgs) -> str:
        """Return the text of the last job's script."""
        code = self.run_dir / CODE if (self.run_dir / CODE).is_dir() else Path(__file__).parents[2]
        command = follow_command(self.run_dir, self.app, by_jobs=True)
        return scheduler.job_script(name, asked.model_dump(), scheduler.code_lines(self.base_dir, code, command))
