"""A start that is refused before its first step leaves nothing of a folder that it made; any other end does."""

from __future__ import annotations

from pathlib import Path

import pytest

import apps.main.loop
from lingua.config.base import ConfigError
from lingua.data.blocked_source import DataError
from tests.runs.test_a_rank_that_fails_is_heard import fail_loading, last_words
from tests.trainer import TINY, Hook, train

WORDS = [*TINY, "steps=3", "distributed.timeout_s=300"]
REFUSAL = DataError("x.jsonl line 7: no text")


def fail_after_opening(error: Exception, on_rank: int) -> Hook:
    """Hook: one rank fails by itself when the run folder is open, and the others wait for it."""

    def failing(*_: object) -> None:
        raise error

    def hook(rank: int) -> None:
        if rank == on_rank:
            setattr(apps.main.loop, "build_run", failing)  # noqa: B010

    return hook


def test_refused_data(tmp_path: Path):
    result = train([*WORDS, f"dump_dir={tmp_path / 'out' / 'run'}"], hook=fail_loading(1, REFUSAL, 0))
    assert (result.exit_code, "error: x.jsonl line 7: no text" in result.output) == (1, True), result.output
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_was_there_keeps_the_words(tmp_path: Path):
    assert train([*WORDS, f"dump_dir={tmp_path}"], hook=fail_after_opening(ConfigError("x is y"), 0)).exit_code == 2
    assert last_words(tmp_path, 0)["message"] == "x is y"
    assert (tmp_path / "stop.json").exists()


@pytest.mark.parametrize(("error", "at_batch"), [(REFUSAL, 2), (RuntimeError("a bug"), 1)])
def test_a_step_that_was_done_and_a_failure_that_may_pass_keep_the_folder(
    tmp_path: Path, error: Exception, at_batch: int
):
    run = tmp_path / "run"
    assert train([*WORDS, f"dump_dir={run}"], hook=fail_loading(at_batch, error, 0)).exit_code == 1
    assert last_words(run, 0)["message"] == str(error)


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("refusing", [0, pytest.param(1, marks=pytest.mark.gate)])
@pytest.mark.parametrize("by", ["build_run", "batch"])
def test_rank_0_makes_the_folder_and_a_rank_refuses(tmp_path: Path, refusing: int, by: str):
    hook = fail_after_opening(REFUSAL, refusing) if by == "build_run" else fail_loading(1, REFUSAL, refusing)
    result = train([*WORDS, f"dump_dir={tmp_path / 'run'}"], n_ranks=2, hook=hook)
    assert result.exit_codes == [1, 1], result.output
    assert "error: x.jsonl line 7: no text" in result.output
    assert list(tmp_path.iterdir()) == []
    assert train([*WORDS, f"dump_dir={tmp_path / 'run'}"], n_ranks=2).exit_code == 0
