"""Sources that make documents of token ids, and the least loss that any model can have on them.

Document r is a function of (seed, r): its random numbers come from Philox with the seed as key and r in the counter, so
any document can be made without those before it. With `data.tokenizer.name: none` a document fills a row, to the last
label, and the floor of the loss is exactly the entropy of the row's labels, given the tokens before them:

    floor = sum over the S labels of H(label | tokens before it) / S             (nats per token)

    random    log V
    copy      the first `period` tokens are random and the first of them is no label: (period - 1) log V / S
    markov    sum over t of sum over contexts c of P(c before token t) H(row c of the table) / S
    gssm      the mean over documents of the same sum, each H by the forward algorithm (lingua/data/gssm.py)

Training documents are numbered from 0; held-out ones, and those for estimating means, have much larger numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import orjson
import xxhash

from lingua.config.base import build_part
from lingua.config.keys.sources import ENDLESS, CopyArgs, MarkovArgs, RandomArgs, SyntheticArgs
from lingua.data.blocked_source import (
    PLAIN_TEXT,
    BadLines,
    BlockedSource,
    Document,
    Floor,
    Reader,
    SourceFile,
    block_documents,
    fingerprint,
    name_key,
)
from lingua.tokenizer import Tokenizer

HELD_OUT_FROM, AVERAGED_FROM = 1 << 40, 1 << 41
"""Numbers of the first held-out document, and of the first one for estimating means."""
N_HELD_OUT = 512
FILE_DOCUMENTS = 1 << 16
"""Documents per file of `lingua data generate`; more if there would be over 1024 files."""
_MAX_AT_ONCE = 32  # documents that a reader makes together

A = TypeVar("A", bound=SyntheticArgs)


def bits(seed: int, stream: int, number: int) -> np.random.Philox:
    """Return the random bits of a document (stream 0) or of a table (streams 1, 2, ...)."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, stream], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, number], np.uint64))


def uniform(seed: int, first: int, n_documents: int, n: int) -> np.ndarray:
    """Return `n` numbers in [0, 1) for each of some documents. (n_documents, n)"""
    raw = [bits(seed, 0, first + i).random_raw(n) for i in range(n_documents)]
    return (np.array(raw) >> np.uint64(11)) * 2.0**-53


def dirichlet(source: np.random.Philox, alpha: float, n_rows: int, n_columns: int) -> np.ndarray:
    """Draw the rows of a table. No entry is below about 1e-10, so that every logarithm is finite."""
    drawn = np.random.Generator(source).dirichlet(np.full(n_columns, alpha), n_rows)
    drawn = np.maximum(drawn, 1e-10)
    return drawn / drawn.sum(-1, keepdims=True)


