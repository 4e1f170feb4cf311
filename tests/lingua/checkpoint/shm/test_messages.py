"""What ranks and service say to each other: whole, complete, bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.checkpoint.shm import area
from lingua.checkpoint.shm.area import Events, Region, Save, make_region, read_run, write_run
from lingua.files import RunError
from tests.fakes import FaultyFiles
from tests.slotted import World


@pytest.fixture
def region(tmp_path: Path) -> Region:
    return make_region(tmp_path / "run", tmp_path)


def numbers(events: Events) -> list[int]:
    return [event["n"] for event in events.read()]


# -- session -------------------------------------------------------------------------------------------------------


def test_session(tmp_path: Path, region: Region) -> None:
    assert read_run(region) is None
    region.session.reserve()
    assert read_run(region) is None
    told = World(tmp_path).served(3, rescue=((2, 100),), deadline_s=7.5, verified=(1, 2), job=("77", 1), keep_every=5)
    write_run(region, told)
    assert read_run(region) == told
    with pytest.raises(OSError, match="No space"):
        write_run(region, World(tmp_path).served(4), files=FaultyFiles(2))
    assert read_run(region) == told


@pytest.mark.parametrize("change", [{"unknown": 1}, {"args": None}, {"args": {"unknown": 1}}, {"rescue": [3]}, None])
def test_a_session_of_another_version(tmp_path: Path, region: Region, change: dict[str, object] | None) -> None:
    write_run(region, World(tmp_path).served(3))
    region.session.write([] if change is None else region.session.read() | change)
    with pytest.raises(RunError, match=r"session is of another version of lingua .*; remove it"):
        read_run(region)


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


def test_events_from_now_on(region: Region) -> None:
    service = Events(region)
    assert Events(region).read() == []
    service.send({"n": 1})
    ranks = Events(region)
    service.send({"n": 2})
    service.send({"n": 3})
    assert numbers(ranks) == [2, 3]
    assert numbers(ranks) == []


def test_ranks_that_come_before_anything_was_said(region: Region) -> None:
    ranks, service = Events(region), Events(region)
    service.send({"n": 1})
    assert numbers(ranks) == [1]


def test_the_file_is_bounded_and_nothing_is_missed(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(area, "EVENTS_BYTES", 1000)
    ranks, service = Events(region), Events(region)
    seen: list[int] = []
    for n in range(1000):
        service.send({"n": n, "why": "x" * (n % 50)})
        if n % 5 == 0:
            seen += numbers(ranks)
    seen += numbers(ranks)
    assert seen == list(range(1000))
    assert [(path.name, path.stat().st_size) for path in region.folder.iterdir()] == [("events", 2000)]


def test_who_reads_too_late_hears_the_newest(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(area, "EVENTS_BYTES", 1000)
    ranks, service = Events(region), Events(region)
    for n in range(1000):
        service.send({"n": n})
    heard = numbers(ranks)
    assert len(heard) > 10
    assert heard == list(range(1000))[-len(heard) :]
    service.send({"n": 1000})
    assert numbers(ranks) == [1000]


def test_an_event_that_is_too_long_is_refused(region: Region) -> None:
    ranks, service = Events(region), Events(region)
    with pytest.raises(OSError, match=r"File too large: .*/events"):
        service.send({"n": 1, "why": "x" * area.EVENTS_BYTES})
    service.send({"n": 2})
    assert numbers(ranks) == [2]


def test_a_service_that_comes_after_another_goes_on_with_its_events(region: Region) -> None:
    ranks = Events(region)
    Events(region).send({"n": 1})
    assert numbers(ranks) == [1]
    Events(region).send({"n": 2})
    assert numbers(ranks) == [2]


def test_events_are_no_link(region: Region, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"")
    region.events.path.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        Events(region).send({"n": 1})
    assert (tmp_path / "precious").read_bytes() == b""
