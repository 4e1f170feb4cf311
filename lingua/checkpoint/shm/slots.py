"""Regions and slots: where a node keeps snapshots in memory until they are on the disk. Torch-free.

Promise: who may touch a slot is told by the name of its mark, and a mark changes by one rename, so that of a rank that
wants to fill a slot and a service that wants to drain it one wins and the other knows. A slot without any mark is in
the middle of a change and belongs to nobody who asks. A slot counts as complete only when every rank of the node has
said so for the same save. Names are predictable on a machine that others share: a link
or a folder of another user is refused. All that a save writes is allocated when the slots are made and overwritten in
place (`records.py`): others who fill the memory file system later, its bytes or its names, keep no save from it.
Cost: listings of a memory file system, microseconds.

/dev/shm/lingua-<uid>/<run>-<hash of its path>/     a region: one run on one node; only its user may look inside
    trainer.lock       locked (shared) by every rank of the node
    service.lock       locked by the node's service
    session            what the newest start says to the service
    events             what the service says to the ranks
    slot-0/            model.00003.distcp ...   the final bytes of each file, allocated once
           ready.00003                          rank 3's part is complete: size and checksum of its files
    slot-0.staged      the mark; its content: one save (step, incarnation, which ranks)

    free -> staged       leader (lowest rank of the node): the slot is being filled, then complete
    staged -> draining   service
    draining -> free     service: published, or lost
    draining -> staged   service: the disk failed, try again later
    staged -> claimed    leader: to be filled with a newer save, if all nodes agree; back to staged if not
    claimed -> staged    leader: the mark says the new save first
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lingua.checkpoint.publish import FileFacts, Manifest
from lingua.checkpoint.shm.records import Record
from lingua.files import DISK, Files, ProcessLock, RunError, entries

State = Literal["free", "staged", "draining", "claimed"]
STATES: tuple[State, ...] = ("draining", "staged", "claimed", "free")
SHM = Path("/dev/shm")
TRAINER_LOCK = "trainer.lock"
SERVICE_LOCK = "service.lock"

MARK_BYTES = 4096
"""Room for what a mark, or a rank's `ready`, says: ranks of one node, a few files."""
SESSION_BYTES = 32 << 10
"""Two paths, and steps of checkpoints."""
EVENTS_BYTES = 256 << 10
"""More than a thousand events."""

_SLOT = re.compile(r"slot-(\d{1,3})", re.ASCII)
_READY = re.compile(r"ready\.\d{5}", re.ASCII)


@dataclass(frozen=True)
class Save:
    """Whose snapshot a slot holds; the content of its mark."""

    run_id: str
    incarnation: int
    step: int
    ranks: tuple[int, ...]
    """Ranks whose files lie in this node's slot."""
    node: int = 0
    n_nodes: int = 1


@dataclass(frozen=True)
class Slot:
    """One slot of a region; all that is known of it lies on the file system."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name.removeprefix("slot-"))

    def mark(self, state: State) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{state}")

    def state(self) -> State | None:
        """None: in the middle of a change, or never used."""
        return next((state for state in STATES if self.mark(state).exists()), None)

    def save(self) -> Save | None:
        """What the mark says. None: the slot holds nothing, or the mark says nothing that we understand."""
        state = self.state()
        if state in (None, "free"):
            return None
        try:
            content = self._said_by(state).read()
            return Save(**(content | {"ranks": tuple(content["ranks"])}))
        except (OSError, TypeError, KeyError):
            return None

    def _said_by(self, state: State) -> Record:
        return Record(self.mark(state), MARK_BYTES)

    def make(self, *, files: Files = DISK) -> None:
        """A free slot without files. Raises OSError."""
        self._said_by("free").reserve(files=files)  # first: a slot without a mark belongs to nobody
        files.mkdir(self.folder)

    def put_mark(self, save: Save, *, files: Files = DISK) -> None:
        """A slot that is free or claimed is about to be filled with `save`. Raises OSError; the slot is free then."""
        before: State = "claimed" if self.mark("claimed").exists() else "free"
        try:
            self._said_by(before).write(asdict(save), files=files)
            files.rename(self.mark(before), self.mark("staged"))
        except OSError:
            self.change("claimed", "free", files=files)
            raise

    def change(self, old: State, new: State, *, files: Files = DISK) -> bool:
        """Whether it was us who changed the state; False: somebody else was faster."""
        try:
            files.rename(self.mark(old), self.mark(new))
        except FileNotFoundError:
            return False
        return True

    def ready_file(self, rank: int) -> Path:
        return self.folder / f"ready.{rank:05d}"

    def ready(self, rank: int) -> Record:
        """What rank `rank` says of its files."""
        return Record(self.ready_file(rank), MARK_BYTES)

    def say_ready(self, rank: int, save: Save, facts: Manifest, *, files: Files = DISK) -> None:
        """Rank `rank`'s files of `save` are complete."""
        listed = {name: asdict(fact) for name, fact in facts.items()}
        ready = {"run_id": save.run_id, "incarnation": save.incarnation, "step": save.step, "files": listed}
        self.ready(rank).write(ready, files=files)

    def say_unready(self, rank: int, *, files: Files = DISK) -> None:
        """Rank `rank` is about to change its files."""
        self.ready(rank).write(None, files=files)

    def complete(self) -> tuple[Save, Manifest] | None:
        """The save and the facts of all its files on this node; None while a rank's part is missing."""
        save = self.save()
        if save is None:
            return None
        facts: Manifest = {}
        for rank in save.ranks:
            try:
                ready: Any = self.ready(rank).read()
                if (ready["run_id"], ready["incarnation"], ready["step"]) != (save.run_id, save.incarnation, save.step):
                    return None
                facts |= {name: FileFacts(**fact) for name, fact in ready["files"].items()}
            except (OSError, TypeError, KeyError, AttributeError):
                return None
        return save, facts

    def clear_leftovers(self, keep: Collection[str], *, files: Files = DISK) -> None:
        """Remove files that no rank of the present start writes; only of a free slot."""
        for path in entries(self.folder):
            if path.name not in keep and not _READY.fullmatch(path.name):
                files.remove(path)


