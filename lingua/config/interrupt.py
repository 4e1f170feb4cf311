"""Ctrl-C while a program loads ends it with one word; programs import this before anything else, notebooks never do.

Python raises KeyboardInterrupt wherever it just is. In the midst of an import nothing answers it: it becomes a
traceback, or is lost in a library. So while something is imported, and until `run_main` has begun, the process ends at
once. At any other time a KeyboardInterrupt is raised, as usual.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_code.co_name == "run_main":
            raise KeyboardInterrupt
        frame = frame.f_back
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
    signal.signal(signal.SIGINT, _interrupt)
