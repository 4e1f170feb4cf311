"""Profile windows of steps: time and memory of each step (light), a torch trace and a memory snapshot (heavy).

Outside its windows the profiler does nothing. `windows.py` decides which steps are in a window. File names contain the
first step of the window and the rank; a file gets its name when it is complete, except a light one, which grows. If a
file cannot be written, it is lost and the run goes on. Open traces in https://ui.perfetto.dev, memory snapshots in
https://docs.pytorch.org/memory_viz.

A light window takes a few CUDA events (read once they have passed, so nothing waits) or clock readings per step, the
allocator's counters, and one write per FLUSH_STEPS. In a heavy window steps are several times slower, a trace of two
steps is 1-50 MB, and all ranks wait while one writes it.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Protocol

import orjson
import torch
from torch.profiler import ProfilerActivity

from lingua.config.keys.profiling import ProfilerArgs
from lingua.files import no_follow, write_json
from lingua.profiling.windows import ALL, Kind, Request, Requests, allowed, answer_file, planned

log = logging.getLogger(__name__)

FLUSH_STEPS = 32
_GIB = 2**30


# -- light ---------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Takes timestamps, which are compared later."""

    def stamp(self) -> Any: ...

    def has_passed(self, stamp: Any) -> bool: ...

    def wait_for(self, stamp: Any) -> None: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


