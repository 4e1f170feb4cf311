"""Keys of `phases:`, and the keys of a config that a phase may change. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, model_validator

from lingua.config.base import Args, Text, plain

MAY_CHANGE = (
    "data.sources", "data.root_dir", "data.seq_len", "data.batch_size",
    "global_batch_size", "global_batch_tokens", "grad_acc_steps",
    "optim.lr", "optim.scheduler", "optim.warmup", "optim.lr_min_ratio", "optim.cycle_length", "optim.cosine_theta",
    "optim.annealing_step", "optim.decay_fraction", "optim.exp_factor",
    "optim.clip", "optim.frozen", "optim.on_nonfinite", "optim.max_skips",
    "loss.*", "validation.*", "eval.harness*", "eval.validation*", "eval.measures", "eval.core_metrics",
    "model.rope_theta",
)  # fmt: skip
"""Keys that a phase may change: no shape of a tensor, no tokenizer and no number of lanes depends on them."""

_UNTIL = re.compile(r"(\+?)\s*(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kMBT]?)\s*(%|steps?|tokens?|)")
_TIMES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Until(NamedTuple):
    """Where a phase ends."""

    value: float
    unit: Literal["steps", "tokens", "%"]
    is_more: bool
    """Counted from the end of the previous phase."""


def read_until(text: str) -> Until:
    """Parse `900`, `+2000 steps`, `2B tokens`, `90%`. Raises ValueError."""
    found = _UNTIL.fullmatch(text.strip())
    if not found or (found[3] and found[4] == "%"):
        raise ValueError(
            f"until is {text!r}; write steps (900 or +2000 steps), tokens (2B tokens, +500M tokens) or a share of "
            "`steps` (90%)"
        )
    unit = {"%": "%", "t": "tokens"}.get(found[4][:1], "steps")
    return Until(float(found[2]) * _TIMES[found[3]], unit, bool(found[1]))  # pyright: ignore[reportArgumentType]


class PhaseArgs(Args):
    """A part of a run: the config with the dotted keys given here, from an exact step on."""

    model_config = ConfigDict(extra="allow")

    name: Text
    """Name in logs, `status` and `report`."""
    until: Text
    """Its last step: 900, +2000 steps, 2B tokens, +1B tokens; or a share of `steps`: 90%."""
    schedule: Literal["run", "phase"] | None = None
    """Span of the learning rate schedule. Null: this phase if it sets optim.scheduler, otherwise the run."""
    fresh: bool | list[Text] = False
    """Sources that restart at their first document instead of where an earlier phase left them. true: all."""
    from_run: Text | None = None
    """RUN@STEP whose weights it starts with; also written `from`."""
    take: Literal["weights", "state"] = "weights"
    """What `from` loads. state: weights and optimizer state; weights: weights alone, with a new optimizer state."""

    @model_validator(mode="before")
    @classmethod
    def _names(cls, tree: Any) -> Any:
        """Accept `from`, which is a Python keyword."""
        return {("from_run" if k == "from" else k): v for k, v in tree.items()} if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _until_is_one(self) -> Self:
        read_until(self.until)
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The dotted keys that it changes, with their values."""
        return dict(_flat(plain(self.model_extra or {}), ""))


def _flat(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """Return the leaves of nested sections; a mapping of sources is a leaf."""
    found = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        inside = isinstance(value, Mapping) and key != "data.sources"
        found += _flat(value, f"{key}.") if inside else [(key, value)]
    return found


def may_change(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
