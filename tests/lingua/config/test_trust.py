"""A config that came with weights runs no code that it names, unless the user says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lingua as product
from lingua.config.base import ConfigError
from lingua.config.command_line import choose_app, parse_command_line
from lingua.config.compose import code_named, compose
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.trust import SHIPPED_APPS, VARIABLE, found, note_run, trusting
from lingua.files import RunError
from lingua.train.describe import described
from tests.cli import Lingua

ROOT = Path(__file__).parents[3]


def test_defaults_name_no_code() -> None:
    assert code_named(TrainArgs().model_dump(mode="json")) == {}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights, a plugin and an app within reach that leave a trace when they are imported."""
    for name in ("stranger", "strange_app/__init__", "strange_app/args"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').close()\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "job.sh").touch()  # what makes it a checkout
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.yaml").write_text("plugins: [stranger]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("stranger", "strange_app", "strange_app.args"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


@pytest.mark.parametrize("code", ["{plugins: [stranger], eval: {plugins: [more]}}", "app: strange_app"])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "weights", "prompt=a"],
        ["generate", "ckpt=weights", "config=weights/config.yaml", "prompt=a"],
        ["eval", "weights"],
        ["eval", "--follow", "weights"],
        ["eval", "config=weights/config.yaml", "ckpt=weights"],
        ["export", "weights", "out"],
        ["check", "weights/config.yaml"],
        ["train", "weights/config.yaml"],
        ["launch", "weights/config.yaml", "--dry-run"],
        ["sweep", "start", "weights/config.yaml", "optim.lr=1e-3,2e-3", "--dry-run"],
        ["data", "preview", "weights/config.yaml"],
        ["data", "tokenize", "weights/config.yaml", "--out", "out"],
    ],
    ids=" ".join,
)
def test_no_command_imports_what_a_config_beside_weights_names(
    weights: Path, lingua: Lingua, words: list[str], code: str
) -> None:
    (weights / "config.yaml").write_text(code)
    status, _, error = lingua(*words)
    assert status == 2
    assert "weights/config.yaml came with weights and names code to run here (" in error
    assert "add --trust (in Python: trust=True)" in error
    assert all(name in error for name in ("stranger", "more", "strange_app") if name in code)
    assert not (weights.parent / "ran").exists()


@pytest.mark.parametrize("command", [["launch"], ["sweep", "start", "optim.lr=1e-3,2e-3"]], ids=" ".join)
def test_a_job_runs_no_shell_lines_that_came_with_weights(weights: Path, lingua: Lingua, command: list[str]) -> None:
    (weights / "config.yaml").write_text("launcher: {setup: [touch ran], env: {set: {LD_PRELOAD: secret.so}}}\n")
    status, _, error = lingua(*command, "weights/config.yaml", "--dry-run")
    assert status == 2
    assert "code to run here (launcher.env.set.LD_PRELOAD: LD_PRELOAD; launcher.setup: touch ran); nothing" in error
    status, _, error = lingua(*command, "weights/config.yaml", "--dry-run", "--trust")
    assert status == 0, error
    assert lingua("check", "weights/config.yaml")[0] == 0  # no job, no shell


def test_the_python_door_refuses_it_too(weights: Path) -> None:
    with pytest.raises(ConfigError, match="plugins: stranger"):
        product.load(weights)
    assert not (weights.parent / "ran").exists()
    with pytest.raises(RunError, match="does not fit"):
        product.load(weights, trust=True, device="cpu")
    assert (weights.parent / "ran").exists()


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_trust_is_given_by_a_flag_or_by_a_variable(
    weights: Path, lingua: Lingua, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "variable":
        monkeypatch.setenv(VARIABLE, "1")
    status, _, error = lingua("check", "weights/config.yaml", *(["--trust"] if how == "flag" else []))
    assert status == 0, error
    assert (weights.parent / "ran").exists()
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="came with weights"):  # it ended with the command
        compose(str(weights / "config.yaml"), [], [], TrainArgs)


@pytest.mark.parametrize("place", ["weights", "weights/checkpoints/0000000010", "weights/model.safetensors"])
def test_a_config_above_the_weights_came_with_them(weights: Path, place: str) -> None:
    folder = weights / "checkpoints" / "0000000010"
    folder.mkdir(parents=True)
    (weights / "model.safetensors").rename(folder / "model.safetensors")
    (weights / "model.safetensors").write_text("")
    (weights / "config.yaml").write_text("base: [inner.yaml]\n")
    (weights / "inner.yaml").write_text("plugins: [stranger]\n")
    with pytest.raises(ConfigError, match="plugins: stranger"):
        product.load(weights.parent / place)


def test_apps_of_the_repository_need_no_trust(weights: Path) -> None:
    shipped = {f"apps.{file.parent.name}" for file in ROOT.glob("apps/*/args.py")}
    assert shipped == set(SHIPPED_APPS)
    for app in SHIPPED_APPS:
        (weights / "config.yaml").write_text(f"app: {app}\n")
        assert choose_app(parse_command_line([str(weights / "config.yaml")])) == app


