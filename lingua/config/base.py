"""Base classes of every config section, parts chosen by their `type`, and what a schema knows about its own keys.

Promise: whatever is wrong with a config is a ConfigError, whose sentences name key, value and remedy; nothing in a
config is ever executed. How files become a config is told in `layers.py`; how one is checked, in `compose.py`.
Cost: no torch; pydantic imports in about 0.1 s.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """Something in a config that its author can mend. `problems` are complete sentences, one finding each."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Args(BaseModel):
    """Base of every config section: strict types, no unknown keys, values checked again on assignment."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # or a frozen config has null where a free mapping holds .inf
        validate_assignment=True,
        validate_default=True,
    )


# -- numbers as they were written ----------------------------------------------------------------------------------


class Written:
    """A number that remembers how a config spells it, as 0042 or 1.10."""

    text: str

    def __new__(cls, value: float, text: str) -> Self:
        number = super().__new__(cls, value)  # pyright: ignore[reportCallIssue]
        number.text = text
        return number

    def __getnewargs__(self) -> tuple[Any, str]:
        return plain(self), self.text

    def __repr__(self) -> str:
        return self.text


class WrittenInt(Written, int):
    """A whole number."""


class WrittenFloat(Written, float):
    """Any other."""


def plain(tree: Any) -> Any:
    """Copy a tree of values, with ordinary numbers in place of those that remember their spelling."""
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return int(tree) if isinstance(tree, WrittenInt) else float(tree) if isinstance(tree, WrittenFloat) else tree


def _as_written(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_written)]
"""Text. A number is taken as it was written: `name: 1.10` is the text 1.10."""
Anything = Annotated[Any, BeforeValidator(plain)]
"""Whatever YAML can say."""


# -- parts chosen by their `type` key ------------------------------------------------------------------------------


class Part(Args):
    """A section whose `type` key chooses the class: model, optimizer, loss. User code adds its own by `@register`."""

    type: str
    builder: ClassVar[
        str
    ]  # "module:callable" that builds the part; imported only when it is built, so Args stay torch-free


PartType = TypeVar("PartType", bound=type[Part])
_parts: dict[str, dict[str, type[Part]]] = {}


def register(kind: str, type_name: str) -> Callable[[PartType], PartType]:
    """Class decorator: `type: <type_name>` in the section `kind` now means this class. A name is taken only once."""

    def add(part: PartType) -> PartType:
        taken = _parts.setdefault(kind, {}).setdefault(type_name, part)
        if taken.__qualname__ != part.__qualname__ or taken.__module__ != part.__module__:
            raise ValueError(f"{kind} type {type_name!r} is already {taken.__module__}.{taken.__qualname__}")
        _parts[kind][type_name] = part
        return part

    return add


def parts(kind: str) -> dict[str, type[Part]]:
    """Registered classes of a section by type name."""
    return dict(_parts.get(kind, {}))


def part_of(kind: str, default: type[Part]) -> WrapValidator:
    """Validator of a field that holds one part: `Annotated[SerializeAsAny[OptimArgs], part_of("optim", AdamWArgs)]`.

    `type` absent or the default's own: the class `default` (an app's own Args); any other: a registered one.
    """

    def choose(value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, Part):
            return value
        if not isinstance(value, dict):
            return handler(value)
        default_type = default.model_fields["type"].default
        type_name = value.get("type", default_type)
        part = default if type_name == default_type else _parts.get(kind, {}).get(type_name)
        if part is None:
            raise PydanticCustomError(
                "unknown_part",
                "unknown {kind} type {type_name}; known: {known} (own ones: `plugins: [module]`)",
                {
                    "kind": kind,
                    "type_name": repr(type_name),
                    "known": ", ".join(sorted({default_type, *_parts.get(kind, {})})),
                },
            )
        return part.model_validate(value)

    return WrapValidator(choose)


def build_part(part: Part, *args: Any, **kwargs: Any) -> Any:
    """Import the part's builder and call it with the part's Args first."""
    module, _, name = part.builder.partition(":")
    return getattr(importlib.import_module(module), name)(part, *args, **kwargs)


# -- what a schema knows -----------------------------------------------------------------------------------------


Key = tuple[str | int, ...]


def dotted_key(key: Key) -> str:
    return ".".join(map(str, key))


def show(value: Any, at_most: int = 80) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= at_most else text[: at_most - 3] + "..."


def section_classes(schema: type[Args], name: str, *, items: bool = False) -> list[type[Args]]:
    """Classes that a field (or the items of its list) may hold; none for a plain value or a free mapping."""
    info = schema.model_fields[name]
    found: list[type[Args]] = []
    if isinstance(info.default, Part):
        found = [type(info.default), *parts(name).values()]
    else:
        stack = [info.annotation]
        while stack:
            kind = stack.pop()
            if isinstance(kind, type) and issubclass(kind, Args):
                found.append(kind)
            elif items or get_origin(kind) is not list:
                stack.extend(get_args(kind))
    return list(dict.fromkeys(found))


def inner_sections(sections: list[type[Args]], name: str, *, items: bool = False) -> list[type[Args]]:
    """The classes under key `name` of any of these sections."""
    having = [section for section in sections if name in section.model_fields]
    return [inner for section in having for inner in section_classes(section, name, items=items)]


def is_section(schema: type[Args], name: str) -> bool:
    return name in schema.model_fields and bool(section_classes(schema, name))


def all_keys(schema: type[Args], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, sections included."""
    for name in schema.model_fields:
        yield prefix + name
        for section in section_classes(schema, name):
            yield from all_keys(section, f"{prefix}{name}.")


