"""Find run folders, and explain in one sentence what a path that is not one may mean."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from lingua.config.frozen import CONFIG_FILE
from lingua.files import CommandError, entries
from lingua.run.lock import FOLDER

USUAL_FOLDER = Path("out")
"""Default folder of runs (`dump_base`)."""


def find_run(path: Path) -> Path:
    """Return the run folder that a path means. Raises CommandError if it is not one."""
    if (path / CONFIG_FILE).is_file():
        return path
    raise no_run(path)


def find_runs(folder: Path, depth: int = 4) -> list[Path]:
    """Return the run folders at or below a folder, by name; does not look inside a run."""
    if _has_run(folder):
        return [folder]
    below = [path for path in entries(folder) if path.is_dir() and not path.name.startswith(".")] if depth else []
    return [run for path in below for run in find_runs(path, depth - 1)]


def no_run(path: str | Path) -> CommandError:
    """Return the error for a path that is not a run, with the runs that may be meant."""
    place = Path(path)
    run, at, _ = str(place).rpartition("@")
    if at and not place.exists() and Path(run).is_dir():
        return CommandError(f"{place} is not a run; leave out the step: {run}")
    if inside := find_runs(place):
        return CommandError(f"{place} is a folder of runs, not a run; name one: {_newest_of(inside, place)}")
    what = "is not a run: it has no config.yaml" if place.is_dir() else "does not exist"
    what = "is a file, not a run" if place.is_file() else what
    near = " or ".join(map(str, _near(place)))
    remedy = f"did you mean {near}?" if near else "`lingua runs FOLDER` lists the runs below a folder"
    return CommandError(f"{place} {what}; {remedy}")


def _has_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / FOLDER).is_dir()


def _newest_of(runs: Sequence[Path], folder: Path, limit: int = 4) -> str:
    """Name the runs that were started last, newest first."""
    newest = sorted(runs, key=lambda run: (run / FOLDER).stat().st_mtime, reverse=True)
    rest = f" and {len(runs) - limit} more: `lingua runs {folder}`" if len(runs) > limit else ""
    return ", ".join(map(str, newest[:limit])) + rest


def _near(path: Path) -> list[Path]:
    """Return the run that a path is inside of, or else runs of similar names beside it and in the usual folder."""
    if around := [folder for folder in path.parents if _has_run(folder)]:
        return around[:1]
    places = [*find_runs(path.parent, 1), *find_runs(USUAL_FOLDER, 2)]
    name, named = path.name.removesuffix(".yaml"), {run.name: run for run in reversed(places)}
    near = [name] if name in named else difflib.get_close_matches(name, named, 2)
    return [named[name] for name in near]
