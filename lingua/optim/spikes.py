"""Detect loss spikes: pure functions of losses that are the same on all ranks. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lingua.config.keys.optim import SpikeArgs

RECENT = "recent_losses"
"""Key of the state: [step, loss] of the last steps, the newest last; kept if spikes are skipped or rewound."""

Recent = Sequence[Sequence[float]]


def spike_limit(recent: Recent, step: int, args: SpikeArgs, begin: int = 0) -> float:
    """Return the loss above which a step is a spike; infinity while fewer than `window` losses are known.

    The previous step does not count: its loss is still being summed over ranks when this step updates. Nor do steps up
    to `begin`, at which the phase began: on other data the loss may jump without being a spike.
    """
    known = [loss for at, loss in recent if begin < at < step - 1][-args.window :]
    if len(known) < args.window:
        return math.inf
    mean = math.fsum(known) / len(known)
    return mean + args.threshold * math.sqrt(math.fsum((loss - mean) ** 2 for loss in known) / len(known))


def remember(recent: Recent, step: int, loss: float, args: SpikeArgs) -> list[Sequence[float]]:
    """Return the losses needed for the limits of later steps."""
    return [*recent, [step, loss]][-args.window - 1 :]


def limit_to_skip(shared: Mapping[str, Any], step: int, args: SpikeArgs, begin: int = 0) -> float:
    """Return the loss above which the optimizer step is skipped; infinity unless spikes are skipped."""
    return spike_limit(shared.get(RECENT, ()), step, args, begin) if args.action == "skip" else math.inf
