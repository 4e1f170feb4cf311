"""Which slot, what is worth saving, and the start of a service: decisions by tables."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash

from lingua.checkpoint import publish
from lingua.checkpoint.publish import FileFacts
from lingua.checkpoint.shm.area import SERVICE_LOCK, Save, ServedRun, State, make_area
from lingua.checkpoint.shm.coordinator import Coordinator
from lingua.checkpoint.shm.decisions import (
    Found,
    Newest,
    Node,
    Place,
    SlotView,
    choose_slot,
    node_of,
    resume_point,
    unsaved,
)
from lingua.checkpoint.shm.drain import BEAT_S, HANDOVER_S, SILENT_BEATS, await_older_writers
from lingua.checkpoint.shm.service_client import LOOK_S, RESTARTS, WORD_S, ServiceClient, why_taken
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.distributed.process_group import Ranks
from lingua.files import ProcessLock, RunError, write_json
from lingua.run.lock import Owner, this_process
from tests.fakes import Clock
from tests.ranks import fork


def view(word: str) -> SlotView:
    """free | staged 4 | draining 4 | None"""
    state, _, step = word.partition(" ")
    states: dict[str, State | None] = {
        "free": "free", "staged": "staged", "draining": "draining", "claimed": "claimed", "None": None,
    }  # fmt: skip
    return SlotView(states[state], int(step or -1))


@pytest.mark.parametrize(
    ("nodes", "number"),
    [
        ([["free", "free"]], 0),
        ([["staged 2", "free"]], 1),
        ([["draining 2", "staged 4"]], 1),
        ([["staged 4", "draining 2"]], 0),
        ([["staged 2", "staged 4"]], 1),  # the older one is drained first
        ([["draining 2", "draining 4"]], None),
        ([["draining 2", "None"]], None),  # in the middle of a change
        ([["draining 2", "claimed 4"]], None),
        ([["free", "free"], ["draining 2", "free"]], 1),
        ([["draining 2", "staged 4"], ["staged 2", "staged 4"]], 1),
        ([["draining 2", "staged 4"], ["draining 2", "draining 4"]], None),
        ([["draining 2", "free"], ["draining 2", "staged 4"]], 1),  # one node has lost it
        ([["free", "free"], ["staged 2"]], 0),  # a node with fewer slots
        ([[]], None),
    ],
)
def test_choose_slot(nodes: list[list[str]], number: int | None):
    views = [{n: view(word) for n, word in enumerate(node)} for node in nodes]
    assert choose_slot(views) == number


def one(attempt: int, step: int, node: int = 0, n_nodes: int = 1, run_id: str = "run") -> Save:
    return Save(run_id, attempt, step, (node,), node, n_nodes)


@pytest.mark.parametrize(
    ("saves", "newest_done", "wanted"),
    [
        ([], (-1, 0), set()),
        ([one(1, 4), one(1, 6)], (-1, 0), {(1, 4), (1, 6)}),
        ([one(1, 4), one(1, 6)], (4, 1), {(1, 6)}),
        ([one(1, 6)], (6, 1), set()),
        ([one(1, 6)], (4, 2), set()),  # start 2 went back to 4 or before: 6 is of another timeline
        ([one(1, 6), one(2, 5)], (4, 1), {(2, 5)}),
        ([one(1, 6, run_id="before")], (-1, 0), set()),
        ([one(1, 6, 0, 2)], (-1, 0), set()),
        ([one(1, 6, 0, 2), one(1, 6, 1, 2)], (-1, 0), {(1, 6)}),
        ([one(1, 6, 0, 2), one(1, 8, 1, 2)], (-1, 0), set()),
        ([one(1, 6, 0, 2), one(1, 6, 1, 2), one(1, 8, 0, 2)], (-1, 0), {(1, 6)}),
    ],
)
def test_worth_saving(saves: list[Save], newest_done: tuple[int, int], wanted: set[tuple[int, int]]):
    points = unsaved([[Found(save)] for save in saves], "run", Newest(*newest_done))
    assert {(point.parts[0][1].save.attempt, point.step) for point in points} == wanted


def part(
    attempt: int,
    step: int,
    node: int = 0,
    n_nodes: int = 1,
    *,
    place: Place = "used",
    digest: str = "",
    number: int = 0,
) -> Found:
    """A part of one file, whose content is named by the digest."""
    facts = {f"model.{node}": FileFacts(1, digest or f"{attempt}-{step}")}
    return Found(replace(one(attempt, step, node, n_nodes), number=number), facts, place)


def mark_of(step: int, attempt: int, *parts: Found) -> Newest:
    """The newest checkpoint on the disk, made of these parts."""
    facts = {name: fact for each in parts for name, fact in each.facts.items()}
    return Newest(step, attempt, xxhash.xxh3_128_hexdigest(publish.manifest_bytes(step, attempt, facts, "run")))


BOTH = (part(1, 6, 0, 2), part(1, 6, 1, 2))
FREE = (part(1, 6, 0, 2, place="free"), part(1, 6, 1, 2, place="free"))
THREE = (part(1, 6, 0, 3), part(1, 6, 1, 3), part(1, 6, 2, 3))
COPIES = (part(1, 6, 0, 3, place="copy"), part(1, 6, 1, 3, place="copy"), part(1, 6, 2, 3, place="copy"))
GONE = tuple(replace(each, place="free") for each in THREE)


@pytest.mark.parametrize(
    ("nodes", "newest", "point"),
    [
        ([[]], Newest(), None),
        ([[part(1, 4)]], Newest(), (1, 4, [0])),
        ([[part(1, 4), part(1, 6)]], Newest(), (1, 6, [0])),  # the older one is saved meanwhile
        ([[part(1, 4), part(1, 6)]], Newest(4, 1), (1, 6, [0])),
        ([[part(1, 6)]], Newest(8, 1), None),  # the disk is newer
        ([[part(1, 6)]], Newest(4, 2), None),  # of another timeline
        ([[part(1, 6), part(2, 5)]], Newest(4, 1), (2, 5, [0])),
        ([[replace(part(1, 6), save=one(1, 6, run_id="before"))]], Newest(), None),
        ([[replace(part(1, 6), save=replace(one(1, 6), ranks=(0, 1, 2)))]], Newest(), (1, 6, [0])),  # now other ranks
        # on several nodes
        ([[BOTH[0]], [BOTH[1]]], Newest(), (1, 6, [0, 1])),
        ([[BOTH[1]], [BOTH[0]]], Newest(), (1, 6, [1, 0])),  # in another order
        ([[BOTH[0]], [], [BOTH[1]]], Newest(), (1, 6, [0, 2])),  # with a new node between them
        ([[], [part(1, 6)]], Newest(), (1, 6, [1])),  # on the other one
        ([list(BOTH)], Newest(), (1, 6, [0, 0])),  # on one node
        ([[THREE[2], THREE[0]], [THREE[1]]], Newest(), (1, 6, [0, 1, 0])),  # on fewer nodes
        ([[BOTH[0]]], Newest(), None),  # the other node is not of this start
        ([[BOTH[0]], []], Newest(), None),  # it was replaced by a new one
        ([[BOTH[0]], [part(1, 4, 1, 2)]], Newest(), None),  # it has an older one
        ([[BOTH[0], part(1, 4, 0, 2)], [part(1, 4, 1, 2)]], Newest(), (1, 4, [0, 1])),  # then that one
        ([[BOTH[0]], [part(2, 6, 1, 2)]], Newest(), None),  # two attempts, two timelines
        ([[THREE[0]], [THREE[1]]], Newest(), None),
        # copies
        ([[THREE[0], COPIES[2]], [THREE[2], COPIES[1]]], Newest(), (1, 6, [0, 1, 1])),  # node 1 has gone
        ([[THREE[1], COPIES[0]], [], [THREE[2], COPIES[1]]], Newest(), (1, 6, [0, 0, 2])),  # node 0; a new one came
        ([[THREE[0], COPIES[2]], [THREE[1], COPIES[0]]], Newest(), (1, 6, [0, 1, 0])),  # node 2
        ([[THREE[0], COPIES[2]], [THREE[1], COPIES[0]], [THREE[2], COPIES[1]]], Newest(), (1, 6, [0, 1, 2])),
        ([[THREE[0], COPIES[2]]], Newest(), None),  # two of three have gone
        ([[BOTH[0], part(1, 6, 1, 2, place="copy")]], Newest(), (1, 6, [0, 0])),  # one node is left
        ([[BOTH[0], part(1, 6, 1, 2, place="copy", number=1)]], Newest(), None),  # saved again after a rewind
        (
            [[BOTH[0], part(1, 4, 1, 2, place="copy"), part(1, 4, 0, 2)]],
            Newest(),
            (1, 4, [0, 0]),
        ),  # 6 is not copied yet
        ([[GONE[0], COPIES[2]], [GONE[1], COPIES[0]], [GONE[2], COPIES[1]]], Newest(4, 1), None),  # before a rewind
        ([list(COPIES)], Newest(4, 1), None),
        ([[GONE[0], COPIES[2]], [GONE[1]]], mark_of(6, 1, *THREE), (1, 6, [0, 1, 0])),
        # what is on the disk already
        ([[part(1, 6)]], mark_of(6, 1, part(1, 6)), (1, 6, [0])),  # published since it was found
        ([[part(1, 6, place="free")]], mark_of(6, 1, part(1, 6)), (1, 6, [0])),
        ([[part(1, 6, place="free")]], mark_of(6, 2, part(1, 6)), (1, 6, [0])),  # by the attempt that resumed from it
        ([[part(1, 6, place="free")]], mark_of(6, 1, part(1, 6, digest="other")), None),  # trained again after a rewind
        ([[part(1, 6, place="free")]], Newest(4, 1), None),  # it was given up: the disk does not have it
        ([[part(1, 6, place="free"), part(2, 8)]], mark_of(6, 1, part(1, 6)), (2, 8, [0])),
        ([[FREE[0]], [FREE[1]]], mark_of(6, 1, *BOTH), (1, 6, [0, 1])),
        ([[FREE[0]], [BOTH[1]]], mark_of(6, 1, *BOTH), (1, 6, [0, 1])),  # the node that did not hear of it
        ([[FREE[0]], [BOTH[1]]], Newest(4, 1), None),
        ([[FREE[0]], []], mark_of(6, 1, *BOTH), None),
    ],
)
def test_where_a_start_resumes_from(nodes: list[list[Found]], newest: Newest, point: tuple[int, int, list[int]] | None):
    found = resume_point(nodes, "run", newest)
    told = found and (found.parts[0][1].save.attempt, found.step, [holder for holder, _ in found.parts])
    assert told == point


class Ended:
    """A process that was started and has ended."""

    def poll(self) -> int | None:
        return 1


class Running:
    def poll(self) -> int | None:
        return None


def coordinator_of(folder: Path, start: object) -> Coordinator:
    args = CheckpointArgs(async_save_mode="shm", shm_path=str(folder))
    run = ServedRun("run", folder / "run", folder / "run" / "checkpoints", 2, args)
    return Coordinator(run, Ranks(), torch.device("cpu"), start=start, sleep=lambda s: None)  # pyright: ignore[reportArgumentType]


def test_a_service_that_ends_at_once_is_started_a_few_times(tmp_path: Path):
    started: list[tuple[Path, ...]] = []
    there = coordinator_of(tmp_path, lambda *where: (started.append(where), Ended())[1])
    there.open()
    assert len(started) == 1  # it starts while the state is loaded
    with pytest.raises(RunError, match=r"has ended 4 times; see .*logs/checkpoint_service\.0\.log"):
        there._send()  # as `prepare` does before step 1
    assert len(started) == RESTARTS + 1
    there.close()


def test_a_service_that_hangs_at_its_start_is_reported(tmp_path: Path):
    there = coordinator_of(tmp_path, lambda *where: Running())
    there.open()
    with pytest.raises(RunError, match="did not start within 30 s"):
        there._send()  # as `prepare` does before step 1
    there.close()


@pytest.mark.parametrize(("state", "taken_back"), [("free", True), ("staged", True), ("draining", False)])
def test_a_lost_save_is_taken_back_unless_a_service_is_at_work_on_it(tmp_path: Path, state: State, taken_back: bool):
    there = coordinator_of(tmp_path, lambda *where: Running())
    slot = there.area.slot(0)
    slot.make()
    slot.change("free", state)
    assert there.withdraw(0) == taken_back
    assert slot.state() == ("free" if taken_back else state)
    there.close()


def test_what_a_leader_left_half_changed_can_be_used_again(tmp_path: Path):
    """Whatever the slot's mark is when a rank dies, while the service lives on."""
    area = make_area(tmp_path / "run", tmp_path)
    slot = area.slot(0)
    slot.folder.mkdir()
    states: tuple[State, ...] = ("claimed", "free", "staged")
    for state in states:
        slot.mark(state).write_text("{}")
        there = coordinator_of(tmp_path, lambda *where: Running())
        assert there.find_unsaved(Newest()) == set()
        assert slot.state() == "free"
        assert [path.name for path in area.folder.glob("slot-0.*")] == ["slot-0.free"]
        there.close()


