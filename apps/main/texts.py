"""The held-out files that an evaluation scores. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lingua.args import ConfigError
from lingua.data.args import DataArgs
from lingua.data.heldout import held_out_file
from lingua.data.jsonl import find_files
from lingua.data.sources import filled
from lingua.evalargs import EvalValidationArgs

from .check import source_folders


@dataclass(frozen=True)
class HeldOutText:
    """A file of documents to score."""

    name: str
    file: Path
    text_key: str | None = None


def held_out_texts(data: DataArgs, args: EvalValidationArgs) -> list[HeldOutText]:
    """The files whose loss is measured. Raises ConfigError when one that is named is missing, or there is none."""
    found: list[HeldOutText] = []
    if args.use_val_from_train_src:
        data = filled(data)
        keys = {} if isinstance(data.sources, dict) else {s.name or Path(s.path).name: s.text_key for s in data.sources}
        for name, folder in source_folders(data).items():
            if file := held_out_file(folder):
                found.append(HeldOutText(name, file, keys.get(name)))
    for name in args.sources:
        path = Path(args.root_dir) / name
        if not path.exists():
            raise ConfigError(f"eval.validation.sources: {path} does not exist; mend the name or validation.root_dir")
        files = [held_out_file(path) or find_files(path)[0]] if path.is_dir() else [path]
        found += [HeldOutText(Path(name).name.removesuffix(".jsonl"), file) for file in files]
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"eval.validation: two held-out sources are called {twice[0]!r}; rename one")
    if not found:
        raise ConfigError(
            "eval.validation: there is no *.val.jsonl beside the training sources and none is named; "
            "set eval.validation.sources, or eval.validation=null"
        )
    return found
