"""Compare runs: the keys of their configs, and the curves of two runs at the steps that both reported.

Equal means equal to the last bit. If a run went back to a checkpoint, its newest line for a step counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lingua.config.base import show
from lingua.config.frozen import rule_of
from lingua.masking import public_text, public_tree
from lingua.run.folder import public_value

Records = Sequence[Mapping[str, Any]]
_OWN_KEYS = ("name", "dump_dir")  # always differ
_ROWS = 12
ABSENT: Any = object()
"""Value of a key that a config does not have."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten `{"optim": {"lr": 1}}` to `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_section = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat


def config_differences(*configs: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the keys whose values differ, in the order of the first config; ABSENT means no such key."""
    flat = [flatten(config) for config in configs]
    both = {key: tuple(tree.get(key, ABSENT) for tree in flat) for tree in flat for key in tree if key not in _OWN_KEYS}
    return {key: values for key, values in both.items() if any(value != values[0] for value in values)}


def shown(key: str, value: Any) -> str:
    """Format a value of a config; ABSENT is `-`, and possible secrets are masked."""
    return "-" if value is ABSENT else public_value(key, value)


def telling_labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Label each config by its differences, such as `type=muon lr=0.004`; return [] if that is too long."""
    flat = [flatten(config) for config in configs]
    keys = [key for key, values in config_differences(*configs).items() if ABSENT not in values]
    keys = [key for key in keys if rule_of(key) != "free"] or keys  # if possible, only keys that affect training
    labels = [public_text(label(public_tree({key: tree[key] for key in keys}))) for tree in flat]
    return labels if keys and max(map(len, labels)) <= 36 else []


def curve(records: Records, key: str) -> dict[int, float]:
    """Return the finite values of `key` by step, the newest of a step that was trained twice."""
    found = {record["global_step"]: record[key] for record in records if key in record}
    return {step: value for step, value in found.items() if value is not None}


def common_curves(left: Records, right: Records, key: str = "loss/out") -> list[tuple[int, float, float]]:
    """Return (step, left value, right value) of `key` at the steps that both runs reported."""
    a, b = curve(left, key), curve(right, key)
    return [(step, a[step], b[step]) for step in sorted(a.keys() & b.keys())]


def some_of(n: int) -> list[int]:
    """Return at most _ROWS evenly spread indexes below n, with the first and the last."""
    return sorted({round(i * (n - 1) / (_ROWS - 1)) for i in range(_ROWS)})


def spell(value: Any) -> str:
    """Format a value as people write it: 0.0003, and text without quotes."""
    if isinstance(value, float):
        return next(text for text in (f"{value:g}", repr(value)) if float(text) == value)
    return value if isinstance(value, str) else show(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten keys to their last part if it is unique."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def label(values: Mapping[str, Any]) -> str:
    """Format values as `lr=0.001 dim=512`."""
    names = short_names(list(values))
    return " ".join(f"{names[key]}={spell(value)}" for key, value in values.items())
