"""A run that is not there is told alike by every command that takes one, and so is a step that it does not have.

What a command names wrongly exits with 2, whichever command it is; what another moment may put right exits with 1.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.cli.main import app
from tests.checkpoints import make_run
from tests.cli import Lingua

TAKE_A_RUN = [
    "why RUN", "status RUN", "status out/mine RUN", "diff out/mine RUN", "report RUN", "stop RUN", "profile RUN",
    "watch RUN", "runs RUN", "ckpt ls RUN", "ckpt gc RUN", "eval --follow RUN", "replay RUN --step 1",
    "data audit RUN", "data rows RUN --step 1",
]  # fmt: skip
TAKE_A_STEP = [
    "ckpt verify RUN", "ckpt inspect RUN", "ckpt diff RUN out/mine", "ckpt wait RUN@1", "ckpt copy RUN new",
    "ckpt consolidate RUN new", "ckpt average RUN out/mine --out new", "fork RUN new", "generate RUN", "chat RUN",
    "generate ckpt=RUN", "eval RUN", "export RUN new", "import --run RUN new", "push RUN me/mine --dry-run",
]  # fmt: skip
TAKE_NONE = {
    "check", "recipe", "schema", "components", "train", "launch", "drill", "doctor", "init", "sweep", "data",
}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "out" / "mine", 1)
    (tmp_path / "out" / "mine" / "config.yaml").write_text("name: mine\n")
    (tmp_path / "out" / "mine" / "incarnations").mkdir(exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("words", [*TAKE_A_RUN, *TAKE_A_STEP])
def test_a_run_that_is_not_there(runs: Path, lingua: Lingua, words: str) -> None:
    code, _, err = lingua(*(word.replace("RUN", "mine") for word in words.split()))
    assert (code, err) == (2, "error: mine does not exist; did you mean out/mine?\n")
    assert not (runs / "new").exists()


@pytest.mark.parametrize("words", [words for words in TAKE_A_RUN if not words.startswith("runs")])
def test_a_folder_of_runs(runs: Path, lingua: Lingua, words: str) -> None:
    code, _, err = lingua(*(word.replace("RUN", "out") for word in words.split()))
    assert (code, err) == (2, "error: out is a folder of runs, not a run; name one: out/mine\n")


@pytest.mark.parametrize("words", [w for w in TAKE_A_STEP if "wait" not in w and "import" not in w and "chat" not in w])
def test_a_step_that_is_not_there(runs: Path, lingua: Lingua, words: str) -> None:
    code, _, err = lingua(*(word.replace("RUN", "out/mine@7") for word in words.split()))
    assert (code, "out/mine/checkpoints has no published checkpoint of step 7; it has 1" in err) == (2, True), err


def test_no_command_is_left_out() -> None:
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    tried = {words.split()[0] for words in (*TAKE_A_RUN, *TAKE_A_STEP)}
    assert commands - tried - TAKE_NONE == set()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("export out/mine there", "there already exists; choose a new folder"),
        ("fork out/mine there", "there already exists; choose a new folder"),
        ("ckpt average out/mine --out new", "an average needs two checkpoints"),
        ("import nothing new", "nothing/config.json is missing"),
        ("init there", "there already exists"),
        ("runs there/file", "there/file is a file, not a run"),
        ("train out/mine", "config out/mine is a folder; out/mine/config.yaml goes on with "),
        ("check nothing.yaml", "config nothing.yaml does not exist"),
        ("generate", "no run is named"),
        ("generate out/mine temperature=-1", "temperature is -1"),
        ("replay out/mine --step 101", "--step 101: out/mine has reached step 2 at most"),
        ("push out/mine bad", "bad is no name of a model"),
        ("data inspect nothing", "nothing: no such file or folder"),
        ("data prepare nothing new", "nothing is not a folder, nor a file"),
        ("drill --local --figure x.jpeg", "the name of the file must end in .svg or .png"),
        ("sweep status out/mine", "out/mine is not a sweep"),
        ("recipe --params many", "--params many is not a number"),
        ("components nothing", "there are no components of kind nothing"),
    ],
)
def test_a_command_that_is_wrong_exits_with_2(runs: Path, lingua: Lingua, words: str, sentence: str) -> None:
    (runs / "there").mkdir()
    (runs / "there" / "file").touch()
    before = sorted(runs.rglob("*"))
    code, _, err = lingua(*words.split())
    assert (code, sentence in err) == (2, True), err
    assert sorted(runs.rglob("*")) == before


@pytest.mark.parametrize("words", ["stop out/mine", "profile out/mine", "ckpt wait out/mine@2 --timeout 0"])
def test_what_may_be_right_at_another_time_exits_with_1(runs: Path, lingua: Lingua, words: str) -> None:
    assert lingua(*words.split())[0] == 1
