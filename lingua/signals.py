"""Signals that ask a run to end: noted in the handler, acted on by the loop.

Promise: the handler records the first signal and its time, nothing else. A second Ctrl-C ends the process at once,
because the first one puts SIGINT back to its default action.
Cost: none; the loop reads one attribute per step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any


@dataclass
class StopSignals:
    """Context manager that listens for `names` ("SIGTERM", ...) and restores the old handlers on leaving."""

    names: Iterable[str]
    now: Callable[[], float] = time.monotonic
    received: str | None = None
    """Name of the first signal, or None."""
    received_at_s: float | None = None
    """Its time on `now`'s clock."""
    _old: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignals:
        for name in self.names:
            number = signal.Signals[name]
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.received is None:
            self.received, self.received_at_s = signal.Signals(number).name, self.now()
