"""Compares runs: the keys of their configs, and the curves of two runs at the steps that both reported.

Equal means equal to the last bit. If a run went back to a checkpoint, its newest line of a step counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lingua.config.base import show
from lingua.config.frozen import rule_of
from lingua.run.folder import public_value

_OWN_KEYS = ("name", "dump_dir")  # always differ
_ROWS = 12
_LABEL_LENGTH = 36


class _Absent:
    def __repr__(self) -> str:
        return "-"


ABSENT = _Absent()
"""The value of a key that only the other config has."""


@dataclass(frozen=True)
class Curves:
    """Values of two runs at their common steps."""

    steps: list[int]
    left: list[float]
    right: list[float]

    @property
    def first_difference(self) -> int | None:
        """The first common step whose values are not equal."""
        return next((s for s, a, b in zip(self.steps, self.left, self.right, strict=True) if a != b), None)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten `{"optim": {"lr": 1}}` to `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def config_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, in the order of the left config; ABSENT means no such key."""
    a, b = flatten(left), flatten(right)
    keys = [*a, *(key for key in b if key not in a)]
    both = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys if key not in _OWN_KEYS}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def keys_that_differ(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that are not the same in all configs, in the order of the first."""
    found: dict[str, None] = {}
    for other in configs[1:]:
        found |= dict.fromkeys(config_differences(configs[0], other))
    order = {key: i for i, key in enumerate(flatten(configs[0]))} if configs else {}
    return sorted(found, key=lambda key: order.get(key, len(order)))


def telling_labels(configs: Sequence[Mapping[str, Any]], max_length: int = _LABEL_LENGTH) -> list[str]:
    """Label each config by what differs, such as `type=muon lr=0.004`; no labels if that is too long.

    Uses keys that all configs have and that change what is learned, or any others if none of these differ.
    """
    flat = [flatten(config) for config in configs]
    keys = [key for key in keys_that_differ(configs) if all(key in tree for tree in flat)]
    keys = [key for key in keys if rule_of(key) != "free"] or keys
    labels = [label({key: _public(key, tree[key]) for key in keys}) for tree in flat]
    return labels if keys and max(map(len, labels)) <= max_length else []


def _public(key: str, value: Any) -> Any:
    """Return a value, or what may be shown of a secret."""
    text = public_value(key, value)
    return value if text == show(value) else text


def curve(records: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    """Return the finite values of `key` by step; of a step that was trained twice, the newest."""
    found = {record["global_step"]: record[key] for record in records if key in record}
    return {step: value for step, value in found.items() if value is not None}


def common_curves(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]], key: str = "loss/out") -> Curves:
    """Return the values of `key` at the steps that both runs reported."""
    a, b = curve(left, key), curve(right, key)
    steps = sorted(a.keys() & b.keys())
    return Curves(steps, [a[step] for step in steps], [b[step] for step in steps])


def relative_difference(value: float, other: float) -> float:
    """Return the difference as a fraction of `other`."""
    return 0.0 if value == other else abs(value - other) / max(abs(other), 1e-30)


def some_of(n: int, n_wanted: int = _ROWS) -> list[int]:
    """Return at most `n_wanted` evenly spread indexes below n, with the first and the last."""
    if n <= n_wanted:
        return list(range(n))
    return [round(i * (n - 1) / (n_wanted - 1)) for i in range(n_wanted)]


def spell(value: Any) -> str:
    """Format a value as people write it: 0.0003, text without quotes."""
    if isinstance(value, float):
        return next(text for text in (f"{value:g}", repr(value)) if float(text) == value)
    return value if isinstance(value, str) else show(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten keys to their last part where that is unique."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def label(values: Mapping[str, Any]) -> str:
    """Format values as `lr=0.001 dim=512`."""
    names = short_names(list(values))
    return " ".join(f"{names[key]}={spell(value)}" for key, value in values.items())
