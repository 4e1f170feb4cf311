"""The shared-memory area of a run on one node: slots for snapshots, and small records beside them. Torch-free.

The name of a slot's mark says who may touch the slot, and a mark changes by one rename. So if a rank wants to fill a
slot and the service wants to drain it, one of them wins and the other one notices. A slot without a mark is being
changed, and nobody may claim it. A slot is complete only when every rank of the node has reported so for the same save.
The names can be guessed on a shared machine, so a link or another user's folder is refused. All that a save writes is
allocated with the slots and overwritten in place, so a save still works after others have used up the memory file
system's bytes or inodes.

/dev/shm/lingua-<uid>/<run>-<hash of its path>/     an area: one run on one node; only its user may look inside
    trainer.lock       locked (shared) by every rank of the node
    service.lock       locked by the node's service
    session            the run as its newest attempt describes it to the service (`ServedRun`)
    events             what the service reports to the ranks (`Events`)
    address            where the service listens for readers on other nodes, if there are any
    slot-0/            model.00003.distcp ...   the final bytes of each file, allocated once
           ready.00003                          rank 3's part is complete: sizes and checksums of its files
    slot-0.staged      the mark; its content: one save (step, attempt, which ranks)
    copies/            slots with copies of another node's newest parts (`replica.py`)

    free -> staged       leader (lowest rank of the node): the slot is being filled, then complete
    staged -> draining   service
    draining -> free     service: published, or lost
    draining -> staged   service: the disk failed, try again later
    staged -> claimed    leader: to be filled with a newer save, if all nodes agree; back to staged if not
    claimed -> staged    leader: the mark names the new save first
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lingua.checkpoint import layout
from lingua.checkpoint.publish import DamagedError, FileFacts, Manifest
from lingua.checkpoint.shm.record import Record
from lingua.config.base import plain
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.files import DISK, Files, ProcessLock, RunError, entries

State = Literal["free", "staged", "draining", "claimed"]
STATES: tuple[State, ...] = ("draining", "staged", "claimed", "free")
SHM = Path("/dev/shm")
TRAINER_LOCK = "trainer.lock"
SERVICE_LOCK = "service.lock"

MARK_BYTES = 4096
"""Room for a mark or a rank's `ready` record: the ranks of one node, a few files."""
SESSION_BYTES = 32 << 10
"""Some paths, and steps of checkpoints."""
EVENTS_BYTES = 256 << 10
"""More than a thousand events."""

_SLOT = re.compile(r"slot-(\d{1,3})", re.ASCII)
_READY = re.compile(r"ready\.\d{5}", re.ASCII)


# -- slots ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Save:
    """The save whose snapshot a slot holds; the content of its mark."""

    run_id: str
    attempt: int
    step: int
    ranks: tuple[int, ...]
    """Ranks whose files lie in this node's slot."""
    node: int = 0
    n_nodes: int = 1
    number: int = 0
    """Number of earlier saves of its attempt: after a rewind a step is saved again."""

    @property
    def key(self) -> PartKey:
        """Identity of this node's part of this save."""
        return self.run_id, self.attempt, self.step, self.number, self.node


PartKey = tuple[str, int, int, int, int]


def _of(save: Save) -> dict[str, Any]:
    """Return the fields by which a `ready` record identifies its save."""
    return {"run_id": save.run_id, "incarnation": save.attempt, "step": save.step, "number": save.number}


