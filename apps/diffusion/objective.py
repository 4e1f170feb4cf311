"""The training objective of masked diffusion (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992).

Each row has a t; each of its tokens is masked with probability t, that is, replaced by [MASK]. The loss is -log p of
each masked token, given the others, times 1/t, divided by the number of all tokens, masked or not: on average that is
an upper bound of a row's -log p per token. [MASK] has no probability: its row of the head lies beyond the vocabulary.

The masking of row r depends only on (seed, r) and the rows per step, not on world size, accumulation, restarts or
recomputation. Over the rows of a step, t is spread evenly.

Letters: B rows, S positions, G rows of a step over all ranks.
"""

from __future__ import annotations

import numpy as np

from lingua.config.keys.model import ModelArgs
from lingua.data.mix import draw
from lingua.model.loss import IGNORE, CrossEntropy, Question, Turn

from .args import MaskedDiffusionArgs

_SALT_LEVEL, _SALT_HIDDEN, _SALT_LENGTH, _SALT_CUT = 101, 102, 103, 104


def levels(rows: np.ndarray, seed: int, rows_per_step: int) -> np.ndarray:
    """Return one u in [0, 1) per row, fp64: a grid of G points over the rows of a step, rotated by a random offset."""
    steps, places = np.divmod(rows, rows_per_step)
    turned = np.array([draw(_SALT_LEVEL, seed, int(step)) / 2**64 for step in steps])
    return (places / rows_per_step + turned) % 1.0


def chances_and_weights(u: np.ndarray, args: MaskedDiffusionArgs) -> tuple[np.ndarray, np.ndarray]:
    """Return (probability of masking, weight of a masked token)."""
    t = (1 - args.min_t) * u + args.min_t
    chance = t if args.schedule == "llada" else (1 - args.min_t) * t
    weight = 1 / t
    if args.soft_cap is not None:
        weight = weight * chance / (chance + (1 - chance) / args.soft_cap)
    return chance, weight


def uniform(n: int, *key: int) -> np.ndarray:
    """Return n numbers in [0, 1), fp64, which depend only on the key (Philox is counter-based)."""
    bits = np.random.Philox(key=np.array([draw(*key, 0), draw(*key, 1)], np.uint64)).random_raw(n)
    return (bits >> np.uint64(11)) * 2.0**-53


class MaskedDiffusion(CrossEntropy):
    """The weighted cross-entropy of masked tokens."""

    def __init__(self, args: MaskedDiffusionArgs) -> None:
        super().__init__(args)
        self.args, self.seed = args, args.seed or 0

    def ask(self, views: np.ndarray, model: ModelArgs, turn: Turn) -> Question:
        """Mask tokens of the rows, and make them the labels."""
        labels = views[0].astype(np.int64)
        # The mark whether a token is a label (data.loss_on) is one place before it; the first is like the second.
        labels[:, 1:][views[1, :, :-1] == IGNORE] = IGNORE
        labels[:, 0][views[1, :, 0] == IGNORE] = IGNORE
        tokens = views[0][:, : self.length(labels.shape[1], turn.step)]
        labels = labels[:, : tokens.shape[1]]
        chances, weights = chances_and_weights(levels(turn.rows, self.seed, turn.rows_per_step), self.args)
        drawn = np.stack([uniform(labels.shape[1], _SALT_HIDDEN, self.seed, int(row)) for row in turn.rows])
        hidden = (drawn < chances[:, None]) & (labels != IGNORE)
        return Question(
            np.where(hidden, model.vocab_size, tokens), labels, np.where(hidden, weights[:, None], 0).astype(np.float32)
        )

    def length(self, seq_len: int, step: int) -> int:
        """Return the number of positions used of the rows of a step."""
        if draw(_SALT_CUT, self.seed, step) / 2**64 >= self.args.random_lengths:
            return seq_len
        return 1 + draw(_SALT_LENGTH, self.seed, step) % seq_len
