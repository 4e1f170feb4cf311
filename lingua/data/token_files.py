"""`format: tokens`: documents tokenized before, by `lingua data tokenize`, in memory-mapped files.

They give the rows of the jsonl files they were made from, to the token: the same blocks (byte ranges of the jsonl
files), the same pieces, the same state, so a run may change from `jsonl` to `tokens` and back at any restart. They hold
no begin and end tokens, so `add_bos` and `add_eos` may change. A tokenizer other than the config's is refused.
Cost: 2 bytes per token (4 for vocabularies above 65,536) and 32 per piece of at most 256 Ki characters, usually one
per document; reading takes no tokenizer time and no memory beyond the page cache.

A file: 4096 bytes of header (magic, then JSON), the ids, and a table of four columns of int64, a row per piece:

    start    byte offset of the document's line in the jsonl file
    end      where the next line begins
    char     first character of the piece; ~char if the tokenizer failed on it
    token    its first id in this file                             (one more row: the number of ids)

Bad lines are left out; the header counts them by kind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash

from lingua.config.base import ConfigError
from lingua.data.blocked_source import (
    BlockedSource,
    DataError,
    Document,
    Reader,
    SourceFile,
    TextFields,
    edges,
    find_files,
    fingerprint,
    name_key,
    whole_file,
)
from lingua.data.jsonl import JsonlSource
from lingua.data.pack import piece_end
from lingua.tokenizer import Tokenizer, TokenizerError

SUFFIX = ".tokens"
VERSION = 1
_MAGIC = b"LINGUATK"
_HEADER_BYTES = 4096
_ALIGN = 8


# -- making them ---------------------------------------------------------------------------------------------------


def token_file(path: Path, folder: Path) -> Path:
    """Path of the token file of a jsonl file."""
    return folder / (path.name + SUFFIX)


def is_made(path: Path, target: Path, tokenizer: Tokenizer, text_key: str | None) -> bool:
    """Whether there is a token file of this jsonl file by this tokenizer."""
    try:
        facts = read_facts(target)
    except (OSError, DataError):
        return False
    size = path.stat().st_size
    now = {"tokenizer": tokenizer.fingerprint, "text_key": text_key, "bytes": size, "edges": edges(path, size)}
    return {key: facts[key] for key in now} == now


def tokenize_file(
    path: Path,
    target: Path,
    tokenizer: Tokenizer,
    text_key: str | None = None,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> dict[str, Any]:
    """Write the token file of a jsonl file; return its header. `advance` is called with the bytes done."""
    source = JsonlSource(path.name, path, 1, fields=TextFields(text_key))
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    columns = [array("q") for _ in range(4)]
    starts, ends, chars, tokens = columns
    n_documents = n_tokens = at = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as out, contextlib.closing(source):
        out.write(bytes(_HEADER_BYTES))
        digest = xxhash.xxh3_64()
        for document in source.documents():
            char, n_documents = 0, n_documents + 1
            while char < len(document.text):
                end = piece_end(document.text, char)
                starts.append(document.start)
                ends.append(document.end)
                tokens.append(n_tokens)
                try:
                    ids = tokenizer.encode(document.text[char:end], False, False, document.before(char))
                    ids = ids.astype(dtype).tobytes()
                    chars.append(char)
                except TokenizerError as error:
                    source.report_untokenizable(document, str(error))
                    ids = b""
                    chars.append(~char)
                digest.update(ids)
                out.write(ids)
                n_tokens, char = n_tokens + len(ids) // dtype.itemsize, end
            advance(document.end - at)
            at = document.end
        advance(source.size - at)
        tokens.append(n_tokens)
        for part in (bytes(-out.tell() % _ALIGN), *(column.tobytes() for column in columns)):
            digest.update(part)
            out.write(part)
        facts = {
            "version": VERSION,
            "file": path.name,
            "bytes": source.size,
            "edges": edges(path, source.size),
            "text_key": text_key,
            "tokenizer": tokenizer.fingerprint,
            "dtype": dtype.str,
            "documents": n_documents,
            "pieces": len(starts),
            "tokens": n_tokens,
            "bad": dict(source.bad.kinds),
            "xxh3_64": digest.hexdigest(),
        }
        out.seek(0)
        out.write((_MAGIC + orjson.dumps(facts)).ljust(_HEADER_BYTES, b"\n"))
        if path.stat().st_size != source.size:
            raise DataError(f"{path}: changed while it was tokenized; wait until it is complete")
    return facts


# -- reading them --------------------------------------------------------------------------------------------------


def read_facts(path: Path) -> dict[str, Any]:
    """Return the header of a token file. Raises DataError if the file is something else or incomplete."""
    with path.open("rb") as file:
        head, size = file.read(_HEADER_BYTES), os.fstat(file.fileno()).st_size
    if not head.startswith(_MAGIC):
        raise DataError(f"{path}: not a token file; make it with `lingua data tokenize`")
    try:
        facts = orjson.loads(head[len(_MAGIC) :])
        if facts["version"] != VERSION:
            raise DataError(f"{path}: of version {facts['version']}, this is {VERSION}; tokenize again")
        expected = _table_at(facts) + 8 * (4 * facts["pieces"] + 1)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise DataError(f"{path}: damaged header; tokenize again") from None
    if size != expected:
        raise DataError(f"{path}: has {size} bytes, its header says {expected}; copy it again or tokenize again")
    return facts


def check_hash(path: Path, facts: dict[str, Any]) -> bool:
    """Whether the content is as written; reads all of it."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        file.seek(_HEADER_BYTES)
        while data := file.read(4 << 20):
            digest.update(data)
    return digest.hexdigest() == facts["xxh3_64"]


