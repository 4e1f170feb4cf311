"""What RUN, RUN@step and folders mean; looking changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lingua.checkpoint import layout, lookup
from lingua.files import RunError
from tests.checkpoints import FILES, damage, make_run, names_under


def test_a_run_means_its_newest_and_a_step_that_one(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 1, 2, 3)
    assert [found.step for found in lookup.find(tmp_path / "run")] == [3, 2, 1]
    assert lookup.find_one(f"{tmp_path}/run@2") == lookup.Checkpoint(layout.folder(root, 2), root, 2, tmp_path / "run")


def test_a_folder_inside_a_run_is_vouched_for_by_its_mark_and_one_that_travelled_by_its_manifest(
    tmp_path: Path,
) -> None:
    root = make_run(tmp_path / "run", 1, 2)
    assert lookup.find_one(layout.folder(root, 2)).step == 2
    travelled = layout.folder(root, 2).rename(tmp_path / "elsewhere")
    found = lookup.find_one(travelled)
    assert (found.root, found.step) == (None, None)
    assert found.damage() == []


def test_checkpoints_on_another_disk(tmp_path: Path) -> None:
    make_run(tmp_path / "other", 7)
    run = tmp_path / "run"
    make_run(run, path=str(tmp_path / "other" / "checkpoints"))
    assert lookup.find_one(run).step == 7


def test_a_name_with_an_at_in_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run@5", 1, 5)
    assert lookup.split(tmp_path / "run@5") == (tmp_path / "run@5", None)
    assert lookup.find_one(f"{tmp_path}/run@5@1").step == 1


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("absent@3", "absent does not exist; `lingua runs"),
        ("run@7", "no published checkpoint of step 7; it has 1, 2"),
        ("empty", "has no published checkpoint yet; `lingua status "),
        ("other", "is not a run: it has no config.yaml"),
        ("other@3", "other is not a run: it has no config.yaml"),
        ("new", "has no published checkpoint yet; `lingua status "),
        ("new@3", "no published checkpoint of step 3; it has none"),
    ],
)
def test_what_is_not_there_is_told(tmp_path: Path, path: str, sentence: str) -> None:
    make_run(tmp_path / "run", 1, 2)
    make_run(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("name: new")
    with pytest.raises(RunError, match=sentence):
        lookup.find(tmp_path / path)


def test_intact_passes_over_damage_without_touching_it(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 1, 2, 3)
    damage(root, 3)
    (layout.folder(root, 2) / FILES[2]).unlink()
    before = names_under(tmp_path)
    assert lookup.intact(tmp_path / "run").step == 1
    assert lookup.intact(tmp_path / "run", needed=lambda name: name == FILES[1]).step == 2
    assert lookup.intact(tmp_path / "run", sizes_only=True).step == 3  # its sizes are right
    with pytest.raises(RunError, match=r"does not verify: model\.00000\.distcp does not have the content"):
        lookup.intact(f"{tmp_path}/run@3")
    damage(root, 1)
    with pytest.raises(RunError, match="no published checkpoint that verifies"):
        lookup.intact(tmp_path / "run")
    damage(root, 1)
    assert names_under(tmp_path) == before


def test_a_manifest_that_is_not_the_marked_one(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 1)
    (layout.folder(root, 1) / layout.MANIFEST).write_text("{}")
    (problem,) = lookup.find_one(tmp_path / "run").damage()
    assert "does not match the checksum" in problem


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1)
    checkpoint, read = lookup.find_one(tmp_path / "run"), []
    assert checkpoint.damage(advance=read.append) == []
    assert sum(read) == sum(fact.size_bytes for fact in checkpoint.manifest().values())


def test_looking_needs_no_torch() -> None:
    probe = "import sys, lingua.checkpoint.lookup; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
