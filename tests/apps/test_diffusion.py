"""Masked diffusion: what is hidden, what a hidden token weighs, and what the objective asks of a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from apps.diffusion.args import MaskedDiffusionArgs, TrainArgs
from apps.diffusion.objective import MaskedDiffusion, chances_and_weights, levels
from lingua.checkpoint.load_weights import load_weights
from lingua.config.base import all_args
from lingua.config.keys.model import CrossEntropyArgs, LlamaArgs
from lingua.files import RunError
from lingua.model.attention import RowDocuments, document_bounds
from lingua.model.huggingface import Llama
from lingua.model.loss import IGNORE, CrossEntropy, Question, Turn, VocabShard, _loss_of_logits_in_one_pass
from lingua.run.metrics import read_metrics
from tests.families import SHARED, VOCAB, build
from tests.layouts import Layout, whole
from tests.layouts import build as build_laid_out
from tests.ranks import run_on_ranks
from tests.trainer import TINY, at_step, fingerprint, kill_self, losses, train

MODEL = LlamaArgs(**SHARED, n_heads=4, multiple_of=16, causal=False, mask_token=True)
S, G = 40, 24


def asked(rows: np.ndarray, step: int = 0, **keys: Any) -> Question:
    """What rows of the numbers themselves are asked."""
    views = np.stack([(rows[:, None] + np.arange(S) + shift) % VOCAB for shift in (0, 1)]).astype(np.int32)
    args = MaskedDiffusionArgs(seed=5, **keys)
    return MaskedDiffusion(args).ask(views, MODEL, Turn(step, rows, G))


def test_what_is_hidden_depends_on_the_row_alone() -> None:
    together = asked(np.arange(G))
    for rows in (np.arange(G)[::-1], np.arange(1, G, 3), np.array([7])):
        for all_of, own in zip(together, asked(rows), strict=True):
            assert all_of is not None
            assert own is not None
            np.testing.assert_array_equal(own, all_of[rows])
    assert (asked(np.array([G]))[0] != together[0][0]).any()


def test_a_step_has_every_level_of_noise_and_a_row_has_all_in_time() -> None:
    of_step = np.sort(levels(np.arange(3 * G, 4 * G), 5, G))
    np.testing.assert_allclose(np.diff(of_step), 1 / G)
    of_row = np.sort(levels(np.arange(400) * G + 3, 5, G))  # the same place in 400 steps
    assert np.abs(of_row - np.linspace(0, 1, 400)).max() < 0.1


@pytest.mark.parametrize("schedule", ["log_linear", "llada"])
def test_hidden_tokens_weigh_one_over_their_chance(schedule: Any) -> None:
    question = asked(np.arange(50 * G), schedule=schedule)
    assert question.weights is not None
    hidden = question.tokens == VOCAB
    np.testing.assert_array_equal(hidden, question.weights > 0)
    np.testing.assert_array_equal(question.tokens[~hidden], question.labels[~hidden])
    assert question.weights.mean() == pytest.approx(1, rel=0.02)  # each token counts once on average


def test_a_soft_cap_bounds_the_weight_and_leaves_large_chances_alone() -> None:
    u = np.array([0.0, 0.5, 1.0])
    chance, weight = chances_and_weights(u, MaskedDiffusionArgs())
    np.testing.assert_allclose(weight, [1000, 1 / 0.5005, 1])
    np.testing.assert_allclose(chance, 0.999 / weight)
    capped = chances_and_weights(u, MaskedDiffusionArgs(soft_cap=5))[1]
    assert capped.max() < 5
    assert capped[-1] == pytest.approx(1, abs=0.001)


def test_prompts_are_never_hidden() -> None:
    rows = np.arange(G)
    views = np.ones((2, G, S), np.int32)
    views[1, :, :9] = IGNORE  # tokens 1 to 9 are a prompt
    question = MaskedDiffusion(MaskedDiffusionArgs(seed=1)).ask(views, MODEL, Turn(0, rows, G))
    assert (question.tokens[:, :10] == 1).all()
    assert (question.labels[:, :10] == IGNORE).all()
    assert (question.tokens[:, 10:] == VOCAB).any()


def test_some_steps_have_shorter_rows() -> None:
    lengths = [asked(np.arange(4), step, random_lengths=0.25).tokens.shape[1] for step in range(200)]
    cut = [length for length in lengths if length < S]
    assert 25 < len(cut) < 80
    assert min(cut) < 5
    assert max(cut) > S - 5


def test_the_loss_is_weighted_and_a_mask_has_no_probability() -> None:
    model = build(MODEL)
    question = asked(np.arange(4))
    assert question.weights is not None
    tokens, labels, weights = (torch.from_numpy(each) for each in (question.tokens, question.labels, question.weights))
    logits = model(tokens)
    assert logits.shape[-1] == VOCAB
    expected = (-logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * weights).sum()
    loss = CrossEntropy(CrossEntropyArgs(chunk_tokens=7))
    loss_sum, n_labels = model(tokens, labels=labels, loss=lambda *args, **keys: loss(*args, weights=weights, **keys))
    torch.testing.assert_close(loss_sum, expected)
    assert n_labels == labels.numel()
    loss_sum.backward()
    head = model.get_parameter("output.weight").grad
    assert head is not None
    assert head[:VOCAB].abs().sum() > 0
    assert head[VOCAB:].abs().sum() == 0


def test_the_compiled_form_of_the_weighted_loss_is_the_same() -> None:
    drawn = torch.Generator().manual_seed(1)
    logits, weights = torch.randn(9, 12, generator=drawn), torch.rand(9, generator=drawn)
    labels = torch.tensor([3, IGNORE, *range(7)])
    for own in (None, weights):
        ours = VocabShard().loss_of_logits(logits.clone(), labels, own, 10, 0.1, True)
        theirs = _loss_of_logits_in_one_pass(logits, labels, own, 10, 0.1, True)
        torch.testing.assert_close(ours, theirs)


def test_every_position_sees_its_document_and_nothing_else() -> None:
    model = build(MODEL)
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    other = tokens.clone()
    other[:, -1] = VOCAB
    assert (model(tokens)[:, 0] - model(other)[:, 0]).abs().max() > 1e-4
    doc_ids = np.repeat([[0] * 7 + [1] * 17], 2, axis=0)
    documents = RowDocuments(torch.from_numpy(doc_ids), torch.from_numpy(document_bounds(doc_ids)))
    separate = torch.cat([model(tokens[:, :7]), model(tokens[:, 7:])], dim=1)
    torch.testing.assert_close(model(tokens, documents=documents), separate, rtol=1e-4, atol=1e-4)


def test_the_share_that_is_hidden_can_be_an_input() -> None:
    args = MODEL.model_copy(update={"time_input": True})
    model = build(args)
    assert args.n_params() == sum(p.numel() for p in model.parameters()) > MODEL.n_params()
    tokens = torch.ones(2, 8, dtype=torch.int64)
    tokens[0, 1:] = tokens[1, :4] = VOCAB
    layer = model.time_input
    assert layer is not None
    told = [layer(torch.cos(torch.pi * share * torch.arange(16))) for share in (7 / 8, 4 / 8)]
    model.layers = torch.nn.ModuleList()
    expected = (
        model.norm(model.tok_embeddings(tokens) + torch.stack(told)[:, None]) @ model.get_parameter("output.weight").T
    )
    torch.testing.assert_close(model(tokens), expected[..., :VOCAB])


# -- the seam ------------------------------------------------------------------------------------------------------


def test_the_objective_states_what_it_asks_of_the_model() -> None:
    args = TrainArgs.model_validate({"seed": 9})
    assert (args.model.model_dump()["causal"], args.model.model_dump()["mask_token"]) == (False, True)
    assert args.model_dump()["loss"]["seed"] == 9
    assert not [*conflicts_of(args)]


def conflicts_of(args: TrainArgs) -> list[str]:
    return [text for section in all_args(args) for _, text in section.conflicts(args)]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model": {"causal": True}}, "model.causal is true, but loss.type masked_diffusion needs false; drop it"),
        ({"model": {"type": "mamba2"}}, "model.type mamba2 has no such key; use model.type llama"),
        ({"model": {"type": "mtp", "n_future_head": 2}, "data": {"n_views": 3}}, "learns 2 tokens at each position"),
        ({"model": {"sliding_window": 8}}, "model.sliding_window is 8, which looks back only"),
        ({"model": {"time_input": True}, "distributed": {"tp_size": 2}}, "but distributed.tp_size is above 1"),
        ({"model": {"causal": False}, "loss": {"type": "cross_entropy"}}, "each position would see its label"),
        (
            {"loss": {"random_lengths": 0.01}, "data": {"doc_mask": True}},
            "loss.random_lengths does not go with data.doc_mask",
        ),
    ],
)
def test_what_does_not_fit_the_objective_is_refused(keys: dict[str, Any], sentence: str) -> None:
    keys = {**keys, "model": {"n_heads": 8, **keys.get("model", {})}}
    if keys["model"].get("type") == "mamba2":
        keys["model"].pop("n_heads")
    assert any(sentence in text for text in conflicts_of(TrainArgs.model_validate(keys)))


def test_hugging_face_has_no_such_llama() -> None:
    assert list(Llama().not_theirs(MODEL)) == ["model.causal is false, but a Hugging Face llama looks back only"]


# -- from a model that looks back ----------------------------------------------------------------------------------


def llama(**keys: Any) -> LlamaArgs:
    return LlamaArgs(**SHARED, n_heads=4, multiple_of=16, **keys)


def test_the_weights_of_a_llama_are_taken_and_the_row_of_the_mask_is_new(tmp_path: Path) -> None:
    source, target = build(llama(), seed=1), build(MODEL, seed=2)
    fresh = target.tok_embeddings.weight[VOCAB].clone()
    torch.save(source.state_dict(), tmp_path / "llama.pt")
    with pytest.raises(RunError, match=r"tok_embeddings.weight is \(37, 32\) there and \(38, 32\) here"):
        load_weights(target, tmp_path / "llama.pt")
    said = load_weights(target, tmp_path / "llama.pt", more_rows=True)
    assert "; rows of tok_embeddings.weight from 37 on are new; rows of output.weight from 37 on are new" in said
    theirs = source.state_dict()
    assert all(torch.equal(tensor[: len(theirs[name])], theirs[name]) for name, tensor in target.state_dict().items())
    assert torch.equal(target.tok_embeddings.weight[VOCAB], fresh)
    with pytest.raises(RunError, match="does not fit this model"):  # never fewer rows, or other widths
        load_weights(build(llama(), seed=1), _saved(target, tmp_path), more_rows=True)


def _saved(model: torch.nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "other.pt")
    return folder / "other.pt"


@pytest.mark.ranks
def test_shards_take_the_rows_that_are_there(tmp_path: Path) -> None:
    whole_of = {"dim": 32, "n_layers": 1, "vocab_size": VOCAB}
    args = Layout(shard=3).args

    def rank(_: int) -> bool:
        plain = build_laid_out(Layout().world(), args, **whole_of)
        path = _saved(plain, tmp_path) if dist.get_rank() == 0 else tmp_path / "other.pt"
        dist.barrier()
        target = build_laid_out(Layout(shard=3).world(), args, **whole_of, causal=False, mask_token=True)
        fresh = whole(target.tok_embeddings.weight)[VOCAB]
        load_weights(target, path, more_rows=True)
        found = whole(target.tok_embeddings.weight)
        return torch.equal(found[:VOCAB], plain.tok_embeddings.weight) and torch.equal(found[VOCAB], fresh)

    assert run_on_ranks(rank, 3) == [True] * 3


# -- whole runs ----------------------------------------------------------------------------------------------------

WORDS = [
    *TINY, "loss.type=masked_diffusion", "loss.validation_samples=2", "loss.random_lengths=0.3", "steps=6",
    "checkpoint.dump.every=2", "validation.at_ends=true", "validation.max_rows=3", "global_batch_size=12",
]  # fmt: skip


def validations(run_dir: Path) -> list[float]:
    records = read_metrics(run_dir / "metrics.validation.jsonl")
    assert len(records) == 2
    names = ("bpb", "bpb_stderr", "n_samples")
    assert all(record["python_stdlib/n_samples"] > 0 for record in records)
    return [record[f"python_stdlib/{name}"] for record in records for name in names]


@pytest.mark.gate
@pytest.mark.soak
@pytest.mark.ranks
def test_killed_resumed_and_on_other_numbers_of_ranks_it_hides_the_same(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    result = train([*WORDS, f"dump_dir={calm}", "data.batch_size=12"])
    assert result.exit_code == 0, result.output
    killed_words = [*WORDS, f"dump_dir={killed}", "data.batch_size=12"]
    assert train(killed_words, hook=at_step(5, kill_self)).exit_codes == [-9]
    assert train(killed_words).exit_code == 0
    assert fingerprint(killed, 6) == fingerprint(calm, 6)
    assert losses(killed) == losses(calm)
    for n_ranks, more in ((1, ["distributed.full_activation_checkpointing=true"]), (2, []), (3, [])):
        run_dir = tmp_path / str(n_ranks)
        more = [*more, "distributed.fsdp_type=full_shard"] if n_ranks > 1 else more
        result = train([*WORDS, f"dump_dir={run_dir}", "data.batch_size=2", *more], n_ranks)
        assert result.exit_code == 0, result.output
        assert losses(run_dir) == pytest.approx(losses(calm), rel=2e-5)
        assert validations(run_dir) == pytest.approx(validations(calm), rel=1e-4)


@pytest.mark.soak
def test_a_run_that_looks_back_is_where_it_starts(tmp_path: Path) -> None:
    assert train([*TINY, "steps=3", f"dump_dir={tmp_path}/llama"]).exit_code == 0
    result = train([*WORDS, f"dump_dir={tmp_path}/own", f"checkpoint.init_ckpt_path={tmp_path}/llama"])
    assert result.exit_code == 0, result.output
    assert "rows of tok_embeddings.weight from 258 on are new" in result.output
    assert "loss.type masked_diffusion goes on with model.causal false, model.mask_token true" in result.output


@pytest.mark.soak
@pytest.mark.ranks
def test_tensor_parallel_ranks_train_score_and_speak_as_one(tmp_path: Path) -> None:
    words = [word for word in WORDS if "random_lengths" not in word]
    assert train([*words, f"dump_dir={tmp_path}/one", "data.batch_size=4"]).exit_code == 0
    split = ["data.batch_size=4", "distributed.tp_size=2", "sample_prompt=def"]
    result = train([*words, f"dump_dir={tmp_path}/two", *split], n_ranks=2)
    assert result.exit_code == 0, result.output
    assert "a sample:\n    def" in result.output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    assert validations(tmp_path / "two") == pytest.approx(validations(tmp_path / "one"), rel=1e-4)
