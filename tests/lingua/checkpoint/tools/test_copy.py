"""A copy is whole or absent: killed at every operation, damaged, overtaken by retention."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lingua.checkpoint import layout, lookup, publish
from lingua.checkpoint.publish import DamagedError
from lingua.checkpoint.tools import copy as copying
from lingua.checkpoint.tools.copy import copy_checkpoint, copy_newest, pinned
from lingua.files import DISK, Files, RunError
from tests.checkpoints import FILES, content, damage, make_run, names_under, publish_step
from tests.fakes import FaultyFiles, KillFiles
from tests.ranks import exit_code_of


@pytest.fixture
def tmp_path(shm: Path) -> Path:
    """In memory: thousands of fsyncs cost nothing there."""
    return shm


def copy(run_dir: Path, step: int, target: Path, files: Files = DISK) -> Path:
    return copy_checkpoint(lookup.find_one(f"{run_dir}@{step}"), target, files=files)


def left_in(target: Path) -> set[str]:
    """What a failed copy has left, beside the empty staging_dir that the next start takes away."""
    return {path.name for path in (target / "checkpoints").rglob("*")} - {"incarnation-1"}


def test_the_copy_is_a_checkpoint_of_a_run_and_the_source_is_as_it_was(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 1, 2)
    (root / layout.PINS).mkdir()
    before = names_under(tmp_path / "run")
    copied = copy(tmp_path / "run", 2, tmp_path / "copy")
    assert names_under(tmp_path / "run") == before
    assert copied == layout.folder(tmp_path / "copy" / "checkpoints", 2)
    assert all((copied / name).read_bytes() == content(2, name) for name in FILES)
    found = lookup.intact(tmp_path / "copy")
    assert (found.step, found.run_dir) == (2, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.yaml").is_file()
    assert {path.name for path in (tmp_path / "copy" / "checkpoints").iterdir()} == {
        "0000000002",
        "checkpoint_0000000002.done",
    }


def test_again_and_another_step(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1, 2)
    copied = copy(tmp_path / "run", 2, tmp_path / "copy")
    before = names_under(tmp_path / "copy" / "checkpoints")
    assert copy(tmp_path / "run", 2, tmp_path / "copy") == copied  # nothing is left to do
    assert names_under(tmp_path / "copy" / "checkpoints") == before
    copy(tmp_path / "run", 1, tmp_path / "copy")
    assert layout.done_steps(tmp_path / "copy" / "checkpoints") == [1, 2]


@pytest.mark.soak
def test_killed_at_every_operation(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1)
    counting = FaultyFiles()
    copy(tmp_path / "run", 1, tmp_path / "count", counting)
    for kill_at in range(1, counting.n_done + 1):
        target = tmp_path / str(kill_at)
        code = exit_code_of(lambda n=kill_at, target=target: copy(tmp_path / "run", 1, target, KillFiles(n)))
        assert code == KillFiles.KILLED
        for step in layout.done_steps(target / "checkpoints"):
            assert lookup.find_one(f"{target}@{step}").damage() == []
        copy(tmp_path / "run", 1, target)
        assert lookup.find_one(target).damage() == []
        left = {path.name for path in (target / "checkpoints").iterdir()}
        assert left == {"0000000001", "checkpoint_0000000001.done"}, f"killed at {counting.log[kill_at - 1]}"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1)
    counting = FaultyFiles()
    copy(tmp_path / "run", 1, tmp_path / "count", counting)
    writes = [n for n, what in enumerate(counting.log, 1) if what.startswith("write ")]
    for fail_at in writes:
        target = tmp_path / str(fail_at)
        with pytest.raises(OSError, match="No space left"):
            copy(tmp_path / "run", 1, target, FaultyFiles(fail_at))
        assert left_in(target) == set()


def test_damage_is_found_on_the_way_and_the_next_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_run(tmp_path / "run", 1, 2, 3)
    damage(root, 3)
    (layout.folder(root, 2) / FILES[2]).write_bytes(b"short")
    with pytest.raises(DamagedError, match=r"model\.00000\.distcp does not have the content it was written with"):
        copy(tmp_path / "run", 3, tmp_path / "copy")
    assert left_in(tmp_path / "copy") == set()
    copied = copy_newest(lookup.find(tmp_path / "run"), tmp_path / "copy")
    assert copied.name == "0000000001"
    assert caplog.text.count("is damaged and passed over") == 2
    damage(root, 1)
    with pytest.raises(DamagedError):
        copy_newest(lookup.find(tmp_path / "run"), tmp_path / "other")


def test_the_config_that_travels_names_no_folder_of_the_run(tmp_path: Path) -> None:
    root = make_run(tmp_path / "elsewhere", 1)
    make_run(tmp_path / "run", path=str(root))
    copy(tmp_path / "run", 1, tmp_path / "copy")
    assert lookup.root_of(tmp_path / "copy") == tmp_path / "copy" / "checkpoints"


# -- where it must not go ------------------------------------------------------------------------------------------


def test_not_into_a_run_nor_beside_another_ones_copies(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1)
    make_run(tmp_path / "other", 1)
    (tmp_path / "other" / "run.sh").write_text("")
    before = names_under(tmp_path)
    with pytest.raises(RunError, match="is a run that was trained in that folder"):
        copy(tmp_path / "run", 1, tmp_path / "other")
    assert names_under(tmp_path) == before
    (tmp_path / "other" / "run.sh").unlink()
    with pytest.raises(RunError, match="holds copies from another run"):
        copy(tmp_path / "run", 1, tmp_path / "other")


def test_not_over_another_checkpoint_of_that_step(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 1)
    copy(tmp_path / "run", 1, tmp_path / "copy")
    publish.set_aside(tmp_path / "run", root, 1, "later")
    facts = {"other": publish.write_hashed(_folder(root), [b"other"])}
    publish.publish(root, 1, 1, facts)
    with pytest.raises(RunError, match="has another checkpoint of step 1"):
        copy(tmp_path / "run", 1, tmp_path / "copy")
    assert lookup.find_one(tmp_path / "copy").damage() == []


def _folder(root: Path) -> Path:
    folder = layout.coming(layout.folder(root, 1), 1)
    folder.mkdir()
    return folder / "other"


def test_too_little_room_is_told_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", 1)
    monkeypatch.setattr(copying, "free_bytes", lambda path: 100)
    with pytest.raises(RunError, match=r"has 100 B free, the checkpoint takes \d"):
        copy(tmp_path / "run", 1, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# -- retention meanwhile -------------------------------------------------------------------------------------------


class Watching(Files):
    """Looks at the source's pins while the copy is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: list[set[int]] = []

    def create(self, path: Path) -> int:
        self.seen.append(publish.pinned_steps(self.root, 0))
        return super().create(path)


