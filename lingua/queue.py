"""What Slurm says about jobs, for people on a login node.

Promise: a cluster without Slurm, or a controller that is slow, costs the answer and no more: then nothing is known.
Cost: one `squeue` for all jobs, one `sacct` for a job that has left the queue; PATIENCE_S each at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lingua.files import RunError
from lingua.slurm import run_command

PATIENCE_S = 5.0
Ask = Callable[[Sequence[str]], str | None]
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "CONFIGURING", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it."""

    id: str
    state: str
    """RUNNING, PENDING, CANCELLED by 1000, ..."""
    reason: str = ""
    """Why it waits or ended, in Slurm's word."""
    left: str = ""
    """Of its time limit, as Slurm writes it."""
    nodes: str = ""
    array_task: str = ""
    """`4711_3`, where it is a task of an array."""

    @property
    def is_waiting(self) -> bool:
        """In the queue: it will start, or start again, by itself."""
        return self.state in _WAITING

    @property
    def is_there(self) -> bool:
        """It waits or runs: not over."""
        return self.is_waiting or self.state in _RUNNING


def ask_slurm(words: Sequence[str]) -> str | None:
    """Output of a Slurm command; None where there is none or it failed."""
    try:
        return run_command(words, timeout_s=PATIENCE_S)
    except (OSError, RunError):
        return None


def jobs_in_queue(ask: Ask = ask_slurm) -> dict[str, Job]:
    """This user's jobs that wait, run, or ended a moment ago, by id; tasks of arrays also as `4711_3`.

    Tasks that never started have no id of their own yet.
    """
    text = ask(["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%A|%T|%r|%L|%N|%F_%K"])
    jobs = [job for job in map(_job, (text or "").splitlines()) if job is not None]
    return {job.id: job for job in jobs} | {job.array_task: job for job in jobs if job.array_task}


def job_of(job_id: str, queue: dict[str, Job], ask: Ask = ask_slurm) -> Job | None:
    """A job, from the queue or from Slurm's accounts; None when Slurm does not know it (any more)."""
    if not job_id or job_id in queue:
        return queue.get(job_id)
    text = ask(
        ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=JobIDRaw,State,Reason"]
    )
    return next((job for job in map(_job, (text or "").splitlines()) if job is not None and job.id == job_id), None)


def _job(line: str) -> Job | None:
    fields = [field.strip() for field in line.split("|")]
    if len(fields) < 2 or not fields[0]:
        return None
    fields[2:3] = ["" if field == "None" else field for field in fields[2:3]]
    fields[5:6] = ["" if field.endswith("_N/A") else field for field in fields[5:6]]
    return Job(*fields[:6])
