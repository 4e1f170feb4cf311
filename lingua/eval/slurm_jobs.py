"""One Slurm job per evaluation: submitted when there is a checkpoint, waited for, its results taken over. Torch-free.

Promise: the follower holds no GPU, and may run on a login node. A job is known by its name, made of run, step and the
start that saved the checkpoint: a follower that was killed finds the job that it submitted, and while Slurm does not
answer none is submitted. A job whose evaluation is not wanted any more is cancelled.
Cost: one `squeue` per look while a job is there.

    evals/0000001000/start-3/run.sh slurm-17.out results.json    of the checkpoint that start 3 saved
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingua.checkpoint import layout, publish
from lingua.checkpoint.lookup import Checkpoint
from lingua.config.base import ConfigError
from lingua.config.command_line import (
    CommandLine,
    app_schema,
    choose_app,
    leave,
    parse_command_line,
    run_main,
)
from lingua.config.compose import compose
from lingua.config.frozen import CONFIG_FILE
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.launch import JobArgs
from lingua.eval.evaluator import Beat, Evaluator, Stopped, evaluation_tracker, read_results
from lingua.eval.spawn import alone
from lingua.files import RunError, make_folder, write_whole
from lingua.launch.submit import RUN_SCRIPT
from lingua.logger import start_logging
from lingua.run.code_snapshot import FOLDER as CODE
from lingua.run.folder import EXIT_FINISHED, end_asked_for
from lingua.signals import StopSignals
from lingua.slurm import Runner, cancel, code_lines, job_script, jobs_named, run_command, step_command, submit

log = logging.getLogger(f"{__package__}.slurm_jobs")  # also under `python -m`

PATIENCE_S = 90.0
"""After a job has gone, until its results must be seen: a shared disk's names may be a minute old."""


@dataclass(frozen=True)
class EvalJobs:
    """Evaluates each checkpoint in a job of its own; `measure` is an Evaluator's."""

    run_dir: Path
    """Absolute."""
    app: str
    words: Sequence[str]
    """Keys of the section eval, for the command line of each evaluation."""
    asked: JobArgs
    base_dir: Path
    """Where the jobs run: relative paths mean there what they mean in training."""
    python: Path = Path(sys.executable)
    poll_s: float = 30.0
    """Between two looks at a job."""
    run: Runner = run_command
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.time

    def measure(self, checkpoint: Checkpoint, beat: Beat) -> Mapping[str, Any]:
        """What the checkpoint's job has found. Raises RunError when it ended without results."""
        assert checkpoint.root is not None
        assert checkpoint.step is not None
        incarnation = publish.incarnation_of(checkpoint.root, checkpoint.step)
        folder = layout.found(self.run_dir, checkpoint.step, incarnation)
        if (there := read_results(folder)) is not None:
            return there[1]
        name = self._name(checkpoint.root, checkpoint.step, incarnation)
        self._submit(folder, name, checkpoint.step)
        try:
            return self._wait(folder, name, beat)
        except Stopped:
            raise  # the next follower finds it
        except Exception:
            self._cancel(name)
            raise

    def _name(self, root: Path, step: int, incarnation: int) -> str:
        return f"eval-{(root / layout.RUN_ID).read_text().strip()}-{step}-{incarnation}"

    def _submit(self, folder: Path, name: str, step: int) -> None:
        """Submit the job unless it waits or runs already. Raises RunError where Slurm does not answer."""
        make_folder(folder, "evals")
        script = folder / RUN_SCRIPT
        write_whole(script, self.render(folder, name, step), mode=0o755)
        job_id = submit(script, self.asked, folder, once=name, run=self.run)
        log.info("step %d is evaluated by job %s: %s", step, job_id, folder)

    def render(self, folder: Path, name: str, step: int) -> str:
        """The text of a job's script. Raises ConfigError for a setting that an #SBATCH line cannot hold."""
        code = self.run_dir / CODE if (self.run_dir / CODE).is_dir() else self.base_dir
        place = [f"ckpt={self.run_dir}@{step}", f"dump_dir={folder}"]
        command = [str(self.python), "-u", "-m", f"{self.app}.eval", *place, *self.words]
        return job_script(name, self.asked, code_lines(self.base_dir, code, step_command(command, end_together=True)))

    def _wait(self, folder: Path, name: str, beat: Beat) -> Mapping[str, Any]:
        gone_s: float | None = None
        while (there := read_results(folder)) is None:
            beat()
            try:
                is_there = bool(jobs_named(name, self.run))
            except RunError as error:  # the controller rests; eval.timeout_hours ends that too
                log.warning("%s", error)
                is_there = True
            if not is_there and gone_s is None:  # it may have written them since we looked
                gone_s = self.now()
                continue
            gone_s = None if is_there else gone_s
            if gone_s is not None and self.now() - gone_s >= PATIENCE_S:
                raise RunError(f"its job ended without results: {_last_error(folder)}")
            self.sleep(self.poll_s)
        return there[1]

    def _cancel(self, name: str) -> None:
        try:
            cancel(name=name, run=self.run)
        except RunError as error:
            log.warning("%s", error)


