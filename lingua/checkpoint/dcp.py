"""Lay out, write and read the files of torch.distributed.checkpoint (DCP) without executing any code in them.

Stock `dcp.load` and `dcp_to_torch_save` read these files. The stock planner decides once per run which rank writes
which shard. From then on each file is a fixed sequence of constant bytes and tensor bytes at known offsets,
`.metadata` never changes, and a save needs no planning and no collective. Files hold tensors only, no pickled values.
`.metadata` is read through an allow-list, tensors with `weights_only`.

A file:  | head of blob 0 | bytes of tensor 0 | tail | padding to 64 | head of blob 1 | ...
where a blob is what `torch.save` writes for the tensor (a zip archive whose checksums torch ignores).
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage] - part of the format: what .metadata holds
)
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,  # pyright: ignore[reportPrivateUsage] - the same
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

from lingua.checkpoint import layout
from lingua.checkpoint import metadata as contents
from lingua.files import Buffer, RunError, naming

ALIGNMENT_BYTES = 64


# -- layout of the files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileSpan:
    """A span of a file: constant bytes, or the bytes of a tensor (then `constant` is None)."""

    offset: int
    size_bytes: int
    constant: bytes | None
    index: MetadataIndex | None = None
    """Tensor and shard."""


@dataclass(frozen=True)
class FilePlan:
    """One file of one rank."""

    name: str
    size_bytes: int
    parts: list[FileSpan]


@dataclass(frozen=True)
class WritePlan:
    """The files that a rank writes; the same for every save."""

    files: list[FilePlan]
    metadata: bytes | None
    """Content of `.metadata`; on rank 0 only."""
    signature: list[tuple[str, tuple[int, ...], torch.dtype]]

    def fits(self, tensors: dict[str, Tensor]) -> bool:
        return self.signature == _signature(tensors)


def _signature(tensors: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


class _Recorder:
    """A file that records what is written to it, and where a hole is left."""

    def __init__(self) -> None:
        self.pieces: list[bytearray] = [bytearray()]
        self.hole_bytes = 0

    def write(self, data: Buffer) -> int:
        self.pieces[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert (whence, len(self.pieces)) == (1, 1), "torch.save reserves room for one tensor by one relative seek"
        self.hole_bytes = offset
        self.pieces.append(bytearray())
        return 0

    def flush(self) -> None:
        pass


@functools.lru_cache(maxsize=4096)
def blob(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, int, bytes]:
    """Return (head, size of the tensor, tail) of what `torch.save` writes for a tensor of this type and shape."""
    recorder = _Recorder()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), recorder)  # pyright: ignore[reportArgumentType]
    head, tail = (bytes(piece) for piece in [*recorder.pieces, bytearray()][:2])
    return head, recorder.hole_bytes, tail


def _plan_file(name: str, items: list[WriteItem]) -> tuple[FilePlan, dict[MetadataIndex, _StorageInfo]]:
    parts: list[FileSpan] = []
    places: dict[MetadataIndex, _StorageInfo] = {}
    offset = 0

    def add(constant: bytes | None, size_bytes: int, index: MetadataIndex | None = None) -> None:
        nonlocal offset
        if size_bytes:
            parts.append(FileSpan(offset, size_bytes, constant, index))
            offset += size_bytes

    for item in items:
        data = item.tensor_data
        assert data is not None, f"{item.index.fqn} is not a tensor"
        padding = -offset % ALIGNMENT_BYTES
        add(bytes(padding), padding)
        begin = offset
        head, size_bytes, tail = blob(data.properties.dtype, tuple(data.chunk.sizes))
        add(head, len(head))
        add(None, size_bytes, item.index)
        add(tail, len(tail))
        places[item.index] = _StorageInfo(name, begin, offset - begin)
    return FilePlan(name, offset, parts), places


def _plan_rank(plan: SavePlan, rank: int) -> list[tuple[FilePlan, dict[MetadataIndex, _StorageInfo]]]:
    weights = [item for item in plan.items if item.index.fqn.startswith("model.")]
    rest = [item for item in plan.items if not item.index.fqn.startswith("model.")]
    named = ((layout.model_file(rank), weights), (layout.optim_file(rank), rest))
    return [_plan_file(name, items) for name, items in named if items]


def local_plan(tensors: dict[str, Tensor], is_coordinator: bool) -> SavePlan:
    """Describe what this rank holds, for `global_plan`."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=is_coordinator)
    return planner.create_local_plan()


