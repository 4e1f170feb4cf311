"""Which slot, what is worth saving, and the start of a service: decisions by tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.checkpoint.courier import RESTARTS, Courier, SlotView, choose_slot, worth_saving
from lingua.checkpoint.ranks import Ranks
from lingua.checkpoint.service import Session
from lingua.checkpoint.slots import Save, State, make_region
from lingua.files import RunError


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


def one(incarnation: int, step: int, node: int = 0, n_nodes: int = 1, run_id: str = "run") -> Save:
    return Save(run_id, incarnation, step, (node,), node, n_nodes)


@pytest.mark.parametrize(
    ("found", "newest_done", "wanted"),
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
def test_worth_saving(found: list[Save], newest_done: tuple[int, int], wanted: set[tuple[int, int]]):
    assert worth_saving(found, "run", newest_done) == wanted


class Ended:
    """A process that was started and has ended."""

    def poll(self) -> int | None:
        return 1


class Running:
    def poll(self) -> int | None:
        return None


def courier_of(folder: Path, start: object) -> Courier:
    session = Session("run", str(folder / "run"), str(folder / "run" / "checkpoints"), 2)
    return Courier(folder / "run", folder, Ranks(), session, start=start, sleep=lambda s: None)  # pyright: ignore[reportArgumentType]


def test_a_service_that_ends_at_once_is_started_a_few_times(tmp_path: Path):
    started: list[tuple[Path, ...]] = []
    there = courier_of(tmp_path, lambda *where: (started.append(where), Ended())[1])
    with pytest.raises(RunError, match=r"has ended 4 times; see .*logs/checkpoint_service\.0\.log"):
        there.tell()
    assert len(started) == RESTARTS + 1
    there.close()


def test_a_service_that_hangs_at_its_start_is_told(tmp_path: Path):
    there = courier_of(tmp_path, lambda *where: Running())
    with pytest.raises(RunError, match="did not start within 30 s"):
        there.tell()
    there.close()


def test_what_a_leader_left_half_changed_can_be_used_again(tmp_path: Path):
    """Whatever single file of a slot's change is there when a rank dies, while the service lives on."""
    region = make_region(tmp_path / "run", tmp_path)
    slot = region.slot(0)
    slot.folder.mkdir()
    for marks in (["claimed"], ["claimed", "staged"], ["free", "staged"], ["free"], ["staged"]):
        for state in marks:
            slot.mark(state).write_text("{}")  # pyright: ignore[reportArgumentType]
        there = courier_of(tmp_path, lambda *where: Running())
        there._service_lives = lambda: True  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        assert there.find_unsaved((-1, 0)) == set()
        assert slot.state() == "free"
        assert [path.name for path in region.folder.glob("slot-0.*")] == ["slot-0.free"]
        there.close()
