"""Describe a schema: a JSON schema for completion in editors, and a Markdown page of all keys.

Meanings are the docstrings under the fields in the source, so they cannot drift from the code.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_origin

from pydantic.json_schema import models_json_schema

from lingua.config.base import Args, ConfigError, Part, part_kinds, parts, section_classes
from lingua.config.keys.sources import SourceArgs


@cache
def field_docs(section: type[Args]) -> Mapping[str, str]:
    """Return the docstring under each field of a class and of its bases."""
    docs: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if not (issubclass(cls, Args) and cls is not Args):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                value = text.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    docs[field.target.id] = inspect.cleandoc(value.value)
    return docs


def all_sections(schema: type[Args]) -> list[type[Args]]:
    """Return the schema and every section in it once, including the alternatives of parts."""
    found: dict[type[Args], None] = {}
    waiting = [schema]
    while waiting:
        section = waiting.pop(0)
        if section not in found:
            found[section] = None
            for name in section.model_fields:
                waiting += section_classes(section, name, items=True)
    return list(found)


def json_schema(schema: type[Args]) -> dict[str, Any]:
    """Return the JSON schema of a config file. A section with a `type` accepts any registered class."""
    sections = all_sections(schema)
    references, whole = models_json_schema([(section, "validation") for section in sections])
    definitions = whole["$defs"]
    names = {section: references[section, "validation"]["$ref"].rpartition("/")[2] for section in sections}
    for section in sections:
        properties = definitions[names[section]].get("properties", {})
        for key, text in field_docs(section).items():
            if key in properties:
                properties[key]["description"] = text
        for key, info in section.model_fields.items():
            parts = [part for part in section_classes(section, key, items=True) if issubclass(part, Part)]
            chosen: dict[str, Any] = {"anyOf": [{"$ref": f"#/$defs/{names[part]}"} for part in parts]}
            chosen["description"] = f"Chosen by its key `type`. {_about(section)}"
            lists = [way for way in (properties[key], *properties[key].get("anyOf", ())) if way.get("type") == "array"]
            if lists and parts:
                lists[0]["items"] = chosen
            elif isinstance(info.default, Part) and len(get_args(info.annotation)) < 2:
                properties[key] = chosen
    main = definitions.pop(names[schema])
    main["properties"]["base"] = {
        "description": "Files and group picks that this file builds on, left to right.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    main["properties"]["grid"] = {
        "description": "For `lingua sweep`: lists of values by key; `paired` holds those that go together.",
        "type": "object",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **main, "$defs": definitions}


def components(schema: type[Args], kind: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {kind: {type: {about, keys: {key: type, default and meaning}}}} of all parts, a schema's own included."""
    own: dict[str, type[Part]] = {"source": SourceArgs}
    own |= {name: type(info.default) for name, info in schema.model_fields.items() if isinstance(info.default, Part)}
    if kind not in (None, *part_kinds()):
        raise ConfigError(f"there are no components of kind {kind}; choose one of {', '.join(part_kinds())}")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in part_kinds() if kind is None else [kind]:
        defaults = {own[name].model_fields["type"].default: own[name]} if name in own else {}
        for type_name, part in sorted((defaults | parts(name)).items()):
            docs, keys = field_docs(part), {}
            for key, info in part.model_fields.items():
                default = "required" if info.is_required() else f"default {info.default!r}"
                meaning = " ".join(docs.get(key, "").split())
                keys[key] = f"{_type(info).replace('`', '')}, {default}" + (f". {meaning}" if meaning else "")
            keys.pop("type", None)
            found.setdefault(name, {})[type_name] = {"about": _about(part), "keys": keys}
    return found


def reference_page(schema: type[Args]) -> str:
    """Return a Markdown page of all keys: type, default, meaning with unit."""
    lines = ["# Configuration keys", "", "Made by `lingua schema --reference`.", ""]
    for title, section in _titled(schema, ""):
        docs = field_docs(section)
        lines += [
            f"## {title}",
            "",
            _about(section),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for name, info in section.model_fields.items():
            inner = section_classes(section, name, items=True)
            default = "required" if info.is_required() else "see its section" if inner else f"`{info.default!r}`"
            meaning = docs.get(name) or " ".join(_about(part) for part in inner[:1])
            lines.append("| " + " | ".join(_cell(x) for x in (f"`{name}`", _type(info), default, meaning)) + " |")
        lines.append("")
    return "\n".join(lines)


def _titled(schema: type[Args], prefix: str) -> Iterator[tuple[str, type[Args]]]:
    yield prefix.rstrip(".") or "The run", schema
    for name in schema.model_fields:
        for section in section_classes(schema, name, items=True):
            chosen = f" (type: {section.model_fields['type'].default})" if issubclass(section, Part) else ""
            for title, inner in _titled(section, f"{prefix}{name}."):
                yield (title + chosen if inner is section else title), inner


def _about(section: type[Args]) -> str:
    return " ".join((section.__doc__ or "").partition("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _type(info: Any) -> str:
    limits = ", ".join(
        f"{sign} {getattr(item, name)}"
        for item in info.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(item, name, None) is not None
    )
    return _type_name(info.annotation) + (f" ({limits})" if limits else "")


def _type_name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    inner, origin = get_args(kind), get_origin(kind)
    if hasattr(kind, "__metadata__"):
        return _type_name(inner[0])
    if origin in (list, dict):
        return f"{origin.__name__} of {', '.join(map(_type_name, inner))}"
    if (inner and isinstance(inner[0], type | None.__class__)) or (inner and any(get_origin(i) for i in inner)):
        return " or ".join(map(_type_name, inner))
    if inner:  # a Literal
        return ", ".join(f"`{value}`" if isinstance(value, str) else str(value) for value in inner)
    return getattr(kind, "__name__", str(kind))
