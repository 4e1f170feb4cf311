"""Measure how fast a run is and estimate the time left.

Rates cover the steps since the last report, so they are right after a resume; the time left is estimated from this
attempt's steps. MFU is model FLOPs over the device's peak (PaLM, arXiv 2204.02311, B); HFU adds what activation
checkpointing recomputes, but not what attention kernels recompute inside. A device without a known peak, such as a CPU,
has neither: a peak measured beside other processes may be far too low.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lap:
    """The clock at the end of a step."""

    training_s: float
    """Seconds of training in this attempt, without pauses."""
    loading_s: float
    """How many of these were spent waiting for batches."""


class Meter:
    """Turns laps into rates. Steps are reported one step late, so each keeps its own lap."""

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
        self._first: tuple[int, Lap] | None = None  # the first report of this attempt

    def formula(self) -> str | None:
        """Return the formulas of MFU and HFU with this run's numbers, or None if the device's peak is not known."""
        if self._peak_flops is None:
            return None
        model, again = self._flops_per_token, self._recomputed_flops_per_token
        per_token = f"{model:.4g} FLOPs per token (6N + 12LHQS, PaLM appendix B)"
        hardware = "" if again is None else f"; hfu = (that + {again:.4g} recomputed per token) likewise"
        return f"mfu = {per_token} * speed/wps / {self._peak_flops:.4g} per s{hardware}"

    def start(self, step: int) -> None:
        """Start the clock; `step` updates are done."""
        self._start_s, self._loading_s = self._now(), 0.0
        self._read, self._first = (step, self.lap()), None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Count the block as waiting for a batch."""
        start_s = self._now()
        yield
        self._loading_s += self._now() - start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock during the block, such as validation or saving."""
        start_s = self._now()
        yield
        self._start_s += self._now() - start_s

    def lap(self) -> Lap:
        return Lap(self._now() - self._start_s, self._loading_s)

    def read(self, step: int, lap: Lap) -> dict[str, float]:
        """Return the metrics of the steps since the last reading."""
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
        if self._first is None:  # the first steps compile and warm up, so they do not count
            self._first, seconds_per_step = (step, lap), elapsed_s / n_steps
        else:
            first_step, first = self._first
            seconds_per_step = (lap.training_s - first.training_s) / (step - first_step)
        metrics["time/eta_s"] = seconds_per_step * (self._n_steps - step)
        self._read = (step, lap)
        return metrics


class Peak(NamedTuple):
    """Peak performance of an accelerator, and the data sheet that states it."""

    flops_per_s: float
    """Dense bf16 (fp16 without bf16 support)."""
    memory_gib: int
    sheet: str


# By the short name that users write.
PEAKS: dict[str, Peak] = {
    "b200": Peak(2250e12, 180, "NVIDIA DGX B200 data sheet: 72 PFLOPS FP8 with sparsity for 8, a quarter dense bf16"),
    "h200": Peak(989.5e12, 141, "NVIDIA H200 data sheet (SXM): BF16 1,979 TFLOPS with sparsity, half dense"),
    "h200 nvl": Peak(835.5e12, 141, "NVIDIA H200 data sheet (NVL): BF16 1,671 TFLOPS with sparsity, half dense"),
    "h100": Peak(989.5e12, 80, "NVIDIA H100 data sheet (SXM): BF16 1,979 TFLOPS with sparsity, half dense"),
    "h100 pcie": Peak(756.5e12, 80, "NVIDIA H100 data sheet (PCIe): BF16 1,513 TFLOPS with sparsity, half dense"),
    "h100 nvl": Peak(835.5e12, 94, "NVIDIA H100 data sheet (NVL): BF16 1,671 TFLOPS with sparsity, half dense"),
    "a100": Peak(312e12, 80, "NVIDIA A100 data sheet: BF16 312 TFLOPS, SXM and PCIe"),
    "l40s": Peak(362.05e12, 48, "NVIDIA L40S data sheet: BF16 362.05 TFLOPS"),
    "a40": Peak(149.7e12, 48, "NVIDIA A40 data sheet: BF16 149.7 TFLOPS"),
    "a10": Peak(125e12, 24, "NVIDIA A10 data sheet: BF16 125 TFLOPS"),
    "rtx a6000": Peak(154.85e12, 48, "NVIDIA RTX A6000 data sheet: tensor 309.7 TFLOPS with sparsity, half dense"),
    "rtx 6000 ada": Peak(364.25e12, 48, "NVIDIA RTX 6000 Ada data sheet: tensor (FP8) 1,457 TFLOPS sparse, a quarter"),
    "v100": Peak(125e12, 32, "NVIDIA V100 data sheet (SXM2): FP16 125 TFLOPS; it has no bf16"),
}


# The full torch.cuda.get_device_name: a part of a GPU (MIG), or a board with another power limit ("NVIDIA H200 NVL" is
# not an "NVIDIA H200"), must not be taken for another one. A name that is not here has no peak.
_NAMES = {
    "h100": ("NVIDIA H100 80GB HBM3",),
    "a100": ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
    "rtx 6000 ada": ("NVIDIA RTX 6000 Ada Generation",),
    "v100": ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
}


def find_peak(device_name: str) -> Peak | None:
    """Return the peak of a device, by torch's exact name ("NVIDIA H200") or a short one ("h200", "H100-NVL")."""
    short = device_name.lower().replace("-", " ").removeprefix("nvidia ")
    return PEAKS.get(next((row for row, names in _NAMES.items() if device_name in names), short))
