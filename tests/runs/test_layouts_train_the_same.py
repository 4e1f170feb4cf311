"""Accumulation, number of ranks and sharding change how a step is computed, not what it is."""

from pathlib import Path

import pytest

from tests.trainer import TINY, losses, train

WORDS = [*TINY, "steps=8", "optim.clip=0.1", "data.lanes=12"]  # a clip that bites: it must act on the whole gradient
G = 12  # rows per step


@pytest.fixture(scope="module")
def one_large_batch(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run_dir = tmp_path_factory.mktemp("one")
    result = train([*WORDS, f"dump_dir={run_dir}", f"data.batch_size={G}"])
    assert result.exit_code == 0, result.output
    return losses(run_dir)


@pytest.mark.parametrize(
    ("n_ranks", "words"),
    [
        (1, ["data.batch_size=3", "grad_acc_steps=4"]),
        (1, ["data.batch_size=4", f"global_batch_size={G}"]),
        pytest.param(2, ["data.batch_size=6"], marks=pytest.mark.ranks),
        pytest.param(2, ["data.batch_size=2", "grad_acc_steps=3"], marks=pytest.mark.ranks),
        pytest.param(3, ["data.batch_size=4", "distributed.fsdp_type=full_shard"], marks=pytest.mark.ranks),
        pytest.param(
            4, ["data.batch_size=3", "distributed.fsdp_type=full_shard", "distributed.dp_shard=2"],
            marks=pytest.mark.ranks,
        ),
        pytest.param(2, ["data.batch_size=4", "grad_acc_steps=3", "distributed.tp_size=2"], marks=pytest.mark.ranks),
        pytest.param(
            4, ["data.batch_size=6", "distributed.tp_size=2", "distributed.fsdp_type=full_shard"],
            marks=pytest.mark.ranks,
        ),
        (1, [f"data.batch_size={G}", "distributed.selective_activation_checkpointing=true"]),
        (1, [f"data.batch_size={G}", "distributed.full_activation_checkpointing=true"]),
    ],
)  # fmt: skip
def test_losses_equal_those_of_one_large_batch(
    one_large_batch: dict[int, float], tmp_path: Path, n_ranks: int, words: list[str]
):
    result = train([*WORDS, f"dump_dir={tmp_path}", *words], n_ranks)
    assert result.exit_code == 0, result.output
    assert losses(tmp_path) == pytest.approx(one_large_batch, rel=2e-5)


@pytest.mark.ranks
def test_a_run_goes_on_with_the_same_rows_on_other_numbers_of_ranks(one_large_batch: dict[int, float], tmp_path: Path):
    """Twice in mid-run; rows per step stay, so accumulation is derived."""
    words = [*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=2", "distributed.fsdp_type=full_shard"]
    for n_ranks, steps, batch in ((2, 3, 6), (3, 6, 2), (1, 8, 4)):
        result = train([*words, f"steps={steps}", f"data.batch_size={batch}", "optim.scheduler=constant"], n_ranks)
        assert result.exit_code == 0, result.output
    constant = tmp_path / "constant"
    assert train([*WORDS, f"dump_dir={constant}", f"data.batch_size={G}", "optim.scheduler=constant"]).exit_code == 0
    assert losses(tmp_path) == pytest.approx(losses(constant), rel=2e-5)
