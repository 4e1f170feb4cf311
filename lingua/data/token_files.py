"""`format: tokens`: memory-mapped files of documents that `lingua data tokenize` has tokenized.

They give exactly the rows of the jsonl files they were made from: the same blocks (byte ranges of the jsonl files), the
same pieces, the same state, so a run may change from `jsonl` to `tokens` and back at any restart. They hold no begin
and end tokens, so `add_bos` and `add_eos` may change. A tokenizer other than the config's is refused.
Cost: 2 bytes per token (4 for vocabularies above 65,536) and 32 per piece of at most 256 Ki characters, usually one
per document; reading takes no tokenizer time and no memory beyond the page cache.

A file: 4096 bytes of header (magic, then JSON), the ids, and a table of four columns of int64, a row per piece:

    start    byte offset of the document's line in the jsonl file
    end      where the next line begins
    char     first character of the piece; ~char if the tokenizer failed on it
    token    its first id in this file                             (one more row: the number of ids)

`lingua data generate` writes such files too: a document is a row, positions are documents, and the header holds the
floor of the loss. Bad lines are left out; the header counts them by kind. If the files of a source take at most 64 MiB
together, they are compared with their hash when they are opened; impossible ids and rows of the table are refused when
they are read.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import orjson
import xxhash

from lingua.config.base import ConfigError
from lingua.data.blocked_source import (
    HASHED_BYTES,
    BlockedSource,
    DataError,
    Document,
    Floor,
    Reader,
    SourceFile,
    TextFields,
    block_documents,
    content_hash,
    edges,
    find_files,
    fingerprint,
    name_key,
    whole_file,
)
from lingua.data.jsonl import JsonlSource
from lingua.data.pack import piece_end
from lingua.data.synthetic import SyntheticSource
from lingua.tokenizer import Tokenizer, TokenizerError

SUFFIX = ".tokens"
VERSION = 1
_MAGIC = b"LINGUATK"
_HEADER_BYTES = 4096
_ALIGN = 8
_ROWS_AT_ONCE = 64
_FACTS = dict.fromkeys(("version", "bytes", "documents", "pieces", "tokens"), int) | {"bad": dict}
_FACTS |= dict.fromkeys(("file", "edges", "tokenizer", "dtype", "xxh3_64"), str)


# -- making them ---------------------------------------------------------------------------------------------------


def token_file(path: Path, folder: Path) -> Path:
    return folder / (path.name + SUFFIX)


def is_made(path: Path, target: Path, tokenizer: Tokenizer, text_key: str | None) -> bool:
    """Return whether `target` is a token file of this jsonl file by this tokenizer."""
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
        facts = {
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
        }
        facts = write_end(out, digest, columns, facts)
        if path.stat().st_size != source.size:
            raise DataError(f"{path}: changed while it was tokenized; wait until it is complete")
    return facts


def write_end(out: IO[bytes], digest: xxhash.xxh3_64, columns: Sequence[Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Write the table and the header of a token file whose ids are written; return the header."""
    for part in (bytes(-out.tell() % _ALIGN), *(column.tobytes() for column in columns)):
        digest.update(part)
        out.write(part)
    facts = {"version": VERSION, **facts, "xxh3_64": digest.hexdigest()}
    out.seek(0)
    out.write((_MAGIC + orjson.dumps(facts)).ljust(_HEADER_BYTES, b"\n"))
    return facts


def write_rows(target: Path, source: SyntheticSource, file: int, floor: Floor) -> dict[str, Any]:
    """Write the token file of a file of a synthetic source; return its header."""
    n, dtype = source.files[file].size, np.dtype("<u2" if source.args.n_ids <= 1 << 16 else "<u4")
    digest, rows = xxhash.xxh3_64(), np.arange(n + 1, dtype="<i8")
    with whole_file(target) as out:
        out.write(bytes(_HEADER_BYTES))
        for begin in range(0, n, _ROWS_AT_ONCE):
            ids = source.ids(source.number(file, begin), min(_ROWS_AT_ONCE, n - begin)).astype(dtype).tobytes()
            digest.update(ids)
            out.write(ids)
        facts = {
            **facts_of_rows(source, file),
            "text_key": None,
            "dtype": dtype.str,
            "documents": n,
            "pieces": n,
            "tokens": n * source.n_tokens,
            "bad": {},
            "floor": list(floor),
        }
        return write_end(out, digest, (rows[:-1], rows[1:], 0 * rows[:-1], rows * source.n_tokens), facts)


