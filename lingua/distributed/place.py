"""Find the rank of this process. Torch-free: a trainer checks its config for all ranks before it loads torch.

Ranks come from torchrun's variables or from the Slurm step; a single process in a big allocation stays alone.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from lingua.config.base import ConfigError
from lingua.scheduler import RUN_STEP, STEP_VARIABLES, StepTask, this_task

log = logging.getLogger(__name__)

_SHELLS = ("RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class RankInfo:
    """Rank and world size of this process, and how it reaches the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: tuple[str, int] | None = None
    """Host and port of rank 0, or None for a single process without a process group."""
    said_by: tuple[str, ...] = field(default=_SHELLS, compare=False)
    """Variables without which this process would be alone."""
    has_agent: bool = field(default=False, compare=False)
    """torchrun keeps the store at which the ranks meet."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def find_rank_info(env: Mapping[str, str] = os.environ) -> RankInfo:
    """Return this process's place: from torchrun (RANK, WORLD_SIZE, ...), else from the Slurm step, else alone.

    Raises ConfigError for inconsistent variables.
    """
    task = this_task(env)
    inherited = env if all(env.get(name) for name in _SHELLS) else {}
    given = _place_in(env) if inherited else RankInfo()
    if task is None or (inherited and _is_below_a_launcher(env, task, given)):
        return given
    if inherited and (given.rank, given.world_size) != (task.rank, task.n_tasks):
        log.warning(
            "RANK %d and WORLD_SIZE %d, from the shell that started this step, are ignored: this is task %d of %d of "
            "Slurm's step", given.rank, given.world_size, task.rank, task.n_tasks,
        )  # fmt: skip
    # Two runs on one node must not meet: the port follows from the job and its step.
    port = 20_000 + zlib.crc32(task.step.encode()) % 12_000  # below the ephemeral ports
    meeting = {} if inherited else env  # an inherited MASTER_ADDR belongs to the ignored RANK
    return RankInfo(
        rank=task.rank,
        world_size=task.n_tasks,
        local_rank=task.local_rank,
        local_world_size=task.n_local_tasks,
        master=(meeting.get("MASTER_ADDR") or task.head_node, _number(meeting, "MASTER_PORT", port, 1, 65_535)),
        said_by=STEP_VARIABLES,
    )


def _place_in(env: Mapping[str, str]) -> RankInfo:
    """Return the place that torchrun's variables describe."""
    size = _number(env, "WORLD_SIZE", 1, 1)
    rank = _number(env, "RANK", 0)
    if rank >= size:
        raise ConfigError(f"environment: RANK is {rank}, but with WORLD_SIZE={size} ranks are 0 to {size - 1}; {_HOW}")
    host = env.get("MASTER_ADDR") or "127.0.0.1"
    return RankInfo(
        rank=rank,
        world_size=size,
        local_rank=_number(env, "LOCAL_RANK", 0),
        local_world_size=_number(env, "LOCAL_WORLD_SIZE", 1, 1),
        master=None if size == 1 else (host, _number(env, "MASTER_PORT", 29_500, 1, 65_535)),
        has_agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


_HOW = f"start the ranks by torchrun, {RUN_STEP} or `lingua launch`, or unset RANK and WORLD_SIZE to run alone"


def _number(env: Mapping[str, str], name: str, default: int, least: int = 0, most: int = 2**31) -> int:
    text = env.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        what = f"from {least} to {most}" if most < 2**31 else f"of at least {least}"
        raise ConfigError(f"environment: {name} is {text!r}, which is not a number {what}; {_HOW}")
    return int(text)


def _is_below_a_launcher(env: Mapping[str, str], task: StepTask, given: RankInfo) -> bool:
    """Return whether RANK was set by a launcher that is a Slurm task, not by the shell that started the step."""
    if task.is_first:
        return False
    return "TORCHELASTIC_RUN_ID" in env or given.world_size > task.n_tasks
