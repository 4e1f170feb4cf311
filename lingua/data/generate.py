"""`lingua data generate`: write the documents of synthetic sources to token files that give the same rows.

A run may change from a source with `documents: N` to its files and back at any restart. A file appears atomically, by a
rename, and an existing one is kept, so the same command continues after a kill.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import orjson

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs
from lingua.config.keys.sources import SyntheticArgs
from lingua.console import Progress
from lingua.data.blocked_source import DataError, Floor, whole_file
from lingua.data.manifest import MANIFEST, hash_file
from lingua.data.prepare.worker_pool import each
from lingua.data.synthetic import SyntheticSource
from lingua.data.token_files import facts_of_rows, read_facts, token_file, write_rows
from lingua.files import write_json

_LINES_AT_ONCE = 64


def generate(
    args: DataArgs, out: Path, n_documents: int | None, n_workers: int, progress: Progress, *, jsonl: bool = False
) -> dict[str, Any]:
    """Write all synthetic sources to `out`/<source>; return counts, and the keys to set in a config."""
    made = [source for source in args.read_sources() if isinstance(source, SyntheticArgs)]
    if not made:
        raise ConfigError("data.sources: none makes its documents; name one of type gssm, markov, copy or random")
    lines, floors, counts = [], {}, {"files_made": 0, "files_there_already": 0, "documents": 0, "tokens": 0}
    for one in made:
        documents = n_documents or one.documents
        if documents is None:
            raise ConfigError(f"source {one.name} has no end; say --documents N, or `documents: N` in data.sources")
        source = SyntheticSource(
            one.model_copy(update={"documents": documents}),
            1,
            row_tokens=args.row_tokens,
            tokenizer=f"none:{args.tokenizer.vocab_size}",
        )
        folder, floor = out / source.name, source.process.floor(args.seq_len)
        todo = _todo(source, folder, jsonl=jsonl)
        progress.begin(source.name, sum(source.files[file].size for file in todo) * args.row_tokens)
        task = partial(_write, source, folder, floor, jsonl=jsonl)
        for file, _ in each(todo, task, max(1, min(n_workers, len(todo)))):
            progress.advance(source.files[file].size * args.row_tokens)
        _write_manifest(source, folder, floor, args.seq_len)
        lines.append({"path": str(folder.absolute()), "name": one.name, "weight": one.weight, "format": "tokens"})
        floors[source.name] = floor.facts()
        counts["files_made"] += len(todo)
        counts["files_there_already"] += len(source.files) - len(todo)
        counts["documents"] += source.size
        counts["tokens"] += source.size * args.row_tokens
    tokenizer = {"name": "none", "vocab_size": args.tokenizer.vocab_size}
    return {**counts, "floors": floors, "data.tokenizer": tokenizer, "data.sources": lines}


def _todo(source: SyntheticSource, folder: Path, *, jsonl: bool) -> list[int]:
    """Return the files that are missing or of another source. Raises DataError for files that do not belong here."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {file.path.name for file in source.files}
    for path in sorted([*folder.glob("*.tokens"), *folder.glob("*.jsonl")]):
        if path.stem not in names:
            raise DataError(f"{path}: belongs to no file of source {source.name}; remove it, or choose another --out")
    return [file for file in range(len(source.files)) if not _is_there(source, file, folder, jsonl=jsonl)]


def _is_there(source: SyntheticSource, file: int, folder: Path, *, jsonl: bool) -> bool:
    target, expected = token_file(source.files[file].path, folder), facts_of_rows(source, file)
    try:
        facts = read_facts(target)
    except (FileNotFoundError, DataError):
        return False
    return {key: facts.get(key) for key in expected} == expected and (not jsonl or _jsonl(target).exists())


def _jsonl(tokens: Path) -> Path:
    return tokens.with_suffix(".jsonl")


def _write(source: SyntheticSource, folder: Path, floor: Floor, file: int, *, jsonl: bool) -> None:
    target = token_file(source.files[file].path, folder)
    if not _is_there(source, file, folder, jsonl=False):
        _jsonl(target).unlink(missing_ok=True)  # so that an existing one is never older than its token file
        write_rows(target, source, file, floor)
    if jsonl:
        n = source.files[file].size
        with whole_file(_jsonl(target)) as lines:
            for begin in range(0, n, _LINES_AT_ONCE):
                for ids in source.ids(source.number(file, begin), min(_LINES_AT_ONCE, n - begin)).tolist():
                    lines.write(orjson.dumps({"text": " ".join(map(str, ids))}) + b"\n")


def _write_manifest(source: SyntheticSource, folder: Path, floor: Floor, seq_len: int) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
        for path in sorted([*folder.glob("*.tokens"), *folder.glob("*.jsonl")])
    }
    facts = {"source": source.args.model_dump(mode="json"), "seq_len": seq_len, "documents": source.size}
    write_json(folder / MANIFEST, {**facts, **floor.facts(), "files": files})