class HostClock:
    """Clock of a CPU, where work is finished when the call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.stamp = now

    def has_passed(self, stamp: float) -> bool:
        return True

    def wait_for(self, stamp: float) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class CudaClock:
    """Clock of CUDA events in the current stream: a stamp is the time on the device, not on the host."""

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, stamp: torch.cuda.Event) -> bool:
        return stamp.query()

    def wait_for(self, stamp: torch.cuda.Event) -> None:
        stamp.synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000


class StepTimes:
    """Splits each step's time into phases. `mark(phase)` assigns the time since the last mark to that phase.

    The remaining time is `rest`: reductions, metrics, validation, checkpoints. On a GPU `data` is the time in which the
    device was idle or copied the batch; waits of the host that did not delay the device do not count.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: list[tuple[str, Any]] = [("", clock.stamp())]
        self._ended: deque[tuple[dict[str, Any], list[tuple[str, Any]]]] = deque()

    def mark(self, phase: str) -> None:
        self._marks.append((phase, self._clock.stamp()))

    def end_step(self, facts: dict[str, Any]) -> None:
        """End a step; its record contains `facts`."""
        self.mark("rest")
        self._ended.append((facts, self._marks))
        self._marks = [("", self._marks[-1][1])]

    def records(self, *, wait: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the records of ended steps once each: those that the device has finished, or with `wait` all."""
        while self._ended:
            facts, marks = self._ended[0]
            if wait:
                self._clock.wait_for(marks[-1][1])
            elif not self._clock.has_passed(marks[-1][1]):
                return
            self._ended.popleft()
            times = dict.fromkeys((f"time/{phase}_s" for phase in (*PHASES, "rest")), 0.0)
            for (_, begin), (phase, end) in pairwise(marks):
                times[f"time/{phase}_s"] += self._clock.seconds(begin, end)
            total = self._clock.seconds(marks[0][1], marks[-1][1])
            rounded = {key: round(value, 6) for key, value in {"time/step_s": total, **times}.items()}
            yield {**facts, **rounded}


PHASES = ("data", "forward", "backward", "optimizer")


class LightWindow:
    """Writes the records of steps to one file."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self.times = StepTimes(clock)
        self._held: list[bytes] = []

    def end_step(self, facts: dict[str, Any]) -> None:
        self.times.end_step(facts)
        self._hold(self.times.records())
        if len(self._held) >= FLUSH_STEPS:
            self._flush()

    def close(self) -> None:
        self._hold(self.times.records(wait=True))
        self._flush()

    def _hold(self, records: Iterator[dict[str, Any]]) -> None:
        self._held += [orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records]

    def _flush(self) -> None:
        held, self._held = self._held, []
        try:
            with open(self.path, "ab", opener=no_follow) as file:
                file.write(b"".join(held))
        except OSError as error:
            log.warning("profile: %d lines lost, cannot write %s: %s", len(held), self.path, error.strerror)


class MemoryMeter:
    """Measures device memory. Peaks are per step in light windows, and since the last report for the metrics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks: dict[str, int] = {}

    def step(self) -> dict[str, float]:
        """Return the memory at the end of a step and its peak."""
        if self._device.type != "cuda":
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            return {"memory/rss_gib": round(pages * os.sysconf("SC_PAGE_SIZE") / _GIB, 6)}
        stats = self._read()
        gib = {
            "memory/allocated_gib": stats["allocated_bytes.all.current"],
            "memory/reserved_gib": stats["reserved_bytes.all.current"],
            "memory/max_active_gib": stats["active_bytes.all.peak"],
        }
        counts = {"memory/num_alloc_retries": stats["num_alloc_retries"], "memory/num_ooms": stats["num_ooms"]}
        return {key: round(value / _GIB, 6) for key, value in gib.items()} | counts

    def report(self) -> dict[str, float]:
        """Return peaks since the last report, in GiB and as a share of the device; on a CPU, the process's peak."""
        if self._device.type != "cuda":
            return {"memory/max_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB}
        stats = self._read()
        total = torch.cuda.get_device_properties(self._device).total_memory
        peaks, self._peaks = self._peaks, {}
        return {
            "memory/max_active_gib": peaks["active"] / _GIB,
            "memory/max_active_pct": 100 * peaks["active"] / total,
            "memory/max_reserved_gib": peaks["reserved"] / _GIB,
            "memory/max_reserved_pct": 100 * peaks["reserved"] / total,
            "memory/num_alloc_retries": stats["num_alloc_retries"],
            "memory/num_ooms": stats["num_ooms"],
        }

    def _read(self) -> dict[str, Any]:
        """Return the allocator's counters since the last reading."""
        stats = torch.cuda.memory_stats(self._device)
        for kind in ("active", "reserved"):
            self._peaks[kind] = max(self._peaks.get(kind, 0), stats[f"{kind}_bytes.all.peak"])
        torch.cuda.reset_peak_memory_stats(self._device)
        return stats


# -- windows -------------------------------------------------------------------------------------------------------


class Profiler:
    """Opens and closes windows; the loop calls `mark`, `read` and `step`. Windows count steps of this attempt."""

    def __init__(
        self,
        args: ProfilerArgs,
        run_dir: Path,
        device: torch.device,
        rank: int,
        requests: Requests | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.memory = MemoryMeter(device)
        self.requests = requests or Requests()
        self._args, self._device, self._rank = args, device, rank
        self._folder = run_dir / args.trace_folder
        self._clock = clock or (CudaClock() if device.type == "cuda" else HostClock())
        self._done = 0
        """Steps done in this attempt."""
        self._next = 1
        """Number of the next step."""
        self._granted: deque[Request] = deque()
        self._asked: Request | None = None
        """The request whose window is open."""
        self._asked_until = 0
        """Value of `_done` at which it closes."""
        self._asked_files: list[str] = []
        self._light: LightWindow | None = None
        self._trace: torch.profiler.profile | None = None
        self._trace_path = self._memory_path = self._folder
        self._recording_memory = False

    def start(self, step: int) -> None:
        """Start after `step` updates of the run."""
        self._next = step + 1
        self._open_and_close()

    def mark(self, phase: str) -> None:
        """Assign the time since the last mark to one of PHASES."""
        if self._light is not None:
            self._light.times.mark(phase)

    def read(self, sums: Mapping[str, float]) -> None:
        """Take a request that all ranks agree on; its window begins with the next step."""
        request = self.requests.agreed(sums, max(1, self._args.profile_steps))
        if request is not None:
            self._granted.append(request)

    def step(self, step: int) -> None:
        """Count one more update; open and close windows."""
        if self._light is not None:
            self._light.end_step({"global_step": step, "rank": self._rank, **self.memory.step()})
        self._done, self._next = self._done + 1, step + 1
        if self._asked is not None and self._done >= self._asked_until:
            self._end_asked()
        if self._asked is None and self._granted:
            self._begin_asked(self._granted.popleft())
        self._open_and_close()

    def _begin_asked(self, request: Request) -> None:
        """Open the window of a request, with its own files, at the next step."""
        self._close(request.kinds)
        self._asked, self._asked_until, self._asked_files = request, self._done + request.n_steps, []
        if self._rank == 0:
            kind, last = "light and heavy" if request.heavy else "light", self._next + request.n_steps - 1
            log.info("profile: asked for, %s, steps %d to %d, into %s", kind, self._next, last, self._folder)

    def _end_asked(self) -> None:
        """Close the window of the request and answer the waiting caller."""
        assert self._asked is not None
        request, self._asked = self._asked, None
        self._close(request.kinds)
        if request.id and self._rank == 0:
            files = [name for name in self._asked_files if (self._folder / name).exists()]
            try:
                write_json(answer_file(self._folder, request.id), {"files": files, "step": self._next - 1})
            except OSError as error:
                log.warning("profile: cannot answer in %s: %s", self._folder, error.strerror)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._asked is not None:
            self._end_asked()
        self._close(ALL)

    def _open_and_close(self) -> None:
        wanted = planned(self._args, self._done, self._rank)
        if self._asked is not None:
            wanted |= self._asked.kinds & allowed(self._args, self._rank)
        if self._device.type != "cuda":
            wanted -= {"memory"}
        is_open = self._open_kinds()
        self._close(is_open - wanted)
        for kind in sorted(wanted - is_open):
            self._open(kind)

    def _open_kinds(self) -> frozenset[Kind]:
        states: dict[Kind, bool] = {
            "light": self._light is not None,
            "trace": self._trace is not None,
            "memory": self._recording_memory,
        }
        return frozenset(kind for kind, is_open in states.items() if is_open)

    def _open(self, kind: Kind) -> None:
        if kind == "light":
            self._light = LightWindow(self._path("light", "jsonl"), self._clock)
        elif kind == "trace":
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._trace_path = self._path("trace", "json.gz")
            self._trace = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
            self._trace.start()
        else:
            self._memory_path = self._path("memory", "pickle")
            torch.cuda.memory._record_memory_history(max_entries=100_000)
            self._recording_memory = True

    def _close(self, kinds: frozenset[Kind]) -> None:
        if self._light is not None and "light" in kinds:
            self._light.close()
            self._light = None
        if self._trace is not None and "trace" in kinds:
            trace, self._trace = self._trace, None
            trace.stop()
            self._write(self._trace_path, trace.export_chrome_trace)
        if self._recording_memory and "memory" in kinds:
            self._write(self._memory_path, torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording_memory = False

    def _path(self, kind: Kind, suffix: str) -> Path:
        name = f"{kind}_{self._next:010d}_rank{self._rank}.{suffix}"
        if self._asked is not None:
            self._asked_files.append(name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("profile: cannot make %s: %s", self._folder, error.strerror)
        return self._folder / name

    def _write(self, path: Path, export: Callable[[str], object]) -> None:
        """Let `export` write a file, which gets its name when it is complete."""
        try:
            with TemporaryDirectory(prefix=".profile-", dir=path.parent) as folder:  # torch would follow a planted link
                draft = Path(folder, path.name)  # torch compresses depending on the suffix
                export(str(draft))
                draft.replace(path)
        except (OSError, RuntimeError) as error:
            log.warning("profile: cannot write %s: %s", path, error)
            return
        log.info("profile: written to %s", path)
