"""The area of a run in a node's memory: records stay whole, one mark at a time, nothing that others can read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lingua.checkpoint.publish import FileFacts
from lingua.checkpoint.shm.area import (
    EVENTS_BYTES,
    MARK_BYTES,
    SERVICE_LOCK,
    TRAINER_LOCK,
    Events,
    Save,
    ShmArea,
    Slot,
    State,
    area_of,
    base,
    make_area,
    read_run,
    write_run,
)
from lingua.checkpoint.shm.record import HEAD_BYTES, Record
from lingua.files import RunError
from tests.fakes import FaultyFiles, KillFiles
from tests.slotted import Start, World, a_rank_lives, killed

HALF_BYTES = 4096
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


def test_a_snapshot_that_an_earlier_version_left_in_memory_is_found(slot: Slot) -> None:
    slot.put_mark(SAVE)
    mark = {"run_id": "run", "incarnation": 3, "step": 1000, "ranks": [0, 1], "node": 0, "n_nodes": 1}
    Record(slot.mark("staged"), MARK_BYTES).write(mark)
    for rank in SAVE.ranks:
        slot.report_ready(rank, SAVE, FACTS)
    assert slot.complete() == (SAVE, FACTS)


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


def test_names_of_areas_are_plain(hostile_dir: Path) -> None:
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


def test_a_slot_that_is_a_link_is_neither_filled_nor_cleared(area: ShmArea, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    area.slot(0).folder.symlink_to(precious)
    area.slot(0).mark("free").touch()
    assert area.slots() == []
    with pytest.raises(RunError, match=r"slot-0 is a link; remove it, or choose another place by checkpoint\.shm_path"):
        area.make_slots(1, set())
    assert [path.name for path in precious.iterdir()] == ["file"]
    area.remove()
    assert (precious / "file").read_text() == "kept"


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


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "record", HALF_BYTES)


def test_what_was_written_last_is_read(record: Record) -> None:
    with pytest.raises(FileNotFoundError):
        record.read()
    record.reserve()
    assert record.read() is None
    for value in (
        {"step": 1},
        {"step": 2, "why": 'a line\nand "another"'},
        [3],
        None,
        {"step": 4, "long": "x" * 3000},
        5,
    ):
        record.write(value)
        record.reserve()
        assert record.read() == value
        assert Record(record.path, HALF_BYTES).read() == value


def test_a_write_takes_no_new_file_and_no_more_bytes(record: Record) -> None:
    record.reserve()
    before = record.path.stat()
    files = FaultyFiles()
    for n in range(5):
        record.write({"n": n, "long": "x" * 3000}, files=files)
    after = record.path.stat()
    assert {line.split()[0] for line in files.log} == {"reserve", "write", "close"}
    assert os.listdir(record.path.parent) == ["record"]
    assert (before.st_ino, before.st_size, before.st_blocks) == (after.st_ino, after.st_size, after.st_blocks)
    assert after.st_blocks * 512 >= 2 * HALF_BYTES


@pytest.mark.parametrize("n_written", [0, 1, 2, 3])
def test_killed_or_failing_in_a_write_it_is_as_before_or_as_after(record: Record, n_written: int) -> None:
    record.reserve()
    before = None
    for n in range(n_written):
        record.write(before := {"n": n, "long": "x" * 1000})
    after = {"n": 99, "long": "y" * 2000}
    for n, expected in ((1, before), (2, before), (3, after)):  # reserve, write, close
        assert killed(lambda n=n: record.write(after, files=KillFiles(n)))
        assert record.read() == expected
        record.write(before)
        with pytest.raises(OSError, match="Input/output error"):
            record.write(after, files=FaultyFiles(n, error=errno.EIO))
        assert record.read() == expected
        record.write(before)
        assert record.read() == before


def test_after_any_part_of_a_write_the_document_before_is_read(record: Record) -> None:
    for value in (1, 2, "longer than the first"):
        record.write(value)
    after = record.path.read_bytes()
    begin = 3 % 2 * HALF_BYTES
    end = after.index(b"\n", begin) + 1
    record.path.unlink()
    for value in (1, 2):
        record.write(value)
    for n_bytes in range(end - begin + 1):
        with record.path.open("r+b") as file:
            file.seek(begin)
            file.write(after[begin : begin + n_bytes])
        assert record.read() == ("longer than the first" if begin + n_bytes == end else 2)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"step": 1}\n', b"\0" * 100, b"1 \n", b"1 x {}\n", b"\n\n", os.urandom(9000)]
)
def test_what_is_not_a_record_reads_as_none(record: Record, content: bytes) -> None:
    record.path.write_bytes(content)
    assert record.read() is None
    record.write({"step": 1})
    assert record.read() == {"step": 1}


def test_what_is_too_long_is_refused(record: Record) -> None:
    record.write(1)
    longest = "x" * (HALF_BYTES - HEAD_BYTES - 2)
    assert record.fits(longest)
    with pytest.raises(OSError, match=r"File too large: .*record"):
        record.write(longest + "x")
    assert record.read() == 1
    record.write(longest)
    assert record.read() == longest


def test_without_room_at_first_the_file_is_named(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*record"):
        record.reserve()


def test_a_reader_beside_a_writer_sees_whole_documents_in_order(record: Record) -> None:
    record.write([0, ""])

    def write() -> None:
        for n in range(1, 500):
            record.write([n, chr(97 + n % 26) * (n % 1500)])

    pid = os.fork()
    if pid == 0:
        try:
            write()
        finally:
            os._exit(0)
    seen, gone = 0, 0
    while not gone:
        gone = os.waitpid(pid, os.WNOHANG)[0]
        found = record.read()
        if found is not None:  # lapped twice within one read
            n, text = found
            assert n >= seen
            assert text == chr(97 + n % 26) * (n % 1500)
            seen = n
    assert record.read()[0] == 499


# -- what ranks and service send each other ----------------------------------------------------------------------------


def numbers(events: Events) -> list[int]:
    return [event["n"] for event in events.read()]


# -- session -------------------------------------------------------------------------------------------------------


def test_session(tmp_path: Path, area: ShmArea) -> None:
    assert read_run(area) is None
    area.session.reserve()
    assert read_run(area) is None
    told = World(tmp_path).served(3, rescue=((2, 100),), deadline_s=7.5, verified=(1, 2), job=("77", 1), keep_every=5)
    write_run(area, told)
    assert read_run(area) == told
    with pytest.raises(OSError, match="No space"):
        write_run(area, World(tmp_path).served(4), files=FaultyFiles(2))
    assert read_run(area) == told


@pytest.mark.parametrize("change", [{"unknown": 1}, {"args": None}, {"args": {"unknown": 1}}, {"rescue": [3]}, None])
def test_a_session_of_another_version(tmp_path: Path, area: ShmArea, change: dict[str, object] | None) -> None:
    write_run(area, World(tmp_path).served(3))
    area.session.write([] if change is None else area.session.read() | change)
    with pytest.raises(RunError, match=r"session is of another version of lingua .*; remove it"):
        read_run(area)


@pytest.mark.parametrize(
    ("save", "wanted", "given_up"),
    [
        (Save("the-run", 3, 500, (0,)), True, False),
        (Save("the-run", 2, 100, (0,)), True, False),
        (Save("the-run", 2, 200, (0,)), False, True),
        (Save("the-run", 1, 100, (0,)), False, True),
        (Save("the-run", 4, 500, (0,)), False, False),  # this session is no longer the newest
        (Save("another", 3, 500, (0,)), False, True),
        (Save("another", 2, 100, (0,)), False, True),
    ],
)
def test_which_saves_a_session_wants(tmp_path: Path, save: Save, wanted: bool, given_up: bool) -> None:
    told = World(tmp_path).served(3, rescue=((2, 100),))
    assert (told.wants(save), told.gives_up(save)) == (wanted, given_up)


# -- events --------------------------------------------------------------------------------------------------------


def test_events_from_now_on(area: ShmArea) -> None:
    service = Events(area)
    assert Events(area).read() == []
    service.send({"n": 1})
    ranks = Events(area)
    service.send({"n": 2})
    service.send({"n": 3})
    assert numbers(ranks) == [2, 3]
    assert numbers(ranks) == []


def test_ranks_that_come_before_anything_was_said(area: ShmArea) -> None:
    ranks, service = Events(area), Events(area)
    service.send({"n": 1})
    assert numbers(ranks) == [1]


def test_the_file_is_bounded_and_nothing_is_missed(area: ShmArea, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.checkpoint.shm.area.EVENTS_BYTES", 1000)
    ranks, service = Events(area), Events(area)
    seen: list[int] = []
    for n in range(1000):
        service.send({"n": n, "why": "x" * (n % 50)})
        if n % 5 == 0:
            seen += numbers(ranks)
    seen += numbers(ranks)
    assert seen == list(range(1000))
    assert [(path.name, path.stat().st_size) for path in area.folder.iterdir()] == [("events", 2000)]


def test_who_reads_too_late_hears_the_newest(area: ShmArea, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.checkpoint.shm.area.EVENTS_BYTES", 1000)
    ranks, service = Events(area), Events(area)
    for n in range(1000):
        service.send({"n": n})
    heard = numbers(ranks)
    assert len(heard) > 10
    assert heard == list(range(1000))[-len(heard) :]
    service.send({"n": 1000})
    assert numbers(ranks) == [1000]


def test_an_event_that_is_too_long_is_refused(area: ShmArea) -> None:
    ranks, service = Events(area), Events(area)
    with pytest.raises(OSError, match=r"File too large: .*/events"):
        service.send({"n": 1, "why": "x" * EVENTS_BYTES})
    service.send({"n": 2})
    assert numbers(ranks) == [2]


def test_a_service_that_comes_after_another_goes_on_with_its_events(area: ShmArea) -> None:
    ranks = Events(area)
    Events(area).send({"n": 1})
    assert numbers(ranks) == [1]
    Events(area).send({"n": 2})
    assert numbers(ranks) == [2]


def test_events_are_no_link(area: ShmArea, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"")
    area.events.path.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        Events(area).send({"n": 1})
    assert (tmp_path / "precious").read_bytes() == b""
