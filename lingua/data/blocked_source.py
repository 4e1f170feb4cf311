"""Base of all formats: the files of a source, cut into blocks, and the handling of bad documents.

A document belongs to the block it begins in, so the blocks hold each document exactly once, whatever their size.
Positions in a file are bytes; rows for parquet and arrow; tokens for other trainers' token files. To add a format: one
file with a subclass (for tokens: a class in `token_formats.py`), a line in `FORMATS` and `SUFFIXES` of `sources.py`,
and its name in `SourceArgs.format`.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import xxhash

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs
from lingua.files import DISK, no_follow, own_temporary, remove_leftover
from lingua.tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

BLOCKS_PER_LANE = 16
"""Blocks of a source per lane and epoch, so that small sources spread over the lanes as well."""
_MIN_LINES = 1000  # before the share of bad lines is meaningful
_SAMPLE_BYTES = 1 << 20
_SAMPLE_DOCUMENTS = 10_000
_LOOKED_AT_LINES = 10_000  # by `lingua check`, in search of a document
HASHED_BYTES = 64 << 20
"""Up to this total size, the binary files of a source are compared with their hash when they are opened."""


class DataError(ValueError):
    """The data does not match the config or is damaged; the message names file and position."""


class EmptyError(DataError):
    """The files of a source have no content."""


class BadLines:
    """Counts the lines that this process has read; skips bad ones or raises, as the config says."""

    def __init__(self, on_bad_line: str = "skip", max_fraction: float = 1.0, *, quiet: bool = False) -> None:
        self._stop, self._max_fraction, self._quiet = on_bad_line == "error", max_fraction, quiet
        self.lines = 0
        self.kinds: Counter[str] = Counter()
        self._reported: set[Path] = set()

    def report(self, kind: str, path: Path, position: str, detail: str) -> None:
        """Count one bad line as `kind`. Raises DataError if bad lines are errors, or if there are too many."""
        self.kinds[kind] += 1
        where = f"{path}, {position}: {detail}"
        if self._stop:
            raise DataError(f"{where}; fix the line, or set data.on_bad_line: skip")
        if not self._quiet and path not in self._reported:
            self._reported.add(path)
            logger.warning("%s; skipped (further ones of this file are only counted)", where)
        bad = self.kinds.total()
        if self.lines >= _MIN_LINES and bad > self._max_fraction * self.lines:
            raise DataError(
                f"{bad} of {self.lines} lines are bad, more than data.max_bad_fraction = {self._max_fraction} "
                f"({dict(self.kinds)}); the last one: {where}; fix the data, or raise data.max_bad_fraction"
            )

    def counts(self) -> dict[str, int]:
        return {"lines": self.lines, **self.kinds}


# -- files ---------------------------------------------------------------------------------------------------------


class SourceFile(NamedTuple):
    """A file of a source; `key` is the hash of its name."""

    path: Path
    size: int
    """In units of positions. For token files: the bytes of the jsonl file."""
    key: int
    n_bytes: int


CHECK_PATH = "check the path, in a config data.sources and data.root_dir"


def find_files(path: Path, suffix: str = ".jsonl", remedy: str = CHECK_PATH) -> list[Path]:
    """List a source's files by name: the path itself, or a folder's `*.chunk.*`, or else all but `*.val.*`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder; {CHECK_PATH}")
    files = [file for file in path.iterdir() if file.name.endswith(suffix) and not file.name.startswith(".")]
    files = [file for file in files if not file.name.endswith(f".val{suffix}")]
    files = [file for file in files if ".chunk." in file.name] or files
    files = [file for file in files if not file.is_dir()]  # a dangling link stays: it is an error
    if not files:
        raise ConfigError(f"{path}: no *{suffix} file in this folder; {remedy}{plain_text_remedy(path)}")
    return sorted(files, key=lambda file: file.name.removesuffix(".tokens"))  # token files as their jsonl files


def plain_text_remedy(folder: Path) -> str:
    """Return how to make documents of a folder of plain text, or "" if it has none."""
    suffix = next((suffix for suffix in (".txt", ".md") if any(folder.rglob(f"*{suffix}"))), None)
    command = f"lingua data prepare {shlex.quote(str(folder))} NAME"
    return "" if suffix is None else f". `{command}` makes documents of its {suffix} files, in data/NAME"


def edges(path: Path, size: int) -> str:
    """Hash of the first and last 4 KiB of a file."""
    with path.open("rb") as stream:
        hasher = xxhash.xxh3_64(stream.read(4096))
        stream.seek(max(0, size - 4096))
        hasher.update(stream.read(4096))
    return hasher.hexdigest()


