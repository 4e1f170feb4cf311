"""Slurm facts from the environment, sbatch text, submission. SLURM_* variables are read here and nowhere else."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from lingua.args import Args, Text


class SlurmArgs(Args):
    """Settings of a job of its own, as lingua's stool names them."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes."""
    ngpu: Annotated[int, Field(ge=0)] = 1
    """GPUs per node."""
    ncpu: Annotated[int, Field(ge=1)] = 16
    """CPU cores per GPU."""
    mem: Text = ""
    """Memory per node, as sbatch writes it ("64G"). Empty: the partition's default."""
    time: int = -1
    """Time limit in minutes. -1: the partition's."""
    partition: Text = ""
    """Partition. Empty: the cluster's default."""
    account: Text = ""
    """Account. Empty: the user's default."""
    qos: Text = ""
    """Quality of service."""
    constraint: Text = ""
    """Node features."""
    exclude: Text = ""
    """Nodes to avoid."""


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


def this_node_name(env: Mapping[str, str]) -> str:
    """Slurm's name of this node, which `--exclude` understands; the host's own outside Slurm."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


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
