"""Snapshots of a run whose folder was renamed: found by the next attempt, and by nobody else."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lingua.checkpoint import layout
from lingua.checkpoint.shm.area import TRAINER_LOCK, ServedRun, ShmArea, make_area
from lingua.checkpoint.shm.moved import adopt, left_behind
from lingua.checkpoint.tools.gc import survey_garbage
from lingua.files import RunError
from tests.fakes import KillFiles
from tests.ranks import exit_code_of
from tests.slotted import RUN_ID, Start, World


def saved_in_memory(place: Path) -> World:
    """A run with step 1 on the disk and step 2 in memory alone; everybody is dead."""
    world = World(place).make(1)
    (world.root / layout.RUN_ID).write_text(RUN_ID)

    start = Start(world, 2)
    start.begin()
    start.make_slots()
    start.stage(2)
    return world


def renamed(world: World, name: str) -> tuple[ServedRun, ShmArea]:
    """The run that goes on under another name, and its memory."""
    folder = world.place / name
    run = replace(world.served(3), run_dir=folder, root=folder / layout.CHECKPOINTS)
    run = replace(run, args=run.args.model_copy(update={"shm_path": str(world.shm())}))
    return run, make_area(folder, world.shm())


def steps_in(area: ShmArea) -> list[int]:
    return [found[0].step for slot in area.slots() if (found := slot.complete())]


def test_a_renamed_run_takes_what_it_left_under_its_old_name(tmp_path: Path) -> None:
    world = saved_in_memory(tmp_path)
    os.rename(world.run_dir, tmp_path / "renamed")
    run, area = renamed(world, "renamed")
    area.slot(0).make()  # a service that began before the ranks may have made it
    adopt(area, run, 1)
    assert steps_in(area) == [2]
    assert not world.area().folder.exists()
    adopt(area, run, 1)
    assert steps_in(area) == [2]


def test_what_is_on_the_disk_or_another_runs_stays(tmp_path: Path) -> None:
    world = saved_in_memory(tmp_path)
    os.rename(world.run_dir, tmp_path / "renamed")
    run, area = renamed(world, "renamed")
    adopt(area, run, 2)
    adopt(area, replace(run, run_id="another"), 1)
    assert steps_in(area) == []
    assert steps_in(world.area()) == [2]


def test_a_copy_takes_nothing_of_the_original(tmp_path: Path) -> None:
    world = saved_in_memory(tmp_path)
    shutil.copytree(world.run_dir, tmp_path / "copy")
    run, area = renamed(world, "copy")
    adopt(area, run, 1)
    assert steps_in(area) == []
    assert steps_in(world.area()) == [2]


def test_a_run_that_was_renamed_and_whose_checkpoints_were_not(tmp_path: Path) -> None:
    world = saved_in_memory(tmp_path)
    run, _ = renamed(world, "renamed")
    assert [save.step for _, save in left_behind(world.area(), replace(run, root=world.root), 1)] == [2]


def test_memory_that_a_process_uses_is_not_taken(tmp_path: Path) -> None:
    world = saved_in_memory(tmp_path)
    os.rename(world.run_dir, tmp_path / "renamed")
    run, area = renamed(world, "renamed")
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        world.area().lock(TRAINER_LOCK).take(shared=True)
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(RunError, match=rf"holds steps \[2\] of this run, .* process {pid} still uses it: end that one"):
        adopt(area, run, 1)
    os.write(done[1], b".")
    os.waitpid(pid, 0)
    adopt(area, run, 1)
    assert steps_in(area) == [2]


def test_a_kill_between_any_two_operations_loses_nothing(tmp_path: Path) -> None:
    for n in range(1, 100):
        world = saved_in_memory(tmp_path / str(n))
        os.rename(world.run_dir, world.place / "renamed")
        run, area = renamed(world, "renamed")
        code = exit_code_of(lambda: adopt(area, run, 1, files=KillFiles(n)))  # noqa: B023 - called at once
        adopt(area, run, 1)
        assert steps_in(area) == [2]
        if code == 0:
            return
        assert code == KillFiles.KILLED
    raise AssertionError("it never ended by itself")


def test_gc_leaves_what_a_renamed_run_will_save(tmp_path: Path) -> None:
    world = saved_in_memory(tmp_path)
    folder = tmp_path / "renamed"
    os.rename(world.run_dir, folder)
    (folder / "config.yaml").write_text(f"checkpoint: {{shm_path: {world.shm()}}}")
    assert [found.path for found in survey_garbage(folder)] == []
    (folder / "checkpoints" / layout.RUN_ID).write_text("another")
    assert [found.path for found in survey_garbage(folder)] == [world.area().folder]
