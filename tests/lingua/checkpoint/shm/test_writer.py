"""Saves in the background, with real services: the bits are those of the call, and all that goes wrong is told."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import torch.distributed.checkpoint as stock
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lingua.checkpoint import capacity, layout, publish
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.shm import drain, service
from lingua.checkpoint.shm.area import SERVICE_LOCK, ShmArea, State, area_of, base, make_area, read_run, write_run
from lingua.checkpoint.shm.slot_writer import SMALL_BYTES, SlotWriter
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.files import DISK, Buffer, DiskError, Files, RunError, write_json
from lingua.run.failure import classify
from lingua.run.lock import OvertakenError, RunLock
from tests.fakes import At, FaultyFiles, FillingMemory, KillFiles
from tests.ranks import run_on_ranks
from tests.services import Services
from tests.slotted import events_in
from tests.tiny import assert_equal, make, snapshot, train


def args(shm: Path, keep: int = 0, linger_s: float = 0.0, **more: Any) -> CheckpointArgs:
    dump, evaluation = SaveEvery(every=1, keep=keep), SaveEvery(every=0)
    where = {"async_save_mode": "shm", "shm_path": str(shm)}
    return CheckpointArgs(dump=dump, eval=evaluation, linger_s=linger_s, **where, **more)


@pytest.fixture
def services(shm: Path) -> Iterator[Services]:
    with Services() as started:
        yield started


class GatedFiles(Files):
    """A disk that takes nothing until a file is there."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def write(self, descriptor: int, data: Buffer) -> None:
        wait_until(self.gate.exists)
        super().write(descriptor, data)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def wait_for_state(manager: CheckpointManager, area: ShmArea, number: int, state: State) -> None:
    """Wait, but not for a save that a bug has ended."""
    wait_until(lambda: manager.before_update() is None and area.slot(number).state() == state)


def facts_of(run_dir: Path, step: int) -> dict[str, Any]:
    folder = layout.folder(run_dir / layout.CHECKPOINTS, step)
    return orjson.loads((folder / layout.MANIFEST).read_bytes())["files"]


def done(run_dir: Path) -> list[int]:
    return layout.done_steps(run_dir / layout.CHECKPOINTS)


def events(area: ShmArea) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in events_in(area)]


# -- equality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_snapshot_is_of_the_moment_of_the_call(tmp_path: Path, shm: Path, services: Services, tied: bool):
    state = make(tied, dim=512)
    manager = CheckpointManager(args(shm), tmp_path / "background", start_service=services.start)
    direct = CheckpointManager(CheckpointArgs(), tmp_path / "direct")
    manager.prepare(state)
    direct.prepare(state)
    for first in (1, 5, 9):
        train(state, first, first)
        assert direct.save(first, state).published
        assert manager.save(first, state).staged
        train(state, first + 1, first + 3)
    train(state, 13, 13)
    report = manager.save(13, state, final=True)
    assert report.published
    assert report.size_bytes > 3 * 4 * 2 * 512 * 512
    manager.close()
    assert 13 in done(tmp_path / "background")
    for step in done(tmp_path / "background"):
        if step < 13:
            assert facts_of(tmp_path / "background", step) == facts_of(tmp_path / "direct", step)
    resumed = make(tied, dim=512)
    again = CheckpointManager(args(shm), tmp_path / "background", start_service=services.start)
    assert again.latest() == 13
    again.load(13, resumed)
    again.close()
    assert_equal(snapshot(state), snapshot(resumed))


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_saved_on_any_ranks_it_loads_on_any_ranks_and_in_stock_torch(tmp_path: Path, shm: Path, tied: bool):
    def save(rank: int, n: int) -> dict[str, Tensor]:
        state = make(tied, shard=n > 1)
        manager = CheckpointManager(args(shm), tmp_path / f"by{n}", start_service=services.start)
        manager.prepare(state)
        train(state, 1, 2)
        assert manager.save(2, state).staged
        then = snapshot(state)
        train(state, 3, 4)
        assert manager.save(4, state, final=True).published
        manager.close()
        return then

    def load(rank: int, n: int, saved_by: int) -> dict[str, Tensor]:
        state = make(tied, shard=n > 1)
        manager = CheckpointManager(CheckpointArgs(), tmp_path / f"by{saved_by}")
        manager.load(2, state)
        return snapshot(state)

    with Services() as services:
        saved = {n: run_on_ranks(lambda rank, n=n: save(rank, n), n)[0] for n in (1, 2, 3)}
        assert services.wait() == 0
        assert all(done(tmp_path / f"by{n}") == [2, 4] for n in saved)
    folder = layout.folder(tmp_path / "by3" / layout.CHECKPOINTS, 2)
    fresh = make(tied)
    loaded = {"model": fresh.model.state_dict()}
    stock.load(loaded, checkpoint_id=folder, no_dist=True)
    for name, tensor in loaded["model"].items():
        assert torch.equal(tensor, saved[3][name])
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    converted = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name, slots in converted["optim"]["state"].items():
        for key, tensor in slots.items():
            assert torch.equal(tensor, saved[3][f"{name}.{key}"])
    for loaded_by in (1, 2, 3):
        for of_rank in run_on_ranks(lambda rank, n=loaded_by: {m: load(rank, n, m) for m in saved}, loaded_by):
            for saved_by, result in of_rank.items():
                assert_equal(saved[saved_by], result)


