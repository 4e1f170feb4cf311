"""Handle signals: the handler records them, and the loop acts on them.

The handler of a stop records the first signal and its time, nothing else. A second Ctrl-C ends the process at once,
because the first one restores SIGINT's default action. A thread in `wait` sees a signal even while the main thread is
in a long call, a collective or a compilation, where Python cannot run a handler.
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
"""Value of `received` if `lingua stop` asked instead of a signal."""


@dataclass
class SignalFlag:
    """A flag set by signals, read by the loop. Only the handler writes `received`, so `take` loses no signal."""

    received: int = 0
    taken: int = 0

    def note(self, *_: object) -> None:
        """Record a signal; usable as a handler."""
        self.received += 1

    def take(self) -> float:
        """Return 1 if a signal has arrived since the last call, otherwise 0."""
        before, self.taken = self.taken, self.received
        return float(self.taken > before)


@contextmanager
def noted(names: Iterable[str], flag: SignalFlag) -> Iterator[None]:
    """Let these signals set the flag inside this context."""
    old = {name: signal.signal(signal.Signals[name], flag.note) for name in names}
    try:
        yield
    finally:
        for name, handler in old.items():
            signal.signal(signal.Signals[name], handler)


def is_nohup(number: signal.Signals) -> bool:
    """Return whether `nohup` asks to ignore this signal."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


@dataclass
class StopSignals:
    """Listen for `names` ("SIGTERM", ...) inside a `with`, and restore the old handlers on leaving."""

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
            if is_nohup(number):
                continue
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
        """Act as if a signal of this name had arrived."""
        if self.received is None:
            self.received_at_s = self.now()
            self.received = name  # set last, since other threads check it first

    def wait(self, timeout_s: float) -> None:
        """Wait for a signal or for `timeout_s` and update `received`. Callable from any thread."""
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