_PREPARE = "prepare the sources that way once, and name the new folders in data.sources"
MOVED = {
    "grid": "it is for `lingua sweep`; start a sweep with this file, or take it out",
    "data.source_filter_functions": f"sources are not filtered while training; {_PREPARE}",
    "data.randomize_rate": f"tokens are not randomised while training; {_PREPARE}",
    "eval.dataset_dir": "use eval.validation.root_dir with eval.validation.sources",
    "eval.tasks": "use eval.harness.tasks",
    "slurm.anaconda": "take it out: jobs run in the environment that submitted them",
    "slurm.script": "use `app` for the package that runs",
    "slurm.launcher": "take it out: jobs are always submitted by sbatch",
    "slurm.copy_code": "it belongs to the command that launches a run, not to the run",
    "slurm.dirs_exists_ok": "it belongs to the command that launches a run, not to the run",
    "slurm.override": "it belongs to the command that launches a run, not to the run",
    "slurm.config": "it belongs to the command that launches a run, not to the run",
    "slurm.stdout": "take it out: logs lie in the run folder's logs/",
    "model.tie_weights": "use model.weight_tying",
    "model.hf": "use data.tokenizer.name: hf, and checkpoint.init_ckpt_path for the weights",
}
"""Keys of lingua and its forks that are gone, each with what replaces it."""
NO_EFFECT: dict[str, Any] = {
    "distributed.spawn_method": "forkserver",
    "checkpoint.thread_debug": True,
    "logging.acc_freq": None,
    "eval.wipe_ckpt": False,
    "eval.terminal_eval_wandb": False,
    "eval.harness.device": None,
}
"""Keys that are read and ignored, each with the default it had: older configs and Meta Lingua's hold them."""


def unknown_key(key: Key, schema: type[Args]) -> str:
    dotted = dotted_key(key)
    if dotted in MOVED:
        return f"{dotted} is no key here: {MOVED[dotted]}"
    sections: list[type[Args]] = [schema]
    for name, following in itertools.pairwise(key):
        if isinstance(name, str):
            sections = inner_sections(sections, name, items=isinstance(following, int))
    names = [name for section in sections for name in section.model_fields]
    last, prefix = str(key[-1]), dotted_key(key[:-1])
    keys = list(all_keys(schema))
    near = [name for name in keys if name.rpartition(".")[2] == last][:1]
    near = near or [f"{prefix}.{name}" if prefix else name for name in difflib.get_close_matches(last, names, 1)]
    near = near or list(difflib.get_close_matches(dotted, keys, 1))
    hint = f"did you mean {near[0]}?" if near else f"the keys there are {', '.join(sorted(names))}"
    return f"{dotted} is no key; {hint}"


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
