"""Measure all figures of one GPU in under ten minutes, without a network. Started by bench_gpu.sh.

    bash scripts/bench_gpu.sh [OUT.json] [--only NAME ...] [--list] [--budget-s 570] [--profile] [--wheels DIR]

Writes bench_gpu.json, or OUT.json, and the same as a table in a .txt beside it, again after every case. The most
important cases come first. Each runs in its own process, starts only if there is time for it, is killed after twice its
expected time, and is retried with a smaller batch, in a fresh process, if it runs out of memory. Cases that were not
measured are listed under `left_out`. The cases are those of bench_step.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: it sets what torch reads once)
from bench_budget import Found, Here, Ledger, Planned, apart, measure_all
from bench_cases import GPU_CASES, MAIN, TINY_CASES, Case, checked
from bench_common import make_parser
from bench_kernels import device_facts, measure_attention
from bench_step import FORMULA, SAVE_EVERY, check_options, expected_s, measure, measure_loop, show

from lingua.config.command_line import run_main
from lingua.files import RunError

SAVE_GB_PER_S = 1.0  # assumed rate of the disk, only for the budgets
FOLDER = ""  # folder of the benchmark, to which loops write


def gpu_plan(tiny: bool, steps: int, trace: Path | None = None) -> list[Planned]:
    """Return all measurements, the most important first."""
    first, *others = TINY_CASES if tiny else GPU_CASES
    sizes = (32, 2, 16, 2) if tiny else (2048,)

    def updates(case: Case) -> Planned:
        size = checked(case, case.batches[0])
        distributed = size.args.distributed
        flops = case.batches[0] * case.seq_len * size.resolved.flops_per_token
        flops *= 4 / 3 if distributed.full_activation_checkpointing else 1
        seconds = 100.0 if tiny else expected_s(flops, steps, distributed.compile)

        def at(batch: int, here: Here) -> Found:
            return measure(case, batch, here.peaks, steps, trace if case is first else None)

        return Planned(case.name, seconds, [(batch, partial(at, batch)) for batch in case.batches])

    def attention(name: str, seconds: float, packed: bool) -> Planned:
        return Planned(f"attention {name}", seconds, [(0, lambda _: measure_attention(packed, *sizes))])

    def loop(name: str, mode: str, n_saves: int, start_s: float) -> Planned:
        size, n_steps = checked(first, first.batches[0]).resolved, SAVE_EVERY + 4 if tiny else SAVE_EVERY + 12
        state = size.checkpoint_bytes
        seconds = 300.0 if tiny else start_s + 1.1 * n_steps + n_saves * state / 1e9 / SAVE_GB_PER_S
        needs = {FOLDER: 2 * state + (1 << 30)} | ({"/dev/shm": state + (1 << 28)} if mode == "shm" else {})

        def at(here: Here) -> Found:
            fits = here.cases.get(first.name, {}).get("batch_size", first.batches[-1])
            return measure_loop(first, fits, here.folder, mode, n_steps)

        return Planned(f"loop 1B {name}", seconds, [(0, at)], needs)

    return [
        updates(first),
        loop("asynchronous", "shm", 1, start_s=65.0),  # the one at the end; the other is written beside the steps
        loop("synchronous", "null", 2, start_s=35.0),  # compiled already
        *map(updates, others[:1]),
        attention("2048", 30.0, False),
        *map(updates, others[1:4]),
        attention("documents 2048", 40.0, True),
        *map(updates, others[4:]),
    ]


def gpu_suite(plan: Sequence[Planned], tiny: bool, budget_s: float, out: Path | None) -> dict[str, Any]:
    """Run the planned measurements, as far as time allows."""
    end_s = time.monotonic() + budget_s
    ledger = Ledger(out, [planned.name for planned in plan], show, goals)
    ledger.result["formula"] = FORMULA
    facts = apart(device_facts, limit_s=60)  # a process that has touched the GPU cannot fork others that use it
    if "error" in facts:
        raise RunError(f"the device cannot be used: {facts['error']}")
    if facts["machine"]["cuda"] is None and not tiny:
        raise RunError(
            "no GPU is visible here; run it on a GPU node, or scripts/bench_step.py, or --tiny to try it out"
        )
    ledger.result |= facts
    say = partial(print, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="lingua-bench-", ignore_cleanup_errors=True) as folder:
        here = Here(Path(folder), facts["peaks"], ledger.result["cases"])
        measure_all(plan, ledger, here, end_s, lambda place: shutil.disk_usage(place).free, say)
    return ledger.result


def goals(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each goal with the measured value; cases that were left out are not judged."""

    def value(case: str, key: str, over: str | None = None) -> float | None:
        found, base = cases.get(case, {}).get(key), cases.get(over or "", {}).get(key)
        return found if over is None else found / base if found and base else None

    main, loop = MAIN.name, "loop 1B asynchronous"
    wanted: list[tuple[str, float | None, str, float]] = [
        (f"MFU, {main}", value(main, "mfu"), ">=", 0.55),
        (f"share of the matrix product, {main}", value(main, "share_of_matmul"), ">=", 0.70),
        ("MFU, 280M bf16 2048", value("280M bf16 2048", "mfu"), ">=", 0.45),
        *(
            (f"MFU, {name}", value(name, "mfu"), ">=", 0.50)
            for name in ("7B bf16 moments 4096", "7B bf16 moments budget 0.5 4096", "7B bf16 4096")
        ),
        ("deterministic over not, 1B", value("1B deterministic 2048", "step_s", main), "<=", 1.05),
        ("save call, s, 1B asynchronous", value(loop, "save_stall_s"), "<=", 0.010),
        ("slow-down beside a save, 1B", value(loop, "slowdown"), "<=", 0.02),
        ("ours over transformers, 1B", value(main, "tokens_per_s", f"transformers {main}"), ">=", 1.3),
    ]
    judged = []
    for what, found, sign, goal in wanted:
        if found is not None:
            met = found >= goal if sign == ">=" else found <= goal
            judged.append({"what": what, "value": found, "goal": f"{sign} {goal}", "met": met})
    return judged


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"), help="the JSON file (bench_gpu.json)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases only")
    parser.add_argument("--list", action="store_true", help="name the cases, and the seconds that they should take")
    parser.add_argument("--budget-s", type=float, default=570.0, help="begin nothing that would take longer (570)")
    parser.add_argument("--steps", type=int, default=20, help="updates timed, at most (20)")
    parser.add_argument("--profile", action="store_true", help="keep a trace of one 1B step, and its longest kernels")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs")
    options = parser.parse_args(words)
    trace = options.out.absolute().with_suffix(".trace.json.gz") if options.profile else None
    plan = gpu_plan(options.tiny, options.steps, trace)
    check_options(parser, options, [planned.name for planned in plan])
    if options.list:
        print("\n".join(f"{planned.name:36}{planned.seconds:4.0f} s" for planned in plan))
        return 0
    plan = [planned for planned in plan if not options.only or planned.name in options.only]
    result = gpu_suite(plan, options.tiny, options.budget_s, options.out)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
