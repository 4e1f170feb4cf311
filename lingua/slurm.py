"""Slurm facts from the environment, and the few commands that a job gives about itself.

Promise: SLURM_* variables are read here, in the first lines of `scripts/job.sh` and, for the number of a task, in the
`run.sh` of a sweep; nowhere else. Commands are
lists of words, never shell text; what Slurm answers to a command it refuses is the error.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from lingua.files import RunError


@dataclass(frozen=True)
class SlurmTask:
    """This process as a task of an `srun` step of several tasks."""

    job_id: str
    rank: int
    n_tasks: int
    local_rank: int
    n_local_tasks: int
    node: int
    head_node: str


def this_task(env: Mapping[str, str]) -> SlurmTask | None:
    """The task this process is, or None when no `srun` of several tasks started it.

    Slurm sets SLURM_NTASKS in every shell of an allocation, also where a bare `python` was typed and no other rank
    will ever come; SLURM_STEP_NUM_TASKS is set for the tasks of a step only.
    """
    n_tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if n_tasks <= 1 or "SLURM_PROCID" not in env:
        return None
    per_node = _expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", str(n_tasks)))
    node = int(env.get("SLURM_NODEID", "0"))
    return SlurmTask(
        job_id=env.get("SLURM_JOB_ID", "0"),
        rank=int(env["SLURM_PROCID"]),
        n_tasks=n_tasks,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        n_local_tasks=per_node[min(node, len(per_node) - 1)],
        node=node,
        head_node=first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")),
    )


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave to the job whose batch script this process is."""

    job_id: str
    restarts: int
    """Times it was requeued."""
    n_nodes: int
    n_tasks: int
    cpus_per_task: int | None
    array_task: str = ""
    """`4711_3`, where the job is a task of an array."""

    @property
    def address(self) -> str:
        """What Slurm's commands call this job. An array's last task has the id of the array, which means all tasks."""
        return self.array_task or self.job_id


def this_allocation(env: Mapping[str, str]) -> Allocation | None:
    """The allocation of this process; None outside Slurm."""
    if not env.get("SLURM_JOB_ID"):
        return None
    n_nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    per_node, cpus = env.get("SLURM_NTASKS_PER_NODE"), env.get("SLURM_CPUS_PER_TASK")
    return Allocation(
        *this_job(env),
        n_nodes=n_nodes,
        # SLURM_NTASKS is that of the submission, also where a requeued job was given fewer nodes.
        n_tasks=n_nodes * int(per_node) if per_node else int(env.get("SLURM_NTASKS") or n_nodes),
        cpus_per_task=int(cpus) if cpus else None,
        array_task=f"{env['SLURM_ARRAY_JOB_ID']}_{task}" if (task := env.get("SLURM_ARRAY_TASK_ID")) else "",
    )


def this_node(env: Mapping[str, str]) -> tuple[int, int]:
    """(number of this node, nodes) of the step; (0, 1) outside one."""
    return int(env.get("SLURM_NODEID", "0")), int(env.get("SLURM_STEP_NUM_NODES", "1"))


def this_node_name(env: Mapping[str, str]) -> str:
    """Slurm's name of this node, which `--exclude` understands; the host's own outside Slurm."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def this_job(env: Mapping[str, str]) -> tuple[str, int]:
    """(job id, times it was requeued); ("", 0) outside Slurm."""
    return env.get("SLURM_JOB_ID", ""), int(env.get("SLURM_RESTART_COUNT") or 0)


def first_host(node_list: str) -> str:
    """First name of a Slurm node list: `gpu[003-007,9],x1` -> `gpu003`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", node_list)
    if found is None:
        raise ValueError(f"node list {node_list!r} names no node")
    return found[1] + (found[2] or "") + found[3]


