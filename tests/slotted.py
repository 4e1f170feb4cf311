"""A run at protocol level, without torch: ranks that stage bytes instead of tensors, and what must hold after a death.

`World` is one run folder and the memory of its nodes below one place. `Start` does to the slots what a start of the
run does by `coordinator.py` and `stage.py`, in the same order and through the same seam. Everything lies in /dev/shm: a
synced file costs 0.05 ms there.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from lingua.checkpoint import layout, publish
from lingua.checkpoint.publish import DamagedError, FileFacts, Manifest
from lingua.checkpoint.shm.area import (
    SHM,
    TRAINER_LOCK,
    Save,
    ServedRun,
    ShmArea,
    Slot,
    area_of,
    make_area,
    write_run,
)
from lingua.checkpoint.shm.service import Service
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.files import DISK, Files
from tests.fakes import Clock, FaultyFiles, path_of

RUN_ID = "the-run"
KILLED = 137


class Inline(Executor):
    """Runs what is submitted at once, on the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def events_in(area: ShmArea) -> list[dict[str, Any]]:
    """What the service of a area has said so far."""
    return (area.events.read() or [0, []])[1] if area.events.path.exists() else []


def names_of(rank: int) -> tuple[str, str, str]:
    return layout.model_file(rank), layout.optim_file(rank), layout.train_state_file(rank)


def content(step: int, name: str) -> bytes:
    return f"{name} of step {step} ".encode() * 400  # more than one page of memory


@dataclass(frozen=True)
class World:
    """A run folder and the memory of its nodes."""

    place: Path
    n_nodes: int = 1

    @property
    def run_dir(self) -> Path:
        return self.place / "run"

    @property
    def root(self) -> Path:
        return self.run_dir / layout.CHECKPOINTS

    def shm(self, node: int = 0) -> Path:
        return self.place / f"shm-{node}"

    def area(self, node: int = 0) -> ShmArea:
        return area_of(self.run_dir, self.shm(node))

    def served(self, attempt: int, **changes: Any) -> ServedRun:
        """The run of an attempt. `changes`: of its fields, or of its keys of `checkpoint:`."""
        keys: dict[str, Any] = {"dump": SaveEvery(every=1, keep=1), "eval": SaveEvery(every=0), "linger_s": 0.0}
        keys |= {"drain_threads": 1}  # so that the n-th operation is always the same one
        keys |= {name: changes.pop(name) for name in list(changes) if name in CheckpointArgs.model_fields}
        args = CheckpointArgs(**keys)
        return ServedRun(RUN_ID, self.run_dir, self.root, attempt, args, **changes)

    def make(self, *published: int) -> World:
        """The folders, and these steps published by start 1."""
        self.root.mkdir(parents=True)
        for node in range(self.n_nodes):
            self.shm(node).mkdir()
        publish.open_staging_dir(self.root, 1)
        for step in published:
            folder = layout.coming(layout.folder(self.root, step), 1)
            folder.mkdir()
            facts = {name: publish.write_hashed(folder / name, [content(step, name)]) for name in names_of(0)}
            publish.publish(self.root, step, 1, facts)
        return self

    def done(self) -> list[int]:
        return layout.done_steps(self.root)

    def intact(self, step: int) -> bool:
        try:
            facts = publish.read_marked_manifest(self.root, step)
        except DamagedError:
            return False
        folder = layout.folder(self.root, step)
        return not publish.damage(folder, facts, threads=1) and {path.name for path in folder.iterdir()} == {
            *facts,
            layout.MANIFEST,
        }

    def staged(self) -> dict[int, int]:
        """Step -> slot of what is complete in the memory of node 0."""
        found = [(slot, slot.complete()) for slot in self.area().slots()]
        return {complete[0].step: slot.number for slot, complete in found if complete}

    def service(self, node: int = 0, **arguments: Any) -> Service:
        """One whose time passes by sleeping and whose threads are the caller's, unless told otherwise."""
        clock = arguments.pop("clock", None) or Clock()
        given = {"executor": Inline(), "now": clock.now, "wall_clock": clock.now, "sleep": clock.sleep}
        return Service(make_area(self.run_dir, self.shm(node)), **(given | arguments))

    def events(self, node: int = 0) -> list[dict[str, Any]]:
        return events_in(self.area(node))

    def kinds(self, node: int = 0) -> list[str]:
        return [event["kind"] for event in self.events(node)]


