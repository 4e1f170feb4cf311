"""The leader's side of its node's checkpoint service: start it, send it the run, read its reports. Torch-free.

A service that dies is restarted, a few times. Its reports are logged, and its bugs are raised here.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from lingua.checkpoint.shm.area import SERVICE_LOCK, Events, ServedRun, ShmArea, served_by, write_run
from lingua.checkpoint.shm.part_server import public_name
from lingua.files import DISK, DiskError, Files, ProcessLock, RunError, raise_if
from lingua.run.failure import RankError, carried
from lingua.run.lock import why_overtaken

log = logging.getLogger(__name__)

LOOK_S = 0.05
RESTARTS = 3
"""Restarts of the service before it has published something."""
DISK_ATTEMPTS = 4
"""The service's attempts to save an awaited step on a disk whose fault may be transient: some seconds."""
WORD_S = 10.0
"""Seconds between two log lines about an awaited service."""
START_S = 30.0
"""How long a service may take to start."""


class ServiceProcess(Protocol):
    """A started process."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""


StartService = Callable[[Path, Path, Path], ServiceProcess]
"""(run folder, memory file system, log file) -> a service of this node."""


def start_service(run_dir: Path, shm: Path, log_file: Path) -> ServiceProcess:
    """Start the service of this node in a new session, so that it outlives us."""
    module = ["-P", "-m", "lingua.checkpoint.shm.service"]
    command = [sys.executable, *module, os.path.realpath(run_dir), "--shm", str(shm)]
    home = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def why_taken(run: ServedRun, served: tuple[str, int] | None, *, is_first: bool) -> str | None:
    """Return why an attempt must not use the memory of its node, or None.

    `served`: (run id, attempt) that the service knows. Before it knows us (`is_first`), it may know another run, which
    had the folder before.
    """
    run_id, attempt = served or (run.run_id, run.attempt)
    is_ours = is_first or (run_id, attempt) == (run.run_id, run.attempt)
    return why_overtaken(run.run_dir, run.attempt, attempt if run_id == run.run_id else run.attempt, is_ours)


class ServiceClient:
    """The service of one node, for the leader of its ranks."""

    def __init__(
        self,
        area: ShmArea,
        attempt: int,
        log_file: Path,
        *,
        files: Files = DISK,
        start: StartService = start_service,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._area, self._attempt, self._log_file = area, attempt, log_file
        self._files, self._start, self._sleep = files, start, sleep
        self._run: ServedRun | None = None
        self._n_starts = 0
        self._starting: ServiceProcess | None = None
        """A service that was started and does not serve yet."""
        self._n_refusals = 0
        """Saves that the disk refused since it last took one or since a wait began."""
        self._events = Events(area)
        self._outcomes: dict[int, dict[str, Any]] = {}
        """The last report on each step since the last save."""
        self.fatal: RunError | None = None
        """A bug of the service, or the run has a newer attempt."""

    # -- the process -----------------------------------------------------------------------------------------------

    def send(self, run: ServedRun, *, wait: bool = True) -> None:
        """Send the run to the service; start it if needed, and `wait` for it.

        Raises OSError, RunError.
        """
        self._check_area(run)
        self._run = run
        write_run(self._area, run, files=self._files)
        self.ensure(wait=wait)

    def _check_area(self, run: ServedRun) -> None:
        """Raise RankError if another attempt has this node's memory, which we must not touch then."""
        if why := why_taken(run, served_by(self._area), is_first=self._run is None):
            raise RankError(why, "occupied")

    def ensure(self, *, wait: bool = True) -> None:
        """Start the service if there is none; `wait` until it serves. Raises RunError if it keeps dying."""
        assert self._run is not None
        looks = 0
        while not self._is_alive():
            if self._starting is None or self._starting.poll() is not None:
                self._starting, looks = self._start_another(self._run), 0
            if not wait:
                return
            looks += 1
            if looks > START_S / LOOK_S:
                late = f"the checkpoint service did not start within {START_S:.0f} s"
                raise RunError(f"{late}; see {self._log_file}")
            self._sleep(LOOK_S)
        self._starting = None

    def _start_another(self, run: ServedRun) -> ServiceProcess:
        if self._n_starts > RESTARTS:
            ended = f"the checkpoint service of this node has ended {self._n_starts} times"
            raise RunError(f"{ended}; see {self._log_file}")
        if self._n_starts:
            log.warning("the checkpoint service of this node is gone; starting another")
        self._n_starts += 1
        return self._start(run.run_dir, Path(run.args.shm_path), self._log_file)

    def address(self) -> tuple[str, int]:
        """Wait until the service listens for other nodes; return where. Raises RunError if it does not."""
        assert self._run is not None
        self.ensure()
        for _ in range(int(START_S / LOOK_S)):
            with suppress(FileNotFoundError):
                said = self._area.address.read()
                ours = (_holder(self._area.lock(SERVICE_LOCK)), self._run.listen, public_name(self._run.secret))
                if (said["pid"], said["host"], said.get("for")) == ours:  # it may still serve the attempt before us
                    if not said["port"]:
                        break
                    return said["host"], said["port"]
            self._sleep(LOOK_S)
        raise RunError(
            f"the checkpoint service of this node does not listen at {self._run.listen}; see {self._log_file}"
        )

    def why_stopped(self) -> str | None:
        """Return a message with the remedy if the service is stopped (SIGSTOP), else None."""
        pid = _holder(self._area.lock(SERVICE_LOCK))
        with suppress(OSError):  # it has just ended
            if pid and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":  # proc(5)
                who = f"the checkpoint service of {socket.gethostname()}, process {pid}, is stopped and saves nothing"
                return (
                    f"{who}; `kill -CONT {pid}` lets it go on, `kill -9 {pid}` makes room for another; nothing is lost"
                )
        return None

    def _is_alive(self) -> bool:
        return _holder(self._area.lock(SERVICE_LOCK)) is not None

    # -- its reports -----------------------------------------------------------------------------------------------

    def read_events(self) -> list[dict[str, Any]]:
        """Return and log what the service has reported to this attempt since the last call."""
        events = [event for event in self._events.read() if event["incarnation"] == self._attempt]
        for event in events:
            _log(event)
            if event["kind"] in ("published", "lost", "failing"):
                self._outcomes[event["step"]] = event
                self._n_refusals += _is_refusal(event)
            if event["kind"] == "published":
                self._n_starts, self._n_refusals = min(self._n_starts, 1), 0
            elif event["kind"] in ("failed", "fenced"):
                self.fatal = RankError(event["why"], "bug" if event["kind"] == "failed" else "occupied")
        return events

    def check(self) -> None:
        """Read its reports and restart it if it died. Raises RunError if it cannot or must not continue."""
        assert self._run is not None
        self._check_area(self._run)
        self.read_events()
        raise_if(self.fatal)
        self.ensure()

    def forget_outcomes(self) -> None:
        """Forget reports on earlier saves. Call when a new one begins."""
        self._outcomes.clear()

    def await_rescue(self, numbers: list[int]) -> None:
        """Wait until the service has saved these slots of an earlier attempt. Raises RunError when the disk refuses."""
        looks, doing = 0, f"it saves what is in memory ({self._log_file})"
        while any(self._area.slot(number).state() != "free" for number in numbers):
            looks += 1
            say_who_is_waited_for(looks, self._area.lock(SERVICE_LOCK), doing)
            refusals = [_refusal(event) for event in self.read_events() if _is_refusal(event)]
            error = self.fatal or next((newest for newest in refusals[-1:] if not self._may_pass(newest)), None)
            if error is not None:
                raise carried(
                    error,
                    f"this node's memory holds a newer checkpoint than the disk, and it cannot be saved: {error}. "
                    f"Mend that and start again on {socket.gethostname()}",
                )
            self.ensure()
            self._sleep(LOOK_S)

    def expect(self) -> None:
        """Forget refusals of earlier steps. Call before waiting for one."""
        self._n_refusals = 0

    def outcome(self, step: int, is_late: bool, *, has_deadline: bool, stopping: bool) -> tuple[bool, str | None]:
        """Return whether the outcome of a step is known, and what is missing if it is not published.

        Raises RunError when it is lost or the disk refuses it for good; see `Coordinator.finish`.
        """
        self.check()
        event = self._outcomes.get(step, {"kind": "nothing"})
        if event["kind"] == "lost":
            raise RankError(event["why"], "disk")  # a rank that trains it again may save it
        if event["kind"] == "published":
            return True, None
        if event["kind"] == "failing" and not has_deadline and not self._may_pass(_refusal(event)):
            if not stopping or not _refusal(event).may_pass:
                raise _refusal(event)
            is_late = True
        if not is_late:
            return False, None
        trouble = f" ({event['why']})" if "why" in event else ""
        return True, f"checkpoint {step} is in the memory of {socket.gethostname()}, but not on the disk yet{trouble}"

    def _may_pass(self, refused: DiskError) -> bool:
        """Return whether it is worth waiting for the service's next attempt."""
        return refused.may_pass and self._n_refusals < DISK_ATTEMPTS