def test_retention_keeps_what_is_being_copied(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 1)
    watching = Watching(root)
    copy(tmp_path / "run", 1, tmp_path / "copy", watching)
    assert all(seen == {1} for seen in watching.seen)
    assert publish.pinned_steps(root, 0) == set()


def test_a_step_that_retention_has_just_deleted(tmp_path: Path) -> None:
    root = make_run(tmp_path, 1, 2)
    publish.retire(root, 1, 1)
    with pytest.raises(RunError, match="step 1 is gone"), pinned(root, 1, "test"):
        pass
    assert list((root / layout.PINS).iterdir()) == []


def test_a_run_that_may_not_be_written_to_is_copied_without_a_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> Path:
        raise PermissionError(13, "Permission denied")

    make_run(tmp_path / "run", 1)
    monkeypatch.setattr(publish, "pin", refuse)
    with caplog.at_level(logging.WARNING):
        copy(tmp_path / "run", 1, tmp_path / "copy")
    assert "step 1 is not pinned (Permission denied)" in caplog.text
    assert lookup.find_one(tmp_path / "copy").damage() == []


class Retiring(Files):
    """A run whose retention deletes the checkpoint while its second file is being copied."""

    def __init__(self, root: Path) -> None:
        self.root, self.n_created = root, 0

    def create(self, path: Path) -> int:
        self.n_created += 1
        if self.n_created == 2:
            publish.retire(self.root, 1, 1)
        return super().create(path)


def test_without_a_pin_retention_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_run(tmp_path / "run", 1)
    publish_step(root, 2)
    with pytest.raises(RunError, match="the run's retention has deleted step 1 meanwhile; copy another step"):
        copy(tmp_path / "run", 1, tmp_path / "copy", Retiring(root))
    assert left_in(tmp_path / "copy") == set()
