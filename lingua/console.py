"""Print the results of commands: facts as lines, tables, JSON for scripts; progress bars go to stderr."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, cast

import typer

from lingua.files import human_bytes
from lingua.logger import OBEYED, on_terminal, printable, start_logging

log = logging.getLogger(__name__)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
_FOR_ALL = {
    "debug": Annotated[bool, typer.Option("--debug", help="Show tracebacks.")],
    "trust": Annotated[bool, typer.Option("--trust", help="Run code that a config beside weights names.")],
}


class Commands(typer.Typer):
    """A group of commands, each with -h, --debug and --trust."""

    def __init__(self, **more: Any) -> None:
        super().__init__(
            no_args_is_help=True,
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,  # boxed help would take longer to import than everything else
            context_settings={
                "help_option_names": ["-h", "--help"],
                "token_normalize_func": lambda word: word.replace("_", "-"),  # --data_dir is --data-dir
            },
            **more,
        )

    def command(self, name: str | None = None, **more: Any) -> Any:
        """Add a command. `run_main` handles --debug and --trust; here they are only accepted."""
        register = super().command(name, **more)

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function)
            def run(*, debug: bool, trust: bool, **options: Any) -> Any:
                with redirect_stdout(cast("TextIO", _Printable(sys.stdout))):
                    return function(**options)

            signature = inspect.signature(function, eval_str=True)
            kind = inspect.Parameter.KEYWORD_ONLY
            more = [inspect.Parameter(name, kind, default=False, annotation=of) for name, of in _FOR_ALL.items()]
            setattr(run, "__signature__", signature.replace(parameters=[*signature.parameters.values(), *more]))  # noqa: B010
            run.__annotations__ = function.__annotations__ | _FOR_ALL
            register(run)
            return function

        return add


class _Printable:
    """A stream that escapes control characters, since commands print names and texts from anyone."""

    def __init__(self, unescaped: TextIO) -> None:
        self.unescaped = unescaped

    def write(self, text: str) -> int:
        self.unescaped.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


class _MayLeave:
    """A terminal that may be closed: failed output must not end a run that is saving."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._terminal.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._terminal.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)


def show(facts: Any, as_json: bool, lines: Iterable[str] | None = None) -> None:
    """Print one JSON value, or `lines`; without lines, a mapping as `key  value`."""
    if as_json:
        show_json(facts)
        return
    for line in fact_lines(facts) if lines is None else lines:
        print(line)


