"""How fast the trainer trains, and how much of a step is not training.

    uv run python scripts/bench_train.py [--json] [--steps 60] [config] [key=value ...]

Runs the real loop (apps.main.train) in a temporary folder, on the CPU unless told otherwise, and times its parts:
forward, backward, optimizer (with clipping). What is left of a step is the overhead: waiting for data, the vote,
metrics, the loop itself. Everything is measured in one run; medians over steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lingua  # noqa: F401 # isort: skip (first of all: it sets what torch reads once)
import torch

import apps.main.train as app
from lingua.config.command_line import run_main
from lingua.run.metrics import read_metrics
from lingua.train.build import Run

WARM_UP_STEPS = 5


class Stopwatch:
    """Seconds per step of each timed part."""

    def __init__(self) -> None:
        self._now: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self._step_began: float | None = None

    def time(self, part: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            result = act(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - start_s
            return result

        return timed

    def end_step(self) -> None:
        now_s = time.perf_counter()
        if self._step_began is not None:
            self.steps.append({**self._now, "step": now_s - self._step_began})
        self._now, self._step_began = {}, now_s


def install(watch: Stopwatch) -> None:
    """Put the stopwatch around the parts of the real loop."""
    setattr(torch.Tensor, "backward", watch.time("backward", torch.Tensor.backward))  # noqa: B010
    app.measure_gradient = watch.time("optimizer", app.measure_gradient)
    app.optimizer_step = watch.time("optimizer", app.optimizer_step)
    build_run = app.build_run

    def build_and_time(*args: Any, **kwargs: Any) -> Run:
        run = build_run(*args, **kwargs)
        run.model.forward = watch.time("forward", run.model.forward)
        return run

    app.build_run = build_and_time
    advance = Run.advance

    def advance_and_note(run: Run) -> None:
        advance(run)
        watch.end_step()

    setattr(Run, "advance", advance_and_note)  # noqa: B010


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="apps/main/configs/debug.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.steps < 2 * WARM_UP_STEPS:
        parser.error(f"--steps {options.steps} is too few: the first {WARM_UP_STEPS} warm up; give at least 20")

    watch = Stopwatch()
    install(watch)
    with tempfile.TemporaryDirectory() as folder:
        words = [options.config, "validation.at_ends=false", "sample_prompt=null", "checkpoint.dump.every=0"]
        words += [*options.overrides, f"steps={options.steps}", f"dump_dir={folder}", "logging.freq=10"]
        if run_main(app.main, words) != 0:
            return 1
        last = read_metrics(Path(folder) / "metrics.jsonl")[-1]

    steps = watch.steps[WARM_UP_STEPS:]
    inside = ("forward", "backward", "optimizer")
    medians = {part: statistics.median(step[part] for step in steps) for part in (*inside, "step")}
    outside = [1 - sum(step[part] for part in inside) / step["step"] for step in steps]
    result = {
        "config": options.config,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "steps": len(steps),
        **{f"{part}_s": round(value, 6) for part, value in medians.items()},
        "tokens_per_s": round(last["speed/wps"], 1),
        **({"mfu": last["speed/mfu"]} if "speed/mfu" in last else {}),
        "outside_share": round(statistics.median(outside), 4),
    }
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:>16}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
