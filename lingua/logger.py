"""Log to the terminal and the run folder, in one format that shows the rank.

Secrets are masked. Rank 0 logs to the terminal, other ranks only warnings; each rank has its own file. A log file that
cannot be written (disk full, quota) never ends a run: the terminal shows one message, and the run continues.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TextIO

from lingua.masking import public_text

MAIN_LOG = "train.log"
RANK_LOGS = "logs"


OBEYED = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Characters that a terminal would interpret instead of showing: control characters except newline and tab, and text
direction marks; also lone surrogates, which no terminal can show."""


def printable(text: str) -> str:
    """Escape control characters in text from other people's data, models, configs and folders."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Format(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {rank}: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return printable(public_text(super().format(record)))


class _ShortFormat(_Format):
    """Short format for a terminal: time of day and message, wrapped between words."""

    def __init__(self, rank: int) -> None:
        logging.Formatter.__init__(self, f"%(asctime)s {f'rank {rank}: ' if rank else ''}%(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        if record.levelno > logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return wrapped(super().format(record), shutil.get_terminal_size().columns)


def wrapped(text: str, width: int) -> str:
    """Wrap lines between words, except those that begin with spaces: commands and samples are unchanged."""
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width or line.startswith(" "):
            lines.append(line)
        else:
            indent = " " * len("00:00:00 ")
            whole = re.sub(r"(?<=[^\d\s]) (?=\d)", "\xa0", line)  # a number stays with its name
            parts = textwrap.wrap(
                whole, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
            lines += [part.replace("\xa0", " ") for part in parts]
    return "\n".join(lines)


class _Terminal(logging.StreamHandler):
    """Writes to the current sys.stderr, so that lines appear above a progress bar, not inside it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


class _SturdyFile(logging.FileHandler):
    """A log file that tolerates a full disk."""

    _complained = False

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            self._complain()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        self._complain()

    def _complain(self) -> None:
        if not self._complained:
            self._complained = True
            print(
                f"cannot write {self.baseFilename}: {sys.exc_info()[1]}; the run continues without it", file=sys.stderr
            )


def start_logging(rank: int = 0, level: int = logging.INFO, own_packages: tuple[str, ...] = ("lingua", "apps")) -> None:
    """Set up terminal output; call once, as soon as the rank is known. Other packages log only warnings."""
    terminal = _Terminal()
    terminal.setFormatter(_ShortFormat(rank) if on_terminal() else _Format(rank))
    terminal.setLevel(level if rank == 0 else logging.WARNING)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(terminal)
    root.setLevel(logging.WARNING)
    for name in own_packages:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


def log_to_folder(run_dir: Path, rank: int) -> logging.Handler:
    """Also log to this rank's file in the run folder and return the handler; the caller removes it at the end."""
    path = run_dir / MAIN_LOG if rank == 0 else run_dir / RANK_LOGS / f"rank_{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _SturdyFile(path, encoding="utf-8")
    handler.setFormatter(_Format(rank))
    logging.getLogger().addHandler(handler)
    return handler


def on_terminal() -> bool:
    """Return whether output goes to a terminal, where progress bars are drawn instead of plain lines."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
