"""Run each evaluation as a Slurm job: submit it, wait for it, read its results. Torch-free.

The follower holds no GPU, and may run on a login node. A job's name consists of the run, the step and the attempt that
saved the checkpoint, so a follower that was killed and restarted finds the job that it submitted. While Slurm does not
answer, nothing is submitted. The job of an evaluation that is no longer needed is cancelled.

    evals/0000001000/start-3/run.sh slurm-17.out results.json    for the checkpoint that attempt 3 saved
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

from lingua import scheduler
from lingua.checkpoint import documents, layout, publish
from lingua.checkpoint.lookup import Checkpoint
from lingua.config.keys.launch import JobArgs
from lingua.eval.evaluator import Beat, Stopped, read_results
from lingua.files import RunError, make_folder, write_whole
from lingua.launch.submit import RUN_SCRIPT
from lingua.run.code_snapshot import FOLDER as CODE

log = logging.getLogger(__name__)

PATIENCE_S = 90.0
"""How long to wait for the results of a job that has ended: a shared disk may show old names for a minute."""


@dataclass(frozen=True)
class EvalJobs:
    """Evaluates each checkpoint in its own job; an Evaluator calls `measure`."""

    run_dir: Path
    """Absolute."""
    app: str
    words: Sequence[str]
    """Keys of the section eval, for the command line of each evaluation."""
    asked: JobArgs
    base_dir: Path
    """Working folder of the jobs, so that relative paths mean the same as in training."""
    python: Path = Path(sys.executable)
    poll_s: float = 30.0
    """Interval between checks of a job."""
    run: scheduler.Runner = scheduler.run_command
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.time

    def measure(self, checkpoint: Checkpoint, beat: Beat) -> Mapping[str, Any]:
        """Return the results of the checkpoint's job. Raises RunError if it ended without results."""
        assert checkpoint.root is not None
        assert checkpoint.step is not None
        saved_by = publish.attempt_of(checkpoint.root, checkpoint.step)
        folder = layout.found(self.run_dir, checkpoint.step, saved_by)
        if (there := read_results(folder)) is not None:
            return there[1]
        name = f"eval-{documents.read_run_id(checkpoint.root)}-{checkpoint.step}-{saved_by}"
        self._submit(folder, name, checkpoint.step)
        try:
            return self._wait(folder, name, beat)
        except Stopped:
            raise  # the next follower finds the job
        except Exception:
            try:
                scheduler.cancel(name=name, run=self.run)
            except RunError as error:
                log.warning("%s", error)
            raise

    def _submit(self, folder: Path, name: str, step: int) -> None:
        """Submit the job unless it is queued or running. Raises RunError if Slurm does not answer."""
        make_folder(folder, "evals")
        script = folder / RUN_SCRIPT
        write_whole(script, self.render(folder, name, step), mode=0o700)
        job_id = scheduler.submit(script, self.asked.model_dump(), folder, once=name, run=self.run)
        log.info("step %d is evaluated by job %s: %s", step, job_id, folder)

    def render(self, folder: Path, name: str, step: int) -> str:
        """Return the text of a job's script. Raises ConfigError for a setting that an #SBATCH line cannot hold."""
        code = self.run_dir / CODE if (self.run_dir / CODE).is_dir() else self.base_dir
        place = [f"ckpt={self.run_dir}@{step}", f"dump_dir={folder}"]
        command = [str(self.python), "-u", "-m", f"{self.app}.eval", *place, *self.words]
        # srun does not inherit --cpus-per-task from the job (Slurm 22.05 release notes).
        words = scheduler.step_command(command, cpus_per_task=self.asked.cpus_per_gpu, end_together=True)
        return scheduler.job_script(name, self.asked.model_dump(), scheduler.code_lines(self.base_dir, code, words))

    def _wait(self, folder: Path, name: str, beat: Beat) -> Mapping[str, Any]:
        gone_s: float | None = None
        while (there := read_results(folder)) is None:
            beat()
            try:
                is_there = bool(scheduler.jobs_named(name, self.run))
            except RunError as error:  # Slurm's controller may be down; eval.timeout_hours ends that too
                log.warning("%s", error)
                is_there = True
            if not is_there and gone_s is None:  # it may have written its results since the last read
                gone_s = self.now()
                continue
            gone_s = None if is_there else gone_s
            if gone_s is not None and self.now() - gone_s >= PATIENCE_S:
                raise RunError(f"its job ended without results: {_last_error(folder)}")
            self.sleep(self.poll_s)
        return there[1]


def _last_error(folder: Path) -> str:
    """Return the last error in the log of the newest job in a folder."""
    logs = sorted(folder.glob(scheduler.OWN_LOGS), key=lambda path: path.stat().st_mtime)
    if not logs:
        return f"it wrote no log into {folder}; see `{scheduler.ACCOUNTS}`"
    errors = re.findall(r"^.*\berror: (.*)$", logs[-1].read_text(errors="replace")[-20_000:], re.MULTILINE)
    return f"{errors[-1]} ({logs[-1]})" if errors else f"see {logs[-1]}"