def _holder(lock: ProcessLock) -> int | None:
    """Return the pid that holds a lock, or None; closes the lock."""
    try:
        return lock.holder()
    finally:
        lock.close()


def say_who_is_waited_for(looks: int, lock: ProcessLock, why: str) -> None:
    """Log every WORD_S, counted in looks of LOOK_S, which service is awaited; close the lock."""
    pid = _holder(lock)
    if looks % int(WORD_S / LOOK_S) == 0:
        who = "a new checkpoint service" if pid is None else f"the checkpoint service of this node, process {pid}"
        remedy = "" if pid is None else f"; if it hangs (no progress in its log), `kill -9 {pid}` loses nothing"
        log.warning("waiting %.0f s for %s: %s%s", looks * LOOK_S, who, why, remedy)


def _is_refusal(event: dict[str, Any]) -> bool:
    """Return whether the disk has refused a checkpoint; a failed deletion is `failing` too."""
    return event["kind"] == "failing" and "errno" in event


def _refusal(event: dict[str, Any]) -> DiskError:
    return DiskError(event["why"], event.get("errno"))


def _log(event: dict[str, Any]) -> None:
    if event["kind"] == "published":
        log.info(
            "checkpoint %d is published, %.1f s after it was taken up (%.2f GB/s)",
            event["step"], event["seconds"], event["gb_per_s"],
        )  # fmt: skip
    elif event["kind"] == "recovered":
        log.info("%s", event["why"])
    elif event["kind"] == "copied":
        log.debug("node %d's part of checkpoint %d is copied to this node", event["node"], event["step"])
    elif event["kind"] == "uncopied":
        log.warning("%s", event["why"])
    elif event["kind"] != "retired" or "why" in event:
        log.error("%s", event["why"])