def global_plan(
    local_plans: list[SavePlan], paths: dict[str, tuple[str, ...]], aliases: dict[str, str]
) -> tuple[list[SavePlan], bytes]:
    """Decide which rank writes which shard; return the ranks' plans and the content of `.metadata`. Call on rank 0.

    `paths`: how names unfold into nested dicts. `aliases`: further names of a tensor, which is written once.
    """
    plans, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(local_plans)
    places = {
        index: place
        for rank, plan in enumerate(plans)
        for _, of_file in _plan_rank(plan, rank)
        for index, place in of_file.items()
    }
    tensors = dict(metadata.state_dict_metadata)
    for alias, name in aliases.items():
        tensors[alias] = tensors[name]
        same = {dataclasses.replace(index, fqn=alias): place for index, place in places.items() if index.fqn == name}
        places |= same
    metadata = Metadata(tensors, planner_data=paths, storage_data=places, version=CURRENT_DCP_VERSION)
    return plans, metadata_bytes(metadata)


def metadata_bytes(metadata: Metadata) -> bytes:
    """Return the content of `.metadata`, with the same bytes on every Python.

    Python versions pickle enum members differently: 3.11.2 calls builtins.getattr, which no reader should allow.
    """
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=4)
    pickler.dispatch_table = {
        **copyreg.dispatch_table,
        _MEM_FORMAT_ENCODING: lambda member: (type(member), (member.value,)),
    }
    pickler.dump(metadata)
    return file.getvalue()


def write_plan(tensors: dict[str, Tensor], plan: SavePlan, rank: int, metadata: bytes | None) -> WritePlan:
    """Plan this rank's files from its share of the global plan."""
    return WritePlan([file for file, _ in _plan_rank(plan, rank)], metadata, _signature(tensors))


def file_content(file: FilePlan, tensors: dict[str, Tensor]) -> Iterator[Buffer | Tensor]:
    """Yield a file with the tensors' current values, span by span: bytes, or a flat tensor that is on a device."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors))
    for part in file.parts:
        if part.constant is not None:
            yield part.constant
            continue
        assert part.index is not None
        tensor = planner.lookup_object(part.index).detach()
        assert tensor.nbytes == part.size_bytes, f"{part.index.fqn} changed its size"
        yield host_bytes(tensor) if tensor.device.type == "cpu" else tensor.contiguous().reshape(-1)


def host_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, copied only if it is on a device or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore[reportArgumentType] - an array is a buffer


# -- reading -------------------------------------------------------------------------------------------------------


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == contents.GETATTR:
            return contents.enum_member
        if module_name == "torch" and isinstance(found := getattr(torch, global_name, None), torch.dtype):
            return found
        if (module_name, global_name) in contents.ALLOWED:
            here = "pathlib" if module_name == "pathlib._local" else module_name  # only Python 3.13 has the other
            return super().find_class(here, global_name)
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint needs")


def _read_metadata(file: BinaryIO, path: Path) -> Metadata:
    try:
        metadata = _AllowListUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise RunError(f"{path} is refused: {error}") from None
    places = getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not isinstance(places, dict):
        raise RunError(f"{path} is refused: it does not describe a checkpoint")
    for place in places.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(place, _StorageInfo) or not isinstance(name, str) or name != Path(name).name:
            raise RunError(f"{path} is refused: it points at {name!r}, outside of its folder")
        if getattr(place, "transform_descriptors", None):
            raise RunError(f"{path} is refused: {name} is transformed (compressed); write it without extensions")
    return metadata


class Content(Protocol):
    """Content of a file; a slice of it is bytes in memory."""

    def __getitem__(self, span: slice, /) -> memoryview: ...


Contents = Callable[[str], Content]
"""Returns the content of a checkpoint's file by name."""


