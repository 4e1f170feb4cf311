"""Run measurements with a time budget, each in its own process, and save all results after each one.

GPU time may be short. So the JSON and the table beside it are rewritten after each measurement: however the benchmark
ends, they are complete and list what is missing. Torch-free.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

from lingua.files import human_bytes, write_json, write_whole

PR_SET_PDEATHSIG = 1  # prctl(2)
OUT_OF_MEMORY = "out_of_memory"
Found = dict[str, Any]


class Here(NamedTuple):
    """Inputs of a measurement."""

    folder: Path
    peaks: Mapping[str, float]
    cases: Mapping[str, Found]
    """Results so far."""


class Planned(NamedTuple):
    """A measurement of the suite. It starts only if `seconds` are left, and is killed after twice as many."""

    name: str
    seconds: float
    """Expected duration; its estimate is beside each measurement."""
    attempts: Sequence[tuple[int, Callable[[Here], Found]]]
    """(batch, function); the next one is tried, in a fresh process, after `out_of_memory`."""
    needs_bytes: Mapping[str, int] = {}
    """Disk space needed, by folder; "" stands for its own folder."""


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends for any reason; its own children must ask again."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def apart(act: Callable[..., Any], *args: Any, limit_s: float = 600.0) -> Any:
    """Call a function in a forked process and return its result, so that its memory and settings end with it.

    After `limit_s` the process is killed with its process group.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        die_with_parent()
        os.setpgid(0, 0)
        try:
            sending.send(act(*args))
        except Exception as error:  # the table shows it as this case's result
            kind = OUT_OF_MEMORY if is_out_of_memory(error) else "error"
            sending.send({kind: f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"})

    process = context.Process(target=run)
    process.start()
    sending.close()
    assert process.pid is not None
    result = None
    try:
        if not receiving.poll(limit_s):
            return {"error": f"killed: it took longer than the {limit_s:.3g} s that it had"}
        with suppress(EOFError):
            result = receiving.recv()
            process.join(10)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()  # until then its GPU memory is not free
        receiving.close()
    return {"error": f"the process ended with {process.exitcode}"} if result is None else result


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means out of memory, also cuBLAS's CUBLAS_STATUS_ALLOC_FAILED."""
    return type(error).__name__ == "OutOfMemoryError" or "ALLOC_FAILED" in str(error)


def shortage(needs_bytes: Mapping[str, int], folder: Path, free: Callable[[str], int]) -> str | None:
    """Return a sentence about a folder with too little space, or None."""
    for name, needed in needs_bytes.items():
        place = name or str(folder)
        if (there := free(place)) < needed:
            return f"needs {human_bytes(needed)} in {place}, which has {human_bytes(there)} free"
    return None


def try_out(planned: Planned, here: Here, limit_s: float) -> Found:
    """Measure with the first attempt that fits in memory."""
    end_s, too_large = time.monotonic() + limit_s, []
    for batch, act in planned.attempts:
        found = apart(act, here, limit_s=max(0.1, end_s - time.monotonic()))
        if OUT_OF_MEMORY not in found:
            return found | ({"too_large": too_large} if too_large else {})
        too_large.append(batch)
    return {"error": f"no batch of {too_large} fits into the memory"}


class Ledger:
    """The growing result; `save` writes JSON and table."""

    def __init__(
        self,
        out: Path | None,
        names: Sequence[str],
        show: Callable[[Mapping[str, Any]], None],
        judge: Callable[[Mapping[str, Found]], list[Any]],
    ) -> None:
        self.result: Found = {"machine": {}, "peaks": {}, "peak": "not known", "cases": {}, "seconds": {}}
        self.result["left_out"] = list(names)
        self._out, self._show, self._judge = out, show, judge

    def save(self, running: str | None) -> None:
        """Write everything; `running` is the measurement that a kill from now on would lose."""
        self.result |= {"running": running, "goals": self._judge(self.result["cases"])}
        if self._out is None:
            return
        write_json(self._out, self.result)
        with redirect_stdout(io.StringIO()) as table:
            self._show(self.result)
        write_whole(self._out.with_suffix(".txt"), table.getvalue())

    def add(self, name: str, found: Found, seconds: float) -> None:
        self.result["cases"][name] = found
        self.result["seconds"][name] = seconds
        self.result["left_out"].remove(name)


def measure_all(
    plan: Sequence[Planned],
    ledger: Ledger,
    here: Here,
    end_s: float,
    free: Callable[[str], int],
    say: Callable[..., None],
) -> None:
    """Measure one after another until `end_s` (of `time.monotonic`); save after each."""
    for planned in plan:
        left_s = end_s - time.monotonic()
        if left_s < planned.seconds:
            say(f"{planned.name}: left out, as it takes {planned.seconds:.0f} s and {left_s:.0f} s are left")
            continue
        ledger.save(running=planned.name)
        say(f"{planned.name} ({left_s:.0f} s left)")
        short = shortage(planned.needs_bytes, here.folder, free)
        found = try_out(planned, here, min(2 * planned.seconds, left_s)) if short is None else {"error": short}
        ledger.add(planned.name, found, left_s - (end_s - time.monotonic()))
    ledger.save(running=None)
