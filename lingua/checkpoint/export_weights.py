"""Write weights to safetensors files and Hugging Face folders, tensor by tensor.

Values equal the source's bitwise unless another dtype is requested. Each tensor is read once and written once; memory
is about three times the largest tensor. Callers make the folder appear atomically (`whole_folder`).

A safetensors file:  | 8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | tensor bytes |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lingua.checkpoint import dcp, publish
from lingua.checkpoint.load_weights import TYPES, WeightSource
from lingua.checkpoint.state import model_tensors
from lingua.config.base import build_part
from lingua.config.keys.model import ModelArgs
from lingua.files import DISK, Buffer, Files, RunError, write_json
from lingua.model.huggingface import EMBEDDING, HEAD, INDEX_FILE, Translation

_TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to write; it is read just before it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def as_ours(source: WeightSource, dtype: torch.dtype | None = None) -> list[ExportTensor]:
    """List all tensors of a source under our names. `dtype`: None keeps each tensor's own."""
    return [
        ExportTensor(name, shape, dtype or source.dtypes[name], partial(source.read, name))
        for name, shape in source.shapes.items()
    ]


def as_average(sources: Sequence[WeightSource]) -> list[ExportTensor]:
    """List the means of all tensors, computed in fp64. Raises RunError unless all sources have the same ones."""
    first = sources[0]
    for other in sources[1:]:
        differ = first.shapes.keys() ^ other.shapes.keys()
        differ |= {name for name in first.shapes if other.shapes.get(name) != first.shapes[name]}
        if differ:
            text = f"{first.what} and {other.what} are of two models, which differ in"
            raise RunError(f"{text} {dcp.some(sorted(differ))}; average checkpoints of one")

    def read(name: str) -> Tensor:
        mean = first.read(name).double()
        for other in sources[1:]:
            mean += other.read(name)
        return mean / len(sources)

    return [ExportTensor(name, shape, first.dtypes[name], partial(read, name)) for name, shape in first.shapes.items()]


def as_theirs(
    source: WeightSource,
    model: ModelArgs,
    translation: Translation,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[ExportTensor]:
    """List a model's tensors with Hugging Face's names and shapes, the embedding first.

    `vocab_size`: number of rows of embedding and head to keep. Raises RunError if the source does not fit `model`.
    """
    make = translation.into_theirs(model)

    def read(name: str, n_rows: int) -> Tensor:
        return make(name, source.read(name)[:n_rows])

    items = []
    for name, shape in must_fit(source, model).items():
        n_rows = min(shape[0], vocab_size or shape[0]) if name in (EMBEDDING, HEAD) else shape[0]
        try:
            theirs = translation.their_name(name)
        except KeyError:
            kind = translation.model_types[0]
            raise RunError(f"{source.what} has {name}, which a Hugging Face {kind} does not have") from None
        take = partial(read, name, n_rows)
        own_shape = translation.their_shape(name, (n_rows, *shape[1:]))
        items.append(ExportTensor(theirs, own_shape, dtype or source.dtypes[name], take))
    return items


def must_fit(source: WeightSource, model: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors of the model, the embedding first.

    Raises RunError unless the source has exactly these; it may also have a tied head.
    """
    if EMBEDDING not in source.shapes:
        raise RunError(f"{source.what} holds no model of ours: it has no {EMBEDDING}")
    rows = {"vocab_size": source.shapes[EMBEDDING][0], "vocab_multiple_of": 1}
    with torch.device("meta"):
        tensors, _ = model_tensors(build_part(model.model_copy(update=rows)))
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [
        f"{name} is {source.shapes[name]} there and {shape} by its config" if name in source.shapes else f"no {name}"
        for name, shape in wanted.items()
        if source.shapes.get(name) != shape
    ]
    spare = set() if HEAD in wanted else {HEAD}
    problems += [f"{name} is not part of it" for name in source.shapes if name not in wanted and name not in spare]
    if problems:
        raise RunError(f"{source.what} does not hold the model that its config describes: {dcp.some(problems)}")
    if HEAD in spare & source.shapes.keys() and not torch.equal(source.read(HEAD), source.read(EMBEDDING)):
        raise RunError(f"{source.what}: {HEAD} and {EMBEDDING} differ, but the config ties them; it cannot be exported")
    return wanted


# -- files -----------------------------------------------------------------------------------------------------------


def in_shards(items: Sequence[ExportTensor], shard_bytes: float) -> list[list[ExportTensor]]:
    """Split the items, in order, into files of at most `shard_bytes`; a larger tensor gets a file of its own."""
    shards: list[list[ExportTensor]] = []
    n_bytes = 0
    for item in items:
        if not shards or n_bytes + item.size_bytes > shard_bytes:
            shards.append([])
            n_bytes = 0
        shards[-1].append(item)
        n_bytes += item.size_bytes
    return shards


def write_safetensors(
    folder: Path,
    items: Sequence[ExportTensor],
    shard_bytes: float,
    *,
    advance: Callable[[int], object] = lambda n_bytes: None,
    files: Files = DISK,
) -> list[str]:
    """Write model.safetensors, or numbered files with an index; return their names."""
    shards = in_shards(items, shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        publish.write_hashed(folder / name, publish.in_pages(_content(shard, advance)), files=files)
    if len(shards) > 1:
        index: Mapping[str, object] = {
            "metadata": {"total_size": sum(item.size_bytes for item in items)},
            "weight_map": {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard},
        }
        write_json(folder / INDEX_FILE, index, files=files)
    return names


def _content(items: Sequence[ExportTensor], advance: Callable[[int], object]) -> Iterator[Buffer]:
    """Yield the bytes of a safetensors file, tensor by tensor."""
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    items = sorted(items, key=lambda item: -item.dtype.itemsize)  # so that each starts at a multiple of its item size
    for item in items:
        place = [offset, offset := offset + item.size_bytes]
        head[item.name] = {"dtype": _TYPE_NAMES[item.dtype], "shape": item.shape, "data_offsets": place}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for item in items:
        tensor = item.read()
        assert tuple(tensor.shape) == item.shape, item.name
        yield dcp.host_bytes(tensor.to(item.dtype))
        advance(item.size_bytes)
