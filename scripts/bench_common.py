"""Helpers of the benchmarks: a corpus of source code, a clock, and output of figures."""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lingua.files import human_bytes


def write_corpus(path: Path, n_bytes: int, shortest: int = 1000, longest: int = 20_000) -> None:
    """Write jsonl documents cut from Python's own sources, with log-uniform lengths."""
    draw = random.Random(0)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(source.read_text(errors="replace") for source in sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while file.tell() < n_bytes:
            at, length = draw.randrange(len(text) - longest), int(shortest * (longest / shortest) ** draw.random())
            file.write(json.dumps({"text": text[at : at + length]}) + "\n")


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Call `act`; return (seconds, its result)."""
    start_s = time.perf_counter()
    result = act()
    return time.perf_counter() - start_s, result


@contextmanager
def work_folder(parent: Path | None) -> Iterator[Path]:
    """Make a temporary folder below `parent`, which is made if it is missing; None for the system's."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def format_figure(value: object, name: str = "") -> str:
    if isinstance(value, int | float) and name.endswith("_bytes"):
        return human_bytes(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def print_figures(figures: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>28}  {format_figure(value, name)}")