def show_json(facts: Any) -> None:
    import orjson

    text = orjson.dumps(facts, option=orjson.OPT_INDENT_2, default=str).decode()
    print(OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


_WORD = 16  # a longer word, such as a path, may be cut on a narrow terminal


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Print a table without lines; the columns named in `right` are numbers: right-aligned and never wrapped.

    On a terminal that is too narrow, columns named in `spare` are dropped, in order, before words are cut.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    grid = [[Text(printable(str(value)).replace("\n", "\\n")) for value in row] for row in (columns, *rows)]
    widths = {i: max(row[i].cell_len for row in grid) for i in range(len(columns))}
    least = dict(widths)
    for i, name in enumerate(columns):
        if name not in right:
            longest = max(len(word) for row in grid for word in [*row[i].plain.split(), ""])
            least[i] = min(widths[i], longest, _WORD)
    room = console.width + 2
    for i in map(columns.index, spare):
        if sum(least.values()) + 2 * len(least) > room:
            del widths[i], least[i]
    while sum(widths.values()) + 2 * len(widths) > room and widths != least:
        widths[max(widths, key=lambda i: widths[i] - least[i])] -= 1
    console.width = max(console.width, sum(widths.values()) + 2 * len(widths))  # a number that is cut misleads
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, width in widths.items():
        figures = columns[i] in right
        justify = "right" if figures else "left"
        table.add_column(grid[0][i], justify=justify, overflow="fold", no_wrap=figures, width=width)
    for row in grid[1:]:
        table.add_row(*(row[i] for i in widths))
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():  # contains our own escape codes
        print(line.rstrip(), file=getattr(sys.stdout, "unescaped", sys.stdout))


def fact_lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield `key  value` lines, with tables indented below their key."""
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}"
            yield from fact_lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                yield f"{indent}{name} {number}"
                yield from fact_lines(item, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{name:<24} {', '.join(map(str, value)) or '-'}"
        elif isinstance(value, float):
            yield f"{indent}{name:<24} {value:,.4g}"
        elif isinstance(value, str) and "\n" in value:
            yield f"{indent}{name:<24} {value!r}"
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            yield f"{indent}{name:<24} {'-' if shown in (None, {}) else shown}"


def lingua_command() -> str:
    """Return how to type the `lingua` command here."""
    if "UV" in os.environ:  # `uv run` sets it
        return "uv run lingua"
    beside = Path(sys.executable).with_name("lingua")
    return "lingua" if shutil.which("lingua") else str(beside) if beside.is_file() else "uv run lingua"


def command_lines(command: str, words: Iterable[str]) -> str:
    """Return a long command as indented lines with continuations. Words are quoted already."""
    lines = [command]
    for word in words:
        if len(lines[-1]) + len(word) > 70:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "    " + " \\\n      ".join(lines)


def progress_shown() -> Progress:
    """Start logging and return a bar on a terminal; elsewhere plain lines on stderr."""
    start_logging()
    return Progress()


_MANY_BYTES = 64 << 20  # a larger stage gets a bar at once


class Progress:
    """A progress bar on a terminal, and plain lines in the log. Several threads may advance it.

    For steps, the log gets a line per report. For a stage of bytes without a bar it gets a line at its start, at every
    tenth and at its end. A small stage has no bar and only its last line, unless it takes more than a second.
    """

    def __init__(
        self, *, shown: bool = True, bar: bool | None = None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._now, self._shown = now, shown
        self._lock = threading.Lock()
        self._name, self._unit, self._total, self._done, self._tenth, self._start_s = "", "bytes", 0, 0, 0, 0.0
        self._bar: Any = None
        self.seconds: dict[str, float] = {}
        """Duration of each finished stage."""
        if shown and (on_terminal() if bar is None else bar):
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            name = TextColumn("{task.description}", table_column=Column(max_width=18, no_wrap=True))
            columns = name, BarColumn(12), TextColumn("{task.fields[count]}")
            more = TimeElapsedColumn(), TextColumn("{task.fields[more]}")
            terminal = cast("TextIO", _MayLeave(sys.stderr))
            self._bar = Bar(*columns, *more, console=Console(file=terminal, force_terminal=True))

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the stage and release the terminal."""
        self._end()
        if self._bar:
            self._bar.stop()

    def begin(self, name: str, total: int, unit: Literal["bytes", "steps"] = "bytes", *, done: int = 0) -> None:
        self._end()
        self._name, self._unit, self._total, self._done = name, unit, total, done
        self._tenth, self._start_s = 0, self._now()
        if self._bar:
            self._id = self._bar.add_task(name, total=total, completed=done, count=self._count(), more="")
            self._bar.update(self._id, visible=self._is_long())
        elif unit == "bytes" and self._is_long():
            self._log("%s: %s", name, human_bytes(total))

    def advance(self, n: int) -> None:
        """Advance the stage by `n`."""
        with self._lock:
            self._done += n
            if not self._is_long():
                return
            if self._bar:
                self._bar.update(self._id, completed=self._done, count=self._count(), visible=True, **self._rate())
            elif self._unit == "bytes" and self._tenth < (tenth := 10 * self._done // max(self._total, 1)) < 10:
                self._tenth = tenth
                self._log("%s: %d%% of %s", self._name, 10 * tenth, human_bytes(self._total))

    def report(self, metrics: Mapping[str, float]) -> None:
        """Show new metrics, which must have the keys of `metrics_line`."""
        line, left = metrics_line(metrics, self._total).rsplit("  ", 1)
        self._log("%s", line if self._bar else f"{line}  {left}")
        if self._bar:
            self._bar.update(self._id, more=left)

    def _is_long(self) -> bool:
        return self._unit == "steps" or self._total >= _MANY_BYTES or self._now() - self._start_s >= 1

    def _count(self) -> str:
        if self._unit == "steps":
            return f"step {self._done}/{self._total}"
        return f"{human_bytes(self._done)} of {human_bytes(self._total)}"

    def _rate(self) -> dict[str, str]:
        if self._unit == "steps":
            return {}
        per_s = self._done / max(self._now() - self._start_s, 1e-9)
        return {"more": f"{human_bytes(per_s)}/s, left {duration((self._total - self._done) / max(per_s, 1e-9))}"}

    def _log(self, text: str, *values: object) -> None:
        if self._shown:
            log.info(text, *values)

    def _end(self) -> None:
        if self._name and self._unit == "bytes":
            self.seconds[self._name] = self._now() - self._start_s
            if not self._bar:
                self._log("%s: %s in %.1f s", self._name, human_bytes(self._done), self.seconds[self._name])
        self._name = ""


def figure(value: float | None, form: str | None = None) -> str:
    """Format a number; without `form`, integers with commas and others with four decimals; None is `-`."""
    return "-" if value is None else format(value, form or ("," if isinstance(value, int) else ".4f"))


def metrics_line(metrics: Mapping[str, float], n_steps: int) -> str:
    """Format the metrics of a report as one line; the loss is the mean since the previous line."""
    loss = metrics.get("loss/mean", last := metrics["loss/out"])
    parts = [
        f"step {metrics['global_step']}/{n_steps}",
        f"{'mean ' if 'loss/mean' in metrics else ''}loss {loss:.4f}",
        *([f"above floor {loss - last + above:.4f}"] if (above := metrics.get("loss/above_floor")) is not None else []),
        f"grad {metrics['optim/grad_norm']:.3g}",
        f"lr {metrics['optim/lr']:.2e}",
        f"{metrics['speed/wps']:,.0f} tokens/s",
    ]
    if "speed/mfu" in metrics:
        parts.append(f"mfu {metrics['speed/mfu']:.1%}")
    parts.append(f"left {duration(metrics['time/eta_s'])}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Format seconds: `75` as `1m15s`, `90000` as `1d1h`."""
    whole = round(max(seconds, 0))
    for name, size, small_name, small_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // small_size}{small_name}"
    return f"{whole}s"
