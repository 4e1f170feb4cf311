"""Slurm's variables, commands and answers; the text of its jobs is in slurm_script.py.

All other modules import both from scheduler.py, which lists what another scheduler needs. A command is a list of words,
not shell text.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lingua.files import ConfigError, RunError

OWN_VARIABLES = "SLURM|SBATCH"  # prefixes of variables that explain a run
STEP_VARIABLES = ("SLURM_STEP_NUM_TASKS",)  # without these a process is not a task of a step
CANCEL, ACCOUNTS = "scancel", "sacct"  # commands to cancel a job, and to see how it ended


@dataclass(frozen=True)
class StepTask:
    """This process as a task of an `srun` step of several tasks."""

    step: str
    rank: int
    n_tasks: int
    local_rank: int
    n_local_tasks: int
    node: int
    head_node: str
    is_first: bool = False
    """Whether Slurm itself started this process, not another process of the task."""


def this_task(env: Mapping[str, str]) -> StepTask | None:
    """Return the task that this process is, or None if no `srun` of several tasks started it.

    SLURM_NTASKS is set in every shell of an allocation, even for a plain `python` that no other rank will ever join;
    SLURM_STEP_NUM_TASKS is set only for the tasks of a step.
    """
    n_tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if n_tasks <= 1 or "SLURM_PROCID" not in env:
        return None
    per_node = _expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", str(n_tasks)))
    node = int(env.get("SLURM_NODEID", "0"))
    return StepTask(
        step=f"{env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_STEP_ID', '0')}",
        rank=int(env["SLURM_PROCID"]),
        n_tasks=n_tasks,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        n_local_tasks=per_node[min(node, len(per_node) - 1)],
        node=node,
        head_node=expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost"))[0],
        is_first=env.get("SLURM_TASK_PID") == str(os.getpid()),
    )


@dataclass(frozen=True)
class Allocation:
    """Resources of the job whose batch script this process is."""

    job_id: str
    restarts: int
    """How often it was requeued."""
    n_nodes: int
    n_tasks: int
    cpus_per_task: int | None
    array_task: str = ""
    """`4711_3` if the job is a task of an array."""

    @property
    def address(self) -> str:
        """The job in commands: the last task of an array has the array's id, which would mean all tasks."""
        return self.array_task or self.job_id


def this_allocation(env: Mapping[str, str]) -> Allocation | None:
    """Return the allocation of this process, or None outside Slurm."""
    if not env.get("SLURM_JOB_ID"):
        return None
    n_nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    per_node, cpus = env.get("SLURM_NTASKS_PER_NODE"), env.get("SLURM_CPUS_PER_TASK")
    return Allocation(
        *this_job(env),
        n_nodes=n_nodes,
        # SLURM_NTASKS is from the submission, even if a requeued job got fewer nodes.
        n_tasks=n_nodes * int(per_node) if per_node else int(env.get("SLURM_NTASKS") or n_nodes),
        cpus_per_task=int(cpus) if cpus else None,
        array_task=array_task(env["SLURM_ARRAY_JOB_ID"], task) if (task := env.get("SLURM_ARRAY_TASK_ID")) else "",
    )


def array_task(job_id: str, number: int | str) -> str:
    """Name a task of an array in commands."""
    return f"{job_id}_{number}"


def require_tasks_that_fit(env: Mapping[str, str]) -> None:
    """Raise ConfigError if the job was submitted with numbers of tasks that contradict each other.

    A requeued job is not checked: it may have other nodes, and its numbers were checked at its first start.
    """
    job, total, per_node = this_allocation(env), env.get("SLURM_NTASKS"), env.get("SLURM_NTASKS_PER_NODE")
    if job is not None and not job.restarts and total and per_node and int(total) < job.n_tasks:
        raise ConfigError(
            f"the job was submitted with --ntasks={total}, but --ntasks-per-node={per_node} on --nodes={job.n_nodes} "
            f"makes {job.n_tasks}; leave out --ntasks"
        )


def this_node(env: Mapping[str, str]) -> tuple[int, int]:
    """Return (number of this node, nodes) of the step; (0, 1) outside one."""
    return int(env.get("SLURM_NODEID", "0")), int(env.get("SLURM_STEP_NUM_NODES", "1"))


def this_node_name(env: Mapping[str, str]) -> str:
    """Return Slurm's name of this node, which `--exclude` understands, or the host's own outside Slurm."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def this_job(env: Mapping[str, str]) -> tuple[str, int]:
    """Return (job id, how often it was requeued); ("", 0) outside Slurm."""
    return env.get("SLURM_JOB_ID", ""), int(env.get("SLURM_RESTART_COUNT") or 0)


def _expand_counts(text: str) -> list[int]:
    """Expand counts per node: `8(x2),4` -> [8, 8, 4]."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in text.split(",")]
    if None in found:
        raise ValueError(f"tasks per node {text!r} cannot be read")
    return [int(each[1]) for each in found if each for _ in range(int(each[2] or 1))]


