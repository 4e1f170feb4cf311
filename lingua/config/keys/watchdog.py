"""Keys of `watchdog:`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lingua.config.base import Args


class WatchdogArgs(Args):
    """When a run counts as hung; its stacks are then dumped to logs/stacks_<rank>.txt and it ends with code 76."""

    step_factor: Annotated[float, Field(gt=1)] = 20.0
    """A step may take this many times the median of the steps before it, ..."""
    min_s: Annotated[float, Field(gt=0)] = 480.0
    """... and never less than this, in seconds. Keep it below distributed.timeout_s, or torch ends the run first."""
    other_s: Annotated[float, Field(gt=0)] = 7200.0
    """Seconds that a start with its first steps, a validation or a checkpoint may take."""
