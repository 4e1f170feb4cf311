"""One owner of a run folder at a time, each start with a number of its own.

Promise: two trainers never own a folder at once; the second is refused with a sentence that says who is there. The
lock of a dead owner holds nobody up for longer than a minute, and not at all when its death is certain (same host: no
such process; same Slurm job, restarted). An owner that was overtaken while it slept learns it before it publishes.
Cost: one small file per start, touched every BEAT_S by a thread, which then looks whether `lingua stop` or
`lingua profile` has asked.

The folder `incarnations/` holds one file per start, 0000000001.json and so on; the owner is the one with the highest
number. Taking over means creating the next number, which a file system grants to one process only, so there is no
lock to break and no race in breaking it. The age of a heartbeat is measured with the file server's clock alone.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lingua.files import DiskError, RunError, entries, read_json, write_json, write_whole

log = logging.getLogger(__name__)

FOLDER = "incarnations"
BEAT_S = 10.0
DEAD_AFTER_S = 60.0
_NAME = re.compile(r"(\d{10})\.json", re.ASCII)


class OccupiedError(RunError):
    """Somebody else owns the run folder."""


@dataclass(frozen=True)
class Owner:
    """A process, well enough described to tell whether it is still there."""

    host: str = ""
    boot_id: str = ""
    """Differs after each boot of the host."""
    pid_space: str = ""
    """Containers on one host see different processes."""
    pid: int = 0
    started: str = ""
    """Start of the process in clock ticks since boot: a number that a recycled pid does not share."""
    slurm_job_id: str = ""
    slurm_restarts: int = 0

    @property
    def place(self) -> tuple[str, str, str]:
        return self.host, self.boot_id, self.pid_space


def this_process(slurm_job_id: str = "", slurm_restarts: int = 0) -> Owner:
    return Owner(
        host=socket.gethostname(),
        boot_id=_read("/proc/sys/kernel/random/boot_id"),
        pid_space=_link("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=_start_of(os.getpid()),
        slurm_job_id=slurm_job_id,
        slurm_restarts=slurm_restarts,
    )


def owner_in(record: Any) -> Owner:
    """The owner that a JSON document describes."""
    return Owner(**{key: record[key] for key in Owner.__dataclass_fields__ if key in record})


def certainly(owner: Owner, me: Owner) -> bool | None:
    """True: alive; False: dead; None: only its heartbeat can tell."""
    if owner.place == me.place and owner.boot_id:
        return _start_of(owner.pid) == owner.started
    if owner.slurm_job_id and owner.slurm_job_id == me.slurm_job_id and owner.slurm_restarts < me.slurm_restarts:
        return False  # Slurm starts a requeued job only after its processes are gone
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """Field 22 of /proc/<pid>/stat (proc(5)); empty when there is no such process or it is a zombie."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before ")" may hold blanks
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _claim(draft: Path, path: Path) -> None:
    """Give `draft` the name `path`, unless it is taken: then FileExistsError."""
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with path.open("xb") as file:  # a file system without hard links
            file.write(draft.read_bytes())


def stop_request(run_dir: Path, incarnation: int) -> Path:
    """The file that asks this very start to stop; a later start knows nothing of it."""
    return run_dir / FOLDER / f"{incarnation:010d}.stop"


def ask_to_stop(run_dir: Path, incarnation: int) -> None:
    """Ask a start to stop, from any machine that sees the folder. Raises RunError where one may not write."""
    path = stop_request(run_dir, incarnation)
    try:
        write_whole(path, b"")
    except OSError as error:
        raise RunError(f"cannot ask {run_dir} to stop: {error.strerror} ({path.parent}); its owner can") from None


@dataclass(frozen=True)
class Start:
    """The newest start of a run, as far as reading alone can tell."""

    incarnation: int
    owner: Owner
    alive: bool
    """It is certain, or its heart has beaten of late by this machine's clock."""

    def __str__(self) -> str:
        job = f", Slurm job {self.owner.slurm_job_id}" if self.owner.slurm_job_id else ""
        return f"start {self.incarnation} (process {self.owner.pid} on {self.owner.host}{job})"


def newest_start(run_dir: Path, me: Owner | None = None, now: Callable[[], float] = time.time) -> Start | None:
    """Who owned the run last and whether it is alive; None before the first start. Only reads, so nothing is sure."""
    newest = _newest(run_dir / FOLDER)
    if not newest:
        return None
    path = _path(run_dir / FOLDER, newest)
    record, age_s = read_json(path), now() - path.stat().st_mtime
    owner = owner_in(record)
    alive = certainly(owner, me or this_process())
    alive = age_s < DEAD_AFTER_S if alive is None else alive
    return Start(newest, owner, alive and not record.get("released"))