@pytest.mark.parametrize(
    ("places", "rank", "expected"),
    [
        (["a"], 0, Node(0, 1, (0,))),
        (["a", "a", "b", "b"], 3, Node(1, 2, (2, 3))),
        (["b", "a", "b", "a"], 1, Node(1, 2, (1, 3))),  # numbered by their first rank, not by name
        (["b", "a", "b", "a"], 2, Node(0, 2, (0, 2))),
        ([("h", 1), ("h", 2)], 1, Node(1, 2, (1,))),  # two areas of one machine
    ],
)
def test_node_of(places: list[object], rank: int, expected: Node) -> None:
    assert node_of(rank, places) == expected
    assert expected.leader == expected.ranks[0]


# -- the attempt before ours ---------------------------------------------------------------------------------------

ELSEWHERE = Owner(host="elsewhere", boot_id="b", pid=1)


def a_writer(root: Path, owner: Owner) -> Path:
    publish.open_staging_dir(root, 1)
    path = ServedRun("run", root, root, 1).writer_file(5, 0)
    write_json(path, vars(owner))
    return path


def test_a_writer_on_this_machine_is_waited_for_until_it_is_done(tmp_path: Path) -> None:
    path, clock = a_writer(tmp_path, this_process()), Clock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now() > 1200.0:
            path.unlink(missing_ok=True)

    await_older_writers(tmp_path, 2, this_process(), now=clock.now, sleep=sleep)
    assert 1200.0 < clock.now() < 1201.0