def facts_of_rows(source: SyntheticSource, file: int) -> dict[str, Any]:
    """Return the facts by which a token file is recognized as that of a source's file."""
    return {
        "file": source.files[file].path.name,
        "bytes": source.files[file].size,
        "edges": source.edges(file),
        "tokenizer": source.tokenizer,
        "row_tokens": source.row_tokens,
    }


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
        if any(type(facts[key]) is not kind for key, kind in _FACTS.items()) or facts["dtype"] not in ("<u2", "<u4"):
            raise TypeError
        expected = _table_at(facts) + 8 * (4 * facts["pieces"] + 1)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise DataError(f"{path}: damaged header; tokenize again") from None
    if size != expected or min(facts["pieces"], facts["tokens"], facts["bytes"]) < 0:
        raise DataError(f"{path}: has {size} bytes, its header says {expected}; copy it again or tokenize again")
    return facts


def check_hash(path: Path, facts: dict[str, Any]) -> bool:
    """Return whether the content matches its hash; reads all of it."""
    return content_hash(path, _HEADER_BYTES) == facts["xxh3_64"]


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
    path: Path
    n_bytes: int  # of the jsonl file

    def first_char(self, row: int) -> int:
        char = int(self.char[row])
        return char if char >= 0 else ~char

    def is_begun(self, row: int) -> bool:
        """Return whether the row continues the document of the previous row."""
        return row > 0 and bool(self.start[row] == self.start[row - 1])

    def check(self, row: int) -> None:
        """Raise DataError if this row of the table or the previous one, which misleads searches, is impossible."""
        begin, chars = max(row - 2, 0), [-1]
        starts, ends = self.start[begin : row + 1].tolist(), self.end[begin : row + 1].tolist()
        tokens = self.token[begin : row + 2].tolist()
        for i, char in enumerate(self.char[begin : row + 1].tolist()):
            chars.append(char ^ char >> 63)
            is_right = 0 <= starts[i] < ends[i] <= self.n_bytes and chars[-1] < self.n_bytes
            is_right &= 0 <= tokens[i] <= tokens[i + 1] <= len(self.ids)
            if i and starts[i] == starts[i - 1]:
                is_right &= ends[i] == ends[i - 1] and chars[-1] > chars[-2]
            elif i or begin == 0:
                is_right &= chars[-1] == 0 and (i == 0 or starts[i] >= ends[i - 1])
            if not is_right:
                raise DataError(f"{self.path}: damaged (row {begin + i} of its table); copy it again or tokenize again")


def map_tokens(path: Path, facts: dict[str, Any]) -> MappedTokens:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    n = facts["pieces"]
    table = np.frombuffer(mapped, np.dtype("<i8"), 4 * n + 1, _table_at(facts))
    ids = np.frombuffer(mapped, np.dtype(facts["dtype"]), facts["tokens"], _HEADER_BYTES)
    columns = table[:n], table[n : 2 * n], table[2 * n : 3 * n], table[3 * n :]
    return MappedTokens(ids, *columns, path, facts["bytes"])


def _refuse_other(path: Path, facts: dict[str, Any], tokenizer: str) -> None:
    if facts["tokenizer"] != tokenizer:
        raise ConfigError(
            f"{path}: made by tokenizer {facts['tokenizer']}, and data.tokenizer is {tokenizer}; "
            "set data.tokenizer to the first, or tokenize again"
        )


def _refuse_prompts(path: Path, fields: TextFields) -> None:
    if fields.has_prompt:
        raise ConfigError(f"{path}: token files do not mark prompts; set data.loss_on: all, or name the jsonl")


