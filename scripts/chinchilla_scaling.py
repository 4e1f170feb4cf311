"""Submit jobs with the same compute for every depth, learning rate and seed: 30 jobs of miso_8_silent.

    python scripts/chinchilla_scaling.py [--dry-run] [--depths 24 16] [--lrs rule] [--seeds 0 1] [-- OPTIONS OF SBATCH]

The width, and the learning rate `rule`, follow `lingua recipe` (lingua/train/recipe.py), heads are 32 wide;
`total_flops` determines the number of steps. Needs BASE_DIR; EMAIL is optional, EXTRA_ARGS go to every run.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lingua.config.command_line import parse_command_line, run_main
from lingua.files import RunError
from lingua.train.check import load
from lingua.train.recipe import WIDTH_PER_LAYER, best_rate

ROOT = Path(__file__).parents[1]
CONFIG = "apps/main/configs/llama_8H200_chinchilla.yaml"
TWO_HOURS_FLOPS = 26.205e18  # of 8 H200 at 46% of their peak; 52.41e18 for four hours


def points(depths: Sequence[int], lrs: Sequence[str], seeds: Sequence[int], flops: float) -> Iterator[list[str]]:
    """Yield the overrides of each run."""
    for seed, lr, depth in itertools.product(seeds, lrs, depths):
        dim = WIDTH_PER_LAYER * depth
        sizes = [f"model.n_layers={depth}", f"model.dim={dim}", f"model.n_heads={dim // 32}", "data.batch_size=16"]
        sizes += [f"total_flops={flops:g}", f"seed={seed}"]
        name = f"chinchilla_d{depth}_lr{lr}_s{seed}"
        peak = by_rule(sizes) if lr == "rule" else float(lr)
        yield [f"name={name}", f"logging.wandb.name={name}", *sizes, f"optim.lr={peak:g}"]


def by_rule(sizes: Sequence[str]) -> float:
    """Return the learning rate of the rule for a run of these sizes."""
    size = load(parse_command_line([str(ROOT / CONFIG), *sizes])).resolved
    return float(f"{best_rate(size.n_params_non_embedding, size.total_tokens).value:.3g}")


def rate(text: str) -> str:
    return text if text == "rule" else f"{float(text):g}"


def submission(
    words: Sequence[str], options: Sequence[str], env: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return (command, environment) to submit one run."""
    mail = [f"--mail-user={env['EMAIL']}"] if env.get("EMAIL") else []
    name = words[0].removeprefix("name=")
    script = str(Path(env["BASE_DIR"]) / "apps/main/configs/miso_8_silent.slurm")
    passed = "--export=ALL,BASE_DIR,CONFIG_FILE,EXTRA_ARGS"
    command = ["sbatch", passed, f"--job-name={name}", "--time=4:00:00", *mail, *options, script]
    extra = " ".join([*words, *env.get("EXTRA_ARGS", "").split()])
    return command, {**env, "CONFIG_FILE": CONFIG, "EXTRA_ARGS": extra}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[24, 16, 12, 8, 4])
    parser.add_argument("--lrs", type=rate, nargs="+", default=["0.003", "0.001", "0.0005"], help="numbers, or rule")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--total-flops", type=float, default=TWO_HOURS_FLOPS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    split = argv.index("--") if "--" in argv else len(argv)
    args, options = parser.parse_args(argv[:split]), argv[split + 1 :]
    if not os.environ.get("BASE_DIR"):
        parser.error("BASE_DIR is not set; export it (the folder of your checkout)")
    for words in points(args.depths, args.lrs, args.seeds, args.total_flops):
        command, env = submission(words, options, os.environ)
        if args.dry_run:
            print(f"EXTRA_ARGS={shlex.quote(env['EXTRA_ARGS'])} {shlex.join(command)}")
        else:
            code = subprocess.run(command, env=env, check=False).returncode
            if code:
                raise RunError(f"{shlex.join(command)} ended with exit code {code}; its message stands above")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