def job_end_s(env: Mapping[str, str], grace_s: float | None, asked_at_s: float) -> float | None:
    """Return when a job that was asked to stop will be killed, in seconds since the epoch, or None if unknown.

    SLURM_JOB_END_TIME is its time limit (sbatch(1), "output environment variables"). A preemption kills it sooner,
    after a grace that no variable holds: `grace_s`.
    """
    limits = [] if grace_s is None else [asked_at_s + grace_s]
    if env.get("SLURM_JOB_END_TIME", "").isdigit():
        limits.append(float(env["SLURM_JOB_END_TIME"]))
    return min(limits, default=None)


def node_of_each_task(env: Mapping[str, str]) -> list[str]:
    """Return the node of each task of this step, as `--distribution=block` places them; [] outside a step."""
    if "SLURM_STEP_NODELIST" not in env:
        return []
    nodes = expand_hosts(env["SLURM_STEP_NODELIST"])
    counts = _expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return [node for node, n_tasks in zip(nodes, counts, strict=False) for _ in range(n_tasks)]


def expand_hosts(node_list: str) -> list[str]:
    """Expand a node list: `gpu[003-004,9],x1` -> ["gpu003", "gpu004", "gpu9", "x1"]."""
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


# -- environments --------------------------------------------------------------------------------------------------

# Variables of one job or step must not reach another, but sbatch passes on all variables of its shell.
_OF_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
# A site's GPU_BIND would bind GPUs to tasks (see `step_command`); without a GPU count a step gets all of the job's.
_OF_STEP = re.compile(
    r"SLURM_(STEP|CPU_BIND|MEM_BIND|GPU_BIND|SRUN_COMM|LAUNCH_NODE|PTY|(GPUS(_PER_(TASK|SOCKET))?|TRES_PER_TASK)$)"
)
_OF_RANK = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
_MEMORY = ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE")


