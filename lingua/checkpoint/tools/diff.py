"""Compare the tensors of two checkpoints, and consolidate the model's weights into one file.

Nothing is executed. `consolidated.pth` appears atomically, and stock `torch.load(weights_only=True)` opens it, with or
without mmap. (torch ignores the zip checksums in it.) Only a few tensors are in memory at a time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lingua.checkpoint import dcp
from lingua.checkpoint.metadata import TensorFacts
from lingua.files import DISK, RunError, naming, no_follow

BATCH_BYTES = 256 << 20
CONSOLIDATED = "consolidated.pth"


def batches(facts: Mapping[str, TensorFacts]) -> Iterator[list[str]]:
    """Split the names, in order, into batches of about BATCH_BYTES that are read together."""
    batch, n_bytes = [], 0
    for name, fact in facts.items():
        if batch and n_bytes + fact.size_bytes > BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
        batch.append(name)
        n_bytes += fact.size_bytes
    if batch:
        yield batch


def largest_differences(
    a: Path, b: Path, facts: Mapping[str, TensorFacts], advance: Callable[[int], object] = lambda n_bytes: None
) -> Iterator[tuple[str, float]]:
    """Yield (name, largest absolute difference) of the tensors `facts`, which both have; 0.0 if bitwise equal."""
    for names in batches(facts):
        here, there = (_read(folder, {name: facts[name] for name in names}) for folder in (a, b))
        for name in names:
            yield name, _largest(here[name], there[name])
            advance(facts[name].size_bytes)


def _largest(a: Tensor, b: Tensor) -> float:
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return 0.0
    return float((a.double() - b.double()).abs().max())


def _read(folder: Path, facts: Mapping[str, TensorFacts]) -> dict[str, Tensor]:
    tensors = {name: torch.empty(fact.shape, dtype=_dtype(fact)) for name, fact in facts.items()}
    dcp.read_into(folder, tensors)
    return tensors


def _dtype(fact: TensorFacts) -> torch.dtype:
    return getattr(torch, fact.dtype)


def consolidate(
    folder: Path,
    facts: Mapping[str, TensorFacts],
    target: Path,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> int:
    """Write the model's weights among `facts` to one torch file `{"model": {name: tensor}}`; return its size.

    Raises RunError if there are none.
    """
    weights = {name: fact for name, fact in facts.items() if name.startswith("model.")}
    if not weights:
        raise RunError(f"{folder} holds no weights (no tensor is called model.*)")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _allocate(temporary, weights)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(temporary, mmap=True, weights_only=True)["model"]
        for names in batches({name: fact for name, fact in weights.items() if fact.same_as is None}):
            dcp.read_into(folder, {name: mapped[name.removeprefix("model.")] for name in names})
            advance(sum(weights[name].size_bytes for name in names))
        del mapped
        _make_durable(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target.stat().st_size


def _allocate(path: Path, weights: Mapping[str, TensorFacts]) -> None:
    """Write the file as torch.save does, without values, and allocate its space: a hole on a full disk is a SIGBUS."""
    with open(path, "w+b", opener=no_follow) as file, naming(path):
        with torch.serialization.skip_data():
            torch.save({"model": _empty(weights)}, file)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def _empty(weights: Mapping[str, TensorFacts]) -> dict[str, Tensor]:
    """Make tensors without values, tied ones shared; their memory is never touched."""
    own = {name: torch.empty(fact.shape, dtype=_dtype(fact)) for name, fact in weights.items() if fact.same_as is None}
    return {name.removeprefix("model."): own[fact.same_as or name] for name, fact in weights.items()}


def _make_durable(temporary: Path, target: Path) -> None:
    with temporary.open("rb") as file:
        DISK.fsync(file.fileno())
    DISK.rename(temporary, target)
    DISK.fsync_dir(target.parent)