def start_files(folder: Path) -> dict[int, Path]:
    """The file of each start in a folder `incarnations`, the first start first."""
    found = {int(match[1]): path for path in entries(folder) if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _newest(folder: Path) -> int:
    return max(start_files(folder), default=0)


def _path(folder: Path, incarnation: int) -> Path:
    return folder / f"{incarnation:010d}.json"


class RunLock:
    """The ownership of one run folder. A context manager: acquire, beat, release."""

    def __init__(
        self,
        run_dir: Path,
        me: Owner | None = None,
        *,
        doing: str = "trained",
        now: Callable[[], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`now`: seconds since the epoch; None: the file server's own clock. `doing`: what owners do, for people."""
        self._run_dir = run_dir
        self._doing = doing
        self._folder = run_dir / FOLDER
        self._me = me or this_process()
        self._now = now
        self._sleep = sleep
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.incarnation = 0
        """Number of this start, from 1. 0: not the owner."""
        self.on_stop_request: Callable[[], object] = lambda: None
        """Called, from the beating thread, when somebody has asked this start to stop."""
        self.on_beat: Callable[[], object] = lambda: None
        """Called at each heartbeat, from its thread; may raise OSError."""

    def acquire(self) -> int:
        """Become the owner; returns the incarnation. Raises OccupiedError, or RunError for an unwritable folder."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._try_next():
                pass
        except OSError as error:
            raise DiskError.of(error, f"cannot lock {self._run_dir}: {error.strerror} ({error.filename})") from None
        self._thread = threading.Thread(target=self._beat_on, name="run-lock", daemon=True)
        self._thread.start()
        return self.incarnation

    def _try_next(self) -> bool:
        newest = _newest(self._folder)
        if newest:
            self._wait_until_gone(_path(self._folder, newest))
        draft = self._folder / f".{os.getpid()}-{threading.get_ident()}.json"
        write_json(draft, asdict(self._me) | {"incarnation": newest + 1, "released": False, "began_at": time.time()})
        self._touch(draft)
        try:
            _claim(draft, _path(self._folder, newest + 1))
        except FileExistsError:
            return False  # somebody was faster: look again who it is
        finally:
            draft.unlink(missing_ok=True)
        self.incarnation = newest + 1
        return True

    def _wait_until_gone(self, path: Path) -> None:
        """Return when the owner described in `path` is gone; raise OccupiedError as soon as it shows to be alive."""
        first_beat: float | None = None
        while True:
            beat = path.stat().st_mtime
            record = read_json(path)
            owner = owner_in(record)
            alive = certainly(owner, self._me)
            if record.get("released") or alive is False:
                return
            if alive is None and self._time() - beat > DEAD_AFTER_S:
                return
            if alive or first_beat not in (None, beat):
                raise OccupiedError(self._who(owner))
            if first_beat is None:
                log.info("waiting whether process %d on %s, which owns this run, is alive", owner.pid, owner.host)
            first_beat = beat
            self._sleep(5.0)

    def _who(self, owner: Owner) -> str:
        job = f", Slurm job {owner.slurm_job_id}" if owner.slurm_job_id else ""
        return (
            f"{self._run_dir} is being {self._doing} by process {owner.pid} on {owner.host}{job}; "
            "stop that one first, or choose another name or dump_dir"
        )

    def check(self) -> None:
        """Raise RunError if a newer start owns the folder."""
        newest = _newest(self._folder)
        if newest > self.incarnation:
            raise RunError(
                f"start {newest} of this run has taken over {self._run_dir}; this one, start {self.incarnation}, stops"
            )

    def holds(self) -> bool:
        """Whether the folder is still ours: no newer start owns it, and it was not moved away."""
        return _newest(self._folder) == self.incarnation

    def release(self) -> None:
        """Give the folder back; the number stays used."""
        if not self.incarnation:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        path = _path(self._folder, self.incarnation)
        try:
            write_json(path, read_json(path) | {"released": True, "released_at": time.time()})
        except (OSError, RunError) as error:
            log.warning("cannot release the lock of %s: %s", self._run_dir, error)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._touch(_path(self._folder, self.incarnation))
                if stop_request(self._run_dir, self.incarnation).exists():
                    self.on_stop_request()
                self.on_beat()
            except OSError as error:
                log.warning("no heartbeat in %s: %s", self._run_dir, error)

    def _touch(self, path: Path) -> None:
        os.utime(path, None if self._now is None else (self._now(), self._now()))

    def _time(self) -> float:
        if self._now is not None:
            return self._now()
        probe = self._folder / f".{os.getpid()}-{threading.get_ident()}.clock"
        write_whole(probe, b"")
        os.utime(probe)
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
