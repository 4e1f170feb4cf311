"""Keys of `checkpoint:`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from lingua.config.base import Args, Text


def is_multiple(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens after this one; 0 or -1: never."""
    return every > 0 and step > 0 and step % every == 0


class SaveEvery(Args):
    """A period of checkpoints and how many of them to keep."""

    every: Annotated[int, Field(ge=-1)] = 1000
    """Steps between two. 0 or -1: none but the last."""
    keep: Annotated[int, Field(ge=-1)] = 0
    """Newest ones kept. 0 or -1: all."""

    def is_due(self, step: int) -> bool:
        return is_multiple(step, self.every)


class CheckpointArgs(Args):
    """Checkpoints: when, how many, where, and what to start from."""

    dump: SaveEvery = SaveEvery()
    """Checkpoints kept for restart."""
    eval: SaveEvery = SaveEvery()
    """Checkpoints kept for evaluation. Without a section `eval` there are none, unless this is set."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Steps between milestones, which are saved whatever the periods say and kept for good. 0: none."""
    steps: Literal["log2"] | list[Annotated[int, Field(ge=1)]] = []
    """More milestones: a list of steps. log2: 1, 2, 4, 8, and so on."""
    path: Text | None = None
    """Folder of the checkpoints. Null: <dump_dir>/checkpoints."""
    init_ckpt_path: Text | None = None
    """Weights to start from: a run, a checkpoint folder, consolidated.pth, a torch file or a Hugging Face folder."""
    init_ckpt_model_key: Text | None = None
    """Key under which the weights lie in that file or folder. Null: found by itself."""
    continue_training_from_init: bool = False
    """Take optimizer, step and data position from init_ckpt_path too."""
    reset: list[Literal["optim", "schedule", "data", "step"]] = []
    """What continue_training_from_init does not take over. optim: optimizer state; schedule: the learning rate begins
    anew at this step; data: rows from the first one on; step: steps and tokens from 0 on, the learning rate with them.
    Later attempts of the same run reset nothing."""
    async_save_mode: Literal["shm"] | None = None
    """shm: stage in memory and let the checkpoint service write in the background. Null: write to the disk and wait."""
    async_cleanup: bool = False
    """Delete what retention gives up in the background; with async_save_mode it always is."""
    shm_path: Text = "/dev/shm"
    """Memory file system for staging, on each node."""
    slots: Annotated[int, Field(ge=1, le=9)] = 2
    """Snapshots that a node's memory holds at once; fewer are taken where they do not fit."""
    replicate: Annotated[int, Field(ge=0, le=1)] = 0
    """1: each node also holds copies of another node's snapshots, so that the end of one node loses none. They take as
    much memory as the slots again. With async_save_mode shm on several nodes."""
    strict: bool = False
    """Stop with an error, instead of saving synchronously, where memory does not suffice for one slot."""
    bandwidth_gb_per_s: Annotated[float, Field(gt=0)] | None = None
    """Limit on writing in the background, per node. Null: none. At the end of a run there is none."""
    drain_threads: Annotated[int, Field(ge=1, le=64)] = 4
    """Files that a node writes at once."""
    direct_io: bool = True
    """Write past the page cache where the file system can: less of the CPU, and none of the job's memory limit."""
    grace_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds that the job still has after a stop signal. Null: known from Slurm, or as many as it takes."""
    node_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long nodes wait for each other's part of a checkpoint."""
    linger_s: Annotated[float, Field(ge=0)] = 5.0
    """How long the service stays, and keeps the slots allocated, after the last rank of its node has gone."""
    disk_budget_gb: Annotated[float, Field(gt=0)] | None = None
    """What checkpoints may take on the disk (10^9 bytes); quotas are not seen otherwise. Null: what is free."""
    verify: Literal["drain", "readback"] = "drain"
    """drain: what is written is hashed and compared; readback: also read again past the page cache."""
    verify_on_load: Literal["full", "sizes"] = "full"
    """full: every byte is compared as it is loaded; sizes: only names and sizes."""

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        if self.replicate and self.async_save_mode is None:
            text = "checkpoint.replicate is 1, but nothing is staged in memory; set checkpoint.async_save_mode to shm"
            yield "checkpoint.replicate", f"{text}, or leave out replicate"

    def milestones(self, n_steps: int) -> set[int]:
        """Return the steps up to `n_steps` whose checkpoints are kept for good."""
        chosen = [1 << n for n in range(n_steps.bit_length())] if self.steps == "log2" else self.steps
        every = range(self.keep_every, n_steps + 1, self.keep_every) if self.keep_every else ()
        return {*every, *(step for step in chosen if step <= n_steps)}

    def is_milestone(self, step: int) -> bool:
        """Return whether the checkpoint of this step is kept for good."""
        chosen = step.bit_count() == 1 if self.steps == "log2" else step in self.steps
        return chosen or is_multiple(step, self.keep_every)
