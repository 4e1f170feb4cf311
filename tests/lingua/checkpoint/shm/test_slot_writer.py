"""Staging without services: what lies in a slot are a checkpoint's files, and what cannot be done is told."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lingua.checkpoint import dcp, layout, publish
from lingua.checkpoint.publish import FileFacts, Manifest
from lingua.checkpoint.shm import slot_writer
from lingua.checkpoint.shm.area import Save, ShmArea, Slot, make_area, write_run
from lingua.checkpoint.shm.slot_writer import SMALL_BYTES, SlotFile, SlotWriter
from lingua.checkpoint.state import Tensors, TrainState, tensors_of
from lingua.files import DISK, Files
from tests.fakes import FaultyFiles
from tests.slotted import RUN_ID, World
from tests.tiny import assert_equal, make, snapshot, train

CPU = torch.device("cpu")


def plan_of(tensors: Tensors) -> dcp.WritePlan:
    local = dcp.local_plan(tensors.by_name, is_coordinator=True)
    plans, metadata = dcp.global_plan([local], tensors.paths, tensors.aliases)
    return dcp.write_plan(tensors.by_name, plans[0], 0, metadata)


class NoRoomFrom:
    """`os.posix_fallocate` of a disk that is full from the n-th allocation on, n from 0."""

    def __init__(self, n: int) -> None:
        self.n_done, self._n, self._allocate = 0, n, os.posix_fallocate

    def __call__(self, descriptor: int, offset: int, n_bytes: int) -> None:
        if self.n_done == self._n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.n_done += 1
        self._allocate(descriptor, offset, n_bytes)


def copied(folder: Path, slot: Slot, facts: Manifest) -> Path:
    """The files of a slot as a checkpoint has them: without what they have in reserve."""
    folder.mkdir()
    for name, fact in facts.items():
        (folder / name).write_bytes((slot.folder / name).read_bytes()[: fact.size_bytes])
    return folder


def with_slots(folder: Path, n_slots: int) -> ShmArea:
    area = make_area(folder / "run", folder)
    for number in range(n_slots):
        if not area.slot(number).folder.exists():
            area.slot(number).make()
    return area


def stager_of(folder: Path, state: TrainState, n_slots: int = 1, files: Files = DISK) -> SlotWriter:
    area = with_slots(folder, n_slots)
    writer = SlotWriter(area, 0, plan_of(tensors_of(state)), device=CPU, files=files)
    writer.allocate(n_slots)
    return writer


def save(step: int) -> Save:
    return Save("run", 1, step, (0,))


@pytest.mark.parametrize("tied", [False, True])
def test_a_slot_holds_the_files_of_a_checkpoint(tmp_path: Path, tied: bool):
    state = make(tied)
    writer = stager_of(tmp_path, state)
    assert writer.usable_slots() == ({0}, None)
    slot = make_area(tmp_path / "run", tmp_path).slot(0)
    for step in (1, 2):  # the second into the same memory
        train(state, step, step)
        slot.put_mark(save(step))
        writer.fill(0, save(step), tensors_of(state).by_name, b"{}", state.model)
        expected = snapshot(state)
        train(state, step + 1, step + 1)  # goes on at once
        train_back = make(tied)
        assert writer.wait_until_ready() is None
        found = slot.complete()
        assert found is not None
        assert found[0] == save(step)
        folder = copied(tmp_path / str(step), slot, found[1])
        assert publish.damage(folder, found[1]) == []
        dcp.read_into(folder, tensors_of(train_back).by_name)
        assert_equal(expected, snapshot(train_back))
        state = train_back
    writer.close()


def test_a_slot_that_is_being_filled_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state, hashing = make(), threading.Event()
    writer = stager_of(tmp_path, state)
    writer.usable_slots()
    slot = make_area(tmp_path / "run", tmp_path).slot(0)
    slot.put_mark(save(1))
    writer.fill(0, save(1), tensors_of(state).by_name, b"{}", state.model)
    assert writer.wait_until_ready() is None
    assert slot.complete() is not None
    facts = SlotFile.facts
    monkeypatch.setattr(SlotFile, "facts", lambda file: (hashing.wait(10), facts(file))[1])
    writer.fill(0, save(1), tensors_of(state).by_name, b"{}", state.model)  # the same step: only READY tells
    assert slot.complete() is None
    hashing.set()
    assert writer.wait_until_ready() is None
    assert slot.complete() is not None
    writer.close()


@pytest.mark.parametrize("operation", ["reserve", "write", "close"])
def test_memory_that_fails_is_told_and_leaves_nothing_ready(tmp_path: Path, operation: str):
    state = make()
    writer = stager_of(tmp_path, state)
    writer.usable_slots()
    slot = make_area(tmp_path / "run", tmp_path).slot(0)
    slot.put_mark(save(1))
    writer.fill(0, save(1), tensors_of(state).by_name, b"{}", state.model)
    assert writer.wait_until_ready() is None
    writer._files = FaultyFiles(1, lasting=True, operations=(operation,))  # pyright: ignore[reportPrivateUsage]
    writer.fill(0, save(2), tensors_of(state).by_name, b"{}", state.model)
    error = writer.wait_until_ready()
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert writer.wait_until_ready() is None  # told once
    slot.put_mark(save(2))
    assert slot.complete() is None
    writer.close()


@pytest.mark.parametrize("n_files", range(5))
def test_slots_without_room_are_left_out_and_give_back_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_files: int
):
    with_slots(tmp_path, 2)
    monkeypatch.setattr(os, "posix_fallocate", NoRoomFrom(5 + n_files))  # weights, optimizer, two small ones, `ready`
    writer = stager_of(tmp_path, make(), n_slots=2)
    usable, error = writer.usable_slots()
    assert usable == {0}
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert writer.usable_slots() == ({0}, None)
    area = make_area(tmp_path / "run", tmp_path)
    assert list(area.slot(1).folder.iterdir()) == []
    writer.close()


def test_what_a_save_writes_was_allocated_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = make()
    writer = stager_of(tmp_path, state)
    writer.usable_slots()
    slot = make_area(tmp_path / "run", tmp_path).slot(0)
    slot.make()
    monkeypatch.setattr(os, "posix_fallocate", NoRoomFrom(0))
    files = FaultyFiles()
    writer._files = files  # pyright: ignore[reportPrivateUsage]
    for step, n_bytes in enumerate((2, SMALL_BYTES, 10)):
        slot.put_mark(save(step), files=files)
        writer.fill(0, save(step), tensors_of(state).by_name, b"x" * n_bytes, state.model)
        assert writer.wait_until_ready() is None
        found = slot.complete()
        assert found is not None
        assert found[1][layout.train_state_file(0)].size_bytes == n_bytes
        assert slot.change("staged", "free", files=files)
    assert {line.split()[0] for line in files.log} == {"reserve", "write", "close", "rename"}
    writer.fill(0, save(9), tensors_of(state).by_name, b"x" * (SMALL_BYTES + 1), state.model)
    assert getattr(writer.wait_until_ready(), "errno", None) == errno.ENOSPC
    writer.close()


def test_closing_does_not_wait_for_the_whole_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_slots(tmp_path, 9)
    allocate, begun, go_on = os.posix_fallocate, threading.Event(), threading.Event()
    n_done = 0

    def allocate_slowly(descriptor: int, offset: int, n_bytes: int) -> None:
        nonlocal n_done
        n_done += 1
        begun.set()
        go_on.wait(10)
        allocate(descriptor, offset, n_bytes)

    monkeypatch.setattr(os, "posix_fallocate", allocate_slowly)
    writer = stager_of(tmp_path, make(), n_slots=9)
    assert begun.wait(10)
    closing = threading.Thread(target=writer.close)
    closing.start()
    while not writer._closing.is_set():  # pyright: ignore[reportPrivateUsage]
        pass
    go_on.set()
    closing.join()
    assert n_done == 1


@pytest.mark.parametrize("planted", ["link", "second name"])
def test_a_file_that_somebody_planted_is_replaced(tmp_path: Path, planted: str):
    area = make_area(tmp_path / "run", tmp_path)
    area.slot(0).make()
    target = tmp_path / "theirs"
    target.write_bytes(b"theirs")
    name = area.slot(0).folder / layout.model_file(0)
    name.symlink_to(target) if planted == "link" else name.hardlink_to(target)
    writer = stager_of(tmp_path, make())
    assert writer.usable_slots() == ({0}, None)
    writer.close()
    assert target.read_bytes() == b"theirs"
    assert not name.is_symlink()


@pytest.mark.parametrize("at", ["copied", "hashed"])
def test_a_rank_that_was_stopped_in_a_save_and_wakes_up_after_a_newer_attempt_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
):
    """It goes on with its copy into memory that it has mapped, and reports what it staged."""
    state, area, asleep, wake = make(), with_slots(tmp_path, 1), threading.Event(), threading.Event()
    served = World(tmp_path).served(1)
    write_run(area, served)
    stopped, facts_of, slot = stager_of(tmp_path, state), SlotFile.facts, area.slot(0)
    stopped.usable_slots()
    old, new = (Save(RUN_ID, attempt, 4, (0,)) for attempt in (1, 2))

    def sleep(file: SlotFile) -> FileFacts:
        facts = facts_of(file) if at == "hashed" else None
        asleep.set()
        assert wake.wait(60)
        return facts or facts_of(file)

    with monkeypatch.context() as patch:
        patch.setattr(SlotFile, "facts", sleep)
        slot.put_mark(old)
        stopped.fill(0, old, tensors_of(state).by_name, b"{}", state.model)
        assert asleep.wait(60)
    slot.change("staged", "free")
    write_run(area, replace(served, attempt=2))
    writer = stager_of(tmp_path, state)
    writer.usable_slots()
    slot.put_mark(new)
    writer.fill(0, new, tensors_of(state).by_name, b'{"new": 1}', state.model)
    assert writer.wait_until_ready() is None
    for file in stopped._slots[0]:  # pyright: ignore[reportPrivateUsage]
        file.bytes.fill_(7)
    wake.set()
    assert getattr(stopped.wait_until_ready(), "errno", None) == errno.ESTALE
    found = slot.complete()
    assert found is not None
    assert found[0] == new
    assert publish.damage(copied(tmp_path / "copy", slot, found[1]), found[1]) == []
    writer.close()
    stopped.close()


# -- on a GPU ------------------------------------------------------------------------------------------------------


class FakeDevice:
    """Notes in which order streams, events and copies come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.stream = "main"
        device = self

        class Event:
            def record(self) -> None:
                device.said.append(f"record on {device.stream}")

            def synchronize(self) -> None:
                device.said.append("synchronize")

            def wait(self, stream: Stream) -> None:
                device.said.append(f"{stream.name} waits for the copies")

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                device.said.append(f"{self.name} waits for {other.name}")

            def __enter__(self) -> None:
                device.stream = self.name

            def __exit__(self, *rest: object) -> None:
                device.stream = "main"

        self.side = Stream("side")

        def copy_all(targets: Any, sources: Any, non_blocking: bool) -> None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking)

        monkeypatch.setattr(torch, "_foreach_copy_", copy_all)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream("main"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)

    def tensor(self, name: str, address: int) -> Any:
        device = self

        class OnDevice:
            device = torch.device("meta")

            def data_ptr(self) -> int:
                return address

            def copy_(self, source: Any, non_blocking: bool) -> None:
                device_name = device.stream
                device.said.append(f"copy {name} on {device_name}")

        return OnDevice()