@dataclass(frozen=True)
class Slot:
    """One slot of an area. All its state is in the memory file system."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name.removeprefix("slot-"))

    def mark(self, state: State) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{state}")

    def state(self) -> State | None:
        """Return the state, or None in the middle of a change."""
        return next((state for state in STATES if self.mark(state).exists()), None)

    def save(self, *, even_free: bool = False) -> Save | None:
        """Return the save in the mark; None if it is unreadable or, without `even_free`, if the slot is free."""
        state = self.state()
        if state is None or (state == "free" and not even_free):
            return None
        try:
            mark = self._record(state).read()
            ranks = tuple(mark["ranks"])
            attempt, number = mark["incarnation"], mark.get("number", 0)
            return Save(mark["run_id"], attempt, mark["step"], ranks, mark["node"], mark["n_nodes"], number)
        except (OSError, TypeError, KeyError):
            return None

    def _record(self, state: State) -> Record:
        return Record(self.mark(state), MARK_BYTES)

    def make(self, *, files: Files = DISK) -> None:
        """Make a free slot without files. Raises OSError."""
        self._record("free").reserve(files=files)  # first: a slot without a mark belongs to nobody
        files.mkdir(self.folder)

    def put_mark(self, save: Save, *, files: Files = DISK) -> None:
        """Mark a free or claimed slot as staged for `save`, then fill it. Raises OSError, and then the slot is free."""
        before: State = "claimed" if self.mark("claimed").exists() else "free"
        try:
            mark = asdict(save)
            mark["incarnation"] = mark.pop("attempt")  # its name in files: the mark may be an older version's
            self._record(before).write(mark, files=files)
            files.rename(self.mark(before), self.mark("staged"))
        except OSError:
            self.change("claimed", "free", files=files)
            raise

    def change(self, old: State, new: State, *, files: Files = DISK) -> bool:
        """Change the state; return False if another process was faster."""
        try:
            files.rename(self.mark(old), self.mark(new))
        except FileNotFoundError:
            return False
        return True

    def ready_file(self, rank: int) -> Path:
        return self.folder / f"ready.{rank:05d}"

    def ready(self, rank: int) -> Record:
        """Return the record in which a rank reports its files."""
        return Record(self.ready_file(rank), MARK_BYTES)

    def report_ready(self, rank: int, save: Save, facts: Manifest, *, files: Files = DISK) -> None:
        """Report that this rank's files of `save` are complete."""
        listed = {name: asdict(fact) for name, fact in facts.items()}
        self.ready(rank).write({**_of(save), "files": listed}, files=files)

    def report_unready(self, rank: int, *, files: Files = DISK) -> None:
        """Report that this rank is about to change its files."""
        self.ready(rank).write(None, files=files)

    def complete(self, *, even_free: bool = False) -> tuple[Save, Manifest] | None:
        """Return the save and the facts of all its files on this node, or None while a rank's part is missing.

        `even_free`: read free slots too; they hold their last save until they are allocated again or filled.
        """
        save = self.save(even_free=even_free)
        if save is None:
            return None
        facts: Manifest = {}
        for rank in save.ranks:
            try:
                ready: Any = self.ready(rank).read()
                if any({"number": 0, **ready}[name] != value for name, value in _of(save).items()):
                    return None
                facts |= {name: FileFacts(**fact) for name, fact in ready["files"].items()}
            except (OSError, TypeError, KeyError, AttributeError):
                return None
        return save, facts

    def clear_leftovers(self, keep: Collection[str], *, files: Files = DISK) -> None:
        """Remove files that no rank of this attempt writes. Call only for a free slot."""
        for path in entries(self.folder):
            if path.name not in keep and not _READY.fullmatch(path.name):
                files.remove(path)


