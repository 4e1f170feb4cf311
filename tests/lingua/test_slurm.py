import pytest

from lingua.slurm import SlurmTask, first_host, job_end_s, this_job, this_task


@pytest.mark.parametrize(
    ("node_list", "expected"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,9],x1", "gpu003"),
        ("gpu[12,14]", "gpu12"),
        ("rack1-n[1-2]-ib", "rack1-n1-ib"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, expected: str):
    assert first_host(node_list) == expected


def test_a_task_of_a_step_knows_its_place():
    env = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NUM_TASKS": "12",
        "SLURM_STEP_TASKS_PER_NODE": "8,4",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    }
    assert this_task(env) == SlurmTask("77", rank=9, n_tasks=12, local_rank=1, n_local_tasks=4, node=1, head_node="n1")


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},  # a bare python in the batch shell
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_a_lone_process_in_a_big_allocation_waits_for_nobody(env: dict[str, str]):
    assert this_task(env) is None


def test_unreadable_counts_are_named():
    env = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "many"}
    with pytest.raises(ValueError, match="'many' cannot be read"):
        this_task(env)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("", 0)),
        ({"SLURM_JOB_ID": "7"}, ("7", 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, ("7", 2)),
    ],
)
def test_the_job_and_how_often_it_was_requeued(env: dict[str, str], expected: tuple[str, int]):
    assert this_job(env) == expected


@pytest.mark.parametrize(
    ("env", "grace_s", "expected"),
    [
        ({}, None, None),  # no Slurm, nothing said: as long as it takes
        ({}, 60.0, 1060.0),
        ({"SLURM_JOB_END_TIME": "5000"}, None, 5000.0),
        ({"SLURM_JOB_END_TIME": "5000"}, 60.0, 1060.0),
        ({"SLURM_JOB_END_TIME": "1030"}, 60.0, 1030.0),
        ({"SLURM_JOB_END_TIME": "Unknown"}, None, None),
        ({"SLURM_JOB_END_TIME": ""}, 60.0, 1060.0),
    ],
)
def test_when_a_job_that_was_asked_to_stop_ends(env: dict[str, str], grace_s: float | None, expected: float | None):
    assert job_end_s(env, grace_s, asked_at_s=1000.0) == expected
