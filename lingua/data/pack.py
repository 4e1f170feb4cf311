"""Documents to rows: pieces of text, tokens, packed rows, and the state of a lane.

Promise: a lane's tokens are its documents' tokens one after another, nothing dropped and nothing padded. Row k of a
lane is the S tokens from k*S on and the n_views - 1 behind them, so a document may be cut by a row's end but the
target of the last token survives, as the first token of the next row. Continuing costs one document and one piece of
text (at most 256 Ki characters), or with a shuffle window at most that many rows, wherever the run stands.
Cost: one copy of each token; per document about 10 us.

Five short documents (a, bb, ccc, dd, e; `<` and `>` are begin and end) with S = 4 and n_views = 2:

    stream    < a > < b b > < c c c > < d d > < e >
    row 0     < a > < [b]             [ ]: last label of the row, first input of the next one
    row 1             b b > < [c]
    row 2                     c c c > [<]
    doc_ids   0 0 0 1   0 0 0 1   0 0 0 0    (of the inputs; documents counted from the row's begin)

State is a position and never data: the pick and the place of the document in hand, the first character of the piece
in hand, the tokens of it that are used, rows made, and the running hash before the piece. The hash chains (source,
file, byte offset, first character) of every piece so far: who reads the sources again can tell from it, without
tokenizing, that no piece was left out or taken twice.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lingua.data.mix import DataError, Document, Documents, Place, Source, documents_state, draw, window_order
from lingua.tokenizer import Tokenizer, TokenizerError

PIECE_CHARS = 256 << 10
_MOST_BARREN = 1000
_KEEP_CHARS = 192 << 10  # a piece is cut at white space behind this many characters, if there is any

IntArray = np.ndarray[Any, np.dtype[np.int32]]


def piece_end(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends: behind a newline, else before a space, else at 256 Ki characters."""
    limit = start + PIECE_CHARS
    if len(text) <= limit:
        return len(text)
    newline = text.rfind("\n", start + _KEEP_CHARS, limit)
    if newline >= 0:
        return newline + 1
    space = text.rfind(" ", start + _KEEP_CHARS, limit)
    return space if space >= 0 else limit


def piece_behind(document: Document, start: int) -> int:
    """First character of the piece behind the one that begins at `start`; 0: it is the document's last."""
    if document.encoded is not None:
        return document.encoded.behind(start)
    end = piece_end(document.text, start)
    return end if end < len(document.text) else 0


def chain(before: int, source_key: int, file_key: int, offset: int, char: int) -> int:
    """The running hash after one more piece."""
    return draw(before, source_key, file_key, offset, char)


class Mark(NamedTuple):
    """Where a piece comes from: all that is needed to make it again."""

    pick: int
    source: int | None
    places: tuple[Place, ...]
    char: int
    hash: int


class Piece(NamedTuple):
    ids: IntArray
    document: int  # counted since the lane was opened
    mark: Mark


class Part(NamedTuple):
    """Tokens of a row that come from one piece."""

    mark: Mark
    token: int  # of the piece, first used
    n_tokens: int


class Row(NamedTuple):
    """S + n_views - 1 tokens, the document each of the first S belongs to (None unless asked for), the row's number."""

    tokens: IntArray
    doc_ids: IntArray | None
    number: int
    parts: tuple[Part, ...] = ()  # where all the tokens come from; not told by workers


class Packing(NamedTuple):
    """How documents become rows; the same for all lanes."""

    seq_len: int
    n_views: int
    add_bos: bool
    add_eos: bool
    doc_ids: bool = False


