"""What commands print: tables, figures."""

from __future__ import annotations

import pytest

from lingua.console import duration, figure, show, show_table


def test_a_table_is_aligned_and_never_cut_or_taken_for_markup(capsys: pytest.CaptureFixture[str]):
    path = "/a/long/path" * 30
    show_table(("run", "[bold]n"), [(path, 7), ("[red]x", 1234)], right=("[bold]n",))
    width = len(path)
    assert capsys.readouterr().out.splitlines() == [
        f"{'run':<{width}}  [bold]n", f"{path}        7", f"{'[red]x':<{width}}     1234",
    ]  # fmt: skip


def test_facts_are_lines_or_json(capsys: pytest.CaptureFixture[str]):
    show({"a": 1234, "b": {"c": None}}, False)
    show({"a": 1}, False, ["one line"])
    show([1], True, ["one line"])
    assert capsys.readouterr().out == f"{'a':<24} 1,234\nb\n  {'c':<24} -\none line\n[\n  1\n]\n"


def test_figures():
    assert (figure(None), figure(2.0), figure(1234, ",")) == ("-", "2.0000", "1,234")
    assert [duration(s) for s in (-1, 59.6, 75, 3600, 90000)] == ["0s", "1m0s", "1m15s", "1h0m", "1d1h"]
