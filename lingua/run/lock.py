"""Ownership of folders: one attempt owns a run folder, and one run a folder of checkpoints.

Two trainers never own a folder at once; the second is refused with a sentence that names the first. The lock of a dead
owner blocks others for at most a minute, and not at all if its death is certain (same host: no such process; same Slurm
job, restarted). An owner that was replaced while it was suspended finds out at its next heartbeat or save.

The folder `incarnations/` has one file per attempt, 0000000001.json and so on; the highest number is the owner. Taking
over means creating the next number, which a file system grants to one process only, so there is no lock to break and no
race in breaking it. Every BEAT_S a thread checks that the folder is still ours, touches the file, and looks for
requests of `lingua stop` and `lingua profile`. A heartbeat is stale by the file server's clock, or if it did not change
for a minute of the newcomer's clock. A record that came with a copy of the folder owns nothing (`place.py`).
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
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lingua.files import DISK, DiskError, RunError, entries, raise_if, read_json, write_json, write_whole
from lingua.run.place import Place, Run, bind, bound_to, copied_from, is_of_another, place_in, place_of

log = logging.getLogger(__name__)

FOLDER = "incarnations"
BEAT_S = 10.0
DEAD_AFTER_S = 60.0
_YEAR_10000_S = 253_402_300_800.0
_NAME = re.compile(r"(\d{10})\.json", re.ASCII)


class OccupiedError(RunError):
    """Another process owns the run folder."""


class OvertakenError(OccupiedError):
    """Another process has taken over the run folder, which was ours."""


@dataclass(frozen=True)
class Owner:
    """A process, described well enough to check whether it is still running."""

    host: str = ""
    boot_id: str = ""
    """Differs after each boot of the host."""
    pid_space: str = ""
    """Containers on one host see different processes."""
    pid: int = 0
    started: str = ""
    """Start time in clock ticks since boot: another process with the same pid has another value."""
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
    """Return the owner that a JSON object describes."""
    return Owner(**{key: record[key] for key in Owner.__dataclass_fields__ if key in record})


def certainly(owner: Owner, me: Owner) -> bool | None:
    """Return whether an owner is alive, or None if only its heartbeat can tell."""
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
    """Return field 22 of /proc/<pid>/stat (proc(5)), or "" if there is no such process or it is a zombie."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before ")" may hold blanks
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _claim(draft: Path, path: Path) -> None:
    """Give `draft` the name `path`. Raises FileExistsError if the name is taken."""
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with path.open("xb") as file:  # a file system without hard links
            file.write(draft.read_bytes())


def stop_request(run_dir: Path, attempt: int) -> Path:
    """Return the file that asks this attempt to stop; later attempts ignore it."""
    return run_dir / FOLDER / f"{attempt:010d}.stop"


def ask_to_stop(run_dir: Path, attempt: int) -> None:
    """Ask an attempt to stop, from any machine that sees the folder. Raises RunError if the folder is not writable."""
    path = stop_request(run_dir, attempt)
    try:
        write_whole(path, b"")
    except OSError as error:
        raise DiskError.of(
            error, f"cannot ask {run_dir} to stop: {error.strerror} ({path.parent}); its owner can"
        ) from None


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run, as in its file in `incarnations/`."""

    number: int
    """From 1."""
    owner: Owner
    released: bool = False
    """It ended by itself."""
    began_s: float | None = None
    """Seconds since the epoch, as all times here; None if an older version wrote the file."""
    released_s: float | None = None
    beat_s: float = 0.0
    """Time of the last heartbeat."""
    copied_from: str = ""
    """The folder that it ran in, if this one is a copy of it."""
    folder: str = ""
    """The folder that it ran in, by its name then; "" if an older version wrote the file."""

    def is_alive(self, me: Owner | None = None, now_s: float | None = None, silent_s: float = DEAD_AFTER_S) -> bool:
        """Return whether the owner seems to be running; an owner on another machine is judged by its heartbeat."""
        if self.released or self.copied_from:
            return False
        alive = certainly(self.owner, me or this_process())
        return (time.time() if now_s is None else now_s) - self.beat_s < silent_s if alive is None else alive

    def looks_in(self, run_dir: Path, me: Owner) -> bool:
        """Return whether its owner sees files written to `run_dir`, which may have been renamed since it began."""
        if not self.folder or certainly(self.owner, me) is None:
            return True  # elsewhere the folder may have this name
        return os.path.exists(self.folder) and os.path.samefile(self.folder, run_dir)

    def __str__(self) -> str:
        return f"attempt {self.number} ({_process(self.owner)})"


def attempt_files(run_dir: Path) -> dict[int, Path]:
    """Return the file of each attempt, by ascending number."""
    found = {int(match[1]): path for path in entries(run_dir / FOLDER) if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def read_attempt(path: Path) -> Attempt:
    """Read the file of an attempt. Raises OSError, or RunError if it is damaged."""
    beat_s, record = path.stat().st_mtime, read_json(path)
    if not isinstance(record, dict) or not {"released", *Owner.__dataclass_fields__} & record.keys():
        raise RunError(f"{path} does not say whose attempt it is; it is damaged or was edited")
    began_s, released_s = (_time_in(record, key) for key in ("began_at", "released_at"))
    released, copied, held = bool(record.get("released")), copied_from(record, path.parent.parent), place_in(record)
    folder = held.path if held else ""
    return Attempt(int(path.stem), owner_in(record), released, began_s, released_s, beat_s, copied, folder)


def _time_in(record: dict[str, Any], key: str) -> float | None:
    """Return a time in seconds since the epoch, or None if it is not a time before the year 10000."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and 0 <= value < _YEAR_10000_S else None


