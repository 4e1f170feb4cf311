"""The checkpoint service: what it does next, disks that fail or hang, slots that are not what was staged, the end."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lingua.checkpoint import layout, pins, publish
from lingua.checkpoint.shm.area import SERVICE_LOCK, Slot, base, make_area, write_run
from lingua.checkpoint.shm.drain import StagedSlot, next_to_drain
from lingua.checkpoint.shm.service import SILENT_S, Service, pause_s
from lingua.files import Buffer, Files, RunError
from tests.fakes import At, BlockingFiles, Clock, FrozenFiles
from tests.slotted import DiskFiles, Start, World, a_rank_lives, fast_place, names_of, serve

LONG_S = 300.0


@pytest.fixture
def world() -> Iterator[World]:
    """A run with step 1 published by start 1."""
    with fast_place() as place:
        yield World(place).make(1)


def started(world: World, attempt: int = 2, n_slots: int = 2, **session: Any) -> Start:
    start = Start(world, attempt, n_slots=n_slots)
    start.begin(**session)
    start.make_slots()
    return start


def staged(start: Start, step: int) -> Slot:
    slot = start.stage(step)
    assert slot is not None
    return slot


def run_to_its_end(service: Service) -> None:
    assert service.take()
    service.run()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# -- decisions -----------------------------------------------------------------------------------------------------

WAITING = [StagedSlot(0, 20, 100), StagedSlot(1, 10, 100), StagedSlot(2, 30, 100)]


@pytest.mark.parametrize(
    ("waiting", "ending", "time_left_s", "bytes_per_s", "expected"),
    [
        ([], False, None, None, None),
        ([], True, 10.0, 1.0, None),
        (WAITING, False, None, None, 1),  # in order
        (WAITING, True, None, None, 2),  # the newest
        (WAITING, True, 10.0, 10.0, 2),  # just fits
        (WAITING, True, 9.9, 10.0, None),  # two halves are none
        (WAITING, True, 0.0, 10.0, None),
        (WAITING, True, 1.0, None, 2),  # never measured
        (WAITING, True, -0.1, 10.0, 2),  # the job lives longer than it was told
        (WAITING, False, 10.0, 10.0, 1),
    ],
)
def test_next_to_drain(
    waiting: list[StagedSlot],
    ending: bool,
    time_left_s: float | None,
    bytes_per_s: float | None,
    expected: int | None,
) -> None:
    assert next_to_drain(waiting, ending=ending, time_left_s=time_left_s, bytes_per_s=bytes_per_s) == expected


def test_pauses_grow_up_to_a_minute() -> None:
    assert [pause_s(n) for n in (1, 2, 3, 6, 7, 8, 1000)] == [1, 2, 4, 32, 60, 60, 60]


# -- order, and what is wanted -------------------------------------------------------------------------------------


def test_in_order_while_ranks_live_and_the_newest_first_when_they_have_gone(world: World) -> None:
    start = started(world)
    for step in (2, 3):
        staged(start, step)
    with a_rank_lives(start.area):
        serve(world.service())
    assert [event["step"] for event in world.events() if event["kind"] == "published"] == [2, 3]
    for step in (4, 5):
        staged(start, step)
    run_to_its_end(world.service())
    assert world.done() == [5]


def test_a_region_without_a_session(world: World) -> None:
    clock = Clock()
    service = world.service(clock=clock, wait_s=30.0)
    run_to_its_end(service)
    assert 1030.0 <= clock.now() < 1031.0
    assert not world.area().folder.exists()


def test_a_session_that_an_earlier_version_left_is_that_of_no_rank_yet(world: World) -> None:
    start = started(world)
    staged(start, 2)
    start.area.session.write({"run_id": "the-run", "version": 1})
    service = world.service(wait_s=30.0)
    assert service.take()
    with a_rank_lives(start.area):
        assert service.tick()
        Start(world, 3).begin(service_lives=True)
        serve(service)
        assert world.done() == [2]  # what the older attempt had left in memory
        start.area.session.write({"version": 3})
        with pytest.raises(RunError, match="of another version of lingua"):
            service.tick()


def test_without_a_rank_a_session_of_another_version_keeps_the_memory(world: World) -> None:
    start = started(world)
    staged(start, 2)
    start.area.session.write({"version": 1})
    with pytest.raises(RunError, match="of another version of lingua"):
        run_to_its_end(world.service())
    assert list(world.staged()) == [2]


def test_what_no_session_wants_makes_room(world: World) -> None:
    start = started(world)
    slot = staged(start, 2)
    write_run(start.area, world.served(3))
    publish.open_staging_dir(world.root, 3)
    with a_rank_lives(start.area):
        serve(world.service())
    assert slot.state() == "free"
    assert world.done() == [1]


def test_a_newer_start_s_save_is_not_given_up_by_a_service_that_slept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(world)
    service = world.service()
    assert service.take()
    old = world.served(2)
    newer = Start(world, 3)
    newer.begin()
    slot = staged(newer, 5)
    monkeypatch.setattr("lingua.checkpoint.shm.service.read_run", lambda area: old)
    service.tick()
    assert slot.state() == "staged"
    monkeypatch.undo()
    service.run()
    assert world.done() == [5]


def test_a_service_of_an_older_start_goes_on_with_the_new_one(world: World) -> None:
    start = started(world)
    staged(start, 2)
    service = world.service()
    with a_rank_lives(start.area):
        serve(service)
        newer = Start(world, 3)
        newer.begin(service_lives=True)
        staged(newer, 3)
        service.tick()
        service.tick()
    assert world.done() == [3]
    assert [(e["step"], e["incarnation"]) for e in world.events() if e["kind"] == "published"] == [(2, 2), (3, 3)]


def test_a_claim_of_dead_ranks_is_taken_back(world: World) -> None:
    start = started(world)
    slot = staged(start, 2)
    service = world.service()
    assert service.take()
    assert slot.change("staged", "claimed")
    service.run()
    assert world.done() == [2]


def test_a_step_that_a_dead_service_has_published(world: World) -> None:
    start = started(world)
    slot = staged(start, 2)
    with a_rank_lives(start.area):
        serve(world.service())
        assert slot.state() == "free"
        slot.put_mark(start.save_of(2))
        slot.change("staged", "draining")
        before = layout.done_mark(world.root, 2).stat().st_mtime_ns
        serve(world.service())
    assert slot.state() == "free"
    assert layout.done_mark(world.root, 2).stat().st_mtime_ns == before
    assert world.kinds().count("published") == 2


# -- a disk that fails ---------------------------------------------------------------------------------------------


def count_disk_operations() -> int:
    with fast_place() as place:
        world = World(place).make(1)
        staged(started(world), 2)
        files = DiskFiles(world.root)
        run_to_its_end(world.service(files=files))
        return files.n_done


N_DISK = count_disk_operations()


ALSO = [pytest.param(error, marks=pytest.mark.soak) for error in (errno.EDQUOT, errno.EROFS)]


@pytest.mark.soak
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, *ALSO])
@pytest.mark.parametrize("lasting", [False, True])
def test_failing_at_every_operation(error: int, lasting: bool) -> None:
    assert N_DISK > 45
    with fast_place() as place:
        for n in range(1, N_DISK + 1):
            world = World(place / str(n)).make(1)
            slot = staged(started(world), 2)
            files = DiskFiles(world.root, n, error=error, lasting=lasting)
            clock = Clock()
            service = world.service(files=files, clock=clock)
            assert service.take()
            for _ in range(200):
                assert all(world.intact(step) for step in world.done())
                assert 1 in world.done() or 2 in world.done()
                clock.sleep(0.5)
                service.tick()
                if "published" in world.kinds():
                    break
                assert slot.complete(), "the slot is kept until it is safe"
                if world.kinds().count("failing") == 4:
                    files.heal()
            files.heal()
            service.run()
            kinds = world.kinds()
            assert 2 in world.done(), f"failed at {n}: {files.log[n - 1]}"
            assert "lost" not in kinds
            if "recovered" in kinds:
                assert "failing" in kinds[: kinds.index("recovered")]
            shutil.rmtree(world.place)


def test_back_off_and_words(world: World) -> None:
    start = started(world)
    staged(start, 2)
    files = DiskFiles(world.root, 1, lasting=True)
    clock = Clock()
    service = world.service(files=files, clock=clock)
    assert service.take()
    with a_rank_lives(start.area):
        for _ in range(400):
            service.tick()
            clock.sleep(0.25)
        times = [event["at_s"] - 1000.0 for event in world.events()]
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert pauses[:6] == pytest.approx([1, 2, 4, 8, 16, 32], abs=0.6)
        why = world.events()[0]["why"]
        assert why.startswith("checkpoint 2: the disk is full at ")
        assert why.endswith("make room; it stays in memory, next attempt in 1 s")
        files.heal()
        clock.sleep(60.0)
        service.tick()
        service.tick()
        assert world.kinds()[-3:] == ["recovered", "published", "retired"]


def test_the_newest_takes_the_place_of_one_that_waits_for_the_disk(world: World) -> None:
    start = started(world, n_slots=1)
    staged(start, 2)
    files = DiskFiles(world.root, 1, lasting=True)
    clock = Clock()
    service = world.service(files=files, clock=clock)
    assert service.take()
    with a_rank_lives(start.area):
        service.tick()
        service.tick()
        assert world.kinds() == ["failing"]
        staged(start, 3)
        files.heal()
        clock.sleep(60.0)
        service.tick()
        service.tick()
    assert world.done() == [3]


@pytest.mark.soak
def test_a_disk_that_never_comes_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.checkpoint.shm.service.PATIENCE_S", 500.0)
    started(world)
    staged(Start(world, 2), 2)
    clock = Clock()
    run_to_its_end(world.service(files=DiskFiles(world.root, 1, lasting=True), clock=clock))
    assert 1500.0 < clock.now() < 1600.0
    assert world.staged() == {2: 0}, "the next start on this node saves it"


def test_the_run_folder_is_removed_under_us(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.checkpoint.shm.service.PATIENCE_S", 10.0)
    start = started(world)
    staged(start, 2)
    shutil.rmtree(world.run_dir)
    run_to_its_end(world.service())
    assert set(world.kinds()) == {"failing"}
    assert not world.run_dir.exists(), "it is not made again"
    assert world.staged() == {2: 0}


class HangingFiles(Files):
    """A disk that answers no write of a step's files until `answers` is set."""

    def __init__(self, root: Path, operation: str) -> None:
        self.answers, self.asked = threading.Event(), threading.Event()
        real = getattr(super(), operation)

        def hang(*args: Any) -> Any:
            where = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
            if where.startswith(str(root)):
                self.asked.set()
                assert self.answers.wait(LONG_S)
            return real(*args)

        setattr(self, operation, hang)


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_a_disk_that_hangs_is_reported(world: World, operation: str) -> None:
    start = started(world)
    staged(start, 2)
    files, clock = HangingFiles(world.root, operation), Clock()
    service = world.service(files=files, clock=clock, executor=ThreadPoolExecutor(4))
    assert service.take()
    with a_rank_lives(start.area):
        service.tick()
        assert files.asked.wait(LONG_S)
        for _ in range(4):
            service.tick()
            clock.sleep(SILENT_S / 2)
        service.tick()
        assert world.kinds() == ["silent"]
        assert "has accepted nothing of checkpoint 2 for 30 s" in world.events()[0]["why"]
        files.answers.set()
        wait_until(lambda: service.tick() and "published" in world.kinds())
    wait_until(lambda: not service.tick())
    first, *later = world.kinds()
    assert first == "silent"
    assert {"published", "recovered"} <= set(later), "in either order: threads write, and one look sees both"
    service.close()
    assert world.done() == [2]


