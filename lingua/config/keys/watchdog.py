"""Keys of `watchdog:`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lingua.config.base import Args


class WatchdogArgs(Args):
    """When a run counts as hung: it writes its stacks to logs/stacks_<rank>.txt and ends with exit code 76."""

    step_factor: Annotated[float, Field(gt=1)] = 20.0
    """Maximum duration of a step, as a multiple of the median of the preceding steps."""
    min_s: Annotated[float, Field(gt=0)] = 480.0
    """Minimum of that limit in seconds. Keep it below distributed.timeout_s, or torch ends the run first."""
    other_s: Annotated[float, Field(gt=0)] = 7200.0
    """Maximum seconds for the startup with its first steps, a validation or a checkpoint."""
