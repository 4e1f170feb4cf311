"""Stack YAML files, overlays and overrides into one tree that records the origin of every value.

A missing file, broken YAML, a repeated key or a circular `base` raises one ConfigError with file and line.

Layers of a config, weakest first:

    defaults of the Args classes
    `base: [common.yaml, model/llama_7B]`   left to right; a file's own keys come after its bases
    the config file                         its own keys
    +overlay.yaml, +debug, +group=name      in command-line order
    a.b.c=value                             in command-line order

Sections merge key by key; anything else, including lists, is replaced as a whole. Weight 0 turns off a data source
that a base defines. An entry of `base` that ends in .yaml is a file, relative to the file that names it. Any other is
a group pick: `model/llama_7B` (or `model=llama_7B`) is `configs/model/llama_7B.yaml`, whose keys go into the section
`model`, or to the top level if no section has the group's name. `model=llama_7B` on the command line replaces the
config's own pick of that group, or its whole section `model` if it has none. Groups and overlays are looked up in the
folders of the config first, then in the app's configs/. `+experiments=[a,b]` stacks several files of one group.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from lingua.config.base import (
    Args,
    ConfigError,
    Key,
    Part,
    Written,
    WrittenFloat,
    WrittenInt,
    as_parts,
    inner_sections,
    is_section,
    plain,
    sections_at,
    show,
)
from lingua.files import read_bytes

GRID = "grid"
"""Block of a config that only `lingua sweep` reads."""
_MAX_VALUES = 100_000
"""Maximum values of one file, aliases expanded. A larger file is an alias bomb, not a config."""

# -- reading YAML with the line of every key -----------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a value came from: a file and line, the command line, or the default."""

    place: str
    line: int | None = None

    def __str__(self) -> str:
        return self.place if self.line is None else f"{self.place}:{self.line}"


COMMAND_LINE = Origin("command line")
DEFAULT = Origin("default")
Point = Mapping[str, tuple[Any, Origin]]
"""A point of a sweep: values by dotted key, each with its origin."""


_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+\Z|0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
CORE_SCHEMA = (
    (f"{_TAG}int", _INT, "-+0123456789"),
    (f"{_TAG}float", _FLOAT, "-+.0123456789"),
    (f"{_TAG}bool", _BOOL, "tTfF"),
    (f"{_TAG}null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    (f"{_TAG}merge", re.compile(r"<<\Z"), "<"),  # not in YAML 1.2, but anchors need it
)
"""Scalars that are not text in YAML 1.2's core schema: (tag, pattern, first characters). Unlike PyYAML's YAML 1.1,
0123, 1:30, 1_000, yes, no and dates are text, and 1e-4 is a number."""


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 without tags that build objects. Keys are text; numbers remember their spelling."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (f"{_TAG}null", f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map", None)
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            glued = isinstance(key, yaml.ScalarNode) and key.style is None and ":" in key.value
            if glued and node.flow_style and isinstance(value, yaml.ScalarNode) and not value.value:
                name, _, text = key.value.partition(":")
                remedy = f"write a space after the colon: {name}: {text}"
                raise ConstructorError(None, None, f"{key.value} is a key without a value; {remedy}", key.start_mark)
        self.flatten_mapping(node)
        node.value = [(_as_text(key), value) for key, value in node.value]
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> WrittenInt | WrittenFloat:
        text = self.construct_scalar(node)
        if node.tag == f"{_TAG}float" and _FLOAT.match(text):
            return WrittenFloat(float(re.sub(r"\.(?=[a-z])", "", text.lower())), text)
        if not _INT.match(text):
            raise ConstructorError(None, None, f"{text!r} is not a number", node.start_mark)
        try:
            return WrittenInt(int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)), text)
        except ValueError as error:  # thousands of digits
            raise ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark) from error

    def truth(self, node: yaml.ScalarNode) -> bool:
        text = self.construct_scalar(node)
        if not _BOOL.match(text):
            raise ConstructorError(None, None, f"{text!r} is neither true nor false", node.start_mark)
        return text.lower() == "true"


