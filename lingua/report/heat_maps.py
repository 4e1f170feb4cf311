"""What was probed of every layer: `probe.jsonl` as one table per quantity, layer by step.

Of a step that was trained twice the newest record counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lingua.report.series import STEP, Numbers, is_number, records_in

MAX_STEPS = 400
"""At most as many steps are kept, evenly spread."""
_STATS = ("rms", "std", "mean", "max")
"""The statistic shown of a quantity is the first of these that was probed, else any."""


@dataclass(frozen=True)
class HeatMap:
    """One statistic of one quantity."""

    quantity: str
    stat: str
    layers: list[str]
    steps: Numbers
    values: np.ndarray
    """(layers, steps); NaN where nothing was probed."""


def read_probes(path: Path) -> list[HeatMap]:
    """Read a table per quantity, in the order of their first appearance; none from a missing or torn file."""
    kept = _read_evenly(path)
    steps = sorted(kept)
    layers: dict[str, dict[str, dict[str, None]]] = {}  # quantity -> stat -> layer
    for name in (name for step in steps for name in kept[step]):
        layer, quantity, stat = name.rsplit("/", 2)
        layers.setdefault(quantity, {}).setdefault(stat, {})[layer] = None
    found = []
    for quantity, stats in layers.items():
        stat = next((stat for stat in _STATS if stat in stats), next(iter(stats)))
        rows = [[kept[step].get(f"{layer}/{quantity}/{stat}", np.nan) for step in steps] for layer in stats[stat]]
        found.append(HeatMap(quantity, stat, [*stats[stat]], np.array(steps, dtype=float), np.array(rows, dtype=float)))
    return found


def _read_evenly(path: Path) -> dict[int, dict[str, float]]:
    """Read every n-th record, as values by step and name; n doubles whenever there are too many."""
    kept: dict[int, tuple[int, dict[str, float]]] = {}
    every = 1
    for number, record in enumerate(records_in(path)):
        probed = {key: value for key, value in record.items() if key.startswith("probe/") and key.count("/") >= 3}
        values = {key.removeprefix("probe/"): float(value) for key, value in probed.items() if is_number(value)}
        if values and number % every == 0:
            kept[int(record[STEP])] = number, values
        if len(kept) > MAX_STEPS:
            every *= 2
            kept = {step: one for step, one in kept.items() if one[0] % every == 0}
    return {step: values for step, (_, values) in kept.items()}
