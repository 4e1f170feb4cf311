"""Measure a start-up: the parts of the time from the start of the process to its first step. Torch-free."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lingua.run.metrics import is_number

EVENT = "trained"
"""Event of the line in metrics.checkpoint.jsonl that holds the times of a start-up."""
FIRST_STEP = "first step"
"""The last part of a start-up."""


def since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_began_s() -> float:
    """Return when this process began, in seconds since boot: field 22 of /proc/self/stat (proc(5))."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name before ")" may hold blanks
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


class StartUp:
    """The parts of a start-up, in the order in which they were first reached. They add up to the total."""

    def __init__(self, began_s: float | None = None, now: Callable[[], float] = since_boot_s) -> None:
        """`began_s`: by the clock `now`; None for the start of this process."""
        self._now = now
        self._last_s = process_began_s() if began_s is None else began_s
        self.parts: dict[str, float] = {}
        self.is_over = False

    def reached(self, part: str) -> None:
        """Count the time since the last call for `part`."""
        self.parts[part] = self.parts.get(part, 0.0) + self._pass()

    def leave_out(self) -> None:
        """Do not count the time since the last call, such as that of a validation before the first step."""
        self._pass()

    def _pass(self) -> float:
        before, self._last_s = self._last_s, self._now()
        return max(0.0, self._last_s - before)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def metrics(self) -> dict[str, float]:
        """Return the parts as metrics: startup/s, startup/torch_s, ..."""
        named = {f"startup/{part.replace(' ', '_')}_s": seconds for part, seconds in self.parts.items()}
        return {"startup/s": self.seconds, **named}

    def __str__(self) -> str:
        return in_words(self.parts)


def in_words(parts: Mapping[str, float]) -> str:
    """Return `start-up 6.1 s: python 0.9, torch 2.1, ...`."""
    return f"start-up {sum(parts.values()):.1f} s: " + ", ".join(f"{part} {s:.1f}" for part, s in parts.items())


def parts_in(note: Mapping[str, Any]) -> dict[str, float]:
    """Return the parts in a line of EVENT."""
    parts = note.get("parts")
    return {str(part): float(s) for part, s in parts.items() if is_number(s)} if isinstance(parts, dict) else {}