def test_copies_wait_for_the_update_before_and_hold_up_the_one_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = FakeDevice(monkeypatch)
    writer = stager_of(tmp_path, make())
    writer.usable_slots()
    writer._stream = fake.side  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]

    class WithBuffer(nn.Module):
        def buffers(self, recurse: bool = True) -> Any:
            return iter([fake.tensor("buffer", 2)])

    pairs = [(fake.tensor(name, 0), fake.tensor(name, n)) for n, name in enumerate(("weight", "moment", "buffer"))]
    wait = writer._copy_on_stream(pairs, WithBuffer())  # pyright: ignore[reportPrivateUsage]
    fake.said.append("forward and backward")
    writer.before_update()
    fake.said.append("update")
    writer.before_update()
    wait()
    assert fake.said == [
        "copy buffer on main",  # a forward would change it
        "side waits for main",
        "copy weight on side",
        "copy moment on side",
        "record on side",
        "forward and backward",
        "main waits for the copies",
        "update",
        "synchronize",
    ]
    writer.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_snapshot_is_of_the_moment_of_the_call(shm: Path):
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).cuda()
    state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    area = make_area(shm / "run", shm)
    area.slot(0).folder.mkdir()
    tensors = tensors_of(state)
    writer = SlotWriter(area, 0, plan_of(tensors), device=torch.device("cuda", 0))
    writer.allocate(1)
    assert writer.usable_slots() == ({0}, None)
    for step in range(3):
        expected: dict[str, Tensor] = {name: tensor.cpu().clone() for name, tensor in tensors.by_name.items()}
        writer.fill(0, save(step), tensors.by_name, b"{}", model)
        model(torch.ones(64, 2048, device="cuda")).sum().backward()
        writer.before_update()
        state.optimizer.step()
        assert writer.wait_until_ready() is None
        found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
        dcp.read_into(area.slot(0).folder, found)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    writer.close()


