"""Check that the learning rate of `lingua recipe` is near the best one, by sweeps of four small sizes on a CPU.

    OMP_NUM_THREADS=1 uv run python scripts/sweep_rates.py out/rates                  # 20 runs, one after the other
    OMP_NUM_THREADS=1 uv run python scripts/sweep_rates.py out/rates --only 0.3M 1M --at-once 2

Each size is a `lingua sweep` of its recipe on the sample corpus, below OUT. If a call is killed, the next one
continues. The table has the held-out bits per byte of every rate; the picture is OUT/rates.svg.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lingua.config.command_line import parse_command_line, run_main
from lingua.console import show_table
from lingua.files import RunError, write_whole
from lingua.report.figure import SERIES, WIDE, Picture, blank
from lingua.sweep.status import read_points
from lingua.sweep.sweep import SWEEP_FILE, read_sweep
from lingua.train.recipe import recipe

ROOT = Path(__file__).parents[1]
LR = "optim.lr"
BASE = """
seed: 777
data: {tokenizer: {name: bytes}, load_async: false}
validation: {at_ends: true, max_rows: 64}
"""
SIZES = {  # tokens, and rates: each twice the one before
    "0.3M": ("300K", [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]),
    "1M": ("150K", [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]),
    "3M": ("120K", [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
    "10M": ("60K", [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]),
}


def swept(size: str, out: Path, at_once: int) -> tuple[float, dict[float, float]]:
    """Return (the rule's rate, held-out bits per byte by rate); train the missing points."""
    tokens, rates = SIZES[size]
    base, config, folder = out / "base.yaml", out / f"{size}.yaml", out / size
    write_whole(base, BASE)
    found = recipe(parse_command_line([str(base)]), size, tokens, "cpu")
    words = ["rerun", str(folder)]
    if not (folder / SWEEP_FILE).is_file():
        write_whole(config, "\n".join(found.lines()) + "\n")
        words = [str(config), f"dump_dir={folder}", f"{LR}={','.join(map(str, rates))}"]
    elif all(point.state == "finished" for point, _ in read_points(read_sweep(folder), {})):
        words = []
    if words:
        command = [sys.executable, "-m", "apps.cli.main", "sweep", *words, "--local", "--at-once", str(at_once)]
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
        if code != 0:
            raise RunError(f"the sweep of {size} ended with exit code {code}; repeat the command to go on")
    points = [point for point, _ in read_points(read_sweep(folder), {})]
    return found.tree["optim"]["lr"], {p.values[LR]: p.held_out for p in points if p.held_out is not None}


def draw(results: Mapping[str, tuple[float, Mapping[float, float]]]) -> Any:
    figure, axes = blank(WIDE)
    for color, (size, (rule, losses)) in zip(SERIES, results.items(), strict=False):
        rates, best = sorted(losses), min(losses.values())
        axes.plot(rates, [losses[rate] - best for rate in rates], ".-", color=color, label=size)
        axes.axvline(rule, color=color, linestyle=":")
    axes.set(title="dotted: the rule's", xlabel="learning rate", xscale="log", ylabel="bits per byte above the best")
    axes.legend()
    return figure


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the sweeps and of the picture")
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=SIZES, help="these sizes only")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side (1)")
    options = parser.parse_args(words)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results = {size: swept(size, out, options.at_once) for size in options.only}
    rows = []
    for size, (rule, losses) in results.items():
        best = min(losses, key=lambda rate, losses=losses: losses[rate])
        edge = " (edge)" if best in (min(losses), max(losses)) else ""
        figures = ", ".join(f"{rate:g}: {losses[rate]:.3f}" for rate in sorted(losses))
        near = "yes" if best / 2 <= rule <= best * 2 else "no"
        rows.append([size, SIZES[size][0], f"{rule:g}", f"{best:g}{edge}", f"{rule / best:.2f}", near, figures])
    columns = ("parameters", "tokens", "rule", "best", "rule / best", "within 2x", "held-out bits per byte by rate")
    show_table(columns, rows, columns[:-1])
    write_whole(out / "rates.svg", Picture("rates", "", "", partial(draw, results), is_wide=True).drawn("svg"))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
