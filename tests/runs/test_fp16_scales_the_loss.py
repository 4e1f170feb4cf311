"""fp16: a gradient that overflows costs its step and no more, and the loss scale belongs to the state of a run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lingua.optim import update
from lingua.run.metrics import read_metrics
from tests.runs.test_nonfinite_steps import spoil
from tests.trainer import TINY, Hook, at_step, fingerprint, kill_self, losses, published, train

WORDS = [*TINY, "steps=8", "distributed.model_dtype=fp16", "checkpoint.dump.every=4"]


def begins_at(factor: float, then: Hook | None = None) -> Hook:
    """Hook: the first loss scale of a run."""

    def hook(rank: int) -> None:
        update.INITIAL = factor
        if then is not None:
            then(rank)

    return hook


def column(run_dir: Path, key: str) -> list[Any]:
    return [record.get(key) for record in read_metrics(run_dir / "metrics.jsonl")]


def test_losses_are_near_those_of_fp32(tmp_path: Path):
    for dtype in ("fp16", "fp32"):
        words = [*WORDS, f"distributed.model_dtype={dtype}", f"dump_dir={tmp_path / dtype}"]
        assert train(words).exit_code == 0
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-3)
    assert column(tmp_path / "fp16", "optim/loss_scale") == [65536.0] * 8
    assert column(tmp_path / "fp32", "optim/loss_scale") == [None] * 8


@pytest.mark.soak
@pytest.mark.parametrize(
    ("n_ranks", "words"),
    [
        pytest.param(1, [], marks=pytest.mark.gate),
        pytest.param(2, ["distributed.fsdp_type=full_shard"], marks=[pytest.mark.gate, pytest.mark.ranks]),
    ],
)
def test_overflows_are_skipped_and_a_killed_run_is_bitwise_equal(tmp_path: Path, n_ranks: int, words: list[str]):
    """The second start must take the scale from the checkpoint: at 2**19 it would skip steps again."""
    calm, killed = ([*WORDS, *words, f"dump_dir={tmp_path / name}"] for name in ("calm", "killed"))
    result = train(calm, n_ranks, begins_at(2.0**19))
    assert result.exit_code == 0, result.output
    assert "step 1 overflowed at loss scale" in result.output
    factors = column(tmp_path / "calm", "optim/loss_scale")
    skipped = column(tmp_path / "calm", "optim/skipped_steps")[-1]
    assert 1 <= skipped <= 4
    assert factors == [max(2.0**19 / 2**step, 2.0**19 / 2**skipped) for step in range(8)]
    assert column(tmp_path / "calm", "optim/grad_norm")[: skipped + 1].count(None) == skipped

    train(killed, n_ranks, begins_at(2.0**19, at_step(6, kill_self)))
    assert published(tmp_path / "killed") == [4]
    assert train(killed, n_ranks, begins_at(2.0**19)).exit_code == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")
    assert fingerprint(tmp_path / "killed", 8) == fingerprint(tmp_path / "calm", 8)


def test_at_the_smallest_scale_an_overflow_ends_the_run(tmp_path: Path):
    def hook(rank: int) -> None:
        update.INITIAL = update.MINIMUM = 2.0**40

    result = train([*WORDS, f"dump_dir={tmp_path}"], hook=hook)
    assert result.exit_code == 1
    assert "step 1" in result.output
    assert "is not finite" in result.output


def test_a_loss_that_is_not_finite_is_no_matter_of_scaling(tmp_path: Path):
    def hook(rank: int) -> None:
        spoil(4)(rank)
        step = update.optimizer_step

        def told(
            optimizer: torch.optim.Optimizer, lr: float, moves: torch.Tensor, divisor: torch.Tensor | None
        ) -> None:
            print(f"moves: {moves.item()}", flush=True)
            step(optimizer, lr, moves, divisor)

        setattr(update, "optimizer_step", told)  # noqa: B010

    result = train([*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=3"], hook=hook)
    assert result.exit_code == 1
    assert "step 4 (rows 6 to 7)" in result.output
    moves = re.findall(r"moves: (\w+)", result.output)
    assert moves == ["True"] * 3 + ["False"] * 2  # heard of while step 5 is computed
    assert published(tmp_path) == [3]
