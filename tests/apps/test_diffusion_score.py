"""The bound of masked diffusion: exact where it can be, and near it where it is estimated."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apps.diffusion.args import MaskedDiffusionArgs
from apps.diffusion.objective import chances_and_weights
from apps.diffusion.sample import DiffusionGenerator
from apps.diffusion.score import BoundScorer, batches_of, bound_of, bounds, is_small, samples_of, scored_places
from lingua.config.keys.generate import GeneratorArgs
from lingua.config.keys.model import LlamaArgs
from lingua.data.held_out import ScoredRow, Wording
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World
from lingua.eval.harness import estimate_of, make_lm, sum_of_scores
from lingua.eval.measures import MeasuredModel
from lingua.eval.scorer import Score
from lingua.model.generate import Generator
from lingua.tokenizer import ByteTokenizer
from lingua.train.validate import HeldOutLoss
from tests.families import build

# -- a Markov chain, whose conditionals are known ------------------------------------------------------------------

N_STATES = 3
CHAIN = np.random.default_rng(2).dirichlet([0.5] * N_STATES, N_STATES)  # p(next | state)
START = np.array([0.5, 0.3, 0.2])


def nll(ids: Sequence[int]) -> float:
    return -math.log(START[ids[0]]) - sum(math.log(CHAIN[a, b]) for a, b in itertools.pairwise(ids))


def loss_of_hidden(ids: Sequence[int], hidden: np.ndarray) -> float:
    """Sum of -log p(hidden token | all that is not hidden), by messages from both sides."""
    seen = np.ones((len(ids), N_STATES))
    for at in range(len(ids)):
        if at not in hidden:
            seen[at] = np.eye(N_STATES)[ids[at]]
    ahead, back = [START], [np.ones(N_STATES)]
    for at in range(len(ids) - 1):
        ahead.append((ahead[-1] * seen[at]) @ CHAIN)
        back.append(CHAIN @ (back[-1] * seen[len(ids) - 1 - at]))
    joint = np.array(ahead) * np.array(back[::-1])
    given = joint / joint.sum(1, keepdims=True)
    return -sum(math.log(given[at, ids[at]]) for at in hidden)


def test_with_true_conditionals_the_bound_is_the_likelihood_of_every_sequence() -> None:
    for ids in itertools.product(range(N_STATES), repeat=5):
        row = ScoredRow([9, *ids])  # the first token is given, and says nothing
        terms = [s.weight * loss_of_hidden(ids, s.hidden - 1) for s in samples_of(row, 31, seed=0)]
        assert len(terms) == 31
        assert bound_of(terms, is_exact=True).nats == pytest.approx(nll(ids), abs=1e-9)


def test_the_training_loss_is_the_same_bound_on_average() -> None:
    """The chance of each set, times its loss and weight, over a fine grid of t."""
    ids = (0, 2, 1, 1)
    args = MaskedDiffusionArgs(min_t=1e-6)
    u = (np.arange(4000) + 0.5) / 4000
    chance, weight = chances_and_weights(u, args)
    total = 0.0
    for size in range(1, 5):
        of_size = float((chance**size * (1 - chance) ** (4 - size) * weight).mean())
        total += of_size * sum(loss_of_hidden(ids, np.array(s)) for s in itertools.combinations(range(4), size))
    assert total == pytest.approx(nll(ids), abs=1e-4)


def test_the_estimate_is_unbiased_and_its_error_is_told() -> None:
    ids = tuple(np.random.default_rng(1).integers(0, N_STATES, 24).tolist())
    found = []
    for seed in range(60):
        terms = [s.weight * loss_of_hidden(ids, s.hidden - 1) for s in samples_of(ScoredRow([9, *ids]), 16, seed)]
        found.append(bound_of(terms, is_exact=False))
    nats = np.array([bound.nats for bound in found])
    told = math.sqrt(np.mean([bound.variance for bound in found]))
    assert abs(nats.mean() - nll(ids)) < 4 * nats.std() / math.sqrt(60)
    assert 0.6 < told / nats.std() < 1.8


# -- a model -------------------------------------------------------------------------------------------------------

VOCAB = 258
MODEL = LlamaArgs(
    vocab_size=VOCAB, dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seqlen=24, causal=False, mask_token=True,
    init_base_std=0.3,
)  # fmt: skip
score = partial(bounds, seed=3, max_tokens=200, before_batch=lambda: None)


def row_of(text: str, first: int = 1) -> ScoredRow:
    return ScoredRow([256, *text.encode()], first)


def test_short_rows_are_enumerated_and_longer_ones_agree_with_that() -> None:
    model, row = build(MODEL), row_of("ab cdefg", 3)
    (exact,) = score(model, [row], n_samples=63)
    assert (exact.variance, exact.n_samples) == (0.0, 0)
    (estimated,) = score(model, [row], n_samples=62)
    assert estimated.n_samples == 62
    assert abs(estimated.nats - exact.nats) < 4 * math.sqrt(estimated.variance)
    one = row_of("ab c", 4)  # one token: its likelihood itself
    tokens = torch.tensor([[256, *b"ab ", VOCAB]])
    expected = -build(MODEL)(tokens)[0, -1].log_softmax(-1)[ord("c")].item()
    assert score(model, [one], n_samples=2)[0].nats == pytest.approx(expected, rel=1e-5)


def test_a_bound_depends_on_no_other_row_and_on_no_batch() -> None:
    model, rows = build(MODEL), [row_of("hello world"), row_of("hello there"), row_of("short one", 3)]
    together = score(model, rows, n_samples=9)
    for row, bound in zip(rows, together, strict=True):
        (alone,) = score(model, [row], n_samples=9, max_tokens=30)
        assert alone == pytest.approx(bound, rel=1e-5)


def test_answers_to_a_question_hide_the_same_places() -> None:
    hidden = [
        [sample.hidden.tolist() for sample in samples_of(row_of(f"is it? {answer}", 8), 6, 0)]
        for answer in ("certain", "doubted")
    ]
    assert hidden[0] == hidden[1]
    texts = [[s.hidden.tolist() for s in samples_of(row_of(text), 6, 0)] for text in ("certain", "doubted")]
    assert texts[0] != texts[1]


def test_prompts_are_seen_and_not_scored() -> None:
    row = ScoredRow([~256, *(~b for b in b"ask"), *b"tell"])
    assert scored_places(row).tolist() == [4, 5, 6, 7]
    (batch,) = batches_of([row], 15, 0, 1000)
    assert len(batch) == 15
    assert batch[0].ids.tolist() == [256, *b"asktell"]
    assert is_small(4, 15)
    assert not is_small(4, 14)


def test_greedy_is_what_filling_in_the_surest_gives() -> None:
    model = build(MODEL)
    ids = torch.tensor([[256, *b"ab", *[VOCAB] * 4]])
    for _ in range(4):
        logits = model(ids)[0].log_softmax(-1)
        left = (ids[0] == VOCAB).nonzero()[:, 0]
        place = left[logits[left].amax(-1).argmax()]
        ids[0, place] = logits[place].argmax()
    scorer = BoundScorer(model, 500, lambda: None, MaskedDiffusionArgs(samples=4))
    other = ids[0].clone()
    other[-1] = (other[-1] + 1) % VOCAB
    scores = scorer.score([ScoredRow(each.tolist(), 3) for each in (ids[0], other)])
    assert [one.is_greedy for one in scores] == [True, False]


def test_an_evaluation_says_how_sure_it_is() -> None:
    model = build(MODEL)
    generator = Generator(model, ByteTokenizer(), GeneratorArgs(max_tokens=300))
    world, objective = World(RankInfo(), torch.device("cpu"), mesh=None), MaskedDiffusionArgs(samples=4)
    wording = Wording(ByteTokenizer())
    scorer = MeasuredModel(model, ByteTokenizer(), generator, wording, world, lambda: None, objective).scorer
    assert isinstance(scorer, BoundScorer)
    assert scorer.context == MODEL.max_seqlen - 1
    rows = [row_of("hello world"), row_of("a", 1)]
    nats, n_tokens, variance, n_samples = scorer.total(rows).tolist()
    assert (n_tokens, n_samples) == (12, 4)
    found = HeldOutLoss(nats, int(n_tokens), 12, variance=variance, n_samples=int(n_samples)).metrics("x")
    assert found["x/bpb_stderr"] == pytest.approx(math.sqrt(variance) / math.log(2) / 12)
    assert found["x/n_samples"] == 4
    told = estimate_of([sum_of_scores(scorer.score([row])) for row in rows])
    assert told["eval_bound/n_estimated"] == 1
    assert told["eval_bound/stderr_nats"] == pytest.approx(math.sqrt(variance), rel=1e-4)
    assert estimate_of([Score(1.0, 1, True)]) == {}


@pytest.mark.filterwarnings("ignore")
def test_the_harness_gets_its_three_kinds_of_answers() -> None:
    pytest.importorskip("lm_eval")
    model = build(MODEL)
    scorer = BoundScorer(model, 500, lambda: None, MaskedDiffusionArgs(samples=8))
    lm = make_lm(scorer, DiffusionGenerator(model, ByteTokenizer(), GeneratorArgs()), Wording(ByteTokenizer()))
    found = lm.loglikelihood([SimpleNamespace(args=("ask:", each)) for each in (" ab", " cdefg")], True)
    rows = [ScoredRow([256, *f"ask:{each}".encode()], 5) for each in (" ab", " cdefg")]
    assert [nats for nats, _ in found] == [pytest.approx(-score.nats) for score in scorer.score(rows)]
    (rolling,) = lm.loglikelihood_rolling([SimpleNamespace(args=("a text beyond the model's sight",))])
    assert rolling < -100
    assert len(lm.scores) == 3
    assert estimate_of(lm.scores)["eval_bound/n_estimated"] == 2  # " ab" has 7 ways to hide some of it
    (text,) = lm.generate_until([SimpleNamespace(args=("x", {"max_gen_toks": 4, "until": ["\n"]}))])
    assert len(text) > 0