@pytest.mark.ranks
def test_nodes_publish_together(tmp_path: Path, shm: Path, services: Services):
    """Three ranks on two nodes, each with memory and a service of its own."""

    def save(rank: int) -> tuple[dict[str, Tensor], list[bool]]:
        node = shm / ("left" if rank < 2 else "right")
        node.mkdir(exist_ok=True)
        state = make(shard=True)
        manager = CheckpointManager(args(node, keep=1), tmp_path, start_service=services.start)
        manager.prepare(state)
        published = []
        for step in (1, 2, 3):
            train(state, step, step)
            published.append(manager.save(step, state, final=step == 3).published)
        manager.close()
        return snapshot(state), published

    expected = run_on_ranks(save, 3)
    assert all(published == [False, False, True] for _, published in expected)
    assert services.wait() == 0
    root = tmp_path / layout.CHECKPOINTS
    assert done(tmp_path) == [3]
    assert not list(root.glob("incarnation-*/*"))
    assert sorted(log.name for log in tmp_path.glob("logs/checkpoint_service*")) == [
        "checkpoint_service.0.log",
        "checkpoint_service.1.log",
    ]
    state = make()
    CheckpointManager(CheckpointArgs(), tmp_path).load(3, state)
    assert_equal(expected[0][0], snapshot(state))
    assert not list(base(shm / "left").iterdir())
    assert not list(base(shm / "right").iterdir())


# -- slots -------------------------------------------------------------------------------------------------------


def save_behind_a_gate(rank: int, run_dir: Path, shm: Path, services: Services, gate: Path, slots: int) -> list[Any]:
    """Saves of steps 1 to 4 while the disk takes nothing, then it does; what each report said, and what was skipped."""
    state = make(shard=True)
    manager = CheckpointManager(args(shm, slots=slots), run_dir, start_service=services.start)
    manager.prepare(state)
    said: list[Any] = []
    for step in (1, 2, 3):
        train(state, step, step)
        report = manager.save(step, state)
        said.append((report.staged, report.published, report.error))
        if step == 1:
            wait_for_state(manager, area_of(run_dir, shm), 0, "draining")
    if rank == 0:
        threading.Timer(0.2, gate.touch).start()
    assert manager.save(4, state, final=True).published
    said.append(manager.metrics()["checkpoint/skipped"])
    manager.close()
    return said


@pytest.mark.ranks
@pytest.mark.parametrize("slots", [1, 2])
def test_where_every_slot_is_busy_the_newest_wait_or_are_skipped(tmp_path: Path, shm: Path, slots: int):
    gate = tmp_path / "gate"
    with Services(lambda n: GatedFiles(gate)) as services:
        said = run_on_ranks(lambda r: save_behind_a_gate(r, tmp_path, shm, services, gate, slots), 2)
    assert said[0] == said[1]
    *reports, n_skipped = said[0]
    if slots == 1:
        assert reports[0] == (True, False, None)
        for step, (staged, published, error) in zip((2, 3), reports[1:], strict=True):
            assert (staged, published) == (False, False)
            assert error == f"checkpoint {step} is skipped: every slot is still being written to the disk"
        assert n_skipped == 2
    else:
        assert reports == [(True, False, None)] * 3
        assert n_skipped == 0
    assert done(tmp_path) == [1, 4]  # with two slots, 2 gave way to 3 and 3 to 4


def test_a_step_on_its_way_is_not_staged_again(tmp_path: Path, shm: Path):
    gate = tmp_path / "gate"
    with Services(lambda n: GatedFiles(gate)) as services:
        state = make()
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        assert manager.save(2, state).staged
        area = area_of(tmp_path, shm)
        wait_for_state(manager, area, 0, "draining")
        timer = threading.Timer(0.1, gate.touch)
        timer.start()
        assert manager.save(2, state, final=True).published
        timer.join()
        assert area.slot(1).ready(0).read() is None
        assert events(area) == [("published", 2)]
        manager.close()