def test_ones_own_config_may_use_plugins(weights: Path) -> None:
    mine = weights.parent / "mine.yaml"
    mine.write_text("plugins: [stranger]\n")
    assert compose(str(mine), [], [], TrainArgs).args.plugins == ["stranger"]
    assert (weights.parent / "ran").exists()


def test_what_the_command_line_names_is_the_users_choice(weights: Path) -> None:
    (weights / "config.yaml").write_text("plugins: [nothing]\napp: strange_app\n")
    config = str(weights / "config.yaml")
    assert compose(config, [], ["plugins=[stranger]"], TrainArgs).args.plugins == ["stranger"]
    assert choose_app(parse_command_line([config, "app=apps.other"])) == "apps.other"


def test_a_run_that_the_user_started_is_trusted_with_its_code_where_it_was_started(weights: Path) -> None:
    config = weights / "config.yaml"
    config.write_text("app: strange_app\n")
    note_run(weights, code_named({"app": "strange_app", "plugins": ["stranger"]}))
    assert choose_app(parse_command_line([str(config)])) == "strange_app"
    config.write_text("plugins: [stranger]\n")
    assert described(found(config)).plugins == ["stranger"]
    config.write_text("plugins: [stranger, other]\n")
    with pytest.raises(ConfigError, match=r"\(plugins: other\)"):
        described(config)
    config.write_text("plugins: [stranger]\n")
    weights.rename(weights.with_name("downloaded"))
    with pytest.raises(ConfigError, match=r"\(plugins: stranger\)"):
        described(weights.with_name("downloaded") / "config.yaml")


def test_a_config_that_the_user_trained_from_stays_trusted_with_its_code_beside_later_weights(weights: Path) -> None:
    config, other = weights / "config.yaml", weights / "other.yaml"
    other.write_text("plugins: [stranger]\n")
    note_run(weights.parent / "run", {"plugins": ["stranger"]}, [config])
    assert compose(str(config), [], [], TrainArgs).configs == [config]
    with pytest.raises(ConfigError, match=r"other\.yaml came with weights"):
        compose(str(other), [], [], TrainArgs)


def test_a_folder_without_a_home_trusts_nothing_and_says_so(
    weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    note_run(weights, {"plugins": ["stranger"]})
    assert "cannot note that you trust stranger (" in caplog.text
    with pytest.raises(ConfigError, match="came with weights"):
        described(weights / "config.yaml")


@pytest.mark.parametrize(
    "harness",
    [
        "{include_path: tasks, tasks: [mine]}",
        "{use_cache: answers.db, tasks: [piqa]}",
        "{tasks: [weights/evil.yaml]}",
        "{tasks: [{task: weights/evil}]}",
        "{tasks: [{group: all, task: [{task: evil.yml}]}]}",
        "{tasks: [{task: a, dataset_path: json, metric_list: [{metric: weights/metric}]}]}",
        "{tasks: [{task: a, dataset_path: json, metric_list: [{metric: exact_match, hf_evaluate: true}]}]}",
    ],
)
def test_files_that_harness_would_run_count_as_code(weights: Path, harness: str) -> None:
    config = weights / "config.yaml"
    for text, schema in ((f"eval: {{harness: {harness}}}", TrainArgs), (f"harness: {harness}", EvalArgs)):
        config.write_text(text)
        with pytest.raises(ConfigError, match=r"names code to run here \((eval\.)?harness\."):
            compose(str(config), [], [], schema)
        with trusting():
            compose(str(config), [], [], schema)
    config.write_text("harness: {tasks: [piqa, {task: b, dataset_path: a/b, metric_list: [{metric: acc}]}]}")
    assert compose(str(config), [], [], EvalArgs).args.harness


# -- the working folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        ["-c", "import sys; sys.argv[0] = 'lingua'; sys.path.pop(0); from apps.cli.main import main; main()", "train"],
        ["-m", "apps.cli.main", "train"],
        ["-m", "apps.main.train"],
        ["-m", "apps.main.generate", "--help"],
        ["-m", "lingua.checkpoint.shm.service", "--help"],
    ],
    ids=lambda start: " ".join(start[1:2]),
)
def test_no_file_of_the_working_folder_stands_for_a_package(tmp_path: Path, start: list[str]) -> None:
    for name in ("torch", "numpy", "yaml", "pydantic", "orjson", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the working folder')\n")
    (tmp_path / "mine.py").write_text("print('mine')\n")
    (tmp_path / "mine.yaml").write_text("plugins: [mine]\nstep: 1\n")
    words = [] if "--help" in start else ["mine.yaml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *start, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert "taken from the working folder" not in done.stderr
    assert done.returncode == (2 if words else 0), done.stderr
    if words:
        assert "unknown key step; did you mean steps?" in done.stderr
        assert done.stdout == "mine\n"  # one's own modules are still found


def test_an_app_in_the_working_folder_is_found_beside_installed_apps(tmp_path: Path) -> None:
    mine = tmp_path / "apps" / "mine"
    mine.mkdir(parents=True)
    (mine / "args.py").write_text("from apps.main.args import TrainArgs\n")
    (mine / "train.py").write_text("def main(words):\n    print('mine', *words)\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "apps.cli.main", "train", "app=apps.mine", "x=1"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "mine app=apps.mine x=1\n"), done.stderr
