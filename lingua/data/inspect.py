"""Implement `lingua data inspect|preview|index|tokenize`: describe the data, and make files from it.

The data itself is never changed. Figures that are estimates have `estimated` in their name; an estimate reads 1 MiB of
text per source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs
from lingua.console import Progress
from lingua.data import token_files
from lingua.data.audit import origins
from lingua.data.blocked_source import TextFields
from lingua.data.jsonl import JsonlSource
from lingua.data.jsonl_indexed import SUFFIX, write_index
from lingua.data.pack import Lane
from lingua.data.prepare.worker_pool import each
from lingua.data.quality import Quality
from lingua.data.sources import FORMATS, class_of_files, floor_of, open_data, source_class
from lingua.data.token_formats import TokenFormat, all_ids
from lingua.tokenizer import Tokenizer, build_tokenizer

_N_SAMPLES = 64  # places of a source that an estimate samples


# -- inspect -------------------------------------------------------------------------------------------------------


def inspect_path(path: Path, tokenizer: Tokenizer, progress: Progress, fields: TextFields) -> dict[str, Any]:
    """Count the documents, bytes, tokens and bad lines of a source, and measure the quality of its text."""
    kind = class_of_files(path)
    if kind.holds_tokens and not kind.needs_tokenizer:
        return _inspect_tokens(path, progress)
    source = kind(path.name, path, 1, fields=fields, vocabulary=tokenizer)
    progress.begin("reading", source.n_bytes)
    n_documents = total = done = longest = 0
    quality = Quality()
    for document in source.documents():
        n_documents += 1
        size = len(all_ids(document)) if isinstance(source, TokenFormat) else quality.add(document.text)
        total, longest = total + size, max(longest, size)
        done += document.end - document.start
        if done > source.size // 100:
            progress.advance(source.n_bytes * done // source.size)
            done = 0
    progress.advance(source.n_bytes * done // source.size)
    facts = {"path": str(path), "files": len(source.files), "bytes": source.n_bytes, "documents": n_documents}
    facts["tokenizer"], counts = tokenizer.fingerprint, dict(source.bad.kinds)
    if isinstance(source, TokenFormat):
        return facts | {
            "format": next(name for name in FORMATS if source_class(name) is kind),
            "token_bytes": source.layouts[0].ids.itemsize,
            "tokens": total,
            "longest_tokens": longest,
            "empty_documents": sum(counts.values()),
        }
    estimated = source.estimate_tokens(tokenizer, n_samples=_N_SAMPLES) if n_documents else 0
    source.close()
    return facts | {
        "text_bytes": total,
        "longest_text_bytes": longest,
        "tokens_estimated": total if tokenizer.name == "bytes" else estimated,
        "bad_lines": sum(counts.values()),
        "bad_lines_by_kind": counts,
        "quality": quality.facts(),
    }


def _inspect_tokens(path: Path, progress: Progress) -> dict[str, Any]:
    files = token_files.TokenSource.find_files(path)
    every = [token_files.read_facts(file) for file in files]
    progress.begin("checking", sum(file.stat().st_size for file in files))
    damaged = []
    for file, facts in zip(files, every, strict=True):
        if not token_files.check_hash(file, facts):
            damaged.append(str(file))
        progress.advance(file.stat().st_size)
    bad: Counter[str] = Counter()
    for facts in every:
        bad.update(facts["bad"])
    return {
        "path": str(path),
        "files": len(files),
        "bytes": sum(facts["bytes"] for facts in every),
        "documents": sum(facts["documents"] for facts in every),
        "tokenizer": ", ".join(sorted({facts["tokenizer"] for facts in every})),
        "tokens": sum(facts["tokens"] for facts in every),
        "bad_lines": bad.total(),
        "bad_lines_by_kind": dict(bad),
        "damaged_files": damaged,
    }


def find_document(path: Path, number: int, fields: TextFields, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return one document with its position."""
    kind = class_of_files(path)
    if kind.holds_tokens and not kind.needs_tokenizer:
        raise ConfigError(f"{path}: token files hold no text; give the jsonl they were made from")
    with closing(kind(path.name, path, 1, fields=fields, vocabulary=tokenizer)) as source:
        for n, document in enumerate(source.documents()):
            if n == number:
                file, text = source.path_of(document), document.text
                if isinstance(source, TokenFormat):
                    text = tokenizer.decode(all_ids(document).tolist())
                return {"file": str(file), "offset": document.start, "end": document.end, "text": text}
    raise ConfigError(f"--doc {number}: {path} has {source.bad.lines - source.bad.kinds.total()} documents")


# -- preview -------------------------------------------------------------------------------------------------------