def test_runs_on_one_node_do_not_meet(tmp_path: Path, shm: Path, services: Services):
    managers, states = [], []
    for name in ("one", "two"):
        state = make(name=name)
        train(state, 1, len(name))
        managers.append(CheckpointManager(args(shm), tmp_path / name / "run", start_service=services.start))
        managers[-1].prepare(state)
        states.append(state)
    for manager, state in zip(managers, states, strict=True):
        manager.save(1, state)
    for manager, state in zip(managers, states, strict=True):
        assert manager.save(2, state, final=True).published
        manager.close()
    assert services.wait() == 0
    for name in ("one", "two"):
        state = make()
        CheckpointManager(CheckpointArgs(), tmp_path / name / "run").load(2, state)
        assert state.shared["name"] == name
    assert not list(base(shm).iterdir())


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "limit", "n_slots", "sentence"),
    [
        (1 << 40, None, 2, ""),
        (capacity.RESERVE_BYTES + 100_000, None, 2, ""),
        (
            capacity.RESERVE_BYTES + 60_000,
            None,
            1,
            r"2 slots take 2 x .* of this node's memory; /dev/shm has .* 1 slots",
        ),
        (
            1 << 40,
            (capacity.RESERVE_BYTES + 60_000, 0),
            1,
            r"the job's memory limit 256\.\d MiB with 0 B in use; 1 slots",
        ),
        (capacity.RESERVE_BYTES, None, 0, r"saves are synchronous: 1 slots take 1 x .*; lower the memory use"),
    ],
)
def test_fewer_slots_then_none_where_memory_is_short(
    tmp_path: Path,
    shm: Path,
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
    limit: tuple[int, int] | None,
    n_slots: int,
    sentence: str,
):
    monkeypatch.setattr("lingua.checkpoint.capacity.free_bytes", lambda path: free)
    monkeypatch.setattr(capacity, "memory_limit", lambda text: limit or (None, 0))
    caplog.set_level(logging.WARNING)
    manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
    manager.prepare(make(dim=16))
    assert re.search(sentence, caplog.text)
    assert len(area_of(tmp_path, shm).slots()) == n_slots
    report = manager.save(1, make(dim=16))
    assert (report.staged, report.published) == ((True, False) if n_slots else (False, True))
    assert report.synchronous == (n_slots == 0) == bool(manager.metrics()["checkpoint/synchronous"])
    assert manager.save(2, make(dim=16), final=True).published
    manager.close()
    assert 2 in done(tmp_path)


