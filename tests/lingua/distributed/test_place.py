"""Who this rank is, by the variables that launchers set and that shells hand on."""

import os

import pytest

from lingua.config.base import ConfigError
from lingua.distributed.place import RankInfo, find_rank_info

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_torchrun_says_where_we_are():
    assert find_rank_info(TORCHRUN) == RankInfo(5, 8, 1, 4, ("head", 1234))


TORCHELASTIC = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    "launcher",
    [TORCHRUN, TORCHELASTIC | TORCHRUN, TORCHELASTIC | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "me"}],
)
def test_torchrun_inside_slurm_wins_over_the_task(launcher: dict[str, str]):
    place = find_rank_info(SLURM | launcher | {"SLURM_TASK_PID": "1"})
    assert place.world_size == int(launcher["WORLD_SIZE"])
    assert place.has_agent == ("TORCHELASTIC_RUN_ID" in launcher)


@pytest.mark.parametrize(
    "shell",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"},
        {**TORCHELASTIC, **TORCHRUN, "SLURM_TASK_PID": str(os.getpid())},
    ],
)
def test_a_rank_that_a_step_inherits_loses_against_its_task(shell: dict[str, str], caplog: pytest.LogCaptureFixture):
    place = find_rank_info(SLURM | shell)
    assert (place, place.has_agent) == (find_rank_info(SLURM), False)
    (said,) = [record.message for record in caplog.records]
    assert f"RANK {shell['RANK']} and WORLD_SIZE {shell['WORLD_SIZE']}" in said
    assert "are ignored: this is task 3 of 4" in said


def test_all_tasks_of_a_step_that_inherits_a_rank_meet_at_one_place():
    shell = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "elsewhere"}
    assert len({find_rank_info(SLURM | shell | {"SLURM_PROCID": str(n)}).master for n in range(4)}) == 1


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5, but with WORLD_SIZE=2 ranks are 0 to 1; start the ranks by "),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', which is not a number of at least 0; "),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0', which is not a number of at least 1; "),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', "),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', "),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999', which is not a number from 1 to 65535; "),
        ({**SLURM, "MASTER_PORT": "x"}, "MASTER_PORT is 'x', "),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(env: dict[str, str], sentence: str):
    with pytest.raises(ConfigError, match=f"environment: {sentence}"):
        find_rank_info(env)


def test_a_slurm_step_says_where_we_are():
    place = find_rank_info(SLURM)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert place.master is not None
    assert place.master[0] == "n1"


def test_two_jobs_and_two_steps_do_not_meet_at_one_port():
    places = [find_rank_info(SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}) for job in "789" for step in "01"]
    assert len({place.master for place in places}) == len(places)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"},
        {"RANK": "", "WORLD_SIZE": "2"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},
    ],
)
def test_otherwise_we_are_alone(env: dict[str, str]):
    assert find_rank_info(env) == RankInfo()
