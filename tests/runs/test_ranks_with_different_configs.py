"""A rank that was given another config is found before anything is built, and the job is not started again."""

import os
from pathlib import Path

import orjson
import pytest

from lingua.distributed.same_config import MixedConfigError
from lingua.launch.requeue import Outcome, judge
from lingua.run.failure import read_failures
from tests.trainer import TINY, Hook, train

WORDS = [*TINY, "steps=2"]


def rate_by_rank(*rates: str) -> Hook:
    """Hook: another learning rate on each rank, as another environment on each node would give."""

    def hook(rank: int) -> None:
        os.environ["RATE"] = rates[rank]

    return hook


@pytest.mark.soak
@pytest.mark.ranks
def test_another_learning_rate_on_rank_1_ends_all_ranks_with_the_reason(tmp_path: Path):
    words = [*WORDS, "optim.lr=${oc.env:RATE}", f"dump_dir={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()  # as a job does; or else nothing would be left
    result = train(words, n_ranks=2, hook=rate_by_rank("0.001", "0.01"))
    assert result.exit_codes == [1, 1], result.output
    sentence = "the ranks do not have the same config: optim.lr is 0.001 on rank 0 and 0.01 on rank 1; start all"
    assert result.output.count(f"error: {sentence}") == 2
    failures = read_failures(tmp_path / "run")
    assert [(found.rank, found.kind, found.type) for found in failures] == [
        (rank, "setup", MixedConfigError.__name__) for rank in range(2)
    ]
    assert not judge(Outcome(1, kinds=frozenset(found.kind for found in failures)), max_retries=3).requeue
    assert not (tmp_path / "run" / "config.yaml").exists()  # nothing was begun

    assert train(words, n_ranks=2, hook=rate_by_rank("0.01", "0.01")).exit_code == 0
    assert not (tmp_path / "run" / "logs" / "error_0.json").exists()
    assert orjson.loads((tmp_path / "run" / "stop.json").read_bytes())["reason"] == "finished"


@pytest.mark.ranks
def test_a_config_that_rank_1_alone_refuses_ends_both_at_once_and_is_printed_once(tmp_path: Path):
    words = [*WORDS, "optim.lr=${oc.env:RATE}", "distributed.timeout_s=300", f"dump_dir={tmp_path / 'run'}"]
    result = train(words, n_ranks=2, hook=rate_by_rank("0.001", "fast"))
    assert result.exit_codes == [2, 2], result.output
    assert result.output.count("error: ") == 1
    assert "error: rank 1: " in result.output
    assert "optim.lr" in result.output
    assert not judge(Outcome(2), max_retries=3).requeue


@pytest.mark.ranks
def test_another_layout_or_run_folder_on_a_rank_is_found_before_ranks_could_wait_for_each_other(tmp_path: Path):
    words = [*WORDS, "distributed.timeout_s=300", "distributed.fsdp_type=full_shard"]
    words += ["distributed.dp_replicate=${oc.env:RATE}", f"dump_dir={tmp_path}/$RATE"]
    result = train(words, n_ranks=2, hook=rate_by_rank("1", "2"))
    assert result.exit_codes == [1, 1], result.output
    assert "distributed.dp_replicate is 1 on rank 0 and 2 on rank 1; start" in result.output
    assert f"dump_dir is '{tmp_path}/1' on rank 0 and '{tmp_path}/2' on rank 1; " in result.output