def test_strict_asks_for_memory(tmp_path: Path, shm: Path, services: Services, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lingua.checkpoint.capacity.free_bytes", lambda path: 0)
    manager = CheckpointManager(args(shm, strict=True), tmp_path, start_service=services.start)
    with pytest.raises(RunError, match=r"/dev/shm has 0 B free.*or allow synchronous saves with checkpoint.strict=f"):
        manager.prepare(make())
    manager.close()


@pytest.mark.ranks
@pytest.mark.parametrize("full_from_slot", [0, 1])
def test_memory_that_is_full_for_one_rank_is_so_for_all(tmp_path: Path, shm: Path, full_from_slot: int):
    def save(rank: int) -> tuple[list[Any], str]:
        allocate, n_done = os.posix_fallocate, 0

        def allocate_or_fail(descriptor: int, offset: int, n_bytes: int) -> None:
            nonlocal n_done
            is_small = n_bytes == SMALL_BYTES  # one per slot
            if rank == 1 and is_small and n_done == full_from_slot:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            n_done += is_small
            allocate(descriptor, offset, n_bytes)

        os.posix_fallocate = allocate_or_fail
        said: list[str] = []
        logging.getLogger("lingua").addHandler(handler := logging.Handler())
        handler.emit = lambda record: said.append(record.getMessage())  # pyright: ignore[reportAttributeAccessIssue]
        state = make(shard=True)
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        manager.prepare(state)
        reports = [manager.save(step, state, final=step == 3) for step in (1, 2, 3)]
        manager.close()
        return [(report.staged, report.published) for report in reports], "\n".join(said)

    with Services() as services:
        (first, said), (second, _) = run_on_ranks(save, 2)
    assert first == second
    assert 3 in done(tmp_path)
    assert "rank 1: a slot cannot be allocated: [Errno 28] No space left on device: '/dev/shm/" in said
    if full_from_slot == 0:
        assert first == [(False, True)] * 3
        assert "saves are synchronous" in said
    else:
        assert first[0] == (True, False)
        assert first[2] == (True, True)
        assert said.count("No space left") == 1


def test_slots_stay_and_those_not_wanted_any_more_do_not(tmp_path: Path, shm: Path, services: Services):
    area = area_of(tmp_path, shm)
    for n_slots in (3, 1, 2):
        manager = CheckpointManager(args(shm, slots=n_slots, linger_s=60), tmp_path, start_service=services.start)
        manager.prepare(make())
        assert manager.save(n_slots, make(), final=True).published
        manager.close()
        assert [slot.number for slot in area.slots()] == list(range(n_slots))
        free = {f"slot-{n}.free" for n in range(n_slots)}  # the service says so after it has published
        wait_until(lambda free=free: {path.name for path in area.folder.glob("slot-*.*")} == free)
    assert services.kill() == 1  # one for all three


# -- memory that fills later -----------------------------------------------------------------------------------------


@dataclass
class Memory:
    """A small memory file system, and how somebody fills it."""

    path: Path
    fill: Callable[[], object]
    prepare: Callable[[], None] = lambda: None
    """For services."""


@pytest.fixture(params=["fake", "mounted"])
def memory(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    monkeypatch.setattr(capacity, "RESERVE_BYTES", 0)
    if request.param == "fake":
        shm, full = request.getfixturevalue("shm"), tmp_path / "full"
        filling = FillingMemory(shm, full)
        filling(monkeypatch.setattr)
        yield Memory(shm, full.touch, filling)
        return
    shm = tmp_path / "shm"
    shm.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=200", "tmpfs", str(shm)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount")
    yield Memory(shm, lambda: fill(shm))
    subprocess.run(["umount", "--lazy", shm], check=True)


def fill(memory: Path) -> None:
    """Take all that is left, names and bytes."""
    for n in itertools.count():
        try:
            (memory / f"somebody's.{n}").touch()
        except OSError:
            break
    with (memory / "somebody's.0").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_memory_that_somebody_fills_in_mid_run_costs_no_checkpoint(tmp_path: Path, memory: Memory):
    with Services(prepare=memory.prepare) as services:
        for steps, start in ((range(1, 6), None), (range(6, 8), 5)):  # the second begins in memory that is full
            manager = CheckpointManager(args(memory.path, linger_s=60), tmp_path, start_service=services.start)
            assert manager.latest() == start
            state = make()
            manager.prepare(state)
            for step in steps:
                report = manager.save(step, state, final=step == steps[-1])
                assert report.staged, report.error
                assert report.published == (step == steps[-1])
                if step < steps[-1]:
                    wait_until(lambda step=step: step in done(tmp_path))
                memory.fill() if step == 1 else None
            manager.close()
        assert services.kill() == 1
    assert done(tmp_path) == list(range(1, 8))


def test_a_snapshot_in_memory_that_somebody_filled_is_saved_by_the_next_start(tmp_path: Path, memory: Memory):
    with Services(lambda n: GatedFiles(tmp_path / "never"), memory.prepare) as services:
        manager = CheckpointManager(args(memory.path), tmp_path, start_service=services.start)
        assert manager.save(1, make(step=1)).staged
        wait_for_state(manager, area_of(tmp_path, memory.path), 0, "draining")
        memory.fill()
        assert manager.save(2, make(step=2)).staged
        manager.close()
        assert services.kill() == 1
    with Services(prepare=memory.prepare) as services:
        manager = CheckpointManager(args(memory.path), tmp_path, start_service=services.start)
        assert manager.latest() == 2
        manager.close()


@pytest.mark.parametrize("strict", [False, True])
def test_memory_that_is_full_when_a_run_starts(
    tmp_path: Path, memory: Memory, strict: bool, caplog: pytest.LogCaptureFixture
):
    memory.fill()
    sentence = r"there is no room in memory for checkpoints: .*/lingua-\d+: No space left on device"
    with Services(prepare=memory.prepare) as services:
        if strict:
            with pytest.raises(RunError, match=sentence + "; or allow synchronous saves with checkpoint.strict=false"):
                CheckpointManager(args(memory.path, strict=True), tmp_path, start_service=services.start)
            return
        manager = CheckpointManager(args(memory.path), tmp_path, start_service=services.start)
        assert re.search("saves are synchronous: " + sentence, caplog.text)
        manager.prepare(make())
        assert manager.save(1, make()).published
        assert manager.save(2, make(), final=True).published
        manager.close()
    assert done(tmp_path) == [1, 2]


@pytest.mark.parametrize("what", [r"reserve .*/session", r"reserve .*/events", r"reserve .*/slot-1\.free"])
def test_memory_that_has_no_room_for_its_own_papers(
    tmp_path: Path, shm: Path, services: Services, what: str, caplog: pytest.LogCaptureFixture
):
    files = FaultyFiles(At(what))
    manager = CheckpointManager(args(shm), tmp_path, start_service=services.start, files=files)
    manager.prepare(make())
    assert "saves are synchronous: there is no room in memory for checkpoints: reserve: No space left" in caplog.text
    assert manager.save(1, make()).published
    manager.close()


LOSSES = [
    r"write .*/slot-0\.free",
    r"rename .*/slot-0\.free",
    r"write .*/train_state",
    r"reserve .*/ready",
    r"write .*/ready",
]
"""What may fail in a save: the mark, this rank's JSON, its word that it is ready."""


def saved_once(run_dir: Path, shm: Path, services: Services, then_fails: str, **more: Any) -> CheckpointManager:
    """Checkpoint 1 is published; what fails then fails once."""
    files = FaultyFiles()
    manager = CheckpointManager(args(shm, **more), run_dir, start_service=services.start, files=files)
    manager.prepare(make())
    manager.save(1, make())
    wait_until(lambda: manager.before_update() is None and done(run_dir) == [1])
    wait_for_state(manager, area_of(run_dir, shm), 0, "free")
    files.fail_at, files.log = At(then_fails), []
    return manager


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("what", LOSSES)
def test_a_last_save_that_memory_loses_is_made_on_the_disk(
    tmp_path: Path, shm: Path, services: Services, what: str, strict: bool, caplog: pytest.LogCaptureFixture
):
    manager = saved_once(tmp_path, shm, services, what, strict=strict)
    report = manager.save(2, make(), final=True)
    assert (report.staged, report.published) == (False, True)
    assert "saves are synchronous: checkpoint 2 is lost: [Errno 28] No space left on device" in caplog.text
    manager.close()
    assert done(tmp_path) == [1, 2]


@pytest.mark.parametrize("what", LOSSES)
def test_after_a_save_that_memory_loses_saves_are_synchronous(
    tmp_path: Path, shm: Path, services: Services, what: str, caplog: pytest.LogCaptureFixture
):
    manager = saved_once(tmp_path, shm, services, what)
    assert manager.save(2, make()).staged
    assert manager.save(3, make()).published
    assert "saves are synchronous: rank 0: the last checkpoint is lost: [Errno 28] No space left" in caplog.text
    assert manager.save(4, make(), final=True).published
    manager.close()
    assert done(tmp_path) == [1, 3, 4]


def test_strict_goes_on_in_the_background_after_a_loss(
    tmp_path: Path, shm: Path, services: Services, caplog: pytest.LogCaptureFixture
):
    manager = saved_once(tmp_path, shm, services, r"write .*/train_state", strict=True)
    for step in (2, 3):
        assert manager.save(step, make()).staged
    assert "rank 0: the last checkpoint is lost: [Errno 28] No space left" in caplog.text
    assert manager.save(4, make(), final=True).published
    manager.close()
    assert 2 not in done(tmp_path)


@pytest.mark.ranks
def test_a_last_save_that_one_rank_s_memory_loses_is_made_on_the_disk_by_all(tmp_path: Path, shm: Path):
    def save(rank: int) -> tuple[bool, bool]:
        state = make(shard=True)
        files = FaultyFiles(At(r"write .*/train_state") if rank == 1 else 0)
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start, files=files)
        manager.prepare(state)
        report = manager.save(1, state, final=True)
        manager.close()
        return report.staged, report.published

    with Services() as services:
        assert run_on_ranks(save, 2) == [(False, True)] * 2
    assert done(tmp_path) == [1]


