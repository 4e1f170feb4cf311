"""`lingua init`: a project, from a checkout and from a wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from apps.cli.init import requirement
from tests.cli import Lingua

ROOT = Path(__file__).parents[3]


@pytest.fixture(name="lingua")
def _lingua(capsys: pytest.CaptureFixture[str]) -> Lingua:
    return Lingua(capsys, "init")


def test_a_project_has_config_model_job_and_dependency(tmp_path: Path, lingua: Lingua) -> None:
    code, out, _ = lingua(tmp_path / "my first")
    assert code == 0
    assert "train config.yaml" in out
    found = {path.relative_to(tmp_path / "my first").as_posix() for path in (tmp_path / "my first").rglob("*.*")}
    assert found == {
        ".gitignore",
        "README.md",
        "config.yaml",
        "job.slurm",
        "my_model.py",
        "pyproject.toml",
        "scripts/job.sh",
    }
    project = tomllib.loads((tmp_path / "my first" / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [requirement()]
    assert "already exists; choose a new folder" in lingua(tmp_path / "my first")[2]


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"url": "file:///home/me/lingua", "dir_info": {"editable": True}}, "lingua @ file:///home/me/lingua"),
        (
            {"url": "https://host/lingua", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "lingua @ git+https://host/lingua@abc",
        ),
        (None, "lingua"),
    ],
)
def test_a_project_depends_on_the_lingua_that_made_it(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, object] | None, expected: str
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    assert requirement() == expected


@pytest.mark.soak
def test_a_project_made_by_a_wheel_trains_as_a_job(tmp_path: Path) -> None:
    """A wheel in an environment of its own, with the packages of this one; nothing is imported from the checkout."""
    tree, venv, project = (tmp_path / name for name in ("tree", "venv", "project"))
    for name in ("apps", "lingua", "scripts", "setup"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)

    def run(*words: str | Path, cwd: Path = tmp_path, env: Mapping[str, str] = {}) -> str:
        done = subprocess.run(words, cwd=cwd, env=os.environ | dict(env), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    offline = ("--offline", "--python")
    run("uv", "build", "--wheel", "--no-build-isolation", *offline, sys.executable, "-o", tmp_path, tree)
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    run("uv", "pip", "install", "--no-deps", *offline, venv / "bin" / "python", *tmp_path.glob("*.whl"))
    packages = {"PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONSAFEPATH": "1"}
    lingua = str(venv / "bin" / "lingua")
    run(lingua, "init", project, env=packages)
    said = run(lingua, "launch", "config.yaml", "--local", "steps=2", cwd=project, env=packages)
    assert "finished: 2 steps" in said
    run_json = json.loads((project / "out" / "first" / "run.json").read_text())
    assert str(venv) in json.dumps(run_json)
    assert (project / "out" / "first" / "code" / "my_model.py").is_file()
