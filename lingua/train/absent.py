"""Find what a config names but this machine does not have: data, tokenizer, weights. Torch-free.

A login node or laptop need not have what a job reads, and a config can be checked before its data is prepared. So
missing files are only warnings, unless a similar name exists. A run on this machine needs them all.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs
from lingua.config.keys.eval import HeldOutArgs
from lingua.config.keys.train import TrainArgs
from lingua.files import entries
from lingua.tokenizer import assumed_vocab_size
from lingua.train.begins import place_of
from lingua.train.sizes import Finding, tokenizer_is_there

_SHOWN = 6


def missing_paths(args: TrainArgs) -> Iterator[Finding]:
    """Yield what the config names but this machine does not have, and what is assumed instead."""
    yield from (Finding("data.sources", text) for text, is_misnamed in missing_sources(args.data) if not is_misnamed)
    tokenizer = args.data.tokenizer
    if tokenizer.path and not tokenizer_is_there(tokenizer):
        vocab_size = assumed_vocab_size(tokenizer)
        text = f"data.tokenizer.path {tokenizer.path} is not on this machine; assumed to have {vocab_size:,} tokens"
        yield Finding("data.tokenizer.path", text)
    start = args.checkpoint.init_ckpt_path
    if start and not place_of(start)[0].exists():
        yield Finding("checkpoint.init_ckpt_path", f"checkpoint.init_ckpt_path {start} is not on this machine")
    evaluation = args.eval
    for measure in [] if evaluation is None else evaluation.chosen():
        if isinstance(measure, HeldOutArgs) and measure.root_dir and not Path(measure.root_dir).exists():
            key = "eval.validation.root_dir" if evaluation and measure is evaluation.validation else "eval.measures"
            yield Finding(key, f"root_dir {measure.root_dir} of held-out sources is not on this machine")


def misnamed_sources(args: DataArgs) -> list[Finding]:
    return [Finding("data.sources", text) for text, is_misnamed in missing_sources(args) if is_misnamed]


def missing_sources(args: DataArgs) -> Iterator[tuple[str, bool]]:
    """Yield (message, whether its name is wrong) for each source that does not exist."""
    root = Path(os.path.expandvars(args.root_dir or "")).expanduser()
    with suppress(ConfigError):  # the check of sources reports it
        for source in args.read_files():
            place = Path(source.path)
            folder = root if args.root_dir and place.is_relative_to(root) else place.parent
            if not place.exists() and folder.is_dir():
                text, is_misnamed = _why_not(folder, place.relative_to(folder))
                yield f"data.sources: {text}", is_misnamed
            elif not place.exists():
                yield f"data source {source.name}: {place} is not on this machine; assumed to be good", False


def _why_not(folder: Path, name: Path) -> tuple[str, bool]:
    """Return (message with what the folder has instead of `name`, whether one of those must be meant)."""
    text, inner = f"{folder} has no {name}", Path(*name.parts[1:])
    looked_up = f"{text}: names are looked up in data.root_dir, which is {folder};"
    if name.parts[0] == folder.name and inner.name and (folder / inner).exists():
        return f"{looked_up} write {inner}", True
    if name.exists():
        return f"{looked_up} to name {name}, set data.root_dir=.", True
    there = sorted(path.name for path in entries(folder) if not path.name.startswith(".") and path.suffix != ".html")
    has = f"it has {', '.join(there[:_SHOWN])}{' and more' if there[_SHOWN:] else ''}" if there else "it is empty"
    near = difflib.get_close_matches(str(name), there, 1)
    remedy = f"did you mean {near[0]}?" if near else "correct the name, or prepare the data first"
    return f"{text}, {has}; {remedy}", bool(near)
