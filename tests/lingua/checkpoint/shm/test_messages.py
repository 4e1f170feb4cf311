"""What ranks and service say to each other: whole, complete, bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.checkpoint.shm.area import EVENTS_BYTES, Events, Save, ShmArea, make_area, read_run, write_run
from lingua.files import RunError
from tests.fakes import FaultyFiles
from tests.slotted import World


@pytest.fixture
def area(tmp_path: Path) -> ShmArea:
    return make_area(tmp_path / "run", tmp_path)


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