def content_hash(path: Path, begin: int) -> str:
    """Hash of a file's bytes from `begin` on."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        file.seek(begin)
        while data := file.read(4 << 20):
            digest.update(data)
    return digest.hexdigest()


def fingerprint(files: Iterable[tuple[str, int, str]], fields: TextFields) -> str:
    """Hash (name, size, edges) of the files and the fields that are read, but not the folder's path."""
    read = "+".join(fields.keys) if fields.has_prompt else fields.text_key or ""
    hasher = xxhash.xxh3_64(read.encode("utf-8", "surrogateescape"))
    for name, size, edge in files:
        hasher.update(f"{name}\0{size}\0{edge}\0".encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()


def name_key(name: str) -> int:
    """Return a 64-bit hash of a name."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogateescape"))


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file to write; at the end of the block make it durable and rename it. An error removes it."""
    temporary = own_temporary(target)
    try:
        with open(temporary, "wb", buffering=1 << 20, opener=no_follow) as out:
            yield out
            out.flush()
            DISK.fsync(out.fileno())
        DISK.rename(temporary, target)
    except BaseException:
        remove_leftover(temporary)
        raise
    DISK.fsync_dir(target.parent)


# -- documents -----------------------------------------------------------------------------------------------------


class Encoded(Protocol):
    """A document that was tokenized before, piece by piece."""

    def ids(self, char: int) -> np.ndarray:
        """Return the ids of the piece that begins at this character. Raises TokenizerError if tokenizing failed."""
        ...

    def next_char(self, char: int) -> int:
        """Return the first character of the next piece, or 0 after the last."""
        ...


class Document(NamedTuple):
    """One document, from `start` to `end` of a file; the search for the next one begins at `end`."""

    text: str
    file_key: int
    start: int
    end: int
    encoded: Encoded | None = None
    """Set if it was tokenized before; `text` is empty then."""
    prompt_chars: int = 0
    """Length of the prompt that `text` begins with; its tokens are not labels."""

    def before(self, char: int) -> str:
        """Return the character before this one, or "" at the begin of the document."""
        return self.text[char - 1 : char] if char else ""


class Reader(Protocol):
    """A lane's view of a source; holds at most a buffer."""

    def document(self, block: int, offset: int) -> Document | None:
        """Return the block's first document at or after `offset` (-1: begin of the block), or None."""
        ...


class TextFields(NamedTuple):
    """The fields (or columns) that hold a document's text."""

    text_key: str | None = None
    loss_on: str = "all"
    """completion: the text is `prompt` + `completion`, and only the completion's tokens are labels."""

    @property
    def has_prompt(self) -> bool:
        return self.loss_on == "completion"

    @property
    def keys(self) -> tuple[str, ...]:
        """All of these are read with a prompt, else the first one that exists."""
        if self.has_prompt:
            return ("prompt", "completion")
        return (self.text_key,) if self.text_key else ("text", "content")

    @property
    def remedy(self) -> str:
        if self.has_prompt:
            return "write both, or set data.loss_on: all"
        return "name what holds the text: `text_key: NAME` of a source in data.sources, --text_key NAME of a command"

    def __str__(self) -> str:
        return (" and " if self.has_prompt else " or ").join(map(repr, self.keys))


PLAIN_TEXT = TextFields()


def block_bytes(source_bytes: int, n_lanes: int) -> int:
    return min(max(source_bytes // (BLOCKS_PER_LANE * n_lanes), 256), 4 << 20)


def block_documents(n_documents: int, n_lanes: int) -> int:
    """Return the size of a block in documents, for sources whose positions are documents."""
    return min(max(n_documents // (BLOCKS_PER_LANE * n_lanes), 1), 1 << 14)


class Floor(NamedTuple):
    """The least loss that any model can have, in nats per token."""

    nats: float
    error: float = 0.0
    """Standard error, if it is a mean over documents; 0 if exact."""
    most: float | None = None
    """Upper bound, if only bounds are known; `nats` is then the lower one."""

    def __str__(self) -> str:
        text = f"{self.nats:.4f}" + (f" +- {self.error:.4f}" if self.error else "")
        return text if self.most is None else f"{text} (at most {self.most:.4f})"

    def facts(self) -> dict[str, float]:
        """Return the floor as keys of a record."""
        bound = {} if self.most is None else {"floor_at_most": self.most}
        return {"floor_nats_per_token": self.nats, "floor_standard_error": self.error, **bound}


class BlockedSource(ABC):
    """Files cut into blocks."""

    suffix: ClassVar[str] = ".jsonl"
    unit: ClassVar[str] = "byte"
    """Unit of positions in a file."""
    record: ClassVar[str] = "JSON object"
    """Name of the thing that holds one document."""
    holds_tokens: ClassVar[bool] = False
    """Counting tokens needs no tokenizer."""
    needs_tokenizer: ClassVar[bool] = False
    """Only the tokenizer knows what the ids in the files mean and where documents end."""
    remedy: ClassVar[str] = "tokenize again"
    """Remedy for a token that the tokenizer does not have."""
    row_tokens: int | None = None
    """Tokens of a document, if each one fills a row."""

    def __init__(
        self,
        name: str,
        path: Path,
        n_lanes: int,
        *,
        weight: float = 1.0,
        fields: TextFields = PLAIN_TEXT,
        bad: BadLines | None = None,
        tokenizer: str = "bytes",
        vocabulary: Tokenizer | None = None,
    ) -> None:
        """`tokenizer`: fingerprint of the config's, which stored tokens must match; `vocabulary`: the tokenizer."""
        self.name, self.weight, self.key = name, weight, name_key(name)
        self.fields, self.tokenizer, self.vocabulary = fields, tokenizer, vocabulary
        self._keys, self._has_prompt = fields.keys, fields.has_prompt
        self.bad = bad or BadLines()
        self.files = [file for file in self.open_files(self.find_files(path)) if file.size > 0]
        if not self.files:
            raise EmptyError(f"{path}: all files of source {name!r} are empty; fix data.sources or prepare the data")
        self.size = sum(file.size for file in self.files)
        self.n_bytes = sum(file.n_bytes for file in self.files)
        self.cut(n_lanes)

    # -- what formats may override ---------------------------------------------------------------------------------

    @classmethod
    def find_files(cls, path: Path) -> list[Path]:
        """List the files that are read, by name. Raises ConfigError if there are none."""
        return find_files(path, cls.suffix)

    @classmethod
    def check_files(cls, path: Path, fields: TextFields) -> None:
        """Raise ConfigError or DataError for files that are obviously wrong or have no document near their begin."""
        bad = BadLines(quiet=True)
        for file in cls.find_files(path):
            with (
                contextlib.suppress(EmptyError),
                contextlib.closing(cls.sequential()(file.name, file, 1, fields=fields, bad=bad)) as source,
            ):
                reader = source.reader()
                for block in range(source.n_blocks):
                    if reader.document(block, -1) is not None:
                        return
                    if bad.lines >= _LOOKED_AT_LINES:
                        break
            if bad.lines >= _LOOKED_AT_LINES:
                break
        where = f"the first {bad.lines} lines" if bad.lines >= _LOOKED_AT_LINES else f"{bad.lines} lines"
        raise DataError(f"{path}: no document with {fields} in {where} ({dict(bad.kinds)}); {fields.remedy}")

    @classmethod
    def check_tokenizer(cls, path: Path, tokenizer: Tokenizer) -> None:
        """Raise ConfigError or DataError for tokens that are not this tokenizer's. Text has none."""
        return

    @classmethod
    def side_files(cls, files: Sequence[Path]) -> list[Path]:
        """List other files, beside these, that are used too."""
        return []

    @classmethod
    def sequential(cls) -> type[BlockedSource]:
        """Return the class that reads these files in their own order without an index."""
        return cls

    def open_files(self, paths: Sequence[Path]) -> list[SourceFile]:
        sizes = [path.stat().st_size for path in paths]
        return [SourceFile(path, n, name_key(path.name), n) for path, n in zip(paths, sizes, strict=True)]

    def cut(self, n_lanes: int) -> None:
        """Lay out the blocks; none crosses from one file to the next."""
        self.cut_bytes(block_bytes(self.size, n_lanes))

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the documents or their order do."""
        files = ((file.path.name, file.n_bytes, edges(file.path, file.n_bytes)) for file in self.files)
        return fingerprint(files, self.fields)

    @abstractmethod
    def reader(self) -> Reader:
        """Return one lane's view of the source: the source itself if it needs no buffer."""

    @property
    def warning(self) -> str | None:
        """Why this source is slow to read, or another warning."""
        return None

    def floor(self, n_labels: int) -> Floor | None:
        """Return the least loss of rows with `n_labels` labels, or None if it is unknown."""
        return None

    def wrong_bytes(self) -> Iterator[str]:
        """Read all binary files; yield a sentence for each that differs from its hash."""
        yield from ()

    def close(self) -> None:  # noqa: B027 - most formats hold none
        """Release files; may be called twice."""

    # -- blocks ----------------------------------------------------------------------------------------------------

    def cut_bytes(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.number_blocks([-(-file.size // block_bytes) for file in self.files])

    def number_blocks(self, counts: Sequence[int]) -> None:
        """Number the blocks, given how many each file has."""
        self._first_block = [0, *itertools.accumulate(counts)]
        self.n_blocks = self._first_block[-1]

    def locate(self, block: int) -> tuple[int, int]:
        """Return the file index, and the block's number within that file."""
        file = bisect.bisect_right(self._first_block, block) - 1
        return file, block - self._first_block[file]

    def block(self, block: int) -> tuple[int, int, int]:
        """Return file index, first position and end of a block."""
        file, index = self.locate(block)
        start = index * self.block_bytes
        return file, start, min(start + self.block_bytes, self.files[file].size)

    # -- documents -------------------------------------------------------------------------------------------------

    def document_of(self, record: Any, file: int, start: int, end: int) -> Document | None:
        """Return the document of a record, or count a bad line and return None."""
        prompt, text = "", None
        if type(record) is dict:
            if self._has_prompt:
                prompt, text = (record.get(key) for key in self._keys)
            else:
                text = next((record[key] for key in self._keys if key in record), None)
            if type(text) is str and type(prompt) is str and text:
                return Document(prompt + text, self.files[file].key, start, end, None, len(prompt))
        if text == "":
            self.report_bad("empty", file, start, "an empty document")
        else:
            strings = "strings" if self._has_prompt else "a string"
            self.report_bad("no_text", file, start, f"no {self.record} with {strings} in {self.fields}")
        return None

    def report_bad(self, kind: str, file: int, start: int, detail: str) -> None:
        self.bad.report(kind, self.files[file].path, f"{self.unit} {start}", detail)

    def report_untokenizable(self, document: Document, detail: str) -> None:
        """Count a document on which the tokenizer failed."""
        self.bad.report("tokenizer", self.path_of(document), f"{self.unit} {document.start}", detail)

    def path_of(self, document: Document) -> Path:
        return next(file.path for file in self.files if file.key == document.file_key)

    def documents(self, first_block: int = 0, end_block: int | None = None) -> Iterator[Document]:
        """Yield the documents of these blocks (default: all), in the order of the files."""
        reader = self.reader()
        for block in range(first_block, self.n_blocks if end_block is None else end_block):
            offset = -1
            while (document := reader.document(block, offset)) is not None:
                yield document
                offset = document.end

    def check(self) -> None:
        """Refuse a source without any document: its lanes would search forever. Usually reads one line."""
        bad, self.bad = self.bad, BadLines(quiet=True)  # lanes will read these lines again
        try:
            if next(self.documents(), None) is None:
                raise DataError(
                    f"{self.files[0].path.parent}: source {self.name!r} has no document with {self.fields} in "
                    f"{self.bad.lines} lines ({dict(self.bad.kinds)}); {self.fields.remedy}"
                )
        finally:
            self.bad = bad

    def tokens_of(self, document: Document, tokenizer: Tokenizer) -> int:
        """Return the number of a document's tokens, without begin and end tokens. Raises TokenizerError."""
        return len(tokenizer.encode(document.text, False, False))

    def estimate_tokens(self, tokenizer: Tokenizer, n_ends: int = 0, n_samples: int = 1) -> int:
        """Estimate the tokens of one epoch from a sample of 1 MiB, taken at `n_samples` places.

        `n_ends`: begin and end tokens of a document. The same files give the same number.
        """
        seen = n_chars = n_tokens = n_documents = 0
        for sample in range(n_samples):
            first, end = (n * self.n_blocks // n_samples for n in (sample, sample + 1))
            share = (sample + 1) / n_samples
            for document in self.documents(first, end):
                seen, n_chars = seen + document.end - document.start, n_chars + len(document.text)
                n_documents += 1
                with contextlib.suppress(TokenizerError):  # the loader reports it
                    n_tokens += self.tokens_of(document, tokenizer) + n_ends
                if max(seen, n_chars) >= share * _SAMPLE_BYTES or n_documents >= share * _SAMPLE_DOCUMENTS:
                    break
        return int(self.size * n_tokens / max(1, seen))


@dataclass(frozen=True)
class OpenedData:
    """The sources of a config, opened for K lanes; they share their counters."""

    args: DataArgs
    n_lanes: int
    sources: Sequence[BlockedSource]
    bad: BadLines

    def close(self) -> None:
        for source in self.sources:
            source.close()
