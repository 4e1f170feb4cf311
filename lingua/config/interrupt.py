"""Make Ctrl-C end a program with one word while it loads. Programs import this before anything else, notebooks never.

Python raises KeyboardInterrupt wherever it is. In the middle of an import nothing handles it: it becomes a traceback,
or a library swallows it. So while something is imported, and until `run_main` has begun, the process ends at once. At
any other time a KeyboardInterrupt is raised, as usual.
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


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if the shell ignores it
    signal.signal(signal.SIGINT, _interrupt)
