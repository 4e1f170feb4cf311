"""Measure the quality of text: lengths, exact duplicates, scripts, odd characters, lines that many documents share.

Lengths and duplicates cover all documents; the rest covers the first LOOKED_AT_BYTES, a sample of shuffled data.
"""

from __future__ import annotations

import functools
import unicodedata
from array import array
from collections import Counter
from typing import Any

import numpy as np
import xxhash

LOOKED_AT_BYTES = 32 << 20
"""Bytes of text whose distinct lines are held in memory."""
BOILERPLATE_SHARE, BOILERPLATE_DOCUMENTS = 0.01, 5
"""A line is boilerplate if at least this share and this number of documents have it."""
_LINE_CHARS = 10  # shorter lines, such as brackets, recur anywhere
_SHOWN = 10


class Quality:
    """Collects figures of documents, one after the other."""

    def __init__(self) -> None:
        self._sizes, self._hashes = array("Q"), array("Q")
        self._n_looked_at = self._looked_at_bytes = self._n_odd = self._n_lines = 0
        self._chars: Counter[str] = Counter()
        self._lines: Counter[str] = Counter()

    def add(self, text: str) -> int:
        """Add a document; return its size in bytes."""
        encoded = text.encode()
        self._sizes.append(size := len(encoded))
        self._hashes.append(xxhash.xxh3_64_intdigest(encoded))
        if self._looked_at_bytes < LOOKED_AT_BYTES:
            self._n_looked_at, self._looked_at_bytes = self._n_looked_at + 1, self._looked_at_bytes + size
            self._chars.update(chars := Counter(text))
            self._n_odd += any(odd(char) for char in chars)
            lines = {whole for line in text.splitlines() if len(whole := line.strip()) >= _LINE_CHARS}
            self._n_lines += len(lines)
            self._lines.update(lines)
        return size

    def facts(self) -> dict[str, Any]:
        """Return the figures; empty without documents."""
        if not self._sizes:
            return {}
        sizes = np.frombuffer(self._sizes, np.uint64)
        letters: Counter[str] = Counter()
        odd_chars: Counter[str] = Counter()
        for char, n in self._chars.items():
            if char.isalpha():
                letters[script_of(char)] += n
            elif kind := odd(char):
                odd_chars[kind] += n
        least = max(BOILERPLATE_DOCUMENTS, BOILERPLATE_SHARE * self._n_looked_at)
        shared = [(line, n) for line, n in self._lines.most_common() if n >= least]
        low, median, high = (int(size) for size in np.percentile(sizes, [10, 50, 90]))
        steps, counts = np.unique(np.frexp(sizes.astype(np.float64))[1], return_counts=True)
        per_step = dict(zip(steps.tolist(), counts.tolist(), strict=True))
        return {
            "median_bytes": median,
            "percentile_10_bytes": low,
            "percentile_90_bytes": high,
            "documents_below_bytes": [(1 << n, per_step.get(n, 0)) for n in range(min(per_step), max(per_step) + 1)],
            "duplicates": len(sizes) - len(np.unique(np.frombuffer(self._hashes, np.uint64))),
            "looked_at": {"documents": self._n_looked_at, "text_bytes": self._looked_at_bytes},
            "scripts": {name: n / letters.total() for name, n in letters.most_common(_SHOWN)},
            "odd_characters": dict(odd_chars.most_common()),
            "documents_with_odd_characters": self._n_odd,
            "boilerplate_share_of_lines": sum(n for _, n in shared) / max(self._n_lines, 1),
            "boilerplate": dict(shared[:_SHOWN]),
        }


@functools.cache
def script_of(letter: str) -> str:
    """Return the script of a letter, from the begin of its Unicode name: LATIN, CYRILLIC, CJK."""
    name = unicodedata.name(letter, "unnamed").split()[0].split("-")[0]
    return name if name == "CJK" else name.capitalize()


@functools.cache
def odd(char: str) -> str | None:
    """Return the kind of a character that text rarely contains on purpose, or None for all others."""
    if char == "\ufffd":
        return "replacement (U+FFFD)"
    kind = unicodedata.category(char)
    if kind == "Cc" and char not in "\t\n\r":
        return "control"
    return "private or unassigned" if kind in ("Co", "Cn") else None