class RottingFiles(Files):
    """A disk that turns one bit of the first file it is given, `times` times."""

    def __init__(self, root: Path, times: int) -> None:
        self._root, self._times = str(root), times

    def write(self, descriptor: int, data: Buffer) -> None:
        where = os.readlink(f"/proc/self/fd/{descriptor}")
        if self._times and where.startswith(self._root) and where.endswith(".distcp"):
            self._times -= 1
            data = bytes([data[0] ^ 1]) + bytes(data[1:])
        super().write(descriptor, data)


def test_readback_sees_what_the_disk_has_made_of_it(world: World) -> None:
    started(world, verify="readback")
    staged(Start(world, 2), 2)
    run_to_its_end(world.service(files=RottingFiles(world.root, times=2)))
    assert world.done() == [2]
    assert world.intact(2)


# -- a slot that is not what was staged ----------------------------------------------------------------------------


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"?")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def by_a_link(path: Path) -> None:
    other = path.with_name("elsewhere")
    path.rename(other)
    path.symlink_to(other)


def by_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [overwrite, truncate, by_a_link, by_a_fifo, Path.unlink])
@pytest.mark.parametrize("name", names_of(0))
def test_a_slot_that_was_touched_is_lost_and_nothing_else(
    world: World, damage: Callable[[Path], None], name: str
) -> None:
    start = started(world)
    slot = staged(start, 2)
    damage(slot.folder / name)
    with a_rank_lives(start.area):
        serve(world.service())
        assert world.kinds() == ["lost"]
        assert world.events()[0]["why"].startswith("checkpoint 2 is lost, older ones are untouched: ")
        assert world.done() == [1]
        assert world.intact(1)
        assert slot.state() == "free"
        assert list(layout.staging_dir(world.root, 2).iterdir()) == []