def test_what_another_version_left_in_memory_is_in_nobodys_way(tmp_path: Path, shm: Path, services: Services):
    area = make_area(tmp_path, shm)
    area.session.reserve()
    area.session.write({"run_id": "x", "run_dir": str(tmp_path), "dump": [1, 0], "keep_every": 0})
    manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
    assert manager.save(1, make(), final=True).published
    manager.close()


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_service_killed_at_any_operation_is_replaced(tmp_path: Path, shm: Path):
    with Services() as services:
        save_twice(tmp_path / "calm", shm, services)
    for kill_at in range(1, 60, 2):
        with Services(lambda n, kill_at=kill_at: KillFiles(kill_at) if n == 1 else DISK) as services:
            save_twice(tmp_path / str(kill_at), shm, services)
            assert services.wait() == 0
            if list(base(shm).iterdir()):  # killed after its last word: the next start gives the memory back
                CheckpointManager(args(shm, keep=1), tmp_path / str(kill_at), start_service=services.start).close()
        assert 2 in done(tmp_path / str(kill_at))
        assert facts_of(tmp_path / str(kill_at), 2) == facts_of(tmp_path / "calm", 2)
        publish.open_staging_dir(tmp_path / str(kill_at) / layout.CHECKPOINTS, 9)
        assert not list((tmp_path / str(kill_at)).rglob("*.trash"))
        assert not list(base(shm).iterdir())


