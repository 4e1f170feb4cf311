"""Describe a checkpoint folder without torch: names, shapes and types of tensors, step, rates, data position.

Nothing in the folder is executed. `.metadata` is a pickle written by torch; it is read with stand-ins for the few
classes that a checkpoint needs, and refused if it names any other. No tensor is read.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, EnumType
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from lingua.checkpoint import layout
from lingua.checkpoint.documents import read_states
from lingua.files import RunError, naming

ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}
"""(module, name) of all that a `.metadata` may name, besides torch's dtypes and `GETATTR`."""

GETATTR = ("builtins", "getattr")
"""How Python 3.11.2 pickles a member of an enum. Readers use `enum_member` instead, never getattr itself."""

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8,
    "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4,
    "uint64": 8, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorFacts:
    """One full tensor, whatever its shards."""

    shape: tuple[int, ...]
    dtype: str
    files: tuple[str, ...]
    """Files that hold its bytes."""
    same_as: str | None = None
    """Of a tied weight: the tensor that it shares its bytes with."""

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * self.n_values

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


# -- .metadata -----------------------------------------------------------------------------------------------------


class _StandIn:
    """Replaces a class of torch; keeps the state in the pickle."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Tensor(_StandIn):
    pass


class _Index(_StandIn):
    pass


class _StorageStandIn(_StandIn):
    pass


class _MemoryFormat(Enum):
    TORCH_CONTIGUOUS_FORMAT = 0
    TORCH_CHANNELS_LAST = 1
    TORCH_PRESERVE_FORMAT = 2


_STAND_INS: dict[str, Any] = {
    "TensorStorageMetadata": _Tensor,
    "MetadataIndex": _Index,
    "_StorageInfo": _StorageStandIn,
    "OrderedDict": OrderedDict,
    "Size": tuple,
    "_MEM_FORMAT_ENCODING": _MemoryFormat,
}


def enum_member(enum: Any, name: Any, /) -> Any:
    """Return an enum's member by name, and nothing else that getattr would return."""
    if not isinstance(enum, EnumType) or name not in enum.__members__:
        raise pickle.UnpicklingError(
            f"it takes {name!r} from {enum!r} by {'.'.join(GETATTR)}, which no checkpoint needs"
        )
    return enum.__members__[name]


class _TorchFreeUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == GETATTR:
            return enum_member
        if (module_name, global_name) in ALLOWED:
            return _STAND_INS.get(global_name, _StandIn)
        if module_name == "torch" and global_name in DTYPE_BYTES:
            return global_name
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint needs")


def read_tensors(folder: Path) -> dict[str, TensorFacts]:
    """Return every tensor of a checkpoint folder by name. Raises RunError if `.metadata` is refused."""
    path = folder / layout.METADATA
    try:
        with naming(path), path.open("rb") as file:
            return _tensors_in(file)
    except FileNotFoundError:
        raise RunError(f"{folder} is not a checkpoint folder: it has no {layout.METADATA}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise RunError(f"{path} is refused: {error}") from None


def _tensors_in(file: BinaryIO) -> dict[str, TensorFacts]:
    metadata = _TorchFreeUnpickler(file).load()
    places: dict[str, set[tuple[str, int]]] = {}
    for index, place in metadata.get("storage_data").items():
        if isinstance(index, _Index) and isinstance(place, _StorageStandIn):
            places.setdefault(index.get("fqn"), set()).add((str(place.get("relative_path")), int(place.get("offset"))))
    first: dict[frozenset[tuple[str, int]], str] = {}
    tensors = {}
    for name, described in metadata.get("state_dict_metadata").items():
        if isinstance(described, _Tensor):
            where = frozenset(places.get(name, ()))
            tied = first.setdefault(where, name) if where else name
            tensors[str(name)] = TensorFacts(
                tuple(int(n) for n in described.get("size")),
                str(described.get("properties").state[0]),  # TensorProperties.__getstate__: dtype comes first
                tuple(sorted({file_name for file_name, _ in where})),
                None if tied == name else tied,
            )
    return tensors


# -- scalars -------------------------------------------------------------------------------------------------------


def read_scalars(folder: Path) -> dict[str, Any]:
    """Read step, tokens and tracking ids, the optimizer's groups with their rates, and the data position.

    Random states and lanes are long, so only their hash is returned. Empty for a folder that another program wrote.
    Raises RunError if the file that should hold the training state does not.
    """
    if not (folder / layout.train_state_file(0)).exists():
        return {}
    documents = read_states(folder)
    first, n_ranks = documents[0], len(documents)
    try:
        groups = [{"tensors": len(group["params"]), **group["values"]} for group in first["param_groups"]]
        rng = _hash([document["rng"] for document in documents])
        scalars = {"ranks": n_ranks, "shared": first["shared"], "param_groups": groups, "rng": rng}
        data = [document["per_rank"]["data"] for document in documents if "data" in document["per_rank"]]
        return {**scalars, "data": _position(data)} if data else scalars
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RunError(f"{folder / layout.train_state_file(0)} is not a training state") from None


def read_tokenizer(folder: Path) -> str | None:
    """Return the fingerprint of the tokenizer that made the run's rows, or None if the checkpoint does not have it."""
    if not (folder / layout.train_state_file(0)).exists():
        return None
    data = read_states(folder)[0]["per_rank"].get("data")
    return data.get("tokenizer") if isinstance(data, dict) else None


def _position(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the loader states of all ranks into one data position."""
    first = states[0]
    lanes = {lane: state for of_rank in states for lane, state in of_rank["lanes"].items()}
    epochs = {name: max(state["epochs"][name] for state in states) for name in first["epochs"]}
    return {
        "rows": first["row"],
        "lanes": first["K"],
        "seq_len": first["seq_len"],
        "sources": {name: {**about, "epochs_begun": epochs.get(name)} for name, about in first["sources"].items()},
        "lanes_hash": _hash(sorted(lanes.items())),
    }


def _hash(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(repr(value).encode("utf-8", "surrogateescape"))


# -- comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """Something that differs between two checkpoints; None where one lacks it."""

    what: str
    a: Any
    b: Any


def tensor_differences(a: Mapping[str, TensorFacts], b: Mapping[str, TensorFacts]) -> list[Mismatch]:
    """Return the tensors that only one has, or whose shape or type differs."""
    return [
        Mismatch(name, _described(a.get(name)), _described(b.get(name)))
        for name in sorted({*a, *b})
        if _described(a.get(name)) != _described(b.get(name))
    ]


def _described(facts: TensorFacts | None) -> str | None:
    return None if facts is None else str(facts)


def scalar_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Mismatch]:
    left, right = dict(_leaves(a)), dict(_leaves(b))
    names = list(dict.fromkeys([*left, *right]))
    return [Mismatch(n, left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{prefix}{name}.")
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{prefix}{number}.")
    else:
        yield prefix.removesuffix("."), value
