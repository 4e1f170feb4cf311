"""A start on several nodes goes on from their memories, wherever each part lies, while the disk stands still."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lingua.checkpoint import layout
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.publish import DamagedError
from lingua.checkpoint.shm import part_server
from lingua.checkpoint.shm.area import SERVICE_LOCK, area_of
from lingua.checkpoint.shm.part_server import PartReader, address_of_this_node, keep_serving
from lingua.checkpoint.shm.service_client import ServiceClient
from lingua.config.keys.checkpoint import CheckpointArgs
from tests.lingua.checkpoint.shm.test_resume_from_memory import blocked, damage, done, manager_of
from tests.ranks import run_on_ranks
from tests.services import Services
from tests.slotted import Start, World, content, names_of
from tests.tiny import assert_equal, make, snapshot, train


def memory(shm: Path, node: int) -> Path:
    folder = shm / f"node-{node}"
    folder.mkdir(exist_ok=True)
    return folder


def leave(run_dir: Path, shm: Path, nodes: Sequence[int], steps: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    """Steps that are only in memory, rank r's part on `nodes[r]`; everything is dead. The state of the last one."""

    def save(rank: int) -> dict[str, Tensor]:
        state = make(shard=len(nodes) > 1)
        manager = manager_of(run_dir, memory(shm, nodes[rank]), services)
        manager.prepare(state)
        for step in steps:
            train(state, step, step)
            assert manager.save(step, state).staged
        manager.close()
        return snapshot(state)

    with blocked() as services:
        return run_on_ranks(save, len(nodes))[0]


def load(run_dir: Path, step: int, n_ranks: int) -> tuple[dict[str, Tensor], Tensor]:
    """What the disk holds, and the next random numbers of rank 0."""

    def load(rank: int) -> tuple[dict[str, Tensor], Tensor]:
        state = make(shard=n_ranks > 1)
        CheckpointManager(CheckpointArgs(), run_dir).load(step, state)
        return snapshot(state), torch.rand(3)

    return run_on_ranks(load, n_ranks)[0]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("saved_on", "nodes"),
    [
        ((0, 1), (1, 0)),
        *(
            pytest.param(*of, marks=pytest.mark.soak)
            for of in (
                ((0, 1), (0, 1)),
                ((0, 1), (0, 1, 2)),  # with a new node
                ((0, 1), (2, 1, 0)),
                ((0, 1), (1, 1, 0, 0)),
                ((0, 0, 1), (1, 0)),
                ((0, 0, 1, 2), (2, 0, 1)),
                ((0,), (1, 0)),
            )
        ),
    ],
)
def test_parts_travel_between_the_nodes_of_a_start(
    tmp_path: Path, shm: Path, saved_on: tuple[int, ...], nodes: tuple[int, ...]
):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    expected = leave(run_dir, shm, saved_on)

    def resume(rank: int) -> tuple[dict[str, Tensor], Tensor]:
        manager, state = manager_of(run_dir, memory(shm, nodes[rank]), services), make(shard=len(nodes) > 1)
        torch.manual_seed(99)
        assert manager.resume(state) == 1
        random = torch.rand(3)
        assert done(run_dir) == []
        manager.prepare(state)
        if rank == 0:
            gate.touch()
        assert manager.save(1, state, final=True).published, "it is the one in memory"
        manager.close()
        return snapshot(state), random

    with blocked(gate) as services:
        found, random = run_on_ranks(resume, len(nodes))[0]
    assert_equal(expected, found)
    from_disk, random_too = load(run_dir, 1, len(nodes))
    assert_equal(expected, from_disk)
    assert torch.equal(random, random_too)


@pytest.mark.ranks
@pytest.mark.parametrize(("harm", "step"), [("damaged", 1), pytest.param("gone", None, marks=pytest.mark.soak)])
def test_what_is_not_whole_is_not_taken(tmp_path: Path, shm: Path, harm: str, step: int | None):
    run_dir = tmp_path / "run"
    leave(run_dir, shm, (0, 1), steps=(1, 2))
    if harm == "damaged":
        slots = area_of(run_dir, memory(shm, 1)).slots()
        slot = next(slot for slot in slots if (found := slot.complete()) and found[0].step == 2)
        damage(slot.folder / layout.optim_file(1))
    else:
        shutil.rmtree(memory(shm, 1))

    def resume(rank: int) -> dict[str, Tensor]:
        with closing(manager_of(run_dir, memory(shm, 1 - rank), services)) as manager:
            state = make(shard=True)
            assert manager.resume(state) == step
            return snapshot(state)

    with Services() as services:
        found = run_on_ranks(resume, 2)[0]
    expected = make()
    train(expected, 1, step or 0)
    assert step is None or done(run_dir) == [1]
    assert_equal(snapshot(expected), found)


# -- what is on the disk already -----------------------------------------------------------------------------------


def publish_one(run_dir: Path, shm: Path, services: Services) -> dict[str, Tensor]:
    """Step 1 is on the disk and still in memory, whose service lingers; the ranks are gone."""
    state = make()
    with closing(manager_of(run_dir, shm, services, linger_s=300.0)) as manager:
        manager.prepare(state)
        train(state, 1, 1)
        assert manager.save(1, state, final=True).published
    return snapshot(state)


