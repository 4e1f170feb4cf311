"""Copies of other nodes' parts: whole or not there, whoever dies; and a start that goes on without a node."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lingua.checkpoint import capacity
from lingua.checkpoint.publish import DamagedError, FileFacts
from lingua.checkpoint.shm import replica
from lingua.checkpoint.shm.area import ServedRun, area_of, make_area
from lingua.checkpoint.shm.decisions import Newest, unsaved
from lingua.checkpoint.shm.found import keep, release, survey
from lingua.checkpoint.shm.part_server import PartServer, keep_serving
from lingua.checkpoint.shm.replica import Copier
from lingua.files import DISK, Files
from tests.fakes import At, Clock, FaultyFiles, FrozenFiles, KillFiles
from tests.lingua.checkpoint.shm.test_resume_from_memory import DyingFiles, blocked, done, manager_of
from tests.lingua.checkpoint.shm.test_resume_on_nodes import load, memory
from tests.ranks import run_on_ranks
from tests.services import Services
from tests.slotted import RUN_ID, Start, World, content, killed, names_of
from tests.tiny import assert_equal, make, snapshot, train

SECRET = "of this attempt"


class Pair:
    """Node 0 of two with its service's door open, and the copier of node 1; without ranks."""

    def __init__(self, shm: Path, n_copies: int = 2) -> None:
        self.world = World(shm / "world", 2).make()
        told: dict[str, Any] = {"listen": "127.0.0.1", "secret": SECRET}
        self.source = Start(self.world, 1)
        self.source.begin(**told)
        self.source.make_slots()
        self.area = make_area(self.world.run_dir, self.world.shm(1))
        server = keep_serving(None, self.source.area, self.world.served(1, **told))
        assert isinstance(server, PartServer)
        said: Any = self.source.area.address.read()
        where = (said["host"], said["port"])
        self.run: ServedRun = self.world.served(1, secret=SECRET, copy_from=where, n_copies=n_copies)
        self.reports: list[str] = []

    def copier(self, files: Files = DISK, **more: Any) -> Copier:
        return Copier(self.area, lambda kind, attempt, **facts: self.reports.append(kind), files=files, **more)

    def stage(self, number: int) -> None:
        """The next save of node 0: step `number`; an older one has left its slot."""
        for slot in self.source.area.slots():
            if (save := slot.save()) and save.step < number - 1:
                slot.change("staged", "free")
        slot = self.source.take_slot(number)
        assert slot is not None
        slot.change("staged", "free")
        save = replace(self.source.save_of(number), number=number)
        slot.put_mark(save)
        facts = {}
        for name in names_of(0):
            (slot.folder / name).write_bytes(content(number, name))
            facts[name] = FileFacts.of(memoryview(content(number, name)))
        slot.report_unready(0)
        slot.report_ready(0, save, facts)

    def copies(self) -> list[int]:
        """Steps whose copies are said to be whole; they are."""
        found = [(slot, *complete) for slot in self.area.copies.slots() if (complete := slot.complete())]
        for slot, save, facts in found:
            for name, fact in facts.items():
                there = (slot.folder / name).read_bytes()[: fact.size_bytes]
                assert there == content(save.step, name), "a copy that is not whole is said to be"
        return sorted(save.step for _, save, _ in found)


def test_the_newest_parts_are_copied_and_the_oldest_copy_goes(shm: Path):
    pair = Pair(shm)
    copier = pair.copier()
    copier.copy_newest(pair.run)
    assert (pair.copies(), pair.reports) == ([], [])
    for step, expected in ((1, [1]), (2, [1, 2]), (3, [2, 3]), (4, [3, 4])):
        pair.stage(step)
        for _ in range(2):  # the second time there is nothing to do
            copier.copy_newest(pair.run)
        assert pair.copies() == expected
    assert pair.reports == ["copied"] * 4
    assert [path.stat().st_mode & 0o777 for path in pair.area.copies.folder.glob("*/*.distcp")] == [0o600] * 4


def test_what_was_published_meanwhile_is_copied_too(shm: Path):
    pair = Pair(shm)
    pair.stage(1)
    assert pair.source.area.slot(0).change("staged", "free")
    pair.copier().copy_newest(pair.run)
    assert pair.copies() == [1]


def test_what_is_changed_on_the_way_is_no_copy(shm: Path):
    pair = Pair(shm)
    pair.stage(1)
    copier = pair.copier()
    copier.copy_newest(pair.run)
    pair.stage(2)
    path = pair.source.area.slot(1).folder / names_of(0)[1]
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(DamagedError, match="was changed while it was copied"):
        copier.copy_newest(pair.run)
    assert (pair.copies(), pair.reports) == ([1], ["copied"])


