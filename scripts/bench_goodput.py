"""Measure goodput, the share of time spent on steps that count, of runs that are killed repeatedly.

    uv run python scripts/bench_goodput.py [--kill-every 10 60] [--kills 2] [--way NAME ...] [--json] [--out FILE]
    uv run python scripts/bench_goodput.py --trace FILE    # real kills, a line each: seconds since the start [kind]

The real trainer, and peers as their users write them, on the same model, data, disk and kills, one rank, one thread:

    lingua shm           checkpoint.async_save_mode: shm; processes are killed, the node's memory stays
    lingua shm, node     the same; the service is killed too and the memory is gone, as when a node is lost
    lingua sync          async_save_mode: null
    dcp.save, dcp.async_save    torch's tutorials, around transformers' Llama
    HF Trainer           transformers' Trainer with resume_from_checkpoint

The disk: scripts/slow_disk.c, preloaded, lets all files of a run pass at one rate, reads and writes together.

Scaled time: a minute of a cluster is a second here (--scale 60), so one kill per 60 minutes is one per 60 s. State and
disk are sized so that a save takes as long, in scaled time, as 85 GB at 0.5 GB/s: 2.8 s. Loading, saves and steps are
not scaled. Startup without loading (python, torch, ...) does not shrink with the state: `goodput` counts a sixtieth of
it, `goodput_unscaled` all. Kills come at exponential gaps after an attempt's first step (a Poisson process), the same
for all ways.

First each way trains undisturbed: its step, what a save costs, a restart. From these the model
(lingua/checkpoint/goodput.py) chooses the best interval of each way and predicts its goodput for the same kills. `off`
is model / measured - 1. A step counts with the median of those that no save slowed down in the same case.

FILE (bench_goodput.json) is rewritten after every case and holds every kill; --figure FILE.svg draws it.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
import signal
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
from bench_common import make_parser, work_folder
from goodput_runs import KINDS, POLL_S, TINY, WAYS, Bench, Running, Shape, Way

from lingua.checkpoint import goodput
from lingua.config.command_line import run_main
from lingua.console import show_table
from lingua.files import RunError, write_json, write_whole
from lingua.report.figure import BAD, FAINT, GOOD, INK, SERIES, WIDE, Picture, blank, legend


@dataclass(frozen=True)
class Undisturbed:
    """Measurements of an undisturbed run."""

    step_s: float
    wait_s: float
    """Training time lost per save, including slower steps."""
    unsafe_s: float
    """Time from then until the save is on the disk."""
    start_s: float
    """Time of a restart, without loading and its first step."""
    load_s: Mapping[str, float]
    """Time of loading, by kind of kill."""
    state_bytes: int


# -- measuring -----------------------------------------------------------------------------------------------------


def steps_s(ends_s: Mapping[int, float]) -> dict[int, float]:
    """Return the seconds of each step but the first, including a save before it."""
    return {step: at_s - ends_s[step - 1] for step, at_s in ends_s.items() if step - 1 in ends_s}


def quiet_steps_s(ends_s: Mapping[int, float], every: int, beside_s: float) -> list[float]:
    """Return the seconds of steps that no save slowed down: none began within `beside_s` before them."""
    saves_s = [at_s for step, at_s in ends_s.items() if step % every == 0]
    return [
        step_s
        for step, step_s in steps_s(ends_s).items()
        if not any(save_s <= ends_s[step] <= save_s + beside_s + step_s for save_s in saves_s)
    ]


def undisturbed(bench: Bench, way: Way) -> Undisturbed:
    """Train until two saves are on the disk and for one more interval; then restart after each kind of kill."""
    n, marks, times, size = bench.shape.first_steps, {}, {}, 0
    with Running(bench, way, n) as run:
        run.start()
        while len(marks) < 2 or max(times) < max(marks) + n - 1:
            time.sleep(POLL_S)
            times = steps_s(run.ends_s())
            for save in range(n, max(times, default=0), n):
                if len(marks) < 2 and save not in marks and (written := run.written(save)):
                    marks[save], size = written
        began_s = {save: run.save_began_s(save) for save in marks} if way.asynchronous else {}
        restarts_s = {}
        for kind in ("kill", "node") if way.is_ours and way.asynchronous else ("kill",):
            killed_s = time.time()
            run.kill(kind)
            again = run.start()
            restarts_s[kind] = again.at_s - killed_s, again.parts["weights"]
    step_s = statistics.median(times[step] for step in range(n // 2, n))
    waits_s, unsafe_s = [], []
    for save, marked_s in marks.items():
        stall_s = times[save + 1] + times[save + 2] - 2 * step_s  # before a save, ours notes its step at once
        written_s = marked_s - began_s[save] if way.asynchronous else stall_s
        beside = 2 + sum(s < written_s for s in itertools.accumulate(times[save + i] for i in range(1, n)))
        waits_s.append(sum(times[save + i] - step_s for i in range(1, min(n, beside + 1))))
        unsafe_s.append(written_s - stall_s)
    start_s = statistics.mean(whole_s - load_s for whole_s, load_s in restarts_s.values()) - step_s
    loads_s = {kind: load_s for kind, (_, load_s) in restarts_s.items()}
    wait_s = max(size / goodput.STAGE_BYTES_PER_S, statistics.mean(waits_s))  # a noisy machine hides a short wait
    return Undisturbed(step_s, wait_s, max(0.0, statistics.mean(unsafe_s)), start_s, loads_s, size)


def interval(calm: Undisturbed, way: Way, between_s: float) -> int:
    """Return the steps between saves that lose least, by the model."""
    at_least_s = 0.0 if way.survives(way.kind or "kill") else calm.unsafe_s
    return max(1, math.ceil(goodput.best_every_s(calm.wait_s, between_s, at_least_s) / calm.step_s))


def disturbed(
    bench: Bench, way: Way, every: int, trace: Sequence[tuple[float, str]], beside_s: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """Train under kills; return the cost of each one, and the seconds of the steps that no save slowed down."""
    found, quiet_s = [], []
    with Running(bench, way, every) as run:
        now = run.start()
        for up_s, kind in trace:
            kind = way.kind or kind
            time.sleep(max(0.0, now.at_s + up_s - time.time()))
            killed_s = time.time()
            run.kill(kind)
            quiet_s += quiet_steps_s(run.ends_s(), every, beside_s)
            last_step, before, now = run.last_step(), now, run.start()
            found.append(
                {
                    "kind": kind,
                    "up_s": killed_s - before.at_s,
                    "back_s": now.at_s - killed_s,
                    "load_s": now.parts["weights"],
                    "parts": now.parts,
                    "kept_steps": now.step - before.step,
                    "lost_steps": max(0, last_step - now.step + 1),
                }
            )
    return found, quiet_s


def judged(
    kills: Sequence[Mapping[str, Any]], calm: Undisturbed, way: Way, every: int, scale: float
) -> dict[str, float]:
    """Return shares of the time, measured and by the model; a start without loading counts by 1 / `scale`."""
    every_s = every * calm.step_s
    found = {}
    for suffix, by in (("", scale), ("_unscaled", 1.0)):
        restarts_s = [k["load_s"] + (k["back_s"] - k["load_s"] - calm.step_s) / by for k in kills]
        up_s = sum(k["up_s"] for k in kills)
        whole_s = up_s + sum(restarts_s) + len(kills) * calm.step_s
        kept_s = sum(k["kept_steps"] for k in kills) * calm.step_s
        waited_s = sum(k["up_s"] // (every_s + calm.wait_s) for k in kills) * calm.wait_s
        found |= {f"goodput{suffix}": kept_s / whole_s, f"restarting{suffix}": sum(restarts_s) / whole_s}
        found[f"saving{suffix}"] = waited_s / whole_s
        planned_s = kept_s = 0.0
        for kill in kills:
            unsafe_s = 0.0 if way.survives(kill["kind"]) else calm.unsafe_s
            load_s = calm.load_s.get(kill["kind"], calm.load_s["kill"])
            planned_s += kill["up_s"] + load_s + calm.start_s / by + calm.step_s
            kept_s += calm.step_s + goodput.kept_s(kill["up_s"], every_s, calm.wait_s, unsafe_s)
        found[f"model{suffix}"] = kept_s / planned_s
        found[f"off{suffix}"] = (
            found[f"model{suffix}"] / found[f"goodput{suffix}"] - 1 if found[f"goodput{suffix}"] else 0.0
        )
    return found


def measured(
    bench: Bench, way: Way, calm: Undisturbed, trace: Sequence[tuple[float, str]], scale: float
) -> dict[str, Any]:
    """Return the figures of one case."""
    every = interval(calm, way, statistics.mean(up_s for up_s, _ in trace))
    kills, quiet_s = disturbed(bench, way, every, trace, calm.wait_s + calm.unsafe_s)
    if quiet_s:  # the same steps as those that are counted: a shared machine drifts by 10% within minutes
        calm = replace(calm, step_s=statistics.median(quiet_s))
    shares = judged(kills, calm, way, every, scale)
    medians = {name: statistics.median(k[name] for k in kills) for name in ("back_s", "load_s", "lost_steps")}
    return {"every": every, **shares, **medians, "calm": asdict(calm), "kills": kills}


def drawn_kills(minutes: float, n: int, seed: int, scale: float) -> list[tuple[float, str]]:
    """Return (seconds up, kind) of `n` kills: stratified gaps of a Poisson process, with its mean."""
    gaps = [-math.log(1 - (i + 0.5) / n) for i in range(n)]  # a few independent draws may have half or twice the mean
    random.Random(f"{seed} {minutes:g}").shuffle(gaps)
    return [(gap * n / sum(gaps) * 60 * minutes / scale, "kill") for gap in gaps]


def read_trace(path: Path, scale: float) -> list[tuple[float, str]]:
    """Read kills: seconds since the start, and kill (the default), node or term."""
    found, before_s = [], 0.0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            at_s, kind = float(words[0]), words[1] if len(words) > 1 else "kill"
        except ValueError:
            at_s, kind = -1.0, ""
        if at_s <= before_s or kind not in KINDS:
            raise RunError(f"{path}:{number}: {line!r} is no kill; write rising seconds, and kill, node or term")
        found.append(((at_s - before_s) / scale, kind))
        before_s = at_s
    if not found:
        raise RunError(f"{path} names no kill; write seconds since the start, one a line")
    return found


# -- projection ----------------------------------------------------------------------------------------------------

PAPER = {"1B": (21.7e9, 1.81e9), "7B": (90.4e9, 7.53e9)}
"""State with AdamW, and parameters, of llama_1B.yaml and llama_7B.yaml."""


def on_paper(between_s: float, disk_bytes_per_s: float = 0.5e9) -> list[list[str]]:
    """Return rows for larger runs: 2M tokens per step at 40% of an H200's 989 TFLOPS; all values are assumed."""
    rows = []
    for (name, (state, n_params)), n_ranks in itertools.product(PAPER.items(), (8, 24)):
        step_s = 6 * n_params * 2e6 / (0.4 * 989e12 * n_ranks)
        for mode in ("null", "shm"):
            run = goodput.Setting(state, step_s, n_ranks, disk_bytes_per_s, mode == "shm")
            _, best, seen = goodput.advice(run, 1, between_s)
            cells = [seen.kept, seen.saving, seen.repeated, seen.restarting]
            rows.append([name, str(n_ranks), mode, f"{step_s:.2g}", str(best), *(f"{cell:.1%}" for cell in cells)])
    return rows