def spoil(run_dir: Path) -> None:
    """Damage every tensor on the disk."""
    for path in layout.folder(run_dir / layout.CHECKPOINTS, 1).glob("*.distcp"):
        damage(path)


def test_what_was_published_is_taken_from_memory_while_it_is_there(tmp_path: Path, shm: Path):
    run_dir = tmp_path / "run"
    with Services() as services:
        expected = publish_one(run_dir, shm, services)
        spoil(run_dir)
        with closing(manager_of(run_dir, shm, services)) as manager:
            state = make()
            assert manager.resume(state) == 1
            assert manager.save(1, state).published
            assert not manager.owes(1)
            assert_equal(expected, snapshot(state))


def test_a_start_that_was_killed_before_its_first_save_leaves_nothing_to_take(tmp_path: Path, shm: Path):
    """Its new files have the old names and sizes, and `sizes` reads no byte of them."""
    run_dir = tmp_path / "run"
    with Services() as services:
        expected = publish_one(run_dir, shm, services)
        with closing(manager_of(run_dir, shm, services, linger_s=300.0)) as manager:
            state = make()
            assert manager.resume(state) == 1
            manager.prepare(state)
        with closing(manager_of(run_dir, shm, services, verify_on_load="sizes")) as manager:
            assert manager._point is None  # pyright: ignore[reportPrivateUsage]
            state = make()
            assert manager.resume(state) == 1
            assert_equal(expected, snapshot(state))


# -- the way there -------------------------------------------------------------------------------------------------

SECRET = "of this attempt"


@pytest.fixture
def there(shm: Path) -> World:
    """Step 4 of one node in memory, and a service that serves it."""
    world = World(shm / "world").make()
    start = Start(world, 1)
    start.begin(listen="127.0.0.1", secret=SECRET)
    start.make_slots()
    start.stage(4)
    return world


def serve(world: World) -> tuple[str, int]:
    run = world.served(1, listen="127.0.0.1", secret=SECRET)
    assert keep_serving(None, world.area(), run) is not None
    said = world.area().address.read()
    return said["host"], said["port"]


def test_a_file_is_read_in_pieces(there: World):
    name = names_of(0)[0]
    with closing(PartReader(serve(there), SECRET)) as reader:
        for start, n_bytes in ((0, 10), (5, 3000), (0, 0)):
            assert (
                reader.read(("the-run", 1, 4, 0, 0), name, start, n_bytes) == content(4, name)[start : start + n_bytes]
            )
        with pytest.raises(DamagedError, match="was damaged on its way"):
            reader.read(("the-run", 1, 4, 0, 0), name, 0, 1 << 20)
        for key in (("the-run", 1, 6, 0, 0), ("the-run", 2, 4, 0, 0), ("the-run", 1, 4, 0, 1), ("another", 1, 4, 0, 0)):
            with pytest.raises(DamagedError, match="does not hold"):
                reader.read(key, name, 0, 10)
        for other in ("model.00007.distcp", "../session", "ready.00000"):
            with pytest.raises(DamagedError, match="KeyError"):
                reader.read(("the-run", 1, 4, 0, 0), other, 0, 10)


def test_only_who_knows_the_secret_reads_and_is_believed(there: World, caplog: pytest.LogCaptureFixture):
    address = serve(there)
    for wrong in ("", "of another attempt"):
        with pytest.raises(OSError, match="closed the connection"):
            PartReader(address, wrong)
    assert "does not know the secret of this run, is refused" in caplog.text
    assert SECRET not in caplog.text
    assert SECRET not in repr(there.served(1, secret=SECRET))


def test_where_a_service_listens_counts_once_it_knows_the_attempt(there: World):
    """It may have begun with what the attempt before has left."""
    run = there.served(2, listen="127.0.0.1", secret="of the next attempt")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            assert there.area().lock(SERVICE_LOCK).take()
            server = keep_serving(None, there.area(), there.served(1, listen="127.0.0.1", secret=SECRET))
            os.write(writer, b"L")
            signal.sigwait({signal.SIGUSR1})
            keep_serving(server, there.area(), run)
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 1) == b"L"
        looks: list[float] = []

        def sleep(seconds: float) -> None:
            looks.append(seconds)
            os.kill(pid, signal.SIGUSR1) if len(looks) == 3 else None
            time.sleep(seconds)

        client = ServiceClient(there.area(), 2, there.place / "log", sleep=sleep)
        client.send(run)
        with closing(PartReader(client.address(), run.secret)) as part:
            assert part.newest("the-run", 2) is None
        assert len(looks) >= 3
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def test_a_service_that_was_stopped_is_left(there: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part_server, "PATIENCE_S", 0.2)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            host, port = serve(there)
            os.write(writer, f"{host} {port}".encode())
            signal.pause()
        finally:
            os._exit(1)
    try:
        host, port = os.read(reader, 100).decode().split()
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        with pytest.raises(TimeoutError):
            PartReader((host, int(port)), SECRET)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("master", "address"), [(None, "127.0.0.1"), (("127.0.0.1", 1), "127.0.0.1"), (("localhost", 1), "localhost")]
)
def test_where_other_nodes_reach_this_one(master: tuple[str, int] | None, address: str):
    assert address_of_this_node(master) == address
