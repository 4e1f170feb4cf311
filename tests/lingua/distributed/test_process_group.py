import errno
import os
from typing import Any

import pytest
import torch

from lingua.config.base import ConfigError
from lingua.config.keys.distributed import DistributedArgs, EnvironmentArgs
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import (
    RankError,
    StepReduce,
    from_main,
    on_each,
    on_every_rank,
    pick_device,
    set_environment,
)
from lingua.files import DiskError
from lingua.run.failure import classify
from tests.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("given", "threads"), [("4,2", 4), ("", 1), ("03", 3), ("0", None), ("many", None), ("-1", None)]
)
def test_threads_are_counted_or_refused(given: str, threads: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": given})
    before = torch.get_num_threads()
    try:
        if threads is None:
            with pytest.raises(ConfigError, match=f"OMP_NUM_THREADS is '{given}', .*; unset it, or write 1"):
                set_environment(EnvironmentArgs(), RankInfo(), on_gpu=True)
        else:
            set_environment(EnvironmentArgs(), RankInfo(), on_gpu=True)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_gpu_that_is_not_there_is_refused_with_the_remedy():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RankError, match="device=cpu"):
        pick_device("cuda", RankInfo())
    assert pick_device("auto", RankInfo()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("args", "world_size", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 8, (8, 1, 1)),
        ({"fsdp_type": "full_shard"}, 8, (1, 8, 1)),
        ({"fsdp_type": "full_shard", "dp_replicate": 2}, 8, (2, 4, 1)),
        ({"fsdp_type": "full_shard", "dp_shard": 2}, 8, (4, 2, 1)),
        ({"fsdp_type": "full_shard", "tp_size": 2}, 8, (1, 4, 2)),
        ({"dp_replicate": 24}, 8, (8, 1, 1)),  # a config for 24 GPUs on 8
    ],
)
def test_degrees_of_parallelism(args: dict[str, Any], world_size: int, expected: tuple[int, int, int]):
    assert DistributedArgs(**args).degrees(world_size) == expected


@pytest.mark.parametrize(("args", "world_size"), [({"tp_size": 3}, 8), ({"fsdp_type": "full_shard", "dp_shard": 3}, 8)])
def test_degrees_that_do_not_fit_are_refused(args: dict[str, Any], world_size: int):
    with pytest.raises(ValueError, match="does not divide 8"):
        DistributedArgs(**args).degrees(world_size)


def test_a_step_is_reduced_over_ranks_and_read_one_step_late():
    def act(rank: int) -> list[Any]:
        reduce: StepReduce[str] = StepReduce(torch.device("cpu"))
        return [
            reduce.submit("one", {"a": float(rank), "b": torch.tensor(True)}),
            reduce.submit("two", {"a": 10.0, "b": torch.tensor(rank == 1)}),
            reduce.result(),
            reduce.result(),
        ]

    expected = [None, ("one", {"a": 3.0, "b": 3.0}), ("two", {"a": 30.0, "b": 1.0}), None]
    assert run_on_ranks(act, 3) == [expected] * 3
    assert act(0) == [None, ("one", {"a": 0.0, "b": 1.0}), ("two", {"a": 10.0, "b": 0.0}), None]  # alone


def test_all_ranks_hear_the_result_of_rank_0_or_its_error():
    def act(rank: int) -> list[str]:
        heard = [from_main(lambda: f"from {rank}")]
        try:
            from_main(lambda: int("x"))
        except ValueError as error:
            heard.append(f"{type(error).__name__}: {error}")
        return heard

    results = run_on_ranks(act, 2)
    assert results[0] == results[1]
    assert results[1][0] == "from 0"
    assert results[1][1].startswith("ValueError: invalid literal")


def test_an_error_that_cannot_travel_still_arrives_as_words():
    class OddError(ValueError):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"odd {a} {b}")

    def fail() -> None:
        raise OddError(1, 2)

    def act(rank: int) -> str:
        with pytest.raises((OddError, RankError)) as caught:
            from_main(fail)
        return str(caught.value)

    assert run_on_ranks(act, 2) == ["odd 1 2", "OddError: odd 1 2"]


def test_when_one_rank_fails_all_raise_and_name_it():
    def act(rank: int) -> str:
        def work() -> int:
            return 1 // (1 - rank)

        with pytest.raises((ZeroDivisionError, RankError)) as caught:
            on_every_rank(work)
        return str(caught.value)

    results = run_on_ranks(act, 3)
    assert "rank 1: ZeroDivisionError" in results[0]
    assert "rank 1: ZeroDivisionError" in results[2]


def test_an_error_of_a_disk_is_the_same_on_all_ranks_and_a_bug_keeps_nobody_waiting():
    def full() -> None:
        raise OSError(errno.ENOSPC, "no space", "/data")

    def act(rank: int) -> list[str]:
        found = []
        for fails in (full, lambda: int("x")):
            with pytest.raises((DiskError, ValueError, RankError)) as caught:
                on_each(fails if rank == 1 else lambda: None)
            found.append(f"{type(caught.value).__name__} {classify(caught.value)}")
        return found + [str(value) for value in on_each(lambda: rank)]

    disk, here = "DiskError disk_full", ["0", "1"]
    assert run_on_ranks(act, 2) == [[disk, "RankError config", *here], [disk, "ValueError config", *here]]


def test_what_the_launcher_takes_away_is_not_put_back_and_torch_keeps_its_own_choices(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    for name in EnvironmentArgs.model_fields:
        monkeypatch.setenv(name, "1")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    try:
        set_environment(EnvironmentArgs(), RankInfo(), False, ["NCCL_DEBUG", "OMP_NUM_THREADS"])
        given = {name for name, value in EnvironmentArgs().model_dump().items() if value is not None}
        assert given - set(os.environ) == {"NCCL_DEBUG", "OMP_NUM_THREADS"}
        assert given - {"NCCL_DEBUG", "OMP_NUM_THREADS"} == {"MKL_NUM_THREADS", "NCCL_IB_TIMEOUT"}
    finally:
        torch.set_num_threads(before)
