"""What the probe saw of every layer: `probe.jsonl` as one table per quantity, layer by step.

Promise: a run without probes has none; a line that is torn or of another kind is passed over. Of steps that were
trained twice the newest counts. However long the file, at most MAX_STEPS steps are kept, evenly spread.
Cost: one pass over the file; memory for the kept steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lingua.report.series import STEP, Numbers, is_number, records_in

MAX_STEPS = 400
_PREFIX = "probe/"
_WANTED = ("rms", "std", "mean", "max")
"""The statistic shown of a quantity: the first of these that is there, else its first."""


@dataclass(frozen=True)
class HeatMap:
    """One statistic of one quantity."""

    quantity: str
    stat: str
    layers: list[str]
    steps: Numbers
    values: np.ndarray
    """(layers, steps); NaN where nothing was seen."""


def read_probes(path: Path) -> list[HeatMap]:
    """A table per quantity, in the order of their first appearance."""
    kept = _kept_records(path)
    if not kept:
        return []
    steps = sorted(kept)
    places: dict[str, dict[str, dict[str, str]]] = {}  # quantity -> stat -> layer -> key
    for step in steps:
        for key in kept[step]:
            layer, quantity, stat = key.removeprefix(_PREFIX).rsplit("/", 2)
            places.setdefault(quantity, {}).setdefault(stat, {})[layer] = key
    found = []
    for quantity, stats in places.items():
        stat = next((stat for stat in _WANTED if stat in stats), next(iter(stats)))
        keys = stats[stat]
        values = np.array([[kept[step].get(key, np.nan) for step in steps] for key in keys.values()], dtype=float)
        found.append(HeatMap(quantity, stat, list(keys), np.array(steps, dtype=float), values))
    return found


def _is_figure(key: str) -> bool:
    return key.startswith(_PREFIX) and key.count("/") >= 3


def _kept_records(path: Path) -> dict[int, dict[str, float]]:
    """Figures by step, of every n-th record; n is doubled whenever they become too many."""
    kept: dict[int, tuple[int, dict[str, float]]] = {}
    every = 1
    for number, record in enumerate(records_in(path)):
        if number % every:
            continue
        figures = {key: float(v) for key, v in record.items() if _is_figure(key) and is_number(v)}
        if figures:
            kept[int(record[STEP])] = number, figures
        if len(kept) > MAX_STEPS:
            every *= 2
            kept = {step: one for step, one in kept.items() if one[0] % every == 0}
    return {step: figures for step, (_, figures) in kept.items()}