def save_twice(run_dir: Path, shm: Path, services: Services) -> None:
    state = make()
    manager = CheckpointManager(args(shm, keep=1), run_dir, start_service=services.start)
    manager.prepare(state)
    train(state, 1, 1)
    assert manager.save(1, state).staged
    train(state, 2, 2)
    assert manager.save(2, state, final=True).published
    manager.close()


def test_a_service_that_dies_again_and_again_ends_the_run(tmp_path: Path, shm: Path):
    with Services(lambda n: KillFiles(1)) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        manager.save(1, make())
        sentence = r"the checkpoint service of this node has ended 4 times; see .*/logs/checkpoint_service\.0\.log"
        with pytest.raises(RunError, match=sentence):
            manager.save(2, make(), final=True)
        manager.close()


class BrokenFiles(Files):
    """A bug."""

    def fsync_dir(self, path: Path) -> None:
        if path.name == "0000000001":
            raise ZeroDivisionError("what was never thought of")
        super().fsync_dir(path)


def test_a_bug_of_the_service_reaches_the_loop(tmp_path: Path, shm: Path):
    with Services(lambda n: BrokenFiles()) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        manager.save(1, make())
        area = area_of(tmp_path, shm)
        wait_until(lambda: ("failed", 0) in events(area))
        with pytest.raises(RunError, match="ZeroDivisionError: what was never thought of"):
            manager.save(2, make())
        manager.close()


def test_a_stopped_service_is_named_when_saves_are_skipped(tmp_path: Path, shm: Path, caplog: pytest.LogCaptureFixture):
    gate = tmp_path / "gate"
    with Services(lambda n: GatedFiles(gate)) as services:
        manager = CheckpointManager(args(shm, slots=1), tmp_path, start_service=services.start)
        manager.save(1, make())
        area = area_of(tmp_path, shm)
        wait_for_state(manager, area, 0, "draining")
        lock = area.lock(SERVICE_LOCK)
        pid = lock.holder()
        lock.close()
        assert pid is not None
        assert "is skipped" in str(manager.save(2, make()).error)
        assert "is stopped" not in caplog.text  # the disk is only slow
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T")
        assert "is skipped" in str(manager.save(3, make()).error)
        assert f"process {pid}, is stopped and saves nothing; `kill -CONT {pid}` lets it go on" in caplog.text
        os.kill(pid, signal.SIGCONT)
        gate.touch()
        assert manager.save(4, make(), final=True).published
        manager.close()


def test_a_start_that_was_overtaken_ends(tmp_path: Path, shm: Path):
    gate = tmp_path / "gate"
    with Services(lambda n: GatedFiles(gate)) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        manager.save(1, make())
        wait_for_state(manager, area_of(tmp_path, shm), 0, "draining")
        publish.open_staging_dir(tmp_path / layout.CHECKPOINTS, 5)
        gate.touch()
        with pytest.raises(RunError, match="a newer attempt of this run has begun"):
            manager.save(2, make(), final=True)
        manager.close()
    assert done(tmp_path) == []
    kept = area_of(tmp_path, shm).slot(0).complete()  # the newer start may die before it saves anything
    assert kept is not None
    assert kept[0].step == 1


@pytest.mark.parametrize("final", [False, True])
def test_a_start_whose_memory_serves_a_newer_one_touches_nothing_there(
    tmp_path: Path, shm: Path, services: Services, final: bool
):
    """Both on one node, as where a container hid the first from the second."""
    manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
    manager.prepare(make())
    area = area_of(tmp_path, shm)
    first = read_run(area)
    assert first is not None
    newer = replace(first, attempt=1)
    write_run(area, newer)
    with pytest.raises(RunError, match=r"attempt 1 of this run has taken over .*, attempt 0, stops") as caught:
        manager.save(2, make(), final=final)
    manager.close()
    assert classify(caught.value) == "occupied"
    assert read_run(area) == newer
    assert done(tmp_path) == []


def test_a_start_does_not_wait_for_the_disk_to_hear_that_it_was_overtaken(
    tmp_path: Path, shm: Path, services: Services
):
    with RunLock(tmp_path) as lock:
        manager = CheckpointManager(args(shm), tmp_path, lock=lock, start_service=services.start)
        told = threading.Event()
        lock.on_lost = lambda error: told.set()
        write_json(tmp_path / "incarnations" / "0000000002.json", {})
        manager.save(1, make())  # asks the heartbeat's thread
        assert told.wait(60.0)
        with pytest.raises(OvertakenError):
            manager.save(2, make())
        manager.close()


