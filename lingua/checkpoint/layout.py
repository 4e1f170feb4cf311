"""All names under `checkpoints/`, said once. Torch-free, and reads only folder listings.

```
checkpoints/0000001000/                    published, if and only if its mark is there
            checkpoint_0000001000.done     the mark: JSON, written last
            0000001500.tmp-3/              being written by incarnation 3
            checkpoint_0000001500.done.tmp-3      its mark, ready to be renamed once the folder is in place
            0000000500.trash-3/            given up, being removed; likewise checkpoint_0000000500.done.trash-3
            0000001000.broken-1/           did not verify (its mark: checkpoint_0000001000.done.broken-1)
            0000001500.later-1/            intact, but the run went back to a step before it
            pins/                          leases of readers
```

Names are matched whole: `0000000012.tmp-1` is never taken for step 12.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lingua.files import entries

STEP_DIGITS = 10
METADATA = ".metadata"  # torch.distributed.checkpoint's own name
MANIFEST = "manifest.json"
PINS = "pins"
EVALS = "evals"
CHECKPOINTS = "checkpoints"

_FOLDER = re.compile(r"(\d{10})", re.ASCII)
_DONE = re.compile(r"checkpoint_(\d{10})\.done", re.ASCII)
_TEMPORARY = re.compile(r"(\d{10}|checkpoint_(\d{10})\.done)\.(tmp|trash)-(\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Temporary:
    """A folder or a mark on its way in (`tmp`) or out (`trash`)."""

    path: Path
    step: int
    kind: str
    incarnation: int
    is_mark: bool


def step_name(step: int) -> str:
    assert 0 <= step < 10**STEP_DIGITS
    return f"{step:0{STEP_DIGITS}d}"


def folder(root: Path, step: int) -> Path:
    return root / step_name(step)


def done_mark(root: Path, step: int) -> Path:
    return root / f"checkpoint_{step_name(step)}.done"


def coming(path: Path, incarnation: int) -> Path:
    """The name under which a step's folder or mark is prepared."""
    return path.with_name(f"{path.name}.tmp-{incarnation}")


def going(path: Path, incarnation: int) -> Path:
    """The name under which a step's folder or mark is removed."""
    return path.with_name(f"{path.name}.trash-{incarnation}")


def aside(path: Path, reason: str) -> Path:
    """First free name beside `path` for something set aside: `<name>.<reason>-<n>`, n from 1."""
    n = 1
    while (other := path.with_name(f"{path.name}.{reason}-{n}")).exists() or other.is_symlink():
        n += 1
    return other


def model_file(rank: int) -> str:
    return f"model.{rank:05d}.distcp"


def optim_file(rank: int) -> str:
    return f"optim.{rank:05d}.distcp"


def train_state_file(rank: int) -> str:
    return f"train_state.{rank:05d}.json"


def evaluation(run_dir: Path, step: int) -> Path:
    return run_dir / EVALS / step_name(step)


def parse_folder(name: str) -> int | None:
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def parse_done(name: str) -> int | None:
    match = _DONE.fullmatch(name)
    return int(match[1]) if match else None


def parse_temporary(path: Path) -> Temporary | None:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return None
    return Temporary(path, int(match[2] or match[1]), match[3], int(match[4]), is_mark=match[2] is not None)


def done_steps(root: Path) -> list[int]:
    """Steps with a mark, ascending."""
    return sorted(step for path in entries(root) if (step := parse_done(path.name)) is not None)


def temporaries(root: Path) -> list[Temporary]:
    return [found for path in entries(root) if (found := parse_temporary(path)) is not None]


def unmarked_folders(root: Path) -> list[int]:
    """Steps whose folder has its final name but no mark: what a crash between rename and mark leaves."""
    marked = set(done_steps(root))
    found = (parse_folder(path.name) for path in entries(root))
    return [step for step in found if step is not None and step not in marked]
