"""Keys of `watchdog:`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lingua.config.base import Args


class WatchdogArgs(Args):
    """When a run counts as hung: its stacks are then written to logs/stacks_<rank>.txt and it ends with code 76."""

    step_factor: Annotated[float, Field(gt=1)] = 20.0
    """Maximum duration of a step, as a multiple of the median of the steps before it."""
    min_s: Annotated[float, Field(gt=0)] = 480.0
    """Minimum of that limit in seconds. Keep it below distributed.timeout_s, or torch ends the run first."""
    other_s: Annotated[float, Field(gt=0)] = 7200.0
    """Maximum seconds for the start-up with its first steps, a validation or a checkpoint."""
