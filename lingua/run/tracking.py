"""Send a run's records to a tracker such as wandb, which can neither end the run nor slow it down.

A separate thread makes all calls to the tracker's package, since any of them may raise or never return: the server is
unreachable, its helper process was killed, the disk is full. After a failure it logs one warning and tries the next way
to track (wandb: offline). The metrics files have every record.
"""

from __future__ import annotations

import logging
import queue
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

log = logging.getLogger(__name__)

SILENT_S = 300.0
"""If a call takes longer than this, nothing more is sent."""
_HELD_RECORDS = 10_000


class Session(Protocol):
    """A tracker's run. Its methods may raise anything."""

    folder: str | None
    """Folder that `wandb sync` can upload later."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class Tracker:
    """Sends records to the session that the first of `ways` opens; after a failure, to that of the next way."""

    def __init__(
        self, name: str, ways: Sequence[Callable[[], Session]], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._ways, self._now = name, ways, now
        self._waiting: queue.Queue[dict[str, Any] | int] = queue.Queue(_HELD_RECORDS)  # an exit code closes the session
        self._folders: list[str] = []
        self._called_at_s: float | None = None
        self._begun = threading.Event()  # or given up
        self._giving_up, self._is_off = threading.Lock(), False
        self._thread = threading.Thread(target=self._track, name=name, daemon=True)
        self._thread.start()

    # -- called by the run -----------------------------------------------------------------------------------------

    def wait_until_begun(self, within_s: float) -> None:
        """Wait for the session. Records sent before it has begun are held."""
        self._begun.wait(within_s)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record; never waits, never raises."""
        called_at_s = self._called_at_s
        if called_at_s is not None and self._now() - called_at_s > SILENT_S:
            self._give_up(f"no answer for {SILENT_S:.0f} s")
        self._put(dict(record))

    def close(self, exit_code: int, within_s: float) -> None:
        """Send the waiting records and end the session, within at most `within_s`."""
        self._put(exit_code)
        if not self._is_off:
            self._thread.join(within_s)
            if self._thread.is_alive():
                self._give_up(f"it did not end within {within_s:g} s")

    def _put(self, item: dict[str, Any] | int) -> None:
        if not self._is_off:
            try:
                self._waiting.put_nowait(item)
            except queue.Full:
                self._give_up(f"it has not taken the last {_HELD_RECORDS:,} records")

    # -- the tracker's thread --------------------------------------------------------------------------------------

    def _track(self) -> None:
        problem, item = "", None
        for begin in self._ways:
            try:
                session = self._call(begin)
                if session.folder is not None:
                    self._folders.append(session.folder)
                if problem:
                    log.warning("%s: %s; tracking offline from now on%s", self._name, problem, self._upload())
                self._begun.set()
                while not self._is_off:
                    item = self._waiting.get() if item is None else item
                    if isinstance(item, int):
                        self._call(session.finish, item)
                        return
                    self._call(session.log, item)
                    item = None
                return
            except (Exception, SystemExit) as error:  # of the package or the network; wandb.teardown exits
                problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                if isinstance(item, int):
                    break  # all was sent
        self._give_up(problem)

    def _call(self, act: Callable[..., Any], *args: Any) -> Any:
        self._called_at_s = self._now()
        result = act(*args)
        self._called_at_s = None
        return result

    # -- either ----------------------------------------------------------------------------------------------------

    def _give_up(self, problem: str) -> None:
        with self._giving_up:
            if self._is_off:
                return
            log.warning(  # before the run stops waiting for this thread
                "%s: %s; this attempt is no longer tracked there. The run continues, and its files have all metrics%s",
                self._name, problem, self._upload(),
            )  # fmt: skip
            self._is_off = True
        self._begun.set()

    def _upload(self) -> str:
        return f"; upload what was tracked with `wandb sync {shlex.join(self._folders)}`" if self._folders else ""