# -- retention -----------------------------------------------------------------------------------------------------


def test_pins_and_milestones_are_kept(world: World) -> None:
    publish.pin(world.root, 1, "a-reader", expires_at=2000.0)
    start = started(world, keep_every=3)
    clock = Clock()
    service = world.service(clock=clock)
    assert service.take()
    with a_rank_lives(start.area):
        for step in (2, 3, 4):
            staged(start, step)
            service.tick()
            service.tick()
        assert world.done() == [1, 3, 4]
        clock.sleep(2000.0)
        staged(start, 5)
        service.tick()
        service.tick()
    assert world.done() == [3, 5]


def test_what_waits_for_its_evaluation_stays_and_goes_with_a_word(world: World) -> None:
    start = started(world)
    clock = Clock(publish.mark_facts(world.root, 1)["created_at"])
    pins.follow(world.run_dir, pins.Follower(every=1, max_pinned_s=100.0, seen_at_s=clock.now_s))
    service = world.service(clock=clock)
    assert service.take()
    with a_rank_lives(start.area):
        for step, passes_s in ((2, 0.0), (3, 300.0)):
            staged(start, step)
            clock.sleep(passes_s)
            pins.follow(world.run_dir, pins.Follower(every=1, max_pinned_s=100.0, seen_at_s=clock.now_s))
            service.tick()
            service.tick()
            assert world.done() == ([1, 2] if step == 2 else [3])
    assert "CHECKPOINT 1 IS DELETED WITHOUT AN EVALUATION" in " ".join(event.get("why", "") for event in world.events())


