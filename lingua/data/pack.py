"""Turn documents into packed rows: pieces of text, tokens, rows, and the state of a lane.

A lane's tokens are its documents' tokens one after another, nothing dropped and nothing padded. Row k of a lane is the
S tokens from k*S on and the n_views - 1 after them: a row's end may cut a document, but the last token keeps its label,
which is the first token of the next row. Resuming costs one document and one piece of text (at most 256 Ki characters),
or, with a shuffle window, at most the rows of a window, wherever the run is.
Cost: one copy of each token; per document about 10 us.

With `data.loss_on: completion` a prompt is a separate piece, and its tokens are stored as ~id: they are inputs, not
labels.

Five short documents (a, bb, ccc, dd, e; `<` and `>` are begin and end) with S = 4 and n_views = 2:

    stream    < a > < b b > < c c c > < d d > < e >
    row 0     < a > < [b]             [ ]: last label of the row, first input of the next one
    row 1             b b > < [c]
    row 2                     c c c > [<]
    doc_ids   0 0 0 1   0 0 0 1   0 0 0 0    (of the inputs; documents counted from the row's begin)

The state is a position and never data: pick and position of the current document, first character of the current
piece, number of its used tokens, rows made, and two running hashes before the piece. `hash` chains (source, file,
offset, first character) of every piece so far, so `lingua data audit` can prove without tokenizing that no piece was
left out or read twice. `ids` chains the tokens themselves, to prove that the text is still the text that was read;
states of older versions, and runs that continue from them, lack it.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lingua.data.blocked_source import BlockedSource, DataError, Document, OpenedData
from lingua.data.mix import DocumentStream, SourcePosition, draw, window_order
from lingua.tokenizer import Tokenizer, TokenizerError

PIECE_CHARS = 256 << 10
_KEEP_CHARS = 192 << 10  # a piece is cut at white space after this many characters, if there is any
_MAX_EMPTY_PIECES = 1000

IGNORED = -100
"""Label of a position that is not scored."""

IntArray = np.ndarray[Any, np.dtype[np.int32]]


def piece_end(text: str, start: int) -> int:
    """Return the end of the piece that begins at `start`: after a newline, else before a space, or 256 Ki chars."""
    limit = start + PIECE_CHARS
    if len(text) <= limit:
        return len(text)
    newline = text.rfind("\n", start + _KEEP_CHARS, limit)
    if newline >= 0:
        return newline + 1
    space = text.rfind(" ", start + _KEEP_CHARS, limit)
    return space if space >= 0 else limit


def next_piece(document: Document, start: int) -> int:
    """Return the first character of the piece after the one at `start`, or 0 if that is the document's last."""
    if document.encoded is not None:
        return document.encoded.next_char(start)
    end = piece_end(document.text, start)
    if start < document.prompt_chars:  # a separate piece: either all tokens of a piece are labels or none
        end = min(end, document.prompt_chars)
    return end if end < len(document.text) else 0


class PiecePosition(NamedTuple):
    """Position of a piece of text: all that is needed to make it again."""

    pick: int
    source: int | None
    positions: tuple[SourcePosition, ...]
    char: int
    hash: int
    ids_hash: int | None

    def state(self, sources: Sequence[BlockedSource]) -> dict[str, Any]:
        """Return the state for a `DocumentStream`, and the first character of the piece."""
        return {
            "pick": self.pick,
            "source": None if self.source is None else sources[self.source].name,
            "tapes": {one.name: list(position) for one, position in zip(sources, self.positions, strict=True)},
            "char": self.char,
        }


class LanePosition(NamedTuple):
    """Position of a lane after a row. One is made for every row; the JSON state is built only on request."""

    n_rows: int
    piece: PiecePosition
    token: int  # the next one, counted from the piece's begin
    sources: Sequence[BlockedSource]

    def state(self) -> dict[str, Any]:
        """Return the state for a `Lane`, JSON-able."""
        piece = self.piece
        state = {"rows": self.n_rows, **piece.state(self.sources), "token": self.token, "hash": f"{piece.hash:016x}"}
        return state if piece.ids_hash is None else {**state, "ids": f"{piece.ids_hash:016x}"}


class TextPiece(NamedTuple):
    """The tokens of a piece of a document's text."""

    ids: IntArray  # ~id where the token is not a label
    document: int  # counted since the lane was opened
    position: PiecePosition


