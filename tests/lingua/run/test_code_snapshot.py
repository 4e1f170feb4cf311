import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lingua.config.base import ConfigError
from lingua.run.code_snapshot import environment, freeze_code


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with a package, a plugin, and much that is no code."""
    root = tmp_path / "tree"
    for name, text in {
        "pack/__init__.py": "word = 'first'",
        "pack/configs/a.yaml": "a: 1",
        "pack/configs/job.slurm": "#!",
        "pack/data/x.py": "",
        "pack/__pycache__/x.pyc": "",
        "plugin.py": "",
        "pyproject.toml": "",
        "README.md": "",
        "data/chunk.jsonl": "",
        "data/make.py": "",
        "out/run/code/pack/__init__.py": "",
        ".venv/bin/x.py": "",
        "notes/todo.yaml": "",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "link").symlink_to(root / "pack")
    return root


def words(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_code_and_what_lies_beside_it_is_copied_and_nothing_else(tree: Path, hostile_dir: Path):
    code = freeze_code(tree, hostile_dir)
    assert words(code) == [
        "pack/__init__.py", "pack/configs/a.yaml", "pack/configs/job.slurm", "pack/data/x.py", "plugin.py",
        "pyproject.toml",
    ]  # fmt: skip
    assert [path.name for path in hostile_dir.iterdir()] == ["code"]


def test_what_is_frozen_stays_until_it_is_asked_for_again(tree: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    code = freeze_code(tree, run_dir)
    (tree / "pack/__init__.py").write_text("word = 'second'")
    assert freeze_code(tree, run_dir) == code
    assert "first" in (code / "pack/__init__.py").read_text()
    freeze_code(tree, run_dir, again=True)
    assert "second" in (code / "pack/__init__.py").read_text()
    assert "first" in (run_dir / "code.1/pack/__init__.py").read_text()


def test_python_imports_the_copy_and_not_the_working_folder(tree: Path, hostile_dir: Path):
    code = freeze_code(tree, hostile_dir)
    (tree / "pack/__init__.py").write_text("word = 'edited'")
    done = subprocess.run(
        [sys.executable, "-c", "import pack; print(pack.word)"],
        cwd=tree, env={**os.environ, **environment(code, {})}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "first\n"


def test_a_link_under_the_name_of_the_draft_is_not_written_through(tree: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / f".code.tmp-{socket.gethostname()}-{os.getpid()}").symlink_to(tmp_path / "precious")
    assert (freeze_code(tree, run_dir) / "pack/__init__.py").is_file()
    assert list((tmp_path / "precious").iterdir()) == []
    assert not (run_dir / "code").is_symlink()


def test_what_a_killed_process_left_is_removed(tree: Path, tmp_path: Path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / "run" / f".code.tmp-{socket.gethostname()}-{dead.pid}"
    (left / "pack").mkdir(parents=True)
    freeze_code(tree, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["code"]


def test_the_users_python_path_comes_after(tmp_path: Path):
    assert environment(tmp_path, {"PYTHONPATH": "/mine"})["PYTHONPATH"] == f"{tmp_path}:/mine"


def test_a_folder_that_python_cannot_import_from_is_refused(tree: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="has a ':' in its path"):
        freeze_code(tree, tmp_path / "at 12:30")
