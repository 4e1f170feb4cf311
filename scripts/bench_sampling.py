"""Measure tokens per CPU second of a masked diffusion model against the number of steps, with and without its cache.

    uv run python scripts/bench_sampling.py out/diffusion_debug [--tokens 60] [--rows 1] [--rounds 3]

Each figure is the median of the rounds, in which all cases take turns; one thread, whose own time is counted, so that
it holds on a busy machine. Without the cache every step costs a pass over all rows; with it, a row has one where a step
fills something in. Both give the same text.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import statistics
import sys
import time

import torch
from torch import Tensor

from apps.diffusion.sample import DiffusionGenerator
from apps.main.generate import GenerateArgs, load_generator
from lingua.config.command_line import run_main
from lingua.console import show_table
from lingua.train.describe import config_of, described

CASES = {"low_confidence": (True,), "ancestral": (True, False)}


class WithoutCache(DiffusionGenerator):
    def rows_to_ask(self, left: Tensor) -> Tensor:
        return torch.ones(len(left), dtype=torch.bool)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run or checkpoint of a masked diffusion model")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of each answer (60)")
    parser.add_argument("--rows", type=int, default=1, help="answers together (1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 15, 30, 60, 120, 240, 480, 960])
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    args = GenerateArgs(ckpt=options.run, device="cpu", temperature=1.0, max_gen_len=options.tokens, max_tokens=1 << 20)
    loaded = load_generator(described(config_of(options.run), ""), args)
    seconds: dict[tuple[str, bool, int], list[float]] = {}
    texts: dict[tuple[str, int], list[str]] = {}
    for _ in range(options.rounds):
        for steps in options.steps:
            for sampler, caches in CASES.items():
                for cache in caches:
                    own = args.model_copy(update={"sampler": sampler, "diffusion_steps": steps})
                    kind = DiffusionGenerator if cache else WithoutCache
                    generator = kind(loaded.model, loaded.tokenizer, own)
                    begin = time.process_time()
                    answers = [answer.text for answer in generator.generate(["def "] * options.rows)]
                    seconds.setdefault((sampler, cache, steps), []).append(time.process_time() - begin)
                    assert texts.setdefault((sampler, steps), answers) == answers
    n_tokens, cases = options.tokens * options.rows, [(s, c) for s, caches in CASES.items() for c in caches]
    rows = [
        [str(steps), *(f"{n_tokens / statistics.median(seconds[s, c, steps]):,.0f}" for s, c in cases)]
        for steps in options.steps
    ]
    show_table(("steps", "low_confidence", "ancestral", "ancestral, no cache"), rows, ("steps",))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
