"""Profiling windows: a torch trace and a memory snapshot at chosen steps; peak memory for the metrics.

Promise: outside its windows it does nothing. Traces open in https://ui.perfetto.dev, memory snapshots in
https://docs.pytorch.org/memory_viz.
Cost: inside a window steps are several times slower; a trace of two steps is 1-50 MB.
"""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity

from lingua.schema import ProfilerArgs

log = logging.getLogger(__name__)


class Profiler:
    """Call `step(n)` after update n of this start; windows count from the start, as lingua's do."""

    def __init__(self, args: ProfilerArgs, run_dir: Path, device: torch.device, rank: int) -> None:
        self._args = args
        self._folder = run_dir / args.trace_folder
        self._device = device
        self._rank = rank
        self._steps = 0
        self._trace: torch.profiler.profile | None = None
        self._recording_memory = False

    def __enter__(self) -> Profiler:
        self._open_windows()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_trace()
        self._close_memory()

    def step(self, step: int) -> None:
        """One more update is done; `step` names files."""
        if not self._args.run:
            return
        self._steps += 1
        if self._trace is not None and self._steps >= self._args.profile_warmup + self._args.profile_steps:
            self._close_trace(step)
        if self._recording_memory and self._steps >= self._args.mem_warmup + self._args.mem_steps:
            self._close_memory(step)
        self._open_windows()

    def _open_windows(self) -> None:
        args = self._args
        if not args.run:
            return
        if args.profile_steps and self._steps == args.profile_warmup:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
            self._trace.start()
        if args.mem_steps and self._steps == args.mem_warmup and self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)
            self._recording_memory = True

    def _close_trace(self, step: int | None = None) -> None:
        if self._trace is None:
            return
        self._trace.stop()
        path = self._path("trace", step, "json.gz")
        self._trace.export_chrome_trace(str(path))
        self._trace = None
        log.info("profile: trace written to %s", path)

    def _close_memory(self, step: int | None = None) -> None:
        if not self._recording_memory:
            return
        path = self._path("memory", step, "pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        self._recording_memory = False
        log.info("profile: memory snapshot written to %s", path)

    def _path(self, kind: str, step: int | None, suffix: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        when = "end" if step is None else f"{step:010d}"
        return self._folder / f"{kind}_{when}_rank{self._rank}.{suffix}"


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory since the last call, in GiB and as a share of the device's; on a CPU the process's peak so far."""
    gib = 2**30
    if device.type != "cuda":
        return {"memory/max_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / gib}
    stats = torch.cuda.memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    metrics = {
        "memory/max_active_gib": stats["active_bytes.all.peak"] / gib,
        "memory/max_active_pct": 100 * stats["active_bytes.all.peak"] / total,
        "memory/max_reserved_gib": stats["reserved_bytes.all.peak"] / gib,
        "memory/max_reserved_pct": 100 * stats["reserved_bytes.all.peak"] / total,
        "memory/num_alloc_retries": stats["num_alloc_retries"],
        "memory/num_ooms": stats["num_ooms"],
    }
    torch.cuda.reset_peak_memory_stats(device)
    return metrics


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 6) -> float:
    """FLOPs/s of a square matrix product here and now, the fastest of several: what MFU on a CPU is stated against."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state stays untouched
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    (a @ a).sum().item()
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        (a @ a).sum().item()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s
