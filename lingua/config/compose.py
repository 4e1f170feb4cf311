"""Turn stacked YAML into validated Args: interpolation, paths, plugins, validation, and one sentence per finding.

All findings are collected before a process group, a device or a folder is touched. Each names file, key, value and
remedy. Imports no torch.

`${other.key}`, `${oc.env:NAME,default}`, `${oc.select:key,default}`, `${mul:2,3}` and `${div_up:7,2}` are resolved;
any other resolver is refused. A leading `~` and every `$NAME` are expanded in keys that hold paths: names that end in
path, dir or folder, and dump_base, stage_to, use_cache.

Relative paths stay as written, relative to the working folder. The Slurm scripts change to BASE_DIR first, and frozen
code runs with that same working folder, so the paths mean the same there.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from lingua.config.base import (
    MOVED,
    NO_EFFECT,
    Args,
    ConfigError,
    Key,
    Written,
    dotted_key,
    plain,
    sections_at,
    show,
    unknown_key,
)
from lingua.config.keys.eval import EvalArgs
from lingua.config.trust import SHIPPED_APPS, check_code
from lingua.config.yaml_layers import (
    COMMAND_LINE,
    DEFAULT,
    Layer,
    Origin,
    Point,
    at,
    has_interpolation,
    leaves,
    scalar,
    stack_layers,
    unescape,
)

# -- interpolation and paths ---------------------------------------------------------------------------------------

_RESOLVERS = ("oc.env", "oc.select", "mul", "div_up")
# What may follow `${`: one of the resolvers, or a plain key. A computed resolver name (`${${a}:...}`) is neither.
_ALLOWED = re.compile(rf"\s*(?:(?:{'|'.join(map(re.escape, _RESOLVERS))})\s*:|[\w.\[\]-]+\s*\}})")
# A default without quotes or anything nested.
_DEFAULT = re.compile(r"(\$\{\s*oc\.(env|select)\s*:[^,${}'\"]*,\s*)([^\s,${}'\"\\]+)(\s*\})")
_PATH_KEY = re.compile(r"(^|_)(path|dir|folder)$|^(dump_base|stage_to|use_cache)$")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def _resolve(layer: Layer, schema: type[Args]) -> tuple[list[tuple[Key, str]], set[Key]]:
    """Replace interpolations by their values in place. Return (findings, interpolated keys)."""
    texts = {key: value for key, value in leaves(layer.tree) if isinstance(value, str) and "${" in value}
    found = _interpolate(layer, schema, {key: value for key, value in texts.items() if has_interpolation(value)})
    for key, value in list(leaves(layer.tree)):  # keys with a finding are gone by now
        if key in texts and value == texts[key] and not has_interpolation(value):
            at(layer.tree, key[:-1])[key[-1]] = unescape(value)
    return found


def _interpolate(
    layer: Layer, schema: type[Args], open_keys: Mapping[Key, str]
) -> tuple[list[tuple[Key, str]], set[Key]]:
    findings = []
    for key, value in open_keys.items():
        if any(not _ALLOWED.match(rest) for rest in value.split("${")[1:]):
            what = f"{dotted_key(key)} is {show(value)}; only ${{key}} and {', '.join(_RESOLVERS)} are resolved"
            findings.append((key, f"{what}; write the value itself, or \\${{ for text"))
    if not open_keys or findings:  # resolve nothing if an interpolation is not allowed
        for key, _ in findings:
            _leave_out(layer.tree, key)
        return findings, set()

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    add_resolver = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    add_resolver("mul", lambda a, b: _number(a) * _number(b), replace=True)
    add_resolver("div_up", lambda a, b: -(-_number(a) // _number(b)), replace=True)
    for key, value in open_keys.items():
        at(layer.tree, key[:-1])[key[-1]] = _DEFAULT.sub(_quote_default, value)
    whole = Layer(schema().model_dump(mode="json")) if _has_defaults(schema) else Layer()
    whole.merge(Layer(layer.tree))
    try:
        config = OmegaConf.create(whole.tree, flags={"allow_objects": True})  # for WrittenInt and WrittenFloat
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key} cannot be resolved: {reason}; fix it, or write \\${{ for text") from error
    values: dict[Key, Any] = {}
    for key in open_keys:
        try:
            value = at(config, key)
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            raw, reason = open_keys[key], str(error).splitlines()[0]
            if unset := re.search("Environment variable '(.*)' not found", reason):
                reason = f"the environment has no {unset[1]}; set it, or write ${{oc.env:{unset[1]},default}}"
            else:
                reason += "; fix it, or write \\${ for text"
            findings.append((key, f"{dotted_key(key)} is {show(raw)}, which cannot be resolved: {reason}"))
    for key, value in values.items():
        at(layer.tree, key[:-1])[key[-1]] = value
    for key, _ in findings:
        _leave_out(layer.tree, key)
    return findings, set(open_keys)


def _quote_default(found: re.Match[str]) -> str:
    """Quote a resolver's default whose spelling OmegaConf would lose: 1.10, 1_000, `true` as text."""
    begin, resolver, default, end = found.groups()
    value = scalar(default)
    is_kept = value is None or (str(plain(value)) == default and isinstance(value, Written))
    is_kept = is_kept or (isinstance(value, bool) and resolver == "select")
    return found[0] if is_kept else f"{begin}'{default}'{end}"


