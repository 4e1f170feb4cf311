"""Metrics files as columns of numbers, however long they are, and thinned for a picture.

A line that is torn, half written or of another kind is skipped. A file of a million lines of 0.75 kB takes 9 s of a
core and 0.3 GB: 8 bytes per key and line.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import orjson

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]
STEP, ATTEMPT, WHEN = "global_step", "incarnation", "created_at"


@dataclass(frozen=True)
class Table:
    """Columns of equal length, in the order of the file; NaN where a line lacks a key. WHEN is in Unix seconds."""

    columns: Mapping[str, Numbers]

    def __len__(self) -> int:
        return len(self.columns[STEP])

    def __getitem__(self, key: str) -> Numbers:
        return self.columns[key]

    def where(self, chosen: np.ndarray) -> Table:
        """Return the chosen lines (a mask, or indexes)."""
        return Table({key: column[chosen] for key, column in self.columns.items()})

    def curve(self, key: str, x: str = STEP) -> tuple[Numbers, Numbers]:
        """Return (x, y) where both are finite."""
        there = np.isfinite(self[key]) & np.isfinite(self[x])
        return self[x][there], self[key][there]


def records_in(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file that have a step; none if it cannot be read."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue  # torn by a kill, or being written
            if isinstance(record, dict) and is_number(record.get(STEP)):
                yield record


def read_table(path: Path, keys: Sequence[str]) -> Table:
    """Read columns of a metrics file: step, attempt, time, and `keys`."""
    columns = {key: array("d") for key in dict.fromkeys((STEP, ATTEMPT, WHEN, *keys))}
    for record in records_in(path):
        for key, column in columns.items():
            value = record.get(key)
            column.append(when(value) if key == WHEN else value if is_number(value) else np.nan)
    return Table({key: np.frombuffer(column, dtype=np.float64) for key, column in columns.items()})


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def when(text: object) -> float:
    """Convert an ISO date to Unix seconds; anything else to NaN."""
    try:
        return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else np.nan
    except ValueError:
        return np.nan


@dataclass(frozen=True)
class Thinned:
    """A curve of few points: the mean of each piece, its lowest and its highest value."""

    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers

    @property
    def is_whole(self) -> bool:
        """Whether each point is a value of the curve itself."""
        return bool((self.low == self.high).all())


def thinned(x: Numbers, y: Numbers, n_pieces: int) -> Thinned:
    """Downsample a curve of finite values to at most n_pieces pieces of equally many points."""
    if len(x) <= n_pieces:
        return Thinned(x, y, y, y)
    begins = np.linspace(0, len(x), n_pieces, endpoint=False).astype(np.intp)
    sizes = np.diff(np.append(begins, len(x)))
    middles = np.add.reduceat(x, begins) / sizes
    middles[0], middles[-1] = x[0], x[-1]
    means = np.add.reduceat(y, begins) / sizes
    return Thinned(middles, means, np.minimum.reduceat(y, begins), np.maximum.reduceat(y, begins))
