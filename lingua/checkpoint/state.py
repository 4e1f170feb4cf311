"""The training state, split into tensors (for DCP) and scalars (for JSON). Nothing is copied.

Parameters, buffers, optimizer state, param-group values and the RNG of every rank are restored bitwise. If the config
has changed a value since (weight decay, say), the new value wins.

Names: `model.<parameter>`, `optim.state.<parameter>.<key>`, without the prefixes of torch.compile, activation
checkpointing and DDP. A tied weight is written once and found under each of its names.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lingua.checkpoint.documents import STATE_VERSION
from lingua.optim.ema import EMA, begin_ema

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass
class TrainState:
    """The state that a checkpoint saves. Create it after model and optimizer are built, before the first step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    shared: dict[str, Any] = field(default_factory=dict)
    """JSON-able, the same on all ranks: step, tokens seen, tracking ids."""
    per_rank: dict[str, Any] = field(default_factory=dict)
    """JSON-able, per rank: positions of its data lanes."""
    per_rank_all: list[dict[str, Any]] = field(default_factory=list)
    """After a load: `per_rank` of every rank that saved, in rank order."""
    seed: int = 0
    """Seeds the RNGs after a load on another number of ranks."""
    has_ema: bool = False
    """The optimizer's state has an average of the weights."""

    def __post_init__(self) -> None:
        self.constructed = [_values(group) for group in self.optimizer.param_groups]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a state by flat name."""

    by_name: dict[str, Tensor]
    aliases: dict[str, str]
    """Further names of a tied weight -> its name in `by_name`."""
    paths: dict[str, tuple[str, ...]]
    """Name -> keys of the nested dict that stock DCP makes of it."""


def clean_name(name: str) -> str:
    """Return a parameter's name without the wrappers' prefixes."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return parameters and persistent buffers by clean name, and the aliases of tied ones."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for wrapped_name, tensor in bare(model).state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{wrapped_name} in the model's state dict is a {type(tensor).__name__}, not a tensor")
        name = clean_name(wrapped_name)
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors, aliases


def averages_of(state: TrainState) -> dict[str, Tensor]:
    """Return the averages of the weights (optim.ema) by clean name, for those that have begun."""
    slots = {name: state.optimizer.state.get(p, {}) for name, p in bare(state.model).named_parameters()}
    return {clean_name(name): one[EMA] for name, one in slots.items() if EMA in one}


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): clean_name(name) for name, parameter in bare(model).named_parameters()}


def tensors_of(state: TrainState) -> Tensors:
    """Return all tensors of a state, after making a fresh optimizer create its state."""
    start_optimizer(state.optimizer)
    if state.has_ema:
        begin_ema(state.optimizer)
    weights, tied = model_tensors(state.model)
    by_name = {f"model.{name}": tensor for name, tensor in weights.items()}
    paths: dict[str, tuple[str, ...]] = {f"model.{name}": ("model", name) for name in [*weights, *tied]}
    names = _parameter_names(state.model)
    for parameter, slots in state.optimizer.state.items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                flat = f"optim.state.{names[id(parameter)]}.{key}"
                by_name[flat] = value
                paths[flat] = ("optim", "state", names[id(parameter)], key)
    return Tensors(by_name, {f"model.{alias}": f"model.{name}" for alias, name in tied.items()}, paths)


def start_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Make a fresh optimizer create its state, by a step with zero gradients and learning rate 0.

    That step must not count, so counters named `step` are set back to 0.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if optimizer.state or any(p.grad is not None for p in parameters):
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    for slots in optimizer.state.values():
        if isinstance(count := slots.get("step"), Tensor):
            count.zero_()
        elif count is not None:
            slots["step"] = 0


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Reset an optimizer's state to that of a fresh one: zeros, and averages that begin with the current weights."""
    start_optimizer(optimizer)
    for slots in optimizer.state.values():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif key == "step":
                slots[key] = 0
    if any(EMA in slots for slots in optimizer.state.values()):
        begin_ema(optimizer, anew=True)


# -- scalars -----------------------------------------------------------------------------------------------------


def scalars_of(state: TrainState, rank: int, world_size: int) -> dict[str, Any]:
    """Return the JSON document of this rank; only rank 0's contains the values that all ranks share."""
    document: dict[str, Any] = {"version": STATE_VERSION, "rank": rank, "world_size": world_size}
    document |= {"per_rank": state.per_rank, "rng": rng_state()}
    if rank == 0:
        document |= {"shared": state.shared, "param_groups": _groups(state), "optim_scalars": _optim_scalars(state)}
    return document


