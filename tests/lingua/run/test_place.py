"""Folders and their copies; whose a folder of checkpoints is."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lingua.files import RunError, read_json, write_json
from lingua.run.lock import RunLock, run_in
from lingua.run.place import BINDING, Place, Run, copied_from, is_of_another, place_in, place_of, why_not_ours
from tests.ranks import exit_code_of

A = Run(Place("/runs/a", 7), 1.5)


@pytest.mark.parametrize(
    ("run", "is_gone", "closed"),
    [
        (A, False, False),
        (replace(A, born_s=2.5), False, False),  # begun again after it was removed: the same name
        (Run(Place("/runs/b", 7), 1.5), True, False),  # renamed
        (Run(Place("/elsewhere/b", 7), 1.5), False, False),  # mounted there too
        (Run(Place("/runs/b", 8), 1.5), True, False),  # moved to another disk
        (Run(Place("/runs/b", 8), 1.5), False, True),  # a copy
        (Run(Place("/runs/b", 8), 2.5), False, True),  # another run
        (Run(Place("/runs/b", 8), None), True, True),  # another run, not begun yet
        (Run(Place("/runs/b", 7), 2.5), True, True),  # another run, with the inode of a folder that was removed
    ],
)
def test_whose_checkpoints_are_whose(run: Run, is_gone: bool, closed: bool) -> None:
    assert is_of_another(A, run, is_gone=is_gone) == closed


def test_a_record_says_nothing_in_a_copy_of_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    held = place_of(run)
    record = {"folder": {"path": held.path, "inode": held.inode}}
    assert copied_from(record, run) == ""
    assert copied_from({}, run) == ""  # an older version's
    shutil.copytree(run, tmp_path / "copy")
    assert copied_from(record, tmp_path / "copy") == str(run)
    run.rename(tmp_path / "renamed")
    assert copied_from(record, tmp_path / "renamed") == ""
    (tmp_path / "link").symlink_to(tmp_path / "renamed")
    assert copied_from(record, tmp_path / "link") == ""


@pytest.mark.parametrize(
    "record", [None, [], {}, {"folder": 3}, {"folder": {"path": "/a"}}, {"folder": {"inode": "x"}}]
)
def test_a_record_without_a_folder_names_none(record: Any) -> None:
    assert place_in(record) is None


# -- on a disk -----------------------------------------------------------------------------------------------------


def start(run_dir: Path, checkpoints: Path) -> None:
    """An attempt that binds the checkpoints and ends."""
    run_dir.mkdir(exist_ok=True)
    checkpoints.mkdir(exist_ok=True)
    with RunLock(run_dir) as lock:
        lock.bind(checkpoints)
        lock.check()


def test_the_checkpoints_of_one_run_are_closed_to_others(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    start(tmp_path / "a", shared)
    start(tmp_path / "a", shared)
    for _ in range(2):  # also when it is tried again
        with pytest.raises(RunError, match=r"shared holds the checkpoints of another run, .*/a; choose .*owner\.json"):
            start(tmp_path / "b", shared)
    (shared / BINDING).unlink()  # as the message says
    start(tmp_path / "b", shared)
    with pytest.raises(RunError, match="another run"):
        start(tmp_path / "a", shared)


def test_a_new_run_with_the_inode_of_a_removed_one_is_another(tmp_path: Path) -> None:
    start(tmp_path / "a", tmp_path / "shared")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").mkdir()
    record = read_json(tmp_path / "shared" / BINDING)
    record["run"]["inode"] = (tmp_path / "b").stat().st_ino
    write_json(tmp_path / "shared" / BINDING, record)
    for _ in range(2):
        with pytest.raises(RunError, match="another run"):
            start(tmp_path / "b", tmp_path / "shared")


def test_a_run_that_was_renamed_or_moved_keeps_its_checkpoints_and_a_copy_gets_none(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    start(tmp_path / "a", shared)
    (tmp_path / "a").rename(tmp_path / "renamed")
    start(tmp_path / "renamed", shared)
    assert read_json(shared / BINDING)["run"]["path"] == str(tmp_path / "renamed")
    shutil.copytree(tmp_path / "renamed", tmp_path / "moved")
    with pytest.raises(RunError, match="another run"):
        start(tmp_path / "moved", shared)
    shutil.rmtree(tmp_path / "renamed")
    start(tmp_path / "moved", shared)


def test_a_copy_of_the_checkpoints_is_nobodys(tmp_path: Path) -> None:
    start(tmp_path / "a", tmp_path / "a" / "checkpoints")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # with all it holds
    start(tmp_path / "b", tmp_path / "b" / "checkpoints")
    start(tmp_path / "a", tmp_path / "a" / "checkpoints")
    with pytest.raises(RunError, match="another run"):
        start(tmp_path / "c", tmp_path / "a" / "checkpoints")


def test_of_two_runs_that_begin_at_once_one_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def other_first(source: Path, target: Path) -> None:
        if Path(target).name == BINDING:
            monkeypatch.setattr(os, "link", real)
            assert exit_code_of(lambda: start(tmp_path / "b", tmp_path / "shared")) == 0
        real(source, target)

    monkeypatch.setattr(os, "link", other_first)
    with pytest.raises(RunError, match=r"of another run, .*/b;"):
        start(tmp_path / "a", tmp_path / "shared")


def test_a_run_whose_checkpoints_were_given_away_is_told(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (tmp_path / "a").mkdir()
    shared.mkdir()
    with RunLock(tmp_path / "a") as lock:
        lock.bind(shared)
        (shared / BINDING).unlink()
        lock.check()  # nobody has them
        start(tmp_path / "b", shared)
        with pytest.raises(RunError, match=r"shared belongs to another run now, .*/b; attempt 1 of .*/a stops"):
            lock.check()


def test_a_damaged_binding_is_one_sentence(tmp_path: Path) -> None:
    start(tmp_path / "a", tmp_path / "shared")
    (tmp_path / "shared" / BINDING).write_text("{}")
    with pytest.raises(RunError, match=r"owner\.json does not say whose checkpoints these are; remove it"):
        start(tmp_path / "a", tmp_path / "shared")


def test_a_run_that_is_still_to_come_has_no_other_s_checkpoints(tmp_path: Path) -> None:
    start(tmp_path / "a", tmp_path / "shared")
    assert why_not_ours(tmp_path / "shared", run_in(tmp_path / "b"))
    assert why_not_ours(tmp_path / "shared", run_in(tmp_path / "a")) is None
    assert why_not_ours(tmp_path / "nowhere", run_in(tmp_path / "b")) is None
