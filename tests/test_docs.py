"""READMEs tell the truth: the paths they name exist, links lead somewhere, and every command in them runs or parses.

A block under `<!-- run -->` is run, in a folder with a small run and a small data set, and so is what has --dry-run.
All other commands are parsed: by the command line of `lingua`, a script's argparse, or bash. Configs and overrides are
checked as a start checks them. A command of a program that is not known here fails: teach `check_command` about it.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from typer.core import TyperCommand

from apps.cli.main import main
from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.stool import translate
from lingua.train import check
from tests.ranks import exit_code_of
from tests.trainer import TINY, train

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        *ROOT.glob("lingua/*/README.md"),
        ROOT / "lingua/train/LONG_RUNS.md",
        *ROOT.glob("[as]*/README.md"),
        *ROOT.glob("apps/*/README.md"),
    ]
)
PATH = re.compile(r"(?<![\w/.])(?:lingua|apps|scripts|setup|tests)/[\w./-]*[\w/]")
BLOCK = re.compile(r"(<!-- run -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(page, *block) for page in PAGES for block in BLOCK.findall(page.read_text())]
MARKED = [(page, text) for page, marked, _, text in BLOCKS if marked]
COMMANDS = [(page, text) for page, marked, language, text in BLOCKS if language == "bash" and not marked]

STANDS_FOR = {  # placeholders of the pages
    "@1000": "@4",
    "steps=5000": "steps=6",
    "out/debug": "out/my_run",
    "data/mine_shuffled": "data/mine",
    "~colleague/out/run": "out/a",
    "--step 1234": "--step 2",
    "RUN": "out/my_run",
    "FOLDER": "out",
    "CONFIG": "my.yaml",
    "$CONFIG_FILE": "my.yaml",
    "key=value": "steps=5",
    "KEY=VALUE": "steps=5",
    "POINT": "2",
    "DEST": "out/copied",
    "OUT": "out/weights.pt",
    "PID": "1",
}
SHELL = {"cd", "cp", "export", "git", "kill", "ln", "mkdir", "scancel", "source", "ssh", "tail", "uv", "$EDITOR"}


def name(value: Path | str) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else value.split("#")[0].split("\n")[0].strip()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_and_links_of_a_readme_exist(page: Path) -> None:
    text = page.read_text()
    named = {ROOT / path for quoted in re.findall(r"`([^`\n]+)`", text) for path in PATH.findall(quoted)}
    named |= {page.parent / link for link in re.findall(r"\]\(([^):#]+)\)", text)}
    assert [str(path) for path in sorted(named) if not path.exists() and "mine" not in path.parts] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_readme_stays_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= (200 if page.parent == ROOT else 150)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout in which some work was done: runs below out/, a config my.yaml, data."""
    folder = tmp_path_factory.mktemp("desk")
    for tree in ("apps", "lingua", "scripts", "setup", ".git"):
        (folder / tree).symlink_to(ROOT / tree)
    (folder / "data" / "mine").mkdir(parents=True)
    (folder / "data" / "mine" / "mine.chunk.00.jsonl").write_text('{"text": "def main(): pass"}\n' * 100)
    config = folder / "my.yaml"
    config.write_text(f"base: {TINY[0]}\ndump_dir: out/mine\ndata: {{root_dir: data, sources: {{mine: 1}}}}\n")
    experiments = folder / "experiments"
    experiments.mkdir()
    for overlay in ("small", "long"):
        (experiments / f"{overlay}.yaml").write_text("steps: 5\n")
    words = [str(config), *TINY[1:], f"data.root_dir={folder}/data", "steps=4", f"dump_dir={folder}/out/my_run"]
    assert train([*words, "checkpoint.dump={every: 2, keep: 4}"]).exit_code == 0
    for copy in ("a", "b"):
        shutil.copytree(folder / "out" / "my_run", folder / "out" / copy)
    return folder


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a block: comments and optional brackets gone, placeholders replaced, here-documents checked."""
    lines = iter(text.splitlines())
    for line in lines:
        command = re.sub(r"(^|\s)#.*", "", line)
        if "<<'EOF'" in command:
            text = "\n".join(iter(lines.__next__, "EOF"))
            ast.parse(text)
            if made := re.fullmatch(r"cat > (\S+) <<'EOF'", command):
                yield ["cat", made[1], text]
            continue
        command = re.sub(r"\s\[[^\]]*\.\.\.\]", "", command)  # [POINT ...]
        command = re.sub(r"\s\[([^\]]*)\]", r" \1", command)  # [--option]
        command = re.sub(r"(\w)\.\.\.", r"\1", command)
        for word, meaning in STANDS_FOR.items():
            command = re.sub(rf"(?<![\w$]){re.escape(word)}(?!\w)" if word[0] != "@" else word, meaning, command)
        for part in re.split(r"\s*(?:;|&&)\s*", command):
            words = shlex.split(part)
            if words[:2] == ["uv", "run"]:
                words = words[4:] if words[2] == "--extra" else words[2:]
            if words:
                yield words


@pytest.mark.soak
@pytest.mark.gate
@pytest.mark.parametrize(("page", "text"), MARKED, ids=name)
def test_marked_commands_run(page: Path, text: str, desk: Path) -> None:
    for words in commands_of(text):
        if words[0] == "cat":
            (desk / words[1]).write_text(words[2] + "\n")
            continue
        assert words[0] == "lingua", f"{page}: only `lingua ...` can be marked"
        assert exit_code_of(lambda words=words: run(words, desk)) == 0, words


def run(words: list[str], desk: Path) -> None:
    """Run `lingua` in this process, which must be a forked one."""
    os.chdir(desk)
    sys.argv = words
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None)


class Parsed(BaseException):
    """A command line was parsed; what follows is left out."""


def stop(*args: object, **options: object) -> NoReturn:
    raise Parsed


@pytest.mark.parametrize(("page", "text"), COMMANDS, ids=name)
def test_other_commands_parse(page: Path, text: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands_of(text):
        if words[0] == "lingua" and "--dry-run" in words:
            words = [word for word in words if word != "--local"]
            assert exit_code_of(lambda words=words: run(words, desk)) == 0, words
    monkeypatch.chdir(desk)
    monkeypatch.setattr(TyperCommand, "invoke", stop)
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *args: stop(parse_args(self, *args)))
    for words in commands_of(text):
        check_command(words, monkeypatch)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as its program would."""
    program, *rest = words
    if program == "torchrun":
        program, rest = "python", rest[2:]  # --nproc-per-node 8
    if program == "lingua":
        parse(words, main, monkeypatch)
        if rest[0] in ("train", "check", "launch") and "--help" not in rest:
            check_config(rest[1:])
    elif program == "python" and rest[:2] == ["-m", "lingua.stool"]:
        check.load(translate(rest[2:])[0])
    elif program == "python" and rest[0] == "-m":
        assert (ROOT / rest[1].replace(".", "/")).with_suffix(".py").is_file() or rest[1].startswith("apps.mine."), rest
        check_command(["lingua", rest[1].rpartition(".")[2], *rest[2:]], monkeypatch)
    elif program == "python":
        parse(rest, lambda: runpy.run_path(rest[0], run_name="__main__"), monkeypatch)
    elif program in ("bash", "sbatch") or program.startswith("scripts/"):
        script = rest[-1] if program == "sbatch" else [*rest, program][0]
        assert os.access(script, os.X_OK) or program in ("bash", "sbatch"), f"{script} cannot be run"
        subprocess.run(["bash", "-n", script], check=True)
    else:
        assert program in SHELL or (program, *rest) == ("pytest",), f"nobody checks `{shlex.join(words)}`"


def parse(words: list[str], act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program up to where its command line is parsed, or its help is shown."""
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises((Parsed, SystemExit)) as end:
        act()
    is_help = isinstance(end.value, SystemExit) and end.value.code == 0 and "--help" in words
    assert isinstance(end.value, Parsed) or is_help, shlex.join(words)


def check_config(words: list[str]) -> None:
    """Check a config and its overrides as a start does; those that the page has yet to make are left out."""
    flags = {"--world-size", "--dry-run", "--local"}
    config = [word for n, word in enumerate(words) if not {word, *words[n - 1 : n]} & flags or "=" in word]
    if not any("apps.mine" in word or "apps/mine" in word or word.startswith("out/") for word in config):
        check.load(parse_command_line(config))


@pytest.mark.parametrize(
    "command",
    [
        "wget x",
        "lingua ckpt lss out",
        "lingua check my.yaml --word-size 8",
        "lingua train my.yaml stepz=1",
        "bash x.sh",
    ],
)
def test_a_wrong_command_is_found(command: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setattr(TyperCommand, "invoke", stop)
    with pytest.raises((AssertionError, ConfigError, subprocess.CalledProcessError)):
        check_command(command.split(), monkeypatch)
