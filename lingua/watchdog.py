"""When a run counts as hung: a decision on the time since the last sign of life, and nothing else.

Promise: a step is judged by the run's own pace. What has no pace (a start, the first steps, which compile, a
validation, a checkpoint) has a limit of its own. A validation or a save never makes a step look slow.
Cost: one clock reading per step. Torch-free; the thread that asks is in `guard.py`.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import Field

from lingua.args import Args

_WARM_UP_STEPS = 5  # compilation, autotuning, first touch of memory and files
_REMEMBERED_STEPS = 51


class WatchdogArgs(Args):
    """When a run counts as hung; its stacks are then dumped to logs/stacks_<rank>.txt and it ends with code 76."""

    step_factor: Annotated[float, Field(gt=1)] = 20.0
    """A step may take this many times the median of the steps before it, ..."""
    min_s: Annotated[float, Field(gt=0)] = 480.0
    """... and never less than this, in seconds. Keep it below distributed.timeout_s, or torch ends the run first."""
    other_s: Annotated[float, Field(gt=0)] = 7200.0
    """Seconds that a start with its first steps, a validation or a checkpoint may take."""


class Pulse:
    """The signs of life of one rank. `args` None: never overdue."""

    def __init__(self, args: WatchdogArgs | None, now: Callable[[], float] = time.monotonic) -> None:
        self._args = args
        self.now = now
        self._since_s = now()
        self._paces_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._n_beats = 0
        self._doing: str | None = None
        self.step: int | None = None
        """Updates done, as the loop last said. None: there is no loop yet."""

    @property
    def starting(self) -> bool:
        """No step of this start is done, so there is nothing that a checkpoint could save."""
        return self._n_beats == 0

    def beat(self, step: int) -> None:
        """An update is done."""
        now_s = self.now()
        if self._n_beats >= _WARM_UP_STEPS:
            self._paces_s.append(now_s - self._since_s)
        self._n_beats += 1
        self.step, self._since_s = step, now_s

    def sign(self) -> None:
        """What is done now, and is no step, gets on."""
        self._since_s = self.now()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Around what is no step: "validation", "checkpoint", "evaluation"."""
        self._since_s, self._doing = self.now(), what
        yield
        self._since_s, self._doing = self.now(), None

    @property
    def limit_s(self) -> float:
        """Seconds that what is done now may take."""
        if self._args is None:
            return float("inf")
        if self._doing is not None or not self._paces_s:
            return self._args.other_s
        return max(self._args.min_s, self._args.step_factor * statistics.median(self._paces_s))

    def overdue(self) -> str | None:
        """Why this rank counts as hung, in one sentence; None while all is well."""
        limit_s = self.limit_s
        if self.now() - self._since_s <= limit_s:
            return None
        if self._doing is not None:
            return f"the {self._doing} at step {self.step} did not end within {limit_s:.0f} s (watchdog.other_s)"
        if not self._paces_s:
            return f"the start did not come to its first steps within {limit_s:.0f} s (watchdog.other_s)"
        usual_s = statistics.median(self._paces_s)
        return f"no step was finished for {limit_s:.0f} s after step {self.step}; one takes {usual_s:.3g} s (watchdog)"