def test_what_an_older_start_was_writing_when_shut_out_does_not_end_the_new_one(tmp_path: Path, shm: Path):
    gate = tmp_path / "gate"
    with Services(lambda n: GatedFiles(gate)) as services:
        old = RunLock(tmp_path)
        old.acquire()
        manager = CheckpointManager(args(shm), tmp_path, lock=old, start_service=services.start)
        manager.save(1, make(step=1))
        wait_for_state(manager, area_of(tmp_path, shm), 0, "draining")
        manager.close()
        old.release()
        with RunLock(tmp_path) as lock, pytest.MonkeyPatch.context() as patch:
            patch.setattr(drain, "HANDOVER_S", 0.0)
            threading.Timer(0.2, gate.touch).start()
            manager = CheckpointManager(args(shm), tmp_path, lock=lock, start_service=services.start)
            assert manager.latest() == 1  # it was in memory, and is saved by the new start
            manager.prepare(make())
            manager.save(2, make())
            assert manager.save(3, make(), final=True).published
            manager.close()


@pytest.mark.ranks
def test_a_bug_on_one_rank_ends_all(tmp_path: Path, shm: Path):
    def save(rank: int) -> str:
        state = make(shard=True)
        if rank == 1:
            state.per_rank = {"data": object()}
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        with pytest.raises(TypeError if rank == 1 else RunError) as caught:
            manager.save(1, state)
        manager.close()
        return str(caught.value)

    with Services() as services:
        elsewhere, here = run_on_ranks(save, 2)
    assert "not JSON serializable" in here
    assert elsewhere == f"rank 1: TypeError: {here}"


def bug(*_: object) -> Any:
    raise NameError("name 'oops' is not defined")


@pytest.mark.ranks
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("where", ["_allocate", "_write_small"])
def test_a_bug_in_the_staging_thread_of_one_rank_ends_all(tmp_path: Path, shm: Path, where: str, final: bool):
    """Whether the others wait for a slot or for the end of the last save."""

    def save(rank: int) -> str:
        if rank == 1:
            setattr(SlotWriter, where, bug)
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        state = make(shard=True)
        with pytest.raises(NameError if rank == 1 else RunError) as caught:  # noqa: PT012 - either save may
            if not final:
                manager.save(1, state)
            manager.save(2, state, final=final)
        manager.close()
        return str(caught.value)

    with Services() as services:
        assert run_on_ranks(save, 2) == ["rank 1: NameError: name 'oops' is not defined", "name 'oops' is not defined"]
    assert done(tmp_path) == []


@pytest.mark.parametrize("where", ["_allocate", "_write_small"])
def test_a_bug_in_the_staging_thread_is_raised_before_the_next_update(
    tmp_path: Path, shm: Path, services: Services, where: str, monkeypatch: pytest.MonkeyPatch
):
    """And not only at the next save, which may be hours away."""
    monkeypatch.setattr(SlotWriter, where, bug)
    manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
    manager.prepare(make())
    if where == "_write_small":
        assert manager.save(1, make()).staged
    assert manager._background is not None
    assert manager._background._writer is not None
    manager._background._writer._worker.shutdown()  # the thread has ended
    with pytest.raises(NameError, match="oops"):
        manager.before_update()
    manager.close()
    assert done(tmp_path) == []


def test_a_slot_that_somebody_overwrites_is_never_published(tmp_path: Path, shm: Path):
    gate = tmp_path / "gate"
    with Services(lambda n: GatedFiles(gate)) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        manager.save(1, make())
        area = area_of(tmp_path, shm)
        wait_for_state(manager, area, 0, "draining")
        with (area.slot(0).folder / layout.optim_file(0)).open("r+b") as file:
            file.seek(1000)
            file.write(b"somebody")
        threading.Timer(0.1, gate.touch).start()
        with pytest.raises(RunError, match=r"checkpoint 1 is lost.*was changed after it was staged"):
            manager.save(1, make(), final=True)
        assert manager.save(2, make(), final=True).published
        manager.close()
    assert done(tmp_path) == [2]


# -- the end of a run ----------------------------------------------------------------------------------------------


