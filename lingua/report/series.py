"""Read metrics files of any length as columns of numbers, and thin them out for pictures.

A million lines of 0.75 kB take 9 s on one core, and 8 bytes per key and line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lingua.run.metrics import is_number, record_in

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]
Table = np.ndarray[tuple[int], np.dtype[np.void]]
"""Lines of a file with named columns: `table["loss/out"]`; NaN if a line lacks a key. WHEN is in Unix seconds."""
STEP, ATTEMPT, WHEN = "global_step", "incarnation", "created_at"
MAX_PROBES = 400
_STATS = ("rms", "std", "mean", "max")  # the first of these that was probed is shown, else another one


def records_in(path: Path, every: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the records with a step of every n-th line of a metrics file; none if it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        for line in islice(file, 0, None, every):
            record = record_in(line)
            if record is not None and STEP in record:
                yield record


def read_table(path: Path, keys: Sequence[str]) -> Table:
    """Read the columns of a metrics file: step, attempt, time, and `keys`."""
    names = (STEP, ATTEMPT, *keys)
    rows = (
        (*(value if is_number(value := record.get(name)) else math.nan for name in names), when(record.get(WHEN)))
        for record in records_in(path)
    )
    return np.fromiter(rows, dtype=[(name, float) for name in (*names, WHEN)])


def curve(table: Table, key: str, x: str = STEP) -> tuple[Numbers, Numbers]:
    """Return (x, y) where both are finite."""
    there = np.isfinite(table[key]) & np.isfinite(table[x])
    return table[x][there], table[key][there]


def unbroken(x: Numbers, y: Numbers) -> list[tuple[Numbers, Numbers]]:
    """Cut a curve where it goes back or has a gap."""
    gaps = np.diff(x)
    cuts = np.flatnonzero((gaps <= 0) | (gaps > 2 * np.median(np.abs(gaps)))) + 1 if len(gaps) else []
    return list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))


def when(text: object) -> float:
    """Convert an ISO date to Unix seconds; anything else to NaN."""
    try:
        return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else math.nan
    except ValueError:
        return math.nan


class Thinned(NamedTuple):
    """A curve of few points: the mean, the lowest and the highest value of each piece."""

    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def thinned(x: Numbers, y: Numbers, n_pieces: int) -> Thinned:
    """Downsample a curve of finite values to at most n_pieces pieces with about the same number of points."""
    if len(x) <= n_pieces:
        return Thinned(x, y, y, y)
    begins = np.linspace(0, len(x), n_pieces, endpoint=False).astype(np.intp)
    sizes = np.diff(np.append(begins, len(x)))
    middles, means = (np.add.reduceat(values, begins) / sizes for values in (x, y))
    middles[0], middles[-1] = x[0], x[-1]
    return Thinned(middles, means, np.minimum.reduceat(y, begins), np.maximum.reduceat(y, begins))


class HeatMap(NamedTuple):
    """One statistic of one quantity for each layer."""

    quantity: str
    stat: str
    layers: list[str]
    steps: Numbers
    values: np.ndarray  # (layers, steps); NaN if not probed


def read_probes(path: Path) -> list[HeatMap]:
    """Read `probe.jsonl`: a heat map per quantity, of at most MAX_PROBES steps. The newest record of a step counts."""
    every = max(1, math.ceil(sum(1 for _ in records_in(path)) / MAX_PROBES))
    kept = {record[STEP]: {k: v for k, v in record.items() if is_number(v)} for record in records_in(path, every)}
    steps = sorted(kept)
    found: dict[str, dict[str, list[str]]] = {}  # quantity -> stat -> layers
    for name in dict.fromkeys(name for step in steps for name in kept[step]):
        if name.startswith("probe/") and name.count("/") >= 3:
            layer, quantity, stat = name.removeprefix("probe/").rsplit("/", 2)
            found.setdefault(quantity, {}).setdefault(stat, []).append(layer)
    maps = []
    for quantity, stats in found.items():
        stat = next((stat for stat in _STATS if stat in stats), next(iter(stats)))
        rows = [
            [kept[step].get(f"probe/{layer}/{quantity}/{stat}", math.nan) for step in steps] for layer in stats[stat]
        ]
        maps.append(HeatMap(quantity, stat, stats[stat], np.array(steps, float), np.array(rows, float)))
    return maps
