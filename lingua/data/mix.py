"""Which document comes next on a lane: the order of blocks in a source, and the choice between sources.

Promise: pure functions of (seed, sources and weights, K) and of a position. Nothing here has a history: continuing at
document ten million costs what document one costs. Every (epoch, document) of a source is read by exactly one lane.

A source is a tape of blocks, epoch after epoch. Epoch e holds its M blocks in an order of its own; lane l of K reads
the tape positions l, l+K, l+2K, ... A document belongs to the block it begins in. With M = 3 blocks and K = 2 lanes:

    tape position   0    1    2    3    4    5    6   ...
    epoch           0    0    0    1    1    1    2
    block           b    c    a    a    b    c    b          (order of each epoch: a permutation by its number)
    lane            0    1    0    1    0    1    0

Cost: some 100 us per block and 5 us per document.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import xxhash

if TYPE_CHECKING:
    import numpy as np

# Salts keep draws for different purposes apart.
_SALT_BLOCKS, _SALT_SOURCE, _SALT_WINDOW = 1, 2, 3


class DataError(ValueError):
    """The data is not as the config says; the message names file and byte offset."""


# -- randomness without a generator --------------------------------------------------------------------------------


def draw(*key: int) -> int:
    """64 random bits that depend on the key alone (XXH3 is the same on every machine and in every version)."""
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(key)}Q", *[k & 0xFFFFFFFFFFFFFFFF for k in key]))


def name_key(name: str) -> int:
    """64 bits that stand for a name."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogateescape"))


def permuted(index: int, n: int, key: int) -> int:
    """Where `index` goes in the permutation of range(n) that the key names: a Feistel network, walked until inside."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for turn in range(6):
            left, right = right, left ^ (draw(key, turn, right) & mask)
        index = left << half_bits | right
        if index < n:
            return index


def window_order(index: int, n: int, seed: int, lane: int, window: int) -> int:
    """Which row of a shuffle window is handed out as its `index`-th."""
    return permuted(index, n, draw(_SALT_WINDOW, seed, lane, window))


def block_bytes(source_bytes: int, n_lanes: int) -> int:
    """Bytes of a block: about 16 blocks per lane and epoch, so that small sources spread over the lanes as well."""
    return min(max(source_bytes // (16 * n_lanes), 256), 4 << 20)


class Choice:
    """Picks a source for each document of a lane, by weight."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._sums = list(itertools.accumulate(weights))
        self._seed = seed

    def pick(self, lane: int, count: int) -> int:
        """Index of the source of the lane's `count`-th document."""
        if len(self._sums) == 1:
            return 0
        share = draw(_SALT_SOURCE, self._seed, lane, count) / 2**64
        return min(bisect.bisect_right(self._sums, share * self._sums[-1]), len(self._sums) - 1)


# -- documents of a lane -------------------------------------------------------------------------------------------


class Encoded(Protocol):
    """A document whose tokens were made before, piece by piece."""

    def ids(self, char: int) -> np.ndarray:
        """Ids of the piece that begins at this character. Raises TokenizerError where the tokenizer gave up."""
        ...

    def behind(self, char: int) -> int:
        """First character of the piece behind that one; 0: it is the last."""
        ...


class Document(NamedTuple):
    """One document and where it lies. `start`, `end`: byte offsets in the file; the next one is looked for at `end`."""

    text: str
    file_key: int
    start: int
    end: int
    encoded: Encoded | None = None
    """Set where tokens were made before; `text` is empty then."""


class Reader(Protocol):
    """One lane's view of a source; holds at most a buffer."""

    def document(self, block: int, offset: int) -> Document | None:
        """The first document of the block that begins at or after `offset` (-1: the block's begin); None: no more."""
        ...


class Source(Protocol):
    """A set of documents in blocks. Other formats plug in here: what they must have is blocks and offsets."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> int: ...

    @property
    def weight(self) -> float: ...

    @property
    def fingerprint(self) -> str:
        """Changes when the documents or their order do."""
        ...

    @property
    def n_blocks(self) -> int: ...

    def check(self) -> None:
        """Refuse a source without any document."""
        ...

    def reader(self) -> Reader: ...

    def bad_text(self, document: Document, detail: str) -> None:
        """The tokenizer gave up on a piece of this document: count it, or stop."""
        ...

    def close(self) -> None: ...


def block_at(tape: Source, seed: int, position: int) -> int:
    """The block at a tape position."""
    epoch, index = divmod(position, tape.n_blocks)
    return permuted(index, tape.n_blocks, draw(_SALT_BLOCKS, seed, tape.key, epoch))


Place = tuple[int, int]  # tape position, byte offset (-1: the block's begin)


class Documents:
    """The endless document stream of one lane.

    `pick`: documents picked so far. `source`: index of the source of the document in hand (None before the first).
    `places`: where each source goes on; for the source of the document in hand, where that document begins.
    """

    def __init__(
        self, lane: int, n_lanes: int, sources: Sequence[Source], seed: int, state: dict[str, Any] | None = None
    ) -> None:
        self.lane, self._n_lanes, self._sources, self._seed = lane, n_lanes, sources, seed
        self._choice = Choice([source.weight for source in sources], seed)
        self._readers = [source.reader() for source in sources]
        self.pick = 0
        self.source: int | None = None
        self.places: tuple[Place, ...] = tuple((lane, -1) for _ in sources)
        self._blocks = [(-1, 0)] * len(sources)
        self._end = -1  # of the document in hand
        if state is not None:
            self.pick = state["pick"]
            self.places = tuple(tuple(state["tapes"].get(source.name, (lane, -1))) for source in sources)
            names = [source.name for source in sources]
            self.source = names.index(state["source"]) if state["source"] in names else None

    def state(self) -> dict[str, Any]:
        return documents_state(self._sources, self.pick, self.source, self.places)

    def again(self) -> Document:
        """The document in hand once more: how a restored stream begins when `source` is not None."""
        assert self.source is not None
        return self._read(self.source, *self.places[self.source])

    def next(self) -> Document:
        """The next document."""
        if self.source is not None:
            if self._end < 0:
                self.again()
            self._move(self.source, self.places[self.source][0], self._end)
        self.source = self._choice.pick(self.lane, self.pick)
        self.pick += 1
        return self._read(self.source, *self.places[self.source])

    def _read(self, source: int, position: int, offset: int) -> Document:
        reader = self._readers[source]
        while True:
            document = reader.document(self._block_at(source, position), offset)
            if document is not None:
                self._move(source, position, document.start)
                self._end = document.end
                return document
            position, offset = position + self._n_lanes, -1

    def _block_at(self, source: int, position: int) -> int:
        """The block at a tape position; remembered, since many documents follow each other in it."""
        known, block = self._blocks[source]
        if known != position:
            block = block_at(self._sources[source], self._seed, position)
            self._blocks[source] = position, block
        return block

    def _move(self, source: int, position: int, offset: int) -> None:
        self.places = (*self.places[:source], (position, offset), *self.places[source + 1 :])


def documents_state(
    sources: Sequence[Source], pick: int, source: int | None, places: Sequence[Place]
) -> dict[str, Any]:
    """What `Documents` is restored from."""
    return {
        "pick": pick,
        "source": None if source is None else sources[source].name,
        "tapes": {tape.name: list(place) for tape, place in zip(sources, places, strict=True)},
    }