def test_what_is_not_on_the_disk_when_the_job_ends_is_left_to_the_service(tmp_path: Path, shm: Path):
    gate = tmp_path / "gate"
    with Services(lambda n: GatedFiles(gate)) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        report = manager.save(1, make(), final=True, deadline_s=time.time())
        assert report.staged
        assert not report.published
        assert re.fullmatch(r"checkpoint 1 is in the memory of \S+, but not on the disk yet", str(report.error))
        manager.close()
        gate.touch()
    assert done(tmp_path) == [1]


def impatient() -> None:
    """In a service: it tries a disk that has failed again soon."""
    setattr(service, "pause_s", lambda attempt: 0.01)  # noqa: B010


def refusing(error: int) -> Callable[[int], Files]:
    """The disk of each service: it never takes a checkpoint."""
    return lambda n: FaultyFiles(1, error=error, lasting=True, operations=("mkdir",))


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_a_disk_that_refuses_the_last_save_once_is_asked_again(tmp_path: Path, shm: Path, error: int):
    with Services(lambda n: FaultyFiles(At("fsync "), error=error), impatient) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        assert manager.save(1, make(), final=True).published
        manager.close()
    assert done(tmp_path) == [1]


def test_of_a_run_that_is_asked_to_stop_the_snapshot_in_memory_counts(tmp_path: Path, shm: Path):
    """The disk goes on failing, and nobody knows when the job ends."""
    with Services(refusing(errno.EIO), impatient) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        report = manager.save(1, make(), final=True, stopping=True)
        assert (report.staged, report.published) == (True, False)
        assert re.search(r"is in the memory of \S+, but not on the disk yet \(.*Input/output error", str(report.error))
        manager.close()
        assert services.kill() == 1
    with Services(lambda n: FaultyFiles(At("fsync "), error=errno.EIO), impatient) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        assert manager.latest() == 1, "the next start saves it, also where its disk fails once more"
        manager.close()


def test_a_start_that_cannot_save_what_it_finds_in_memory_is_tried_again(tmp_path: Path, shm: Path):
    with Services(refusing(errno.EIO), impatient) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        manager.save(1, make(), final=True, stopping=True)
        manager.close()
        assert services.kill() == 1
    with Services(refusing(errno.ESTALE), impatient) as services:
        with pytest.raises(DiskError, match=r"it cannot be saved: .*Stale file handle.* start again on") as caught:
            CheckpointManager(args(shm), tmp_path, start_service=services.start).latest()
        assert (caught.value.errno, classify(caught.value)) == (errno.ESTALE, "disk")
        services.kill()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_the_last_save_is_one_sentence(tmp_path: Path, shm: Path, error: int):
    sentence = {errno.ENOSPC: "the disk is full at .*; make room", errno.EDQUOT: "the disk quota is used up at"}
    with Services(refusing(error), impatient) as services:
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        with pytest.raises(DiskError, match=sentence.get(error, os.strerror(error)) + ".*it stays in memory") as caught:
            manager.save(1, make(), final=True)
        assert caught.value.errno == error
        manager.close()
        assert services.kill() == 1
    with Services() as services:  # the next start finds it
        manager = CheckpointManager(args(shm), tmp_path, start_service=services.start)
        assert manager.latest() == 1
        manager.close()
    assert not list(base(shm).iterdir())


def test_a_limit_on_bandwidth_ends_with_the_run(tmp_path: Path, shm: Path):
    def small_chunks() -> None:
        setattr(drain, "CHUNK_BYTES", 256)  # noqa: B010

    with Services(prepare=small_chunks) as services:  # one byte per second
        manager = CheckpointManager(args(shm, bandwidth_gb_per_s=1e-9), tmp_path, start_service=services.start)
        manager.save(1, make())
        wait_for_state(manager, area_of(tmp_path, shm), 0, "draining")
        assert manager.save(1, make(), final=True).published
        manager.close()


def test_metrics(tmp_path: Path, shm: Path, services: Services):
    clock = [1000.0]
    manager = CheckpointManager(args(shm), tmp_path, start_service=services.start, now=lambda: clock[0])
    manager.prepare(make())
    clock[0] = 1005.0
    assert manager.metrics() == {
        "checkpoint/skipped": 0.0,
        "checkpoint/age_of_newest_done_s": 5.0,
        "checkpoint/lost_work_at_risk_s": 5.0,
    }
    manager.save(1, make())
    clock[0] = 1010.0
    wait_until(lambda: done(tmp_path) == [1] and "checkpoint/drain_gb_per_s" in manager.metrics())
    clock[0] = 1012.0
    found = manager.metrics()
    assert found["checkpoint/age_of_newest_done_s"] == 2.0
    assert found["checkpoint/lost_work_at_risk_s"] == 7.0  # what was done since the snapshot
    assert found["checkpoint/stall_s"] > 0
    manager.close()
