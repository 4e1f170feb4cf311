"""Compare the configs and code of the ranks when they meet, before anything is built.

Ranks with different learning rates, say, would train without an error, and every number of the run would be wrong.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lingua.files import RunError
from lingua.run.folder import public_value

# Folders on local disks, whose names may differ between machines.
OF_THE_MACHINE = frozenset({"data.stage_to", "distributed.compile_cache"})
_SHOWN_KEYS = 8
_SHOWN_CHARACTERS = 400
_ORDER = " (order)"
_ABSENT = object()


class MixedConfigError(RunError):
    """The ranks were not started with the same config."""


def difference(configs: list[dict[str, Any]]) -> str:
    """Return one sentence with the keys that differ and their values by rank, or ""."""
    flat = [_flat(config) for config in configs]
    keys = [key for key in dict.fromkeys(itertools.chain(*flat)) if key not in OF_THE_MACHINE]
    differing = [key for key in keys if len({repr(values.get(key, _ABSENT)) for values in flat}) > 1]
    if not differing:
        return ""
    values = [key for key in differing if not key.endswith(_ORDER)]  # a key that is missing changes the order too
    reported = values or differing
    shown = [_by_rank(key, flat) for key in reported[:_SHOWN_KEYS]]
    more = [f"{len(reported) - len(shown)} more keys"] if len(reported) > len(shown) else []
    return (
        f"the ranks do not have the same config: {'; '.join([*shown, *more])}; "
        "start all of them with the same config, command line, environment and code"
    )


def code_of(names: Iterable[str]) -> dict[str, str]:
    """Return a hash of the Python files of each package or module, to compare along with the config."""
    return {f"the code of {name}": _code_digest(name) for name in dict.fromkeys(names)}


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """Return each plain value by its dotted key, and the order of names in each mapping (data.sources needs it)."""
    inner = dict(enumerate(node)) if isinstance(node, list) else node
    if not isinstance(inner, dict) or not inner:
        return {key: node}
    found: dict[str, Any] = {f"{key}{_ORDER}": list(map(str, inner))}
    for name, value in inner.items():
        found |= _flat(value, f"{key}.{name}" if key else str(name))
    return found


def _by_rank(key: str, flat: list[dict[str, Any]]) -> str:
    """Return text such as `optim.lr is 0.001 on rank 0 and 0.01 on ranks 1-7`."""
    ranks: dict[str, list[int]] = {}
    for rank, values in enumerate(flat):
        ranks.setdefault(repr(values.get(key, _ABSENT)), []).append(rank)
    texts = [f"{_shown(key, flat[having[0]])} on {spell_ranks(having)}" for having in ranks.values()]
    return f"{key} is {', '.join(texts[:-1])} and {texts[-1]}"


def _shown(key: str, values: dict[str, Any]) -> str:
    return public_value(key, values[key], _SHOWN_CHARACTERS) if key in values else "absent"


def spell_ranks(ranks: list[int]) -> str:
    """Name ranks: `rank 3`, `ranks 0, 4-7`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join('-'.join(map(str, span)) for span in spans)}"


def _code_digest(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("[!.]*.py"))  # not an editor's lock: .#x.py
    if not folders and spec.origin is not None:
        files = [Path(spec.origin)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
