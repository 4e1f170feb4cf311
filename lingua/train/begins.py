"""Find what a run begins with: the place of checkpoint.init_ckpt_path and the progress of its state. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lingua.checkpoint import lookup
from lingua.checkpoint.layout import train_state_file
from lingua.config.keys.train import TrainArgs
from lingua.files import RunError, json_object_in
from lingua.train.sizes import Finding


def place_of(start: str) -> tuple[Path, int | None]:
    """Return (where init_ckpt_path leads, the step that it names or that of the newest checkpoint there)."""
    try:
        found = lookup.find_one(lookup.without_ema(start)[0])
    except (RunError, OSError):  # Meta Lingua's, a file of weights, or nothing at all
        with suppress(RunError, OSError):
            return lookup.of_meta_lingua(start) or Path(start), None
        return Path(start), None
    return found.folder, found.step


def begins_with(args: TrainArgs) -> tuple[int, int]:
    """Return the (steps, tokens) of the state that a run begins with, as far as it is on this machine."""
    start = args.checkpoint.init_ckpt_path
    if start is None or not args.checkpoint.continue_training_from_init or "step" in args.checkpoint.reset:
        return 0, 0
    place, step = place_of(start)
    shared = (json_object_in(place / train_state_file(0)) or {}).get("shared")
    return step or 0, int(shared.get("total_tokens", 0)) if isinstance(shared, dict) else 0


def nothing_to_begin_with(key: str, start: str | None) -> Iterator[Finding]:
    """Yield weights that are missing from an existing folder; without the folder they may be on another machine."""
    if not start or (place := place_of(start)[0]).exists():
        return
    run, at, _ = start.rpartition("@")
    if place.absolute().parent.is_dir() or (at and Path(run).exists()):
        where = f"{run} has no such checkpoint" if at and Path(run).exists() else f"{place.parent} does not hold it"
        yield Finding(key, f"{key} {start} does not exist: {where}; correct it, or remove it to begin anew")
