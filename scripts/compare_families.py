"""Compare how well model families learn: held-out bits per byte after the same number of tokens.

    uv run python scripts/compare_families.py out/families                       # about two hours on two CPU cores
    uv run python scripts/compare_families.py out/families --only mingru hawk    # some; a later call adds the rest

Every model trains with every rate on the same rows of the sample corpus, in the same order, in its own run folder. If a
call is killed, the next one continues. The table shows the best rate of each. The picture is OUT/families.svg.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench_cases import DIMS, FAMILIES

from lingua.config.command_line import run_main
from lingua.console import show_table
from lingua.files import RunError, write_whole
from lingua.report.figure import SERIES, WIDE, Picture, blank
from lingua.run.metrics import VALIDATION_FILE, read_metrics

ROOT = Path(__file__).parents[1]
TOKENS_PER_STEP = 1024
Curve = Mapping[int, float]


def validations(module: str, config: str, words: Sequence[str], run_dir: Path) -> list[dict[str, Any]]:
    """Train in the run folder, unless that is done already; return the records of its validations."""
    command = [sys.executable, "-m", module, f"config={config}", *words, f"dump_dir={run_dir}"]
    with (run_dir.parent / f"{run_dir.name}.log").open("a") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
    if code != 0:
        raise RunError(f"training ended with exit code {code}; see {log.name}, and repeat the command to go on")
    return read_metrics(run_dir / VALIDATION_FILE)


def train(keys: str, dim: int, rate: str, steps: int, run_dir: Path) -> Curve:
    """Return held-out bits per byte by step."""
    model = [f"model.{key}" for key in (*keys.split(), f"dim={dim}")]
    words = [*model, f"optim.lr={rate}", f"steps={steps}", f"validation.every={steps // 4}"]
    words += ["data.n_views=4"] if "n_future_head=3" in keys else []
    records = validations("apps.main.train", "apps/main/configs/bytes.yaml", words, run_dir)
    return {r["global_step"]: next(v for key, v in r.items() if key.endswith("/bpb")) for r in records}


def draw(curves: Mapping[str, Mapping[str, Curve]]) -> Any:
    figure, _ = blank(WIDE, len(curves))
    for axes, (size, by_family) in zip(figure.axes, curves.items(), strict=True):
        for color, (name, curve) in zip(SERIES, by_family.items(), strict=False):
            steps = [step for step in sorted(curve) if step]
            axes.plot([s * TOKENS_PER_STEP for s in steps], [curve[s] for s in steps], ".-", color=color, label=name)
        axes.set(title=f"about {size} parameters", xlabel="tokens", ylabel="held-out bits per byte")
        axes.legend(ncols=2)
    return figure


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs and of the picture")
    parser.add_argument("--rates", nargs="+", default=["2e-3", "5e-3"], help="learning rates (2e-3 5e-3)")
    parser.add_argument("--steps", nargs=2, type=int, default=[200, 100], help="updates of each size (200 100)")
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="these families only")
    parser.add_argument("--sizes", nargs="+", default=list(DIMS), choices=DIMS, help="these sizes only (1M 5M)")
    options = parser.parse_args(words)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, dict[str, Curve]] = {}
    rows: list[list[str]] = []
    for at, ((size, dim), steps) in enumerate(zip(DIMS.items(), options.steps, strict=True)):
        for name in options.only if size in options.sizes else ():
            found = {}
            for rate in options.rates:
                run_dir = out / f"{name}_{size}_{rate}"
                found[rate] = train(FAMILIES[name][at], dim, rate, steps, run_dir)
                print(run_dir.name, f"{found[rate][steps]:.3f}", file=sys.stderr, flush=True)
            best = min(found, key=lambda rate: found[rate][steps])
            curves.setdefault(size, {})[name] = found[best]
            rows.append([size, name, *(f"{curve[steps]:.3f}" for curve in found.values())])
    show_table(("", "held-out bits per byte", *options.rates), rows, options.rates)
    write_whole(out / "families.svg", Picture("families", "", "", partial(draw, curves), is_wide=True).drawn("svg"))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
