"""The quality of text at a glance, counted by hand here."""

from __future__ import annotations

from typing import Any

import pytest

from lingua.data import quality as quality_module
from lingua.data.quality import Quality, odd, script_of

FOOTER = "All rights reserved."
TEXTS = [
    *(f"text {n}\n{FOOTER}" for n in range(6)),
    "text 0\n" + FOOTER,
    "да, мир",
    "数据 ab",
    "a\x00\ufffd\ufffd\ue000\n",
]


def facts_of(texts: list[str]) -> dict[str, Any]:
    found = Quality()
    assert [found.add(text) for text in texts] == [len(text.encode()) for text in texts]
    return found.facts()


def test_the_figures_are_those_of_the_texts() -> None:
    facts = facts_of(TEXTS)
    assert facts["duplicates"] == 1
    assert facts["documents_below_bytes"] == [(16, 3), (32, 7)]
    assert (facts["median_bytes"], facts["looked_at"]["documents"]) == (27, 10)
    n_letters = 7 * (4 + 17) + 5 + 4 + 1
    shares = {"Latin": (7 * 21 + 3) / n_letters, "Cyrillic": 5 / n_letters, "CJK": 2 / n_letters}
    assert facts["scripts"] == pytest.approx(shares)
    assert facts["odd_characters"] == {"replacement (U+FFFD)": 2, "control": 1, "private or unassigned": 1}
    assert facts["documents_with_odd_characters"] == 1
    assert facts["boilerplate"] == {FOOTER: 7}  # "text 0" is too short to count
    assert facts["boilerplate_share_of_lines"] == 1.0


def test_only_lengths_and_duplicates_are_of_more_than_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_module, "LOOKED_AT_BYTES", 30)
    facts = facts_of(TEXTS)
    assert facts["looked_at"] == {"documents": 2, "text_bytes": 54}
    assert facts["duplicates"] == 1
    assert facts["scripts"] == {"Latin": 1.0}
    assert facts["odd_characters"] == {}
    assert facts_of([]) == {}


@pytest.mark.parametrize(("letter", "script"), [("é", "Latin"), ("한", "Hangul"), ("ひ", "Hiragana"), ("א", "Hebrew")])
def test_scripts(letter: str, script: str) -> None:
    assert script_of(letter) == script


@pytest.mark.parametrize("char", ["a", "\n", "\t", "\r", " ", "\u200d", "\U0001f600", "\xa0"])
def test_what_text_holds_on_purpose_is_not_odd(char: str) -> None:
    assert odd(char) is None
