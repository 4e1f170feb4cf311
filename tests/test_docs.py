"""READMEs tell the truth: paths they name exist, links lead somewhere, and commands marked `<!-- run -->` run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from apps.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "lingua").glob("*/README.md"), *ROOT.glob("[as]*/README.md")])
PATH = re.compile(r"(?<![\w/.])(?:lingua|apps|scripts|setup|tests)/[\w./-]*[\w/]")
BLOCK = re.compile(r"<!-- run -->\n```bash\n(.*?)```", re.DOTALL)
COMMANDS = [(page, line) for page in PAGES for block in BLOCK.findall(page.read_text()) for line in block.splitlines()]


def name(value: Path | str) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else value.split("#")[0].strip()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_and_links_of_a_readme_exist(page: Path) -> None:
    text = page.read_text()
    named = {ROOT / path for quoted in re.findall(r"`([^`\n]+)`", text) for path in PATH.findall(quoted)}
    named |= {page.parent / link for link in re.findall(r"\]\(([^):#]+)\)", text)}
    assert [str(path) for path in sorted(named) if not path.exists() and "mine" not in path.parts] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_readme_stays_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= (200 if page.parent == ROOT else 150)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=name)
def test_a_marked_command_runs(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    assert words[:3] == ["uv", "run", "lingua"], f"{page}: only `uv run lingua ...` can be marked"
    monkeypatch.setattr("sys.argv", words[2:])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None)
