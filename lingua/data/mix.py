"""Choose the next document of a lane: the order of blocks in a source, and the choice between sources.

The order is a pure function of (seed, sources and weights, K) and of a position, so resuming at document ten million
costs the same as at document one. Every (epoch, document) of a source is read by exactly one lane.

A source is an endless tape of blocks, epoch after epoch; each epoch permutes its M blocks. Lane l of K reads the tape
positions l, l+K, l+2K, ... With M = 3 blocks and K = 2 lanes:

    tape position   0    1    2    3    4    5    6   ...
    epoch           0    0    0    1    1    1    2
    block           b    c    a    a    b    c    b          (each epoch has its own order)
    lane            0    1    0    1    0    1    0

Cost: some 100 us per block and 5 us per document.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import xxhash

from lingua.data.blocked_source import BlockedSource, Document, OpenedData

# Salts keep draws for different purposes apart.
_SALT_BLOCKS, _SALT_SOURCE, _SALT_WINDOW = 1, 2, 3


# -- stateless randomness ------------------------------------------------------------------------------------------


def draw(*key: int) -> int:
    """Return 64 random bits that depend only on the key (XXH3 is the same on every machine and in every version)."""
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(key)}Q", *[k & 0xFFFFFFFFFFFFFFFF for k in key]))


def permuted(index: int, n: int, key: int) -> int:
    """Return the image of `index` under the key's permutation of range(n): a Feistel network with cycle walking."""
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
    """Return the row of a shuffle window that comes at place `index`."""
    return permuted(index, n, draw(_SALT_WINDOW, seed, lane, window))


class SourceChoice:
    """Picks a source for each document of a lane, by weight."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._sums = list(itertools.accumulate(weights))
        self._last = max((i for i, weight in enumerate(weights) if weight > 0), default=0)
        self._seed = seed

    def pick(self, lane: int, count: int) -> int:
        """Return the index of the source of the lane's document number `count`."""
        if len(self._sums) == 1:
            return 0
        share = draw(_SALT_SOURCE, self._seed, lane, count) / 2**64
        return min(bisect.bisect_right(self._sums, share * self._sums[-1]), self._last)


# -- documents of a lane -------------------------------------------------------------------------------------------


def block_at(source: BlockedSource, seed: int, position: int) -> int:
    """Return the block at a tape position."""
    epoch, index = divmod(position, source.n_blocks)
    return permuted(index, source.n_blocks, draw(_SALT_BLOCKS, seed, source.key, epoch))


SourcePosition = tuple[int, int]  # tape position, offset in the file (-1: the block's begin)


class DocumentStream:
    """The endless document stream of one lane.

    `pick`: documents picked so far. `source`: index of the current document's source (None before the first document).
    `positions`: where each source continues; for the current document's source, where that document begins.
    """

    def __init__(self, lane: int, data: OpenedData, state: dict[str, Any] | None = None) -> None:
        sources = data.sources
        self.lane, self._n_lanes, self._sources, self._seed = lane, data.n_lanes, sources, data.args.order_seed
        self._choice = SourceChoice([source.weight for source in sources], self._seed)
        self._readers = [source.reader() for source in sources]
        self.pick = 0
        self.source: int | None = None
        self.positions: tuple[SourcePosition, ...] = tuple((lane, -1) for _ in sources)
        self._blocks = [(-1, 0)] * len(sources)
        self._end = -1  # of the current document
        if state is not None:
            self.pick = state["pick"]
            self.positions = tuple(tuple(state["tapes"].get(source.name, (lane, -1))) for source in sources)
            names = [source.name for source in sources]
            self.source = names.index(state["source"]) if state["source"] in names else None

    def reread(self) -> Document:
        """Read the current document again; a restored stream begins so if `source` is not None."""
        assert self.source is not None
        return self._read(self.source, *self.positions[self.source])

    def next(self) -> Document:
        if self.source is not None:
            if self._end < 0:
                self.reread()
            self._move(self.source, self.positions[self.source][0], self._end)
        self.source = self._choice.pick(self.lane, self.pick)
        self.pick += 1
        return self._read(self.source, *self.positions[self.source])

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
        """Return the block at a tape position; cached, since consecutive documents are mostly of one block."""
        known, block = self._blocks[source]
        if known != position:
            block = block_at(self._sources[source], self._seed, position)
            self._blocks[source] = position, block
        return block

    def _move(self, source: int, position: int, offset: int) -> None:
        self.positions = (*self.positions[:source], (position, offset), *self.positions[source + 1 :])
