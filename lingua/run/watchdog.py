"""Watch a rank from a second thread, since the main thread may be stuck, and end the process if necessary.

When a rank fails or is killed, all others learn of it within seconds: each leaves with a message and its own
`error_<rank>.json`, long before a collective would time out. If a rank hangs, every rank's stacks are in
`logs/stacks_<rank>.txt`. A stop signal before the first step of this attempt ends all ranks soon, since nothing can be
lost; later the training loop decides for all ranks. Once a failure is recorded, the process ends within LEAVE_WITHIN_S,
even if its cleanup hangs.

    with Watchdog(rank, signals, args.watchdog, run_dir) as watchdog:
        with watchdog.reporting():        # an error in here is recorded and sent to the other ranks
            watchdog.join(peers)          # once they have met
            watchdog.open(attempt)        # from now on the run folder is ours
            ...; watchdog.heartbeat.beat(step)

The thread ends the process by `os._exit`, because an exception cannot be raised in a main thread that waits in a
collective. That skips the same cleanup as a kill, which the next attempt handles; functions in `at_exit` are called.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import orjson

from lingua.config.keys.watchdog import WatchdogArgs
from lingua.files import no_follow
from lingua.run.failure import REFUSALS, Failure, HungError, RankError, failure_of, known_to_all, record, stacks_file
from lingua.run.folder import EXIT_FAILED, EXIT_HUNG, describe_stop, end_asked_for
from lingua.signals import StopSignals

log = logging.getLogger(__name__)

TICK_S = 1.0
POLL_S = 0.5
START_GRACE_S = 2.0
"""How long a stop signal before the first step of an attempt waits for that step."""
ECHO_S = 5.0
"""How long a rank that lost its connection waits for the message of the rank that failed."""
LOST_S = 20.0
"""How long a rank that can no longer reach the others may take to end by itself."""
LEAVE_WITHIN_S = 60.0
LAST_WORDS_S = 5.0


class Others(Protocol):
    """The part of `peers.Peers` used here."""

    def send(self, message: bytes) -> None: ...

    def received(self) -> bytes | None: ...

    def gone(self) -> list[int]: ...

    def leave(self, within_s: float) -> None: ...


@dataclass(frozen=True)
class End:
    """Why a rank leaves, as sent to the others."""

    rank: int
    reason: str
    """As in stop.json: error, signal, asked."""
    exit_code: int
    message: str
    kind: str = ""
    """Kind of the error."""
    signal: str = ""


class Watchdog:
    """Ends this rank when it hangs, when another rank fails, or when it is asked to stop before its first step.

    A context manager; the main thread enters it before it first waits for other ranks.
    """

    def __init__(
        self,
        rank: int,
        signals: StopSignals,
        watchdog: WatchdogArgs | None,
        run_dir: Path,
        *,
        now: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.heartbeat = Heartbeat(watchdog, now)
        self.at_exit: list[Callable[[], object]] = []
        """Called before the watchdog ends the process: release a lock, free the terminal."""
        self._rank, self._signals, self._run_dir = rank, signals, run_dir
        self._now, self._leave = now, leave
        self._peers: Others | None = None
        self._attempt: int | None = None
        self._is_new = False
        self._end: End | None = None
        self._found: Exception | None = None
        self._leave_by_s = float("inf")
        self._only_one = threading.Lock()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        self._start(self._watch, "watchdog")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._signals.wake()
        for thread in self._threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._leave_peers()

    def _start(self, act: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=self._or_leave, args=[act], name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _or_leave(self, act: Callable[[], None]) -> None:
        """In a thread: end the process if `act` has a bug, since nothing would watch or listen any more."""
        try:
            act()
        except Exception as error:
            log.exception("a thread of the watchdog has a bug")
            failure = self._failure(error)
            self._go(self._end_of(failure), failure)

    def join(self, peers: Others) -> None:
        """Listen to the other ranks, which can be reached from now on."""
        self._peers = peers
        self._start(self._listen, "peers")

    def open(self, attempt: int, is_new: bool = False) -> None:
        """Note that this attempt owns the run folder. `is_new`: this attempt created it."""
        self._attempt, self._is_new = attempt, is_new

    @property
    def refused(self) -> bool:
        """Whether this start was refused before its first step, so that a folder that it made must be removed."""
        if self._end is None or not self.heartbeat.starting:
            return False
        is_there, is_refusal = self._run_dir.exists(), self._end.kind in REFUSALS
        if self._attempt is None:
            return is_refusal and not is_there
        return self._is_new and (is_refusal or not is_there)  # rank 0 may have removed it before we heard why

    def fail(self, error: Exception) -> None:
        """End all ranks because of an error that a thread of ours has found, whatever the main thread waits for."""
        self._found = self._found or error
        self._signals.wake()

    # -- the main thread -------------------------------------------------------------------------------------------

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop; the others may not know yet."""
        return self._signals.received is not None

    @property
    def received(self) -> str | None:
        """The signal, or the request, that asked this rank to stop."""
        return self._signals.received

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Record an error in the block and send it to the other ranks before anything is cleaned up.

        If the connection to another rank was lost, wait for that rank's message and leave with its reason.
        """
        try:
            yield
        except Exception as error:
            failure = self._failure(error)
            if failure.kind != "nccl" or self._peers is None or known_to_all(error):
                self._settle(self._end_of(failure), failure, tell=not known_to_all(error))
                raise
            for _ in range(round(ECHO_S / POLL_S)):
                self._closed.wait(POLL_S)  # the listening thread ends the process when it receives a reason
            why = failure.message.strip().partition("\n")[0]
            lost = RankError(
                f"the connection to another rank was lost, and no rank sent a reason ({why}); see the logs"
            )
            failure = replace(failure, message=str(lost))
            self._settle(self._end_of(failure), failure)
            raise lost from error

    # -- threads ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._signals.wait(TICK_S)
            self.look()

    def look(self) -> None:
        """Check the signals and the clock once."""
        if self._end is not None:
            if self._now() > self._leave_by_s:
                log.error("the cleanup did not end within %d s; leaving", LEAVE_WITHIN_S)
                self._leave(self._end.exit_code)
            return
        if self._found is not None:
            failure = self._failure(self._found)
            self._go(self._end_of(failure), failure)
        elif self._signals.received is not None and self.heartbeat.starting:
            assert self._signals.received_at_s is not None
            if self._now() - self._signals.received_at_s < START_GRACE_S:
                return  # the first step may be about to end: then the loop can save it
            reason, exit_code = end_asked_for(self._signals.received)
            message = f"stopped by {self._signals.received} before the first step of this attempt; nothing is lost"
            self._go(End(self._rank, reason, exit_code, message, signal=self._signals.received))
        elif (problem := self.heartbeat.overdue()) is not None:
            error = HungError(f"rank {self._rank} hangs: {problem}; its stacks are in {self._stacks}")
            failure = self._failure(error)
            self._go(self._end_of(failure), failure)
        elif (limit_s := self.heartbeat.limit_s) != float("inf"):
            self._arm(limit_s + 60)

    def _arm(self, limit_s: float) -> None:
        """End the process even if a call never releases the GIL: faulthandler needs no Python thread."""
        faulthandler.dump_traceback_later(limit_s, exit=True, file=2)

    def _listen(self) -> None:
        """Leave when another rank sends its end, is gone, or can no longer be reached."""
        assert self._peers is not None
        while not self._closed.wait(POLL_S):
            try:
                gone = self._peers.gone()
                message = self._peers.received()  # read last: a rank that is gone may have sent it
            except RuntimeError as error:  # torch's DistError
                self._lost(str(error).partition("\n")[0])
                return
            if message is None and gone:
                self._missed(gone[0])
                return
            if message is None:
                continue
            end = End(**orjson.loads(message))
            if end.rank != self._rank:
                self._follow(end)
            return

    def _lost(self, how: str) -> None:
        if self._closed.wait(LOST_S):
            return  # the run has ended
        error = RankError(f"rank 0 or its node is gone ({how})")
        failure = self._failure(error)
        self._go(self._end_of(failure), failure)

    def _missed(self, rank: int) -> None:
        error = RankError(
            f"rank {rank} is gone without a word: its process was killed, perhaps for memory, or its node failed; see "
            "the system's log there"
        )
        failure = self._failure(error)
        self._go(replace(self._end_of(failure), rank=rank), replace(failure, because_of_rank=rank))

    def _follow(self, end: End) -> None:
        """Leave because another rank does."""
        if end.reason != "error":
            self._go(replace(end, message=f"{end.message} (rank {end.rank})"))
            return
        error = RankError(f"rank {end.rank} failed, so rank {self._rank} leaves: {end.message}", end.kind)
        failure = replace(self._failure(error), because_of_rank=end.rank)
        self._go(replace(end, message=f"rank {end.rank}: {end.message}"), failure)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _failure(self, error: Exception) -> Failure:
        return failure_of(error, rank=self._rank, step=self.heartbeat.step, incarnation=self._attempt)

    def _end_of(self, failure: Failure) -> End:
        exit_code = EXIT_HUNG if failure.kind == "hang" else EXIT_FAILED
        return End(self._rank, "error", exit_code, f"{failure.type}: {failure.message}", failure.kind)

    def _settle(self, end: End, failure: Failure | None = None, *, tell: bool = True) -> bool:
        """Send the end to the other ranks and record it; return False if this rank is already leaving."""
        with self._only_one:
            if self._end is not None:
                return False
            self._end, self._leave_by_s = end, self._now() + LEAVE_WITHIN_S
        if tell and self._peers is not None:
            try:
                self._peers.send(orjson.dumps(asdict(end)))
            except RuntimeError as error:
                log.warning("cannot send this to the other ranks: %s", str(error).partition("\n")[0])
        if self.refused or (failure is not None and failure.kind == "occupied"):  # the folder is another process's
            return True
        if failure is not None:
            if failure.kind == "hang":
                self._dump_stacks()
            record(self._run_dir, failure)
        if self._rank == 0 and self._attempt is not None:
            facts = {"step": self.heartbeat.step, "kind": end.kind, "rank": end.rank, "signal": end.signal}
            if end.reason == "error":
                facts["error"] = end.message
            facts = {key: value for key, value in facts.items() if value not in ("", None)}
            describe_stop(self._run_dir, end.reason, end.exit_code, **facts)
        return True

    def _go(self, end: End, failure: Failure | None = None) -> None:
        """Record the end and end the process from this thread."""
        if not self._settle(end, failure):
            return
        if failure is None:
            log.warning("%s", end.message)
        else:
            log.error("%s", failure.message)
        for act in self.at_exit:
            try:
                act()
            except Exception:
                log.exception("cleanup failed")
        self._leave_peers()
        logging.shutdown()
        self._leave(end.exit_code)

    def _leave_peers(self) -> None:
        if self._peers is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone, so no rank is waiting
                self._peers.leave(LAST_WORDS_S)

    @property
    def _stacks(self) -> Path:
        return stacks_file(self._run_dir, self._rank)

    def _dump_stacks(self) -> None:
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with open(self._stacks, "w", opener=no_follow) as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.warning("cannot write %s: %s", self._stacks, error.strerror or error)


_WARM_UP_STEPS = 5  # compilation, autotuning, first touch of memory and files
_REMEMBERED_STEPS = 51


class Heartbeat:
    """The progress of one rank; never overdue if `args` is None."""

    def __init__(self, args: WatchdogArgs | None, now: Callable[[], float] = time.monotonic) -> None:
        self._args = args
        self.now = now
        self._since_s = now()
        self._paces_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._n_beats = 0
        self._doing: str | None = None
        self.step: int | None = None
        """Updates done, as last reported by the training loop; None before the loop."""

    @property
    def starting(self) -> bool:
        """Whether no step of this attempt is done, so that there is nothing to save."""
        return self._n_beats == 0

    def beat(self, step: int) -> None:
        """Report that an update is done."""
        now_s = self.now()
        if self._n_beats >= _WARM_UP_STEPS:
            self._paces_s.append(now_s - self._since_s)
        self._n_beats += 1
        self.step, self._since_s = step, now_s

    def sign(self) -> None:
        """Report progress outside of a step."""
        self._since_s = self.now()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Run a block that is not a step: "validation", "checkpoint", "evaluation"."""
        self._since_s, self._doing = self.now(), what
        yield
        self._since_s, self._doing = self.now(), None

    @property
    def limit_s(self) -> float:
        """Seconds that the current activity may take."""
        if self._args is None:
            return float("inf")
        if self._doing is not None or not self._paces_s:
            return self._args.other_s
        return max(self._args.min_s, self._args.step_factor * statistics.median(self._paces_s))

    def overdue(self) -> str | None:
        """Return why this rank counts as hung, or None if it does not."""
        limit_s = self.limit_s
        if self.now() - self._since_s <= limit_s:
            return None
        if self._doing is not None:
            return f"the {self._doing} at step {self.step} did not end within {limit_s:.0f} s (watchdog.other_s)"
        if not self._paces_s:
            return f"the attempt did not finish its first steps within {limit_s:.0f} s (watchdog.other_s)"
        usual_s = statistics.median(self._paces_s)
        return f"no step ended within {limit_s:.0f} s after step {self.step}; a step takes {usual_s:.3g} s (watchdog)"
