"""How the `lingua` commands print: facts as lines, tables for people, JSON for scripts, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lingua.data.stages import Progress

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def progress_shown() -> Progress:
    """A bar on a terminal; elsewhere plain lines on stderr."""
    from lingua.data.stages import Progress
    from lingua.logger import start_logging

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
