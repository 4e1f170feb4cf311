"""`async_eval_gpus: 0`: a run starts its evaluator itself; kills of either lose nothing, and none is left over."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lingua.checkpoint import layout
from lingua.run.lock import living_attempt
from tests.evaluated import by_hand, evaluations, make_data, verdicts, words_of
from tests.slurm_cluster import until
from tests.trainer import Trainer, at_step, kill_self, train

pytestmark = pytest.mark.soak


def evaluator_of(run_dir: Path) -> int | None:
    """Pid of the evaluator that the run started, while it lives."""
    attempt = living_attempt(run_dir / layout.EVALS)
    return None if attempt is None else attempt.owner.pid


def test_it_goes_on_when_the_run_has_ended_and_then_ends_itself(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = train(words_of(make_data(tmp_path), run_dir, "async_eval_gpus=0"))
    assert result.exit_code == 0, result.output
    log_file = run_dir / "logs" / "evaluator.log"
    until(lambda: "ends: the run is finished" in log_file.read_text(), "the end of the evaluator", 120)
    assert evaluations(run_dir) == by_hand(run_dir, [2, 4, 5])
    until(lambda: evaluator_of(run_dir) is None, "its leave")


@pytest.mark.gate
def test_run_and_evaluator_are_killed_in_turn(tmp_path: Path) -> None:
    """The run is killed: its evaluator stays and is found again. The evaluator is killed: the run starts another."""
    run_dir = tmp_path / "run"
    words = words_of(make_data(tmp_path), run_dir, "async_eval_gpus=0", "checkpoint.dump.every=1")
    waiting = [*words, "steps=4"]
    killed = train(waiting, hook=at_step(3, kill_self))
    assert killed.exit_codes == [-signal.SIGKILL]
    first = until(lambda: evaluator_of(run_dir), "an evaluator", 60)
    with Trainer(waiting) as trainer:
        assert trainer.wait().exit_code == 0
        assert evaluator_of(run_dir) in (first, None), "found again, or through already"
    until(lambda: sorted(verdicts(run_dir)) == [2, 4], "the evaluations of the first part", 120)
    until(lambda: evaluator_of(run_dir) is None, "its leave")
    assert sorted(evaluations(run_dir)) == [2, 4]

    def kill_it() -> None:
        pid = until(lambda: evaluator_of(run_dir), "another evaluator", 60)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and left for the run to find

    assert train([*words, "steps=8", "--accept-change"], hook=at_step(7, kill_it)).exit_code == 0
    until(lambda: sorted(verdicts(run_dir)) == [2, 4, 6, 8], "all evaluations", 120)
    until(lambda: evaluator_of(run_dir) is None, "its leave")
    assert evaluations(run_dir) == by_hand(run_dir, [2, 4, 6, 8])