def test_one_that_never_ends_is_shut_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    a_writer(tmp_path, this_process())
    await_older_writers(tmp_path, 2, this_process(), now=clock.now, sleep=clock.sleep)
    assert HANDOVER_S <= clock.now() - 1000.0 < HANDOVER_S + 1.0
    assert "it is shut out" in caplog.text


def test_one_elsewhere_counts_as_long_as_it_shows_itself(tmp_path: Path) -> None:
    path, clock = a_writer(tmp_path, ELSEWHERE), Clock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now() < 1100.0:
            os.utime(path, (clock.now(), clock.now()))  # another clock than ours: only that it moves counts

    await_older_writers(tmp_path, 2, this_process(), now=clock.now, sleep=sleep)
    assert clock.now() - 1100.0 == pytest.approx(SILENT_BEATS * BEAT_S, abs=1.5)


def test_nobody_and_one_whose_job_was_requeued_are_not_waited_for(tmp_path: Path) -> None:
    clock = Clock()
    await_older_writers(tmp_path, 2, this_process("7", 1), now=clock.now, sleep=clock.sleep)
    a_writer(tmp_path, replace(ELSEWHERE, slurm_job_id="7"))
    await_older_writers(tmp_path, 2, this_process("7", 1), now=clock.now, sleep=clock.sleep)
    assert clock.now() == 1000.0


