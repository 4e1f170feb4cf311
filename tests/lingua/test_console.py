"""What commands print: tables, figures, progress."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
from itertools import chain, repeat
from pathlib import Path
from typing import Literal

import pytest

from lingua.console import Commands, Progress, duration, figure, lingua_command, metrics_line, show, show_table


def test_a_table_is_aligned_and_never_cut_or_taken_for_markup(capsys: pytest.CaptureFixture[str]):
    path = "/a/long/path" * 30
    show_table(("run", "[bold]n"), [(path, 7), ("[red]x", 1234)], right=("[bold]n",))
    width = len(path)
    assert capsys.readouterr().out.splitlines() == [
        f"{'run':<{width}}  [bold]n", f"{path}        7", f"{'[red]x':<{width}}     1234",
    ]  # fmt: skip


ROWS = [("out/a_run_with_a_name_of_37_characters", "failed (nan)", "3.1234", "123,456", "100, 3m ago")]


@pytest.mark.parametrize(
    ("width", "names", "lines"),
    [
        (100, "run state loss tokens/s saved", 1),
        (70, "run state loss tokens/s saved", 2),
        (44, "run state loss tokens/s", 3),
        (20, "run state loss tokens/s", 3),
    ],
)
def test_figures_and_words_are_not_cut_where_a_terminal_is_narrow(
    width: int, names: str, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show_table(("run", "state", "loss", "tokens/s", "saved"), ROWS, right=("loss", "tokens/s"), spare=("saved",))
    head, *shown = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert head.split() == names.split()
    assert len(shown) == lines
    words = " ".join(shown).split()
    for word in ("failed", "(nan)", "3.1234", "123,456", *(("100,", "3m", "ago") if "saved" in names else ())):
        words.remove(word)
    assert "".join(words) == ROWS[0][0]


def test_facts_are_lines_or_json(capsys: pytest.CaptureFixture[str]):
    show({"a": 1234, "b": {"c": None}}, False)
    show({"a": 1}, False, ["one line"])
    show([1], True, ["one line"])
    assert capsys.readouterr().out == f"{'a':<24} 1,234\nb\n  {'c':<24} -\none line\n[\n  1\n]\n"


def test_a_terminal_that_is_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            self.write("")

    monkeypatch.setattr(sys, "stderr", Closed())
    with Progress(bar=True) as progress:
        progress.begin("x", 10, "steps")
        progress.advance(1)


def test_figures():
    assert (figure(None), figure(2.0), figure(0.1, ".2f")) == ("-", "2.0000", "0.10")
    assert [figure(count) for count in (0, 1, 1234)] == ["0", "1", "1,234"]
    assert [duration(s) for s in (-1, 59.6, 75, 3600, 90000)] == ["0s", "1m0s", "1m15s", "1h0m", "1d1h"]


METRICS = {
    "global_step": 3, "loss/out": 2.5, "optim/grad_norm": 0.5, "optim/lr": 1e-3, "speed/wps": 1234.5, "time/eta_s": 61,
}  # fmt: skip


@pytest.mark.parametrize("shown", [True, False])  # rank 0; other ranks
def test_a_log_gets_one_plain_line_per_report(shown: bool, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    with Progress(shown=shown, bar=False) as progress:
        progress.begin("run", 10, "steps")
        progress.advance(3)
        progress.report(METRICS)
    assert caplog.messages == ([metrics_line(METRICS, 10)] if shown else [])
    assert metrics_line(METRICS, 10).startswith("step 3/10  loss 2.5000  grad")
    several = METRICS | {"loss/mean": 2.75, "loss/above_floor": 0.5}
    assert metrics_line(several, 10).startswith("step 3/10  mean loss 2.7500  above floor 0.7500  grad")


@pytest.mark.parametrize(
    ("unit", "text"), [("steps", ("step 3/10", "left 1m1s")), ("bytes", ("3 B of 10 B", "/s, left"))]
)
def test_a_terminal_gets_a_bar(
    unit: Literal["steps", "bytes"], text: tuple[str, str], capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    caplog.set_level("INFO")
    ticks = chain([0.0], repeat(2.0))
    with Progress(bar=True, now=lambda: next(ticks)) as progress:
        progress.begin("a name that is longer than its column", 10, unit, done=2)
        progress.advance(1)
        if unit == "steps":
            progress.report(METRICS)
    err = capsys.readouterr().err
    assert all(part in err for part in ("a name that is lo", *text)), err
    assert caplog.messages == ([metrics_line(METRICS, 10).removesuffix("  left 1m1s")] if unit == "steps" else [])


def test_the_next_command_is_spelled_as_it_works_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert lingua_command() == "uv run lingua"
    (tmp_path / "bin").mkdir()
    own = tmp_path / "bin" / "lingua"
    own.touch(0o755)
    assert lingua_command() == str(own)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert lingua_command() == "lingua"
    monkeypatch.setenv("UV", "/usr/bin/uv")
    assert lingua_command() == "uv run lingua"


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_bytes_off_a_terminal_are_a_few_plain_lines_and_one_if_they_are_quick(
    seconds: float, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    ticks = chain([0.0, 0.0], repeat(seconds))
    with Progress(bar=False, now=lambda: next(ticks)) as progress:
        progress.begin("sort", 1000)
        for _ in range(4):
            progress.advance(250)
    tenths = [f"sort: {n}% of 1000 B" for n in (20, 50, 70)] if seconds > 1 else []
    assert caplog.messages == [*tenths, f"sort: 1000 B in {seconds} s"]
    assert progress.seconds == {"sort": seconds}


def test_many_bytes_are_announced_at_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    with Progress(bar=False) as progress:
        progress.begin("sort", 1 << 30)
        assert caplog.messages == ["sort: 1.0 GiB"]


HOSTILE = "a\x1b]0;owned\x07\x9b31m\u202eb\rc\nd"


def test_foreign_text_moves_no_cursor_and_forges_no_row(capsys: pytest.CaptureFixture[str]):
    commands = Commands()

    @commands.command("show")
    def _show() -> None:
        show_table((HOSTILE,), [(HOSTILE,)])
        show({"name": HOSTILE}, False)
        show({"name": HOSTILE}, True)
        print(HOSTILE)

    @commands.command("other")
    def _other() -> None: ...

    commands(["show"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u202e", "\r"}
    escaped = r"a\x1b]0;owned\x07\x9b31m\u202eb\rc"
    assert shown.splitlines()[:2] == [rf"{escaped}\nd"] * 2
    assert shown.splitlines()[-2:] == [escaped, "d"]
    assert json.loads(shown[shown.index("{") : shown.rindex("}") + 1]) == {"name": HOSTILE}
