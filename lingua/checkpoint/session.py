"""What the ranks and the service of a node say to each other, in two files of their region. Torch-free.

Promise: `session.json` is whole, and the newest start's. What the service says in `events.jsonl` is there whole or not
at all, and nothing is missed by who reads every now and then.
Cost: one small file of a memory file system each.
"""

from __future__ import annotations

import errno
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson

from lingua.checkpoint.drain import Target
from lingua.checkpoint.slots import Region, Save
from lingua.files import DISK, Files, RunError, read_json, write_json

EVENTS_BYTES = 1 << 20

EventKind = Literal["published", "lost", "failing", "silent", "recovered", "retired", "fenced", "failed"]
"""failing: the disk refused, the step is tried again; silent: the disk does not answer; fenced: a newer start owns
the run; failed: a bug of ours."""


@dataclass(frozen=True)
class Session:
    """What the newest start of the run says to the service; rank 0 of the node writes it whole."""

    run_id: str
    run_dir: str
    root: str
    incarnation: int
    dump: tuple[int, int] = (0, 0)
    """Every, keep."""
    eval: tuple[int, int] = (0, 0)
    keep_every: int = 0
    verified: tuple[int, ...] = ()
    """Steps that the ranks have verified."""
    rescue: tuple[tuple[int, int], ...] = ()
    """(incarnation, step) of saves by earlier starts that are wanted."""
    direct_io: bool = True
    readback: bool = False
    threads: int = 4
    bandwidth_bytes_per_s: float | None = None
    node_timeout_s: float = 1800.0
    job: tuple[str, int] = ("", 0)
    """Slurm job id and how often it was requeued."""
    linger_s: float = 5.0
    patience_s: float = 3600.0
    """How long a disk that fails is tried after the last rank has gone."""
    ending: bool = False
    """The ranks have nothing left to do but to wait for their last save."""
    deadline_s: float | None = None
    """Seconds since the epoch at which the job ends, once it has been asked to stop."""

    def wants(self, save: Save) -> bool:
        own = save.run_id == self.run_id and save.incarnation == self.incarnation
        return own or (save.run_id == self.run_id and (save.incarnation, save.step) in self.rescue)

    def gives_up(self, save: Save) -> bool:
        """Whether a save is of no use any more; that of a start newer than this session, read a while ago, is."""
        return not self.wants(save) and (save.run_id != self.run_id or save.incarnation < self.incarnation)

    def target(self) -> Target:
        return Target(
            root=Path(self.root),
            incarnation=self.incarnation,
            direct_io=self.direct_io,
            readback=self.readback,
            threads=self.threads,
            node_timeout_s=self.node_timeout_s,
            job=self.job,
        )


def read_session(region: Region) -> Session | None:
    """The newest start's session; None before the first one. Raises RunError for one of another version."""
    try:
        content: dict[str, Any] = read_json(region.session_file)
        content |= {key: tuple(content[key]) for key in ("dump", "eval", "verified", "job")}
        content["rescue"] = tuple(tuple(pair) for pair in content["rescue"])
        return Session(**content)
    except FileNotFoundError:
        return None
    except (TypeError, KeyError) as error:
        raise RunError(f"{region.session_file} is of another version of lingua ({error}); remove it") from None


def write_session(region: Region, session: Session, *, files: Files = DISK) -> None:
    write_json(region.session_file, asdict(session), files=files)


class Events:
    """What the service of a region says to its ranks, a line of JSON each. After a megabyte the file begins anew."""

    def __init__(self, region: Region) -> None:
        """Reading begins with what is said from now on."""
        self.path = region.events_file
        self._before = self.path.with_name(f"{self.path.name}.before")
        self._inode, self._offset = _facts(self.path)

    def mend(self) -> None:
        """Cut off the half line of a service that was killed. Call as the only one who says something."""
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def say(self, event: dict[str, Any]) -> None:
        """Raises OSError when there is no room; then nothing is said."""
        line = orjson.dumps(event) + b"\n"
        if _facts(self.path)[1] > EVENTS_BYTES:
            os.replace(self.path, self._before)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size_bytes = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, size_bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """What was said since the last time."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            lines: list[bytes] = []
            inode = os.fstat(file.fileno()).st_ino  # of what is read, whatever the name means by now
            if inode != self._inode:
                if self._inode is not None and _facts(self._before)[0] == self._inode:
                    with self._before.open("rb") as before:
                        lines = self._rest_of(before)
                self._inode, self._offset = inode, 0
            lines += self._rest_of(file)
        return [orjson.loads(line) for line in lines]

    def _rest_of(self, file: BinaryIO) -> list[bytes]:
        file.seek(self._offset)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


def _facts(path: Path) -> tuple[int | None, int]:
    """(inode, bytes) of a file; (None, 0) of none."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None, 0
    return facts.st_ino, facts.st_size
