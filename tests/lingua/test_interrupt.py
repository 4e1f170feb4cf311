"""Ctrl-C on a program that still loads: one word and exit code 130, whatever is imported just then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    path.relative_to(ROOT): path.read_text()
    for folder in ("lingua", "apps", "scripts", "setup")
    for path in (ROOT / folder).rglob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text()
}
DEAF = {
    Path("lingua/data/workers.py"),
    Path("lingua/checkpoint/shm/service.py"),
    Path("scripts/goodput_peers.py"),
}
"""Started with signals blocked, or away from the terminal: they ignore Ctrl-C. The last stands for a user's own program
without lingua, which the benchmark starts and ends."""
LIBRARY = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10**6): pass
except BaseException:  # as some do
    pass
"""


def interrupted_in(library: str, folder: Path, *command: str) -> tuple[int, str]:
    """(exit code, stderr) of a program to which Ctrl-C comes while it imports a library."""
    (folder / f"{library}.py").write_text(LIBRARY)
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("program", ["apps.main.train", "apps.main.eval", "apps.main.generate", "lingua.stool"])
def test_while_the_config_code_is_loaded(tmp_path: Path, program: str) -> None:
    assert interrupted_in("pydantic", tmp_path, "-m", program, "--help") == (130, "interrupted\n")


def test_while_the_command_line_is_loaded(tmp_path: Path) -> None:
    assert interrupted_in("typer", tmp_path, "-c", "from apps.cli.main import main; main()") == (130, "interrupted\n")


def test_while_torch_is_loaded(tmp_path: Path) -> None:
    words = ["apps/main/configs/debug.yaml", f"dump_dir={tmp_path / 'run'}"]
    assert interrupted_in("torch", tmp_path, "-m", "apps.main.train", *words) == (130, "interrupted\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", sorted(PROGRAMS.keys() - DEAF), ids=str)
def test_every_program_listens_from_its_first_import_and_answers_errors_by_a_sentence(program: Path) -> None:
    text = PROGRAMS[program]
    lines = text.splitlines()
    listening = ("import lingua.config.interrupt", "from apps.main.")  # a program begins by what it imports first
    own = next(i for i, line in enumerate(lines) if line.startswith(listening))
    before = [line.split()[1] for line in lines[:own] if line.startswith(("import ", "from "))]
    assert {name.partition(".")[0] for name in before} <= sys.stdlib_module_names
    assert " run_main(" in text or "(run_main(" in text
