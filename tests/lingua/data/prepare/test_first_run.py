"""What a first run on own texts begins with."""

from __future__ import annotations

import pytest

from lingua.data.prepare.first_run import first_steps, first_words


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("Shall I compare thee to a summer's day?", "Shall I compare thee"),
        ("Files: chrome/x\nCopyright (c) 2009\nThe\n Chromium  Authors.", "The Chromium Authors"),
        ("# 12: x = null\n", None),
        ("a: b", None),
        ("", None),
        ("{Überraschung}", "Überraschung"),
        ("東京" * 40, "東京" * 20),
    ],
)
def test_a_prompt_is_the_first_plain_phrase(text: str, phrase: str | None) -> None:
    assert first_words(text) == phrase


@pytest.mark.parametrize(("steps_per_pass", "steps"), [(1, 20), (50, 200), (250, 1000), (10**7, 1000)])
def test_a_first_run_is_short_and_makes_at_most_four_passes(steps_per_pass: int, steps: int) -> None:
    assert first_steps(steps_per_pass) == steps
