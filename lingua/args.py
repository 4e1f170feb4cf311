"""Config mechanics: compose YAML files, override keys, validate, and say where every value came from.

Promise: whatever is wrong with a config is found here, all of it at once, before a process group, a device or a
folder is touched; each finding names file, key, value and remedy. Nothing in a config is ever executed.
Cost: no torch; pydantic and OmegaConf import in about 0.3 s.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, WrapValidator
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """Something in a config that its author can mend. `problems` are complete sentences, one finding each."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Args(BaseModel):
    """Base of every config section: strict types, no unknown keys, values checked again on assignment."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, validate_default=True)


def _number_to_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# YAML reads `name: 7` as a number; where text is meant, the number's spelling is what the author wrote.
Text = Annotated[str, BeforeValidator(_number_to_text)]


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
