"""Base classes of the config sections, the registry of parts (sections chosen by `type`), and lookups in a schema.

`yaml_layers.py` stacks files into one tree; `compose.py` validates it. Imports no torch.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from lingua.files import ConfigError as ConfigError

Key = tuple[str | int, ...]


class Args(BaseModel):
    """Base of every config section: strict types, no unknown keys, values checked again on assignment."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # or a frozen config has null where a free mapping holds .inf
        validate_assignment=True,
        validate_default=True,
        defer_build=True,  # most classes are only used inside others, or not at all
    )

    def conflicts(self, args: Any) -> Iterator[tuple[str, str]]:
        """Yield (key, sentence with a remedy) for what this section cannot do with the rest of the config `args`.

        Called for the config itself and every section in it, after each value was found valid by itself. Without torch
        and without a device.
        """
        yield from ()


def all_args(value: Any) -> Iterator[Args]:
    """Yield a config and every section in it, items of lists and mappings included."""
    if isinstance(value, Args):
        yield value
        value = [getattr(value, name) for name in type(value).model_fields]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from all_args(item)


# -- numbers as they were written ----------------------------------------------------------------------------------


class Written:
    """A number that remembers its spelling in the config, such as 0042 or 1.10."""

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
    """An integer that remembers its spelling."""


class WrittenFloat(Written, float):
    """A float that remembers its spelling."""


def plain(tree: Any) -> Any:
    """Copy a tree of values, replacing numbers that remember their spelling by ordinary ones."""
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return int(tree) if isinstance(tree, WrittenInt) else float(tree) if isinstance(tree, WrittenFloat) else tree


def _as_written(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_written)]
"""Text. A number keeps its spelling: `name: 1.10` is the text 1.10."""
Anything = Annotated[Any, BeforeValidator(plain)]
"""Any YAML value."""


# -- parts chosen by their `type` key ------------------------------------------------------------------------------


class Part(Args):
    """A section whose `type` key chooses the class: model, optimizer, loss. User code adds its own with `@register`."""

    type: str
    # "module:callable" that builds the part. It is imported only to build, so the Args import no torch.
    builder: ClassVar[str]


PartType = TypeVar("PartType", bound=type[Part])
_parts: dict[str, dict[str, type[Part]]] = {}


def register(kind: str, type_name: str) -> Callable[[PartType], PartType]:
    """Return a decorator that makes `type: <type_name>` of section `kind` mean a class. Raises ValueError if taken."""

    def add(part: PartType) -> PartType:
        if not part.__module__.startswith(("lingua.", "apps.")):  # report errors in a plugin's class now
            part.model_rebuild(raise_errors=False)
        taken = _parts.setdefault(kind, {}).setdefault(type_name, part)
        if taken.__qualname__ != part.__qualname__ or taken.__module__ != part.__module__:
            raise ValueError(f"{kind} type {type_name!r} is already {taken.__module__}.{taken.__qualname__}")
        _parts[kind][type_name] = part
        return part

    return add


def part_kinds() -> list[str]:
    """Return the sections that have registered classes."""
    return sorted(_parts)


def parts(kind: str) -> dict[str, type[Part]]:
    """Return the registered classes of a section by type name."""
    return dict(_parts.get(kind, {}))


def part_of(kind: str, default: type[Part] | None = None) -> WrapValidator:
    """Return the validator of a field that holds one part.

    Used as `Annotated[SerializeAsAny[OptimArgs], part_of("optim", AdamWArgs)]`. Without `type`, or with the default's
    own, the class is `default` (an app may pass its own Args); otherwise it is the registered one. Without a default
    `type` is required.
    """

    def choose(value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, Part):
            return value
        if not isinstance(value, dict):
            return handler(value)
        default_type = None if default is None else default.model_fields["type"].default
        type_name = value.get("type", default_type)
        part = default if type_name == default_type else _parts.get(kind, {}).get(str(type_name))
        if part is None:
            raise PydanticCustomError(
                "unknown_part",
                "unknown {kind} type {type_name}; known: {known} (own ones: `plugins: [module]`)",
                {
                    "kind": kind,
                    "type_name": show(type_name),
                    "known": ", ".join(sorted({default_type, *_parts.get(kind, {})} - {None})),
                },
            )
        return part.model_validate(value)

    return WrapValidator(choose)