@dataclass(frozen=True)
class Start:
    """One start of a run, as the ranks of one node do it: `Coordinator` and `SlotWriter`, with bytes for tensors."""

    world: World
    attempt: int
    files: Files = DISK
    node: int = 0
    ranks: tuple[int, ...] = (0,)
    n_slots: int = 2

    @property
    def area(self) -> ShmArea:
        return self.world.area(self.node)

    def begin(self, *, service_lives: bool = False, **changes: Any) -> None:
        """Join, look for unsaved snapshots, shut older starts out, tell the service."""
        area = make_area(self.world.run_dir, self.world.shm(self.node), files=self.files)
        if not service_lives:
            area.recover(files=self.files)
        found = {slot.number: complete[0] for slot in area.slots() if (complete := slot.complete())}
        newest = max(self.world.done(), default=-1)
        wanted = {n: save for n, save in found.items() if save.run_id == RUN_ID and save.step > newest}
        for slot in area.slots():
            if slot.number not in wanted:
                slot.change("staged", "free", files=self.files)
        rescue = tuple(sorted((save.attempt, save.step) for save in wanted.values()))
        told = self.world.served(self.attempt, rescue=rescue, **changes)
        if self.node == 0:
            publish.open_staging_dir(self.world.root, self.attempt, files=self.files)
        write_run(area, told, files=self.files)

    def make_slots(self) -> None:
        """What `Coordinator.make_slots` does; and the space for the files."""
        keep = {name for rank in self.ranks for name in names_of(rank)}
        self.area.make_slots(self.n_slots, keep, files=self.files)

    def save_of(self, step: int) -> Save:
        return Save(RUN_ID, self.attempt, step, self.ranks, self.node, self.world.n_nodes)

    def take_slot(self, step: int) -> Slot | None:
        """A free slot, else the newest that waits; marked."""
        slots = [self.area.slot(number) for number in range(self.n_slots)]
        slot = next((slot for slot in slots if slot.state() == "free"), None)
        if slot is None:
            waiting = [slot for slot in slots if slot.state() == "staged"]
            slot = max(waiting, key=lambda slot: save.step if (save := slot.save()) else -1, default=None)
            if slot is None or not slot.change("staged", "claimed", files=self.files):
                return None
        slot.put_mark(self.save_of(step), files=self.files)
        return slot

    def fill(self, slot: Slot, step: int) -> None:
        """Every rank's files, overwritten where they lie; then `ready`."""
        for rank in self.ranks:
            slot.report_unready(rank, files=self.files)
            facts: Manifest = {}
            for name in names_of(rank):
                data = content(step, name)
                descriptor = os.open(slot.folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
                self.files.write(descriptor, data)
                os.ftruncate(descriptor, len(data))
                os.close(descriptor)
                facts[name] = FileFacts(len(data), xxhash.xxh3_128_hexdigest(data))
            slot.report_ready(rank, self.save_of(step), facts, files=self.files)

    def stage(self, step: int) -> Slot | None:
        slot = self.take_slot(step)
        if slot is not None:
            self.fill(slot, step)
        return slot


# -- processes -----------------------------------------------------------------------------------------------------


def killed(act: Callable[[], Any]) -> bool:
    """Run `act` in a process of its own, which may die at once; whether it did. An exception in it is ours too."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException as error:
            os.write(writer, repr(error).encode()[:60_000])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        problem = said.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), f"the process did not die where it should, but of {problem or code}"
    return code == KILLED


@contextmanager
def a_rank_lives(area: ShmArea) -> Iterator[None]:
    """Another process that holds the ranks' lock."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, b"1" if area.lock(TRAINER_LOCK).take(shared=True) else b"0")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 1) == b"1"
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


@contextmanager
def fast_place() -> Iterator[Path]:
    """A folder where fsync costs nothing."""
    with tempfile.TemporaryDirectory(dir=SHM if os.access(SHM, os.W_OK) else None) as folder:
        yield Path(folder)


class Template:
    """A world that is made once and put back, at the same place, for every case: areas are named after it."""

    def __init__(self, place: Path, make: Callable[[World], None], *published: int) -> None:
        self.world = World(place / "world")
        self._copy = place / "template"
        self.world.make(*published)
        make(self.world)
        shutil.copytree(self.world.place, self._copy, symlinks=True)

    def fresh(self) -> World:
        shutil.rmtree(self.world.place)
        shutil.copytree(self._copy, self.world.place, symlinks=True)
        return self.world


def serve(service: Service) -> None:
    """Until the service has nothing left to do, ranks being alive."""
    assert service.take()
    for _ in range(50):
        service.tick()
        if not any(slot.complete() for slot in service.area.slots()):
            break
    service.tick()


class DiskFiles(FaultyFiles):
    """Only what happens below `root` counts and fails; `heal` ends a lasting failure."""

    def __init__(self, root: Path, fail_at: int = 0, **how: Any) -> None:
        self._root = root
        super().__init__(fail_at, **how)

    def heal(self) -> None:
        self.fail_at = 0

    def _operate(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        inside = path_of(args[0]).is_relative_to(self._root)
        return super()._operate(name, operation, *args) if inside else operation(*args)


def steps_in(names: Sequence[str]) -> list[int]:
    return sorted(step for name in names if (step := layout.parse_folder(name)) is not None)
