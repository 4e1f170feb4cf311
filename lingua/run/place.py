"""Distinguish a folder from its copies, and bind a folder of checkpoints to a run.

An owner's record names the folder in which it was written. If that is another folder, the record was copied by `cp -r`
or the like, and does not count. `owner.json` beside the checkpoints is such a record: it binds them to one run, which
may be renamed or moved.
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
    """A folder: its resolved path, and its inode, which survives a rename and is the same on another mount."""

    path: str
    inode: int

    def is_same(self, other: Place) -> bool:
        return self.path == other.path or self.inode == other.inode


@dataclass(frozen=True)
class Run:
    """The identity of a run. Copies have the same `born_s`; a new run may get the inode of one that was removed."""

    place: Place
    born_s: float | None = None
    """When its first attempt began; None if it has none yet, or if an older version wrote that."""


def place_of(folder: Path) -> Place:
    """Describe an existing folder. Raises OSError."""
    return Place(os.path.realpath(folder), folder.stat().st_ino)


def place_in(record: Any, key: str = "folder") -> Place | None:
    """Return the folder that a JSON object names, or None if an older version wrote it or it is damaged."""
    found = record.get(key) if isinstance(record, dict) else None
    try:
        return None if found is None else Place(str(found["path"]), int(found["inode"]))
    except (KeyError, TypeError, ValueError):
        return None


def copied_from(record: Any, folder: Path) -> str:
    """Return the folder in which an owner's record was written, if it was copied to `folder`; else ""."""
    held = place_in(record)
    return "" if held is None or held.is_same(place_of(folder)) else held.path


# -- checkpoints ---------------------------------------------------------------------------------------------------


def is_of_another(bound: Run, run: Run, *, is_gone: bool) -> bool:
    """Return whether a folder that is `bound` to one run is not `run`'s.

    A renamed run has the same inode; a moved run does not, but then its former folder `is_gone`.
    """
    if bound.place.path == run.place.path:
        return False
    return bound.born_s != run.born_s or not (bound.place.inode == run.place.inode or is_gone)


def bound_to(folder: Path) -> Run | None:
    """Return the run that owns a folder of checkpoints, or None. Raises OSError, or RunError if it is damaged."""
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
    """Bind a folder of checkpoints to a run; return False if another process interfered: try again.

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