# -- output --------------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> None:
    columns = [
        "one kill per",
        "way",
        "every",
        "goodput",
        "model",
        "off",
        "unscaled",
        "lost steps",
        "kill to step",
        "of it load",
    ]
    rows = []
    for case in result["cases"]:
        if "error" in case:
            rows.append([case["rate"], case["way"], case["error"]])
            continue
        shares = [
            f"{case['goodput']:.1%}",
            f"{case['model']:.1%}",
            f"{case['off']:+.1%}",
            f"{case['goodput_unscaled']:.1%}",
        ]
        rest = [f"{case['lost_steps']:g}", f"{case['back_s']:.1f} s", f"{case['load_s']:.2f} s"]
        rows.append([case["rate"], case["way"], case["every"], *shares, *rest])
    show_table(columns, rows, right=columns[2:])
    print("\nOn paper, disk of 0.5 GB/s, the best interval, nodes lost, one kill per 2 h:")
    columns = ["model", "GPUs", "async_save_mode", "step, s", "every", "goodput", "saves", "repeated", "restarts"]
    show_table(columns, on_paper(7200), right=columns[3:])


def draw(cases: Sequence[Mapping[str, Any]]) -> Any:
    """Draw where the time goes: a bar for each way, a picture for each rate."""
    rates = list(dict.fromkeys(case["rate"] for case in cases))
    figure, _ = blank(WIDE, len(rates), sharey=True)
    for axes, rate in zip(figure.axes, rates, strict=True):
        chosen = [case for case in cases if case["rate"] == rate][::-1]
        names = [case["way"] for case in chosen]
        left = [0.0] * len(chosen)
        for label, color in (("kept", GOOD), ("saving", SERIES[1]), ("restarting", FAINT), ("repeated", BAD)):
            widths = [_share(case, label) for case in chosen]
            axes.barh(names, widths, left=left, color=color, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.plot([case["model"] for case in chosen], names, "|", color=INK, ms=16, mew=2, label="model")
        axes.set(xlabel=f"share of the time (scaled), one kill per {rate}", xlim=(0, 1))
    legend(figure.axes[0], WIDE[0])
    return figure


def _share(case: Mapping[str, Any], label: str) -> float:
    if label == "repeated":
        return max(0.0, 1 - case["goodput"] - case["saving"] - case["restarting"])
    return max(0.0, case["goodput" if label == "kept" else label])


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--kill-every", type=float, nargs="+", default=[10, 60], metavar="MINUTES", help="before scaling"
    )
    parser.add_argument(
        "--kills", type=int, default=2, help="at the longest gap; at shorter ones more, for the same time"
    )
    parser.add_argument("--trace", type=Path, help="file of kills instead")
    parser.add_argument("--way", nargs="+", default=[way.name for way in WAYS], choices=[way.name for way in WAYS])
    parser.add_argument("--scale", type=float, default=60.0, help="seconds of a cluster that are one here")
    parser.add_argument("--disk-mb-per-s", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=3, help="of the order of the gaps")
    parser.add_argument("--tiny", action="store_true", help="a model that takes seconds: for tests")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("bench_goodput.json"))
    parser.add_argument("--figure", type=Path, help="svg or png")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="only print, and draw, what an earlier run has written"
    )
    options = parser.parse_args(words)
    result = json.loads(options.show.read_text()) if options.show else run_cases(options, words)
    print(json.dumps(result)) if options.json else show(result)
    good = [case for case in result["cases"] if "error" not in case]
    if options.figure and good:
        picture = Picture("goodput", "", "", partial(draw, good), is_wide=True)
        write_whole(options.figure, picture.drawn(options.figure.suffix[1:]))
    return 0 if len(good) == len(result["cases"]) else 1


