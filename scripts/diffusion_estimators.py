"""Compare the variance of three estimators of masked diffusion's bound, for a known bound.

    python scripts/diffusion_estimators.py [--tokens 1024] [--samples 128] [--trials 50]

The text is a sample of a Markov chain, and the model its true conditionals, so that the bound is the exact -log p of
the text. Each trial estimates it from the same number of samples. iid: t is drawn for each sample; spread t: t is a
rotated grid, as in training; exact count: l tokens are masked, with l spread evenly, as in evaluation.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import math
import sys

import numpy as np

from apps.diffusion.args import MaskedDiffusionArgs
from apps.diffusion.objective import chances_and_weights, levels
from apps.diffusion.score import bound_of, samples_of
from lingua.config.command_line import run_main
from lingua.data.held_out import ScoredRow

N_STATES = 8


def losses_of_hidden(ids: np.ndarray, hidden: np.ndarray, chain: np.ndarray) -> np.ndarray:
    """Return the sums of -log p(hidden token | visible tokens), by message passing; hidden (n, L) bool -> (n,)."""
    seen = np.where(hidden[..., None], 1.0, np.eye(N_STATES)[ids])  # (n, L, states)
    ahead, back = [np.full((len(hidden), N_STATES), 1 / N_STATES)], [np.ones((len(hidden), N_STATES))]
    for at in range(len(ids) - 1):
        for messages, place, step in ((ahead, at, chain), (back, len(ids) - 1 - at, chain.T)):
            sent = (messages[-1] * seen[:, place]) @ step
            messages.append(sent / sent.sum(1, keepdims=True))
    joint = np.stack(ahead, 1) * np.stack(back[::-1], 1)
    given = joint[:, np.arange(len(ids)), ids] / joint.sum(-1)
    return np.where(hidden, -np.log(given), 0).sum(1)


def estimates(ids: np.ndarray, chain: np.ndarray, n: int, trial: int) -> tuple[dict[str, float], float]:
    """Return (nats per token by estimator, the standard error estimated by the last one)."""
    random = np.random.default_rng(trial)
    found: dict[str, float] = {}
    for name, u in (("iid", random.random(n)), ("spread t", levels(np.arange(n) + n * trial, 0, n))):
        chances, weights = chances_and_weights(u, MaskedDiffusionArgs())
        hidden = random.random((n, len(ids))) < chances[:, None]
        found[name] = float((losses_of_hidden(ids, hidden, chain) * weights).mean()) / len(ids)
    samples = list(samples_of(ScoredRow([0, *ids.tolist()]), n, trial))
    hidden = np.zeros((n, len(ids)), bool)
    for row, sample in zip(hidden, samples, strict=True):
        row[sample.hidden - 1] = True
    terms = losses_of_hidden(ids, hidden, chain) * [sample.weight for sample in samples]
    bound = bound_of(terms.tolist(), is_exact=False)
    return {**found, "exact count": bound.nats / len(ids)}, math.sqrt(bound.variance) / len(ids)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--trials", type=int, default=50)
    options = parser.parse_args(argv)
    random = np.random.default_rng(0)
    chain = random.dirichlet([0.2] * N_STATES, N_STATES)
    ids = [int(random.integers(N_STATES))]
    while len(ids) < options.tokens:
        ids.append(int(random.choice(N_STATES, p=chain[ids[-1]])))
    text = np.array(ids)
    exact = (math.log(N_STATES) - float(np.log(chain[text[:-1], text[1:]]).sum())) / len(text)
    trials = [estimates(text, chain, options.samples, trial) for trial in range(options.trials)]
    print(
        f"{options.tokens} tokens, {options.samples} samples, {options.trials} trials; exact {exact:.5f} nats per token"
    )
    print("| estimator | mean | standard deviation | variance over that of exact count |\n|---|---|---|---|")
    values = {name: np.array([found[name] for found, _ in trials]) for name in trials[0][0]}
    for name, own in values.items():
        share = own.var() / values["exact count"].var()
        print(f"| {name} | {own.mean():.5f} | {own.std():.5f} | {share:.1f} |")
    told = math.sqrt(sum(error**2 for _, error in trials) / len(trials))
    print(f"standard error told with an exact count: {told:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
