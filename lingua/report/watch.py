"""Show a live view of runs in a terminal, also over ssh: loss curve, speed, time left, checkpoints, evaluations.

It reads only run folders, and only new lines of the metrics.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lingua.console import duration, figure
from lingua.logger import printable
from lingua.report.facts import RunFacts
from lingua.report.history import LOSS, MEAN_LOSS
from lingua.report.status import LIVING, Status, state_text
from lingua.run.metrics import EVAL_FILE, METRICS_FILE, SAMPLES_FILE, is_number, last_line, record_in

PANEL_COLUMNS, PANEL_LINES = 38, 14
"""Minimum part of the screen for a run; if there is less, all runs become rows of a table."""
_STYLES = {"running": "green", "starting": "yellow", "queued": "yellow", "finished": "cyan", "failed": "red"}
_STYLES |= {"killed": "red"}
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # dots of a braille character, by column and row
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#"


@dataclass
class Losses:
    """The losses of a run that count, read as its metrics file grows."""

    run_dir: Path
    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    _offset: int = 0

    def read(self) -> None:
        """Read the lines appended since the last call; an incomplete line waits for the next one."""
        try:
            with (self.run_dir / METRICS_FILE).open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # another run uses the folder now
                    self.steps, self.values, self._offset = array("d"), array("d"), 0
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._take(line)
        except OSError:  # does not exist yet, or the disk hangs: the next call tries again
            return

    def _take(self, line: bytes) -> None:
        record = record_in(line)
        if record is None or not is_number(record.get(LOSS)) or "global_step" not in record:
            return
        step = record["global_step"]
        while self.steps and self.steps[-1] >= step:  # the run went back to a checkpoint
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(record[MEAN_LOSS] if is_number(record.get(MEAN_LOSS)) else record[LOSS])


# -- text charts ---------------------------------------------------------------------------------------------------


def pieces(values: Sequence[float], n: int) -> list[float]:
    """Return the means of at most n pieces of about equal length."""
    n = min(n, len(values))
    limits = [round(i * len(values) / n) for i in range(n + 1)] if n else []
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(limits)]


def limits_of(values: Sequence[float]) -> tuple[float, float]:
    """Return the range to draw, without the first twentieth, in which a loss falls steeply."""
    later = values[len(values) // 20 :]
    low, high = min(later), max(later)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def bars(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """Draw a curve in one line of block characters; `plain`: ASCII."""
    signs, means = _PLAIN_BARS if plain else _BARS, pieces(values, width)
    if not means:
        return ""
    low, high = limits_of(means)
    top = len(signs) - 1
    return "".join(signs[min(top, max(0, round(top * (mean - low) / (high - low))))] for mean in means)


def plot(steps: Sequence[float], values: Sequence[float], width: int, height: int, *, plain: bool = False) -> list[str]:
    """Draw a curve in lines of `width` characters, with its range on the left and the steps below."""
    if not values:
        return []
    low, high = limits_of(pieces(values, 400))
    names = [f"{high:.3f}", f"{low:.3f}"]
    edge = max(map(len, names)) + 1
    columns, rows = (width - edge, height) if plain else (2 * (width - edge), 4 * height)
    first, last = steps[0], steps[-1]
    x = np.rint((columns - 1) * (np.asarray(steps) - first) / max(last - first, 1)).astype(np.intp)
    n = np.bincount(x)
    means = np.bincount(x, np.asarray(values))[n > 0] / n[n > 0]
    levels = np.interp(np.arange(len(n)), np.flatnonzero(n), means)
    cells: dict[tuple[int, int], int] = {}
    before = None
    for x, y in enumerate(
        np.rint((rows - 1) * (1 - np.clip((levels - low) / (high - low), 0, 1))).astype(int).tolist()
    ):
        for each in range(min(y, y if before is None else before + 1), max(y, y if before is None else before - 1) + 1):
            place = (each, x) if plain else (each // 4, x // 2)
            cells[place] = cells.get(place, 0) | (0 if plain else _DOTS[x % 2][each % 4])
        before = y
    lines = []
    for row in range(height):
        name = names[0] if row == 0 else names[1] if row == height - 1 else ""
        signs = (cells.get((row, column)) for column in range(width - edge))
        drawn = (" " if sign is None else "*" if plain else chr(0x2800 + sign) for sign in signs)
        lines.append((f"{name:>{edge - 1}} " + "".join(drawn)).rstrip())
    begin, end = f"{first:,.0f}", f"step {last:,.0f}"
    return [*lines, " " * edge + begin + end.rjust(max(len(end) + 1, width - edge - len(begin)))]


# -- screen --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A run on the screen."""

    label: str
    facts: RunFacts
    status: Status
    losses: Losses

    @property
    def scores(self) -> dict[str, float]:
        """Main figures of the newest evaluation."""
        found = last_line(self.facts.path / EVAL_FILE) or {}
        return {key: value for key, value in found.items() if "/" in key and key.endswith(("/acc", "/bpb", "_avg"))}

    @property
    def sample(self) -> str:
        record = last_line(self.facts.path / SAMPLES_FILE) or {}
        return f"{record['prompt']}{record['text']}" if {"prompt", "text"} <= record.keys() else ""