class RowSpan(NamedTuple):
    """Tokens of a row that come from one piece."""

    position: PiecePosition
    token: int  # the first one used, counted from the piece's begin
    n_tokens: int


class PackedRow(NamedTuple):
    """One row of tokens."""

    tokens: IntArray  # (S + n_views - 1,); ~id where the token is not a label
    doc_ids: IntArray | None  # (S,): document of each input, with data.doc_mask
    number: int  # of the row in the run
    spans: tuple[RowSpan, ...] = ()  # where the tokens come from; workers leave it out


class Packer:
    """Packed rows of one lane, in the order of its documents."""

    def __init__(self, lane: int, data: OpenedData, tokenizer: Tokenizer, state: dict[str, Any] | None) -> None:
        self._documents = documents = DocumentStream(lane, data, state)
        self._sources, self._tokenizer, args = data.sources, tokenizer, data.args
        self._add_bos, self._add_eos, self._doc_mask = args.add_bos, args.add_eos, args.doc_mask
        self._seq_len, self._row_tokens, self._row_step = args.seq_len, args.row_tokens, args.row_step
        self._document: Document | None = None  # with text left
        self._char = 0
        self._number = 0
        self._hash = 0
        self._ids_hash: int | None = 0
        self._pieces: deque[TextPiece] = deque()
        self._token = 0  # tokens of the first piece that are used
        self._n_empty = 0  # pieces in a row without a token
        self._empty_from: dict[int, int] = {}  # by source: the tape position where they began
        if state is not None:
            self._hash = int(state["hash"], 16)
            self._ids_hash = int(state["ids"], 16) if "ids" in state else None
            if documents.source is not None:
                self._document, self._char, self._token = documents.reread(), state["char"], state["token"]

    def position(self, n_rows: int) -> LanePosition:
        """Return the position after the last row; `n_rows`: rows of the lane so far."""
        piece = self._pieces[0].position if self._pieces else self._position()
        return LanePosition(n_rows, piece, self._token, self._sources)

    def _position(self) -> PiecePosition:
        documents = self._documents
        return PiecePosition(
            documents.pick, documents.source, documents.positions, self._char, self._hash, self._ids_hash
        )

    def row(self) -> tuple[IntArray, IntArray | None, tuple[RowSpan, ...]]:
        """Return the next row: tokens (S + n_views - 1,), doc_ids (S,) or None, and the spans of the tokens."""
        n = self._row_tokens
        tokens = np.empty(n, np.int32)
        doc_ids = np.empty(n, np.int32) if self._doc_mask else None
        pieces, filled, index, skip = self._pieces, 0, 0, self._token
        spans: list[RowSpan] = []
        while filled < n:
            if index == len(pieces):
                pieces.append(self.piece())
            piece = pieces[index]
            part = piece.ids[skip : skip + n - filled]
            tokens[filled : filled + len(part)] = part
            if doc_ids is not None:
                doc_ids[filled : filled + len(part)] = piece.document
            if len(part):
                spans.append(RowSpan(piece.position, skip, len(part)))
            filled, index, skip = filled + len(part), index + 1, 0
        self._use(self._row_step)
        if doc_ids is not None:
            doc_ids = doc_ids[: self._seq_len]
            doc_ids -= doc_ids[0]
        return tokens, doc_ids, tuple(spans)

    def _use(self, n_tokens: int) -> None:
        pieces, token = self._pieces, self._token + n_tokens
        while len(pieces) > 1 and token >= len(pieces[0].ids):
            token -= len(pieces.popleft().ids)
        self._token = token

    def piece(self) -> TextPiece:
        """Return the next piece; it has no tokens if the tokenizer fails on it."""
        if self._document is None:
            self._document, self._char = self._documents.next(), 0
            self._number += 1
        document, start, position = self._document, self._char, self._position()
        assert position.source is not None
        source = self._sources[position.source]
        self._hash = draw(self._hash, source.key, document.file_key, document.start, start)
        end = next_piece(document, start)
        self._document, self._char = (None, 0) if end == 0 else (document, end)
        whole = start == 0 and end == 0
        bos, eos = self._add_bos and start == 0, self._add_eos and end == 0
        is_label = start >= document.prompt_chars
        try:
            if document.encoded is not None:
                ids = self._tokenizer.wrap(document.encoded.ids(start), bos, eos)
                if len(ids) and ids.view(np.uint32).max() >= self._tokenizer.vocab_size:  # also negative ones
                    raise DataError(f"{source.path_of(document)}: damaged (an unknown token); {source.remedy}")
            else:
                text = document.text if whole else document.text[start : end or None]
                ids = self._tokenizer.encode(text, bos, eos, document.before(start))
        except TokenizerError as error:
            source.report_untokenizable(document, str(error))
            # A document in one piece is left out; a longer one loses this piece, but not its begin and end.
            ids = np.empty(0, np.int32) if whole else self._tokenizer.encode("", bos, eos)
            is_label = is_label and document.prompt_chars == 0  # an end token does not answer a prompt
        if self._ids_hash is not None:
            self._ids_hash = draw(self._ids_hash, xxhash.xxh3_64_intdigest(ids.data))
        self._count_empty(len(ids), position)
        return TextPiece(ids if is_label else ~ids, self._number, position)

    def _count_empty(self, n_tokens: int, position: PiecePosition) -> None:
        """Raise DataError if too many documents in a row give no token: `row` would search forever."""
        if n_tokens:
            if self._n_empty:
                self._n_empty, self._empty_from = 0, {}
            return
        assert position.source is not None
        tape_position, source = position.positions[position.source][0], self._sources[position.source]
        self._n_empty += 1
        begin = self._empty_from.setdefault(position.source, tape_position)
        if self._n_empty >= _MAX_EMPTY_PIECES and tape_position - begin >= source.n_blocks:
            raise DataError(
                f"source {source.name!r}: {self._n_empty} documents in a row, more than an epoch of them, give no "
                "token; look at the data and at data.tokenizer"
            )