def run_cases(options: Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Measure all cases; save the results so far in `options.out` after each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or its trainer would go on
    if options.trace:
        traces = {options.trace.name: read_trace(options.trace, options.scale)}
    else:
        longest = max(options.kill_every)
        n_kills = {minutes: round(options.kills * longest / minutes) for minutes in options.kill_every}
        traces = {f"{m:g} min": drawn_kills(m, n, options.seed, options.scale) for m, n in n_kills.items()}
    ways = [way for way in WAYS if way.name in options.way]
    result: dict[str, Any] = {"command": shlex.join(words), "scale": options.scale, "traces": traces, "cases": []}
    with work_folder(options.folder) as folder:
        bench = Bench(folder.resolve(), TINY if options.tiny else Shape(), options.disk_mb_per_s * 1e6)
        calm: dict[str, Undisturbed] = {}
        for (rate, trace), way in itertools.product(traces.items(), ways):
            case: dict[str, Any] = {"rate": rate, "way": way.name}
            try:
                known = way.name.partition(",")[0]
                if known not in calm:
                    calm[known] = undisturbed(bench, way)
                case |= measured(bench, way, calm[known], trace, options.scale)
            except RunError as error:
                case["error"] = str(error)
            result["cases"].append(case)
            write_json(options.out, result)
            if not options.json:
                shown = case.get("error") or f"goodput {case['goodput']:.1%}, model {case['model']:.1%}"
                print(f"{rate}, {way.name}: {shown}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
