"""Read token files of other trainers in place: `pbin`, `megatron`, `npy`, `ds`.

    pbin       Modalities: bytes of all tokens (8 bytes), bytes per token (4 bytes), tokens, and a pickled list of the
               (first byte, bytes) of each document. The pickle is never loaded: only the few opcodes of such a list are
               parsed, and anything else is refused
    megatron   Megatron-LM: tokens in X.bin; type, lengths, first bytes and documents in X.idx
    npy        dolma, OLMo: tokens without a header, each document with its end token; or a numpy array with its header
    ds         datatrove, nanotron: tokens in X.ds; document ends in X.ds.index, if that exists

Positions are tokens. Begin and end tokens in the files are dropped: `data.add_bos` and `data.add_eos` add them, as for
text. Without a table, documents end with the tokenizer's end token. If the width of a token is not recorded, it is 4
bytes if the ids then fit the vocabulary, else 2.
Cost: nothing to prepare and no tokenizer time; pbin takes 8 bytes per document in memory and 1.4 us at each start.

To add a format: a subclass with its `suffix` and its files' `Layout`.
"""

from __future__ import annotations

import bisect
import gzip
import itertools
import mmap
import re
import struct
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lingua.config.base import ConfigError
from lingua.data.blocked_source import (
    BlockedSource,
    DataError,
    Document,
    Reader,
    SourceFile,
    TextFields,
    edges,
    fingerprint,
    name_key,
)
from lingua.tokenizer import Tokenizer

PIECE_TOKENS = 1 << 16
_SAMPLES, _SAMPLE_TOKENS = 16, 4096  # places that are searched for tokens that the tokenizer does not have
_WINDOW_TOKENS = 4096  # searched first for an end token, then twice as many, ...
_SEARCHED_TOKENS = 64 << 20  # in which there must be an end token
_REMEDY = "set data.tokenizer to the one that made the file"


class Layout(NamedTuple):
    """A file's tokens, and the begins of its documents. T tokens."""

    path: Path
    ids: np.ndarray  # (T,)
    table: np.ndarray | None = None
    """Where documents begin, ascending; None: `end_id` ends each."""
    per_token: int = 1
    """Units of the table per token."""
    of_ends: bool = False
    """The table holds where documents end."""
    end_id: int | None = None

    def begin(self, document: int) -> int:
        """Return the first token of a document; T for the one after the last."""
        assert self.table is not None
        entry = document - self.of_ends
        if entry < 0:
            return 0
        return int(self.table[entry]) // self.per_token if entry < len(self.table) else len(self.ids)

    def find(self, at: int, limit: int, guess: int = 0) -> tuple[int, int, int] | None:
        """Return (begin, end, next guess) of the first document that begins at `at` or later, before `limit`.

        The guess from the previous call saves a search: a document's number in the table, or where one begins.
        """
        if self.table is None:
            begin = at if at in (0, guess) else self.next_end(at - 1, limit)
            end = self.next_end(begin, len(self.ids))
            return (begin, end, end) if begin < min(limit, len(self.ids)) else None
        n, index = len(self.table), guess
        if self.begin(index) != at:  # not the one after the last; bisect, as numpy would copy an unaligned table
            index = bisect.bisect_left(range(n), at, key=self.begin)
        while index < n and (first := self.begin(index)) < limit:
            index += 1
            if first < (end := self.begin(index)):
                return first, end, index
        return None

    def next_end(self, at: int, limit: int) -> int:
        """Return the position after the first end token at or after `at`, or `limit`."""
        window = _WINDOW_TOKENS
        while at < limit:
            is_end = self.ids[at : min(at + window, limit)] == self.end_id
            if is_end[first := int(is_end.argmax())]:
                return at + first + 1
            at, window = at + window, 2 * window
        return limit


# -- the source ----------------------------------------------------------------------------------------------------


