"""`lingua import --run`: import an unfinished run of Meta Lingua, or of a fork of it.

Keeps weights, optimizer state, step and config; reports what cannot be kept. Nothing in the old run is changed or
executed: its pickled `.metadata` goes through an allow-list, and pickled values are left out. The new folder appears
whole or not at all.

    OUT/config.yaml                      the old config with our keys: lingua train OUT/config.yaml resumes
        taken_over/0000012000/           the old checkpoint, with a manifest and our JSON state

The position in the data is not kept, since rows have another order here: reading restarts at the first row. Defaults
that are hard-coded in Meta Lingua are set explicitly in the config: norms and embeddings are decayed (optim.decay_all).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from torch.distributed.checkpoint.metadata import Metadata

from apps.cli.made import Made
from apps.main.args import TrainArgs
from lingua.checkpoint import dcp, layout, lookup, publish
from lingua.checkpoint.state import STATE_VERSION, rng_state, seed_rng
from lingua.checkpoint.tools.copy import chunks
from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine
from lingua.config.compose import compose
from lingua.config.frozen import CONFIG_FILE, public_yaml, read_frozen
from lingua.config.trust import found
from lingua.files import (
    DISK,
    CommandError,
    Files,
    RunError,
    entries,
    free_bytes,
    human_bytes,
    read_json,
    whole_folder,
    write_whole,
)
from lingua.train.build import fresh_shared
from lingua.train.check import Checked, load

if TYPE_CHECKING:
    from lingua.console import Progress

log = logging.getLogger(__name__)

TAKEN_OVER = "taken_over"


def take_over(old: Path, out: Path, progress: Progress, *, config: Path | None = None, files: Files = DISK) -> Made:
    """Make `out` a run that resumes from `old` (RUN or RUN@step). Raises ConfigError, RunError and OSError.

    `config`: used instead of the old run's config.yaml.
    """
    run_dir, step = lookup.split(old)
    source, metadata = _newest_complete(run_dir, step)
    n_ranks = len(list(source.glob("train_state_*.json")))
    try:
        step = int(read_json(source / "train_state_00000.json")["step"])
    except (KeyError, TypeError, ValueError):
        raise RunError(f"{source / 'train_state_00000.json'} contains no step, so it is not a training state") from None
    here = out.absolute()
    target = Path(TAKEN_OVER) / layout.step_name(step)
    checked = _new_config(config or found(run_dir / CONFIG_FILE), here, here / target, n_ranks)
    kept = dcp.chosen(metadata, _names(metadata, checked.frozen["model"].get("weight_tying", False)))
    sizes = dcp.files_of(kept)
    if (free := free_bytes(out)) < sum(sizes.values()):
        raise RunError(f"{out} has {human_bytes(free)} free, the checkpoint takes {human_bytes(sum(sizes.values()))}")
    with whole_folder(out, files=files) as folder:
        files.mkdir(folder / TAKEN_OVER)
        files.mkdir(folder / target)
        progress.begin(f"importing step {step}", sum((source / name).stat().st_size for name in sizes))
        facts = {
            name: publish.write_hashed(folder / target / name, chunks(source / name, progress.advance), files=files)
            for name in sorted(sizes)
        }
        made_here = {
            layout.METADATA: dcp.metadata_bytes(kept),
            layout.train_state_file(0): orjson.dumps(_state(checked, step), option=orjson.OPT_SERIALIZE_NUMPY),
        }
        for name, content in made_here.items():
            facts[name] = publish.write_hashed(folder / target / name, [content], files=files)
        write_whole(folder / target / layout.MANIFEST, publish.manifest_bytes(step, 0, facts), files=files)
        write_whole(folder / CONFIG_FILE, public_yaml(checked.frozen), files=files)
        files.fsync_dir(folder / TAKEN_OVER)
    notes = [
        *checked.warnings,
        "the position in the data is not kept: reading begins with the first row (checkpoint.reset=[data])",
        f"global_batch_size is {checked.resolved.rows_per_step}: batch_size x grad_acc_steps x the {n_ranks} "
        "data-parallel ranks that wrote the checkpoint",
    ]
    names = [CONFIG_FILE, *(str(target / name) for name in sorted([*facts, layout.MANIFEST]))]
    return Made(out, f"step {step} of {run_dir}", names, sum(fact.size_bytes for fact in facts.values()), notes)


def _newest_complete(run_dir: Path, step: int | None) -> tuple[Path, Metadata]:
    """Return (folder, metadata) of the newest checkpoint, or of that step, whose files all have their full length."""
    config = read_frozen(run_dir) or {}
    path = Path((config.get("checkpoint") or {}).get("path") or run_dir / layout.CHECKPOINTS)
    root = path if path.is_dir() else run_dir / layout.CHECKPOINTS  # the run may have been moved
    steps = {number: path for path in entries(root) if (number := layout.parse_folder(path.name)) is not None}
    if step is not None and step not in steps:
        raise CommandError(f"{root} has no checkpoint of step {step}; it has {lookup.some_steps(sorted(steps))}")
    for number in sorted(steps, reverse=True) if step is None else [step]:
        folder = steps[number]
        if (folder / layout.train_state_file(0)).exists():
            raise RunError(f"{run_dir} is already a run of this lingua; train it, or use `lingua fork {run_dir} NEW`")
        if (problem := _incomplete(folder)) is None:
            return folder, dcp.read_metadata(folder)
        log.warning("skipping %s: %s", folder, problem)
    raise RunError(f"{root} has no complete checkpoint" + ("" if step is None else f" of step {step}"))


def _incomplete(folder: Path) -> str | None:
    """Return what a checkpoint folder lacks of the files that its metadata names, or None."""
    if not (folder / layout.METADATA).exists() or not (folder / "train_state_00000.json").exists():
        return f"it has no {layout.METADATA} or no train_state_00000.json"
    for name, n_bytes in sorted(dcp.files_of(dcp.read_metadata(folder)).items()):
        there = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if there < n_bytes:
            return f"{name} has {there} bytes of at least {n_bytes}"
    return None


def _names(metadata: Metadata, is_tied: bool) -> dict[str, str]:
    """Map the old names of model and optimizer tensors to the new ones."""
    tensors = dcp.properties_in(metadata)
    chosen = {name: name for name in tensors if name.startswith(("model.", "optim.state."))}
    if is_tied:  # Meta Lingua saves the embedding a second time, as the head
        chosen = {name: new for name, new in chosen.items() if "output.tied_module.weight" not in name}
    if not any(name.startswith("optim.state.") for name in chosen):
        raise RunError(
            "the checkpoint holds no optimizer state; for weights alone, set checkpoint.init_ckpt_path to it"
        )
    return chosen


def _new_config(config: Path, out: Path, start: Path, n_ranks: int) -> Checked:
    """Convert the old config. Raises ConfigError with what replaces each removed key."""
    if not config.is_file():
        raise ConfigError(f"{config} is missing; it describes model, optimizer and data")
    old = compose(str(config), [], [], TrainArgs).args
    new: Mapping[str, Any] = {
        "name": out.name,
        "dump_dir": str(out),
        "total_flops": None if old.steps is not None else old.total_flops,
        "global_batch_size": old.data.batch_size * (old.grad_acc_steps or 1) * n_ranks,
        "grad_acc_steps": None,
        "optim.decay_all": True,
        "checkpoint.path": None,
        "checkpoint.init_ckpt_path": str(start),
        "checkpoint.init_ckpt_model_key": None,
        "checkpoint.continue_training_from_init": True,
        "checkpoint.reset": ["data"],
    }
    words = [f"{key}={json.dumps(value)}" for key, value in new.items()]
    return load(CommandLine(config=str(config), overrides=words), n_ranks)


def _state(checked: Checked, step: int) -> dict[str, Any]:
    """Build our JSON state at that step; the optimizer's groups come from the config."""
    seed_rng(checked.args.seed, step, 0)
    shared = {**fresh_shared(), "step": step, "total_tokens": step * checked.resolved.tokens_per_step}
    document = {"version": STATE_VERSION, "rank": 0, "world_size": 1, "per_rank": {}, "rng": rng_state()}
    return {**document, "shared": shared, "param_groups": [], "optim_scalars": {}}
