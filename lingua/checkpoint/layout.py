"""All names under `checkpoints/`. Torch-free, and reads only folder listings.

```
checkpoints/0000001000/                    published, if and only if its mark is there
            checkpoint_0000001000.done     the mark: JSON, written last
            0000001000.broken-1/           did not verify (its mark: checkpoint_0000001000.done.broken-1)
            0000001500.later-1/            intact, but the run went back to a step before it
            run_id                         distinguishes this run from one that had the folder before
            owner.json                     the run folder that these checkpoints belong to (`lingua.run.place`)
            pins/                          leases of readers
            incarnation-3/                 staging dir: all that attempt 3 writes or removes goes through it
                0000001500/                    being written
                checkpoint_0000001500.done     its mark, ready to be renamed once the folder is in place
                0000000500.trash/              being removed; its mark: checkpoint_0000000500.done.trash
                0000000700.unmarked/           was in the way and is not ours, about to be set aside
            incarnation-2.closed/          a newer attempt has closed this staging dir: nothing gets through any more
```

Names are matched whole: `0000000012.trash` is never taken for step 12.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from lingua.files import entries

STEP_DIGITS = 10
TENSORS = ".distcp"
METADATA = ".metadata"  # torch.distributed.checkpoint's own name
MANIFEST = "manifest.json"
PINS = "pins"
RUN_ID = "run_id"
EVALS = "evals"
RESULTS = "results.json"
SAMPLES = "samples.json"
FAILED = "failed.json"
FOLLOWER = "follow.json"
CHECKPOINTS = "checkpoints"

_FOLDER = re.compile(r"(\d{10})", re.ASCII)
_DONE = re.compile(r"checkpoint_(\d{10})\.done", re.ASCII)
_STAGING_DIR = re.compile(r"incarnation-(\d{1,9})(?:\.closed)?", re.ASCII)
_INSIDE = re.compile(r"(\d{10}|checkpoint_(\d{10})\.done)(?:\.(trash|unmarked))?", re.ASCII)
_OF_RANK = re.compile(r"\.(\d{5})\.", re.ASCII)
_ASIDE = re.compile(r"(?:(\d{10})|checkpoint_(\d{10})\.done)\.([a-z]+)-\d+", re.ASCII)

Kind = Literal["coming", "trash", "unmarked"]


@dataclass(frozen=True)
class Temporary:
    """A folder or a mark in a staging dir, on its way in (`coming`) or out."""

    path: Path
    step: int
    kind: Kind
    is_mark: bool


def step_name(step: int) -> str:
    assert 0 <= step < 10**STEP_DIGITS
    return f"{step:0{STEP_DIGITS}d}"


def folder(root: Path, step: int) -> Path:
    return root / step_name(step)


def done_mark(root: Path, step: int) -> Path:
    return root / f"checkpoint_{step_name(step)}.done"


def staging_dir(root: Path, attempt: int) -> Path:
    """Return the folder through which all folders and marks of an attempt come and go."""
    return root / f"incarnation-{attempt}"


def coming(path: Path, attempt: int) -> Path:
    """Return the name under which a step's folder or mark is prepared."""
    return staging_dir(path.parent, attempt) / path.name


def going(path: Path, attempt: int, kind: Kind = "trash") -> Path:
    """Return the name under which a step's folder or mark is removed."""
    return staging_dir(path.parent, attempt) / f"{path.name}.{kind}"


def aside(path: Path, reason: str) -> Path:
    """Return the first free name beside `path` for something set aside: `<name>.<reason>-<n>`, n from 1."""
    n = 1
    while (other := path.with_name(f"{path.name}.{reason}-{n}")).exists() or other.is_symlink():
        n += 1
    return other


def parse_aside(name: str) -> tuple[int, str] | None:
    """Return (step, reason) of a folder, mark or evaluation that was set aside, or None."""
    match = _ASIDE.fullmatch(name)
    return (int(match[1] or match[2]), match[3]) if match else None


def model_file(rank: int) -> str:
    return f"model.{rank:05d}{TENSORS}"


def optim_file(rank: int) -> str:
    return f"optim.{rank:05d}{TENSORS}"


def is_optim_file(name: str) -> bool:
    return name.startswith("optim.") and name.endswith(TENSORS)


def train_state_file(rank: int) -> str:
    return f"train_state.{rank:05d}.json"


def reader_of(name: str, n_saved: int, n_ranks: int) -> int:
    """Return which of `n_ranks` ranks reads all of a file saved by `n_saved` ranks: the one that needs most of it."""
    saved_by = _OF_RANK.search(name)
    return min(int(saved_by[1]) * n_ranks // max(1, n_saved), n_ranks - 1) if saved_by else 0


def evaluation(run_dir: Path, step: int) -> Path:
    return run_dir / EVALS / step_name(step)


def found(run_dir: Path, step: int, attempt: int) -> Path:
    """Return where an evaluation of that attempt's checkpoint puts its results before they are published."""
    return evaluation(run_dir, step) / f"start-{attempt}"


def parse_folder(name: str) -> int | None:
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def parse_done(name: str) -> int | None:
    match = _DONE.fullmatch(name)
    return int(match[1]) if match else None


def parse_temporary(path: Path) -> Temporary | None:
    """Parse the name of something in a staging dir, or return None if it is not ours."""
    match = _INSIDE.fullmatch(path.name)
    if match is None:
        return None
    kind = cast("Kind", match[3] or "coming")
    return Temporary(path, int(match[2] or match[1]), kind, is_mark=match[2] is not None)


def done_steps(root: Path) -> list[int]:
    """Return the steps with a mark, ascending."""
    return sorted(step for path in entries(root) if (step := parse_done(path.name)) is not None)


def evaluated_steps(run_dir: Path) -> list[int]:
    """Return the steps with results of an evaluation, ascending."""
    found = ((parse_folder(path.name), path) for path in entries(run_dir / EVALS))
    return sorted(step for step, path in found if step is not None and (path / RESULTS).is_file())


def staging_dirs(root: Path) -> list[tuple[int, Path]]:
    """Return (attempt, folder) of each staging dir, including those that a newer attempt has closed."""
    return [(int(match[1]), path) for path in entries(root) if (match := _STAGING_DIR.fullmatch(path.name))]


def temporaries(staging_dir: Path) -> list[Temporary]:
    """Return the folders and marks in a staging dir; none for a link, which leads to another run's."""
    inside = () if staging_dir.is_symlink() else entries(staging_dir)
    return [found for path in inside if (found := parse_temporary(path)) is not None]


def unmarked_folders(root: Path) -> list[int]:
    """Return the steps whose folder has its final name but no mark, as a crash between the two renames leaves it."""
    marked = set(done_steps(root))
    found = (parse_folder(path.name) for path in entries(root))
    return [step for step in found if step is not None and step not in marked]
