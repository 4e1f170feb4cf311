"""What data is like and what will be made of it: the rooms behind `lingua data inspect|preview|index|tokenize`.

Promise: nothing of the data is changed; what is written appears whole or not at all. Figures that are estimates have
`estimated` in their name. Cost: one pass over what is asked about; estimates read 1 MiB of text per source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs
from lingua.console import Progress
from lingua.data import token_files
from lingua.data.audit import open_lane, origins
from lingua.data.jsonl import BadLines, JsonlSource, Tape, find_files
from lingua.data.jsonl_indexed import SUFFIX, write_index
from lingua.data.mix import Document
from lingua.data.prepare.worker_pool import each
from lingua.data.sources import open_sources, source_args, source_files
from lingua.tokenizer import Tokenizer, TokenizerError, build_tokenizer

_SAMPLE_BYTES = 1 << 20


def in_order(source: Tape) -> Iterator[Document]:
    """All documents of a source, in the order of its files."""
    reader = source.reader()
    for block in range(source.n_blocks):
        offset = -1
        while (document := reader.document(block, offset)) is not None:
            yield document
            offset = document.end


def estimate_tokens(source: Tape, tokenizer: Tokenizer, n_ends: int = 0) -> int:
    """Tokens of one epoch: bytes times tokens per byte of documents taken from all over the source."""
    if isinstance(source, token_files.TokenSource):
        return source.n_tokens + n_ends * source.n_documents
    reader, n_bytes, n_tokens = source.reader(), 0, 0
    n_probes = min(source.n_blocks, 64)
    for probe in range(n_probes):
        block, offset, enough = probe * source.n_blocks // n_probes, -1, n_bytes + _SAMPLE_BYTES // n_probes
        while n_bytes < enough and (document := reader.document(block, offset)) is not None:
            offset = document.end
            n_bytes += document.end - document.start
            try:
                n_tokens += len(tokenizer.encode(document.text[:_SAMPLE_BYTES], False, False)) + n_ends
            except TokenizerError:
                continue
    return source.size_bytes * n_tokens // max(1, n_bytes)


# -- inspect -------------------------------------------------------------------------------------------------------


def _is_tokens(path: Path) -> bool:
    return path.name.endswith(token_files.SUFFIX) or (path.is_dir() and any(path.glob(f"*{token_files.SUFFIX}")))


def inspect_path(path: Path, tokenizer: Tokenizer, text_key: str | None, progress: Progress) -> dict[str, Any]:
    """Documents, bytes, tokens and bad lines of a source."""
    if _is_tokens(path):
        return _inspect_tokens(path, progress)
    bad = BadLines()
    source = JsonlSource(path.name, path, 1, text_key=text_key, bad=bad)
    progress.begin("reading", source.size_bytes)
    n_documents = text_bytes = done = longest = 0
    for document in in_order(source):
        n_documents += 1
        size = len(document.text.encode())
        text_bytes, longest = text_bytes + size, max(longest, size)
        done += document.end - document.start
        if done > 16 << 20:
            progress.advance(done)
            done = 0
    progress.advance(done)
    counts = dict(bad.kinds)
    estimated = estimate_tokens(source, tokenizer) if n_documents else 0
    source.close()
    return {
        "path": str(path),
        "files": len(source.files),
        "bytes": source.size_bytes,
        "documents": n_documents,
        "text_bytes": text_bytes,
        "longest_text_bytes": longest,
        "tokenizer": tokenizer.fingerprint,
        "tokens_estimated": text_bytes if tokenizer.name == "bytes" else estimated,
        "bad_lines": sum(counts.values()),
        "bad_lines_by_kind": counts,
    }


def _inspect_tokens(path: Path, progress: Progress) -> dict[str, Any]:
    files = token_files.find_token_files(path)
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


def find_document(path: Path, number: int, text_key: str | None) -> dict[str, Any]:
    """One document with its place."""
    if _is_tokens(path):
        raise ConfigError(f"{path}: token files hold no text; give the jsonl they were made from")
    source = JsonlSource(path.name, path, 1, text_key=text_key)
    for n, document in enumerate(in_order(source)):
        if n == number:
            file = source.path_of(document.file_key)
            return {"file": str(file), "offset": document.start, "end": document.end, "text": document.text}
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
    """The first steps, read as a run would read them."""
    sources, bad = open_sources(args, n_lanes)
    tokenizer = build_tokenizer(args.tokenizer)
    tokenizer.check_special(args.add_bos, args.add_eos)
    for source in sources:
        source.check()
    n_rows = n_steps * rows_per_step
    lanes = [open_lane(args, n_lanes, sources, tokenizer, lane) for lane in range(min(n_lanes, n_rows))]
    n_tokens: Counter[str] = Counter()
    documents: dict[str, set[tuple[int, int]]] = {source.name: set() for source in sources}
    shown = []
    progress.begin("reading", 4 * n_rows * args.seq_len)  # rows are 4 bytes a token
    for turn in range(n_rows):
        row = lanes[turn % n_lanes].next()
        for part in row.parts:
            assert part.mark.source is not None
            name = sources[part.mark.source].name
            n_tokens[name] += part.n_tokens
            documents[name].add(part.mark.places[part.mark.source])
        if turn < n_rows_shown:
            parts = [origin._asdict() for origin in origins(args, sources, tokenizer, row)]
            shown.append({"row": row.number, "documents": parts})
        progress.advance(4 * args.seq_len)
    total, ends = max(1, n_tokens.total()), args.add_bos + args.add_eos
    by_source = {}
    for source in sources:
        share, epoch_tokens = n_tokens[source.name] / total, estimate_tokens(source, tokenizer, ends)
        run_tokens = share * n_steps_of_run * rows_per_step * args.seq_len
        by_source[source.name] = {
            "weight": source.weight,
            "documents": len(documents[source.name]),
            "tokens": n_tokens[source.name],
            "share_of_tokens": share,
            "tokens_per_epoch_estimated": epoch_tokens,
            "epochs_at_the_end_estimated": run_tokens / max(1, epoch_tokens),
        }
    for source in sources:
        source.close()
    return {
        "steps": n_steps,
        "steps_of_the_run": n_steps_of_run,
        "rows_per_step": rows_per_step,
        "seq_len": args.seq_len,
        "lanes": n_lanes,
        "bad_lines": bad.kinds.total(),
        "sources": by_source,
        "first_rows": shown,
    }


# -- index and tokenize --------------------------------------------------------------------------------------------


def index_files(paths: Sequence[Path], out: Path | None, progress: Progress) -> dict[str, Any]:
    """Write the index of each jsonl file; {file: {index, lines}}."""
    files = [file for path in paths for file in find_files(path)]
    progress.begin("indexing", sum(file.stat().st_size for file in files))
    made = {}
    for file in files:
        folder = out or file.parent
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / (file.name + SUFFIX)
        n_lines = write_index(file, target, progress.advance)
        made[str(file)] = {"index": str(target), "lines": n_lines}
    return made


def tokenize_sources(args: DataArgs, out: Path, n_workers: int, progress: Progress) -> dict[str, Any]:
    """Token files of all sources, in `out`/<source>; a table of what was made and the lines for a config."""
    tokenizer = build_tokenizer(args.tokenizer)
    todo: list[tuple[Path, Path, str | None]] = []
    n_there = 0
    for source in source_args(args):
        if source.format == "tokens":
            raise ConfigError(f"source {source.name} is made of token files already; name the jsonl")
        for file in source_files(args, source):
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
        for s in source_args(args)
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
