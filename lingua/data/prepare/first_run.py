"""Choose a prompt and a number of steps for a first run on a user's own texts."""

from __future__ import annotations

import re

_WORD = r"[^\W\d_]"
_PHRASES = (rf"(?<!\S){_WORD}+(?: {_WORD}+){{1,3}}", rf"{_WORD}{{6,}}")
MIN_STEPS, MAX_STEPS, MAX_PASSES = 20, 1000, 4


def first_words(text: str) -> str | None:
    """Return the first phrase of a text that needs no quoting in a shell or YAML, or None if it has none."""
    plain = " ".join(text[:4000].split())
    found = next((match for phrase in _PHRASES if (match := re.search(phrase, plain))), None)
    return found and found[0][:40].rstrip()


def first_steps(steps_per_pass: int) -> int:
    """Return the number of steps of a first run: minutes on a CPU, and at most four passes over the data.

    Up to four passes teach nearly as much as new text (Muennighoff et al., 2023, https://arxiv.org/abs/2305.16264).
    """
    return max(MIN_STEPS, min(MAX_PASSES * steps_per_pass, MAX_STEPS))
