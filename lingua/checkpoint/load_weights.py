"""Load weights from a run of ours, a checkpoint folder, a torch file or a Hugging Face folder.

Loading is strict: every parameter gets a value of its shape and nothing in the source is left over, or the error names
what is wrong. The model is changed only after all names and shapes fit. No code in the source is executed: `.metadata`
goes through an allow-list, torch files are read with weights_only. Checkpoints with a manifest are verified. Files are
mapped, not read whole, and each rank copies only its own shards. Only `copy_weights` is collective.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lingua.checkpoint import dcp, layout, lookup
from lingua.checkpoint.metadata import read_tensors
from lingua.checkpoint.state import clean_name, model_tensors
from lingua.files import DiskError, RunError, read_json
from lingua.model.huggingface import (
    CONFIG_FILE,
    EMBEDDING,
    HEAD,
    INDEX_FILE,
    described_by,
    read_config,
    translations,
)
from lingua.optim.ema import ema_name

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors' names of dtypes."""

_TIED_HEAD = "output.tied_module.weight"  # Meta Lingua's second name of a tied embedding
# Tables that a model computes itself; some files contain them.
_COMPUTED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs|rope_embeddings\.freqs_cis")


@dataclass(frozen=True)
class WeightSource:
    """Weights that can be read one by one, under our names."""

    what: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]


def load_weights(
    model: nn.Module,
    path: str | Path,
    model_key: str | None = None,
    *,
    sizes_only: bool = False,
    more_rows: bool = False,
) -> str:
    """Fill `model` with the weights at `path`; return a summary for the log.

    `path`: RUN, RUN@step or a checkpoint folder, ours or Meta Lingua's, consolidated.pth, any torch file, a safetensors
    file or a Hugging Face folder. `model_key`: key of the weights in it; "" for the top level, None to detect it.
    `sizes_only`: verify only the sizes of a checkpoint with a manifest. `more_rows`: the model's embedding and head may
    have more rows than the source's; the extra rows keep their values. Raises RunError with names, shapes and remedy.
    """
    source = open_source(path, model_key, sizes_only=sizes_only)
    tensors, aliases = model_tensors(model)
    chosen = _match(source, tensors, aliases, more_rows)
    for name, theirs in chosen.items():
        _copy(tensors[name], source.read(theirs))
    n_values = sum(tensor.numel() for tensor in tensors.values())
    counts = {name: (source.shapes[theirs][0], len(tensors[name])) for name, theirs in chosen.items() if more_rows}
    grown = [f"; rows of {name} from {there} on are new" for name, (there, here) in counts.items() if here > there]
    return f"{len(tensors)} tensors ({n_values:,} parameters) from {source.what}{''.join(grown)}"


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module, instead: Mapping[str, Tensor] | None = None) -> None:
    """Copy the weights of `source`, sharded or not, to `target`, which each rank holds in full and in any dtype.

    Both have the same architecture. `instead`: tensors by name to copy instead of the source's. Collective, one tensor
    at a time, if `source` is sharded.
    """
    theirs, ours = {**model_tensors(source)[0], **(instead or {})}, model_tensors(target)[0]
    assert theirs.keys() == ours.keys(), f"two models: {theirs.keys() ^ ours.keys()}"
    for name, tensor in theirs.items():
        ours[name].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _match(
    source: WeightSource, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], more_rows: bool
) -> dict[str, str]:
    """Map our name of every tensor to the source's. Raises RunError if anything does not fit."""
    chosen: dict[str, str] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        names = [name, *(alias for alias, of in aliases.items() if of == name)]
        theirs = next((n for n in names if n in source.shapes), None)
        if theirs is None:
            tied = " (it has tied weights: set model.weight_tying: true)" if name == HEAD else ""
            problems.append(f"{name} is missing there{tied}")
        elif (shape := source.shapes[theirs]) != tuple(tensor.shape) and not (
            more_rows and name in (EMBEDDING, HEAD) and shape[0] <= len(tensor) and shape[1:] == tuple(tensor.shape[1:])
        ):
            problems.append(f"{name} is {source.shapes[theirs]} there and {tuple(tensor.shape)} here")
        else:
            chosen[name] = theirs
    for name in source.shapes:
        if name not in tensors and name not in aliases:
            problems.append(f"{name} is not in this model")
    untied = {alias: of for alias, of in aliases.items() if alias in source.shapes and of in source.shapes}
    if HEAD not in tensors and HEAD not in aliases and HEAD in source.shapes:  # a tied model has no separate head
        problems = [problem for problem in problems if not problem.startswith(f"{HEAD} ")]
        untied[HEAD] = EMBEDDING
    if problems:
        raise RunError(f"{source.what} does not fit this model: {dcp.some(problems)}")
    for alias, name in untied.items():
        if not torch.equal(source.read(alias), source.read(name)):
            raise RunError(
                f"{source.what}: {alias} and {name} differ, but are tied here; set model.weight_tying: false"
            )
    return chosen