class Reader(FileSystemReader):
    """Stock reading (which takes tensors with weights_only), but `.metadata` goes through the allow-list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / layout.METADATA
        try:
            with naming(path), path.open("rb") as file:
                metadata = _read_metadata(file, path)
        except FileNotFoundError:
            raise RunError(f"{path.parent} is not a checkpoint folder: it has no {layout.METADATA}") from None
        metadata.storage_meta = StorageMeta()
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise RunError(f"{read_item.dest_index.fqn} is a pickled value, not a tensor; refused")


def read_metadata(folder: Path, content: Contents | None = None) -> Metadata:
    """Read the metadata of a checkpoint folder. Raises RunError if it is refused."""
    if content is None:
        return Reader(folder).read_metadata()
    metadata = _read_metadata(io.BytesIO(content(layout.METADATA)[:]), folder / layout.METADATA)
    metadata.storage_meta = StorageMeta()
    return metadata


def tensor_properties(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of every tensor in a checkpoint folder."""
    return properties_in(read_metadata(folder))


def files_of(metadata: Metadata) -> dict[str, int]:
    """Return the smallest size that each file of a checkpoint folder can have, by name."""
    needed: dict[str, int] = {}
    for place in metadata.storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    return needed


def chosen(metadata: Metadata, names: Mapping[str, str]) -> Metadata:
    """Return metadata of only these tensors, renamed (`names`: old -> new). They stay in their files."""
    described = {names[name]: d for name, d in metadata.state_dict_metadata.items() if name in names}
    places = {
        dataclasses.replace(index, fqn=names[index.fqn]): place
        for index, place in metadata.storage_data.items()
        if index.fqn in names
    }
    paths = {name: tuple(name.split(".", 1)) for name in described if name.startswith("model.")}
    for name in described:
        if name.startswith("optim.state."):
            parameter, _, key = name.removeprefix("optim.state.").rpartition(".")
            paths[name] = ("optim", "state", parameter, key)
    return Metadata(described, planner_data=paths, storage_data=places, version=CURRENT_DCP_VERSION)


def properties_in(metadata: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of every tensor in metadata."""
    return {
        name: (tuple(d.size), d.properties.dtype)
        for name, d in metadata.state_dict_metadata.items()
        if isinstance(d, TensorStorageMetadata)
    }


def read_into(
    folder: Path,
    tensors: dict[str, Tensor],
    metadata: Metadata | None = None,
    reader: FileSystemReader | None = None,
) -> None:
    """Fill `tensors` (DTensors: this rank's shards) in place from a checkpoint of any number of ranks. Not collective.

    `metadata`: the folder's, parsed once for many calls. `reader`: the folder's; None for the stock one.
    Raises RunError with the names of tensors that the folder lacks or holds in another shape.
    """
    metadata = metadata or read_metadata(folder)
    reader = reader or Reader(folder)
    planner = _Planner(flatten_state_dict=False)
    described = metadata.state_dict_metadata
    problems = []
    for name, tensor in tensors.items():
        found = described.get(name)
        if not isinstance(found, TensorStorageMetadata):
            problems.append(f"{name} is missing")
        elif tuple(found.size) != tuple(tensor.shape):
            problems.append(f"{name} is {tuple(found.size)} there, {tuple(tensor.shape)} here")
    if problems:
        raise RunError(f"{folder} does not fit: {some(problems)}")
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=False)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    try:
        reader.read_data(planner.create_local_plan(), planner).wait()
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AssertionError, ValueError) as error:
        raise RunError(f"{folder} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from error


def some(names: list[str], limit: int = 8) -> str:
    """Join the first few of many names and the number of the others."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