class TokenFormat(BlockedSource):
    """Token files of another trainer, in blocks of tokens."""

    unit = "token"
    holds_tokens = True
    needs_tokenizer = True
    remedy = f"{_REMEDY}, or copy it again"
    side_suffix: ClassVar[str | None] = None
    """Suffix of the file that holds the table, in place of `suffix`, or None if there is no such file."""

    @classmethod
    @abstractmethod
    def layout(cls, path: Path, tokenizer: Tokenizer) -> Layout:
        """Return the layout of a file. Raises DataError if it is damaged or another kind of file."""

    @classmethod
    def side_file(cls, path: Path) -> Path:
        return path.with_name(path.name.removesuffix(cls.suffix) + (cls.side_suffix or ""))

    @classmethod
    def side_files(cls, files: Sequence[Path]) -> list[Path]:
        return [side for file in files if cls.side_suffix and (side := cls.side_file(file)).is_file()]

    @classmethod
    def check_files(cls, path: Path, fields: TextFields) -> None:
        for file in cls.find_files(path):
            _refuse_fields(file, fields)

    @classmethod
    def check_tokenizer(cls, path: Path, tokenizer: Tokenizer) -> None:
        for file in cls.find_files(path):
            check_ids(cls.layout(file, tokenizer), tokenizer)

    def open_files(self, paths: Sequence[Path]) -> list[SourceFile]:
        assert self.vocabulary is not None
        self.layouts: list[Layout] = []
        files = []
        for path in paths:
            _refuse_fields(path, self.fields)
            layout = self.layout(path, self.vocabulary)
            check_ids(layout, self.vocabulary)
            if len(layout.ids):
                self.layouts.append(layout)
                files.append(SourceFile(path, len(layout.ids), name_key(path.name), path.stat().st_size))
        return files

    @cached_property
    def fingerprint(self) -> str:
        paths = [file.path for file in self.files]
        sizes = [(path, path.stat().st_size) for path in (*paths, *self.side_files(paths))]
        return fingerprint(((path.name, size, edges(path, size)) for path, size in sizes), self.fields)

    def tokens_of(self, document: Document, tokenizer: Tokenizer) -> int:
        return len(all_ids(document))

    def reader(self) -> Reader:
        return TokenFormatReader(self)


class TokenFormatReader:
    """Reads forward through one block after another."""

    def __init__(self, source: TokenFormat) -> None:
        assert source.vocabulary is not None
        self._source, self._file, self._next = source, -1, 0
        self._bos, self._eos = source.vocabulary.bos_id, source.vocabulary.eos_id

    def document(self, block: int, offset: int) -> Document | None:
        source = self._source
        file, at, last = source.block(block)
        if file != self._file:
            self._file, self._next = file, 0
        at, layout = max(at, offset), source.layouts[file]
        while (found := layout.find(at, last, self._next)) is not None:
            begin, at, self._next = found
            source.bad.lines += 1
            ids = layout.ids[begin:at]
            ids = ids[1:] if self._bos is not None and ids[0] == self._bos else ids
            ids = ids[:-1] if self._eos is not None and len(ids) and ids[-1] == self._eos else ids
            if len(ids):
                return Document("", source.files[file].key, begin, at, StoredDocument(ids))
            source.report_bad("empty", file, begin, "an empty document")
        return None


class StoredDocument:
    """The tokens of a document, in pieces; a piece's first character is its first token."""

    def __init__(self, whole: np.ndarray) -> None:
        self.whole = whole

    def ids(self, char: int) -> np.ndarray:
        return self.whole[char : char + PIECE_TOKENS]

    def next_char(self, char: int) -> int:
        return char + PIECE_TOKENS if char + PIECE_TOKENS < len(self.whole) else 0


def all_ids(document: Document) -> np.ndarray:
    """Return the tokens of a document of a `TokenFormat`, without its ends."""
    assert isinstance(document.encoded, StoredDocument)
    return document.encoded.whole


# -- checks against the tokenizer ----------------------------------------------------------------------------------


