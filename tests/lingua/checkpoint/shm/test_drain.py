"""Several nodes make one checkpoint, or none; the pace of writing; who is still at work for an older start."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lingua.checkpoint import layout, publish
from lingua.checkpoint.publish import DamagedError, FileFacts
from lingua.checkpoint.shm import drain
from lingua.checkpoint.shm.area import Save, ServedRun, Slot, write_run
from lingua.checkpoint.shm.drain import LOOK_S, FencedError, NodeMissingError, Throttle
from lingua.checkpoint.shm.service import Service
from lingua.files import DISK, Files, write_json
from lingua.run.lock import Owner, this_process
from tests.fakes import Clock, FaultyFiles, KillFiles
from tests.slotted import DiskFiles, Start, World, content, fast_place, killed, names_of

LONG_S = 300.0
SHORT_S = 25 * LOOK_S
"""Few looks: in these tests each takes a millisecond."""


# -- pace ----------------------------------------------------------------------------------------------------------


def test_a_throttle_keeps_its_rate() -> None:
    clock = Clock(0.0)
    throttle = Throttle(100.0, clock.now, clock.sleep)
    for _ in range(11):
        throttle.let_through(50)
    assert clock.now() == pytest.approx(5.0)
    assert throttle.done_bytes == 550
    clock.sleep(100.0)  # what was not used is not saved up
    throttle.let_through(50)
    throttle.let_through(50)
    assert clock.now() == pytest.approx(105.5)


def test_a_throttle_without_a_limit_and_one_that_is_lifted() -> None:
    clock = Clock(0.0)
    throttle = Throttle(None, clock.now, clock.sleep)
    throttle.let_through(10**12)
    assert clock.now() == 0.0
    throttle.limit_bytes_per_s = 1.0

    def lift(seconds: float) -> None:
        clock.sleep(seconds)
        throttle.limit_bytes_per_s = None

    throttle.sleep = lift
    throttle.let_through(1000)
    throttle.let_through(1000)
    assert clock.now() < 1.0


# -- one node's part -----------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    with fast_place() as place:
        yield World(place).make(1)


@pytest.fixture
def pair() -> Iterator[World]:
    """A run on two nodes, step 1 published."""
    with fast_place() as place:
        yield World(place, n_nodes=2).make(1)


def staged(world: World, step: int = 2) -> tuple[Slot, ServedRun]:
    start = Start(world, 2)
    start.begin()
    start.make_slots()
    slot = start.stage(step)
    assert slot is not None
    return slot, world.served(2, node_timeout_s=SHORT_S)


def test_files_are_written_as_they_were_staged(world: World) -> None:
    slot, target = staged(world)
    found = slot.complete()
    assert found is not None
    files = FaultyFiles()
    drain.write_files(slot.folder, found[1], 2, target, Throttle(), files)
    for name in names_of(0):
        assert (target.folder(2) / name).read_bytes() == (slot.folder / name).read_bytes()
    assert sum(line.startswith("fsync ") for line in files.log) == len(names_of(0))
    assert files.log[-1] == f"fsync_dir {target.folder(2)}"


def test_an_empty_file_and_a_file_of_many_chunks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "CHUNK_BYTES", 1000)
    _, target = staged(world)
    folder = world.place / "slot"
    folder.mkdir()
    facts = {
        "empty": publish.write_hashed(folder / "empty", []),
        "long": publish.write_hashed(folder / "long", [bytes(range(250)) * 41]),
    }
    throttle = Throttle()
    drain.write_files(folder, facts, 2, target, throttle, DISK)
    assert (target.folder(2) / "long").read_bytes() == bytes(range(250)) * 41
    assert (target.folder(2) / "empty").read_bytes() == b""
    assert throttle.done_bytes == 250 * 41


def test_wrong_checksums_are_seen(world: World) -> None:
    slot, target = staged(world)
    found = slot.complete()
    assert found is not None
    facts = found[1] | {names_of(0)[1]: FileFacts(found[1][names_of(0)[1]].size_bytes, "0" * 32)}
    with pytest.raises(DamagedError, match=r"optim\.00000\.distcp was changed after it was staged"):
        drain.write_files(slot.folder, facts, 2, target, Throttle(), DISK)


def test_a_newer_start_and_a_lost_run_folder_are_told_apart(world: World) -> None:
    slot, target = staged(world)
    found = slot.complete()
    assert found is not None
    publish.open_staging_dir(world.root, 3)
    with pytest.raises(FencedError, match="a newer attempt of this run has begun"):
        drain.write_files(slot.folder, found[1], 2, target, Throttle(), DISK)
    shutil.rmtree(world.run_dir)
    with pytest.raises(FileNotFoundError, match="the run's folder is gone"):
        drain.write_files(slot.folder, found[1], 2, target, Throttle(), DISK)


# -- several nodes -------------------------------------------------------------------------------------------------


def begin_nodes(world: World, attempt: int = 2, *, node_timeout_s: float = SHORT_S) -> list[Start]:
    """A start on all nodes; node n has rank n."""
    starts = [Start(world, attempt, node=node, ranks=(node,)) for node in range(world.n_nodes)]
    for start in starts:
        start.begin(node_timeout_s=node_timeout_s)
        start.make_slots()
    return starts


def node_service(world: World, node: int, files: Files = DISK) -> Service:
    """Its threads and its looks are real; a look takes a millisecond."""
    return world.service(
        node,
        files=files,
        executor=ThreadPoolExecutor(4),
        now=time.monotonic,
        wall_clock=time.time,
        sleep=lambda _: time.sleep(0.001),
    )


def serve_nodes(world: World, *nodes: int, files: dict[int, Files] | None = None) -> None:
    """The services of these nodes, side by side, until all have left."""
    services = [node_service(world, node, (files or {}).get(node, DISK)) for node in nodes]
    assert all(service.take() for service in services)
    threads = [threading.Thread(target=service.run, daemon=True) for service in services]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("n_nodes", [2, 3])
def test_a_step_counts_when_all_nodes_hold_it(n_nodes: int) -> None:
    with fast_place() as place:
        world = World(place, n_nodes).make(1)
        for start in begin_nodes(world, node_timeout_s=1e9):
            start.stage(2)
        serve_nodes(world, *range(n_nodes))
        assert world.done() == [2]
        assert world.intact(2)
        facts = publish.read_marked_manifest(world.root, 2)
        assert sorted(facts) == sorted(name for rank in range(n_nodes) for name in names_of(rank))
        assert list(layout.staging_dir(world.root, 2).iterdir()) == []
        assert not any(world.area(node).folder.exists() for node in range(n_nodes))


@pytest.mark.parametrize("absent", [0, 1])
def test_without_one_node_nothing_is_published(pair: World, absent: int) -> None:
    starts = begin_nodes(pair)
    starts[1 - absent].stage(2)
    serve_nodes(pair, 1 - absent)
    assert pair.done() == [1]
    assert pair.intact(1)
    publish.open_staging_dir(pair.root, 3)
    assert {path.name for path in pair.root.iterdir()} == {
        "0000000001",
        "checkpoint_0000000001.done",
        "incarnation-3",
    }


def test_which_node_is_missing_is_said(pair: World) -> None:
    starts = begin_nodes(pair)
    starts[0].stage(2)
    service = node_service(pair, 0)
    assert service.take()
    deadline = time.monotonic() + LONG_S
    while "lost" not in pair.kinds(0):
        service.tick()
        assert time.monotonic() < deadline
    assert "node 1 of 2 has not written its part of checkpoint 2 within" in pair.events(0)[-1]["why"]
    service.run()


def test_a_node_that_is_late_hears_that_its_step_was_given_up(pair: World) -> None:
    starts = begin_nodes(pair)
    starts[0].stage(2)
    serve_nodes(pair, 0)
    starts[1].stage(2)
    write_run(starts[1].area, pair.served(2, node_timeout_s=1e9))  # it hears it, it does not wait for it
    serve_nodes(pair, 1)
    assert pair.done() == [1]
    left = [path for path in layout.staging_dir(pair.root, 2).rglob("*") if path.suffix == ".distcp"]
    assert left == [], "and takes away what it has written"


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_slot_is_heard_of_by_all_nodes_at_once(pair: World, damaged: int) -> None:
    starts = begin_nodes(pair)
    slots = [start.stage(2) for start in starts]
    for start in starts:
        write_run(start.area, pair.served(2, node_timeout_s=1e9))
    victim = slots[damaged]
    assert victim is not None
    (victim.folder / names_of(damaged)[0]).write_bytes(b"?")
    serve_nodes(pair, 0, 1)
    assert pair.done() == [1]


def test_parts_of_an_older_start_do_not_count(pair: World) -> None:
    starts = begin_nodes(pair)
    starts[0].stage(2)
    found = starts[0].area.slot(0).complete()
    assert found is not None
    save, facts = found
    target = pair.served(2, node_timeout_s=SHORT_S)
    old = Save(save.run_id, 1, 2, (1,), 1, 2)
    drain._write_part(old, target, {"files": {}}, DISK)
    assert not drain.has_part(Save(save.run_id, 2, 2, (1,), 1, 2), {}, target)
    with pytest.raises(NodeMissingError, match="node 1 of 2"):
        drain.publish_step(save, facts, target, lambda: 0.0, sleep=lambda _: None)


@pytest.mark.parametrize("text", [b"", b"{", b"[1"])
def test_a_part_that_was_cut_short_does_not_count(pair: World, text: bytes) -> None:
    starts = begin_nodes(pair)
    starts[0].stage(2)
    found = starts[0].area.slot(0).complete()
    assert found is not None
    target = pair.served(2, node_timeout_s=SHORT_S)
    target.part_file(2, 1).write_bytes(text)
    with pytest.raises(NodeMissingError, match="node 1 of 2"):
        drain.publish_step(*found, target, lambda: 0.0, sleep=lambda _: None)


def n_disk_operations(node: int) -> int:
    with fast_place() as place:
        world = World(place, n_nodes=2).make(1)
        for start in begin_nodes(world, node_timeout_s=1e9):
            start.stage(2)
        files = DiskFiles(world.root)
        serve_nodes(world, 0, 1, files={node: files})
        assert world.done() == [2]
        return files.n_done


@pytest.mark.soak
@pytest.mark.parametrize("node", [0, 1])
def test_a_disk_error_on_one_node_costs_no_step(node: int) -> None:
    n_all = n_disk_operations(node)
    assert n_all > 20
    with fast_place() as place:
        for n in range(1, n_all + 1):
            world = World(place / str(n), n_nodes=2).make(1)
            for start in begin_nodes(world):
                start.stage(2)
                write_run(start.area, world.served(2, node_timeout_s=1e9))
            clock = Clock()
            faulty = DiskFiles(world.root, n, error=errno.EIO)
            other = node_service(world, 1 - node)
            service = world.service(
                node, files=faulty, clock=clock, executor=ThreadPoolExecutor(4), sleep=lambda _: time.sleep(0.001)
            )
            assert other.take()
            assert service.take()
            thread = threading.Thread(target=other.run, daemon=True)
            thread.start()
            deadline = time.monotonic() + LONG_S
            while service.tick():
                assert time.monotonic() < deadline, f"error at {n}: {faulty.log[-3:]}"
                clock.sleep(0.5)
                time.sleep(0.001)
            service._leave()
            thread.join(LONG_S)
            assert not thread.is_alive()
            assert 2 in world.done(), f"error at {n}: {faulty.log[n - 1]}"
            assert all(world.intact(step) for step in world.done())
            shutil.rmtree(world.place)


def write_part(world: World, node: int, files: Files) -> None:
    """What the service of a node does until it waits for the others."""
    found = world.area(node).slot(0).complete()
    assert found is not None
    save, facts = found
    target = world.served(2, node_timeout_s=SHORT_S)
    if not drain.has_part(save, facts, target):
        drain.write_files(world.area(node).slot(0).folder, facts, 2, target, Throttle(), files)
    drain.publish_step(save, facts, target, lambda: 0.0, files=files, sleep=_stop)


class _WaitingError(Exception):
    pass


def _stop(_: float) -> None:
    raise _WaitingError


def write_part_and_wait(world: World, node: int, files: Files) -> None:
    with pytest.raises(_WaitingError):
        write_part(world, node, files)


@pytest.mark.soak
def test_the_other_node_s_service_killed_at_every_operation(pair: World) -> None:
    for start in begin_nodes(pair):
        start.stage(2)
    counting = FaultyFiles()
    write_part_and_wait(pair, 1, counting)
    target = pair.served(2)
    shutil.rmtree(target.folder(2))
    target.part_file(2, 1).unlink()
    for n in range(1, counting.n_done + 1):
        assert killed(lambda n=n: write_part_and_wait(pair, 1, KillFiles(n)))
        has_said_so = target.part_file(2, 1).exists()
        again = FaultyFiles()
        write_part_and_wait(pair, 1, again)
        assert not (has_said_so and again.log), "what was said to be complete was touched"
        for name in names_of(1):
            assert (target.folder(2) / name).read_bytes() == (pair.area(1).slot(0).folder / name).read_bytes()
        shutil.rmtree(target.folder(2))
        target.part_file(2, 1).unlink()
    assert counting.n_done >= 20


def finish(world: World, files: Files) -> None:
    """What the service of the first node does once the other has said its part."""
    found = world.area(0).slot(0).complete()
    assert found is not None
    if not drain.is_published(found[0], world.served(2), files=files):
        write_part(world, 0, files)


@pytest.mark.soak
def test_the_publishing_node_s_service_killed_at_every_operation(pair: World) -> None:
    for start in begin_nodes(pair):
        start.stage(2)
    target = pair.served(2)

    def begin_anew() -> None:
        shutil.rmtree(layout.folder(pair.root, 2), ignore_errors=True)
        layout.done_mark(pair.root, 2).unlink(missing_ok=True)
        for node in (0, 1):
            target.part_file(2, node).unlink(missing_ok=True)
        write_part_and_wait(pair, 1, DISK)

    counting = FaultyFiles()
    begin_anew()
    finish(pair, counting)
    assert counting.n_done >= 30
    for n in range(1, counting.n_done + 1):
        begin_anew()
        assert killed(lambda n=n: finish(pair, KillFiles(n)))
        finish(pair, DISK)
        assert 2 in pair.done()
        assert pair.intact(2), f"killed at {n}: {counting.log[n - 1]}"


# -- who is at work ------------------------------------------------------------------------------------------------


def test_at_work_shows_who_it_is_and_leaves_nothing(world: World) -> None:
    slot, target = staged(world)
    save = slot.save()
    assert save is not None
    me = this_process()
    with drain.at_work(target, save):
        assert drain.busy_writers(world.root, 2, me) == {}, "of starts before that one only"
        busy = drain.busy_writers(world.root, 3, me)
        assert [alive for _, alive in busy.values()] == [True]
    assert drain.busy_writers(world.root, 3, me) == {}


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (lambda: this_process(), [True]),
        (lambda: Owner(**{**vars(this_process()), "started": "1"}), []),  # its pid is another's now
        (lambda: Owner(host="elsewhere", boot_id="b", pid=1), [None]),
        (lambda: Owner(host="elsewhere", boot_id="b", pid=1, slurm_job_id="7", slurm_restarts=0), []),
    ],
)
def test_busy_writers(world: World, who: Callable[[], Owner], expected: list[bool | None]) -> None:
    publish.open_staging_dir(world.root, 2)
    path = world.served(2).writer_file(5, 0)
    write_json(path, vars(who()))
    me = this_process("7", 1)
    assert [alive for _, alive in drain.busy_writers(world.root, 3, me).values()] == expected
    path.write_bytes(b"{")
    assert drain.busy_writers(world.root, 3, me) == {}


def test_a_copy_of_a_run_waits_for_no_service_of_the_original(world: World) -> None:
    slot, target = staged(world)
    save = slot.save()
    assert save is not None
    with drain.at_work(target, save):
        shutil.copytree(world.root, world.place / "copy")
        assert drain.busy_writers(world.place / "copy", 3, this_process()) == {}
        assert drain.busy_writers(world.root, 3, this_process()) != {}


def test_another_run_in_the_same_folder_gets_nothing_of_this_one(world: World) -> None:
    """The folder was removed and a new run has begun there, also as attempt 2."""
    start = Start(world, 2)
    start.begin()
    start.make_slots()
    start.stage(2)
    (world.root / layout.RUN_ID).write_text("another")
    service = world.service()
    assert service.take()
    service.tick()
    service.tick()
    assert "fenced" in world.kinds()
    assert world.done() == [1]
    assert not world.served(2).folder(2).exists()


def test_a_step_that_a_newer_attempt_has_published_is_not_this_one_s(world: World) -> None:
    start = Start(world, 2)
    start.begin()
    start.make_slots()
    start.stage(2)
    publish.open_staging_dir(world.root, 3)
    for name, data in ((name, content(2, name)) for name in names_of(0)):
        layout.coming(layout.folder(world.root, 2), 3).mkdir(exist_ok=True)
        (layout.coming(layout.folder(world.root, 2), 3) / name).write_bytes(data)
    publish.publish(world.root, 2, 3, {n: publish.FileFacts(len(content(2, n)), "") for n in names_of(0)})
    service = world.service()
    assert service.take()
    service.tick()
    service.tick()
    assert "fenced" in world.kinds()
    assert "published" not in world.kinds()


def test_a_link_in_the_staging_dir_is_not_written_through(world: World) -> None:
    slot, target = staged(world)
    found = slot.complete()
    assert found is not None
    precious = world.place / "precious"
    precious.write_text("kept")
    target.folder(2).mkdir()
    (target.folder(2) / names_of(0)[0]).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        drain.write_files(slot.folder, found[1], 2, target, Throttle(), DISK)
    assert precious.read_text() == "kept"
    assert Path(os.readlink(target.folder(2) / names_of(0)[0])) == precious