def _as_text(key: yaml.Node) -> yaml.Node:
    """Read a mapping's key as text, even if it looks like a number, true or null."""
    return yaml.ScalarNode(f"{_TAG}str", key.value, key.start_mark) if isinstance(key, yaml.ScalarNode) else key


for _tag, _pattern, _first in CORE_SCHEMA:
    _YamlLoader.add_implicit_resolver(_tag, _pattern, list(_first))
_YamlLoader.add_constructor(f"{_TAG}int", _YamlLoader.number)
_YamlLoader.add_constructor(f"{_TAG}float", _YamlLoader.number)
_YamlLoader.add_constructor(f"{_TAG}bool", _YamlLoader.truth)
_YamlLoader.add_constructor(f"{_TAG}merge", _YamlLoader.construct_yaml_str)  # where it is a value


@dataclass
class Layer:
    """A tree of values, with the origin of each key."""

    tree: dict[str, Any] = field(default_factory=dict)
    marks: dict[Key, Origin] = field(default_factory=dict)

    def under(self, section: str) -> Layer:
        marks = {(section, *key): origin for key, origin in self.marks.items()}
        return Layer({section: self.tree}, marks)

    def merge(self, other: Layer) -> None:
        """Merge `other` into this layer: sections merge key by key, anything else is replaced."""
        self._merge(self.tree, other.tree, (), other.marks)

    def _merge(self, tree: dict[str, Any], over: dict[str, Any], path: Key, marks: Mapping[Key, Origin]) -> None:
        for name, value in over.items():
            key = (*path, name)
            if isinstance(value, dict) and isinstance(tree.get(name), dict):
                self._merge(tree[name], value, key, marks)
            else:
                self.forget(key)
                tree[name] = value
                self.marks.update({mark: origin for mark, origin in marks.items() if mark[: len(key)] == key})

    def forget(self, key: Key) -> None:
        self.marks = {mark: origin for mark, origin in self.marks.items() if mark[: len(key)] != key}


def read_yaml(path: Path, text: str | None = None) -> Layer:
    """Read a YAML file. Raises ConfigError with the line of a syntax error, repeated key or object-building tag."""
    try:
        loader = _YamlLoader(read_bytes(path).decode() if text is None else text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path}: is empty; write `key: value` lines, or leave it out")
        if (expanded := _n_values(node)) > _MAX_VALUES:
            raise ConfigError(f"{path}: its aliases expand to {expanded} values, more than {_MAX_VALUES}; write fewer")
        marks = dict(_marks(node, str(path)))
        tree = _unshared(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        reason = " ".join(filter(None, [error.context, error.problem]))
        raise ConfigError(f"{path}:{line}: not valid YAML: {reason}; fix that line") from error
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ConfigError(f"{path}: not a text file in UTF-8, {at}; name a YAML file, or save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path}: not valid YAML: {reason}; write `key: value` lines") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: contains {show(tree)} instead of keys with values; write `key: value` lines")
    return Layer(as_parts(tree, marks), marks)


def read_leniently(path: Path) -> dict[str, Any]:
    """Read a YAML file, in C since there may be hundreds of runs; {} if it is missing or damaged."""
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_bytes())
        node = loader.get_single_node()
        tree = None if node is None or _n_values(node) > _MAX_VALUES else loader.construct_document(node)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _n_values(node: yaml.Node, sizes: dict[int, int] | None = None) -> int:
    """Return the number of values that a document has once every alias is expanded."""
    sizes = {} if sizes is None else sizes
    if id(node) not in sizes:
        sizes[id(node)] = _MAX_VALUES + 1  # found by an alias to its own parent
        children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        inner = [] if isinstance(node, yaml.ScalarNode) else children
        sizes[id(node)] = 1 + sum(_n_values(child, sizes) for child in inner)
    return sizes[id(node)]