def _table_at(facts: dict[str, Any]) -> int:
    ids_end = _HEADER_BYTES + facts["tokens"] * np.dtype(facts["dtype"]).itemsize
    return ids_end + -ids_end % _ALIGN


class MappedTokens(NamedTuple):
    """A token file in memory. T tokens, P pieces."""

    ids: np.ndarray  # (T,) uint16 or uint32
    start: np.ndarray  # (P,) int64, as the next two
    end: np.ndarray
    char: np.ndarray
    token: np.ndarray  # (P + 1,) int64


def map_tokens(path: Path, facts: dict[str, Any]) -> MappedTokens:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    n = facts["pieces"]
    table = np.frombuffer(mapped, np.dtype("<i8"), 4 * n + 1, _table_at(facts))
    ids = np.frombuffer(mapped, np.dtype(facts["dtype"]), facts["tokens"], _HEADER_BYTES)
    return MappedTokens(ids, table[:n], table[n : 2 * n], table[2 * n : 3 * n], table[3 * n :])


class TokenSource(BlockedSource):
    """Token files, in blocks of the jsonl files they were made from."""

    suffix = SUFFIX
    holds_tokens = True

    @classmethod
    def find_files(cls, path: Path) -> list[Path]:
        return find_files(path, SUFFIX, "make them with `lingua data tokenize`")

    @classmethod
    def check_files(cls, path: Path, fields: TextFields) -> None:
        if fields.has_prompt:
            raise ConfigError(f"{path}: token files do not mark prompts; set data.loss_on: all, or name the jsonl")
        for file in cls.find_files(path):
            read_facts(file)

    def open_files(self, paths: Sequence[Path]) -> list[SourceFile]:
        self._facts: list[dict[str, Any]] = []
        self._mapped: list[MappedTokens] = []
        files = []
        for path in paths:
            self.check_files(path, self.fields)
            facts = read_facts(path)
            if facts["tokenizer"] != self.tokenizer:
                raise ConfigError(
                    f"{path}: made by tokenizer {facts['tokenizer']}, and data.tokenizer is {self.tokenizer}; "
                    "set data.tokenizer to the first, or tokenize again"
                )
            if self.fields.text_key not in (None, facts["text_key"]):
                raise ConfigError(
                    f"{path}: made from field {facts['text_key'] or 'text or content'!r}, and text_key of source "
                    f"{self.name} is {self.fields.text_key!r}; drop it, or tokenize again"
                )
            if facts["bytes"] > 0:
                files.append(SourceFile(path, facts["bytes"], name_key(facts["file"]), facts["bytes"]))
                self._facts.append(facts)
                self._mapped.append(map_tokens(path, facts))
        return files

    @property
    def fingerprint(self) -> str:
        """That of the jsonl files, since the rows are the same."""
        files = ((facts["file"], facts["bytes"], facts["edges"]) for facts in self._facts)
        return fingerprint(files, TextFields(self._facts[0]["text_key"]))

    def estimate_tokens(self, tokenizer: Tokenizer, n_ends: int = 0, n_samples: int = 1) -> int:
        """Exact, from the headers."""
        return sum(facts["tokens"] + n_ends * facts["documents"] for facts in self._facts)

    def reader(self) -> Reader:
        return self

    def document(self, block: int, offset: int) -> Document | None:
        file, first, last = self.block(block)
        mapped = self._mapped[file]
        row = int(np.searchsorted(mapped.start, first if offset < 0 else offset))
        if row == len(mapped.start) or mapped.start[row] >= last:
            return None
        self.bad.lines += 1
        start, end = int(mapped.start[row]), int(mapped.end[row])
        return Document("", self.files[file].key, start, end, MappedDocument(mapped, row))


class MappedDocument:
    """The pieces of one document, from its first row of the table on."""

    def __init__(self, mapped: MappedTokens, row: int) -> None:
        self._mapped, self._row, self._char = mapped, row, 0

    def ids(self, char: int) -> np.ndarray:
        mapped, row = self._mapped, self._row_of(char)
        if mapped.char[row] < 0:
            raise TokenizerError("the tokenizer failed when the token file was made")
        return mapped.ids[mapped.token[row] : mapped.token[row + 1]]

    def next_char(self, char: int) -> int:
        row, start = self._row_of(char) + 1, self._mapped.start
        return self._first_char(row) if row < len(start) and start[row] == start[row - 1] else 0

    def _first_char(self, row: int) -> int:
        char = int(self._mapped.char[row])
        return char if char >= 0 else ~char

    def _row_of(self, char: int) -> int:
        while self._char < char:  # pieces are asked for in order, and a document has few
            self._row += 1
            self._char = self._first_char(self._row)
        assert self._char == char, "no piece begins there"
        return self._row