def newest_attempt(run_dir: Path) -> Attempt | None:
    """Read the attempt that owns the folder or owned it last, or return None before the first.

    Raises as `read_attempt`.
    """
    files = attempt_files(run_dir)
    return read_attempt(files[max(files)]) if files else None


def living_attempt(run_dir: Path, me: Owner | None = None, now: Callable[[], float] = time.time) -> Attempt | None:
    """Return the attempt that seems to own the folder now, or None."""
    newest = newest_attempt(run_dir)
    return newest if newest is not None and newest.is_alive(me, now()) else None


# -- decisions -----------------------------------------------------------------------------------------------------


def still_owns(
    attempt: Attempt, certain: bool | None, *, age_s: float, unchanged_s: float, has_beaten: bool
) -> bool | None:
    """Return whether an owner keeps the folder from a newcomer, or None to look again.

    `certain`: the answer of `certainly`. `age_s` of its heartbeat is negative if a clock was set back, so `unchanged_s`
    of the newcomer's clock counts too. `has_beaten`: the heartbeat has changed meanwhile.
    """
    if attempt.released or attempt.copied_from:
        return False
    if certain is not None:
        return certain
    if has_beaten:
        return True
    return False if max(age_s, unchanged_s) > DEAD_AFTER_S else None


def why_overtaken(run_dir: Path, attempt: int, newest: int, is_ours: bool | None) -> str | None:
    """Return why an attempt must stop, or None. `is_ours`: whether it wrote the file of its number; None: no file."""
    this = f"this one, attempt {attempt}, stops"
    if newest > attempt:
        return f"attempt {newest} of this run has taken over {run_dir}; {this}"
    if is_ours is False:
        return f"another run has begun in {run_dir}, after the folder of this one was removed or replaced; {this}"
    return None


def run_in(run_dir: Path) -> Run:
    """Return the identity of a run, even before its first attempt. Raises OSError."""
    first = attempt_files(run_dir).get(1)
    record = None
    with suppress(FileNotFoundError, RunError):  # a damaged record: the folder alone identifies it
        record = None if first is None else read_json(first)
    born_s = _time_in(record, "began_at") if isinstance(record, dict) else None
    return Run(place_of(run_dir) if run_dir.exists() else Place(os.path.realpath(run_dir), 0), born_s)


def _process(owner: Owner) -> str:
    job = f", Slurm job {owner.slurm_job_id}" if owner.slurm_job_id else ""
    return f"process {owner.pid} on {owner.host}{job}"


