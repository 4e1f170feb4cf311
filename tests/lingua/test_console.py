"""What commands print: tables, figures, progress."""

from __future__ import annotations

import errno
import io
import json
import sys
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


def test_figures_are_never_wrapped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    figures = ("loss", "tokens/s")
    show_table(("run", *figures), [("out/a_run_with_a_name_of_37_characters", "3.1234", "123,456")], right=figures)
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert first[1:] == ["3.1234", "123,456"]
    assert first[0] + second[0] == "out/a_run_with_a_name_of_37_characters"


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
    assert (figure(None), figure(2.0), figure(1234, ",")) == ("-", "2.0000", "1,234")
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
    assert metrics_line(METRICS, 10).startswith("step 3/10  loss 2.5000")


@pytest.mark.parametrize(
    ("unit", "text"), [("steps", ("step 3/10", "left 1m1s")), ("bytes", ("3 B of 10 B", "/s, left"))]
)
def test_a_terminal_gets_a_bar(
    unit: Literal["steps", "bytes"], text: tuple[str, str], capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    caplog.set_level("INFO")
    with Progress(bar=True) as progress:
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


def test_bytes_off_a_terminal_are_a_few_plain_lines(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    ticks = iter([0.0, 2.0])
    with Progress(bar=False, now=lambda: next(ticks)) as progress:
        progress.begin("sort", 1000)
        for _ in range(4):
            progress.advance(250)
    assert caplog.messages == [
        "sort: 1000 B",
        *(f"sort: {n}% of 1000 B" for n in (20, 50, 70)),
        "sort: 1000 B in 2.0 s",
    ]
    assert progress.seconds == {"sort": 2.0}


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