class ShmArea:
    """One run's area in one node's memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def session(self) -> Record:
        return Record(self.folder / "session", SESSION_BYTES)

    @property
    def events(self) -> Record:
        return Record(self.folder / "events", EVENTS_BYTES)

    @property
    def address(self) -> Record:
        return Record(self.folder / "address", MARK_BYTES)

    def slot(self, number: int) -> Slot:
        return Slot(self.folder / f"slot-{number}")

    def slots(self) -> list[Slot]:
        named = [path for path in entries(self.folder) if _SLOT.fullmatch(path.name)]
        return [Slot(path) for path in named if path.is_dir() and not path.is_symlink()]

    @property
    def copies(self) -> ShmArea:
        """The slots for copies of another node's parts. They have no other records."""
        return ShmArea(self.folder / "copies")

    def find(self, key: PartKey) -> tuple[Slot, Manifest]:
        """Return the slot that holds a part, or a copy of it, and the facts of its files. Raises DamagedError."""
        for slot in (*self.slots(), *self.copies.slots()):
            found = slot.complete(even_free=slot.folder.parent == self.folder)
            if found and found[0].key == key:
                return slot, found[1]
        raise DamagedError(f"{self.folder} does not hold node {key[4]}'s part of step {key[2]}")

    def make_slots(self, n_slots: int, keep: Collection[str], *, files: Files = DISK) -> None:
        """Make `n_slots` slots; remove further free ones and, from free slots, files not in `keep`. For leaders.

        Raises OSError, or RunError for a slot that is a link.
        """
        for number in range(n_slots):
            slot = self.slot(number)
            if slot.folder.is_symlink():
                raise RunError(f"{slot.folder} is a link; remove it, or choose another place by checkpoint.shm_path")
            if not slot.folder.exists():
                slot.make(files=files)
        for slot in self.slots():
            if slot.state() == "free":
                slot.clear_leftovers(keep, files=files)
                if slot.number >= n_slots:
                    files.remove_tree(slot.folder)
                    files.remove(slot.mark("free"))

    def lock(self, name: str) -> ProcessLock:
        return ProcessLock(self.folder / name)

    def recover(self, *, files: Files = DISK) -> None:
        """Make slots that a dead process was changing staged again, or free. Call as the only owner."""
        for slot in self.slots():
            for state in ("draining", "claimed"):
                slot.change(state, "staged", files=files)
            if slot.state() is None:
                slot.make(files=files)

    def remove(self, *, files: Files = DISK) -> None:
        """Free all memory. Call as the holder of both locks; they are removed last, so that nobody enters early."""
        last = (TRAINER_LOCK, SERVICE_LOCK)
        for path in sorted(entries(self.folder), key=lambda path: last.index(path.name) if path.name in last else -1):
            if path.is_dir() and not path.is_symlink():
                files.remove_tree(path)
            else:
                files.remove(path)
        try:
            files.rmdir(self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # a rank has just entered
                raise


# -- areas of this machine ---------------------------------------------------------------------------------------


def base(shm: Path = SHM) -> Path:
    """Return the folder of this user's areas."""
    return shm / f"lingua-{os.getuid()}"


def area_of(run_dir: Path, shm: Path = SHM) -> ShmArea:
    """Return the area of a run; the same for every attempt, whatever the working directory."""
    path = os.path.realpath(run_dir)
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", os.path.basename(path))[:40]
    return ShmArea(base(shm) / f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}")


def make_area(run_dir: Path, shm: Path = SHM, *, files: Files = DISK) -> ShmArea:
    """Make the area of a run if there is none. Raises RunError if it is not ours, OSError if there is no room."""
    area = area_of(run_dir, shm)
    _make_private(base(shm), files)
    while True:
        with suppress(FileNotFoundError):  # a service that leaves has just removed it
            _make_private(area.folder, files)
            return area


def _make_private(folder: Path, files: Files) -> None:
    if not folder.is_symlink():
        before = os.umask(0o077)
        try:
            files.mkdir(folder)
        except FileExistsError:
            pass  # checked below
        finally:
            os.umask(before)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        what = f"of user {facts.st_uid}, mode {facts.st_mode & 0o777:o}"
        what = "a link" if stat.S_ISLNK(facts.st_mode) else what if stat.S_ISDIR(facts.st_mode) else "not a folder"
        raise RunError(
            f"{folder} is {what}; it must be a folder that is yours with mode 700. Remove it, or choose another place "
            "with checkpoint.shm_path"
        )


# -- messages between ranks and service ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ServedRun:
    """A run as its newest attempt describes it to the checkpoint services; the leader of each node writes it whole."""

    run_id: str
    run_dir: Path
    root: Path
    """Folder of its checkpoints."""
    attempt: int
    args: CheckpointArgs = field(default_factory=CheckpointArgs)
    job: tuple[str, int] = ("", 0)
    """Slurm job id and how often it was requeued."""
    verified: tuple[int, ...] = ()
    """Steps that the ranks have verified."""
    rescue: tuple[tuple[int, int], ...] = ()
    """(attempt, step) of saves by earlier attempts that must be saved."""
    ending: bool = False
    """The ranks only wait for their last save."""
    deadline_s: float | None = None
    """Seconds since the epoch at which the job ends, once it has been asked to stop."""
    listen: str = ""
    """Where this node's service listens for readers on other nodes. Empty: nowhere."""
    secret: str = field(default="", repr=False)
    """Known only to the ranks and services of this attempt."""
    copy_from: tuple[str, int] | None = None
    """Address of the service whose parts are copied to this node's memory, or None."""
    n_copies: int = 0
    """Copies that this node's memory holds at once."""

    def wants(self, save: Save) -> bool:
        own = save.run_id == self.run_id and save.attempt == self.attempt
        return own or (save.run_id == self.run_id and (save.attempt, save.step) in self.rescue)

    def gives_up(self, save: Save) -> bool:
        """Return whether a save is obsolete. A newer attempt's is not, even if we do not know of that attempt yet."""
        return not self.wants(save) and (save.run_id != self.run_id or save.attempt < self.attempt)

    @property
    def bytes_per_s(self) -> float | None:
        """Limit on writing in the background."""
        return self.args.bandwidth_gb_per_s * 1e9 if self.args.bandwidth_gb_per_s else None

    @property
    def staging_dir(self) -> Path:
        return layout.staging_dir(self.root, self.attempt)

    def folder(self, step: int) -> Path:
        """Return where the files of a step are written before it is published."""
        return layout.coming(layout.folder(self.root, step), self.attempt)

    def part_file(self, step: int, node: int) -> Path:
        return self.staging_dir / f"part-{layout.step_name(step)}-{node}.json"

    def writer_file(self, step: int, node: int) -> Path:
        return self.staging_dir / f"writer-{layout.step_name(step)}-{node}.json"


def read_run(area: ShmArea) -> ServedRun | None:
    """Read the newest attempt's record, or return None before the first. Raises RunError for another version's."""
    try:
        content: dict[str, Any] | None = area.session.read()
        if content is None:
            return None
        content |= {key: Path(content[key]) for key in ("run_dir", "root")}
        content |= {name: tuple(content[name]) for name in ("verified", "job", "copy_from") if content.get(name)}
        content["rescue"] = tuple((int(attempt), int(step)) for attempt, step in content["rescue"])
        return ServedRun(**{**content, "args": CheckpointArgs.model_validate(content["args"])})
    except FileNotFoundError:
        return None
    except (TypeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{area.session.path} is of another version of lingua ({reason}); remove it") from None


def served_by(area: ShmArea) -> tuple[str, int] | None:
    """Return (run id, attempt) of the run that an area serves; None before the first, or if it cannot be read."""
    try:
        content = area.session.read()
        return str(content["run_id"]), int(content["attempt"])
    except (OSError, TypeError, KeyError, ValueError):
        return None


def write_run(area: ShmArea, run: ServedRun, *, files: Files = DISK) -> None:
    """Replace the newest attempt's record. Raises OSError, and then it is unchanged."""
    paths = {"run_dir": str(run.run_dir), "root": str(run.root)}
    area.session.write({**vars(run), **paths, "args": plain(run.args.model_dump(mode="json"))}, files=files)


EventKind = Literal[
    "published", "lost", "failing", "silent", "recovered", "retired", "fenced", "failed", "copied", "uncopied"
]
"""failing: the disk refused, the step is tried again; silent: the disk does not answer; fenced: a newer attempt owns
the run; failed: a bug of ours; copied: this node has a copy of another node's part; uncopied: the copy failed."""


class Events:
    """Events that the service of an area reports to its ranks. The newest are kept, a thousand or more."""

    def __init__(self, area: ShmArea) -> None:
        """Read only events that are sent from now on."""
        self._record = area.events
        self._n_read = self._sent()[0]

    def send(self, event: dict[str, Any]) -> None:
        """Append an event; only the service may. Raises OSError, and then nothing is sent."""
        n_sent, newest = self._sent()
        newest.append(event)
        while len(newest) > 1 and not self._record.fits([n_sent + 1, newest]):
            del newest[: (len(newest) + 1) // 2]
        self._record.write([n_sent + 1, newest])

    def read(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        n_sent, newest = self._sent()
        n_new = max(0, n_sent - self._n_read)
        self._n_read += n_new
        return newest[-n_new:] if n_new else []

    def _sent(self) -> tuple[int, list[dict[str, Any]]]:
        """Return how many events there have been, and the newest of them."""
        try:
            n_sent, newest = self._record.read() or (0, [])
        except FileNotFoundError:
            return 0, []
        return n_sent, newest
