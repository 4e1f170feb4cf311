"""`lingua init DIR`: a small project that uses lingua as a dependency."""

from __future__ import annotations

import shlex
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from lingua.console import lingua_command

STARTER = Path(__file__).with_name("starter")
PROJECT = """[project]
name = "my-project"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["{}"]

[tool.setuptools]
py-modules = ["my_model"]
"""


def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)]) -> None:
    """Write a small project: a config, a model of your own, a job script and a README.

    It depends on lingua, from the source that this lingua was installed from.
    """
    from lingua.files import make_folders, whole_folder, write_whole

    files = {path.name: path.read_text() for path in STARTER.iterdir() if path.is_file()}
    files |= {"scripts/job.sh": job_script().read_text(), "pyproject.toml": PROJECT.format(requirement())}
    files[".gitignore"] = "out/\ndata/\n.jobs/\n.venv/\n__pycache__/\n"
    with whole_folder(folder) as unfinished:
        make_folders(unfinished / "scripts")
        for name, text in files.items():
            write_whole(unfinished / name, text)
    print(f"{folder} is a project with a model of its own; see its README.md. Begin with")
    print(f"  cd {shlex.quote(str(folder))}\n  {lingua_command()} train config.yaml")


def job_script() -> Path:
    """Return the path of scripts/job.sh, in a checkout or where a wheel puts it."""
    places = [Path(__file__).parents[2], Path(sysconfig.get_path("data"), "share", "lingua")]
    return next(place for place in (root / "scripts" / "job.sh" for root in places) if place.is_file())


def requirement() -> str:
    """Return this lingua as a dependency of a project, by the source that it was installed from (PEP 610)."""
    import orjson

    origin = orjson.loads(metadata.distribution("lingua").read_text("direct_url.json") or "{}")
    if "url" not in origin:
        return "lingua"
    vcs = origin.get("vcs_info")
    return "lingua @ " + (f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else origin["url"])
