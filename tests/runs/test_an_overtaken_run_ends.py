"""A run that another attempt has taken over, while it slept or its disk hung, ends soon and publishes nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lingua.files import write_json
from lingua.run import lock
from lingua.run.lock import this_process
from tests.trainer import TINY, Hook, at_step, published, train

WORDS = [*TINY, "steps=1000000", "optim.scheduler=constant"]


def taken_over_at(step: int, take_over: Callable[[], None]) -> Hook:
    def hook(rank: int) -> None:
        setattr(lock, "BEAT_S", 0.05)  # noqa: B010
        at_step(step, take_over, on_rank=0)(rank)

    return hook


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["null", pytest.param("shm", marks=pytest.mark.soak)])
def test_by_a_newer_attempt(tmp_path: Path, mode: str):
    """No save comes in time to tell: the heartbeat does."""
    run, newer = tmp_path / "run", vars(this_process()) | {"released": False}
    hook = taken_over_at(5, lambda: write_json(run / "incarnations" / "0000000002.json", newer))
    words = [*WORDS, f"dump_dir={run}", "checkpoint.dump.every=3", f"checkpoint.async_save_mode={mode}"]
    result = train([*words, f"checkpoint.shm_path={tmp_path}", "checkpoint.linger_s=0"], n_ranks=2, hook=hook)
    assert result.exit_code == 1
    assert f"attempt 2 of this run has taken over {run}; this one, attempt 1, stops" in result.output
    assert "Traceback" not in result.output
    assert not (run / "stop.json").exists()
    assert not list((run / "logs").glob("error_*"))
    assert not lock.read_attempt(run / "incarnations" / "0000000002.json").released


def test_by_a_run_that_began_where_its_folder_was_removed(tmp_path: Path):
    run = tmp_path / "run"

    def begin_again() -> None:
        os.rename(run, tmp_path / "removed")
        (run / "incarnations").mkdir(parents=True)
        write_json(
            run / "incarnations" / "0000000001.json", vars(this_process()) | {"released": False, "began_at": 1.0}
        )

    result = train([*WORDS, f"dump_dir={run}", "checkpoint.dump.every=0"], hook=taken_over_at(3, begin_again))
    assert result.exit_code == 1
    assert f"another run has begun in {run}" in result.output
    # A step may end, and be told, before the other is noticed.
    assert {path.name for path in run.iterdir()} <= {"incarnations", "metrics.jsonl", "train.log"}
    assert published(run) == []
