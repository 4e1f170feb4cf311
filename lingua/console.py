"""What a person sees on a terminal: facts as lines, tables, JSON for scripts, progress bars on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingua.files import human_bytes
from lingua.logger import on_terminal, start_logging

if TYPE_CHECKING:
    from rich import progress as rich_progress

log = logging.getLogger(__name__)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def progress_shown() -> Progress:
    """A bar on a terminal; elsewhere plain lines on stderr."""
    start_logging()
    return Progress()


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """One JSON object, or `key  value` lines."""
    if as_json:
        show_json(facts)
        return
    for line in _lines(facts):
        print(line)


def show_json(facts: Mapping[str, Any]) -> None:
    import orjson

    print(orjson.dumps(facts, option=orjson.OPT_INDENT_2, default=str).decode())


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """A table without lines; the columns named in `right` are aligned there."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """`key  value` lines; tables indented below their key."""
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                yield f"{indent}{name} {number}"
                yield from _lines(item, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{name:<24} {', '.join(map(str, value)) or '-'}"
        elif isinstance(value, float):
            yield f"{indent}{name:<24} {value:,.4g}"
        elif isinstance(value, str) and "\n" in value:
            yield f"{indent}{name:<24} {value!r}"
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            yield f"{indent}{name:<24} {'-' if shown in (None, {}) else shown}"


class Progress:
    """A bar per stage on a terminal; elsewhere a line when a stage begins, at every tenth of it, and at its end."""

    def __init__(self, *, bar: bool | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._bar: Any = None
        self._name, self._total, self._done, self._told, self._start_s = "", 0, 0, 0, 0.0
        self.seconds: dict[str, float] = {}
        """Time of each stage that has ended."""
        if on_terminal() if bar is None else bar:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=sys.stderr),
            )

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        if self._bar:
            self._bar.stop()

    def begin(self, name: str, total_bytes: int) -> None:
        self._end()
        self._name, self._total, self._done, self._told, self._start_s = name, total_bytes, 0, 0, self._now()
        if self._bar:
            self._id = self._bar.add_task(name, total=total_bytes)
        else:
            log.info("%s: %s", name, human_bytes(total_bytes))

    def advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        tenth = 10 * self._done // max(self._total, 1)
        if self._bar:
            self._bar.update(self._id, completed=self._done)
        elif self._told < tenth < 10:
            self._told = tenth
            log.info("%s: %d%% of %s", self._name, 10 * tenth, human_bytes(self._total))

    def _end(self) -> None:
        if self._name:
            self.seconds[self._name] = self._now() - self._start_s
            if not self._bar:
                log.info("%s: %s in %.1f s", self._name, human_bytes(self._done), self.seconds[self._name])
        self._name = ""


def metrics_line(metrics: Mapping[str, float], n_steps: int) -> str:
    """One line for people."""
    parts = [
        f"step {metrics['global_step']}/{n_steps}",
        f"loss {metrics['loss/out']:.4f}",
        f"grad {metrics['optim/grad_norm']:.3g}",
        f"lr {metrics['optim/lr']:.2e}",
        f"{metrics['speed/wps']:,.0f} tokens/s",
    ]
    if "speed/mfu" in metrics:
        parts.append(f"mfu {metrics['speed/mfu']:.1%}")
    parts.append(f"left {duration(metrics['time/eta_s'])}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`75` -> `1m15s`, `90000` -> `1d1h`."""
    whole = round(max(seconds, 0))
    for name, size, small_name, small_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // small_size}{small_name}"
    return f"{whole}s"


class ProgressLine:
    """A bar with the newest metrics on a terminal; a plain line per report elsewhere. Silent on other ranks."""

    def __init__(self, name: str, n_steps: int, *, shown: bool, bar: bool | None = None) -> None:
        self._name = name
        self._n_steps = n_steps
        self._shown = shown
        self._progress: rich_progress.Progress | None = None
        self._task: rich_progress.TaskID | None = None
        if shown and (on_terminal() if bar is None else bar):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(file=sys.stderr, force_terminal=True),
            )

    def __enter__(self) -> ProgressLine:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def advance(self, step: int) -> None:
        """The bar follows every step."""
        if self._progress is None:
            return
        if self._task is None:
            self._task = self._progress.add_task(self._name, total=self._n_steps, line="")
        self._progress.update(self._task, completed=step)

    def report(self, metrics: Mapping[str, float]) -> None:
        """New metrics; needs the keys of `metrics_line`."""
        if not self._shown:
            return
        line = metrics_line(metrics, self._n_steps)
        if self._progress is None or self._task is None:
            log.info("%s", line)
        else:
            self._progress.update(self._task, line=line.partition("  ")[2])


def columns(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> list[str]:
    """Rows of text below each other, the columns in `right` at their right edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