def test_what_is_published_while_a_deletion_lasts_has_its_turn_after_it(world: World) -> None:
    start, gate = started(world), world.place / "gate"
    files = BlockingFiles(At(r"rename .*\.trash$"), until=gate)
    service = world.service(files=files, executor=ThreadPoolExecutor(4))
    assert service.take()
    for step in (2, 4):
        staged(start, step)
        wait_until(lambda step=step: service.tick() and step in world.done())
    assert set(world.done()) >= {1, 2, 4}, "the deletion of step 1 hangs"
    gate.touch()
    wait_until(lambda: not service.tick())
    service._leave()
    assert world.done() == [4]


def test_pins_that_cannot_be_read_keep_everything(world: World) -> None:
    (world.root / layout.PINS).mkdir()
    (world.root / layout.PINS / "bad.json").write_bytes(b"{")
    started(world)
    staged(Start(world, 2), 2)
    service = world.service()
    assert service.take()
    service.tick()
    service.tick()
    assert world.done() == [1, 2]
    assert "no checkpoint is deleted, since the pins cannot be read" in world.events()[-1]["why"]
    service.run()


# -- a newer start -------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_service_that_wakes_up_after_a_newer_start_changes_nothing() -> None:
    outcomes: set[tuple[int, ...]] = set()
    n_fenced = 0
    with fast_place() as place:
        for n in itertools.count(1):
            world = World(place / str(n)).make(1)
            start = started(world)
            staged(start, 2)
            seen: list[set[str]] = []

            def newer_start(world: World = world, seen: list[set[str]] = seen) -> None:
                publish.open_staging_dir(world.root, 9)
                seen.append({path.name for path in world.root.iterdir()})

            files = FrozenFiles(n, newer_start)
            service = world.service(files=files)
            with a_rank_lives(start.area):
                serve(service)
                kinds = world.kinds()
            service.run()
            may_be_missed = bool(seen) and world.done() == [1]  # the newer start may die before it saves anything
            assert world.area().folder.exists() == may_be_missed
            if not seen:
                assert n > 50
                break
            assert {path.name for path in world.root.iterdir()} == seen[0], f"frozen before operation {n}"
            assert all(world.intact(step) for step in world.done())
            assert list(layout.staging_dir(world.root, 9).iterdir()) == []
            assert set(kinds) <= {"published", "retired", "fenced"}, f"frozen before operation {n}"
            assert kinds.count("fenced") <= 1
            n_fenced += "fenced" in kinds
            outcomes.add(tuple(world.done()))
            shutil.rmtree(world.place)
    assert outcomes == {(1,), (1, 2), (2,)}
    assert n_fenced > 25