def _expand_counts(text: str) -> list[int]:
    """Slurm's short form of counts per node: `8(x2),4` -> [8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise ValueError(f"tasks per node {text!r} cannot be read")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def job_end_s(env: Mapping[str, str], grace_s: float | None, asked_at_s: float) -> float | None:
    """When a job that was asked to stop ends, in seconds since the epoch; None: nobody knows.

    SLURM_JOB_END_TIME is its time limit (sbatch(1), "output environment variables"). A preemption ends it sooner, by a
    grace that the job is not told: `grace_s`.
    """
    limits = [] if grace_s is None else [asked_at_s + grace_s]
    if env.get("SLURM_JOB_END_TIME", "").isdigit():
        limits.append(float(env["SLURM_JOB_END_TIME"]))
    return min(limits, default=None)


def node_of_each_task(env: Mapping[str, str]) -> list[str]:
    """The node of every task of this step, by rank, as `--distribution=block` lays them out; [] outside a step."""
    if "SLURM_STEP_NODELIST" not in env:
        return []
    nodes = expand_hosts(env["SLURM_STEP_NODELIST"])
    counts = _expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return [node for node, n_tasks in zip(nodes, counts, strict=False) for _ in range(n_tasks)]


def expand_hosts(node_list: str) -> list[str]:
    """`gpu[003-004,9],x1` -> ["gpu003", "gpu004", "gpu9", "x1"]."""
    hosts = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        prefix, _, rest = part.partition("[")
        numbers, _, suffix = rest.partition("]")
        for span in numbers.split(",") if rest else [""]:
            first, _, last = span.partition("-")
            ends = range(int(first), int(last) + 1) if last else None
            middle = [span] if ends is None else [f"{number:0{len(first)}d}" for number in ends]
            hosts += [prefix + number + suffix for number in middle]
    return hosts


# -- commands ------------------------------------------------------------------------------------------------------

Runner = Callable[[Sequence[str]], str]


def run_command(words: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
    """Output of a Slurm command. Raises RunError with its own words."""
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=timeout_s)
    except FileNotFoundError:
        raise RunError(f"there is no {words[0]} on this machine; run this where Slurm is, or add --local") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} gave no answer within {timeout_s:.0f} s; the controller may be down") from None
    if done.returncode:
        raise RunError(f"{' '.join(words[:2])} was refused: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@dataclass(frozen=True)
class JobState:
    """A job as the controller sees it."""

    name: str
    """RUNNING, COMPLETING, ..."""
    preempted: bool = False
    ends_at_s: float | None = None
    """Seconds since the epoch: its time limit, or the end of its grace. None: no limit."""

    @property
    def cancelled(self) -> bool:
        """Somebody, or Slurm, is already ending it: a cancelled job must not come back by our hand.

        Seen in Slurm 22.05: after `scancel` a job is COMPLETING while its tasks still run; a preempted one in its
        grace and one before its time limit are RUNNING; what Slurm requeues by itself is COMPLETING too.
        """
        return self.name not in ("RUNNING", "SUSPENDED", "SIGNALING", "UNKNOWN")


def read_job_state(text: str) -> JobState:
    """From the output of `scontrol show job`."""
    facts = dict(re.findall(r"(\w+)=(\S*)", text))
    return JobState(
        facts.get("JobState", "UNKNOWN"), facts.get("PreemptTime", "None") != "None", _epoch_s(facts.get("EndTime", ""))
    )


def _epoch_s(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None  # Unknown


def job_state(address: str, run: Runner = run_command) -> JobState:
    """Of the job with this `Allocation.address`. Raises RunError when the controller does not answer."""
    return read_job_state(run(["scontrol", "--oneliner", "show", "job", address]))


def jobs_named(name: str, run: Runner = run_command) -> list[str]:
    """Ids of this user's jobs of that name that wait or run. Raises RunError when the controller does not answer."""
    return run(["squeue", "--me", "--noheader", f"--name={name}", "--format=%A"]).split()


REQUEUE_PAUSES_S = (1.0, 4.0)
"""Before the second and the third try: a controller that is just being restarted refuses too."""


def requeue(
    address: str,
    exclude: Sequence[str] = (),
    run: Runner = run_command,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Put the job with this `Allocation.address` back into the queue, away from the nodes of `exclude`.

    This process is killed soon after. Nodes can be excluded of a pending job only: so first the one, then, before the
    kill, the other.
    """
    for pause_s in REQUEUE_PAUSES_S:
        try:
            run(["scontrol", "requeue", address])
            break
        except RunError as error:
            if "denied" in str(error).lower():
                raise
        sleep(pause_s)
    else:
        run(["scontrol", "requeue", address])
    if exclude:
        run(["scontrol", "update", f"JobId={address}", f"ExcNodeList={','.join(exclude)}"])


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