class Region:
    """One run's place in one node's memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def session(self) -> Record:
        return Record(self.folder / "session", SESSION_BYTES)

    @property
    def events(self) -> Record:
        return Record(self.folder / "events", EVENTS_BYTES)

    def slot(self, number: int) -> Slot:
        return Slot(self.folder / f"slot-{number}")

    def slots(self) -> list[Slot]:
        return [Slot(path) for path in entries(self.folder) if _SLOT.fullmatch(path.name) and path.is_dir()]

    def make_slots(self, n_slots: int, keep: Collection[str], *, files: Files = DISK) -> None:
        """Make the folders of `n_slots` slots; clear what else than `keep` lies in free ones, and what is of no use.

        Call as the leader.
        """
        for number in range(n_slots):
            slot = self.slot(number)
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
        """After a death: what was in the middle of a change is staged again, or free. Call as the only owner."""
        for slot in self.slots():
            for state in ("draining", "claimed"):
                slot.change(state, "staged", files=files)
            if slot.state() is None:
                slot.make(files=files)

    def remove(self, *, files: Files = DISK) -> None:
        """Give all memory back; call as the holder of both locks, which go last: nobody comes in before."""
        last = (TRAINER_LOCK, SERVICE_LOCK)
        for path in sorted(entries(self.folder), key=lambda path: last.index(path.name) if path.name in last else -1):
            if path.is_dir() and not path.is_symlink():
                files.remove_tree(path)
            else:
                files.remove(path)
        try:
            files.rmdir(self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # a rank has just come in
                raise


# -- regions on this machine ---------------------------------------------------------------------------------------


def base(shm: Path = SHM) -> Path:
    """The folder of this user's regions."""
    return shm / f"lingua-{os.getuid()}"


def region_of(run_dir: Path, shm: Path = SHM) -> Region:
    """The region of a run; the same on every start, whatever the working directory."""
    path = os.path.realpath(run_dir)
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", os.path.basename(path))[:40]
    return Region(base(shm) / f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}")


def make_region(run_dir: Path, shm: Path = SHM, *, files: Files = DISK) -> Region:
    """The region of a run, made if need be. Raises RunError when it is not ours, OSError when there is no room."""
    region = region_of(run_dir, shm)
    _make_private(base(shm), files)
    while True:
        with suppress(FileNotFoundError):  # a service that leaves has just removed it
            _make_private(region.folder, files)
            return region


def _make_private(folder: Path, files: Files) -> None:
    if not folder.is_symlink():
        before = os.umask(0o077)
        try:
            files.mkdir(folder)
        except FileExistsError:
            pass  # no folder: told below
        finally:
            os.umask(before)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        what = f"of user {facts.st_uid}, mode {facts.st_mode & 0o777:o}"
        what = "a link" if stat.S_ISLNK(facts.st_mode) else what if stat.S_ISDIR(facts.st_mode) else "no folder"
        raise RunError(
            f"{folder} is {what}; it must be a folder that is yours with mode 700. Remove it, or choose another place "
            "with checkpoint.shm_path"
        )


@dataclass(frozen=True)
class StaleRegion:
    """A region that nobody works in any more."""

    region: Region
    run_dir: str
    size_bytes: int
    """Memory that removing it gives back."""
    unsaved_steps: list[int]
    """Complete snapshots in it; the run's next start on this machine would still save them."""


def stale_regions(shm: Path = SHM) -> Iterator[StaleRegion]:
    """Regions of this user without a living rank or service."""
    for folder in entries(base(shm)):
        region = Region(folder)
        if folder.is_symlink() or not folder.is_dir() or _is_held(region):
            continue
        try:
            run_dir = str(region.session.read()["run_dir"])
        except (OSError, TypeError, KeyError):
            run_dir = "unknown"
        size_bytes = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
        complete = [found[0].step for slot in region.slots() if (found := slot.complete())]
        yield StaleRegion(region, run_dir, size_bytes, sorted(complete))


def _is_held(region: Region) -> bool:
    for name in (TRAINER_LOCK, SERVICE_LOCK):
        if (region.folder / name).exists():
            lock = region.lock(name)
            try:
                if lock.holder() is not None:
                    return True
            finally:
                lock.close()
    return False
