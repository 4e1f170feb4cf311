"""Predict goodput: the share of paid time spent on steps that are kept, for a run that is killed repeatedly.

Pure functions, torch-free. Kills are a Poisson process with mean gap M; a run is up from its first step to the kill,
then restarts. If training waits C for a save and the save is safe `unsafe_s` later, the training time kept is

    every_s * exp(-unsafe_s / M) / (exp((every_s + C) / M) - 1)     of M seconds up,

the mean of `kept_s`. With unsafe_s = 0 this is Daly's model (Future Generation Computer Systems 22, 2006, eq. 13); the
best interval is its exact minimum, near Young's sqrt(2 C M) (CACM 17, 1974).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

STAGE_BYTES_PER_S = 4e9
"""Rate at which one rank copies its part into /dev/shm: two CPU cores (scripts/bench_checkpoint.py)."""
START_UP_S = 60.0
"""Assumed seconds from a kill to the next step, without reading the state: scheduler, imports, connections."""


@dataclass(frozen=True)
class Kill:
    """Cost of one kind of kill."""

    restart_s: float
    """From the kill until training continues."""
    unsafe_s: float = 0.0
    """Seconds after training has waited for a save in which a kill still loses it, until it is on the disk."""
    share: float = 1.0
    """Share of all kills."""


@dataclass(frozen=True)
class Outlook:
    """Shares of all time; they add up to 1."""

    kept: float
    """Steps that are kept: the goodput."""
    saving: float
    """Waits for saves."""
    repeated: float
    """Steps that are trained again, and the waits for saves among them."""
    restarting: float


class Setting(NamedTuple):
    """Properties of a run that determine the cost of its saves."""

    state_bytes: float
    step_s: float
    n_ranks: int
    disk_bytes_per_s: float
    asynchronous: bool


def kept_s(up_s: float, every_s: float, wait_s: float, unsafe_s: float = 0.0) -> float:
    """Return the seconds of training that survive a kill after `up_s`."""
    return every_s * max(0, math.floor((up_s - unsafe_s) / (every_s + wait_s)))


def outlook(every_s: float, wait_s: float, between_s: float, kills: Sequence[Kill]) -> Outlook:
    """Return where the time goes. `every_s`: training between two saves; `between_s`: mean time from start to kill."""
    restart_s = sum(kill.share * kill.restart_s for kill in kills)
    survives = sum(kill.share * math.exp(-kill.unsafe_s / between_s) for kill in kills)
    n_saves = survives / math.expm1((every_s + wait_s) / between_s)
    whole_s = between_s + restart_s
    kept, saving = n_saves * every_s / whole_s, n_saves * wait_s / whole_s
    restarting = restart_s / whole_s
    return Outlook(kept, saving, 1 - kept - saving - restarting, restarting)


def best_every_s(wait_s: float, between_s: float, at_least_s: float = 0.0) -> float:
    """Return the interval with the largest kept share. `at_least_s`: shortest interval, since a save takes that long.

    The share grows while (1 - every / M) exp((every + wait) / M) > 1, whatever a restart costs.
    """
    low_s, high_s = 0.0, between_s
    for _ in range(60):
        middle_s = (low_s + high_s) / 2
        rises = (1 - middle_s / between_s) * math.exp((middle_s + wait_s) / between_s) > 1
        low_s, high_s = (middle_s, high_s) if rises else (low_s, middle_s)
    return max(low_s, at_least_s)


def costs(run: Setting, start_up_s: float = START_UP_S) -> tuple[float, float, Kill]:
    """Return (seconds that training waits for a save, least seconds between two, a kill that also loses the memory)."""
    disk_s = run.state_bytes / run.disk_bytes_per_s
    if not run.asynchronous:
        return disk_s, 0.0, Kill(start_up_s + disk_s)
    return run.state_bytes / run.n_ranks / STAGE_BYTES_PER_S, disk_s, Kill(start_up_s + disk_s, unsafe_s=disk_s)


def advice(run: Setting, every_steps: int, between_s: float) -> tuple[Outlook | None, int, Outlook]:
    """Return (outlook as configured, best number of steps between saves, outlook with it).

    The first is None if no save is configured. A save that is due while another one is written is skipped.
    """
    wait_s, at_least_s, kill = costs(run)
    best = max(1, math.ceil(best_every_s(wait_s, between_s, at_least_s) / run.step_s))
    seen = [
        outlook(max(steps * run.step_s, at_least_s), wait_s, between_s, [kill]) if steps > 0 else None
        for steps in (every_steps, best)
    ]
    assert seen[1] is not None
    return seen[0], best, seen[1]