def test_the_rate_is_limited(shm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replica, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(replica, "BYTES_PER_S", 1000.0)
    pair, clock = Pair(shm), Clock(0.0)
    pair.stage(1)
    pair.copier(now=clock.now, sleep=clock.sleep).copy_newest(pair.run)
    n_bytes = sum(len(content(1, name)) for name in names_of(0))
    assert clock.now() == pytest.approx(n_bytes / 1000, rel=0.1)
    assert pair.copies() == [1]


def test_no_room_costs_the_copy(shm: Path):
    pair = Pair(shm)
    pair.stage(1)
    with pytest.raises(OSError, match="No space left"):
        pair.copier(FaultyFiles(1, lasting=True, operations=("reserve",))).copy_newest(pair.run)
    assert pair.copies() == []
    pair.copier().copy_newest(pair.run)
    assert pair.copies() == [1]


def test_a_neighbour_that_is_dead_is_reported_once_and_asked_again(shm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replica, "LOOK_S", 0.001)
    pair = Pair(shm)
    pair.stage(1)
    run, asked, answers = pair.run, threading.Event(), itertools.count()

    def refuse_thrice(address: tuple[str, int], secret: str) -> Any:
        if next(answers) < 3:
            raise ConnectionRefusedError
        asked.set()
        return opened(address, secret)

    opened = replica.PartReader
    monkeypatch.setattr(replica, "PartReader", refuse_thrice)
    copier = pair.copier()
    copier.follow(run)
    assert asked.wait(300)
    while pair.reports[-1] != "copied":
        time.sleep(0.001)
    copier.stop()
    assert pair.reports == ["uncopied", "copied"]


def test_a_copier_that_is_stopped_or_has_another_run_ends_at_once(shm: Path):
    pair = Pair(shm)
    pair.stage(1)
    copier = pair.copier()
    copier.follow(replace(pair.run, attempt=2, copy_from=None))
    with pytest.raises(DamagedError, match="not wanted any more"):
        copier.copy_newest(pair.run)
    copier.stop()
    copier = pair.copier()
    copier.stop()
    with pytest.raises(DamagedError, match="not wanted any more"):
        copier.copy_newest(pair.run)
    assert (pair.copies(), pair.reports) == ([], [])


def test_a_service_killed_at_any_operation_leaves_whole_copies_or_none(shm: Path):
    """One copy is whole at any time, and the next service goes on."""
    at, died = 0, True
    while died:
        at += 1
        pair = Pair(shm / str(at))
        for step in (1, 2):
            pair.stage(step)
            pair.copier().copy_newest(pair.run)
        pair.stage(3)
        died = killed(lambda at=at, pair=pair: pair.copier(KillFiles(at)).copy_newest(pair.run))
        assert 2 in pair.copies()
        pair.copier().copy_newest(pair.run)
        assert pair.copies() == [2, 3]
        shutil.rmtree(shm / str(at))
    assert at > 10


# -- a start -------------------------------------------------------------------------------------------------------


def look(pair: Pair, files: Files = DISK) -> tuple[list[int], list[int]]:
    """What the leader of node 1 takes over of node 0's step 1: steps of the copies, and of its own slots."""
    found = survey(pair.area, files=files)
    points = unsaved([found], RUN_ID, Newest())
    keep(pair.area, [part for point in points for _, part in point.parts], files=files)
    own = [complete[0] for slot in pair.area.slots() if (complete := slot.complete())]
    return pair.copies(), sorted(save.node for save in own)


def with_own_part(pair: Pair) -> None:
    """Node 1's part of step 1, and a copy of node 0's."""
    own = Start(pair.world, 1, node=1, ranks=(1,))
    own.make_slots()
    slot = own.area.slot(0)
    slot.put_mark(replace(own.save_of(1), number=1))
    slot.report_ready(1, replace(own.save_of(1), number=1), {})
    pair.stage(1)
    pair.copier().copy_newest(pair.run)


def test_a_copy_that_is_needed_becomes_a_slot(shm: Path):
    pair = Pair(shm)
    with_own_part(pair)
    assert look(pair) == ([], [0, 1])
    assert look(pair) == ([], [0, 1])
    assert not list(pair.area.copies.folder.glob("slot-0*"))


def test_a_start_killed_at_any_operation_loses_no_copy(shm: Path):
    at, died = 0, True
    while died:
        at += 1
        pair = Pair(shm / str(at))
        with_own_part(pair)
        died = killed(lambda at=at, pair=pair: look(pair, KillFiles(at)) and None)
        assert look(pair) == ([], [0, 1])
        shutil.rmtree(shm / str(at))
    assert at > 3


def test_while_a_start_looks_no_copy_is_overwritten(shm: Path):
    pair = Pair(shm, n_copies=1)
    pair.stage(1)
    copier = pair.copier()
    copier.copy_newest(pair.run)
    assert [part.place for part in survey(pair.area)] == ["copy"]
    pair.stage(2)
    copier.copy_newest(pair.run)
    assert pair.copies() == [1]
    release(pair.area, 1)
    copier.copy_newest(pair.run)
    assert pair.copies() == [2]
    release(pair.area, 0)
    assert list(pair.area.copies.folder.iterdir()) == []


@pytest.mark.parametrize("n_copies", [2, 1, 0])
def test_a_copier_that_was_stopped_while_a_start_took_over_harms_nothing(shm: Path, n_copies: int):
    """The start takes what it needs and keeps memory for so many copies."""
    at, woke = 0, True
    while woke:
        at += 1
        pair, taken = Pair(shm / str(at)), list[list[int]]()
        with_own_part(pair)
        pair.stage(2)

        def start(pair: Pair = pair, taken: list[list[int]] = taken) -> None:
            taken.append(look(pair)[1])
            release(pair.area, n_copies)

        with suppress(OSError, DamagedError):  # its slot may be gone
            pair.copier(FrozenFiles(at, start)).copy_newest(pair.run)
        woke = bool(taken)
        assert set(pair.copies()) <= ({2} if woke else {1, 2})
        for save, facts in [complete for slot in pair.area.slots() if (complete := slot.complete())]:
            for name, fact in facts.items():
                there = (pair.area.find(save.key)[0].folder / name).read_bytes()[: fact.size_bytes]
                assert there == content(1, name)
        if woke:
            assert taken == [[0, 1]]
            release(pair.area, n_copies)
            pair.copier().copy_newest(replace(pair.run, n_copies=2))
            assert pair.copies() == [2]
        shutil.rmtree(shm / str(at))
    assert at > 10


@pytest.mark.parametrize(
    ("free", "slots", "n_nodes", "why"),
    [
        ((100, 100), (10, 10), 2, None),
        ((40, 40), (10, 10), 2, None),
        ((39, 100), (10, 10), 2, "with as many copies, 2 slots take 2 x 20 B .* has 256.0 MiB free"),
        ((100, 100), (10, 10), 1, "this run has one node"),
    ],
)
def test_where_memory_suffices_for_copies(free: tuple[int, int], slots: tuple[int, int], n_nodes: int, why: str | None):
    reserve = capacity.RESERVE_BYTES
    rooms = [
        capacity.MemoryRoom(reserve + n_free, None, 0, slot, slots[n - 1])
        for n, (n_free, slot) in enumerate(zip(free, slots, strict=True))
    ]
    found = capacity.why_no_copies(rooms, 2, n_nodes)
    assert found is None if why is None else found is not None and re.match(why, found)


# -- with ranks ----------------------------------------------------------------------------------------------------


def train_until_copied(run_dir: Path, shm: Path, n_nodes: int, steps: Sequence[int] = (1,)) -> dict[str, Tensor]:
    """A rank per node; each step is in memory with its copies, none on the disk; then all is dead."""

    def save(rank: int) -> dict[str, Tensor]:
        state = make(shard=True)
        manager = manager_of(run_dir, memory(shm, rank), services, replicate=1)
        manager.prepare(state)
        for step in steps:
            train(state, step, step)
            assert manager.save(step, state).staged
            wait_until(lambda step=step: step in copied(run_dir, memory(shm, rank)))
        manager.close()
        return snapshot(state)

    with blocked() as services:
        return run_on_ranks(save, n_nodes)[0]


def copied(run_dir: Path, shm: Path) -> list[int]:
    found = (slot.complete() for slot in area_of(run_dir, shm).copies.slots())
    return [complete[0].step for complete in found if complete]


def wait_until(happens: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 300.0
    while not happens():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("n_nodes", "lost", "nodes"),
    [
        (2, 1, (0,)),  # the other one goes on alone
        *(
            pytest.param(*of, marks=pytest.mark.soak)
            for of in (
                (2, 0, (1,)),
                (2, 0, (1, 7)),  # with a new node
                (2, 1, (7, 0)),
                (3, 0, (1, 2)),
                (3, 1, (0, 2)),
                (3, 1, (0, 7, 2)),
                (3, 2, (7, 1, 0)),
            )
        ),
    ],
)
def test_the_end_of_a_node_loses_nothing(tmp_path: Path, shm: Path, n_nodes: int, lost: int, nodes: tuple[int, ...]):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    expected = train_until_copied(run_dir, shm, n_nodes)
    shutil.rmtree(memory(shm, lost))

    def resume(rank: int) -> dict[str, Tensor]:
        where = memory(shm, nodes[rank])
        manager, state = manager_of(run_dir, where, services, replicate=1), make(shard=len(nodes) > 1)
        assert manager.resume(state) == 1
        assert done(run_dir) == []
        found = snapshot(state)
        manager.prepare(state)
        if rank == 0:
            gate.touch()
        train(state, 2, 2)
        assert manager.save(2, state, final=True).published
        manager.close()
        return found

    with blocked(gate) as services:
        assert_equal(expected, run_on_ranks(resume, len(nodes))[0])
    assert done(run_dir) == [1, 2]
    from_disk, _ = load(run_dir, 1, len(nodes))
    assert_equal(expected, from_disk)
    assert not [path for node in nodes for path in memory(shm, node).rglob("*") if path.is_file()], "memory is freed"


@pytest.mark.ranks
@pytest.mark.soak
@pytest.mark.parametrize(
    "kill_at",
    [
        At(r"mkdir .*/copies$"),
        At(r"reserve .*/copies/slot-0\.free$"),
        At(r"mkdir .*/copies/slot-0$"),
        At(r"reserve .*/copies/slot-0/model\..*\.distcp$"),
        At(r"write .*/copies/slot-0/optim\..*\.distcp$"),
        At(r"write .*/copies/slot-0/ready\..*$"),
        At(r"write .*/copies/slot-0\.free$"),
        At(r"rename .*/copies/slot-0\.free .*/copies/slot-0\.staged$"),
        At(r"rename .*/copies/slot-0\.staged .*/copies/slot-0\.free$"),
    ],
)
def test_a_service_killed_while_it_copies_is_replaced_and_copies_go_on(tmp_path: Path, shm: Path, kill_at: At):
    run_dir, died = tmp_path / "run", tmp_path / "died"

    def train_on(rank: int) -> int:
        state, where = make(shard=True), memory(shm, rank)
        manager = manager_of(run_dir, where, services, replicate=1)
        manager.prepare(state)
        for step in (1, 2, 3):
            train(state, step, step)
            manager.save(step, state)
            wait_until(lambda step=step: died.exists() or step in copied(run_dir, where))
        wait_until(lambda: died.exists() and not Path("/proc", died.read_text()).exists())
        step, is_staged = 3, False
        while not is_staged:  # until there is a new service, no slot may be free
            step += 1
            train(state, step, step)
            is_staged = manager.save(step, state).staged
        wait_until(lambda: step in copied(run_dir, where))
        train(state, step + 1, step + 1)
        assert manager.save(step + 1, state, final=True).published
        manager.close()
        return step + 1

    with Services(lambda n: DyingFiles(kill_at, died) if n == 1 else DISK) as services:
        last = run_on_ranks(train_on, 2)[0]
    assert done(run_dir)[-1] == last


@pytest.mark.ranks
@pytest.mark.soak
def test_without_a_copy_the_end_of_a_node_costs_what_is_not_on_the_disk(tmp_path: Path, shm: Path):
    run_dir = tmp_path / "run"
    train_until_copied(run_dir, shm, 2)
    shutil.rmtree(memory(shm, 1))
    shutil.rmtree(area_of(run_dir, memory(shm, 0)).copies.folder)

    def resume(rank: int) -> int | None:
        with closing(manager_of(run_dir, memory(shm, 0), services)) as manager:
            return manager.resume(make())

    with blocked() as services:
        assert run_on_ranks(resume, 1) == [None]


def test_a_run_of_one_node_says_that_there_are_no_copies(tmp_path: Path, shm: Path, caplog: pytest.LogCaptureFixture):
    with blocked() as services, closing(manager_of(tmp_path, shm, services, replicate=1)) as manager:
        manager.prepare(make())
        assert "checkpoint.replicate is off: this run has one node" in caplog.text
        assert manager.save(1, make()).staged
        assert not area_of(tmp_path, shm).copies.folder.exists()