def preview_mixture(
    args: DataArgs,
    n_lanes: int,
    rows_per_step: int,
    *,
    n_steps: int,
    n_steps_of_run: int,
    n_rows_shown: int,
    progress: Progress,
) -> dict[str, Any]:
    """Read the first steps as a run would read them."""
    data = open_data(args, n_lanes)
    sources, tokenizer = data.sources, build_tokenizer(args.tokenizer)
    tokenizer.check_special(args.add_bos, args.add_eos)
    for source in sources:
        source.check()
    n_rows = n_steps * rows_per_step
    lanes = [Lane(lane, data, tokenizer) for lane in range(min(n_lanes, n_rows))]
    n_tokens: Counter[str] = Counter()
    documents: dict[str, set[tuple[int, int]]] = {source.name: set() for source in sources}
    shown = []
    progress.begin("reading", 4 * n_rows * args.seq_len)  # rows are 4 bytes a token
    for turn in range(n_rows):
        row = lanes[turn % n_lanes].next()
        for span in row.spans:
            index = span.position.source
            assert index is not None
            n_tokens[sources[index].name] += span.n_tokens
            documents[sources[index].name].add(span.position.positions[index])
        if turn < n_rows_shown:
            parts = [origin._asdict() for origin in origins(data, tokenizer, row)]
            shown.append({"row": row.number, "documents": parts})
        progress.advance(4 * args.seq_len)
    total, ends = max(1, n_tokens.total()), args.add_bos + args.add_eos
    by_source: dict[str, dict[str, float]] = {}
    for source in sources:
        share = n_tokens[source.name] / total
        epoch_tokens = source.estimate_tokens(tokenizer, ends, _N_SAMPLES)
        run_tokens = share * n_steps_of_run * rows_per_step * args.seq_len
        by_source[source.name] = {
            "weight": source.weight,
            "documents": len(documents[source.name]),
            "tokens": n_tokens[source.name],
            "share_of_tokens": share,
            "tokens_per_epoch_estimated": epoch_tokens,
            "epochs_at_the_end_estimated": run_tokens / max(1, epoch_tokens),
        }
        if floor := source.floor(args.seq_len):
            by_source[source.name] |= floor.facts()
    floor = floor_of(args, sources)
    data.close()
    return {
        "steps": n_steps,
        "steps_of_the_run": n_steps_of_run,
        "rows_per_step": rows_per_step,
        "seq_len": args.seq_len,
        "lanes": n_lanes,
        "bad_lines": data.bad.kinds.total(),
        **({} if floor is None else floor.facts()),
        "sources": by_source,
        "first_rows": shown,
    }


# -- index and tokenize --------------------------------------------------------------------------------------------


def index_files(
    paths: Sequence[Path], out: Path | None, progress: Progress, named: Path | None = None
) -> dict[str, Any]:
    """Write the index of each jsonl file; return {file: {index, lines}}. `named`: the index of a single file."""
    files = [file for path in paths for file in JsonlSource.find_files(path)]
    progress.begin("indexing", sum(file.stat().st_size for file in files))
    made = {}
    for file in files:
        target = named or (out or file.parent) / (file.name + SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        n_lines = write_index(file, target, progress.advance)
        made[str(file)] = {"index": str(target), "lines": n_lines}
    return made


def tokenize_sources(args: DataArgs, out: Path, n_workers: int, progress: Progress) -> dict[str, Any]:
    """Write token files of all sources to `out`/<source>; return counts, and `data.sources` for a config."""
    if args.loss_on != "all":
        raise ConfigError("data.loss_on is completion, and token files do not mark prompts; set data.loss_on: all")
    tokenizer = build_tokenizer(args.tokenizer)
    todo: list[tuple[Path, Path, str | None]] = []
    n_there = 0
    sources = args.read_sources()
    for source in sources:
        if not isinstance(source, SourceArgs):
            raise ConfigError(f"source {source.name} is made and not read; write it with `lingua data generate`")
        kind = source_class(source.format)
        if not issubclass(kind, JsonlSource):
            raise ConfigError(f"source {source.name} has format {source.format}; only jsonl can be tokenized, name it")
        for file in kind.find_files(Path(source.path)):
            target = token_files.token_file(file, out / str(source.name))
            if file.stat().st_size == 0:
                continue
            if token_files.is_made(file, target, tokenizer, source.text_key):
                n_there += 1
            else:
                todo.append((file, target, source.text_key))

    def task(number: int) -> dict[str, Any]:
        file, target, text_key = todo[number]
        return token_files.tokenize_file(file, target, tokenizer, text_key)

    progress.begin("tokenizing", sum(file.stat().st_size for file, _, _ in todo))
    n_tokens = n_documents = 0
    bad: Counter[str] = Counter()
    for number, facts in each(list(range(len(todo))), task, max(1, min(n_workers, len(todo)))):
        n_tokens, n_documents = n_tokens + facts["tokens"], n_documents + facts["documents"]
        bad.update(facts["bad"])
        progress.advance(todo[number][0].stat().st_size)
    lines = [
        {"path": str((out / str(s.name)).absolute()), "name": s.name, "weight": s.weight, "format": "tokens"}
        for s in sources
    ]
    return {
        "files_made": len(todo),
        "files_there_already": n_there,
        "documents": n_documents,
        "tokens": n_tokens,
        "bad_lines_by_kind": dict(bad),
        "tokenizer": tokenizer.fingerprint,
        "data.sources": lines,
    }
