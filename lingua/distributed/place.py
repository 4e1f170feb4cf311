"""Who this rank is. Torch-free: a trainer checks its config for all ranks before it loads torch.

Ranks come from torchrun's variables or from the Slurm step; a lone process in a big allocation stays alone.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from lingua.slurm import this_task


@dataclass(frozen=True)
class RankInfo:
    """Rank and world size of this process, and how it reaches the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: tuple[str, int] | None = None
    """Host and port of rank 0. None: alone, no process group."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def find_rank_info(env: Mapping[str, str] = os.environ) -> RankInfo:
    """This process's place: from torchrun (RANK, WORLD_SIZE, ...), else from the Slurm step, else alone."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return RankInfo(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
            master=(env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", "29500"))),
        )
    task = this_task(env)
    if task is None:
        return RankInfo()
    # Two runs on one node must not meet: the port follows from the job and its step.
    step = f"{task.job_id}.{env.get('SLURM_STEP_ID', '0')}"
    port = int(env.get("MASTER_PORT") or 20_000 + zlib.crc32(step.encode()) % 12_000)  # below the ephemeral ports
    return RankInfo(
        rank=task.rank,
        world_size=task.n_tasks,
        local_rank=task.local_rank,
        local_world_size=task.n_local_tasks,
        master=(env.get("MASTER_ADDR") or task.head_node, port),
    )