class RunLock:
    """Owns one run folder. A context manager: acquire, beat, release."""

    def __init__(
        self,
        run_dir: Path,
        me: Owner | None = None,
        *,
        doing: str = "trained",
        now: Callable[[], float] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`now`: seconds since the epoch; None for the file server's clock. `doing`: the activity in messages."""
        self._run_dir = run_dir
        self._doing = doing
        self._folder = run_dir / FOLDER
        self._me = me or this_process()
        self._now, self._monotonic, self._sleep = now, monotonic, sleep
        self._began_at = 0.0
        self._bound: Path | None = None
        self._lost: RunError | None = None
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.attempt = 0
        """Number of this attempt, from 1; 0 if not the owner."""
        self.on_lost: Callable[[Exception], object] = lambda error: None
        """Called from the heartbeat's thread when the folder is not ours any more, or for a bug in that thread."""
        self.on_stop_request: Callable[[], object] = lambda: None
        """Called from the heartbeat's thread when `lingua stop` has asked this attempt to stop."""
        self.on_beat: Callable[[], object] = lambda: None
        """Called at each heartbeat, from its thread; may raise OSError."""

    def acquire(self) -> int:
        """Become the owner and return the attempt's number. Raises OccupiedError, or DiskError if writing fails."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._try_next():
                pass
        except OSError as error:
            remedy = "" if DiskError.of(error).may_pass else "; choose another folder"
            text = f"cannot lock {self._run_dir}: {error.strerror} ({error.filename}){remedy}"
            raise DiskError.of(error, text) from None
        self._thread = threading.Thread(target=self._beat_on, name="run-lock", daemon=True)
        self._thread.start()
        return self.attempt

    def _try_next(self) -> bool:
        files = attempt_files(self._run_dir)
        number = max(files, default=0) + 1
        if files:
            self._wait_until_gone(files[number - 1])
        self._began_at = time.time()
        record = {"incarnation": number, "released": False, "began_at": self._began_at}
        record["folder"] = asdict(place_of(self._run_dir))
        if not self._create(self._path(number), asdict(self._me) | record):
            return False  # another process was faster: look at the new owner
        self.attempt = number
        return True

    def _create(self, path: Path, record: dict[str, Any]) -> bool:
        """Write a new record; return False if another process has written it."""
        draft = path.with_name(f".{os.getpid()}-{threading.get_ident()}.json")
        write_json(draft, record)
        self._touch(draft)
        try:
            _claim(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _wait_until_gone(self, path: Path) -> None:
        """Wait until the owner described in `path` is gone; raise OccupiedError once it is known to be alive."""
        first_beat_s: float | None = None
        since_s = self._monotonic()
        while True:
            looked_s, attempt = self._monotonic(), read_attempt(path)
            certain = certainly(attempt.owner, self._me)
            owns = still_owns(
                attempt,
                certain,
                age_s=self._time() - attempt.beat_s if certain is None else 0.0,
                unchanged_s=looked_s - since_s,
                has_beaten=first_beat_s not in (None, attempt.beat_s),
            )
            if owns is False:
                return
            if owns:
                raise OccupiedError(
                    f"{self._run_dir} is being {self._doing} by {_process(attempt.owner)}; "
                    "stop that one first, or choose another name or dump_dir"
                )
            if first_beat_s is None:
                log.info("waiting to see whether %s, which owns this run, is alive", _process(attempt.owner))
            first_beat_s = attempt.beat_s
            self._sleep(5.0)

    def bind(self, folder: Path) -> None:
        """Bind a folder of checkpoints to this run. Raises RunError if it is another run's, OSError."""
        run = run_in(self._run_dir)
        while not bind(folder, run, self._create):
            pass
        self._bound = folder

    def check(self) -> None:
        """Raise OvertakenError if another attempt has the folder, RunError if another run has its checkpoints.

        Raises OSError if that cannot be read. Does not raise if the folder was moved away: nobody took it over.
        """
        raise_if(self._lost)
        record, path = None, self._path(self.attempt)
        with suppress(FileNotFoundError, RunError):  # damaged: nobody else writes such a record
            record = read_json(path)
        is_ours = None if record is None else self._is_ours(record)
        if why := why_overtaken(self._run_dir, self.attempt, self._newest(), is_ours):
            raise OvertakenError(why)
        bound = None
        with suppress(FileNotFoundError, RunError):
            bound = None if self._bound is None else bound_to(self._bound)
        if bound is not None and is_of_another(bound, run_in(self._run_dir), is_gone=False):
            whose = f"{self._bound} belongs to another run now, {bound.place.path}"
            raise RunError(f"{whose}; attempt {self.attempt} of {self._run_dir} stops")

    def look(self) -> None:
        """Raise the result of the last `check`, and wake the heartbeat's thread for a new one: the disk may hang."""
        raise_if(self._lost)
        self._wake.set()

    def holds(self) -> bool:
        """Return whether the folder is still ours: nobody has taken it over, and it was not moved away."""
        try:
            self.check()
        except RunError:
            return False
        return self._newest() == self.attempt

    def _is_ours(self, record: Any) -> bool:
        return isinstance(record, dict) and record.get("began_at") == self._began_at  # to the microsecond

    def _newest(self) -> int:
        return max(attempt_files(self._run_dir), default=0)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:010d}.json"

    def release(self, *, remove: bool = False) -> None:
        """Give up the folder; the number stays used. `remove`: remove the folder at once, if it is still ours."""
        if not self.attempt:
            return
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        path = self._path(self.attempt)
        try:
            if remove and self.holds():
                gone = self._run_dir.with_name(f".{self._run_dir.name}.refused-{os.getpid()}")
                DISK.rename(self._run_dir, gone)
                DISK.remove_tree(gone)
                return
            record = read_json(path)
            if self._is_ours(record):  # or it is the lock of another run
                write_json(path, record | {"released": True, "released_at": time.time()})
        except (OSError, RunError) as error:
            log.warning("cannot release the lock of %s: %s", self._run_dir, error)

    def release_and_remove(self) -> None:
        """Give up the folder, and remove it if it holds nothing else."""
        self.release()
        with suppress(OSError):  # a newcomer has locked it already
            for number, path in attempt_files(self._run_dir).items():
                if number <= self.attempt:
                    DISK.remove(path)
            DISK.rmdir(self._folder)
            DISK.rmdir(self._run_dir)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _beat_on(self) -> None:
        while True:
            self._wake.wait(BEAT_S)
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                self.beat()
            except Exception as error:  # a bug; without a heartbeat another process would take the folder over
                log.exception("the heartbeat in %s has a bug", self._run_dir)
                self._lost = RunError(f"the heartbeat in {self._run_dir} failed: {type(error).__name__}: {error}")
                self.on_lost(error)
                return

    def beat(self) -> None:
        """Check that the folder is ours, touch the file, and look for requests. A failing disk is only a warning."""
        try:
            try:
                self.check()
            except RunError as error:
                self._lost = error
                self.on_lost(error)
                return
            self._touch(self._path(self.attempt))
            if stop_request(self._run_dir, self.attempt).exists():
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