def drawn(table: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Draw from each row of cumulative probabilities. table: (n, V), u: (n,)"""
    below = (table <= u[:, None] * table[:, -1:]).sum(-1)
    return np.minimum(below, table.shape[-1] - 1)


def entropy(p: np.ndarray) -> np.ndarray:
    """Return the entropy of distributions along the last axis, in nats."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


class Process(ABC, Generic[A]):
    """Makes documents, and computes the floor of the loss."""

    def __init__(self, args: A, seed: int) -> None:
        self.args, self.seed = args, seed

    @abstractmethod
    def documents(self, first: int, n: int, length: int) -> np.ndarray:
        """Return `n` documents from number `first` on. (n, length)"""

    @abstractmethod
    def floor(self, n_labels: int) -> Floor:
        """Return the least loss of a row with this many labels, per label."""


class Random(Process[RandomArgs]):
    def documents(self, first: int, n: int, length: int) -> np.ndarray:
        return (uniform(self.seed, first, n, length) * self.args.vocab_size).astype(np.int32)

    def floor(self, n_labels: int) -> Floor:
        return Floor(math.log(self.args.vocab_size))


class Copy(Process[CopyArgs]):
    def documents(self, first: int, n: int, length: int) -> np.ndarray:
        period = self.args.period
        once = (uniform(self.seed, first, n, period) * self.args.vocab_size).astype(np.int32)
        return once[:, np.arange(length) % period]

    def floor(self, n_labels: int) -> Floor:
        n_random = min(self.args.period - 1, n_labels)
        return Floor(n_random * math.log(self.args.vocab_size) / n_labels)


class Markov(Process[MarkovArgs]):
    def __init__(self, args: MarkovArgs, seed: int) -> None:
        super().__init__(args, seed)
        self.n_contexts = args.vocab_size**args.order
        self.table = dirichlet(bits(seed, 1, 0), args.alpha, self.n_contexts, args.vocab_size)
        self._sums = self.table.cumsum(-1)

    def documents(self, first: int, n: int, length: int) -> np.ndarray:
        u, out = uniform(self.seed, first, n, length), np.empty((n, length), np.int32)
        context = np.zeros(n, np.int64)
        for t in range(length):
            out[:, t] = drawn(self._sums[context], u[:, t])
            context = (context * self.args.vocab_size + out[:, t]) % self.n_contexts
        return out

    def floor(self, n_labels: int) -> Floor:
        now, of_rows, total = np.zeros(self.n_contexts), entropy(self.table), 0.0
        now[0] = 1.0
        for _ in range(n_labels):  # the first token is not a label: only later ones count
            joint = (now[:, None] * self.table).reshape(-1, self.n_contexts)  # the oldest token is forgotten
            now = joint.sum(0)
            total += float(now @ of_rows)
        return Floor(total / n_labels)


# -- as a source ---------------------------------------------------------------------------------------------------


class SyntheticSource(BlockedSource):
    """Documents made when they are read, in the files that `lingua data generate` would write."""

    unit = "document"
    holds_tokens = True

    def __init__(
        self,
        args: SyntheticArgs,
        n_lanes: int,
        *,
        row_tokens: int,
        bad: BadLines | None = None,
        first: int = 0,
        documents: int | None = None,
        tokenizer: str = "none",
    ) -> None:
        """`args`: from `read_sources`; `first`, `documents`: the range, if not that of training."""
        assert args.seed is not None
        self.args, self.n_tokens, self._first = args, row_tokens, first
        self.row_tokens = row_tokens
        self._n_documents = documents or args.documents or ENDLESS
        self.file_documents = max(FILE_DOCUMENTS, -(-self._n_documents // 1024))
        self.process: Process[Any] = build_part(args, args.seed)
        super().__init__(
            str(args.name), Path(str(args.name)), n_lanes, weight=args.weight, bad=bad, tokenizer=tokenizer
        )

    @classmethod
    def find_files(cls, path: Path) -> list[Path]:
        return [path]

    def open_files(self, paths: Sequence[Path]) -> list[SourceFile]:
        begins = range(0, self._n_documents, self.file_documents)
        files = [
            (Path(f"{self.args.name}.chunk.{i:04d}"), min(self.file_documents, self._n_documents - begin))
            for i, begin in enumerate(begins)
        ]
        return [SourceFile(path, n, name_key(path.name), n) for path, n in files]

    def cut(self, n_lanes: int) -> None:
        self.cut_bytes(block_documents(self.size, n_lanes))

    def edges(self, file: int) -> str:
        """Return a hash for the content of a file: keys, row length, and the source's first documents."""
        keys = self.args.model_dump(mode="json", exclude={"name", "weight", "documents"})
        hasher = xxhash.xxh3_64(orjson.dumps([keys, self.n_tokens, self.number(file, 0)], option=orjson.OPT_SORT_KEYS))
        hasher.update(self._first_documents)
        return hasher.hexdigest()

    @cached_property
    def _first_documents(self) -> bytes:
        return self.ids(0, 4).tobytes()  # detects a numpy that draws other numbers

    @cached_property
    def fingerprint(self) -> str:
        files = ((file.path.name, file.size, self.edges(i)) for i, file in enumerate(self.files))
        return fingerprint(files, PLAIN_TEXT)

    def number(self, file: int, row: int) -> int:
        """Return the number of a file's document."""
        return self._first + file * self.file_documents + row

    def ids(self, number: int, n: int = 1) -> np.ndarray:
        """Make documents. (n, row_tokens)"""
        return self.process.documents(number, n, self.n_tokens).astype(np.int32)

    def estimate_tokens(self, tokenizer: Tokenizer, n_ends: int = 0, n_samples: int = 1) -> int:
        """Return the exact number."""
        return self.size * self.n_tokens

    def floor(self, n_labels: int) -> Floor:
        return self.process.floor(n_labels)

    def reader(self) -> Reader:
        return SyntheticReader(self)


class SyntheticReader:
    """Makes documents on demand: one, then more at once while they are read in order."""

    def __init__(self, source: SyntheticSource) -> None:
        self._source, self._begin, self._ids = source, 0, np.empty((0, 0), np.int32)

    def document(self, block: int, offset: int) -> Document | None:
        source = self._source
        file, first, end = source.block(block)
        row = max(first, offset)
        if row >= end:
            return None
        source.bad.lines += 1
        number = source.number(file, row)
        return Document("", source.files[file].key, row, row + 1, MadeDocument(self, number, number + end - row))

    def ids(self, number: int, end: int) -> np.ndarray:
        """Return the ids of a document; `end`: of its block."""
        place = number - self._begin
        if not 0 <= place < len(self._ids):
            n = min(2 * len(self._ids), _MAX_AT_ONCE, end - number) if place == len(self._ids) else 1
            self._begin, self._ids, place = number, self._source.ids(number, max(1, n)), 0
        return self._ids[place]


class MadeDocument:
    """A document of one piece, made on demand."""

    def __init__(self, reader: SyntheticReader, number: int, end: int) -> None:
        self._reader, self._number, self._end = reader, number, end

    def ids(self, char: int) -> np.ndarray:
        return self._reader.ids(self._number, self._end)

    def next_char(self, char: int) -> int:
        return 0
