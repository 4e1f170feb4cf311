"""What a path that is no run is said to be."""

import os
from pathlib import Path

import pytest

from lingua.run.find import find_run, find_runs, no_run


def make_run(path: Path, age_s: float = 0.0) -> Path:
    (path / "incarnations").mkdir(parents=True)
    (path / "config.yaml").write_text("name: x\n")
    os.utime(path / "incarnations", (1e9 - age_s, 1e9 - age_s))
    return path


def test_runs_are_found_below_a_folder_and_not_inside_a_run(tmp_path: Path):
    for name in ("a", "sweep/tasks/b", "a/inside", "1/2/3/4/5/deep"):
        make_run(tmp_path / name)
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a", "sweep/tasks/b"]
    assert find_runs(tmp_path / "nothing") == []
    assert find_run(tmp_path / "a") == tmp_path / "a"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("mine", "mine does not exist; did you mean out/mine?"),
        ("out/minne", "out/minne does not exist; did you mean out/mine?"),
        ("elsewhere/mien", "elsewhere/mien does not exist; did you mean elsewhere/men or out/mine?"),
        ("configs/mine.yaml", "configs/mine.yaml is a file, not a run; did you mean out/mine?"),
        ("out/mine/train.log", "out/mine/train.log is a file, not a run; did you mean out/mine?"),
        ("out/mine/checkpoints", "out/mine/checkpoints is not a run: it has no config.yaml; did you mean out/mine?"),
        ("out/mine@3", "out/mine@3 is not a run; leave out the step: out/mine"),
        ("configs", "configs is not a run: it has no config.yaml; `lingua runs FOLDER` lists the runs below a folder"),
        ("xyz", "xyz does not exist; `lingua runs FOLDER` lists the runs below a folder"),
        ("elsewhere", "elsewhere is a folder of runs, not a run; name one: elsewhere/men"),
        (
            "out",
            "out is a folder of runs, not a run; name one: out/mine, out/sweep/1, out/sweep/0, out/sweep/3 "
            "and 2 more: `lingua runs out`",
        ),
    ],
)
def test_what_is_no_run_is_told_with_the_runs_that_may_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, sentence: str
):
    monkeypatch.chdir(tmp_path)
    make_run(Path("out/mine"), age_s=-1)
    for n, age_s in enumerate((2, 1, 9, 3, 8)):
        make_run(Path(f"out/sweep/{n}"), age_s)
    make_run(Path("elsewhere/men"))
    (tmp_path / "out/mine/checkpoints").mkdir()
    Path("configs").mkdir()
    for file in ("configs/mine.yaml", "out/mine/train.log"):
        Path(file).write_text("")
    assert str(no_run(path)) == sentence
