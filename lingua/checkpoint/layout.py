"""All names under `checkpoints/`, said once. Torch-free, and reads only folder listings.

```
checkpoints/0000001000/                    published, if and only if its mark is there
            checkpoint_0000001000.done     the mark: JSON, written last
            0000001000.broken-1/           did not verify (its mark: checkpoint_0000001000.done.broken-1)
            0000001500.later-1/            intact, but the run went back to a step before it
            run_id                         tells this run from one that had the folder before
            pins/                          leases of readers
            incarnation-3/                 the passage: all that start 3 writes or removes goes through it
                0000001500/                    being written
                checkpoint_0000001500.done     its mark, ready to be renamed once the folder is in place
                0000000500.trash/              given up, being removed; its mark: checkpoint_0000000500.done.trash
                0000000700.unmarked/           stood in the way and is not ours, on its way to be set aside
            incarnation-2.closed/          a newer start has taken the passage away: nothing comes through any more
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
_PASSAGE = re.compile(r"incarnation-(\d{1,9})(?:\.closed)?", re.ASCII)
_INSIDE = re.compile(r"(\d{10}|checkpoint_(\d{10})\.done)(?:\.(trash|unmarked))?", re.ASCII)
_ASIDE = re.compile(r"(?:(\d{10})|checkpoint_(\d{10})\.done)\.([a-z]+)-\d+", re.ASCII)

Kind = Literal["coming", "trash", "unmarked"]


@dataclass(frozen=True)
class Temporary:
    """A folder or a mark on its way in (`coming`) or out."""

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


def passage(root: Path, incarnation: int) -> Path:
    """The folder through which a start's folders and marks come and go."""
    return root / f"incarnation-{incarnation}"


def coming(path: Path, incarnation: int) -> Path:
    """The name under which a step's folder or mark is prepared."""
    return passage(path.parent, incarnation) / path.name


def going(path: Path, incarnation: int, kind: Kind = "trash") -> Path:
    """The name under which a step's folder or mark leaves."""
    return passage(path.parent, incarnation) / f"{path.name}.{kind}"


def aside(path: Path, reason: str) -> Path:
    """First free name beside `path` for something set aside: `<name>.<reason>-<n>`, n from 1."""
    n = 1
    while (other := path.with_name(f"{path.name}.{reason}-{n}")).exists() or other.is_symlink():
        n += 1
    return other


def parse_aside(name: str) -> tuple[int, str] | None:
    """(step, reason) of a folder, mark or evaluation that was set aside."""
    match = _ASIDE.fullmatch(name)
    return (int(match[1] or match[2]), match[3]) if match else None


def model_file(rank: int) -> str:
    return f"model.{rank:05d}.distcp"


def optim_file(rank: int) -> str:
    return f"optim.{rank:05d}.distcp"


def train_state_file(rank: int) -> str:
    return f"train_state.{rank:05d}.json"


def evaluation(run_dir: Path, step: int) -> Path:
    return run_dir / EVALS / step_name(step)


def found(run_dir: Path, step: int, incarnation: int) -> Path:
    """Where lies what an evaluation found, until an evaluator makes it the verdict on the checkpoint of that start."""
    return evaluation(run_dir, step) / f"start-{incarnation}"


def parse_folder(name: str) -> int | None:
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def parse_done(name: str) -> int | None:
    match = _DONE.fullmatch(name)
    return int(match[1]) if match else None


def parse_temporary(path: Path) -> Temporary | None:
    """What lies in a passage, by its name."""
    match = _INSIDE.fullmatch(path.name)
    if match is None:
        return None
    kind = cast("Kind", match[3] or "coming")
    return Temporary(path, int(match[2] or match[1]), kind, is_mark=match[2] is not None)


def done_steps(root: Path) -> list[int]:
    """Steps with a mark, ascending."""
    return sorted(step for path in entries(root) if (step := parse_done(path.name)) is not None)


def passages(root: Path) -> list[tuple[int, Path]]:
    """(incarnation, folder) of each passage, closed ones too."""
    return [(int(match[1]), path) for path in entries(root) if (match := _PASSAGE.fullmatch(path.name))]


def temporaries(passage: Path) -> list[Temporary]:
    return [found for path in entries(passage) if (found := parse_temporary(path)) is not None]


def unmarked_folders(root: Path) -> list[int]:
    """Steps whose folder has its final name but no mark: what a crash between rename and mark leaves."""
    marked = set(done_steps(root))
    found = (parse_folder(path.name) for path in entries(root))
    return [step for step in found if step is not None and step not in marked]
