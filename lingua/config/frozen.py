"""Freeze a run's config and compare a later one with it: keys may change freely, with a flag, or not at all.

One table decides, and every difference gets one sentence. The frozen config contains the numbers that the first
attempt derived (steps, rows per step, lanes, vocabulary), so it means the same run on other GPUs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from lingua.config.base import Args, Written, WrittenFloat, WrittenInt, plain, show
from lingua.config.yaml_layers import CORE_SCHEMA, escape, read_yaml, unescape
from lingua.masking import public_tree

CONFIG_FILE = "config.yaml"
ORIGIN_FILE = "config.origin.yaml"

Rule = Literal["free", "accept", "refuse"]

# Length, parallelism, monitoring: no row and no parameter depends on these.
_FREE = (
    "steps",
    "epochs",
    "total_flops",
    "grad_acc_steps",
    "name",
    "dump_dir",
    "dump_base",
    "plugins",
    "device",
    "deterministic",
    "distributed",
    "env",
    "checkpoint",
    "validation",
    "profiling",
    "logging",
    "eval",
    "async_eval_gpus",
    "launcher",
    "slurm",
    "gc_collect_freq",
    "probe_freq",
    "signals",
    "stop_signals",
    "watchdog",
    "sample_prompt",
    "sample_every",
)

# The first matching pattern decides. A key without a match, such as one of your own app, needs --accept-change.
RULES: tuple[tuple[str, Rule], ...] = (
    # The same parameters in the same places, or the checkpoint does not fit.
    ("model.max_seqlen", "free"),  # no parameter depends on it
    ("model.seed", "free"),  # the weights exist already
    ("model.attn_impl", "free"),  # another kernel for the same function
    ("model.kernel", "free"),
    ("model.blocks.*.kernel", "free"),
    ("model", "refuse"),
    ("optim.type", "refuse"),
    # The order of rows.
    ("data.seq_len", "refuse"),
    ("data.n_views", "refuse"),
    ("data.seed", "refuse"),
    ("data.lanes", "refuse"),
    ("data.shuffle_window", "refuse"),
    ("data.add_bos", "refuse"),
    ("data.add_eos", "refuse"),
    ("data.tokenizer.path", "free"),  # files may move; their hash is in the loader's state
    ("data.tokenizer.end_ids", "free"),
    ("data.tokenizer", "refuse"),
    ("data.sources", "accept"),
    ("data.doc_mask", "accept"),
    ("data.loss_on", "accept"),
    ("data", "free"),  # how rows are loaded: batch_size, workers, prefetch, location of the data, skip_rows
    ("global_batch_size", "refuse"),
    ("seed", "refuse"),
    # The course of training from here on.
    ("optim.on_nonfinite", "free"),
    ("optim.max_skips", "free"),
    ("optim.on_spike", "free"),
    ("optim.rewind", "free"),
    ("optim", "accept"),
    ("loss.chunk_tokens", "free"),
    ("loss.samples", "free"),  # of evaluations
    ("loss.validation_samples", "free"),
    ("loss", "accept"),
    ("distributed.model_dtype", "accept"),
    ("distributed.float8_*", "accept"),
    ("app", "accept"),
    *((key, "free") for key in _FREE),
)


@dataclass(frozen=True)
class Difference:
    """One key whose value changed."""

    key: str
    old: Any
    new: Any
    rule: Rule
    effect: str = "changes what the run computes"
    """What the change does, if it must be allowed."""

    @property
    def change(self) -> str:
        return f"{self.key}: {show(plain(self.old))} -> {show(plain(self.new))}"

    def __str__(self) -> str:
        change = self.change
        if self.rule == "refuse":
            return f"{change} cannot change within a run; set it back, or start a new run under another name"
        if self.rule == "accept":
            return f"{change} {self.effect}; allow it with --accept-change, or start another run (name=NEW)"
        return f"{change} takes effect from here on"


def freeze(args: Args, derived: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config as a tree of plain values, with derived numbers filled in."""
    tree = args.model_dump(mode="json")
    for dotted, value in derived.items():
        *sections, name = dotted.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return tree


def _written(tag: str, dumper: yaml.SafeDumper, number: Written) -> yaml.Node:
    return dumper.represent_scalar(tag, number.text)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML loses U+0085 and its like, unless double quotes escape them.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2, or YAML 1.1 in other tools, would not read as text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in CORE_SCHEMA:
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
for _char, _resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items():
    _Dumper.yaml_implicit_resolvers.setdefault(_char, []).extend(_resolvers)
_Dumper.add_representer(str, _text)
for _kind, _name in ((WrittenInt, "int"), (WrittenFloat, "float")):
    _Dumper.add_representer(_kind, partial(_written, f"tag:yaml.org,2002:{_name}"))


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return YAML that `read_config` reads back as the same tree. Every `${` is escaped, so nothing is interpolated."""
    escaped = _with_texts(dict(tree), escape)
    return yaml.dump(escaped, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def public_yaml(tree: Mapping[str, Any]) -> str:
    """Return the YAML of a config for a folder that others may read, with secrets masked."""
    return dump_yaml(public_tree(tree))


def read_config(path: Path) -> dict[str, Any]:
    """Return the values of a frozen config. Raises ConfigError if it cannot be read."""
    return _with_texts(read_yaml(path).tree, unescape)


def read_frozen(run_dir: Path) -> dict[str, Any] | None:
    """Return the run's frozen config, or None before the first attempt. Raises ConfigError if it cannot be read."""
    try:
        return read_config(run_dir / CONFIG_FILE)
    except (FileNotFoundError, NotADirectoryError):  # any other error does not mean a first attempt
        return None


def _with_texts(tree: Any, change: Callable[[str], str]) -> Any:
    """Copy a tree, applying `change` to every text value but not to keys."""
    if isinstance(tree, dict):
        return {name: _with_texts(value, change) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_with_texts(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree


def rule_of(key: str) -> Rule:
    for pattern, rule in RULES:
        if fnmatchcase(key, pattern) or key.startswith(f"{pattern}."):
            return rule
    return "accept"


def compare(frozen: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return every key whose value changed. Keys on one side only (written by another version) do not count, nor do
    secrets, which a frozen config does not hold."""
    changes = _changes(public_tree(frozen), public_tree(new), "")
    return [Difference(key, old, now, rule_of(key)) for key, old, now in changes]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    both = old.keys() & new.keys() if prefix != "data.sources." else old.keys() | new.keys()
    for name in [name for name in (*old, *(key for key in new if key not in old)) if name in both]:
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _changes(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}", was, now
