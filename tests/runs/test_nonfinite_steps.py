"""A step whose loss or gradient is not finite never moves the optimizer."""

from pathlib import Path

import pytest
import torch

from lingua.model.loss import CrossEntropy
from lingua.run.metrics import read_metrics
from tests.trainer import TINY, Hook, at_step, kill_self, losses, published, train

WORDS = [*TINY, "steps=8"]


def spoil(*calls: int) -> Hook:
    """Hook: the n-th losses (from 1; one per micro step) are not a number."""

    def hook(rank: int) -> None:
        call = CrossEntropy.__call__
        count = 0

        def spoiled(self: CrossEntropy, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal count
            count += 1
            loss, n_tokens = call(self, *args)
            return (loss * float("nan") if count in calls else loss), n_tokens

        setattr(CrossEntropy, "__call__", spoiled)  # noqa: B010

    return hook


def test_the_run_stops_before_the_optimizer_moves_and_names_step_and_rows(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=2"]
    result = train(words, hook=spoil(4))
    assert result.exit_code == 1
    assert "step 4 (rows 6 to 7)" in result.output
    assert "data.skip_rows=" in result.output
    assert "Traceback" not in result.output
    assert published(tmp_path) == [2]

    assert train([*words, "data.skip_rows=[[6,7]]"]).exit_code == 0  # the way past


@pytest.mark.soak
def test_the_lower_rate_that_the_message_asks_for_is_accepted(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=2", "optim.lr=1e-3"]
    assert "lower optim.lr" in train(words, hook=spoil(4)).output
    assert train([*words, "optim.lr=2e-3"]).exit_code == 2
    lower = [*words, "optim.lr=1e-4"]
    assert train(lower, hook=at_step(4, kill_self)).exit_codes == [-9]
    assert train(lower).exit_code == 0  # the config of the start that was killed says so now


@pytest.mark.soak
def test_it_stops_even_when_that_step_would_have_been_saved(tmp_path: Path):
    result = train([*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=4"], hook=spoil(4))
    assert result.exit_code == 1
    assert published(tmp_path) == []


def test_a_skipped_step_is_counted_and_the_run_goes_on(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "optim.on_nonfinite=skip"]
    result = train(words, hook=spoil(3))
    assert result.exit_code == 0, result.output
    assert "step 3" in result.output
    assert sorted(losses(tmp_path)) == [1, 2, 4, 5, 6, 7, 8]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["optim/skipped_steps"] == 1
    assert published(tmp_path) == [8]


@pytest.mark.soak
def test_skips_in_a_row_are_limited(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "optim.on_nonfinite=skip", "optim.max_skips=2"]
    assert train(words, hook=spoil(3, 4, 6, 7)).exit_code == 0
    other = [*WORDS, f"dump_dir={tmp_path / 'other'}", "optim.on_nonfinite=skip", "optim.max_skips=2"]
    result = train(other, hook=spoil(3, 4, 5))
    assert result.exit_code == 1
    assert "step 5" in result.output


@pytest.mark.soak
@pytest.mark.ranks
def test_a_gradient_that_is_wrong_on_one_rank_stops_all(tmp_path: Path):
    def hook(rank: int) -> None:
        if rank == 1:
            spoil(3)(rank)

    result = train([*WORDS, f"dump_dir={tmp_path}"], n_ranks=2, hook=hook)
    assert result.exit_code == 1
    assert "step 3" in result.output
