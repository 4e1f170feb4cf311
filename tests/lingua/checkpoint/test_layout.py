"""Names are matched whole, and sort as numbers do."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.checkpoint import layout


def test_names() -> None:
    root = Path("c")
    assert layout.folder(root, 1000) == Path("c/0000001000")
    assert layout.done_mark(root, 1000) == Path("c/checkpoint_0000001000.done")
    assert layout.coming(layout.folder(root, 12), 3) == Path("c/incarnation-3/0000000012")
    assert layout.going(layout.done_mark(root, 12), 3) == Path("c/incarnation-3/checkpoint_0000000012.done.trash")
    assert layout.evaluation(Path("run"), 7) == Path("run/evals/0000000007")
    assert layout.train_state_file(11) == "train_state.00011.json"


@pytest.mark.parametrize(
    "name", ["12", "0000000012.trash", "0000000012\n", "step-0000000012", "٠٠٠٠٠٠٠٠١٢", "00000000012"]
)
def test_no_folder_of_a_step(name: str) -> None:
    assert layout.parse_folder(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_12.done",
        "checkpoint_0000000012.done.broken-1",
        "checkpoint_0000000012.done.trash",
        "0000000012.done",
    ],
)
def test_no_mark(name: str) -> None:
    assert layout.parse_done(name) is None


def test_what_is_there(tmp_path: Path) -> None:
    for name in ("0000000002", "0000000001", "incarnation-2", "incarnation-12.closed", "0000000001.broken-1", "pins"):
        (tmp_path / name).mkdir()
    layout.done_mark(tmp_path, 1).write_text("{}")
    layout.done_mark(tmp_path, 10).write_text("{}")
    assert layout.done_steps(tmp_path) == [1, 10]
    assert layout.unmarked_folders(tmp_path) == [2]
    staging_dir = layout.staging_dir(tmp_path, 2)
    (staging_dir / "0000000003").mkdir()
    (staging_dir / "0000000004.unmarked").mkdir()
    layout.going(layout.done_mark(tmp_path, 7), 2).write_text("{}")
    found = [(t.step, t.kind, t.is_mark) for t in layout.temporaries(staging_dir)]
    assert found == [(3, "coming", False), (4, "unmarked", False), (7, "trash", True)]
    assert layout.staging_dirs(tmp_path) == [(12, tmp_path / "incarnation-12.closed"), (2, staging_dir)]
    assert layout.aside(tmp_path / "0000000001", "broken").name == "0000000001.broken-2"
    assert layout.done_steps(tmp_path / "absent") == []