class Screen:
    """All watched runs, in the size of the terminal: side by side, or as rows of a table if there are too many."""

    def __init__(self, title: str, runs: Sequence[Watched]) -> None:
        self.title, self.runs = title, runs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = not options.encoding.startswith("utf")
        across = max(1, min(len(self.runs), options.max_width // PANEL_COLUMNS))
        down = -(-len(self.runs) // across)
        across = -(-len(self.runs) // down)
        width, height = options.max_width, (options.height or (24 * down if down < 3 else 0)) - bool(self.title)
        if self.title:
            yield Text(_shown(self.title, plain), style="bold", no_wrap=True, overflow="crop")
        if height // down < PANEL_LINES and len(self.runs) > 1:
            yield from self._table(width, height - 2 if options.height else len(self.runs), plain)
            return
        grid = Table.grid(expand=True, padding=(0, 2 if across > 1 else 0, 1 if down > 1 else 0, 0))
        panel = width // across - 2 * (across > 1)
        for _ in range(across):
            grid.add_column(width=panel)
        for begin in range(0, len(self.runs), across):
            group = self.runs[begin : begin + across]
            grid.add_row(*(_panel(run, panel, height // down - (down > 1), plain) for run in group))
        yield grid

    def _table(self, width: int, n_rows: int, plain: bool) -> Iterator[RenderableType]:
        is_wide, names = width >= 60, max(len(_shown(run.label, plain)) for run in self.runs)
        names = max(8, min(names, width - (62 if is_wide else 30)))
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("run", no_wrap=True, overflow="crop", width=names)
        table.add_column("state", no_wrap=True, overflow="crop")
        for name in ("step", "loss", *(("held-out", "left") if is_wide else ())):
            table.add_column(name, justify="right", no_wrap=True, overflow="crop")
        if is_wide:
            table.add_column("loss curve", no_wrap=True, overflow="crop")
        cut = len(self.runs) > n_rows
        for run in sorted(self.runs, key=lambda run: cut and run.status.state not in LIVING)[:n_rows]:
            one = run.status
            drawn = bars(run.losses.values, max(8, min(40, width - names - 52)), plain=plain)
            more = (figure(held_out(one.validation), ".3f"), _left(one) or "-", drawn) if is_wide else ()
            table.add_row(Text(_shown(run.label, plain)), _state(one), _step(one), figure(one.loss, ".3f"), *more)
        yield table
        if cut:
            yield Text(f"and {len(self.runs) - n_rows} more", style="dim")


def held_out(validation: Mapping[str, float]) -> float | None:
    """Return the mean held-out bits per byte of the sources."""
    found = [value for key, value in validation.items() if key.endswith("/bpb")]
    return sum(found) / len(found) if found else None


def _state(status: Status) -> Text:
    return Text(state_text(status), style=_STYLES.get(status.state, ""), no_wrap=True)


def _step(status: Status) -> str:
    return figure(status.step, ",") + (f"/{status.n_steps:,}" if status.n_steps else "")


def _left(status: Status) -> str:
    return duration(status.left_s) if status.left_s else ""


def _panel(run: Watched, width: int, height: int, plain: bool) -> RenderableType:
    """Render one run in at most `height` lines."""
    one = run.status
    name = _shown(run.label, plain)[: max(10, width - len(state_text(one)) - 2)]
    head = Text(name, style="bold", no_wrap=True)
    share = 0.0 if not one.n_steps or one.step is None else min(1.0, one.step / one.n_steps)
    room = width - len(f"{_step(one)} 100%  ")
    bar = ("#" if plain else "━") * round(share * room) + ("." if plain else "─") * (room - round(share * room))
    speed = "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f} tokens/s"
    loss = "" if one.loss is None else f"loss {one.loss:.4f}"
    facts = [loss, speed, f"left {_left(one)}" if _left(one) else ""]
    bpb, ago = held_out(one.validation), one.checkpoint_age_s
    saved = "" if one.checkpoint is None else f"checkpoint {one.checkpoint:,}"
    saved += "" if one.checkpoint is None or ago is None else f", {duration(ago)} ago"
    below = [
        "" if bpb is None else f"held-out {bpb:.4f} bits per byte",
        saved,
        "" if one.evaluated_step is None else f"evaluated up to {one.evaluated_step:,}",
        *(f"{key} {value:.4f}" for key, value in list(run.scores.items())[:4]),
    ]
    lines = [Text.assemble(head, "  ", _state(one)), Text(f"{_step(one)} {share:4.0%}  {bar}", no_wrap=True)]
    lines += [Text(line) for line in wrapped(filter(None, facts), width)]
    tail = [Text(line) for line in wrapped(filter(None, below), width)]
    sample = [
        Text(line, style="dim") for line in _folded(_shown(run.sample, plain), width)[: max(0, min(4, height - 16))]
    ]
    rest = height - len(lines) - len(tail) - len(sample) - 1
    drawn = plot(run.losses.steps, run.losses.values, width, max(rest, 2), plain=plain)
    curve = [Text(line, style="cyan", no_wrap=True) for line in drawn]
    return Group(*lines, *curve, *tail, *sample)


def wrapped(parts: Iterable[str], width: int) -> list[str]:
    """Arrange facts in lines, cutting only those that do not fit in one."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f"   {part}"
        else:
            lines.append(part[:width])
    return lines


def _shown(text: str, plain: bool) -> str:
    """Escape control characters and, if `plain`, all that is not ASCII."""
    return printable(text).encode("ascii", "replace").decode() if plain else printable(text)


def _folded(text: str, width: int) -> list[str]:
    """Fold a text into lines of the screen, with spaces for tabs."""
    whole = [line.expandtabs(4) for line in text.splitlines()]
    return [line[i : i + width] for line in whole for i in range(0, max(len(line), 1), width)]
