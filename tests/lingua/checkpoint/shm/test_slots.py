"""Slots and areas: one mark at a time, nothing of anybody else's, nothing that others can read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lingua.checkpoint.publish import FileFacts
from lingua.checkpoint.shm.area import (
    SERVICE_LOCK,
    TRAINER_LOCK,
    Save,
    ShmArea,
    Slot,
    State,
    area_of,
    base,
    make_area,
)
from lingua.files import RunError
from tests.fakes import FaultyFiles
from tests.slotted import Start, World, a_rank_lives

SAVE = Save("run", 3, 1000, ranks=(0, 1))
FACTS = {"a": FileFacts(1, "aa")}


@pytest.fixture
def area(tmp_path: Path) -> ShmArea:
    return make_area(tmp_path / "run", tmp_path)


@pytest.fixture
def slot(area: ShmArea) -> Slot:
    area.make_slots(1, set())
    return area.slot(0)


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def marks(area: ShmArea) -> list[str]:
    return sorted(path.name for path in area.folder.iterdir() if not path.is_dir())


# -- the life of a slot --------------------------------------------------------------------------------------------


def test_a_slot_is_complete_when_every_rank_has_said_so(slot: Slot) -> None:
    assert slot.state() == "free"
    assert slot.save() is None
    slot.put_mark(SAVE)
    assert (slot.state(), slot.save(), slot.complete()) == ("staged", SAVE, None)
    slot.report_ready(0, SAVE, {"a": FileFacts(1, "aa")})
    assert slot.complete() is None
    slot.report_ready(1, SAVE, {"b": FileFacts(2, "bb")})
    assert slot.complete() == (SAVE, {"a": FileFacts(1, "aa"), "b": FileFacts(2, "bb")})
    slot.report_unready(1)
    slot.report_unready(1)
    assert slot.complete() is None


@pytest.mark.parametrize(
    "other", [Save("run", 3, 2000, (0, 1)), Save("run", 4, 1000, (0, 1)), Save("another", 3, 1000, (0, 1))]
)
def test_ready_for_another_save_does_not_count(slot: Slot, other: Save) -> None:
    slot.put_mark(SAVE)
    slot.report_ready(0, SAVE, FACTS)
    slot.report_ready(1, other, FACTS)
    assert slot.complete() is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b'{"run_id": 1}', b'{"step": 1, "ranks": 3}'])
def test_a_mark_or_a_ready_file_that_says_nothing(slot: Slot, text: bytes) -> None:
    slot.put_mark(SAVE)
    slot.report_ready(0, SAVE, FACTS)
    slot.ready_file(1).write_bytes(text)
    assert slot.complete() is None
    slot.mark("staged").write_bytes(text)
    assert slot.save() is None
    assert slot.complete() is None


def test_of_two_who_want_a_slot_one_gets_it(slot: Slot) -> None:
    slot.put_mark(SAVE)
    assert slot.change("staged", "draining")
    assert not slot.change("staged", "claimed")
    assert slot.state() == "draining"


def test_a_claimed_slot_says_its_new_save_before_it_is_staged(slot: Slot) -> None:
    slot.put_mark(SAVE)
    slot.change("staged", "claimed")
    files = FaultyFiles()
    newer = Save("run", 3, 2000, (0,))
    slot.put_mark(newer, files=files)
    assert [line.split()[0] for line in files.log] == ["reserve", "write", "close", "rename"]
    assert (slot.state(), slot.save()) == ("staged", newer)


@pytest.mark.parametrize("old", ["free", "claimed"])
@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_where_a_mark_cannot_be_put_the_slot_is_free(area: ShmArea, slot: Slot, old: State, fail_at: int) -> None:
    if old == "claimed":
        slot.put_mark(SAVE)
        slot.change("staged", "claimed")
    with pytest.raises(OSError, match="No space"):
        slot.put_mark(SAVE, files=FaultyFiles(fail_at))
    assert slot.state() == "free"
    assert marks(area) == ["slot-0.free"]


# -- after a death -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, "free"),
        ("free", "free"),
        ("staged", "staged"),
        ("draining", "staged"),
        ("claimed", "staged"),
    ],
)
def test_recover(area: ShmArea, slot: Slot, found: State | None, expected: State) -> None:
    slot.mark("free").unlink()
    if found is not None:
        slot.mark(found).touch()
    area.recover()
    assert slot.state() == expected
    assert marks(area) == [f"slot-0.{expected}"]


def test_slots_are_made_once_and_kept(area: ShmArea) -> None:
    area.make_slots(2, {"a"})
    (area.slot(0).folder / "a").write_bytes(b"kept")
    (area.slot(0).folder / "of another world size").touch()
    (area.slot(1).folder / "b").touch()
    area.slot(1).put_mark(SAVE)
    area.make_slots(2, {"a"})
    assert os.listdir(area.slot(0).folder) == ["a"]
    assert os.listdir(area.slot(1).folder) == ["b"], "it is not free"
    assert marks(area) == ["slot-0.free", "slot-1.staged"]


def test_fewer_slots_give_their_memory_back(area: ShmArea) -> None:
    area.make_slots(3, {"a"})
    (area.slot(2).folder / "a").touch()
    area.slot(1).put_mark(SAVE)
    area.make_slots(1, {"a"})
    assert [slot.number for slot in area.slots()] == [0, 1], "1 holds a save"
    assert marks(area) == ["slot-0.free", "slot-1.staged"]


def test_making_slots_may_die_anywhere(tmp_path: Path) -> None:
    def make(n: int, files: FaultyFiles) -> ShmArea:
        area = make_area(tmp_path / f"run-{n}", tmp_path)
        (area.slot(2).folder).mkdir(exist_ok=True)
        (area.slot(2).folder / "a").touch()
        area.slot(2).mark("free").touch()
        area.make_slots(2, set(), files=files)
        return area

    counting = FaultyFiles()
    make(0, counting)
    assert counting.n_done > 6
    for n in range(1, counting.n_done + 1):
        with pytest.raises(OSError, match="No space"):
            make(n, FaultyFiles(n))
        area = area_of(tmp_path / f"run-{n}", tmp_path)
        assert all(slot.state() == "free" for slot in area.slots()), "a slot without a mark is never used"
        area.make_slots(2, set())
        assert [slot.number for slot in area.slots()] == [0, 1]


# -- whose it is ---------------------------------------------------------------------------------------------------


def test_regions_tell_runs_apart_and_starts_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    here = area_of(tmp_path / "a" / "run").folder
    assert here != area_of(tmp_path / "b" / "run").folder
    assert here == area_of(tmp_path / "link" / "run").folder
    monkeypatch.chdir(tmp_path / "a")
    assert here == area_of(Path("run")).folder
    assert here.parent == Path(f"/dev/shm/lingua-{os.getuid()}")


def test_names_of_regions_are_plain(hostile_dir: Path) -> None:
    area = make_area(hostile_dir, hostile_dir.parent)
    assert area.folder.parent == base(hostile_dir.parent)
    assert all(c.isalnum() or c in "_.-" for c in area.folder.name)


@pytest.mark.usefixtures("umask")
def test_nobody_else_looks_in(tmp_path: Path) -> None:
    world = World(tmp_path).make()
    start = Start(world, 1)
    with a_rank_lives(make_area(world.run_dir, world.shm())):
        assert mode(base(world.shm())) == mode(start.area.folder) == 0o700
        for name in (TRAINER_LOCK, SERVICE_LOCK):
            start.area.lock(name).close()
            assert mode(start.area.folder / name) == 0o600


@pytest.mark.parametrize("of_base", [True, False])
@pytest.mark.parametrize("kind", ["link", "mode", "file"])
def test_a_place_that_is_not_ours_alone_is_refused(tmp_path: Path, of_base: bool, kind: str) -> None:
    area = area_of(tmp_path / "run", tmp_path)
    path = base(tmp_path) if of_base else area.folder
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "mode":
        path.mkdir(mode=0o755)
    else:
        path.touch()
    what = {"link": "a link", "mode": f"of user {os.getuid()}, mode 755", "file": "not a folder"}[kind]
    with pytest.raises(
        RunError, match=f"{path.name} is {what}; it must be a folder that is yours with mode 700. Remove"
    ):
        make_area(tmp_path / "run", tmp_path)
    if kind == "link":
        assert os.listdir(tmp_path / "elsewhere") == []


def test_a_place_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    base(tmp_path).mkdir(mode=0o700)  # made by `owner` under the name of the other
    with pytest.raises(RunError, match=f"is of user {owner}, mode 700"):
        make_area(tmp_path / "run", tmp_path)


def test_a_memory_file_system_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_area(tmp_path / "run", tmp_path / "nowhere")


def test_locks_are_no_links(area: ShmArea, tmp_path: Path) -> None:
    (area.folder / TRAINER_LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        area.lock(TRAINER_LOCK)
    assert not (tmp_path / "precious").exists()


# -- areas that nobody works in ----------------------------------------------------------------------------------


def test_what_is_not_a_slot(area: ShmArea) -> None:
    area.make_slots(1, set())
    for name in ("slot-x", "slot-1234", "slots", "slot-1.free"):
        (area.folder / name).mkdir()
    (area.folder / "slot-2").touch()
    assert [slot.number for slot in area.slots()] == [0]
