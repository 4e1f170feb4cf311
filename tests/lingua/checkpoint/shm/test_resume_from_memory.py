"""A start goes on from what is in memory while the disk stands still; then all of it is on the disk, once."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lingua.checkpoint import layout, publish
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.shm.area import area_of
from lingua.checkpoint.state import TrainState
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.files import DISK, Files
from lingua.run.failure import RankError
from lingua.run.lock import RunLock
from tests.fakes import At, BlockingFiles, FaultyFiles, KillFiles
from tests.ranks import exit_code_of, run_on_ranks
from tests.services import Services
from tests.slotted import events_in
from tests.tiny import assert_equal, make, snapshot, train

FIRST_WRITE = At(r"write .*/\d{10}/")


def manager_of(run_dir: Path, shm: Path, services: Services, **more: Any) -> CheckpointManager:
    """`more`: keys of `checkpoint:`, or arguments of the manager."""
    keys = {"async_save_mode": "shm", "shm_path": str(shm), "linger_s": 0.0}
    keys |= {key: more.pop(key) for key in list(more) if key in CheckpointArgs.model_fields}
    args = CheckpointArgs(dump=SaveEvery(every=1, keep=0), eval=SaveEvery(every=0), **keys)
    return CheckpointManager(args, run_dir, start_service=services.start, **more)


def done(run_dir: Path) -> list[int]:
    return layout.done_steps(run_dir / layout.CHECKPOINTS)


@contextmanager
def blocked(until: Path | None = None) -> Iterator[Services]:
    """Services whose disk takes not a byte before there is a file `until`; they are killed at the end without it."""
    with Services(lambda n: BlockingFiles(FIRST_WRITE, until=until)) as services:
        yield services
        if until is None:
            services.kill()


def leave(run_dir: Path, shm: Path, n_ranks: int = 1, steps: tuple[int, ...] = (1, 2)) -> dict[str, Tensor]:
    """Steps that are only in memory, everything dead; the state of the last one."""

    def save(rank: int) -> dict[str, Tensor]:
        state = make(shard=n_ranks > 1)
        manager = manager_of(run_dir, shm, services)
        manager.prepare(state)
        for step in steps:
            train(state, step, step)
            assert manager.save(step, state).staged
        manager.close()
        return snapshot(state)

    with blocked() as services:
        return run_on_ranks(save, n_ranks)[0]


def test_it_goes_on_before_the_disk_moves_and_then_all_is_published_once(tmp_path: Path, shm: Path):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    expected = leave(run_dir, shm)
    with blocked(gate) as services:
        manager, state = manager_of(run_dir, shm, services), make()
        assert manager.resume(state) == 2
        assert_equal(expected, snapshot(state))
        assert (state.shared["step"], manager.owes(2), done(run_dir)) == (2, True, [])
        manager.prepare(state)
        train(state, 3, 3)
        report = manager.save(3, state)
        assert "every slot is still being written" in str(report.error)
        assert done(run_dir) == []
        gate.touch()
        assert manager.save(3, state, final=True).published  # waits for a slot
        manager.close()
    assert done(run_dir) == [1, 2, 3]
    from_disk = make()
    CheckpointManager(CheckpointArgs(), run_dir).load(2, from_disk)
    assert_equal(expected, snapshot(from_disk))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("saved_by", "n_ranks"), [(2, 1), *(pytest.param(*of, marks=pytest.mark.soak) for of in ((1, 1), (2, 2), (1, 2)))]
)
def test_the_bits_are_those_of_the_disk_on_any_ranks(tmp_path: Path, shm: Path, saved_by: int, n_ranks: int):
    run_dir = tmp_path / "run"
    expected = leave(run_dir, shm, saved_by, steps=(1,))

    def resume(rank: int) -> tuple[int | None, dict[str, Tensor], Tensor]:
        manager, state = manager_of(run_dir, shm, services), make(shard=n_ranks > 1)
        torch.manual_seed(99)
        step = manager.resume(state)
        random = torch.rand(3)
        assert done(run_dir) == []
        if rank == 0:
            gate.touch()
        manager.prepare(state)
        assert manager.save(1, state, final=True).published, "it is the one in memory"
        manager.close()
        return step, snapshot(state), random

    def load(rank: int) -> tuple[dict[str, Tensor], Tensor]:
        state = make(shard=n_ranks > 1)
        CheckpointManager(CheckpointArgs(), run_dir).load(1, state)
        return snapshot(state), torch.rand(3)

    gate = tmp_path / "gate"
    with blocked(gate) as services:
        found = run_on_ranks(resume, n_ranks)
    for (step, from_memory, random), (from_disk, random_too) in zip(found, run_on_ranks(load, n_ranks), strict=True):
        assert step == 1
        assert_equal(expected, from_memory)
        assert_equal(from_disk, from_memory)
        assert torch.equal(random, random_too)


@pytest.mark.parametrize(
    "name",
    [
        layout.model_file(0),
        *(pytest.param(n, marks=pytest.mark.soak) for n in (layout.train_state_file(0), ".metadata")),
    ],
)
def test_what_is_damaged_is_not_taken(tmp_path: Path, shm: Path, name: str):
    """Step 2 is; step 1 is then the newest on the disk."""
    run_dir = tmp_path / "run"
    leave(run_dir, shm)
    slot = next(slot for slot in area_of(run_dir, shm).slots() if (found := slot.complete()) and found[0].step == 2)
    damage(slot.folder / name)
    with Services() as services:
        manager, state = manager_of(run_dir, shm, services), make()
        assert manager.resume(state) == 1
        assert not manager.owes(1)
        manager.close()
    expected = make()
    train(expected, 1, 1)
    assert_equal(snapshot(expected), snapshot(state))
    assert done(run_dir) == [1]


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(60)
        byte = file.read(1)[0]
        file.seek(60)
        file.write(bytes([byte ^ 1]))


def test_where_the_only_one_is_damaged_the_start_fails_and_the_next_begins_anew(tmp_path: Path, shm: Path):
    run_dir = tmp_path / "run"
    leave(run_dir, shm, steps=(1,))
    damage(area_of(run_dir, shm).slot(0).folder / layout.optim_file(0))
    with Services() as services:
        manager = manager_of(run_dir, shm, services)
        with pytest.raises(RankError, match="checkpoint 1, the only one, was in memory and is lost"):
            manager.resume(make())
        manager.close()
    with Services() as services:
        manager = manager_of(run_dir, shm, services)
        assert manager.resume(make()) is None
        manager.close()


def test_a_disk_that_refuses_does_not_keep_a_start_from_training(tmp_path: Path, shm: Path):
    run_dir = tmp_path / "run"
    leave(run_dir, shm)
    with Services(lambda n: FaultyFiles(1, error=errno.ENOSPC, lasting=True, operations=("mkdir",))) as services:
        manager, state = manager_of(run_dir, shm, services), make()
        assert manager.resume(state) == 2
        manager.prepare(state)
        assert manager.save(3, state).error
        manager.close()
        services.kill()
    with Services() as services:
        manager, state = manager_of(run_dir, shm, services), make()
        assert manager.resume(state) == 2
        manager.await_rescue()
        manager.close()
    assert done(run_dir) == [1, 2]


def test_the_service_of_a_dead_attempt_that_hangs_on_the_disk_is_not_waited_for(tmp_path: Path, shm: Path):
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    with blocked(gate) as services:
        with RunLock(run_dir) as lock:
            manager, state = manager_of(run_dir, shm, services, lock=lock), make()
            train(state, 1, 1)
            assert manager.save(1, state).staged
            while area_of(run_dir, shm).slot(0).state() != "draining":
                manager.before_update()  # raises a bug
                time.sleep(0.01)
            manager.close()
        with RunLock(run_dir) as lock:
            manager, resumed = manager_of(run_dir, shm, services, lock=lock), make()
            assert manager.resume(resumed) == 1
            assert done(run_dir) == []
            assert_equal(snapshot(state), snapshot(resumed))
            gate.touch()
            assert manager.save(1, resumed, final=True).published
            manager.close()
    assert publish.attempt_of(run_dir / layout.CHECKPOINTS, 1) == 2


def go_on(run_dir: Path, shm: Path, services: Services, files: Files = DISK) -> TrainState:
    """A start that trains step 3 and ends well."""
    manager, state = manager_of(run_dir, shm, services, files=files), make()
    step = manager.resume(state)
    assert step is not None
    manager.prepare(state)
    train(state, step + 1, 3)
    assert manager.save(3, state, final=True).published
    manager.close()
    return state


def each_kill(try_at: Callable[[int], bool], first: int, stride: int = 8) -> int:
    n_kills, at = 0, first
    while try_at(at):
        n_kills, at = n_kills + 1, at + stride
    return n_kills


@pytest.mark.soak
@pytest.mark.parametrize("first", range(1, 9))
def test_killed_at_any_operation_a_start_loses_nothing(tmp_path: Path, shm: Path, first: int):
    def try_at(at: int) -> bool:
        run_dir = tmp_path / f"run-{at}"
        leave(run_dir, shm)
        with Services() as services:
            code = exit_code_of(lambda: go_on(run_dir, shm, services, KillFiles(at)) and None)
            assert code in (0, KillFiles.KILLED)
            services.wait()
        ends_well(run_dir, shm)
        return code != 0

    assert each_kill(try_at, first) > 0


@pytest.mark.soak
@pytest.mark.parametrize("first", range(1, 9))
def test_a_service_killed_at_any_operation_meanwhile_loses_nothing(tmp_path: Path, shm: Path, first: int):
    def try_at(at: int) -> bool:
        run_dir, died = tmp_path / f"run-{at}", tmp_path / f"died-{at}"
        leave(run_dir, shm)
        with Services(lambda n: DyingFiles(at, died) if n == 1 else DISK) as services:
            assert exit_code_of(lambda: go_on(run_dir, shm, services) and None) == 0
            services.wait()
        ends_well(run_dir, shm)
        return died.exists()

    assert each_kill(try_at, first) > 0


class DyingFiles(KillFiles):
    """Leaves a file with its pid before it dies."""

    def __init__(self, fail_at: int | At, died: Path) -> None:
        super().__init__(fail_at)
        self._died = died

    def _fail(self, name: str) -> None:
        whole = self._died.with_suffix(".new")
        whole.write_text(str(os.getpid()))
        whole.rename(self._died)
        super()._fail(name)


def ends_well(run_dir: Path, shm: Path) -> None:
    """One more start: it ends with step 3 of the undisturbed run."""
    with Services() as services:
        manager, state = manager_of(run_dir, shm, services), make()
        step = manager.resume(state)
        assert step in (2, 3)
        if step == 2:
            manager.prepare(state)
            train(state, 3, 3)
            assert manager.save(3, state, final=True).published
        else:
            manager.await_rescue()
        manager.close()
    expected = make()
    train(expected, 1, 3)
    assert_equal(snapshot(expected), snapshot(state))
    assert done(run_dir) == [1, 2, 3]
    published = [event["step"] for event in events_in(area_of(run_dir, shm)) if event["kind"] == "published"]
    assert sorted(published) == sorted(set(published))
