"""Read the points of a sweep: all combinations of values on the command line and in a config's `grid` block.

    lingua sweep exp.yaml optim.lr=1e-3,3e-4            two values; commas in brackets or quotes do not separate

    grid:
      optim.lr: [1e-3, 3e-4]                            or nested, as in the rest of the file
      paired:                                           keys combined value by value; for several groups, a list
        model.dim: [512, 1024]
        model.n_layers: [8, 16]

The first key changes slowest. A value that is not a list is refused, not treated as a list of one. The config itself
checks whether keys exist and accept their values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml

from lingua.config.base import ConfigError, Key, plain, show
from lingua.config.yaml_layers import COMMAND_LINE, GRID, Origin, Point, yaml_value
from lingua.report.diff import spell

PAIRED = "paired"
_OWN = "each point has its own; set name= or dump_dir= for the sweep"
_ONE_JOB = "the points are tasks of one job; start a second sweep"
_NOT_SWEPT = (
    ("name", _OWN),
    ("dump_dir", _OWN),
    ("dump_base", _OWN),
    ("app", _ONE_JOB),
    ("plugins*", _ONE_JOB),
    ("launcher*", _ONE_JOB),
)


@dataclass(frozen=True)
class Axis:
    """Keys that change together."""

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    """For each position on the axis, one value per key."""
    origins: tuple[Origin, ...]
    """Where each key is set."""


def read_axes(tree: Mapping[str, Any], marks: Mapping[Key, Origin], overrides: Sequence[str]) -> list[Axis]:
    """Return the axes of a config's block and of the command line, which replaces axes of the same key in the block.

    Raises ConfigError with all problems.
    """
    problems: list[str] = []
    axes = {axis.keys: axis for axis in _axes_of_block(tree.get(GRID), marks, problems)}
    paired = {key: keys for keys in axes if len(keys) > 1 for key in keys}
    for word in overrides:
        key, _, text = word.partition("=")
        values = _values_of(text)
        if key in paired:
            problems.append(f"{COMMAND_LINE}: {key} is one of grid.paired ({', '.join(paired[key])}); change it there")
        elif len(values) > 1:
            axes[key,] = Axis((key,), tuple((value,) for value in values), (COMMAND_LINE,))
        else:
            axes.pop((key,), None)
    problems += [problem for axis in axes.values() for problem in _misfits(axis)]
    keys = [key for axis in axes.values() for key in axis.keys]
    problems += [f"grid: {key} is given twice; keep one of them" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if problems:
        raise ConfigError(problems)
    return list(axes.values())


def plain_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that are the same for all points."""
    return [word for word in overrides if len(_values_of(word.partition("=")[2])) < 2]


def points_of(axes: Sequence[Axis]) -> list[Point]:
    """Return every combination of one entry from each axis."""
    return [
        {
            key: (value, origin)
            for axis, values in zip(axes, places, strict=True)
            for key, value, origin in zip(axis.keys, values, axis.origins, strict=True)
        }
        for places in itertools.product(*(axis.values for axis in axes))
    ]


def _values_of(text: str) -> list[Any]:
    """Split the value of an override at its commas; return one value if it is not a YAML list."""
    try:
        values = yaml_value(f"[{text}]")
    except yaml.YAMLError:
        return [text]
    return values if isinstance(values, list) else [text]


# -- the block -----------------------------------------------------------------------------------------------------


def _axes_of_block(block: Any, marks: Mapping[Key, Origin], problems: list[str]) -> Iterator[Axis]:
    where = marks.get((GRID,), Origin(GRID))
    if block is None:
        return
    if not isinstance(block, dict):
        problems.append(f"{where}: grid is {show(block)}; write keys with lists of values below it")
        return
    plain = {name: value for name, value in block.items() if name != PAIRED}
    for key, values, origin in _lists(plain, (GRID,), 1, marks, problems):
        yield Axis((key,), tuple((value,) for value in values), (origin,))
    groups = block.get(PAIRED, [])
    for i, group in enumerate(groups if isinstance(groups, list) else [groups]):
        path = (GRID, PAIRED, i) if isinstance(groups, list) else (GRID, PAIRED)
        if not isinstance(group, dict):
            problems.append(f"{marks.get(path, where)}: grid.paired is {show(group)}; write keys with lists below it")
            continue
        listed = list(_lists(group, path, len(path), marks, problems))
        lengths = {key: len(values) for key, values, _ in listed}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{key} has {n}" for key, n in lengths.items())
            problems.append(f"{marks.get(path, where)}: grid.paired needs as many values of each key, but {counts}")
        elif listed:
            keys, columns, origins = zip(*listed, strict=True)
            yield Axis(keys, tuple(zip(*columns, strict=True)), origins)


def _lists(
    tree: Mapping[str, Any], path: Key, depth: int, marks: Mapping[Key, Origin], problems: list[str]
) -> Iterator[tuple[str, list[Any], Origin]]:
    """Yield (dotted key, values, origin) of each list below `path`; the first `depth` parts are left out of the key."""
    for name, value in tree.items():
        key = (*path, name)
        dotted, origin = ".".join(map(str, key[depth:])), marks.get(key, Origin(GRID))
        if isinstance(value, dict) and value:
            yield from _lists(value, key, depth, marks, problems)
        elif not isinstance(value, list):
            shown = value if isinstance(value, str) else show(value)
            problems.append(f"{origin}: grid.{dotted} is {show(value)}; write a list: [{shown}]")
        elif not value:
            problems.append(f"{origin}: grid.{dotted} is an empty list; add values, or remove it")
        else:
            yield dotted, value, origin


def _misfits(axis: Axis) -> Iterator[str]:
    """Yield why these keys cannot be swept over these values."""
    for key, origin in zip(axis.keys, axis.origins, strict=True):
        why = next((why for pattern, why in _NOT_SWEPT if fnmatchcase(key, pattern)), None)
        if why is not None:
            hint = "" if origin != COMMAND_LINE else f" (quote a comma that belongs to the value: {key}='\"a,b\"')"
            yield f"{origin}: {key} cannot be swept: {why}{hint}"
    texts = [repr(plain(list(values))) for values in axis.values]
    for i, text in enumerate(texts):
        if text in texts[:i]:
            what = ", ".join(f"{k} {spell(v)}" for k, v in zip(axis.keys, axis.values[i], strict=True))
            yield f"{axis.origins[0]}: {what} is given twice; keep one of them"
