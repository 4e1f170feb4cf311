"""Resources of Slurm jobs: `launcher:` for the run, `eval.launcher:` for its evaluations. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lingua.config.base import Args, Text
from lingua.scheduler import memory, time_limit

GPUS_PER_NODE = 8
TimeLimit = Annotated[Text, AfterValidator(time_limit)]
Memory = Annotated[Text, AfterValidator(memory)]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[^=\s\0]+", name):
        raise ValueError(f"{name!r} is not the name of a variable; leave out = and blanks")
    return name


class LaunchEnvArgs(Args):
    """Environment variables of all ranks; they override the shell's. For InfiniBand: launcher/infiniband."""

    set: dict[Annotated[str, AfterValidator(_variable)], Text] = {}
    """Variables to set."""
    unset: list[Text] = []
    """Variables to remove; `env:` does not set them either."""


class ResourceArgs(Args):
    """Resources that have the same name in `launcher`, `eval.launcher` and `slurm`."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Number of nodes."""
    mem: Memory = ""
    """Memory per node, as for sbatch ("64G"). Empty: the partition's default."""
    partition: Text = ""
    """Partition. Empty: SBATCH_PARTITION, or the cluster's default."""
    account: Text = ""
    """Account. Empty: SBATCH_ACCOUNT, or the user's default."""
    qos: Text = ""
    """Quality of service."""
    constraint: Text = ""
    """Node features."""
    exclude: Text = ""
    """Nodes to avoid."""


class JobArgs(ResourceArgs):
    """Resources of a Slurm job."""

    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs per node, one rank each. 0: one rank per node, on CPU. Null: the config's ranks divided by nodes; for an
    evaluation async_eval_gpus divided by nodes, of which there are enough for 8 each if `nodes` is 1."""
    cpus_per_gpu: Annotated[int, Field(ge=1)] = 16
    """CPU cores per rank."""
    time: TimeLimit = ""
    """Time limit, as for sbatch ("2-00:00:00", or minutes). Empty: the partition's."""
    exclusive: bool = False
    """Do not share the nodes with other jobs."""
    comment: Text = ""
    """Comment of the job."""
    directives: list[Text] = []
    """Additional sbatch options, one per item ("--reservation=night")."""

    def of_evaluation(self, n_gpus: int) -> JobArgs:
        """Fill in `gpus` for an evaluation on this many GPUs, and `nodes` if it is 1: up to 8 GPUs per node."""
        if self.gpus is not None:
            return self
        nodes = self.nodes if self.nodes > 1 else max(1, -(-n_gpus // GPUS_PER_NODE))
        return self.model_copy(update={"nodes": nodes, "gpus": -(-n_gpus // nodes)})


class LauncherArgs(JobArgs):
    """Slurm job of a run. `*.slurm` scripts take their resources from their own #SBATCH lines instead."""

    tasks_per_node: Literal["per_gpu", "per_node"] = "per_gpu"
    """per_gpu: one Slurm task per rank; per_node: one task per node, which starts the node's ranks."""
    signal_s: Annotated[int, Field(ge=0)] = 120
    """Seconds before the time limit at which the run is told to save and stop. Slurm may do so up to 60 s early."""
    requeue: bool = True
    """Requeue after preemption, the time limit and failures that may be transient."""
    max_retries: Annotated[int, Field(ge=0)] = 3
    """Failed attempts in a row without a new step, after which the job is not requeued."""
    node_check: bool = False
    """Check device, memory, disk and network of each node before the ranks start; bad nodes are avoided afterwards."""
    env: LaunchEnvArgs = LaunchEnvArgs()
    setup: list[Text] = []
    """Shell lines run on the first node before anything else (`module load cuda`). Only `lingua launch` uses them."""


class SlurmArgs(ResourceArgs):
    """`eval.launcher` in Meta Lingua's keys."""

    ngpu: Annotated[int, Field(ge=0)] = 1
    """GPUs, if async_eval_gpus is null."""
    ncpu: Annotated[int, Field(ge=1)] = 16
    """CPU cores per GPU."""
    time: int = -1
    """Time limit in minutes. -1: the partition's."""

    def as_job(self) -> JobArgs:
        """Translate to the keys of `eval.launcher`, without the GPUs."""
        shared = self.model_dump(include=set(ResourceArgs.model_fields))
        return JobArgs(**shared, cpus_per_gpu=self.ncpu, time="" if self.time < 0 else str(self.time))
