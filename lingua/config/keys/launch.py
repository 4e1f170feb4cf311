"""The `launcher:` section: what a run asks of Slurm and how its processes are started. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lingua.config.base import Args, Text


class LaunchEnvArgs(Args):
    """Environment variables of all ranks, over what the shell has set. A fabric's are a group file: launcher/<name>."""

    set: dict[str, Text] = {}
    """Variables to set."""
    unset: list[Text] = []
    """Variables to take away."""


class LauncherArgs(Args):
    """What a run asks of Slurm. `*.slurm` scripts take their resources from their own #SBATCH lines instead."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs per node, one rank each. Null: the ranks the config speaks of over nodes. 0: one rank per node, on CPU."""
    tasks_per_node: Literal["per_gpu", "per_node"] = "per_gpu"
    """per_gpu: a Slurm task per rank; per_node: one task per node, which starts the ranks below it."""
    cpus_per_gpu: Annotated[int, Field(ge=1)] = 16
    """CPU cores per rank."""
    mem: Text = ""
    """Memory per node, as sbatch writes it ("64G"). Empty: the partition's default."""
    time: Text = ""
    """Time limit, as sbatch writes it ("2-00:00:00", or minutes). Empty: the partition's."""
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
    exclusive: bool = False
    """Share the nodes with nobody."""
    comment: Text = ""
    """Comment of the job."""
    signal_s: Annotated[int, Field(ge=0)] = 120
    """Seconds before the time limit at which the run is told to save. Slurm may be up to 60 s early."""
    requeue: bool = True
    """Go back into the queue after preemption, the time limit and failures that may pass."""
    max_retries: Annotated[int, Field(ge=0)] = 3
    """Failed starts in a row, without a step gained, after which the job stays ended."""
    node_check: bool = False
    """Check device, memory, disk and network of each node before the ranks begin; a bad one is avoided from then on."""
    env: LaunchEnvArgs = LaunchEnvArgs()
    setup: list[Text] = []
    """Shell lines run on the first node before anything else (`module load cuda`). Only `lingua launch` knows them."""
    directives: list[Text] = []
    """Further options of sbatch, one each ("--reservation=night")."""


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
