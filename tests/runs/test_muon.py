"""Runs with Muon keep the promises that runs with AdamW keep."""

from pathlib import Path

import pytest

from lingua.checkpoint import metadata
from lingua.run.metrics import read_metrics
from tests.trainer import TINY, at_step, fingerprint, kill_self, losses, published, train

WORDS = [*TINY, "+muon", "steps=8", "checkpoint.dump={every: 2, keep: -1}"]
G = 12  # rows per step
RANKS = [*WORDS, f"global_batch_size={G}", "distributed.fsdp_type=full_shard", "optim.scheduler=constant"]


@pytest.mark.soak
def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path: Path):
    calm, killed = ([*WORDS, f"dump_dir={tmp_path / name}"] for name in ("calm", "killed"))
    assert train(calm).exit_code == 0
    assert train(killed, hook=at_step(5, kill_self)).exit_codes == [-9]
    assert train(killed).exit_code == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")
    assert fingerprint(tmp_path / "killed", 8) == fingerprint(tmp_path / "calm", 8)
    tensors = metadata.read_tensors(tmp_path / "calm" / "checkpoints" / "0000000008")
    assert "optim.state.layers.1.attention.wq.weight.momentum" in tensors
    assert "optim.state.layers.1.attention.wq.weight.exp_avg" not in tensors
    assert "optim.state.layers.1.attention_norm.weight.exp_avg" in tensors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run = tmp_path_factory.mktemp("alone")
    result = train([*RANKS, f"dump_dir={run}", f"data.batch_size={G}"])
    assert result.exit_code == 0, result.output
    return losses(run)


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("n_ranks", "words"),
    [
        (2, ["data.batch_size=6"]),
        (2, ["data.batch_size=3", "distributed.fsdp_type=no_shard"]),
        (3, ["data.batch_size=4"]),
        (4, ["data.batch_size=3", "distributed.dp_shard=2"]),
        (2, ["data.batch_size=6", "checkpoint.async_save_mode=shm"]),
    ],
)
def test_layouts_train_the_same(alone: dict[int, float], tmp_path: Path, n_ranks: int, words: list[str]):
    result = train([*RANKS, f"dump_dir={tmp_path / 'run'}", f"checkpoint.shm_path={tmp_path}", *words], n_ranks)
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-4)
    assert published(tmp_path / "run")[-1] == 8


@pytest.mark.gate
@pytest.mark.soak
@pytest.mark.ranks
def test_killed_on_two_ranks_a_run_goes_on_with_one_and_with_three(alone: dict[int, float], tmp_path: Path):
    words = [*RANKS, f"dump_dir={tmp_path}"]
    assert -9 in train([*words, "data.batch_size=6"], 2, at_step(3, kill_self, on_rank=1)).exit_codes
    assert train([*words, "data.batch_size=12"], 1, at_step(5, kill_self)).exit_codes == [-9]
    result = train([*words, "data.batch_size=4"], 3)
    assert result.exit_code == 0, result.output
    assert losses_of_last(tmp_path) == pytest.approx(alone, rel=1e-4)


def losses_of_last(run: Path) -> dict[int, float]:
    """Loss by step; of a step that was trained on several layouts, the newest."""
    return {record["global_step"]: record["loss/out"] for record in read_metrics(run / "metrics.jsonl")}


@pytest.mark.soak
def test_a_step_that_is_not_finite_stops_the_run_with_the_matrices_as_they_were(tmp_path: Path):
    result = train([*WORDS, f"dump_dir={tmp_path}", "optim.lr=1e30", "optim.warmup=0"])
    assert result.exit_code == 1
    assert "is not finite" in result.output
    assert "Nothing was updated" in result.output
