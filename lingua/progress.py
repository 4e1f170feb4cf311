"""How fast a run goes and how long it will take: measured here, shown as a bar on a terminal and as lines in a log.

Promise: rates are of the steps since the last report, so they are right after a resume; the time left is estimated
from this incarnation's own steps. MFU counts model FLOPs only over the device's peak (PaLM, arXiv 2204.02311, B); HFU
adds those that activation checkpointing computes again, but not what attention kernels recompute inside. A device
without a known peak, as every CPU is, has neither: a yardstick measured beside other processes may be far too short.
Cost: two clock readings per micro step.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lingua.logger import on_terminal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lap:
    """The clock at the end of a step."""

    training_s: float
    """Seconds of training since this start, pauses left out."""
    loading_s: float
    """Of these, seconds spent waiting for batches."""


class Meter:
    """Turns laps into rates. Steps are read one step late, so each keeps its own lap."""

    def __init__(
        self,
        *,
        n_steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        n_devices: int,
        peak_flops: float | None,
        recomputed_flops_per_token: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._n_steps = n_steps
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._recomputed_flops_per_token = recomputed_flops_per_token
        self._n_devices = n_devices
        self._peak_flops = peak_flops
        self._now = now
        self._start_s = now()
        self._loading_s = 0.0
        self._read: tuple[int, Lap] = (0, Lap(0.0, 0.0))
        self._first: tuple[int, Lap] | None = None  # the first report of this start

    def formula(self) -> str:
        """Say how MFU and HFU come about, with this run's numbers."""
        model, again = self._flops_per_token, self._recomputed_flops_per_token
        per_token = f"{model:.4g} FLOPs per token (6N + 12LHQS, PaLM appendix B)"
        if self._peak_flops is None:
            return f"{per_token}; no mfu, as this device's peak is not known"
        hardware = "" if again is None else f"; hfu = (that + {again:.4g} recomputed per token) likewise"
        return f"mfu = {per_token} * speed/wps / {self._peak_flops:.4g} per s{hardware}"

    def start(self, step: int) -> None:
        """`step` updates are done; the clock runs."""
        self._start_s, self._loading_s = self._now(), 0.0
        self._read = (step, self.lap())

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the wait for a batch."""
        start_s = self._now()
        yield
        self._loading_s += self._now() - start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training, such as validation or saving."""
        start_s = self._now()
        yield
        self._start_s += self._now() - start_s

    def lap(self) -> Lap:
        return Lap(self._now() - self._start_s, self._loading_s)

    def read(self, step: int, lap: Lap) -> dict[str, float]:
        """Metrics of the steps since the last reading."""
        last_step, last = self._read
        assert step > last_step
        n_steps, elapsed_s = step - last_step, max(lap.training_s - last.training_s, 1e-9)
        tokens_per_s = n_steps * self._tokens_per_step / elapsed_s / self._n_devices
        flops_per_s = tokens_per_s * self._flops_per_token
        metrics = {
            "speed/wps": tokens_per_s,
            "speed/FLOPS": flops_per_s,
            "speed/curr_iter_time": elapsed_s / n_steps,
            "speed/data_load_time": (lap.loading_s - last.loading_s) / n_steps,
        }
        if self._peak_flops is not None:
            metrics["speed/mfu"] = flops_per_s / self._peak_flops
            if self._recomputed_flops_per_token is not None:
                recomputed_per_s = tokens_per_s * self._recomputed_flops_per_token
                metrics["speed/hfu"] = (flops_per_s + recomputed_per_s) / self._peak_flops
        if self._first is None:  # the first steps compile and warm up; they say nothing about the rest
            self._first, seconds_per_step = (step, lap), elapsed_s / n_steps
        else:
            first_step, first = self._first
            seconds_per_step = (lap.training_s - first.training_s) / (step - first_step)
        metrics["time/eta_s"] = seconds_per_step * (self._n_steps - step)
        self._read = (step, lap)
        return metrics


def metrics_line(metrics: Mapping[str, float], n_steps: int) -> str:
    """One line for people."""
    parts = [
        f"step {metrics['global_step']}/{n_steps}",
        f"loss {metrics['loss/out']:.4f}",
        f"grad {metrics['optim/grad_norm']:.3g}",
        f"lr {metrics['optim/lr']:.2e}",
        f"{metrics['speed/wps']:,.0f} tokens/s",
    ]
    if "speed/mfu" in metrics:
        parts.append(f"mfu {metrics['speed/mfu']:.1%}")
    parts.append(f"left {duration(metrics['time/eta_s'])}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`75` -> `1m15s`, `90000` -> `1d1h`."""
    whole = round(max(seconds, 0))
    for name, size, small_name, small_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // small_size}{small_name}"
    return f"{whole}s"


class ProgressLine:
    """A bar with the newest metrics on a terminal; a plain line per report elsewhere. Silent on other ranks."""

    def __init__(self, name: str, n_steps: int, *, shown: bool, bar: bool | None = None) -> None:
        self._name = name
        self._n_steps = n_steps
        self._shown = shown
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if shown and (on_terminal() if bar is None else bar):
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(file=sys.stderr, force_terminal=True),
            )

    def __enter__(self) -> ProgressLine:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def advance(self, step: int) -> None:
        """The bar follows every step."""
        if self._progress is None:
            return
        if self._task is None:
            self._task = self._progress.add_task(self._name, total=self._n_steps, line="")
        self._progress.update(self._task, completed=step)

    def report(self, metrics: Mapping[str, float]) -> None:
        """New metrics; needs the keys of `metrics_line`."""
        if not self._shown:
            return
        line = metrics_line(metrics, self._n_steps)
        if self._progress is None or self._task is None:
            log.info("%s", line)
        else:
            self._progress.update(self._task, line=line.partition("  ")[2])