def _number(value: Any) -> Any:
    """Return a resolver's argument as a number; arguments from the environment are text."""
    number = scalar(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{show(value)} is not a number")
    return plain(number)


def _has_defaults(schema: type[Args]) -> bool:
    return not any(info.is_required() for info in schema.model_fields.values())


def _expand_paths(layer: Layer) -> list[tuple[Key, str]]:
    """Expand `~` and `$NAME` in keys that hold paths, in place."""
    findings = []
    for key, value in list(leaves(layer.tree)):
        names = [name for name in key if isinstance(name, str)]
        if not isinstance(value, str) or not names or not _PATH_KEY.search(names[-1]):
            continue
        missing = [a or b for a, b in _VARIABLE.findall(value) if (a or b) not in os.environ]
        if missing:
            what = f"{dotted_key(key)} is {show(value)}, and the environment has no {missing[0]}"
            findings.append((key, f"{what}; set it, or write ${{oc.env:{missing[0]},default}}"))
        elif value.startswith("~") or "$" in value:
            expanded = os.path.expanduser(os.path.expandvars(value))
            at(layer.tree, key[:-1])[key[-1]] = expanded
            if _VARIABLE.search(expanded):  # the frozen config would expand it again
                what = f"{dotted_key(key)} is {show(value)}, that is {expanded}, which contains a variable again"
                findings.append((key, f"{what}; write the folder itself"))
    return findings


def code_named(tree: Mapping[str, Any], marks: Mapping[Key, Origin] | None = None) -> dict[str, list[str]]:
    """Return the modules and files of code that a config names, by key, without those named on the command line."""
    code: dict[str, list[str]] = {}
    for key, name in _code(tree):
        origins = [marks[key[:n]] for n in range(len(key), 0, -1) if marks and key[:n] in marks]
        if origins[:1] != [COMMAND_LINE]:
            code.setdefault(dotted_key(tuple(part for part in key if isinstance(part, str))), []).append(str(name))
    return code


def _code(tree: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    if tree.get("app") not in (None, *SHIPPED_APPS):
        yield ("app",), tree["app"]
    for outer, section in ((), tree), (("eval",), tree.get("eval")):
        for key, value in leaves(section) if isinstance(section, dict) else ():
            names = [part for part in key if isinstance(part, str)]
            is_code = names[0] == "plugins" or (names[0] in ("harness", "measures") and _is_harness_code(names, value))
            if value and is_code:
                yield (*outer, *key), value
    launcher = tree.get("launcher")
    for key, value in leaves(launcher) if isinstance(launcher, dict) else ():
        if value and key[0] in ("setup", "directives"):
            yield ("launcher", *key), value
        elif value and key[:2] == ("env", "set"):  # LD_PRELOAD, say; the value may be a secret
            yield ("launcher", *key), key[-1]


def _is_harness_code(names: list[str], value: Any) -> bool:
    """Return whether harness would run code: task files may use `!function`, caches are pickles, metrics scripts."""
    if names[-1] in ("metric", "tasks", "task", "group") and isinstance(value, str):
        return "/" in value or value.endswith((".yaml", ".yml")) or Path(value).exists()
    return names[-1] in ("include_path", "use_cache", "hf_evaluate")


def _import_plugins(layer: Layer, configs: list[Path]) -> list[tuple[Key, str]]:
    """Import the modules named in `plugins`, also from the working folder. Raises ConfigError if they are not trusted.

    `configs`: the files that were named.
    """
    code = code_named(layer.tree, layer.marks)  # `choose_app` checks the app, `lingua launch` what its job runs
    check_code(configs, {key: names for key, names in code.items() if not key.startswith(("app", "launcher."))})
    findings, of_eval = [], layer.tree.get("eval")
    named: list[tuple[Key, Any]] = [(("plugins",), layer.tree.get("plugins"))]
    named += [(("eval", "plugins"), of_eval.get("plugins"))] if isinstance(of_eval, dict) else []
    for key, plugins in named:
        if isinstance(plugins, list):
            see_working_folder()
            for index, name in enumerate(plugins):
                try:
                    importlib.import_module(name)
                except Exception as error:  # a user's module may raise anything
                    what = f"{dotted_key(key)} names {show(name)}, which cannot be imported from {Path.cwd()}"
                    findings.append(((*key, index), f"{what}: {type(error).__name__}: {error}; fix it or remove it"))
    return findings


def see_working_folder() -> None:
    """Make modules in the working folder importable, including an `apps/mine` beside installed apps.

    It comes last: a file there (beside weights, say) must not shadow a package of that name.
    """
    here = os.getcwd()
    if not {"", here} & set(sys.path):
        sys.path.append(here)
    apps = sys.modules.get("apps")
    if apps is not None and os.path.join(here, "apps") not in apps.__path__:
        apps.__path__.append(os.path.join(here, "apps"))


# -- validating ----------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "keys with values",
    "model_type": "a section (keys with values)",
    "model_attributes_type": "a section (keys with values)",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
}
_OLD_BOOLS = {"yes": True, "on": True, "no": False, "off": False}
"""Spellings of true and false in YAML 1.1."""
_SCALARS = {"int_type": int, "float_type": (int, float), "bool_type": bool}


def _real_key(error: Mapping[str, Any], tree: Any) -> tuple[Key, bool]:
    """Return pydantic's location without the names of union members, and whether there were any."""
    loc, key = error["loc"], []
    for depth, name in enumerate(loc, 1):
        if isinstance(tree, dict) and (name in tree or (error["type"] == "missing" and depth == len(loc))):
            key.append(name)
            tree = tree.get(name)
        elif isinstance(tree, list) and isinstance(name, int) and name < len(tree):
            key.append(name)
            tree = tree[name]
    return tuple(key), len(key) < len(loc)


def sentences(error: ValidationError, tree: Any, schema: type[Args]) -> list[tuple[Key, str]]:
    """Return one finding per key. For a union, report the member whose validation got furthest."""
    listed = [(*_real_key(item, tree), item) for item in error.errors(include_url=False)]
    findings: dict[Key, str] = {}
    for key, of_union, item in listed:
        inside = [other for other, _, _ in listed if other[: len(key)] == key and other != key]
        if of_union and inside:
            continue
        if key in findings and item["type"] in _EXPECTED:
            findings[key] += " or " + _expected(item)
        elif key not in findings:
            findings[key] = _sentence(item, key, schema)
    return list(findings.items())


def _first_key(key: Key, schema: type[Args]) -> str | None:
    """Return the first key of the section that `key` names, or None if it is not a section."""
    return next((name for section in sections_at(schema, key) for name in section.model_fields), None)


def _expected(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    return _EXPECTED[kind].format(**error.get("ctx", {})) if kind in _EXPECTED else str(error["msg"]).lower()


def _sentence(error: Mapping[str, Any], key: Key, schema: type[Args]) -> str:
    kind, value, dotted = error["type"], error["input"], dotted_key(key) or "the config"
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(key, schema)
    if kind == "missing":
        return f"{dotted} is missing; set it"
    if kind == "value_error":
        return f"{dotted}: {context['error']}"
    if kind == "unknown_part":
        return f"{dotted}.type: {error['msg']}"
    remedy = ""
    if kind in ("model_type", "model_attributes_type") and (inner := _first_key(key, schema)):
        return f"{dotted} is {show(value)}; it is a section: set its keys, such as {dotted}.{inner}=..."
    if isinstance(value, float) and value.is_integer() and kind in ("int_type", "int_from_float"):
        remedy = f" (write {int(value)})"
    elif kind in _SCALARS and isinstance(value, str) and isinstance(scalar(value), _SCALARS[kind]):
        remedy = " (write it without quotes)"
    elif kind == "bool_type" and isinstance(value, str) and value.lower() in _OLD_BOOLS:
        remedy = f" (write {show(_OLD_BOOLS[value.lower()])})"
    elif kind == "string_type" and isinstance(value, bool | int | float):
        remedy = " (put it in quotes)"
    elif value is None:
        remedy = " (remove the key to get its default)"
    return f"{dotted} is {show(value)}{remedy}; it must be {_expected(error)}"


ArgsType = TypeVar("ArgsType", bound=Args)


@dataclass
class Composed(Generic[ArgsType]):
    """A validated config and the origin of its values."""

    args: ArgsType
    marks: dict[Key, Origin]
    ignored: list[str] = field(default_factory=list)
    """Keys that are set but have no effect."""
    configs: list[Path] = field(default_factory=list)
    """The files named on the command line."""

    def origins(self) -> dict[str, str]:
        """Return the origin of each leaf key's value, for `config.origin.yaml`."""
        dumped = self.args.model_dump(mode="json")
        return {dotted_key(key): str(self.marks.get(key, DEFAULT)) for key, _ in leaves(dumped)}

    def complaint(self, dotted: str, text: str) -> str:
        """Return a finding about a key, preceded by the origin of its value."""
        return _complaint(self.marks, tuple(dotted.split(".")), text)


def _complaint(marks: Mapping[Key, Origin], key: Key, text: str) -> str:
    inside = [origin for mark, origin in marks.items() if mark[: len(key)] == key]
    origin = _refused(marks, key, text) or marks.get(key) or (inside or [DEFAULT])[0]
    return text if origin == DEFAULT else f"{origin}: {text}"


def _refused(marks: Mapping[Key, Origin], key: Key, text: str) -> Origin | None:
    """Return the origin of a finding about a whole section (`data: skip_rows ...`), or None for another finding.

    Blame the last place, file or command line, and there the first key that the text names.
    """
    section = dotted_key(key) or "the config"
    if re.match(rf"{re.escape(section)}(\.\w+)?: ", text) is None:
        return None
    words = re.findall(r"\w+(?:\.\w+)*", text.removeprefix(section))
    named = [mark for word in words if (mark := (*key, *word.split("."))) in marks]
    inside = [mark for mark in marks if (mark in named if named else mark[: len(key)] == key)]  # as they were merged
    last = marks[inside[-1]].place if inside else ""
    return next((marks[mark] for mark in (*named, *inside) if marks[mark].place == last), None)


@dataclass
class Examined(Generic[ArgsType]):
    """A config and everything that is wrong with it."""

    composed: Composed[ArgsType] | None
    """The config with defaults in place of wrong values, or None if that is impossible."""
    complaints: list[str]
    bad_keys: list[str]
    """Keys and sections whose wrong value was dropped. Unknown keys are not included."""


def examine(
    config: str | None,
    overlays: list[str],
    overrides: list[str],
    schema: type[ArgsType],
    point: Point | None = None,
) -> Examined[ArgsType]:
    """Compose and validate, collecting complaints. Raises ConfigError only if there is nothing to validate."""
    layer = stack_layers(config, overlays, overrides, schema, point)
    named = [path for path in (Path(name).expanduser() for name in [config, *overlays] if name) if path.is_file()]
    _drop_inert(layer)
    ignored = _drop_ignored(layer, schema)
    findings, interpolated = _resolve(layer, schema)
    findings += _expand_paths(layer) + _import_plugins(layer, named)
    args, more = _validate(layer.tree, schema, interpolated)
    findings += [finding for finding in more if finding[0] not in {key for key, _ in findings}]
    complaints = [_complaint(layer.marks, key, text) for key, text in findings]
    composed = None if args is None else Composed(args, layer.marks, ignored, named)
    bad_keys = [dotted_key(key) for key, text in findings if not text.startswith("unknown key ")]
    return Examined(composed, complaints, bad_keys)


def _drop_inert(layer: Layer) -> None:
    """Drop removed keys whose value is empty. Configs frozen by Meta Lingua's forks contain them."""
    for dotted in MOVED:
        outer, _, name = dotted.partition(".")
        section = layer.tree.get(outer)
        if isinstance(section, dict) and name in section and not section[name]:
            layer.forget((outer, name))
            del section[name]


def ignored_keys(schema: type[Args]) -> dict[Key, Any]:
    """Return the keys of a schema that have no effect, each with its old default."""
    keys = {tuple(dotted.split(".")): default for dotted, default in NO_EFFECT.items()}
    if issubclass(schema, EvalArgs):  # the config is a section `eval` alone
        return {key[1:]: default for key, default in keys.items() if key[0] == "eval"}
    return {key: default for key, default in keys.items() if key[0] in schema.model_fields}


def _drop_ignored(layer: Layer, schema: type[Args]) -> list[str]:
    """Drop the keys that have no effect; return those whose value differs from the old default."""
    asked = []
    for key, default in ignored_keys(schema).items():
        section: Any = layer.tree
        for name in key[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and key[-1] in section:
            if section.pop(key[-1]) != default:
                asked.append(dotted_key(key))
            else:
                layer.forget(key)
    return asked


def compose(
    config: str | None, overlays: list[str], overrides: list[str], schema: type[ArgsType]
) -> Composed[ArgsType]:
    """Return the validated config. Raises ConfigError with everything that is wrong with it."""
    examined = examine(config, overlays, overrides, schema)
    if examined.complaints or examined.composed is None:
        raise ConfigError(examined.complaints)
    return examined.composed


def _validate(
    tree: dict[str, Any], schema: type[ArgsType], interpolated: set[Key]
) -> tuple[ArgsType | None, list[tuple[Key, str]]]:
    """Return (args, findings). Wrong values are dropped and the rest is validated again, so later checks see it."""
    findings: list[tuple[Key, str]] = []
    for _ in range(4):
        try:
            args = schema.model_validate(tree)
            found = _too_large(args)
            if not found:
                return args, findings
        except ValidationError as error:
            if _read_environment_numbers(error, tree, interpolated):
                continue
            found = sentences(error, tree, schema)
        findings += [finding for finding in found if finding[0] not in {key for key, _ in findings}]
        for key, _ in found:
            _leave_out(tree, key)
    return None, findings


def _too_large(args: Args) -> list[tuple[Key, str]]:
    """Find whole numbers that neither torch nor JSON can hold. A validator of each field would cost every start."""
    found: dict[int, Key] = {}  # the first key of each: others take it over, as data.seed does
    for key, value in leaves(args.model_dump()):
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            found.setdefault(value, key)
    largest = f"{(1 << 63) - 1} is the largest whole number"
    return [(key, f"{dotted_key(key)}: {value} has more than 64 bits; {largest}") for value, key in found.items()]


def _read_environment_numbers(error: ValidationError, tree: Any, interpolated: set[Key]) -> bool:
    """Parse text from the environment as YAML where a number or boolean is expected."""
    mended = False
    for item in error.errors(include_url=False):
        key, _ = _real_key(item, tree)
        if item["type"] in _SCALARS and key in interpolated and isinstance(item["input"], str):
            value = scalar(item["input"])
            mended |= not isinstance(value, str)
            at(tree, key[:-1])[key[-1]] = value
    return mended


def _leave_out(tree: Any, key: Key) -> None:
    if not key or not isinstance(key[-1], str):
        key = key[:-1]  # for a list item, drop the whole list
    while key and not isinstance(key[-1], str):
        key = key[:-1]
    if key:
        try:
            at(tree, key[:-1]).pop(key[-1], None)
        except (KeyError, IndexError, TypeError, AttributeError):
            return
