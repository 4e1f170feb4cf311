"""The sources of a config: which they are, where they lie, and the reader of each format.

Promise: what is missing, empty, of the wrong format or not as its manifest says is told before anything starts, with
file and remedy. Cost: one `stat` per file, and its first and last 4 KiB.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import orjson

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs, source_folders, token_sources
from lingua.data.corpus import SOURCE_NAME, embedded_corpus
from lingua.data.jsonl import BadLines, DataError, JsonlSource, Tape, find_files
from lingua.data.jsonl_indexed import IndexedSource
from lingua.data.manifest import check_manifest
from lingua.data.token_files import TokenSource, find_token_files, read_facts
from lingua.tokenizer import build_tokenizer, tokenizer_fingerprint


def filled(args: DataArgs) -> DataArgs:
    """Where the config names no source, the sample corpus is read."""
    if args.sources:
        return args
    folder = embedded_corpus()
    return args.model_copy(update={"root_dir": str(folder.parent), "sources": {SOURCE_NAME: 1.0}})


def source_args(args: DataArgs) -> list[SourceArgs]:
    """Sources that are read, each with its name and path, by name: their order in the config does not matter."""
    if isinstance(args.sources, dict):
        listed = [SourceArgs(path=name, weight=weight, name=name) for name, weight in args.sources.items()]
    else:
        listed = args.sources
    named = [source.model_copy(update={"name": source.name or Path(source.path).name}) for source in listed]
    names = [str(source.name) for source in named]
    twice = sorted(name for name, n in Counter(names).items() if n > 1)
    if twice:
        raise ConfigError(f"data.sources: two sources are called {twice[0]!r}; give each its own `name`")
    read = [source for source in named if source.weight > 0]
    if not read:
        raise ConfigError("data.sources: no source with a weight above 0; nothing to read")
    return sorted(read, key=lambda source: str(source.name))


def source_path(args: DataArgs, source: SourceArgs) -> Path:
    """Where a source lies: relative paths are looked up in data.root_dir."""
    path = Path(os.path.expandvars(source.path)).expanduser()
    return Path(os.path.expandvars(args.root_dir)).expanduser() / path if args.root_dir else path


def source_files(args: DataArgs, source: SourceArgs) -> list[Path]:
    """The files that are read of a source, by name."""
    path = source_path(args, source)
    return find_token_files(path) if source.format == "tokens" else find_files(path)


def check_manifests(args: DataArgs) -> None:
    """Hold each source to the manifest beside it, by sizes. Raises DataError."""
    for source in source_args(args):
        folder = source_path(args, source)
        problems = check_manifest(folder) if source.format != "tokens" and folder.is_dir() else []
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise DataError(f"source {source.name}: {problems[0]}{more}")


def open_sources(args: DataArgs, n_lanes: int) -> tuple[list[Tape], BadLines]:
    """All sources that are read, and the counters that they share."""
    bad = BadLines(args.on_bad_line, args.max_bad_fraction)
    sources: list[Tape] = []
    for source in source_args(args):
        name, path = str(source.name), source_path(args, source)
        if source.format == "tokens":
            fingerprint = tokenizer_fingerprint(args.tokenizer)
            opened: Tape = TokenSource(
                name, path, n_lanes, tokenizer=fingerprint, weight=source.weight, text_key=source.text_key, bad=bad
            )
        else:
            kind = IndexedSource if source.format == "mmap_jsonl" else JsonlSource
            opened = kind(name, path, n_lanes, weight=source.weight, text_key=source.text_key, bad=bad)
        sources.append(opened)
    return sources, bad


def estimate_tokens(args: DataArgs, sample_bytes: int = 1 << 20) -> int:
    """Tokens of one pass over every source: its bytes times the tokens per byte of a sample from its first file.

    The same files give the same number. Raises ConfigError or OSError when a source or the tokenizer is not there.
    """
    tokenizer, total = build_tokenizer(args.tokenizer), 0
    folders = source_folders(args)
    if not folders:
        raise ConfigError("data.sources is empty")
    for name, folder in folders.items():
        if name in token_sources(args):
            total += count_tokens(folder, args.add_bos + args.add_eos)
            continue
        files = find_files(folder)
        n_bytes = n_tokens = 0
        with files[0].open("rb") as file:
            for raw in islice(file, 10_000):
                n_bytes += len(raw)
                try:
                    document = orjson.loads(raw)
                    text = document.get("text", document.get("content", ""))
                    n_tokens += len(tokenizer.encode(text, args.add_bos, args.add_eos))
                except (ValueError, AttributeError, TypeError):
                    continue  # the loader counts bad lines
                if n_bytes >= sample_bytes:
                    break
        total += int(sum(file.stat().st_size for file in files) * n_tokens / max(1, n_bytes))
    return total


def count_tokens(folder: Path, n_ends: int) -> int:
    """Tokens of a folder of token files, as their headers say, with `n_ends` begin and end tokens per document."""
    every = [read_facts(file) for file in find_token_files(folder)]
    return sum(facts["tokens"] + n_ends * facts["documents"] for facts in every)