def _last_error(folder: Path) -> str:
    """What the newest job of a folder said at its end."""
    logs = sorted(folder.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return f"it wrote nothing into {folder}; see `sacct`"
    said = re.findall(r"^.*\berror: (.*)$", logs[-1].read_text(errors="replace")[-20_000:], re.MULTILINE)
    return f"{said[-1]} ({logs[-1]})" if said else f"see {logs[-1]}"


def follow_by_jobs(run_dir: Path, line: CommandLine, *, once: bool, base_dir: Path, run: Runner = run_command) -> int:
    """Follow a run, each of its evaluations a Slurm job; returns the exit code. Raises ConfigError."""
    config = run_dir / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{run_dir} is no run, it has no {CONFIG_FILE}; start the run first")
    if line.config or line.overlays:
        raise ConfigError(
            "with --slurm what is measured is the section eval of the run's config; change it by KEY=VALUE"
        )
    app = choose_app(CommandLine(config=str(config)))
    overrides = [f"eval.{word}" for word in line.overrides]
    run_args = compose(str(config), [], overrides, app_schema(app)).args
    args: EvalArgs = run_args.eval or EvalArgs()
    with StopSignals(("SIGINT", "SIGTERM", "SIGUSR2")) as signals:
        jobs = EvalJobs(
            run_dir.absolute(), app, line.overrides, run_args.evaluation_job(), base_dir.absolute(),
            poll_s=args.poll_s, run=run, sleep=signals.wait,
        )  # fmt: skip
        tracker = evaluation_tracker(run_args, run_dir)
        evaluator = Evaluator(
            run_dir,
            args,
            jobs.measure,
            on_record=tracker.log,
            stopping=lambda: signals.received is not None,
            sleep=signals.wait,
        )
        try:
            log.info("the evaluator of %s ends: %s", run_dir, evaluator.follow(once=once))
        finally:
            tracker.close(hurry=signals.received is not None)
        return EXIT_FINISHED if signals.received is None else end_asked_for(signals.received)[1]


def main(words: list[str]) -> int:
    """RUN [--once] [--alone] [KEY=VALUE ...]: `lingua eval --follow RUN --slurm`, as a run starts it by itself."""
    line = parse_command_line(words[1:], ["once", "alone"])
    if not words or words[0].startswith("-"):
        raise ConfigError("usage: python -m lingua.eval.slurm_jobs RUN [--once] [--alone] [KEY=VALUE ...]")
    start_logging(own_packages=("lingua",))
    run_dir, once = Path(words[0]), bool(line.flags.get("once"))
    if not line.flags.get("alone"):
        return follow_by_jobs(run_dir, line, once=once, base_dir=Path.cwd())
    with alone(run_dir) as is_ours:
        return follow_by_jobs(run_dir, line, once=once, base_dir=Path.cwd()) if is_ours else EXIT_FINISHED


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