def _copy(target: Tensor, full: Tensor) -> None:
    """Copy a full tensor into the first rows of `target`, of which this rank may hold only a shard."""
    if isinstance(target, DTensor):
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        for axis, (size, start) in enumerate(zip(shape, offset, strict=True)):
            start = min(start, full.shape[axis])
            full = full.narrow(axis, start, min(size, full.shape[axis] - start))
        target = target.to_local()
    target[tuple(slice(n) for n in full.shape)].copy_(full)


# -- detecting the format ----------------------------------------------------------------------------------------


def open_source(path: str | Path, model_key: str | None = None, *, sizes_only: bool = False) -> WeightSource:
    """Detect the format at `path` and open it, leaving out computed tables. Raises RunError if it has no weights."""
    source = _open(path, model_key, sizes_only)
    kept = [name for name in source.shapes if not _COMPUTED.fullmatch(name)]
    return replace(source, shapes={n: source.shapes[n] for n in kept}, dtypes={n: source.dtypes[n] for n in kept})


def _open(path: str | Path, model_key: str | None, sizes_only: bool) -> WeightSource:
    path, is_average = lookup.without_ema(path)
    if is_average:
        return _averaged(lookup.intact(path, sizes_only=sizes_only).folder)
    place, _ = lookup.split(path)
    if (theirs := lookup.of_meta_lingua(path)) is not None:
        return _from_dcp(theirs, model_key)
    if lookup.is_checkpoint(path):
        return _from_dcp(lookup.intact(path, needed=is_weights, sizes_only=sizes_only).folder, model_key)
    if place.is_file():
        return _from_safetensors([place]) if place.suffix == ".safetensors" else _from_torch(place, model_key)
    if (place / layout.METADATA).exists():  # another program's: it has no manifest to verify
        return _from_dcp(place, model_key)
    for file in (place / "consolidated.pth", place / "consolidated" / "consolidated.pth"):
        if file.exists():
            return _from_torch(file, model_key)
    if files := _safetensors_of(place):
        return _from_safetensors(files)
    raise RunError(
        f"{place} holds no weights: expected {layout.METADATA}, consolidated.pth, *.safetensors or a run's folder"
    )


def is_weights(name: str) -> bool:
    return name == layout.METADATA or name.startswith("model.")


def _averaged(folder: Path) -> WeightSource:
    """Open the average of the weights in a checkpoint of ours (`optim.ema`); buffers are not averaged."""
    facts = read_tensors(folder)
    names = {
        name.removeprefix("model."): fact.same_as or name for name, fact in facts.items() if name.startswith("model.")
    }
    averages = {name: ema_name(of.removeprefix("model.")) for name, of in names.items()}
    if not any(average in facts for average in averages.values()):
        raise RunError(
            f"{folder} holds no average of the weights; leave out {lookup.EMA_SUFFIX}, or train with optim.ema"
        )
    theirs = {name: average if (average := averages[name]) in facts else of for name, of in names.items()}
    return _read_dcp(f"average of the weights in {folder}", folder, dcp.read_metadata(folder), theirs)


def _from_dcp(folder: Path, model_key: str | None) -> WeightSource:
    metadata = dcp.read_metadata(folder)
    described = dcp.properties_in(metadata)
    if model_key is None:
        model_key = "model" if any(name.startswith("model.") for name in described) else ""
    prefix = f"{model_key}." if model_key else ""
    theirs = {_untied(name.removeprefix(prefix)): name for name in described if name.startswith(prefix)}
    return _read_dcp(f"checkpoint folder {folder}", folder, metadata, theirs)