def test_memory_that_cannot_be_pinned_is_told_once_with_the_limits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    broken = SimpleNamespace(cudaHostRegister=lambda *args: asked.append(args) or 2)  # cudaErrorMemoryAllocation
    monkeypatch.setattr(torch.cuda, "cudart", lambda: broken)
    monkeypatch.setattr(slot_writer.resource, "getrlimit", lambda which: (64 << 10, 64 << 10))
    slot_writer._warn_not_pinned.cache_clear()
    assert [slot_writer._pin(torch.zeros(8, dtype=torch.uint8)) for _ in range(2)] == [False, False]
    assert len(asked) == 2
    assert len(caplog.messages) == 1
    assert "failed with error 2 (locked memory, ulimit -l: 64.0 KiB; the job's memory: " in caplog.text
    assert "each save is copied synchronously" in caplog.text


@pytest.mark.parametrize(("device", "code", "waits"), [("cpu", 0, False), ("cuda", 0, False), ("cuda", 2, True)])
def test_a_save_into_memory_that_is_not_pinned_counts_as_synchronous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, code: int, waits: bool
) -> None:
    answers = SimpleNamespace(cudaHostRegister=lambda *args: code, cudaHostUnregister=lambda *args: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: answers)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    area = with_slots(tmp_path, 1)
    writer = SlotWriter(area, 0, plan_of(tensors_of(make())), device=torch.device(device))
    writer.allocate(1)
    assert writer.usable_slots() == ({0}, None)
    assert writer.is_synchronous == waits
    writer.close()