# -- coming and leaving --------------------------------------------------------------------------------------------


def test_half_a_save_of_dead_ranks_is_given_back(world: World) -> None:
    start = started(world)
    assert start.take_slot(2)
    run_to_its_end(world.service())
    assert list(base(world.shm()).iterdir()) == []


@pytest.mark.parametrize(("asked_s", "stays_s"), [(None, 5.0), (0.0, 0.0), (2.0, 2.0)])
def test_how_long_it_stays_after_the_last_rank(world: World, asked_s: float | None, stays_s: float) -> None:
    staged(started(world, linger_s=5.0), 2)
    clock = Clock(0.0)
    run_to_its_end(world.service(clock=clock, linger_s=asked_s))
    assert stays_s <= clock.now_s < stays_s + 1.0
    assert world.done() == [2]


def test_a_rank_that_comes_while_the_service_leaves_keeps_its_region(world: World) -> None:
    start = started(world)
    service = world.service()
    assert service.take()
    while service.tick():
        pass
    with a_rank_lives(start.area):
        service._leave()
        assert start.area.folder.exists()
    other = world.service()
    run_to_its_end(other)
    assert not start.area.folder.exists()


def test_a_service_with_the_lock_of_a_removed_region_is_none(world: World) -> None:
    late = world.service()
    run_to_its_end(world.service())
    assert not world.area().folder.exists()
    assert not late.take()
    make_area(world.run_dir, world.shm())
    assert not late.is_current()
    late._leave()
    assert world.area().folder.exists(), "it is another one's"


def test_without_memory_for_words_they_come_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    start = started(world)
    slot = staged(start, 2)
    service = world.service()
    assert service.take()
    with a_rank_lives(start.area):
        monkeypatch.setattr("lingua.checkpoint.shm.record.Record.write", _full)
        service.tick()
        service.tick()
        assert slot.state() == "free"
        assert world.kinds() == []
        monkeypatch.undo()
        service.tick()
        assert world.kinds() == ["published", "retired"]
    service.run()


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.soak
def test_500_saves_grow_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.checkpoint.shm.service.log.disabled", True)  # pytest keeps every line
    start = started(world)
    service = world.service()
    assert service.take()
    own_code = tracemalloc.Filter(True, "*/lingua/checkpoint/*")

    def save(steps: range) -> tuple[int, int, int, int]:
        """Saves them; returns open files, threads, mappings and bytes allocated by our code."""
        for step in steps:
            staged(start, step)
            service.tick()
            service.tick()
        mappings = Path("/proc/self/maps").read_text().count(str(world.place))
        gc.collect()  # or what waits for the collector is counted too
        traced = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([own_code]).traces)
        return len(os.listdir("/proc/self/fd")), threading.active_count(), mappings, traced

    tracemalloc.start()
    try:
        with a_rank_lives(start.area):
            before, after = save(range(2, 52)), save(range(52, 502))
    finally:
        tracemalloc.stop()
    assert world.done() == [501]
    assert all(then >= now for then, now in zip(before[:3], after[:3], strict=True))
    assert after[3] - before[3] < 4_500, "ten bytes for each save"
    assert len(list(world.root.iterdir())) == 3
    service.run()