class TokenSource(BlockedSource):
    """Token files, in blocks of the jsonl files they were made from."""

    suffix = SUFFIX
    holds_tokens = True

    @classmethod
    def find_files(cls, path: Path) -> list[Path]:
        return find_files(path, SUFFIX, "make them with `lingua data tokenize`")

    @classmethod
    def check_files(cls, path: Path, fields: TextFields) -> None:
        _refuse_prompts(path, fields)
        if sum(read_facts(file)["documents"] for file in cls.find_files(path)) == 0:
            raise DataError(f"{path}: no document in these token files; tokenize other data, or fix data.sources")

    @classmethod
    def check_tokenizer(cls, path: Path, tokenizer: Tokenizer) -> None:
        for file in cls.find_files(path):
            _refuse_other(file, read_facts(file), tokenizer.fingerprint)

    def open_files(self, paths: Sequence[Path]) -> list[SourceFile]:
        self._facts: list[dict[str, Any]] = []
        self._mapped: list[MappedTokens] = []
        files = []
        for path in paths:
            _refuse_prompts(path, self.fields)
            facts = read_facts(path)
            _refuse_other(path, facts, self.tokenizer)
            if self.fields.text_key not in (None, facts["text_key"]):
                raise ConfigError(
                    f"{path}: made from field {facts['text_key'] or 'text or content'!r}, and text_key of source "
                    f"{self.name} is {self.fields.text_key!r}; drop it, or tokenize again"
                )
            if path.stat().st_size <= HASHED_BYTES // len(paths) and not check_hash(path, facts):
                raise DataError(f"{path}: damaged (other hash); copy it again or tokenize again")
            if facts["bytes"] > 0:
                files.append(SourceFile(path, facts["bytes"], name_key(facts["file"]), facts["bytes"]))
                self._facts.append(facts)
                self._mapped.append(map_tokens(path, facts))
        return files

    def cut(self, n_lanes: int) -> None:
        self.row_tokens = self._facts[0].get("row_tokens")
        if self.row_tokens is None:
            super().cut(n_lanes)
        else:
            self.cut_bytes(block_documents(self.size, n_lanes))

    def floor(self, n_labels: int) -> Floor | None:
        return Floor(*self._facts[0]["floor"]) if self.row_tokens is not None else None

    @property
    def fingerprint(self) -> str:
        """Equals that of the jsonl files, since the rows are the same."""
        files = ((facts["file"], facts["bytes"], facts["edges"]) for facts in self._facts)
        return fingerprint(files, TextFields(self._facts[0]["text_key"]))

    def estimate_tokens(self, tokenizer: Tokenizer, n_ends: int = 0, n_samples: int = 1) -> int:
        """Return the exact number, from the headers."""
        return sum(facts["tokens"] + n_ends * facts["documents"] for facts in self._facts)

    def wrong_bytes(self) -> Iterator[str]:
        for file, facts in zip(self.files, self._facts, strict=True):
            if not check_hash(file.path, facts):
                yield f"{file.path} has other bytes than its header says; copy it again or tokenize again"

    def reader(self) -> Reader:
        return self

    def document(self, block: int, offset: int) -> Document | None:
        file, first, last = self.block(block)
        mapped = self._mapped[file]
        row = int(np.searchsorted(mapped.start, first if offset < 0 else offset))
        mapped.check(row)
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
        mapped, row = self._mapped, self._row_of(char) + 1
        if row == len(mapped.start) or not mapped.is_begun(row):
            return 0
        mapped.check(row)
        return mapped.first_char(row)

    def _row_of(self, char: int) -> int:
        mapped = self._mapped
        while self._char < char and self._row + 1 < len(mapped.start):  # read in order, and a document has few
            self._row += 1
            mapped.check(self._row)
            self._char = mapped.first_char(self._row)
        if self._char != char:
            raise DataError(f"{mapped.path}: no piece begins at character {char} of a document; tokenize again")
        return self._row
