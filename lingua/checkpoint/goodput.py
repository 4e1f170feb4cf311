"""Predict goodput: the share of paid time that ends in steps that count, of a run that is killed again and again.

Pure functions, torch-free. Kills come at random (a Poisson process, mean gap M); a run is up from its first step to the
kill and then restarts. With C the wait for a save, and a save that counts `unsafe_s` later, the steps kept are

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
"""Assumed seconds from a kill to the next step, beside reading the state: scheduler, imports, connections."""


@dataclass(frozen=True)
class Kill:
    """What one kind of kill costs."""

    restart_s: float
    """From the kill until training goes on."""
    unsafe_s: float = 0.0
    """How long after training has waited for it a save would still be lost: until it is on the disk; 0: it never is."""
    share: float = 1.0
    """Of all kills."""


@dataclass(frozen=True)
class Outlook:
    """Shares of all time; they add up to 1."""

    kept: float
    """In steps that count: the goodput."""
    saving: float
    """Training waits for saves."""
    repeated: float
    """In steps that are trained again, and the waits for saves among them."""
    restarting: float


class Setting(NamedTuple):
    """A run, as far as its saves are concerned."""

    state_bytes: float
    step_s: float
    n_ranks: int
    disk_bytes_per_s: float
    asynchronous: bool


def kept_s(up_s: float, every_s: float, wait_s: float, unsafe_s: float = 0.0) -> float:
    """Return the seconds of training that outlive a kill after `up_s`."""
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
    """Return the interval that keeps most. `at_least_s`: a save takes so long that the next cannot begin earlier.

    The kept share grows as long as (1 - every / M) exp((every + wait) / M) > 1; restarts do not move that.
    """
    low_s, high_s = 0.0, between_s
    for _ in range(60):
        middle_s = (low_s + high_s) / 2
        rises = (1 - middle_s / between_s) * math.exp((middle_s + wait_s) / between_s) > 1
        low_s, high_s = (middle_s, high_s) if rises else (low_s, middle_s)
    return max(low_s, at_least_s)


def costs(run: Setting, start_up_s: float = START_UP_S) -> tuple[float, float, Kill]:
    """Return (seconds that training waits for a save, least seconds between two, a kill that takes the memory too)."""
    disk_s = run.state_bytes / run.disk_bytes_per_s
    if not run.asynchronous:
        return disk_s, 0.0, Kill(start_up_s + disk_s)
    return run.state_bytes / run.n_ranks / STAGE_BYTES_PER_S, disk_s, Kill(start_up_s + disk_s, unsafe_s=disk_s)


def advice(run: Setting, every_steps: int, between_s: float) -> tuple[Outlook | None, int, Outlook]:
    """Return (outlook as configured, best number of steps between saves, outlook with it).

    None: no save before the end. Saves that are due while one is written are skipped.
    """
    wait_s, at_least_s, kill = costs(run)
    best = max(1, math.ceil(best_every_s(wait_s, between_s, at_least_s) / run.step_s))
    seen = [
        outlook(max(steps * run.step_s, at_least_s), wait_s, between_s, [kill]) if steps > 0 else None
        for steps in (every_steps, best)
    ]
    assert seen[1] is not None
    return seen[0], best, seen[1]
