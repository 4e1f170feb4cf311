"""Held-out rows for the loss inside training: the beginning of each source's `*.val.jsonl`, packed.

Promise: the same rows whatever the number of ranks; whole documents only (the first one is cut when it alone is too
long), so bits per byte are exact for the text that is scored. Reading them moves no lane of the training data.
Cost: reads and tokenizes `max_rows` rows once, at the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs
from lingua.config.keys.eval import EvalValidationArgs
from lingua.data.blocked_source import BadLines
from lingua.data.sources import class_of_files, filled


@dataclass(frozen=True)
class HeldOutText:
    """A file of documents to score."""

    name: str
    file: Path
    text_key: str | None = None


IGNORED = -100  # label of a position that is not scored


class Encoder(Protocol):
    """The part of a tokenizer used here."""

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> Iterable[int]: ...


@dataclass(frozen=True)
class HeldOut:
    """Rows of one source."""

    name: str
    tokens: np.ndarray  # (N, S) int32
    labels: np.ndarray  # (N, S) int32, IGNORED where nothing is scored
    n_bytes: int
    """UTF-8 bytes of the text that the labels stand for."""

    def share(self, dp_rank: int, dp_size: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches (B, S) of rows dp_rank, dp_rank + dp_size, ...; as many, and as large, on every rank."""
        n_rows, seq_len = self.tokens.shape
        per_rank = -(-n_rows // dp_size)
        padded = -(-per_rank // batch_size) * batch_size
        tokens = np.zeros((padded, seq_len), np.int32)
        labels = np.full((padded, seq_len), IGNORED, np.int32)
        mine = slice(dp_rank, n_rows, dp_size)
        count = len(range(n_rows)[mine])
        tokens[:count], labels[:count] = self.tokens[mine], self.labels[mine]
        for start in range(0, padded, batch_size):
            yield tokens[start : start + batch_size], labels[start : start + batch_size]


def held_out_file(source: Path) -> Path | None:
    """`*.val.jsonl` or `*.val.parquet` of a source folder (the first by name), or None."""
    found = [file for suffix in ("jsonl", "parquet") for file in sorted(source.glob(f"*.val.{suffix}"))]
    return next((file for file in found if not file.name.startswith(".")), None)


def read_held_out(
    name: str, file: Path, tokenizer: Encoder, *, max_rows: int, seq_len: int, text_key: str | None = None
) -> HeldOut:
    """Up to max_rows rows of seq_len scored positions. Raises ValueError when the file holds no text."""
    budget = max_rows * seq_len
    stream: list[int] = []
    n_bytes = 0
    for text in read_texts(file, text_key):
        ids = list(tokenizer.encode(text, add_bos=True, add_eos=True))
        if len(stream) + len(ids) > budget + 1:
            if stream:
                break
            text = text[: max(1, (budget - 1) // 4)]  # no tokenizer makes more than 4 tokens of a character
            ids = list(tokenizer.encode(text, add_bos=True, add_eos=False))
        stream += ids
        n_bytes += len(text.encode())
    if not n_bytes:
        raise ValueError(f"{file}: no text to validate on; put documents there or set validation.every=0")
    n_rows = -(-(len(stream) - 1) // seq_len)
    tokens = np.zeros(n_rows * seq_len, np.int32)
    labels = np.full(n_rows * seq_len, IGNORED, np.int32)
    tokens[: len(stream) - 1], labels[: len(stream) - 1] = stream[:-1], stream[1:]
    return HeldOut(name, tokens.reshape(n_rows, seq_len), labels.reshape(n_rows, seq_len), n_bytes)


def read_texts(file: Path, text_key: str | None) -> Iterator[str]:
    """The documents of a file in order; lines without text are passed over."""
    with closing(class_of_files(file)(file.name, file, 1, text_key=text_key, bad=BadLines(quiet=True))) as source:
        for document in source.documents():
            yield document.text


def held_out_texts(data: DataArgs, args: EvalValidationArgs) -> list[HeldOutText]:
    """The files whose loss is measured. Raises ConfigError when one that is named is missing, or there is none."""
    found: list[HeldOutText] = []
    if args.use_val_from_train_src:
        data = filled(data)
        for source in data.read_sources():
            if file := held_out_file(Path(source.path)):
                found.append(HeldOutText(str(source.name), file, source.text_key))
    for name in args.sources:
        path = Path(args.root_dir) / name
        if not path.exists():
            raise ConfigError(f"eval.validation.sources: {path} does not exist; mend the name or validation.root_dir")
        file = (held_out_file(path) or class_of_files(path).find_files(path)[0]) if path.is_dir() else path
        found.append(HeldOutText(Path(name).name.removesuffix(".jsonl").removesuffix(".parquet"), file))
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"eval.validation: two held-out sources are called {twice[0]!r}; rename one")
    if not found:
        raise ConfigError(
            "eval.validation: there is no *.val.jsonl beside the training sources and none is named; "
            "set eval.validation.sources, or eval.validation=null"
        )
    return found
