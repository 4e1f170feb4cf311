"""Schemas of a checkpoint's JSON documents, which are validated before use. Torch-free.

A checksum shows that a file matches the manifest, not that a trainer wrote it: someone may have edited both. So each
document has a schema, and values that several of them hold (step, attempt, run, files) must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from lingua.checkpoint import layout
from lingua.config.base import Count, Document, judged
from lingua.files import RunError, read_bytes, read_json

MANIFEST_VERSION = 1
STATE_VERSION = 1

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Scalar = bool | int | float | str


class ListedFile(Document):
    """A file as the manifest lists it."""

    bytes: Count
    xxh3_128: Hash


class ManifestDocument(Document):
    """manifest.json."""

    version: Annotated[int, Field(ge=1, le=MANIFEST_VERSION)]
    step: Count
    incarnation: Count
    run_id: str | None = None
    """None if an older version wrote it, or not a run."""
    files: dict[Annotated[str, Field(pattern=r"^\.*[^/.\x00][^/\x00]*$")], ListedFile]


class MarkDocument(Document):
    """checkpoint_<step>.done."""

    version: Annotated[int, Field(ge=1, le=MANIFEST_VERSION)]
    step: Count
    incarnation: Count
    manifest_xxh3_128: Hash
    bytes: Count
    seconds: Annotated[float, Field(ge=0)]
    created_at: Annotated[float, Field(ge=0)]


class _LossScale(Document):
    factor: Annotated[float, Field(gt=0)]
    good_steps: Count


class _PassedOver(Document):
    step: Count
    rows: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    why: str


class _Shared(Document):
    step: Count = 0
    total_tokens: Count = 0
    skipped_steps: Count = 0
    schedule_begin: Count = 0
    first_row: int = 0
    tracking_id: str | None = None
    validation_at_start: dict[str, float | None] = {}
    loss_scale: _LossScale | None = None
    recent_losses: list[Annotated[list[float], Field(min_length=2, max_length=2)]] = []
    passed_over: list[_PassedOver] = []

    @model_validator(mode="after")
    def _schedule_has_begun(self) -> Self:
        if self.schedule_begin > self.step:
            raise ValueError(f"schedule_begin {self.schedule_begin} is after step {self.step}")
        return self


class _Group(Document):
    params: list[str]
    values: dict[str, Scalar | list[Any] | None]
    constructed: dict[str, Scalar | list[Any] | None]


class _Random(Document):
    torch: str
    numpy: Annotated[list[Any], Field(min_length=5, max_length=5)]
    python: Annotated[list[Any], Field(min_length=3, max_length=3)]
    cuda: str | None = None


class _RankState(Document):
    version: Annotated[int, Field(ge=1, le=STATE_VERSION)]
    rank: Count
    world_size: Annotated[int, Field(ge=1)]
    per_rank: dict[str, Any]
    rng: _Random


class _FirstState(_RankState):
    shared: _Shared
    param_groups: list[_Group]
    """Empty if the run was taken over from Meta Lingua."""
    optim_scalars: dict[str, dict[str, Scalar]]


def read_run_id(root: Path) -> str | None:
    """Return the id of the run that owns these checkpoints, or None before its first attempt.

    Raises OSError, RunError.
    """
    path = root / layout.RUN_ID
    try:
        run_id = read_bytes(path).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):
        raise RunError(f"{path} holds no id of a run; remove it, and the newest checkpoint's id is taken")
    return run_id


def read_states(folder: Path, read: Callable[[Path], Any] = read_json) -> list[dict[str, Any]]:
    """Return the training state of every rank that saved, rank 0 first. Raises RunError, OSError."""
    first = _read_state(folder, 0, _FirstState, read)
    n_ranks = first["world_size"]
    states = [first, *(_read_state(folder, rank, _RankState, read) for rank in range(1, n_ranks))]
    for rank, state in enumerate(states):
        if (state["rank"], state["world_size"]) != (rank, n_ranks):
            path = folder / layout.train_state_file(rank)
            raise RunError(
                f"{path} is not a training state of this checkpoint: it is of rank {state['rank']} of "
                f"{state['world_size']}, not {rank} of {n_ranks}; take another checkpoint"
            )
    return states


def _read_state(folder: Path, rank: int, model: type[_RankState], read: Callable[[Path], Any]) -> dict[str, Any]:
    path = folder / layout.train_state_file(rank)
    try:
        state = read(path)
        judged(model, state)
    except FileNotFoundError:
        raise RunError(f"{path} is missing; take another checkpoint") from None
    except ValueError as error:
        raise RunError(f"{path} is not a training state: {error}; take another checkpoint") from None
    return state


def require_agreement(
    folder: Path, states: list[dict[str, Any]], tensors: dict[str, int], manifest: ManifestDocument
) -> None:
    """Raise RunError unless the manifest lists every file that the state needs, and each is large enough.

    `tensors`: the files that `.metadata` points at, with the least size of each in bytes.
    """
    small = [layout.METADATA, *(layout.train_state_file(rank) for rank in range(len(states)))]
    for name, n_bytes in sorted((dict.fromkeys(small, 0) | tensors).items()):
        if name not in manifest.files:
            raise RunError(f"{folder / layout.MANIFEST} does not list {name}, so that nobody verified it; take another")
        if (there := manifest.files[name].bytes) < n_bytes:
            what = f"{name} has {there} bytes, but {layout.METADATA} points at byte {n_bytes} of it"
            raise RunError(f"{folder}: {what}; take another checkpoint")