class Packer:
    """Packed rows of one lane, in order of its documents."""

    def __init__(
        self,
        documents: Documents,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        packing: Packing,
        state: dict | None,
    ) -> None:
        self._documents, self._sources, self._tokenizer, self._packing = documents, sources, tokenizer, packing
        self._document: Document | None = None  # in hand, with text left
        self._char = 0
        self._number = 0
        self._hash = 0
        self._pieces: deque[Piece] = deque()
        self._token = 0  # used ones of the first piece
        self._barren = 0  # pieces in a row without a token
        self._barren_from: dict[int, int] = {}  # by source: the tape position where they began
        if state is not None:
            self._hash = int(state["hash"], 16)
            if documents.source is not None:
                self._document, self._char, self._token = documents.again(), state["char"], state["token"]

    def state(self) -> dict[str, Any]:
        """The position behind the last row."""
        if self._pieces:
            mark = self._pieces[0].mark
        else:  # nothing read yet
            mark = Mark(self._documents.pick, self._documents.source, self._documents.places, self._char, self._hash)
        position = documents_state(self._sources, mark.pick, mark.source, mark.places)
        return {**position, "char": mark.char, "token": self._token, "hash": f"{mark.hash:016x}"}

    def row(self) -> tuple[IntArray, IntArray | None, tuple[Part, ...]]:
        """The next row: tokens (S + n_views - 1,), doc_ids (S,) or None, and where the tokens come from."""
        seq_len, n = self._packing.seq_len, self._packing.seq_len + self._packing.n_views - 1
        tokens = np.empty(n, np.int32)
        doc_ids = np.empty(n, np.int32) if self._packing.doc_ids else None
        pieces, filled, index, skip = self._pieces, 0, 0, self._token
        parts: list[Part] = []
        while filled < n:
            if index == len(pieces):
                pieces.append(self.piece())
            piece = pieces[index]
            part = piece.ids[skip : skip + n - filled]
            tokens[filled : filled + len(part)] = part
            if doc_ids is not None:
                doc_ids[filled : filled + len(part)] = piece.document
            if len(part):
                parts.append(Part(piece.mark, skip, len(part)))
            filled, index, skip = filled + len(part), index + 1, 0
        self._use(seq_len)
        if doc_ids is not None:
            doc_ids = doc_ids[:seq_len]
            doc_ids -= doc_ids[0]
        return tokens, doc_ids, tuple(parts)

    def _use(self, n_tokens: int) -> None:
        pieces, token = self._pieces, self._token + n_tokens
        while len(pieces) > 1 and token >= len(pieces[0].ids):
            token -= len(pieces.popleft().ids)
        self._token = token

    def piece(self) -> Piece:
        """The next piece; without tokens if the tokenizer gives up on it."""
        if self._document is None:
            self._document, self._char = self._documents.next(), 0
            self._number += 1
        document, start, documents = self._document, self._char, self._documents
        assert documents.source is not None
        mark = Mark(documents.pick, documents.source, documents.places, start, self._hash)
        source = self._sources[documents.source]
        self._hash = chain(self._hash, source.key, document.file_key, document.start, start)
        behind = piece_behind(document, start)
        self._document, self._char = (None, 0) if behind == 0 else (document, behind)
        whole = start == 0 and behind == 0
        bos, eos = self._packing.add_bos and start == 0, self._packing.add_eos and behind == 0
        try:
            if document.encoded is not None:
                ids = self._tokenizer.wrap(document.encoded.ids(start), bos, eos)
            else:
                text = document.text if whole else document.text[start : behind or None]
                ids = self._tokenizer.encode(text, bos, eos)
        except TokenizerError as error:
            source.bad_text(document, str(error))
            # A document in one piece is left out; a longer one loses this piece, not its begin and end.
            ids = np.empty(0, np.int32) if whole else self._tokenizer.encode("", bos, eos)
        self._look_for_tokens(len(ids), mark)
        return Piece(ids, self._number, mark)

    def _look_for_tokens(self, n_tokens: int, mark: Mark) -> None:
        """Give up when documents give no token for too long: else `row` would look for some for ever."""
        assert mark.source is not None
        if n_tokens:
            if self._barren:
                self._barren, self._barren_from = 0, {}
            return
        position, source = mark.places[mark.source][0], self._sources[mark.source]
        self._barren += 1
        begin = self._barren_from.setdefault(mark.source, position)
        if self._barren >= _MOST_BARREN and position - begin >= source.n_blocks:
            raise DataError(
                f"source {source.name!r}: {self._barren} documents in a row, more than an epoch of them, give no "
                "token; look at the data and at data.tokenizer"
            )


class Lane:
    """Numbered rows of one lane: packed, shuffled within a window if asked for, without those to be passed over.

    Row k of the lane has number `lane + K * k` in the run. A row in `skip_rows` is made and left out; the lane's next
    row takes its turn, and keeps its own number.
    """

    def __init__(
        self,
        number: int,
        n_lanes: int,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        packing: Packing,
        *,
        seed: int,
        window: int = 0,
        skip_rows: Sequence[Sequence[int]] = (),
        state: dict[str, Any] | None = None,
    ) -> None:
        self.number, self._n_lanes, self._seed = number, n_lanes, seed
        documents = Documents(number, n_lanes, sources, seed, state)
        self._packer = Packer(documents, sources, tokenizer, packing, state)
        self._size = max(1, window)
        self._skip = merged(skip_rows)
        self._made = state["rows"] if state is not None else 0
        self._window: list[tuple[IntArray, IntArray | None, tuple[Part, ...]]] = []
        self._window_state: dict[str, Any] = {}
        if self._made % self._size:
            self._fill()

    def state(self) -> dict[str, Any]:
        """Position behind the last row handed out. With a window: of its begin; `rows` tells how far it is used."""
        position = self._window_state if self._made % self._size else self._packer.state()
        return {"rows": self._made, **position}

    def next(self) -> Row:
        while True:
            window, index = divmod(self._made, self._size)
            if index == 0:
                self._fill()
            if self._size > 1:
                index = window_order(index, self._size, self._seed, self.number, window)
            tokens, doc_ids, parts = self._window[index]
            number = self.number + self._n_lanes * self._made
            self._made += 1
            if not contains(self._skip, number):
                return Row(tokens, doc_ids, number, parts)

    def _fill(self) -> None:
        if self._size > 1:
            self._window_state = self._packer.state()
        self._window = [self._packer.row() for _ in range(self._size)]


def merged(ranges: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Ranges [first, last] in order, without overlap."""
    out: list[tuple[int, int]] = []
    for first, last in sorted((r[0], r[1]) for r in ranges):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return out


def contains(ranges: Sequence[tuple[int, int]], number: int) -> bool:
    """Whether one of the merged ranges holds the number."""
    index = bisect.bisect_right(ranges, (number, 1 << 63)) - 1
    return index >= 0 and number <= ranges[index][1]
