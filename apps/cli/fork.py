"""`lingua fork`: make a new run that resumes from a published checkpoint of another run, with its full state.

Everything is checked before anything is written: the config as training checks it, and whether model, optimizer and
data of the checkpoint fit it. The other run is only read; if it is writable, its checkpoint is pinned for a week, until
the new run has its own. The new folder has only a config.yaml, which names the checkpoint
(checkpoint.init_ckpt_path). Its files are not read here: the first attempt verifies them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingua.checkpoint import lookup, metadata, publish
from lingua.checkpoint.documents import read_states
from lingua.checkpoint.lookup import Checkpoint
from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.config.frozen import CONFIG_FILE, Difference, compare, public_yaml, read_frozen
from lingua.config.keys.data import DataArgs
from lingua.config.trust import found
from lingua.files import RunError, entries, write_whole
from lingua.train.check import load
from lingua.train.phases import number_of

if TYPE_CHECKING:
    from lingua.train.check import Checked

PIN_S = 7 * 86400.0
_SET_BY_FORK = ("dump_dir", "dump_base", "checkpoint.init_ckpt_path")
# Keys that belong only to the other run.
_NOT_INHERITED = {
    "checkpoint.path": None,
    "checkpoint.reset": [],
    "checkpoint.init_ckpt_model_key": None,
    "eval.dump_dir": None,
    "eval.metric_log_dir": None,
    "data.accept_change": None,
}


@dataclass(frozen=True)
class Fork:
    """A new run, ready to start."""

    folder: Path
    origin: str
    """RUN@step."""
    changes: list[str]
    """Differences from the other run's config."""
    warnings: list[str]
    pinned_until: float | None
    """Seconds since the epoch; None if the other run is not writable."""

    @property
    def config(self) -> Path:
        return self.folder / CONFIG_FILE


def fork(place: str, folder: Path, words: Sequence[str], world_size: int | None = None) -> Fork:
    """Make `folder` a run that resumes from RUN[@step]. Raises ConfigError, RunError or OSError before making it.

    `words`: overrides, overlays and group picks on top of the other run's config, as for training.
    """
    checkpoint = lookup.find_one(place)
    if checkpoint.run_dir is None or checkpoint.step is None:
        raise ConfigError(f"{place} is not a checkpoint of a run; write RUN@STEP")
    if any(entries(folder)) or folder.is_file():
        raise ConfigError(f"{folder} already exists; choose a new folder")
    if problems := checkpoint.damage(sizes_only=True):
        raise RunError(f"{checkpoint} is damaged: {'; '.join(problems)}; take another step")
    config = read_frozen(checkpoint.run_dir)
    if config is None:
        raise ConfigError(f"{checkpoint.run_dir} has no {CONFIG_FILE} for the fork to start from")
    origin = f"{checkpoint.run_dir.absolute()}@{checkpoint.step}"
    checked = _check(checkpoint.run_dir / CONFIG_FILE, config, origin, folder, words, world_size)
    differences = compare(config, checked.frozen)
    if problems := list(misfits(checkpoint, checked, differences)):
        raise ConfigError(problems)
    folder.mkdir(parents=True, exist_ok=True)
    pinned_until = _pin(checkpoint, folder)
    write_whole(folder / CONFIG_FILE, public_yaml(checked.frozen))
    own = (*_SET_BY_FORK, *_NOT_INHERITED, "name", "checkpoint.continue_training_from_init")
    changes = [d.change for d in differences if d.key not in own or any(w.startswith(f"{d.key}=") for w in words)]
    return Fork(folder, origin, changes, checked.warnings, pinned_until)


def _check(
    config_file: Path,
    config: dict[str, Any],
    origin: str,
    folder: Path,
    words: Sequence[str],
    world_size: int | None,
) -> Checked:
    """Return the config of the fork, checked as training checks it."""
    line = parse_command_line([str(found(config_file)), *words])
    for word in line.overrides:
        if (key := word.partition("=")[0]) in _SET_BY_FORK:
            raise ConfigError(f"command line: {key} follows from RUN@STEP and NEW; remove {word}")
    given = {
        **{key: value for key, value in _NOT_INHERITED.items() if _has(config, key)},
        "name": folder.name,
        "dump_dir": str(folder.absolute()),
        "checkpoint.init_ckpt_path": origin,
        "checkpoint.continue_training_from_init": True,
    }
    line.overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()] + line.overrides
    return load(line, world_size)


def _has(config: dict[str, Any], dotted: str) -> bool:
    section, _, name = dotted.partition(".")
    return isinstance(config.get(section), dict) and name in config[section]


def _pin(checkpoint: Checkpoint, folder: Path) -> float | None:
    assert checkpoint.root is not None
    assert checkpoint.step is not None
    until = time.time() + PIN_S
    try:
        publish.pin(checkpoint.root, checkpoint.step, f"fork-{folder.name}", until)
    except OSError:
        return None
    return until


# -- fit of the state ----------------------------------------------------------------------------------------------


def misfits(checkpoint: Checkpoint, checked: Checked, differences: Sequence[Difference]) -> Iterator[str]:
    """Yield reasons, with remedies, why the checkpoint's state does not fit the changed config."""
    settings = checked.args.checkpoint
    changed = {difference.key: difference for difference in differences}
    tensors = metadata.read_tensors(checkpoint.folder)
    if any(key.startswith("model.") and d.rule == "refuse" for key, d in changed.items()):
        there = sum(t.n_values for name, t in tensors.items() if name.startswith("model.") and t.same_as is None)
        if there != checked.resolved.n_params:
            keys, here = [d.change for key, d in changed.items() if key.startswith("model.")], checked.resolved.n_params
            yield f"{', '.join(keys)}: {checkpoint} has {there:,} parameters, this model {here:,}; set it back"
    if not settings.continue_training_from_init:
        return
    if "optim.type" in changed and "optim" not in settings.reset:
        yield f"{changed['optim.type'].change}: its state does not fit; reset it with checkpoint.reset=[optim]"
    if "data" not in settings.reset:
        step = 0 if "step" in settings.reset else checkpoint.step or 0
        data = checked.phases[number_of(checked.phases, step)].args.data  # of the phase that made the state, or resumes
        yield from data_problems(data, checked.resolved.lanes, _data_states(checkpoint.folder))


def _data_states(folder: Path) -> list[dict[str, Any]]:
    from lingua.data.loader import saved_state

    return [saved_state([state["per_rank"] for state in read_states(folder)])]


def data_problems(args: DataArgs, lanes: int, states: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the loader would refuse at the start of the run, without checking files on other machines."""
    from lingua.config.keys.data import tokenizer_path
    from lingua.data.loader import adapt, check_order, merge_states, order_of
    from lingua.data.sources import open_data, with_default_sources

    if args.tokenizer.path and not tokenizer_path(args.tokenizer.path).exists():
        return []
    args = with_default_sources(args)
    try:
        state = merge_states(states)
        check_order(state, order_of(args, lanes))
        if all(Path(source.path).exists() for source in args.read_files()):
            with closing(open_data(args, lanes)) as data:
                adapt(state, data.sources, args.accept_change)
    except ConfigError as error:
        return [*error.problems, "or read the data from the first row: checkpoint.reset=[data]"]
    return []
