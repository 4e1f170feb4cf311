"""Compare autoregression with masked diffusion: held-out bits per byte of the sample corpus at 1x, 4x, 16x compute.

    uv run python scripts/compare_objectives.py out/objectives                  # about an hour of one CPU core

Both train the same model on the same rows in the same order, each amount of compute in its own run with its own
schedule. If a call is killed, the next one continues. The score of masked diffusion is an estimate; its bars show two
standard errors. Each training seed is a point. The picture is OUT/compute.svg.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from compare_families import validations

from lingua.config.command_line import run_main
from lingua.console import show_table
from lingua.files import write_whole
from lingua.report.figure import SERIES, WIDE, Picture, blank

CONFIG = "apps/diffusion/configs/debug.yaml"
OBJECTIVES = {"autoregressive": "cross_entropy", "masked diffusion": "masked_diffusion"}
FACTORS, TOKENS_PER_STEP = (1, 4, 16), 512
WORDS = ("validation.max_rows=128", "sample_prompt=null")


class Score(NamedTuple):
    """Held-out bits per byte of a run, after `tokens` of training."""

    tokens: int
    bits: float
    error: float


def score(kind: str, steps: int, seed: int, run_dir: Path) -> Score:
    words = [*WORDS, f"loss.type={kind}", f"seed={seed}", f"steps={steps}"]
    record = validations("apps.diffusion.train", CONFIG, words, run_dir)[-1]
    bits, error = (next((v for k, v in record.items() if k.endswith(name)), 0.0) for name in ("/bpb", "/bpb_stderr"))
    print(run_dir.name, f"{bits:.3f} +- {error:.3f}", file=sys.stderr, flush=True)
    return Score(TOKENS_PER_STEP * steps, bits, error)


def mean(scores: list[Score]) -> Score:
    """Return the mean over seeds with its standard error between seeds, which includes the estimator's."""
    bits = [one.bits for one in scores]
    spread = float(np.std(bits, ddof=1)) / len(bits) ** 0.5 if len(bits) > 1 else scores[0].error
    return Score(scores[0].tokens, float(np.mean(bits)), spread)


def draw(scores: Mapping[str, Mapping[int, list[Score]]]) -> Any:
    figure, axes = blank(WIDE)
    for color, (name, by_factor) in zip(SERIES, scores.items(), strict=False):
        points = [one for own in by_factor.values() for one in own]
        means = [mean(own) for own in by_factor.values()]
        axes.plot([one.tokens for one in means], [one.bits for one in means], color=color, label=name)
        axes.errorbar(
            *([one.tokens for one in points], [one.bits for one in points]), yerr=[2 * one.error for one in points],
            fmt=".", capsize=4, color=color,
        )  # fmt: skip
    first = next(iter(scores.values()))
    axes.set(xscale="log", xlabel="tokens of training", ylabel="held-out bits per byte")
    axes.set_xticks([own[0].tokens for own in first.values()], [f"{f}x: {own[0].tokens:,}" for f, own in first.items()])
    axes.minorticks_off()
    axes.legend()
    return figure


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs and of the picture")
    parser.add_argument("--steps", type=int, default=100, help="updates at 1x, of 512 tokens each (100)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each, from seed 777 on (2)")
    options = parser.parse_args(words)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[int, list[Score]]] = {name: {factor: [] for factor in FACTORS} for name in OBJECTIVES}
    for seed in range(777, 777 + options.seeds):
        for factor in FACTORS:
            for name, kind in OBJECTIVES.items():
                steps = options.steps * factor
                scores[name][factor].append(score(kind, steps, seed, out / f"{kind}_{steps}_{seed}"))
    rows = [
        [f"{factor}x", name, f"{mean(by[factor]).bits:.3f}", *(f"{part:.3f}" for part in _errors(by[factor]))]
        for factor in FACTORS
        for name, by in scores.items()
    ]
    show_table(("", "held-out bits per byte", "mean", "between seeds", "estimator"), rows, ("mean",))
    write_whole(out / "compute.svg", Picture("compute", "", "", partial(draw, scores), is_wide=True).drawn("svg"))
    return 0


def _errors(scores: list[Score]) -> tuple[float, float]:
    """Return the standard errors of the mean: between seeds, and of the estimator alone."""
    return mean(scores).error, float(np.mean([one.error**2 for one in scores]) / len(scores)) ** 0.5


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
