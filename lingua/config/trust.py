"""Decide whose code a config may run.

A config that came with weights (it lies beside or above them, or a command found it there) may choose among registered
parts, but runs no code that it names itself, unless `--trust`, `lingua.load(..., trust=True)` or LINGUA_TRUST=1 (for
scripts; our own jobs and evaluators set it) allows that. Code named on the command line is trusted. So is the code of a
run that this user started: the trainer notes its folder, its configs and the names of its code in the user's state
folder, $XDG_STATE_HOME/lingua/trusted, which no download can contain.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)

DEFAULT_APP = "apps.main"
SHIPPED_APPS = (DEFAULT_APP, "apps.diffusion", "apps.fastRNN", "apps.gssm", "apps.mamba", "apps.mtp", "apps.xlstm")
"""Apps of this repository, which need no trust."""
VARIABLE = "LINGUA_TRUST"
CONFIG = "config.yaml"
_WEIGHTS = {".safetensors", ".distcp", ".pth", ".pt", ".ckpt", ".bin"}
_given: ContextVar[bool] = ContextVar("trust", default=False)
_found: set[Path] = set()
AnyPath = TypeVar("AnyPath", bound=Path | None)


@contextmanager
def trusting(given: bool = True) -> Iterator[None]:
    """Allow code that a config beside weights names, inside this context, if `given`."""
    token = _given.set(_given.get() or given)
    try:
        yield
    finally:
        _given.reset(token)


def found(config: AnyPath) -> AnyPath:
    """Note that a command found this config near weights, so that the user did not type its name. Returns it."""
    if config is not None:
        _found.add(config.absolute())
    return config


def check_code(configs: Sequence[Path], code: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError if code is not trusted and one of the configs that name it came with weights.

    `code`: modules and files by the key that names them.
    """
    if not any(code.values()) or _given.get() or os.environ.get(VARIABLE, "0") not in ("", "0"):
        return
    for config in configs:
        strange = {key: [name for name in names if not _is_noted(config, name)] for key, names in code.items()}
        named = "; ".join(f"{key}: {', '.join(names)}" for key, names in strange.items() if names)
        if named and came_with_weights(config):
            from lingua.config.base import ConfigError

            raise ConfigError(
                f"{config} came with weights and names code to run here ({named}); nothing of it has run: "
                "read it, then add --trust (in Python: trust=True)"
            )


def came_with_weights(config: Path) -> bool:
    """Return whether a command found the config near weights, or weights lie beside it or in two folders below."""
    if config.absolute() in _found:
        return True
    folders = {config.absolute().parent, config.resolve().parent}
    return any(_holds_weights(folder, 2 if config.name == CONFIG else 0) for folder in folders)


def _holds_weights(folder: Path, depth: int) -> bool:
    with suppress(OSError), os.scandir(folder) as entries:  # nothing can be loaded from a folder that cannot be listed
        for entry in entries:
            if entry.is_dir():
                if depth and _holds_weights(Path(entry.path), depth - 1):
                    return True
            elif entry.name == ".metadata" or Path(entry.name).suffix in _WEIGHTS:
                return True
    return False


# -- runs that the user has started --------------------------------------------------------------------------------


def note_run(run_dir: Path, code: Mapping[str, Sequence[str]], configs: Sequence[Path] = ()) -> None:
    """Note that the user runs this code in this folder and from these configs; weights may later lie beside them."""
    for place, name in product((run_dir, *configs), {name for names in code.values() for name in names}):
        try:
            note = _note(place, name)
            note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            note.touch(mode=0o600)
        except (OSError, RuntimeError) as error:  # RuntimeError: no home
            log.warning("cannot note that you trust %s (%s); commands on this run will ask for --trust", name, error)


def _is_noted(config: Path, name: str) -> bool:
    try:
        return any(_note(place, name).exists() for place in (config, *config.absolute().parents[:2]))
    except (OSError, RuntimeError):
        return False


def _note(place: Path, name: str) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "lingua" / "trusted" / sha256(f"{place.resolve()}\0{name}".encode()).hexdigest()
