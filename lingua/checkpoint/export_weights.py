"""Write weights to safetensors files and Hugging Face folders, tensor by tensor.

Values are those of the source, bitwise unless another dtype is asked for. Each tensor is read once and written once;
memory is about three times the largest tensor. Callers make folders appear whole (`whole_folder`).

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
from lingua.checkpoint.load_weights import TYPES, WeightSource, pair_halves
from lingua.config.keys.model import LlamaArgs
from lingua.files import DISK, Buffer, Files, RunError, write_json
from lingua.model.huggingface import EMBEDDING, HEAD, INDEX_FILE, is_rotated, tensor_shapes, their_name

_TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to write; it is read only when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def as_ours(source: WeightSource, dtype: torch.dtype | None = None) -> list[ExportTensor]:
    """List all tensors of a source under our names. `dtype`: None keeps each one's own."""
    return [
        ExportTensor(name, shape, dtype or source.dtypes[name], partial(source.read, name))
        for name, shape in source.shapes.items()
    ]


def as_theirs(
    source: WeightSource, model: LlamaArgs, vocab_size: int | None = None, dtype: torch.dtype | None = None
) -> list[ExportTensor]:
    """List the tensors of a Llama under Hugging Face's names, rows of heads in their order.

    `vocab_size`: keep only that many rows of embedding and head. Raises RunError if the source does not fit `model`.
    """
    must_fit(source, model)

    def read(name: str, n_rows: int) -> Tensor:
        tensor = source.read(name)
        return pair_halves(tensor, model.head_width) if is_rotated(name) else tensor[:n_rows]

    items = []
    for name, shape in tensor_shapes(model, vocab_size_of(source)).items():
        n_rows = min(shape[0], vocab_size or shape[0]) if name in (EMBEDDING, HEAD) else shape[0]
        take = partial(read, name, n_rows)
        items.append(ExportTensor(their_name(name), (n_rows, *shape[1:]), dtype or source.dtypes[name], take))
    return items


def vocab_size_of(source: WeightSource) -> int:
    """Return the vocabulary size from the embedding. Raises RunError if there is none."""
    if EMBEDDING not in source.shapes:
        raise RunError(f"{source.what} holds no Llama: it has no {EMBEDDING}")
    return source.shapes[EMBEDDING][0]


def must_fit(source: WeightSource, model: LlamaArgs) -> None:
    """Raise RunError unless the source has exactly the model's tensors; a tied head may be there too."""
    wanted = tensor_shapes(model, vocab_size_of(source))
    problems = [
        f"{name} is {source.shapes[name]} there and {shape} by its config" if name in source.shapes else f"no {name}"
        for name, shape in wanted.items()
        if source.shapes.get(name) != shape
    ]
    spare = {HEAD} if model.weight_tying else set()
    problems += [f"{name} is not part of it" for name in source.shapes if name not in wanted and name not in spare]
    if problems:
        raise RunError(f"{source.what} does not hold the Llama that its config describes: {dcp.some(problems)}")
    if model.weight_tying and HEAD in source.shapes and not torch.equal(source.read(HEAD), source.read(EMBEDDING)):
        raise RunError(f"{source.what}: {HEAD} and {EMBEDDING} differ, but the config ties them; it cannot be exported")


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
