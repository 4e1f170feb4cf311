"""What the terminal shows of runs, at every size, and what it reads of a metrics file that grows."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from apps.cli import watch as command
from apps.cli.watch import View
from lingua.report.watch import Losses, Screen, bars, pieces, plot, wrapped
from tests.cli import Lingua
from tests.lingua.report.test_history import make_run


def line(step: int, attempt: int, loss: float | None, **more: float) -> str:
    return json.dumps({"global_step": step, "incarnation": attempt, "loss/out": loss, **more}) + "\n"


def test_losses_are_read_as_they_come_and_those_of_a_rollback_are_dropped(tmp_path: Path) -> None:
    losses, file = Losses(tmp_path), tmp_path / "metrics.jsonl"
    losses.read()
    assert list(losses.steps) == []
    file.write_text(line(1, 1, 5.0) + line(2, 1, None) + line(3, 1, 4.0) + "torn\n" + line(4, 1, 3.5)[:9])
    losses.read()
    assert list(zip(losses.steps, losses.values, strict=True)) == [(1, 5.0), (3, 4.0)]
    with file.open("a") as more:
        more.write(line(4, 1, 3.5)[9:] + line(3, 2, 4.25))  # attempt 2 went back to step 2
    losses.read()
    assert list(zip(losses.steps, losses.values, strict=True)) == [(1, 5.0), (3, 4.25)]
    file.write_text(line(1, 1, 7.0, **{"loss/mean": 9.0}))  # another run took the folder
    losses.read()
    assert list(losses.values) == [9.0]


def test_pictures_of_curves() -> None:
    assert pieces([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert (bars([], 5), bars([2.0], 5)) == ("", "▅")
    assert bars([1.0, 2.0, 3.0, 4.0], 4) == "▁▃▆█"
    assert bars([1.0, 2.0, 3.0, 4.0], 2, plain=True) == "_#"
    assert plot([], [], 40, 4) == []
    drawn = plot([1, 2, 3], [3.0, 2.0, 1.0], 20, 3, plain=True)
    assert drawn[0].startswith("3.000 *")
    assert drawn[2].startswith("1.000 ")
    assert drawn[2].endswith("*")
    assert drawn[3] == "      1       step 3"
    assert wrapped(["a" * 6, "b" * 5, "c" * 30], 14) == ["a" * 6 + "   " + "b" * 5, "c" * 14]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for rate, folder in enumerate(folders):
        folder.mkdir()
        make_run(folder)
        (folder / "config.yaml").write_text(f'name: "evil\\e]0;x\\a"\nsteps: 10\noptim: {{lr: {rate + 1}e-3}}\n')
    return folders


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 12), (200, 60), (80, 6)])
@pytest.mark.parametrize("n_runs", [1, 3])
def test_the_screen_fits_every_terminal_and_obeys_no_run(
    runs: list[Path], width: int, height: int, n_runs: int
) -> None:
    screen = View(runs[:n_runs]).look()
    for encoding in ("utf-8", "ascii"):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        console = Console(file=out, width=width, height=height, force_terminal=True, color_system=None)
        lines = console.render_lines(screen, console.options.update(height=height), pad=False)
        text = ["".join(segment.text for segment in each) for each in lines]
        assert max(map(len, text)) <= width
        assert "\x1b" not in "".join(text)
        out.write("".join(text))  # raises where the terminal has no such sign
    if height >= 12:
        assert len(text) == height or n_runs > 1
    whole = "\n".join(text)
    for part in ("evil\\x1b", "finished", "10/10", *(["4.0"] if height > 6 else [])):
        assert part in whole
    assert len(screen.runs) == n_runs


def test_it_prints_once_where_nobody_watches_and_goes_on_in_a_terminal(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lingua = Lingua(capsys, "watch")
    code, out, _ = lingua(*runs)
    assert (code, out.count("finished")) == (0, 3)
    code, _, err = lingua(runs[0] / "nowhere")
    assert code != 0
    assert "nowhere does not exist" in err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    seen: list[float] = []

    def sleep(seconds: float) -> None:
        seen.append(seconds)
        (runs[0] / "stop.json").write_text('{"reason": "finished", "exit_code": 0, "step": 10}')

    monkeypatch.setattr(command.time, "sleep", sleep)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    (runs[0] / "stop.json").unlink()
    command.watch(runs[:2], every=3.0)
    assert seen == [3.0]  # until the last run was finished
    out = sys.stdout.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "killed" in out
    assert out.rstrip().count("\x1b[?1049") == 2  # the screen of before comes back, with the last picture
    assert "\x1b]0;" not in out


def test_a_sweep_is_watched_as_its_points(tmp_path: Path, runs: list[Path]) -> None:
    record = {"name": "rates", "typed": [], "keys": ["optim.lr"], "at_once": None, "jobs": []}
    record["points"] = [{"optim.lr": 1e-3}, {"optim.lr": 2e-3}]
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    runs[0].rename(tmp_path / "1")
    view = View([tmp_path])
    screen = view.look()
    assert isinstance(screen, Screen)
    assert screen.title == "sweep rates: 1 finished, 1 never ran"
    assert [run.facts.path for run in screen.runs] == [tmp_path / "1"]
    assert not view.is_over