def check_ids(layout: Layout, tokenizer: Tokenizer) -> None:
    """Raise DataError or ConfigError if a sample of tokens, or the documents' end token, is not the tokenizer's."""
    ids, path, end_id, named = layout.ids, layout.path, tokenizer.eos_id, f"data.tokenizer ({tokenizer.name})"
    for sample in range(_SAMPLES):
        begin = max(0, (len(ids) - _SAMPLE_TOKENS) * sample // (_SAMPLES - 1))
        part = ids[begin : begin + _SAMPLE_TOKENS]
        if len(part) and not 0 <= part.min() <= part.max() < tokenizer.vocab_size:
            wrong = int(part.max() if part.min() >= 0 else part.min())
            raise DataError(f"{path}: holds token {wrong}, and {named} has {tokenizer.vocab_size}; {_REMEDY}")
    if layout.table is not None:
        _compare_end(path, _end_token(layout), end_id)
    elif end_id is None:
        raise ConfigError(f"{path}: its documents end with an end token, and {named} has none; {_REMEDY}")
    elif (end := layout.next_end(0, min(len(ids), _SEARCHED_TOKENS))) and ids[end - 1] != end_id:
        what = f"data.tokenizer ends documents with token {end_id}, which is not among its first {end}"
        raise DataError(f"{path}: {what}; {_REMEDY}")


def _compare_end(path: Path, found: int | None, end_id: int | None) -> None:
    if None not in (found, end_id) and found != end_id:
        what = f"its documents end with token {found}, those of data.tokenizer with {end_id}"
        raise DataError(f"{path}: {what}; {_REMEDY}")


def _end_token(layout: Layout) -> int | None:
    """Return the token that ends each document of a sample and occurs nowhere else in them, or None."""
    assert layout.table is not None
    n, ends = len(layout.table), set()
    places = sorted({n * sample // _SAMPLES for sample in range(_SAMPLES)})
    for begin, end in ((layout.begin(place), layout.begin(place + 1)) for place in places):
        part = layout.ids[max(begin, end - _SAMPLE_TOKENS) : end]
        if len(part):
            ends.add(int(part[-1]))
            if len(ends) > 1 or (part[:-1] == part[-1]).any():
                return None
    return ends.pop() if len(places) >= 4 and ends else None


def _refuse_fields(path: Path, fields: TextFields) -> None:
    if fields.has_prompt:
        raise ConfigError(f"{path}: token files do not mark prompts; set data.loss_on: all, or name files of text")
    if fields.text_key is not None:
        raise ConfigError(f"{path}: token files have no field {fields.text_key!r}; drop text_key")


# -- the formats ---------------------------------------------------------------------------------------------------


def _map(path: Path) -> Any:
    """Map a file into memory; b"" if it is empty."""
    with path.open("rb") as file:
        file.seek(0, 2)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; copy it again, or fix data.sources")


def _ascends(table: np.ndarray, strictly: bool = False) -> bool:
    return bool((np.greater if strictly else np.greater_equal)(table[1:], table[:-1]).all())


def _array(path: Path, data: Any, dtype: str, count: int, offset: int) -> np.ndarray:
    if offset + count * np.dtype(dtype).itemsize > len(data):
        raise _damaged(path, f"has {len(data)} bytes, too few for what its header says")
    return np.frombuffer(data, dtype, count, offset)


_INT = rb"(K.|M..|J....|\x8a\x05.{5}|\x8a\x06.{6})"
_LIST = rb"(?:\x80[\x02-\x05]|\x95.{8}|[](ea\x94]|q.|r....)*"  # protocol, frame, list, mark, append, memoize
_FRAME = rb"(?:\x95.{8})?"  # may begin before any opcode
_PAIR = _INT + _FRAME + _INT + _FRAME + rb"\x86"
_PICKLED = re.compile(_LIST + rb"(?:" + _PAIR + rb"|\.)", re.DOTALL)  # a pair and its tuple, or the end


def pickled_pairs(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the pairs of a pickled list of pairs of whole numbers. Raises ValueError for anything else."""
    at = 0
    while (found := _PICKLED.match(data, at)) is not None:
        first, second = found.groups()
        at = found.end()
        if first is None:
            if at != len(data):
                break
            return
        yield _pickled_int(first), _pickled_int(second)
    raise ValueError(f"byte {at} of its index")


def _pickled_int(data: bytes) -> int:
    return int.from_bytes(data[2:] if data[0] == 0x8A else data[1:], "little", signed=data[0] in (0x4A, 0x8A))


class PbinSource(TokenFormat):
    """`format: pbin`: files of Modalities."""

    suffix = ".pbin"

    @classmethod
    def layout(cls, path: Path, tokenizer: Tokenizer) -> Layout:
        data = _map(path)
        if len(data) < 12:
            raise _damaged(path, "not a whole pbin file")
        n_bytes, width = struct.unpack_from("<QI", data)
        if width not in (1, 2, 4) or n_bytes % width:
            raise _damaged(path, f"not a pbin file ({n_bytes} bytes of tokens of {width} bytes)")
        ids = _array(path, data, f"<u{width}", n_bytes // width, 12)
        try:
            numbers = itertools.chain.from_iterable(pickled_pairs(data[12 + n_bytes :]))
            pairs = np.fromiter(numbers, np.int64).reshape(-1, 2)
        except ValueError as error:
            raise _damaged(path, f"its index is not a list of places of documents ({error})") from None
        begins, ends = pairs[:, 0], pairs.sum(-1)
        follow = len(pairs) and begins[0] == 0 and ends[-1] == n_bytes and (begins[1:] == ends[:-1]).all()
        if (n_bytes and not follow) or not _ascends(begins) or (pairs % width).any():
            raise _damaged(path, "the documents of its index do not follow one another")
        return Layout(path, ids, np.ascontiguousarray(begins), width)


class MegatronSource(TokenFormat):
    """`format: megatron`: pairs of .bin and .idx of Megatron-LM."""

    suffix = ".bin"
    side_suffix = ".idx"

    @classmethod
    def layout(cls, path: Path, tokenizer: Tokenizer) -> Layout:
        side = cls.side_file(path)
        if not side.is_file():
            raise ConfigError(f"{path}: {side.name} is not beside it; copy it there")
        data, tokens, index = _map(side), _map(path), "<9sQBQQ"
        head = struct.calcsize(index)
        if not data[:9] == b"MMIDIDX\0\0" or len(data) < head:
            raise _damaged(side, "not an index of Megatron's")
        _, version, code, n, n_borders = struct.unpack_from(index, data)
        dtype = {1: "<u1", 4: "<i4", 8: "<u2"}.get(code)
        if version != 1 or dtype is None:
            raise _damaged(side, f"of version {version} with tokens of type {code}; 1, and 1, 4 or 8 are known")
        starts = _array(side, data, "<i8", n, head + 4 * n)
        borders = _array(side, data, "<i8", n_borders, head + 12 * n)
        if not (n_borders and borders[0] == 0 and borders[-1] == n and _ascends(borders) and _ascends(starts)):
            raise _damaged(side, "its documents do not follow one another")
        width = np.dtype(dtype).itemsize
        lengths = _array(side, data, "<i4", n, head)
        if len(tokens) % width or (n and (starts[0] != 0 or int(starts[-1]) + width * int(lengths[-1]) != len(tokens))):
            raise _damaged(path, f"has {len(tokens)} bytes, and {side.name} says otherwise")
        if n_borders != n + 1 or not _ascends(borders, strictly=True):  # a document of several sequences, or of none
            starts = np.append(starts, len(tokens))[borders[:-1]]
        return Layout(path, np.frombuffer(tokens, dtype), starts, width)


def _ids_of_unknown_width(path: Path, data: Any, tokenizer: Tokenizer) -> np.ndarray:
    n = len(data) // 4
    wide = np.frombuffer(data, "<u4", n)
    if len(data) % 4 == 0 and bool((wide[:_SAMPLE_TOKENS] < tokenizer.vocab_size).all()):
        return wide
    if len(data) % 2:
        raise _damaged(path, f"has {len(data)} bytes, no multiple of 2")
    return np.frombuffer(data, "<u2")


class NpySource(TokenFormat):
    """`format: npy`: files of dolma and OLMo, or arrays of numpy."""

    suffix = ".npy"

    @classmethod
    def layout(cls, path: Path, tokenizer: Tokenizer) -> Layout:
        if (data := _map(path))[:6] != b"\x93NUMPY":
            return Layout(path, _ids_of_unknown_width(path, data, tokenizer), end_id=tokenizer.eos_id)
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise _damaged(path, f"not a whole array of numpy ({error})") from None
        if ids.ndim != 1 or ids.dtype.str not in ("|u1", "<u2", "<u4", "<i4"):
            raise _damaged(path, f"an array of {ids.dtype} with {ids.ndim} axes, not one of tokens")
        return Layout(path, np.asarray(ids), end_id=tokenizer.eos_id)

    @classmethod
    def check_tokenizer(cls, path: Path, tokenizer: Tokenizer) -> None:
        super().check_tokenizer(path, tokenizer)
        for file in cls.find_files(path):  # dolma writes a table of documents beside a file
            if (facts := file.with_name(file.name.removesuffix(cls.suffix) + ".csv.gz")).is_file():
                with gzip.open(facts, "rt") as lines:
                    end = re.match(r"\d+,(\d+),", lines.readline())
                ids = cls.layout(file, tokenizer).ids
                if end and 0 < int(end[1]) <= len(ids):
                    _compare_end(file, int(ids[int(end[1]) - 1]), tokenizer.eos_id)


class DsSource(TokenFormat):
    """`format: ds`: files of datatrove, which nanotron reads."""

    suffix = ".ds"
    side_suffix = ".ds.index"

    @classmethod
    def layout(cls, path: Path, tokenizer: Tokenizer) -> Layout:
        data, side = _map(path), cls.side_file(path)
        if not side.is_file():
            return Layout(path, _ids_of_unknown_width(path, data, tokenizer), end_id=tokenizer.eos_id)
        ends = np.frombuffer(table, "<u8") if len(table := _map(side)) % 8 == 0 else np.empty(0, "<u8")
        n = int(ends[-1]) if len(ends) else 0
        if len(data) not in (2 * n, 4 * n) or not _ascends(ends):
            raise _damaged(path, f"has {len(data)} bytes, and {side.name} is of {n} tokens")
        return Layout(path, np.frombuffer(data, f"<u{len(data) // max(1, n) or 2}"), ends, of_ends=True)

    @property
    def warning(self) -> str | None:
        if any(file.path.with_name(f"{file.path.name}.loss").is_file() for file in self.files):
            return f"source {self.name}: its .ds.loss files are not read, so all of its tokens are labels"
        return None