def test_a_start_says_which_service_it_waits_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    area = make_area(tmp_path / "run", tmp_path)
    slot = area.slot(0)
    slot.make()
    slot.put_mark(one(1, 4))
    with hung(area.folder / SERVICE_LOCK) as pid:
        looks = itertools.count(1)

        def sleep(seconds: float) -> None:
            if next(looks) == int(2 * WORD_S / LOOK_S):
                slot.change("staged", "free")

        client = ServiceClient(area, 2, tmp_path / "log", sleep=sleep)
        client.send(ServedRun("run", tmp_path / "run", tmp_path / "run", 2, CheckpointArgs(shm_path=str(tmp_path))))
        caplog.set_level("WARNING")
        client.await_rescue([0])
    assert f"waiting 10 s for the checkpoint service of this node, process {pid}: it saves" in caplog.text
    assert f"`kill -9 {pid}` loses nothing" in caplog.text
    assert len(caplog.messages) == 2


@contextmanager
def hung(path: Path) -> Iterator[int]:
    """A process that holds a lock and does nothing; its pid."""
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        lock = ProcessLock(path)
        os.write(writing, b"L" if lock.take() else b"-")
        signal.pause()
    assert os.read(reading, 1) == b"L"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("served", "is_first", "why"),
    [
        (None, True, None),
        (("run", 2), True, None),
        (("before", 9), True, None),  # another run, which had the folder before us
        (("run", 4), True, "attempt 4 of this run has taken over"),
        (("run", 3), False, None),
        (None, False, None),  # it cannot be read
        (("run", 4), False, "attempt 4 of this run has taken over"),
        (("after", 1), False, "another run has begun"),
        (("after", 9), False, "another run has begun"),
    ],
)
def test_whose_the_memory_of_a_node_is(
    tmp_path: Path, served: tuple[str, int] | None, is_first: bool, why: str | None
) -> None:
    found = why_taken(ServedRun("run", tmp_path, tmp_path, 3), served, is_first=is_first)
    assert found is None if why is None else found is not None and found.startswith(why)
