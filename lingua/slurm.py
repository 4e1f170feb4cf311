"""Slurm facts from the environment, sbatch text, submission. SLURM_* variables are read here and nowhere else."""

from __future__ import annotations

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