def outside_job(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a process outside of any job that is not a rank, even if this process is one."""
    own = {name for name in env if name.startswith("SLURM_") or _OF_RANK.fullmatch(name)}
    return {name: value for name, value in env.items() if name not in own or name in _OF_CLUSTER}


def for_steps(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for the steps of this job, without variables of a step in which it was submitted.

    If two amounts of memory are set, one is from that step, and srun refuses both; without any, a step gets all memory
    of the job.
    """
    left = {name for name in env if _OF_STEP.match(name) or _OF_RANK.fullmatch(name)}
    if len(amounts := env.keys() & set(_MEMORY)) > 1:
        left |= amounts
    return {name: value for name, value in env.items() if name not in left}


# -- commands ------------------------------------------------------------------------------------------------------

Runner = Callable[..., str]
"""`run_command`, or its replacement in a test: (words, env=...) -> output."""


class RefusedError(RunError):
    """Slurm has certainly not done what was asked."""


def run_command(words: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
    """Run a Slurm command and return its output. Raises RunError with Slurm's message."""
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=timeout_s)
    except FileNotFoundError:
        raise RefusedError(f"there is no {words[0]} on this machine; run this where Slurm is, or add --local") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} gave no answer within {timeout_s:.0f} s; the controller may be down") from None
    if done.returncode:
        raise RefusedError(f"{' '.join(words[:2])} was refused: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def ask_scheduler(words: Sequence[str], timeout_s: float = 5.0) -> str:
    """Run a Slurm command with a short timeout; return "" if it fails."""
    try:
        return run_command(words, timeout_s=timeout_s)
    except (OSError, RunError):
        return ""


def must_be_there() -> None:
    """Raise RunError if no job can be submitted here."""
    run_command(["sbatch", "--version"])


def can_submit(env: Mapping[str, str]) -> bool:
    """Return whether this process is in a job and can submit others."""
    return bool(this_job(env)[0]) and shutil.which("sbatch", path=env.get("PATH")) is not None


def submit(
    script: Path,
    asked: Mapping[str, Any],
    folder: Path,
    *,
    output: str = "",
    array: str = "",
    once: str = "",
    env: Mapping[str, str] = os.environ,
    run: Runner = run_command,
) -> str:
    """Submit a job script that starts in `folder`; return the job's id. Raises RunError.

    `asked`: keys of JobArgs. `output`: a `log_pattern`; by default slurm-ID.out in `folder`. `once`: the job's name; if
    a job of this name is pending or running, return its id without submitting another.
    """
    if once and (known := jobs_named(once, run)):
        return known[0]
    options = [f"--{key}={value}" for key, value in (("output", output), ("array", array)) if value]
    words = ["sbatch", "--parsable", f"--chdir={folder}", *options, str(script)]
    return run(words, env=_not_overruled(asked, outside_job(env))).strip().partition(";")[0]


def _not_overruled(asked: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the SBATCH_* variables of keys that are set: they override #SBATCH lines."""
    names = {"time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE"}
    set_here = {names.get(key, f"SBATCH_{key.upper()}") for key, value in asked.items() if value}
    return {name: value for name, value in env.items() if name not in set_here}


def jobs_named(name: str, run: Runner = run_command) -> list[str]:
    """Return the ids of this user's pending and running jobs of that name. Raises RunError if Slurm does not answer."""
    return run(["squeue", "--me", "--noheader", f"--name={name}", "--format=%A"]).split()


def cancel(*, address: str = "", name: str = "", run: Runner = run_command) -> None:
    """Cancel the job with this `Allocation.address`, or this user's jobs of that name. Raises RunError."""
    run([CANCEL, address] if address else [CANCEL, "--me", f"--name={name}"])


def send_signal(address: str, signal: str, step: str = "", run: Runner = run_command) -> None:
    """Send a signal ("TERM") to all steps of a job, or to the one of that name. Raises RunError."""
    if step:
        listed = run(["squeue", "--noheader", "--steps", f"--jobs={address}", "--format=%i|%j"])
        steps = {name: known for known, _, name in (line.strip().partition("|") for line in listed.splitlines())}
        if step not in steps:
            raise RunError(f"job {address} has no step {step}")
        address = steps[step]
    run([CANCEL, f"--signal={signal}", address])


REQUEUE_PAUSES_S = (1.0, 4.0)
"""Pauses before the second and the third attempt: a controller that is just being restarted refuses too."""


def requeue(
    address: str,
    exclude: Sequence[str] = (),
    run: Runner = run_command,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Put the job with this `Allocation.address` back into the queue, away from the nodes of `exclude`.

    This process is killed soon after. Nodes can only be excluded once the job is pending, so that comes second.
    """
    for pause_s in (*REQUEUE_PAUSES_S, None):
        try:
            run(["scontrol", "requeue", address])
            break
        except RunError as error:
            if pause_s is None or "denied" in str(error).lower():
                raise
        sleep(pause_s)
    if exclude:
        run(["scontrol", "update", f"JobId={address}", f"ExcNodeList={','.join(exclude)}"])


_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "CONFIGURING", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True)
class JobState:
    """A job as the controller sees it."""

    name: str = "UNKNOWN"
    """RUNNING, COMPLETING, ..."""
    preempted: bool = False
    ends_at_s: float | None = None
    """End of its time limit or of its grace, in seconds since the epoch; None without a limit."""

    @property
    def cancelled(self) -> bool:
        """Whether a person or Slurm is already ending it: a cancelled job must not be requeued.

        Seen in Slurm 22.05: after `scancel` a job is COMPLETING while its tasks still run; a preempted one in its grace
        and one before its time limit are RUNNING; a job that Slurm requeues by itself is COMPLETING too.
        """
        return self.name not in ("RUNNING", "SUSPENDED", "SIGNALING", "UNKNOWN")

    @property
    def taken_away(self) -> bool:
        """Whether it did not end by itself."""
        return self.name in ("CANCELLED", "NODE_FAIL", "BOOT_FAIL")

    @property
    def over(self) -> bool:
        return self.name not in (*_WAITING, *_RUNNING, "UNKNOWN")


def job_state(address: str, run: Runner = run_command) -> JobState:
    """Return the state of the job with this `Allocation.address`. Raises RunError if Slurm does not answer."""
    facts = _shown("job", address, run)
    try:
        ends_at_s = datetime.fromisoformat(facts.get("EndTime", "")).timestamp()
    except ValueError:  # Unknown
        ends_at_s = None
    return JobState(facts.get("JobState", "UNKNOWN"), facts.get("PreemptTime", "None") != "None", ends_at_s)


def _shown(kind: str, name: str, run: Runner) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", run(["scontrol", "--oneliner", "show", kind, name])))


def cluster_config(run: Runner = run_command) -> dict[str, str]:
    pairs = (line.partition("=") for line in run(["scontrol", "show", "config"]).splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def describe_cluster(run: Runner = ask_scheduler) -> Iterator[tuple[str, str, str]]:
    """Yield (part, its state, remedy or "") for `lingua doctor`."""
    if not (config := cluster_config(run)):
        yield "slurm", "not here, or its controller does not answer", "run with --local, or torchrun"
        return
    version, preempt = config.get("SLURM_VERSION", "?"), config.get("PreemptMode", "OFF")
    yield "slurm", f"{version}, cluster {config.get('ClusterName', '?')}", ""
    if "CANCEL" in preempt:
        yield "preemption", preempt, "preempted jobs are cancelled, not requeued: submit again to resume"
    else:
        yield "preemption", f"{preempt}; {config.get('KillWait', '?')} from SIGTERM to SIGKILL at the time limit", ""
    if config.get("JobRequeue") == "0":
        yield "requeue", "jobs are not requeued by default", "submit with --requeue, as lingua's own scripts do"
    if "tmpfs" in config.get("JobContainerType", ""):
        remedy = "what is staged there dies with the job; the last save is waited for"
        yield "job container", "each job has a /dev/shm of its own", remedy
    if "cgroup" not in config.get("ProctrackType", "cgroup"):
        yield "processes", f"tracked by {config['ProctrackType']}", "strays may outlive a job"


@dataclass(frozen=True)
class Limits:
    """The cluster's limits for a job; None for unknown ones."""

    grace_s: float | None = None
    """Between the notice of a preemption and the kill, in the job's partition."""
    preempt_mode: str = ""
    kill_wait_s: float | None = None
    """Between SIGTERM and SIGKILL of a job that is cancelled or requeued."""

    def missing(self, save_s: float) -> Iterator[str]:
        """Yield the limits that are too short for a run whose saves take `save_s`, a sentence each."""
        if self.grace_s is not None and self.preempt_mode not in ("", "OFF") and self.grace_s <= save_s:
            yield (
                f"a preempted job has {self.grace_s:.0f} s (GraceTime) and a save took up to {save_s:.1f} s: what was "
                "trained since the last checkpoint may be lost; lower checkpoint.dump.every"
            )
        if self.preempt_mode == "CANCEL":
            yield "a preempted job is cancelled here (PreemptMode=CANCEL); it comes back if it saves within its grace"
        if self.kill_wait_s is not None and self.kill_wait_s <= save_s:
            yield (
                f"scancel and scontrol requeue leave {self.kill_wait_s:.0f} s (KillWait) and a save took up to "
                f"{save_s:.1f} s: a run cancelled that way may lose what it trained since its last checkpoint"
            )


def limits_of(address: str, run: Runner = run_command) -> Limits:
    """Return the limits of a job. Raises RunError if Slurm does not answer."""
    name = _shown("job", address, run).get("Partition")
    partition = _shown("partition", name, run) if name else {}
    cluster = cluster_config(run)
    grace, kill = (re.match(r"\d+", text) for text in (partition.get("GraceTime", ""), cluster.get("KillWait", "")))
    mode = partition.get("PreemptMode") or cluster.get("PreemptMode", "")
    return Limits(float(grace[0]) if grace else None, mode, float(kill[0]) if kill else None)


@dataclass(frozen=True)
class QueuedJob:
    """A job as Slurm sees it."""

    id: str
    state: str
    """RUNNING, PENDING, CANCELLED by 1000, ..."""
    reason: str = ""
    """Why it is pending or ended, in Slurm's words."""
    left: str = ""
    """Time left of its limit, in Slurm's format."""
    nodes: str = ""
    array_task: str = ""
    """`4711_3` if it is a task of an array."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is in the queue and will start by itself."""
        return self.state in _WAITING

    @property
    def is_there(self) -> bool:
        """Whether it waits or runs."""
        return self.is_waiting or self.state in _RUNNING


def jobs_in_queue(run: Runner = ask_scheduler) -> dict[str, QueuedJob]:
    """Return this user's jobs that are pending, running, or just ended, by id; tasks of arrays also as `4711_3`.

    Array tasks that never started do not have their own id yet.
    """
    text = run(["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%A|%T|%r|%L|%N|%F_%K"])
    jobs = [job for job in map(_job, text.splitlines()) if job is not None]
    return {job.id: job for job in jobs} | {job.array_task: job for job in jobs if job.array_task}


def job_of(job_id: str, queue: dict[str, QueuedJob], run: Runner = ask_scheduler) -> QueuedJob | None:
    """Look up a job in the queue, then in Slurm's accounting; return None if Slurm does not know it (any more)."""
    if not job_id or job_id in queue:
        return queue.get(job_id)
    text = run(
        [ACCOUNTS, "--allocations", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=JobIDRaw,State,Reason"]
    )
    return next((job for job in map(_job, text.splitlines()) if job is not None and job.id == job_id), None)


def _job(line: str) -> QueuedJob | None:
    fields = [field.strip() for field in line.split("|")]
    if len(fields) < 2 or not fields[0]:
        return None
    fields[2:3] = ["" if field == "None" else field for field in fields[2:3]]
    fields[5:6] = ["" if field.endswith("_N/A") else field for field in fields[5:6]]
    return QueuedJob(*fields[:6])
