"""Find held-out documents, and make the rows of tokens in which they are scored.

Rows are `packed`, as training packs them, or hold one document each. Either way documents are tokenized as in training,
bytes are counted for exactly the text that is scored, and the position in the training data does not change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SyntheticArgs
from lingua.config.keys.eval import HeldOutArgs
from lingua.data.blocked_source import PLAIN_TEXT, BadLines, BlockedSource, Document, TextFields
from lingua.data.pack import IGNORED, ids_of, next_piece
from lingua.data.sources import TEXT_SUFFIXES, class_of_files, held_out_documents, with_default_sources
from lingua.tokenizer import Tokenizer, TokenizerError

BLOCK_TOKENS = 1 << 20  # documents in memory at once


# -- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutText:
    """A file of documents to score."""

    name: str
    file: Path
    """For a synthetic source: its type."""
    fields: TextFields = PLAIN_TEXT
    made: SyntheticArgs | None = None
    row_tokens: int = 0

    def open(self) -> closing[BlockedSource]:
        """Open the file; all bad lines are skipped and counted, and the first is logged."""
        bad = BadLines(max_fraction=math.inf)
        if self.made is not None:
            return closing(held_out_documents(self.made, self.row_tokens))
        kind = class_of_files(self.file)
        return closing(kind(self.file.name, self.file, 1, fields=self.fields, bad=bad))


def held_out_file(source: Path) -> Path | None:
    """Return the first `*.val.jsonl`, or else `*.val.parquet` and so on, of a source folder by name, or None."""
    found = [file for suffix in TEXT_SUFFIXES for file in sorted(source.glob(f"*.val{suffix}"))]
    return next((file for file in found if not file.name.startswith(".")), None)


def texts_beside_sources(data: DataArgs) -> tuple[list[HeldOutText], list[str]]:
    """Return the held-out text of each training source, and the names of the sources that have none."""
    found, without = [], []
    for source in data.read_sources():
        if isinstance(source, SyntheticArgs):
            found.append(HeldOutText(str(source.name), Path(source.type), PLAIN_TEXT, source, data.row_tokens))
        elif file := held_out_file(Path(source.path)):
            found.append(HeldOutText(str(source.name), file, TextFields(source.text_key, data.loss_on)))
        else:
            without.append(str(source.name))
    return found, without


def held_out_texts(data: DataArgs, args: HeldOutArgs) -> list[HeldOutText]:
    """Return the files to score. Raises ConfigError if a named one is missing, or if there is none."""
    found = texts_beside_sources(with_default_sources(data))[0] if args.use_val_from_train_src else []
    for name in args.sources:
        path = Path(args.root_dir) / name
        if not path.exists():
            raise ConfigError(
                f"eval: held-out source {path} does not exist; fix `sources` or `root_dir` where it is named, in "
                "eval.validation or eval.measures"
            )
        file = (
            (held_out_file(path) or class_of_files(path, with_text=True).find_files(path)[0]) if path.is_dir() else path
        )
        short = Path(name).stem if Path(name).suffix in TEXT_SUFFIXES else Path(name).name
        found.append(HeldOutText(short, file, TextFields(loss_on=data.loss_on)))
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"eval: two held-out sources are called {twice[0]!r}; rename one")
    if not found:
        raise ConfigError(
            "eval.validation: there is no *.val.jsonl beside the training sources and none is named; "
            "set eval.validation.sources, or eval.validation=null"
        )
    return found


# -- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wording:
    """Turns a document into tokens, as in training."""

    tokenizer: Tokenizer
    add_bos: bool = True
    add_eos: bool = True

    @property
    def begins(self) -> bool:
        """Whether each document begins with a begin token."""
        return self.add_bos and self.tokenizer.bos_id is not None

    @property
    def prefix(self) -> int | None:
        """The token before a document's text: the begin token, else the end token of the document before."""
        return self.tokenizer.bos_id if self.begins else self.tokenizer.eos_id

    def ids(
        self, document: Document, failed: Callable[[Document, str], object], *, whole: bool = True
    ) -> tuple[list[int], int]:
        """Return a document's tokens with its prefix, and the bytes of the text that they score (of ids: 1 per label).

        Tokens of the prompt, and of the prefix before it, are given as ~id: they are not scored. Without a prefix the
        first token is not scored. As in training, the document is tokenized in pieces; one on which the tokenizer fails
        is passed to `failed` and left out. `whole`: add the end token, if training does.
        """
        if document.encoded is not None:
            made = document.encoded.ids(0).tolist()
            return made, len(made) - 1
        found = [] if self.prefix is None else [self.prefix if document.prompt_chars == 0 else ~self.prefix]
        n_bytes, start, more = 0, 0, True
        while more:
            end = next_piece(document, start)
            text, is_prompt = document.text[start : end or None], start < document.prompt_chars
            try:
                ids = self.tokenizer.encode(text, False, False, document.before(start)).tolist()
                found += [~token for token in ids] if is_prompt else ids
                n_bytes += 0 if is_prompt else len(text.encode())
            except TokenizerError as error:
                failed(document, str(error))
            start, more = end, end > 0
        if whole and self.add_eos and self.tokenizer.eos_id is not None:
            found.append(self.tokenizer.eos_id)
        return found, n_bytes


