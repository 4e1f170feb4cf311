"""Killed at every single file operation, ranks, service or both: nothing staged or published is lost, nothing is left.

Each sweep runs in a process without torch, where a fork costs a millisecond, and returns how many points it killed at.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import pytest

from lingua.checkpoint import layout
from lingua.checkpoint.shm.area import base
from lingua.files import Files
from tests.fakes import FaultyFiles, KillFiles
from tests.slotted import Start, Template, World, a_rank_lives, fast_place, killed, serve, steps_in

Act = Callable[[Files], object]


def operations(template: Template, act: Callable[[World, Files], object]) -> int:
    """How many file operations an act takes."""
    counting = FaultyFiles()
    world = template.fresh()
    act(world, counting)
    return counting.n_done


def check(world: World, published: int, staged: dict[int, int]) -> None:
    """What must hold at any moment. `staged`: what had been complete in memory some moment before."""
    done = world.done()
    assert all(world.intact(step) for step in done), f"a bad mark among {done}"
    assert max(done) >= published, f"{published} was published and is gone: {done}"
    there = {*done, *world.staged()}
    lost = [step for step in staged if step not in there and step > max(there)]
    assert not lost, f"{lost} was complete in memory and is gone"


def check_nothing_is_left(world: World, newest: int) -> None:
    """After a start has ended and its service has left."""
    assert list(base(world.shm()).iterdir()) == []
    staging_dirs = layout.staging_dirs(world.root)
    assert len(staging_dirs) == 1
    assert list(staging_dirs[0][1].iterdir()) == []
    names = {path.name for path in world.root.iterdir()}
    assert names == {layout.step_name(newest), layout.done_mark(world.root, newest).name, staging_dirs[0][1].name}


def next_start(world: World, attempt: int, step: int) -> None:
    """A start that goes on, saves a step and ends."""
    start = Start(world, attempt)
    newest = max([*world.done(), *world.staged()])
    start.begin()
    with a_rank_lives(start.area):
        serve(world.service())
        assert max(world.done()) == newest, "what an earlier start left in memory was not saved"
        start.make_slots()
        assert {slot.state() for slot in start.area.slots()} == {"free"}
        assert len(start.area.slots()) == start.n_slots
        assert start.stage(step) is not None
    service = world.service()
    assert service.take()
    service.run()
    assert "failed" not in world.kinds()
    assert max(world.done()) == step
    check_nothing_is_left(world, step)


# -- ranks ---------------------------------------------------------------------------------------------------------


def after_a_death(world: World) -> None:
    """Start 2 died: 2 waits complete, 3 is being taken to the disk, 4 is half staged."""
    start = Start(world, 2, n_slots=3)
    start.begin()
    start.make_slots()
    slots = [start.stage(step) for step in (2, 3, 4)]
    assert slots[1] is not None
    assert slots[2] is not None
    slots[1].change("staged", "draining")
    slots[2].report_unready(0)
    folder = layout.coming(layout.folder(world.root, 3), 2)
    folder.mkdir()
    (folder / layout.model_file(0)).write_bytes(b"half")


def life_of_a_rank(world: World, files: Files) -> None:
    """Start 3: begins, finds the slots of start 2, whose steps its service then publishes; stages 5, 6 and 7."""
    start = Start(world, 3, files, n_slots=2)
    start.begin()
    serve(world.service())
    start.make_slots()
    for step in (5, 6, 7):  # 7 takes the slot of 6
        assert start.stage(step)


def kill_the_ranks(service_dies_too: bool) -> int:
    with fast_place() as place:
        template = Template(place, after_a_death, 1)
        n_all = operations(template, life_of_a_rank)
        for n in range(1, n_all + 1):
            world = template.fresh()
            assert killed(lambda world=world, n=n: life_of_a_rank(world, KillFiles(n)))
            staged = world.staged()
            check(world, 1, staged)
            if not service_dies_too and world.area().session.path.exists():
                service = world.service()
                assert service.take()
                service.run()
                assert "failed" not in world.kinds()
                check(world, 1, staged)
            next_start(world, 4, 9)
    return n_all


def apart(sweep: Callable[..., int], *arguments: object) -> int:
    """Run a sweep in a process that has not loaded what the tests beside it need."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(sweep, *arguments).result()


@pytest.mark.soak
@pytest.mark.parametrize("service_dies_too", [pytest.param(False, marks=pytest.mark.gate), True])
def test_ranks_killed_at_every_operation(service_dies_too: bool) -> None:
    assert apart(kill_the_ranks, service_dies_too) > 60


# -- the service ---------------------------------------------------------------------------------------------------


def two_saves_wait(world: World) -> None:
    start = Start(world, 2)
    start.begin()
    start.make_slots()
    for step in (2, 3):
        assert start.stage(step)


def life_of_a_service(world: World, files: Files, *, leaves: bool) -> None:
    service = world.service(files=files)
    if leaves:
        assert service.take()
        service.run()
    else:
        serve(service)


def kill_the_service(ranks_live: bool) -> int:
    with fast_place() as place:
        template = Template(place, two_saves_wait, 1)

        def life(world: World, files: Files) -> None:
            life_of_a_service(world, files, leaves=not ranks_live)

        def counted(world: World, files: Files) -> None:
            with a_rank_lives(world.area()) if ranks_live else nullcontext():
                life(world, files)

        n_all = operations(template, counted)
        for n in range(1, n_all + 1):
            world = template.fresh()
            if ranks_live:
                goes_on_beside_its_ranks(world, n, n_all)
            else:
                assert killed(lambda world=world, n=n: life(world, KillFiles(n)))
                check(world, 1, {2: 0, 3: 1})
            next_start(world, 3, 9)
    return n_all


def goes_on_beside_its_ranks(world: World, n: int, n_all: int) -> None:
    """The service dies, the next one dies as well, the third one goes on; then one more step."""
    with a_rank_lives(world.area()):
        assert killed(lambda: life_of_a_service(world, KillFiles(n), leaves=False))
        check(world, 1, {2: 0, 3: 1})
        killed(lambda: life_of_a_service(world, KillFiles(n * 7 % n_all + 1), leaves=False))
        check(world, 1, {2: 0, 3: 1})
        serve(world.service())
        folders = steps_in([path.name for path in world.root.iterdir()])
        assert 3 in folders, f"{folders} after a death at {n}: {world.events()}"
        assert len(folders) <= 2, f"{folders}: litter, or a step that was not given up"
        assert Start(world, 2).stage(4)
        serve(world.service())
        assert world.done() == [4]
        assert set(world.kinds()) <= {"published", "retired"}


@pytest.mark.soak
@pytest.mark.parametrize("ranks_live", [False, True])
def test_service_killed_at_every_operation(ranks_live: bool) -> None:
    assert apart(kill_the_service, ranks_live) > 80
