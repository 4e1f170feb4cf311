"""Logging: one format with rank, to the terminal and to the run folder.

Promise: rank 0 speaks on the terminal, other ranks only from WARNING on; each rank writes a file of its own. A log
that cannot be written (disk full, quota) never ends a run: that is said once on the terminal, and the run goes on.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

MAIN_LOG = "train.log"
RANK_LOGS = "logs"


class _Format(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {rank}: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class _Terminal(logging.StreamHandler):
    """Writes to what sys.stderr is at that moment, so that lines appear above a progress bar and not within it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


class _SturdyFile(logging.FileHandler):
    """A log file whose disk may fill up."""

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
            print(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}; the run goes on without it", file=sys.stderr)


def start_logging(rank: int = 0, level: int = logging.INFO, own_packages: tuple[str, ...] = ("lingua", "apps")) -> None:
    """Terminal output of this process; call once, as early as the rank is known. Other packages speak from WARNING."""
    terminal = _Terminal()
    terminal.setFormatter(_Format(rank))
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
    """Also write this rank's lines into the run folder; the caller removes the handler at the end."""
    path = run_dir / MAIN_LOG if rank == 0 else run_dir / RANK_LOGS / f"rank_{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _SturdyFile(path, encoding="utf-8")
    handler.setFormatter(_Format(rank))
    logging.getLogger().addHandler(handler)
    return handler


def on_terminal() -> bool:
    """Whether a person is looking: progress bars then, plain lines otherwise."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