# -- the process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def process(world: World) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started_here: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lingua.checkpoint.shm.service", *words]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
        pipe = subprocess.PIPE
        started_here.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
        return started_here[-1]

    yield start
    for each in started_here:
        each.kill()
        each.communicate()


def is_held(world: World) -> bool:
    path = world.area().folder / SERVICE_LOCK
    if not path.exists():
        return False
    lock = world.area().lock(SERVICE_LOCK)
    try:
        return lock.holder() is not None
    finally:
        lock.close()


def words_of(world: World) -> list[str]:
    return [str(world.run_dir), "--shm", str(world.shm())]


def test_a_service_process(world: World, process: Callable[..., subprocess.Popen[str]]) -> None:
    """Deaf to signals, alone, saves what is staged, and leaves when the ranks have gone."""
    start = started(world)
    with a_rank_lives(start.area):
        service = process(*words_of(world))
        wait_until(lambda: is_held(world))
        for deaf in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            service.send_signal(deaf)
        second = process(*words_of(world))
        assert second.wait(LONG_S) == 0
        assert "has a service on this node already" in second.communicate()[1]
        staged(start, 2)
        wait_until(lambda: world.done() == [2])
        maps = Path(f"/proc/{service.pid}/maps").read_text()
        assert "libtorch" not in maps
        assert service.poll() is None
    assert service.wait(LONG_S) == 0
    assert " INFO checkpoint service: published {'step': 2, " in service.communicate()[1]
    assert list(base(world.shm()).iterdir()) == []


def test_a_service_process_that_waits_for_the_first_rank(
    world: World, process: Callable[..., subprocess.Popen[str]]
) -> None:
    service = process(*words_of(world), "--wait-s", str(10 * LONG_S))
    wait_until(lambda: is_held(world))
    start = started(world)
    with a_rank_lives(start.area):
        staged(start, 2)
        wait_until(lambda: world.done() == [2])
    assert service.wait(LONG_S) == 0


def test_a_service_process_that_cannot_begin(world: World, process: Callable[..., subprocess.Popen[str]]) -> None:
    base(world.shm()).mkdir(mode=0o755)
    service = process(*words_of(world))
    assert service.wait(LONG_S) == 1
    said = service.communicate()[1]
    assert "it must be a folder that is yours with mode 700" in said
    assert "Traceback" not in said


def test_the_process_needs_no_torch_and_has_help() -> None:
    probe = "import sys, lingua.checkpoint.shm.service; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
    command = [sys.executable, "-m", "lingua.checkpoint.shm.service", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("run_dir", "--shm", "--wait-s", "kill -9", "SIGTERM"):
        assert word in said


# -- bugs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["drain.store", "retention.to_delete", "service.next_to_drain"])
def test_a_bug_wherever_it_is_ends_the_service_and_the_ranks_hear_of_it(
    world: World, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread that writes, in one that deletes, and in the loop."""

    def bug(*_: object, **__: object) -> None:
        raise NameError("name 'oops' is not defined")

    start = started(world)
    staged(start, 2)
    monkeypatch.setattr(f"lingua.checkpoint.{'shm.' if 'retention' not in place else ''}{place}", bug)
    service = world.service()
    assert service.take()
    with a_rank_lives(start.area), pytest.raises(NameError, match="oops"):
        service.run()
    assert world.kinds()[-1] == "failed"
    assert "in bug" in world.events()[-1]["why"]
    assert world.done() == ([1, 2] if place == "retention.to_delete" else [1])