class Lane:
    """Numbered rows of one lane: packed, shuffled within a window if configured, without those in `skip_rows`.

    Row k of the lane has number `lane + K * k` in the run. A row in `skip_rows` is made and left out; the lane's next
    row takes its turn but keeps its number.
    """

    def __init__(
        self, number: int, data: OpenedData, tokenizer: Tokenizer, state: dict[str, Any] | None = None
    ) -> None:
        self.number, self._n_lanes, self._seed = number, data.n_lanes, data.args.order_seed
        self._packer = Packer(number, data, tokenizer, state)
        self._size = max(1, data.args.shuffle_window)
        self._skip = merged(data.args.skip_rows)
        self._made = state["rows"] if state is not None else 0
        self._window: list[tuple[IntArray, IntArray | None, tuple[RowSpan, ...]]] = []
        self._window_begin: LanePosition | None = None
        if self._made % self._size:
            self._fill()

    def position(self) -> LanePosition:
        """Return the position after the last row; with a shuffle window, the window's begin and the rows so far."""
        if self._made % self._size == 0:
            return self._packer.position(self._made)
        assert self._window_begin is not None
        return self._window_begin._replace(n_rows=self._made)

    def next(self) -> PackedRow:
        while True:
            window, index = divmod(self._made, self._size)
            if index == 0:
                self._fill()
            if self._size > 1:
                index = window_order(index, self._size, self._seed, self.number, window)
            tokens, doc_ids, spans = self._window[index]
            number = self.number + self._n_lanes * self._made
            self._made += 1
            if not contains(self._skip, number):
                return PackedRow(tokens, doc_ids, number, spans)

    def _fill(self) -> None:
        if self._size > 1:
            self._window_begin = self._packer.position(self._made)
        self._window = [self._packer.row() for _ in range(self._size)]


def ids_of(tokens: IntArray) -> IntArray:
    """Return the ids of a row's tokens, labels or not."""
    return np.where(tokens < 0, ~tokens, tokens)


def merged(ranges: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return the ranges [first, last] in order, without overlap."""
    out: list[tuple[int, int]] = []
    for first, last in sorted((r[0], r[1]) for r in ranges):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return out


def contains(ranges: Sequence[tuple[int, int]], number: int) -> bool:
    """Return whether one of the merged ranges holds the number."""
    index = bisect.bisect_right(ranges, (number, 1 << 63)) - 1
    return index >= 0 and number <= ranges[index][1]