def scalars_json(state: TrainState, rank: int, world_size: int) -> bytes:
    """Return `scalars_of` as the content of a file."""
    document = scalars_of(state, rank, world_size)
    return orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def restore_scalars(
    state: TrainState, documents: list[dict[str, Any]], rank: int, world_size: int, *, optimizer: bool = True
) -> None:
    """Restore what `scalars_of` returned on all ranks that saved; the optimizer's only if asked."""
    first = documents[0]
    state.shared = first["shared"]
    state.per_rank_all = [document["per_rank"] for document in documents]
    state.per_rank = state.per_rank_all[rank] if len(documents) == world_size else {}
    if optimizer:
        _restore_groups(state, first["param_groups"])
        _restore_optim_scalars(state, first["optim_scalars"])
    if len(documents) == world_size:
        restore_rng(documents[rank]["rng"])
    else:
        seed_rng(state.seed, int(state.shared.get("step", 0)), rank)


def _plain(value: Any) -> Any:
    """Convert a param-group value to JSON types."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
    return {k: v for k, v in plain.items() if isinstance(v, bool | int | float | str | list | None)}


def _group_names(state: TrainState) -> list[list[str]]:
    names = _parameter_names(state.model)
    return [[names[id(p)] for p in group["params"]] for group in state.optimizer.param_groups]


def _groups(state: TrainState) -> list[dict[str, Any]]:
    return [
        {"params": names, "values": _values(group), "constructed": constructed}
        for names, group, constructed in zip(
            _group_names(state), state.optimizer.param_groups, state.constructed, strict=True
        )
    ]


def _restore_groups(state: TrainState, saved: list[dict[str, Any]]) -> None:
    by_params = {tuple(sorted(group["params"])): group for group in saved}
    for names, group, constructed in zip(
        _group_names(state), state.optimizer.param_groups, state.constructed, strict=True
    ):
        old = by_params.get(tuple(sorted(names)))
        if old is None:
            continue  # the groups differ, so the config was changed: it wins
        for key, value in old["values"].items():
            if key in constructed and old["constructed"].get(key) == constructed[key]:
                group[key] = _like(key, group[key], value)


def _like(key: str, present: Any, value: Any) -> Any:
    """Convert a saved value to the type of the present one. Raises ValueError if it does not fit."""
    one = present[0] if isinstance(present, tuple) else present
    found: list[Any] = value if isinstance(present, tuple) and isinstance(value, list) else [value]
    is_number = isinstance(one, int | float | Tensor)
    fits = len(found) == (len(present) if isinstance(present, tuple) else 1)
    if is_number and not (fits and all(isinstance(each, int | float) for each in found)):
        raise ValueError(f"{key} of the optimizer is {value!r}, not like {present!r}")
    if isinstance(present, Tensor):
        return present.fill_(found[0])
    return tuple(found) if isinstance(present, tuple) else value


def _optim_scalars(state: TrainState) -> dict[str, dict[str, Any]]:
    names = _parameter_names(state.model)
    found: dict[str, dict[str, Any]] = {}
    for parameter, slots in state.optimizer.state.items():
        for key, value in slots.items():
            if isinstance(value, bool | int | float | str):
                found.setdefault(names[id(parameter)], {})[key] = value
            elif value is not None and not isinstance(value, Tensor):
                raise TypeError(
                    f"optimizer state {key!r} is a {type(value).__name__}: only tensors and numbers can be saved"
                )
    return found


def _restore_optim_scalars(state: TrainState, saved: dict[str, dict[str, Any]]) -> None:
    parameters = {name: p for p, name in ((p, _parameter_names(state.model)[id(p)]) for p in state.optimizer.state)}
    for name, slots in saved.items():
        if name not in parameters:
            raise ValueError(f"it has optimizer state of {name!r}, which this model does not have")
        present = state.optimizer.state[parameters[name]]
        if tensors := [key for key in slots if isinstance(present.get(key), Tensor)]:
            raise ValueError(f"{tensors[0]} of {name} is a number, not a tensor")
        present.update(slots)


# -- random number generators --------------------------------------------------------------------------------------


def rng_state() -> dict[str, Any]:
    """Return the state of every generator of this process, JSON-able."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    document = {
        "torch": _to_text(torch.get_rng_state()),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        document["cuda"] = _to_text(torch.cuda.get_rng_state())
    return document


def restore_rng(document: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned. Raises ValueError for anything else."""
    try:
        _restore_rng(document)
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"its random state is none ({str(error).partition(chr(10))[0]})") from error


def _restore_rng(document: Mapping[str, Any]) -> None:
    torch.set_rng_state(_from_text(document["torch"]))
    kind, keys, position, has_gauss, gauss = document["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = document["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in document and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(document["cuda"]))


def seed_rng(seed: int, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank), since another number of ranks has no saved state."""
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence([seed, step, rank]).generate_state(3).tolist()
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