class ScoredRow(NamedTuple):
    """Tokens of which those from `first` on (at least 1) are scored, except prompts (~id)."""

    ids: Sequence[int]
    first: int = 1


@dataclass
class HeldOut:
    """Rows to score."""

    name: str
    rows: list[ScoredRow]
    n_bytes: int = 0
    """UTF-8 bytes of the scored text."""
    n_documents: int = 0
    n_skipped: int = 0
    """Lines without a document, and documents or parts of them on which the tokenizer failed."""


def packed(text: HeldOutText, wording: Wording, *, max_rows: int, seq_len: int, row_step: int | None = None) -> HeldOut:
    """Pack the first documents, uncut, into at most `max_rows` rows that score `seq_len` tokens each.

    `row_step`: as in DataArgs. A first document that alone is too long is cut. Raises ValueError without any text.
    """
    step = row_step or seq_len
    budget, stream = max_rows * step, list[int]()
    found = HeldOut(text.name, [])
    with text.open() as source:
        for document in source.documents():
            ids, n_bytes = wording.ids(document, source.report_untokenizable)
            if not n_bytes:
                continue
            if stream and not wording.begins and wording.prefix is not None:
                ids = ids[1:]  # the stream already ends with this end token
            if len(stream) + len(ids) > budget + 1:
                if stream:
                    break
                document = _cut(document, max(1, (budget - 1) // 4))
                ids, n_bytes = wording.ids(document, lambda *failure: None, whole=False)  # it is counted already
                if not n_bytes:
                    continue
            stream += ids
            found.n_bytes += n_bytes
            found.n_documents += 1
        found.n_skipped = source.bad.kinds.total()
    if not found.n_bytes:
        raise ValueError(f"{text.file}: no text to validate on; put documents there or set validation.every=0")
    found.rows = [ScoredRow(stream[start : start + seq_len + 1]) for start in range(0, len(stream) - 1, step)]
    return found


def _cut(document: Document, room: int) -> Document:
    """Keep text that fits into 4 * room tokens: no tokenizer makes more than 4 tokens of a character."""
    prompt, text = document.text[: document.prompt_chars], document.text[document.prompt_chars :]
    prompt = prompt[max(0, len(prompt) - room // 2) :]
    return document._replace(text=prompt + text[: max(1, room - len(prompt))], prompt_chars=len(prompt))


def by_document(
    text: HeldOutText,
    wording: Wording,
    *,
    context: int,
    stride: int | None = None,
    max_documents: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[HeldOut]:
    """Yield the rows of whole documents, some documents at a time. `share`: (rank, ranks) that share them.

    A window over `context` tokens moves by `stride` (half the context by default) along a longer document.
    """
    step, (rank, n_ranks) = min(stride or max(1, context // 2), context), share
    found, n_tokens = HeldOut(text.name, []), 0
    with text.open() as source:
        for number, document in enumerate(itertools.islice(source.documents(), max_documents)):
            if number % n_ranks != rank:
                continue
            ids, n_bytes = wording.ids(document, source.report_untokenizable)
            if not n_bytes:
                continue
            for start, end, first in windows(len(ids), context, step):
                if any(token >= 0 for token in ids[start + first : end]):
                    found.rows.append(ScoredRow(ids[start:end], first))
            found.n_bytes += n_bytes
            found.n_documents += 1
            n_tokens += len(ids)
            if n_tokens >= BLOCK_TOKENS:
                yield found
                found, n_tokens = HeldOut(text.name, []), 0
        failed = source.bad.kinds["tokenizer"]  # in this rank's share; all ranks see all other bad lines
        found.n_skipped = failed if rank else source.bad.kinds.total()
    yield found


def windows(n_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first): rows of at most context + 1 tokens that score tokens 1 to n_tokens - 1 once each.

    Tokens after the first row are scored in steps of `stride`, with at least context + 1 - stride tokens before them.
    """
    assert 1 <= stride <= context
    end = min(n_tokens, context + 1)
    if n_tokens > 1:
        yield 0, end, 1
    while end < n_tokens:
        scored_from, end = end, min(n_tokens, end + stride)
        start = max(0, end - context - 1)
        yield start, end, scored_from - start


def padded(rows: Sequence[ScoredRow], n_rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and labels (n_rows, width); labels are IGNORED where nothing is scored."""
    tokens, labels = np.zeros((n_rows, width), np.int64), np.full((n_rows, width), IGNORED, np.int64)
    for number, (ids, first) in enumerate(rows):
        row = np.asarray(ids)
        tokens[number, : len(row) - 1] = ids_of(row[:-1])
        labels[number, first - 1 : len(row) - 1] = np.where(row[first:] < 0, IGNORED, row[first:])
    return tokens, labels


def equal_shares(
    rows: Sequence[ScoredRow], seq_len: int, rank: int, n_ranks: int, batch_size: int
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield batches (batch_size, seq_len) of rows rank, rank + n_ranks, ...; the same number on every rank."""
    mine, n_batches = rows[rank::n_ranks], -(-len(rows) // (n_ranks * batch_size))
    for start in range(0, n_batches * batch_size, batch_size):
        yield padded(mine[start : start + batch_size], batch_size, seq_len)