def _read_dcp(what: str, folder: Path, metadata: Metadata, theirs: Mapping[str, str]) -> WeightSource:
    """Open tensors of a checkpoint folder. `theirs`: our name -> theirs."""
    described = dcp.properties_in(metadata)

    def read(name: str) -> Tensor:
        shape, dtype = described[theirs[name]]
        tensor = torch.empty(shape, dtype=dtype)
        dcp.read_into(folder, {theirs[name]: tensor}, metadata)
        return tensor

    shapes = {name: described[their][0] for name, their in theirs.items()}
    dtypes = {name: described[their][1] for name, their in theirs.items()}
    return WeightSource(what, shapes, dtypes, read)


def _untied(name: str) -> str:
    return HEAD if name == _TIED_HEAD else name


def _from_torch(file: Path, model_key: str | None) -> WeightSource:
    try:
        try:
            content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or repr(error)
        raise RunError(f"{file} is refused: it is not a plain file of tensors ({reason})") from None
    keys = model_key.split(".") if model_key else []
    if model_key is None and isinstance(content, dict):
        keys = [key for key in ("model", "state_dict", "model_state_dict") if isinstance(content.get(key), dict)][:1]
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise RunError(f"{file} has no key {model_key!r}; set checkpoint.init_ckpt_model_key")
        content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RunError(
            f"{file} holds more than named tensors; set the key of the weights in checkpoint.init_ckpt_model_key"
        )
    tensors: dict[str, Tensor] = {_untied(clean_name(str(name))): value for name, value in content.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return _with_our_names(WeightSource(f"torch file {file}", shapes, dtypes, tensors.__getitem__), file.parent)


def _safetensors_of(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.exists():
        names = set(read_json(index).get("weight_map", {}).values())
        if bad := [name for name in names if name != Path(name).name]:
            raise RunError(f"{index} points at {bad[0]!r}, outside of its folder")
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("[!.]*.safetensors"))


def _from_safetensors(files: list[Path]) -> WeightSource:
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    opened: dict[str, Any] = {}
    for file in files:
        try:
            mapped = safe_open(file, framework="pt")
        except OSError as error:
            raise DiskError.of(error, f"{file} cannot be read: {error}") from None
        except SafetensorError as error:
            raise RunError(f"{file} cannot be read: {error}") from None
        for name in mapped.keys():  # noqa: SIM118 - not a dict
            facts = mapped.get_slice(name)
            if facts.get_dtype() not in TYPES:
                raise RunError(f"{file}: {name} is {facts.get_dtype()}, a dtype that no model here has")
            shapes[name], dtypes[name] = tuple(facts.get_shape()), TYPES[facts.get_dtype()]
            opened[name] = mapped
    where = files[0].parent if len(files) > 1 else files[0]
    source = WeightSource(f"safetensors {where}", shapes, dtypes, lambda name: opened[name].get_tensor(name))
    return _with_our_names(source, files[0].parent)


# -- Hugging Face names --------------------------------------------------------------------------------------------


def _with_our_names(source: WeightSource, folder: Path) -> WeightSource:
    """Rename weights with Hugging Face's names to ours; needs the config.json beside them."""
    fitting = [translation for translation in translations() if translation.embedding in source.shapes]
    if not fitting:
        return source
    config, path = read_config(folder), folder / CONFIG_FILE
    # Other programs' model types have Llama's names too.
    translation = fitting[0] if len(fitting) == 1 else described_by(config, path, fitting)
    make = translation.into_ours(config, path)
    theirs = {translation.our_name(name): name for name in source.shapes}
    if config.get("tie_word_embeddings") and HEAD not in theirs:
        theirs[HEAD] = theirs[EMBEDDING]
    shapes = {name: translation.our_shape(name, source.shapes[original]) for name, original in theirs.items()}
    dtypes = {name: source.dtypes[original] for name, original in theirs.items()}
    return WeightSource(
        f"Hugging Face {source.what}", shapes, dtypes, lambda name: make(name, source.read(theirs[name]))
    )