def _unshared(tree: Any) -> Any:
    """Copy a tree, so that setting a key below one alias does not set it below the others."""
    if isinstance(tree, dict):
        return {name: _unshared(value) for name, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def _merged(value: yaml.Node) -> list[yaml.Node]:
    """Return the mappings that a merge key `<<` takes in, weakest first."""
    return list(reversed(value.value)) if isinstance(value, yaml.SequenceNode) else [value]


def _marks(node: yaml.Node | None, place: str, path: Key = ()) -> Iterator[tuple[Key, Origin]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        own = [(name, value) for name, value in node.value if name.tag != f"{_TAG}merge"]
        for _, value in [item for item in node.value if item not in own]:
            for mapping in _merged(value):
                yield from _marks(mapping, place, path)
        for name, value in own:
            line = name.start_mark.line + 1
            if name.value in seen:
                raise ConfigError(f"{place}:{line}: key {name.value} is repeated; keep one of the two")
            seen.add(name.value)
            yield (*path, name.value), Origin(place, line)
            yield from _marks(value, place, (*path, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), Origin(place, value.start_mark.line + 1)
            yield from _marks(value, place, (*path, index))


def yaml_value(text: str) -> Any:
    """Parse a value as a YAML file would. Unquoted text stays as it is, including line breaks."""
    value = yaml.load(text, Loader=_YamlLoader)
    if isinstance(value, Written):
        return type(value)(plain(value), text)  # as typed, comment included, in case the key holds text
    return text if isinstance(value, str) and text[:1] not in ("'", '"', "|", ">") else value


def scalar(text: str) -> Any:
    try:
        return yaml_value(text)
    except yaml.YAMLError:
        return text


_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")


def has_interpolation(text: str) -> bool:
    """Return whether OmegaConf would interpolate: the text has an unescaped `${`."""
    return _INTERPOLATION.search(text) is not None


def escape(text: str) -> str:
    """Escape every `${`, so that OmegaConf interpolates nothing."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def unescape(text: str) -> str:
    """Undo `escape`. Text with an interpolation is returned unchanged."""
    if has_interpolation(text):
        return text
    return re.sub(r"(\\*)\\\$\{", lambda found: found[1][: len(found[1]) // 2] + "${", text)


def leaves(tree: Any, path: Key = ()) -> Iterator[tuple[Key, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if (not items and path) or not isinstance(tree, dict | list):
        yield path, tree
    for name, value in items:
        yield from leaves(value, (*path, name))


def at(tree: Any, key: Key) -> Any:
    for name in key:
        tree = tree[name]
    return tree


# -- composing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Composer:
    """Find and stack the files of one config."""

    schema: type[Args]
    folders: list[Path]
    """Where groups and overlays of the command line are looked up; the app's own configs/ comes last."""
    picks: dict[str, tuple[str, Origin]]
    """Group picks of the command line or of a sweep point."""
    used: set[str] = field(default_factory=set)
    """Groups whose pick replaced one of a base."""
    of_bases: list[Path] = field(default_factory=list)
    """Folders of the files loaded as bases; their overlays are found too."""

    def load(self, path: Path, stack: tuple[Path, ...] = ()) -> Layer:
        """Load a file on top of its bases."""
        if path.resolve() in stack:
            raise ConfigError(f"{path}: is its own base ({' -> '.join(map(str, stack))}); remove it from `base`")
        own = read_yaml(path)
        bases = own.tree.pop("base", None) or []
        where = own.marks.get(("base",), Origin(str(path)))
        if isinstance(bases, str):
            bases = [bases]
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError(f"{where}: base is {show(bases)}; write a list of files and group picks")
        layer = Layer()
        for base in bases:
            layer.merge(self._base(base, path, where, (*stack, path.resolve())))
        own.forget(("base",))
        layer.merge(own)
        return layer

    def _base(self, base: str, named_in: Path, where: Origin, stack: tuple[Path, ...]) -> Layer:
        if base.endswith((".yaml", ".yml")):
            path = named_in.parent / Path(base).expanduser()
            if not path.is_file():
                raise ConfigError(f"{where}: base file {path} does not exist{_near_files(path)}")
            self.of_bases.extend(_config_folders(path))
            return self.load(path, stack)
        group, _, name = base.replace("=", "/", 1).partition("/")
        if group in self.picks:
            self.used.add(group)
            name, where = self.picks[group]
        return self.pick(group, name, where, [*_config_folders(named_in), self.folders[-1]], stack)

    def pick(self, group: str, name: str, where: Origin, folders: list[Path], stack: tuple[Path, ...] = ()) -> Layer:
        """Load the group file `<folder>/<group>/<name>.yaml` into the section named like the group."""
        for folder in folders:
            path = _as_typed(folder / group / f"{name}.yaml")
            if path.is_file():
                layer = self.load(path, stack)
                return layer.under(group) if is_section(self.schema, group) else layer
        there = sorted({file.stem for folder in folders for file in (folder / group).glob("[!.]*.yaml")})
        near = difflib.get_close_matches(name, there, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = f"there are {', '.join(there)}" if there else f"{folders[-1] / group} has none"
        raise ConfigError(f"{where}: no config {group}/{name}: {known}{hint or '; choose one of these'}")

    def overlay(self, word: str) -> Layer:
        """Load what follows a `+`: a file, a name in overlays/, `group=name` or `group=[name, name]`."""
        path, folders = Path(word).expanduser(), [*self.folders, *self.of_bases]
        if path.suffix in (".yaml", ".yml") or path.is_file():
            _must_exist(path, "overlay", *(folder / "overlays" for folder in folders))
            return self.load(path)
        group, _, names = word.rpartition("=")
        value = yaml_value(names)
        layer = Layer()
        for name in value if isinstance(value, list) else [names]:
            layer.merge(self.pick(group or "overlays", str(name), COMMAND_LINE, folders))
        return layer


def _as_typed(path: Path) -> Path:
    """Return the path relative to the working folder if it is inside it, as people type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _config_folders(path: Path) -> list[Path]:
    """Return the folders searched for a file's group picks: its own, and its parents up to one named configs."""
    parents = list(path.resolve().parents[:4])
    named = [folder.name for folder in parents]
    return parents[: named.index("configs") + 1] if "configs" in named else parents[:1]


def _must_exist(path: Path, what: str, *more_folders: Path) -> None:
    if path.is_dir():
        own, near = path / "config.yaml", f"name a YAML file in it{_near_files(path / '_', *more_folders)}"
        raise ConfigError(f"{what} {path} is a folder; {f'{own} goes on with its run' if own.is_file() else near}")
    if not path.is_file():
        raise ConfigError(f"{what} {path} does not exist in {Path.cwd()}{_near_files(path, *more_folders)}")


def _near_files(path: Path, *more_folders: Path) -> str:
    files = {file.stem: file for folder in (*more_folders, path.parent) for file in folder.glob("[!.]*.y*ml")}
    names = difflib.get_close_matches(path.stem, files, 3, 0.5)
    return (
        f"; did you mean {' or '.join(str(_as_typed(files[name])) for name in names)}?" if names else "; check the path"
    )


def _parse(word: str) -> tuple[str, Any]:
    """Split `a.b.c=value` into key and parsed value."""
    dotted, _, text = word.partition("=")
    try:
        return dotted, as_parts(yaml_value(text), {})
    except yaml.YAMLError as error:
        reason = f": {error.problem}" if isinstance(error, yaml.MarkedYAMLError) and error.problem else ""
        raise ConfigError(f"{COMMAND_LINE}: {dotted}={text} is not valid YAML{reason}; put it in quotes") from error


def _override(layer: Layer, dotted: str, value: Any, origin: Origin, schema: type[Args]) -> None:
    """Set one dotted key of a layer."""
    key = _split(dotted, schema, layer.tree)
    node: Any = layer.tree
    for depth, name in enumerate(key[:-1], 1):
        if isinstance(node, list) and isinstance(name, int) and name < len(node):
            node = node[name]
            continue
        if isinstance(node, list):
            raise ConfigError(f"{origin}: {dotted} names item {name} of a list of {len(node)}; count from 0")
        if not isinstance(node.get(name), dict | list):
            layer.forget(key[:depth])
            node[name] = {}
        node = node[name]
    name = key[-1]
    if isinstance(node, list):
        if not isinstance(name, int) or name >= len(node):
            raise ConfigError(f"{origin}: {dotted} names item {name} of a list of {len(node)}; count from 0")
        layer.forget(key)
        node[name] = value
    elif isinstance(value, dict) and isinstance(node.get(name), dict) and sections_at(schema, key):
        node[name] = {**node[name], **value}  # a mapping of names, such as data.sources, is replaced
        for inner in value:
            layer.forget((*key, inner))
    else:
        layer.forget(key)
        node[name] = value
    layer.marks[key] = origin
    for inner, _ in leaves(value, key):
        layer.marks.update({inner[:n]: origin for n in range(len(key) + 1, len(inner) + 1)})


def _split(dotted: str, schema: type[Args], tree: Any) -> Key:
    """Split a dotted key. Below a free mapping (data.sources) the rest is one name, since names may contain dots."""
    parts_left, key, sections = dotted.split("."), [], [schema]
    while parts_left:
        if isinstance(tree, list) and parts_left[0].isdigit():
            key.append(int(parts_left.pop(0)))
            tree = tree[key[-1]] if key[-1] < len(tree) else None
            continue
        known = {name for section in sections for name in section.model_fields}
        if parts_left[0] in ("type_hint", "config") and any(issubclass(section, Part) for section in sections):
            parts_left = ["type"] if parts_left[0] == "type_hint" else parts_left[1:] or parts_left
        free = not sections and not (isinstance(tree, dict) and isinstance(tree.get(parts_left[0]), dict | list))
        name = ".".join(parts_left) if free else parts_left[0]
        parts_left = [] if free else parts_left[1:]
        key.append(name)
        tree = tree.get(name) if isinstance(tree, dict) else None
        sections = inner_sections(sections, name, items=isinstance(tree, list)) if name in known else []
    return tuple(key)


def stack_layers(
    config: str | None, overlays: list[str], overrides: list[str], schema: type[Args], point: Point | None = None
) -> Layer:
    configs = Path(sys.modules[schema.__module__].__file__ or "").parent / "configs"
    values = [(*_parse(word), COMMAND_LINE) for word in overrides]
    values += [(key, *placed) for key, placed in (point or {}).items()]
    folders = [*(_config_folders(Path(config).expanduser()) if config is not None else []), configs]
    picks = {key: (str(value), place) for key, value, place in values if _is_pick(key, value, schema, folders)}
    composer = _Composer(schema, folders, picks)
    layer = Layer()
    if config is not None:
        path = Path(config).expanduser()
        _must_exist(path, "config", configs)
        layer = composer.load(path)
    for group, (name, where) in picks.items():
        if group not in composer.used:
            layer.tree.pop(group, None)
            layer.forget((group,))
            layer.merge(composer.pick(group, name, where, folders))
    for overlay in overlays:
        layer.merge(composer.overlay(overlay))
    if point is not None:
        layer.tree.pop(GRID, None)
        layer.forget((GRID,))
    for key, value, origin in values:
        if key not in picks:
            _override(layer, key, value, origin, schema)
    return layer


def _is_pick(key: str, value: Any, schema: type[Args], folders: list[Path]) -> bool:
    if key in schema.model_fields:
        return is_section(schema, key) and isinstance(value, str) and not value.startswith("${")
    return "." not in key and any((folder / key).is_dir() for folder in folders)
