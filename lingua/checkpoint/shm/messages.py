"""What the ranks and the service of a node say to each other, in two records of their region. Torch-free.

Promise: the session is whole, and the newest start's. What the service says in `events` is there whole or not at all,
and nothing is missed by who reads every now and then. Neither needs room once the ranks have begun.
Cost: one small file of a memory file system each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lingua.checkpoint.shm.drain import Target
from lingua.checkpoint.shm.slots import Region, Save
from lingua.files import DISK, Files, RunError

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
        content: dict[str, Any] | None = region.session.read()
        if content is None:
            return None
        content |= {key: tuple(content[key]) for key in ("dump", "eval", "verified", "job")}
        content["rescue"] = tuple(tuple(pair) for pair in content["rescue"])
        return Session(**content)
    except FileNotFoundError:
        return None
    except (TypeError, KeyError) as error:
        raise RunError(f"{region.session.path} is of another version of lingua ({error}); remove it") from None


def write_session(region: Region, session: Session, *, files: Files = DISK) -> None:
    region.session.write(asdict(session), files=files)


class Events:
    """What the service of a region says to its ranks. The newest are kept, a thousand or more."""

    def __init__(self, region: Region) -> None:
        """Reading begins with what is said from now on."""
        self._record = region.events
        self._n_read = self._said()[0]

    def say(self, event: dict[str, Any]) -> None:
        """Call as the only one who says something. Raises OSError; then nothing is said."""
        n_said, newest = self._said()
        newest.append(event)
        while len(newest) > 1 and not self._record.fits([n_said + 1, newest]):
            del newest[: (len(newest) + 1) // 2]
        self._record.write([n_said + 1, newest])

    def read(self) -> list[dict[str, Any]]:
        """What was said since the last time."""
        n_said, newest = self._said()
        n_new = max(0, n_said - self._n_read)
        self._n_read += n_new
        return newest[-n_new:] if n_new else []

    def _said(self) -> tuple[int, list[dict[str, Any]]]:
        """How many events there have been, and the newest of them."""
        try:
            n_said, newest = self._record.read() or (0, [])
        except FileNotFoundError:
            return 0, []
        return n_said, newest
