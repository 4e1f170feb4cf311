"""Map formats to classes, and open the sources of a config."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs, SyntheticArgs
from lingua.data.blocked_source import BadLines, BlockedSource, DataError, Floor, OpenedData, TextFields
from lingua.data.corpus import SOURCE_NAME, embedded_corpus
from lingua.data.manifest import check_manifest
from lingua.tokenizer import build_tokenizer, tokenizer_fingerprint

# Imported on use, so that `lingua check` loads only what the config needs.
FORMATS = {
    "jsonl": "lingua.data.jsonl:JsonlSource",
    "mmap_jsonl": "lingua.data.jsonl_indexed:IndexedSource",
    "tokens": "lingua.data.token_files:TokenSource",
    "parquet": "lingua.data.parquet:ParquetSource",
    "arrow": "lingua.data.arrow:ArrowSource",
    "pbin": "lingua.data.token_formats:PbinSource",
    "megatron": "lingua.data.token_formats:MegatronSource",
    "npy": "lingua.data.token_formats:NpySource",
    "ds": "lingua.data.token_formats:DsSource",
}
TEXT_SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = {
    ".tokens": "tokens", **TEXT_SUFFIXES, ".pbin": "pbin", ".bin": "megatron", ".npy": "npy", ".ds": "ds"
}  # fmt: skip


def source_class(name: str) -> type[BlockedSource]:
    """Return the class of a format."""
    module, _, class_name = FORMATS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)


def class_of_files(path: Path, *, with_text: bool = False) -> type[BlockedSource]:
    """Return the class that reads a file or folder, judged by file names. `with_text`: ignore token files."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    names = [name for name in names if path.is_file() or not name.startswith(".")]
    kinds = (source_class(kind) for suffix, kind in SUFFIXES.items() if any(name.endswith(suffix) for name in names))
    return next((kind for kind in kinds if not (with_text and kind.holds_tokens)), source_class("jsonl"))


def with_default_sources(args: DataArgs) -> DataArgs:
    """Return the args, with the sample corpus if they name no source."""
    if args.sources:
        return args
    folder = embedded_corpus()
    return args.model_copy(update={"root_dir": str(folder.parent), "sources": {SOURCE_NAME: 1.0}})


def check_manifests(args: DataArgs) -> None:
    """Compare each source with the manifest beside it, by sizes. Raises DataError."""
    for source in args.read_files():
        kind, folder = source_class(source.format), Path(source.path)
        problems = check_manifest(folder, kind.suffix) if not kind.holds_tokens and folder.is_dir() else []
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise DataError(f"source {source.name}: {problems[0]}{more}")


def _open(
    args: DataArgs, source: SourceArgs | SyntheticArgs, n_lanes: int, bad: BadLines, *, looked_at: bool = False
) -> BlockedSource:
    if isinstance(source, SyntheticArgs):
        from lingua.data.synthetic import SyntheticSource

        return SyntheticSource(source, n_lanes, row_tokens=args.row_tokens, bad=bad)
    kind = source_class(source.format)
    if looked_at:
        kind = kind.sequential()  # without making an index
    return kind(
        str(source.name),
        Path(source.path),
        n_lanes,
        weight=source.weight,
        fields=TextFields(source.text_key, args.loss_on),
        bad=bad,
        tokenizer=tokenizer_fingerprint(args.tokenizer),
        vocabulary=build_tokenizer(args.tokenizer) if kind.needs_tokenizer else None,
    )


def held_out_documents(source: SyntheticArgs, row_tokens: int) -> BlockedSource:
    """Open documents of a synthetic source that training never reads."""
    from lingua.data.synthetic import HELD_OUT_FROM, N_HELD_OUT, SyntheticSource

    return SyntheticSource(source, 1, row_tokens=row_tokens, first=HELD_OUT_FROM, documents=N_HELD_OUT)


def _read_sources(args: DataArgs) -> list[SourceArgs | SyntheticArgs]:
    sources = args.read_sources()
    if not sources:
        raise ConfigError("data.sources is empty; name a source")
    return sources


def open_data(args: DataArgs, n_lanes: int) -> OpenedData:
    """Open all sources that are read."""
    bad = BadLines(args.on_bad_line, args.max_bad_fraction)
    sources = [_open(args, source, n_lanes, bad) for source in _read_sources(args)]
    for source in sources:
        if source.row_tokens is not None and source.row_tokens != args.row_tokens:
            what = f"its rows have {source.row_tokens} tokens, and data.seq_len {args.seq_len} with data.n_views"
            remedy = f"set data.seq_len: {source.row_tokens - args.n_views + 1}, or generate it again"
            raise ConfigError(f"source {source.name}: {what} {args.n_views} makes {args.row_tokens}; {remedy}")
    return OpenedData(args, n_lanes, sources, bad)


def estimate_tokens(args: DataArgs) -> int:
    """Estimate the tokens of one pass over all sources. Raises ConfigError, DataError or OSError if one is bad."""
    tokenizer, total = build_tokenizer(args.tokenizer), 0
    for source in _read_sources(args):
        with closing(_open(args, source, 1, BadLines(quiet=True), looked_at=True)) as opened:
            total += opened.estimate_tokens(tokenizer, args.add_bos + args.add_eos)
    return total


def floor_of(args: DataArgs, sources: Sequence[BlockedSource]) -> Floor | None:
    """Return the least loss on a mixture for a model that knows each row's source, or None if it is unknown."""
    found = [(source.weight, source.floor(args.seq_len)) for source in sources]
    total, nats, variance, most = sum(weight for weight, _ in found), 0.0, 0.0, 0.0
    for weight, floor in found:
        if floor is None:
            return None
        share = weight / total
        nats, variance = nats + share * floor.nats, variance + (share * floor.error) ** 2
        most += share * (floor.nats if floor.most is None else floor.most)
    return Floor(nats, math.sqrt(variance), most if most != nats else None)


def loss_floor(args: DataArgs) -> Floor | None:
    """Return the least loss that any model can have on the data of a run, or None if it is unknown."""
    if args.tokenizer.name != "none":
        return None
    with closing(open_data(args, 1)) as data:
        return floor_of(args, data.sources)
