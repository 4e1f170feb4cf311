"""Tells a folder from its copies, and says which run a folder of checkpoints belongs to.

A record of an owner names the folder in which it was written. Where that is another folder, the record came by `cp -r`
or the like, and says nothing. `owner.json` beside the checkpoints is such a record: it binds them to one run, which may
be renamed or moved.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lingua.files import RunError, read_json, write_json

BINDING = "owner.json"


@dataclass(frozen=True)
class Place:
    """A folder: by its resolved path, and by its inode, which a rename keeps and another mount shows too."""

    path: str
    inode: int

    def is_same(self, other: Place) -> bool:
        return self.path == other.path or self.inode == other.inode


@dataclass(frozen=True)
class Run:
    """The identity of a run. Copies have the same `born_s`; a new run may get the inode of one that was removed."""

    place: Place
    born_s: float | None = None
    """When its first attempt began; None: it has none yet, or an older version wrote that."""


def place_of(folder: Path) -> Place:
    """Describe an existing folder. Raises OSError."""
    return Place(os.path.realpath(folder), folder.stat().st_ino)


def place_in(record: Any, key: str = "folder") -> Place | None:
    """Return the folder that a JSON object names; None: an older version wrote it, or it is damaged."""
    found = record.get(key) if isinstance(record, dict) else None
    try:
        return None if found is None else Place(str(found["path"]), int(found["inode"]))
    except (KeyError, TypeError, ValueError):
        return None


def copied_from(record: Any, folder: Path) -> str:
    """Return the folder in which an owner's record was written, if it only came to `folder` by a copy; else ""."""
    held = place_in(record)
    return "" if held is None or held.is_same(place_of(folder)) else held.path


# -- checkpoints ---------------------------------------------------------------------------------------------------


def is_of_another(bound: Run, run: Run, *, is_gone: bool) -> bool:
    """Return whether a folder that is `bound` to one run is closed to `run`.

    A run that was renamed has the same inode; one that was moved has not, but then the folder it had before `is_gone`.
    """
    if bound.place.path == run.place.path:
        return False
    return bound.born_s != run.born_s or not (bound.place.inode == run.place.inode or is_gone)


def bound_to(folder: Path) -> Run | None:
    """Return the run that a folder of checkpoints belongs to; None: to none yet. Raises OSError, RunError: damaged."""
    path = folder / BINDING
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    run, held = place_in(record, "run"), place_in(record)
    if run is None or held is None:
        raise RunError(f"{path} does not say whose checkpoints these are; remove it if they are this run's")
    return Run(run, record.get("born_at")) if held.is_same(place_of(folder)) else None


def why_not_ours(folder: Path, run: Run) -> str | None:
    """Return why a run must not keep its checkpoints in a folder, or None. Raises as `bound_to`."""
    bound = bound_to(folder)
    if bound is None or not is_of_another(bound, run, is_gone=not os.path.isdir(bound.place.path)):
        return None
    other = bound.place.path
    return (
        f"{folder} holds the checkpoints of another run, {other}; choose another checkpoint.path, begin from them with "
        f"checkpoint.init_ckpt_path={other}, or remove {folder / BINDING} if they are this run's from now on"
    )


def bind(folder: Path, run: Run, create: Callable[[Path, dict[str, Any]], bool]) -> bool:
    """Bind a folder of checkpoints to a run; return False if another process did something meanwhile: try again.

    `create` writes a new file and returns False if it is there already. Raises RunError if the folder is another run's.
    """
    if why := why_not_ours(folder, run):
        raise RunError(why)
    path = folder / BINDING
    record = {"run": asdict(run.place), "born_at": run.born_s, "folder": asdict(place_of(folder))}
    if not path.exists():
        return create(path, record)
    if read_json(path) != record:  # the run was moved, or the folder copied
        write_json(path, record)
    return True
