"""Keys of `checkpoint:`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from lingua.config.base import Args, Text


def is_multiple(step: int, every: int) -> bool:
    """Return whether `step` is a positive multiple of `every`; never if `every` is 0 or -1."""
    return every > 0 and step > 0 and step % every == 0


class SaveEvery(Args):
    """A period of checkpoints and how many of them to keep."""

    every: Annotated[int, Field(ge=-1)] = 1000
    """Steps between checkpoints. 0 or -1: only the one at the end."""
    keep: Annotated[int, Field(ge=-1)] = 0
    """Number of newest checkpoints to keep. 0 or -1: all."""

    def is_due(self, step: int) -> bool:
        return is_multiple(step, self.every)


class CheckpointArgs(Args):
    """When to save checkpoints, how many to keep, where, and what to start from."""

    dump: SaveEvery = SaveEvery()
    """Checkpoints kept for restart."""
    eval: SaveEvery = SaveEvery()
    """Checkpoints kept for evaluation. Without a section `eval`, none are saved unless this is set."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Steps between milestones, which are saved whatever `dump` and `eval` say and never deleted. 0: none."""
    steps: Literal["log2"] | list[Annotated[int, Field(ge=1)]] = []
    """More milestones: a list of steps, or log2 for 1, 2, 4, 8, and so on."""
    path: Text | None = None
    """Folder of the checkpoints. Null: <dump_dir>/checkpoints."""
    init_ckpt_path: Text | None = None
    """Weights to start from: a run, a checkpoint folder, consolidated.pth, a torch file or a Hugging Face folder."""
    init_ckpt_model_key: Text | None = None
    """Key of the weights in that file or folder. Null: detected."""
    continue_training_from_init: bool = False
    """Also load optimizer, step and data position from init_ckpt_path."""
    reset: list[Literal["optim", "schedule", "data", "step"]] = []
    """What continue_training_from_init does not load. optim: optimizer state; schedule: the learning rate schedule
    restarts at this step; data: restart at the first row; step: steps, tokens and learning rate restart at 0. Later
    attempts of the same run reset nothing."""
    async_save_mode: Literal["shm"] | None = None
    """shm: stage in memory and let the checkpoint service write in the background. Null: write synchronously."""
    async_cleanup: bool = False
    """Delete old checkpoints in the background; always so with async_save_mode."""
    shm_path: Text = "/dev/shm"
    """Memory file system for staging, on each node."""
    slots: Annotated[int, Field(ge=1, le=9)] = 2
    """Snapshots that a node's memory holds at once; fewer if they do not fit."""
    replicate: Annotated[int, Field(ge=0, le=1)] = 0
    """1: each node also holds copies of another node's snapshots, so that losing one node loses none. The copies take
    as much memory again as the slots. For async_save_mode shm on several nodes."""
    strict: bool = False
    """Stop with an error, instead of saving synchronously, if memory cannot hold one slot."""
    bandwidth_gb_per_s: Annotated[float, Field(gt=0)] | None = None
    """Limit on background writes, per node. Null: none. Lifted at the end of a run."""
    drain_threads: Annotated[int, Field(ge=1, le=64)] = 4
    """Files that a node writes in parallel."""
    direct_io: bool = True
    """Bypass the page cache if the file system can: takes less CPU and does not count toward the job's memory limit."""
    grace_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds that the job has left after a stop signal. Null: as Slurm says, or unlimited."""
    node_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long nodes wait for each other's part of a checkpoint."""
    linger_s: Annotated[float, Field(ge=0)] = 5.0
    """How long the service stays, and keeps the slots allocated, after the last rank of its node has exited."""
    disk_budget_gb: Annotated[float, Field(gt=0)] | None = None
    """Disk space for checkpoints (10^9 bytes); set it under a quota, which is not detected. Null: what is free."""
    verify: Literal["drain", "readback"] = "drain"
    """drain: hash what is written and compare; readback: also read it back, bypassing the page cache."""
    verify_on_load: Literal["full", "sizes"] = "full"
    """full: compare every byte while loading; sizes: only names and sizes."""

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        if self.replicate and self.async_save_mode is None:
            text = "checkpoint.replicate is 1, but nothing is staged in memory; set checkpoint.async_save_mode to shm"
            yield "checkpoint.replicate", f"{text}, or leave out replicate"

    def milestones(self, n_steps: int) -> set[int]:
        """Return the steps up to `n_steps` whose checkpoints are never deleted."""
        chosen = [1 << n for n in range(n_steps.bit_length())] if self.steps == "log2" else self.steps
        every = range(self.keep_every, n_steps + 1, self.keep_every) if self.keep_every else ()
        return {*every, *(step for step in chosen if step <= n_steps)}

    def is_milestone(self, step: int) -> bool:
        """Return whether the checkpoint of this step is never deleted."""
        chosen = step.bit_count() == 1 if self.steps == "log2" else step in self.steps
        return chosen or is_multiple(step, self.keep_every)