def as_parts(tree: Any, marks: dict[Key, Any], key: Key = ()) -> Any:
    """Return a tree in which `{type_hint: X, config: {...}}`, LLMgym's spelling, is `{type: X, ...}`; marks follow."""
    if isinstance(tree, list):
        return [as_parts(value, marks, (*key, index)) for index, value in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    tree = {name: as_parts(value, marks, (*key, name)) for name, value in tree.items()}
    inner = tree.get("config") or {}
    if "type_hint" not in tree or tree.keys() - {"type_hint", "config"} or not isinstance(inner, dict):
        return tree
    n = len(key)
    for mark in [mark for mark in marks if mark[:n] == key and mark[n : n + 1] in (("type_hint",), ("config",))]:
        marks[(*key, "type") if mark[n] == "type_hint" else (*key, *mark[n + 1 :])] = marks.pop(mark)
    return {"type": tree["type_hint"], **inner}


def named(owner: Part | type[Part], fact: str) -> Any:
    """Import what an attribute of an Args class names as "module:name". Raises ConfigError if it does not exist."""
    place = getattr(owner, fact)
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        kind = owner if isinstance(owner, type) else type(owner)
        raise ConfigError(f"{kind.__name__}.{fact} is {place!r}, but {error}; correct it there") from error


def build_part(part: Part, *args: Any, **kwargs: Any) -> Any:
    """Import the part's builder and call it with the part's Args first."""
    return named(part, "builder")(part, *args, **kwargs)


# -- what a schema knows -----------------------------------------------------------------------------------------


def dotted_key(key: Key) -> str:
    return ".".join(map(str, key))


def show(value: Any, at_most: int = 80) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= at_most else text[: at_most - 3] + "..."


def section_classes(schema: type[Args], name: str, *, items: bool = False) -> list[type[Args]]:
    """Return the section classes that a field (or its list items) may hold; [] for a plain value or a free mapping."""
    info = schema.model_fields[name]
    found: list[type[Args]] = []
    if isinstance(info.default, Part):
        found = [type(info.default), *parts(name).values()]
    else:
        stack = [info.annotation]
        while stack:
            kind = stack.pop()
            if isinstance(kind, type) and issubclass(kind, Args):
                found += _choices(kind) or [kind]
            elif items or get_origin(kind) is not list:
                stack.extend(get_args(kind))
    return list(dict.fromkeys(found))


def _choices(kind: type[Args]) -> list[type[Part]]:
    """Return the registered classes of a part that cannot be built itself, such as MeasureArgs."""
    if not issubclass(kind, Part) or hasattr(kind, "builder"):
        return []
    return [part for of_kind in _parts.values() for part in of_kind.values() if issubclass(part, kind)]


def inner_sections(sections: list[type[Args]], name: str, *, items: bool = False) -> list[type[Args]]:
    """Return the section classes under the key `name` of any of these sections."""
    having = [section for section in sections if name in section.model_fields]
    return [inner for section in having for inner in section_classes(section, name, items=items)]


def sections_at(schema: type[Args], key: Key) -> list[type[Args]]:
    """Return the section classes that a key may name; [] for a plain value or below a free mapping."""
    sections = [schema]
    for name in key:
        sections = inner_sections(sections, str(name))
    return sections


def is_section(schema: type[Args], name: str) -> bool:
    return name in schema.model_fields and bool(section_classes(schema, name))


def all_keys(schema: type[Args], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a schema, including sections."""
    for name in schema.model_fields:
        yield prefix + name
        for section in section_classes(schema, name):
            yield from all_keys(section, f"{prefix}{name}.")


_AUNET = (
    "it belongs to Meta Lingua's apps/aunet, which is not here; choose a model with model.type (own ones: `plugins`)"
)
_OF_AUNET = "dimensions head_dims residuals sliding_windows max_seqlens block lambda_level pooling_type"
_PREPARE = "prepare the sources that way once, and name the new folders in data.sources"
MOVED = {
    "grid": "only `lingua sweep` reads it; start a sweep with this file, or remove it",
    "data.source_filter_functions": f"sources are not filtered while training; {_PREPARE}",
    "data.randomize_rate": f"tokens are not randomised while training; {_PREPARE}",
    "eval.dataset_dir": "use eval.validation.root_dir with eval.validation.sources",
    "eval.tasks": "use eval.harness.tasks",
    "slurm.anaconda": "remove it: jobs run in the environment that submitted them",
    "slurm.script": "use `app` to name the package that runs",
    "slurm.launcher": "remove it: jobs are always submitted to Slurm",
    "slurm.copy_code": "it belongs to the command that launches a run, not to the run",
    "slurm.dirs_exists_ok": "it belongs to the command that launches a run, not to the run",
    "slurm.override": "it belongs to the command that launches a run, not to the run",
    "slurm.config": "it belongs to the command that launches a run, not to the run",
    "slurm.stdout": "remove it: logs are in the run folder's logs/",
    **{f"model.{name}": _AUNET for name in _OF_AUNET.split()},
    "data.regex": _AUNET,
    "model.tie_weights": "use model.weight_tying",
    "model.hf": "use data.tokenizer.name: hf, and checkpoint.init_ckpt_path for the weights",
}
"""Keys of Meta Lingua and its forks that do not exist here, each with what to do instead."""
NO_EFFECT: dict[str, Any] = {
    "distributed.spawn_method": "forkserver",
    "checkpoint.thread_debug": True,
    "logging.acc_freq": None,
    "eval.wipe_ckpt": False,
    "eval.terminal_eval_wandb": False,
    "eval.harness.device": None,
    "model.init_use_depth": False,
    "model.loss_reduction": "mean",
    "model.mask": "causal",
}
"""Keys that are accepted and ignored, each with its old default. Older configs and Meta Lingua's contain them."""


def unknown_key(key: Key, schema: type[Args]) -> str:
    """Return the sentence about a key that the schema does not have, with the nearest one that it has."""
    dotted = dotted_key(key)
    if dotted in MOVED:
        return f"unknown key {dotted}: {MOVED[dotted]}"
    sections: list[type[Args]] = [schema]
    for name, following in itertools.pairwise(key):
        if isinstance(name, str):
            sections = inner_sections(sections, name, items=isinstance(following, int))
    names = [name for section in sections for name in section.model_fields]
    last, prefix = str(key[-1]), dotted_key(key[:-1])
    if owners := [name for name, part in parts(prefix).items() if last in part.model_fields]:
        return f"unknown key {dotted} for this {prefix}.type; it is a key of {prefix}.type {' and '.join(owners)}"
    keys = list(all_keys(schema))
    near = [name for name in keys if name.rpartition(".")[2] == last][:1]
    near = near or [f"{prefix}.{name}" if prefix else name for name in difflib.get_close_matches(last, names, 1)]
    near = near or list(difflib.get_close_matches(dotted, keys, 1))
    hint = f"did you mean {near[0]}?" if near else f"the keys there are {', '.join(sorted(names))}"
    return f"unknown key {dotted}; {hint}"


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# -- documents of a program ---------------------------------------------------------------------------------------


class Document(BaseModel):
    """A JSON document written by a program: strict types; unknown keys are allowed, as a newer version may add some."""

    model_config = ConfigDict(strict=True, extra="allow")


D = TypeVar("D", bound=Document)
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


def judged(form: type[D], value: Any) -> D:
    """Validate a JSON value as a document. Raises ValueError that says what is wrong with it, and where."""
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ValueError(f"{where}: {first['msg']}") from None
