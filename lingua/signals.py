"""Signals that ask a run to end: noted in the handler, acted on by the loop.

Promise: the handler records the first signal and its time, nothing else. A second Ctrl-C ends the process at once,
because the first one puts SIGINT back to its default action. A thread in `wait` hears of a signal also while the main
thread is inside a long call, a collective or a compilation, where Python cannot run a handler.
Cost: none; the loop reads one attribute per step.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

STOP_REQUEST = "lingua stop"
"""What `received` says when nobody sent a signal, but a person asked for the end."""


@dataclass
class SignalFlag:
    """Set by signals, read and cleared by the loop."""

    pending: bool = False

    def note(self, *_: object) -> None:
        """A signal has arrived; fit for a handler."""
        self.pending = True

    def take(self) -> float:
        """Return 1 if a signal has arrived since the last call, otherwise 0."""
        pending, self.pending = self.pending, False
        return float(pending)


@contextmanager
def noted(names: Iterable[str], flag: SignalFlag) -> Iterator[None]:
    """Inside, these signals set the flag."""
    old = {name: signal.signal(signal.Signals[name], flag.note) for name in names}
    try:
        yield
    finally:
        for name, handler in old.items():
            signal.signal(signal.Signals[name], handler)


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
    _pipe: tuple[int, int] | None = None
    _old_wakeup: int = -1

    def __enter__(self) -> StopSignals:
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for name in self.names:
            number = signal.Signals[name]
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()
        signal.set_wakeup_fd(self._old_wakeup)
        pipe, self._pipe = self._pipe, None
        for end in pipe or ():
            os.close(end)

    def ask(self, name: str) -> None:
        """As if a signal of this name had arrived."""
        if self.received is None:
            self.received_at_s = self.now()
            self.received = name  # last: other threads look at it first

    def wait(self, timeout_s: float) -> None:
        """Return when a signal arrives, or after `timeout_s`; `received` is right then. For any thread."""
        if self._pipe is None:
            return
        if select.select([self._pipe[0]], [], [], timeout_s)[0]:
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self._pipe[0], 256):
                    if number in self._old:
                        self.ask(signal.Signals(number).name)

    def wake(self) -> None:
        """Make `wait` return."""
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._pipe[1], b"\0")  # no signal has this number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.ask(signal.Signals(number).name)
