"""Variables, commands and answers of Slurm. Real clusters: tests/runs/test_slurm_*.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from lingua.config.base import ConfigError
from lingua.config.keys.launch import LauncherArgs
from lingua.files import RunError
from lingua.slurm import (
    Allocation,
    JobState,
    Limits,
    QueuedJob,
    StepTask,
    ask_scheduler,
    describe_cluster,
    expand_hosts,
    for_steps,
    job_end_s,
    job_of,
    job_state,
    jobs_in_queue,
    limits_of,
    node_of_each_task,
    requeue,
    require_tasks_that_fit,
    run_command,
    send_signal,
    submit,
    this_allocation,
    this_job,
    this_node_name,
    this_task,
)


def test_a_task_of_a_step_knows_its_place():
    env = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_TASKS_PER_NODE": "8,4",
        "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    }  # fmt: skip
    assert this_task(env) == StepTask("77.0", rank=9, n_tasks=12, local_rank=1, n_local_tasks=4, node=1, head_node="n1")


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
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("gpu[003-005,9],x1", ["gpu003", "gpu004", "gpu005", "gpu9", "x1"]),
        ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
    ],
)
def test_hosts_of_a_node_list(text: str, hosts: list[str]):
    assert expand_hosts(text) == hosts


def test_the_node_of_each_task():
    env = {"SLURM_STEP_NODELIST": "n[1-2],m7", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert node_of_each_task(env) == ["n1", "n1", "n2", "n2", "m7"]
    assert node_of_each_task({}) == []
    assert this_node_name({"SLURMD_NODENAME": "n7"}) == "n7"
    assert this_node_name({}) == os.uname().nodename


NODES = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, Allocation("7", 0, 1, 1, None)),
        ({**NODES, "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "20"}, Allocation("7", 0, 3, 24, 20)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_RESTART_COUNT": "2"}, Allocation("7", 2, 1, 4, None)),
        # requeued on one node of the two it had: SLURM_NTASKS is still that of the submission
        ({**NODES, "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "16"}, Allocation("7", 0, 1, 8, None)),
    ],
)
def test_what_slurm_gave(env: dict[str, str], expected: Allocation | None):
    assert this_allocation(env) == expected
    assert this_job(env) == (("", 0) if expected is None else (expected.job_id, expected.restarts))


@pytest.mark.parametrize(
    ("text", "preempted", "cancelled", "limited"),
    [
        # as `scontrol --oneliner show job` of Slurm 22.05 said
        ("JobId=1 JobState=RUNNING Reason=None EndTime=2026-11-21T10:38:28 PreemptTime=None", False, False, True),
        ("JobId=1 JobState=RUNNING EndTime=2026-11-21T10:37:55 PreemptTime=2026-11-21T10:37:25", True, False, True),
        ("JobId=1 JobState=COMPLETING Reason=None EndTime=2026-11-21T10:37:25", False, True, True),
        ("JobId=1 JobState=CANCELLED Reason=None EndTime=2026-11-21T10:37:25", False, True, True),
        ("JobId=1 JobState=RUNNING EndTime=Unknown", False, False, False),
        ("nothing that is known", False, False, False),
    ],
)
def test_the_state_of_a_job(text: str, preempted: bool, cancelled: bool, limited: bool):
    state = job_state("1", lambda words: text)
    assert (state.preempted, state.cancelled, state.ends_at_s is not None) == (preempted, cancelled, limited)


def test_nodes_are_excluded_once_the_job_is_pending():
    commands: list[list[str]] = []
    requeue("7", ["n1", "n3"], run=lambda words: commands.append(list(words)) or "")
    assert commands == [["scontrol", "requeue", "7"], ["scontrol", "update", "JobId=7", "ExcNodeList=n1,n3"]]


@pytest.mark.parametrize(
    ("answers", "n_attempts", "requeued"),
    [
        (["Unable to contact slurm controller (connect failure)", ""], 2, True),
        (["Socket timed out on send/recv operation", "Socket timed out on send/recv operation", ""], 3, True),
        (["Unable to contact slurm controller (connect failure)"] * 5, 3, False),
        (["Access/permission denied for job 7", ""], 1, False),
    ],
)
def test_a_controller_that_is_away_for_a_moment_is_asked_again(answers: list[str], n_attempts: int, requeued: bool):
    commands: list[list[str]] = []

    def run(words: Sequence[str]) -> str:
        commands.append(list(words))
        if answer := answers[len(commands) - 1]:
            raise RunError(f"scontrol requeue was refused: {answer}")
        return ""

    with nullcontext() if requeued else pytest.raises(RunError, match="was refused"):
        requeue("7", run=run, sleep=lambda seconds: None)
    assert commands == [["scontrol", "requeue", "7"]] * n_attempts


def test_a_command_that_fails_is_one_sentence():
    with pytest.raises(RunError, match="false --requeue was refused"):
        run_command(["false", "--requeue"])
    with pytest.raises(RunError, match="there is no scontrol-of-nowhere on this machine"):
        run_command(["scontrol-of-nowhere"])
    assert JobState("RUNNING").cancelled is False


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


def test_a_task_of_an_array_is_never_called_by_its_job_id():
    """Seen in Slurm 22.05: the last task has the array's id, and `scontrol requeue` of that brings all tasks back."""
    array = {"SLURM_JOB_ID": "30", "SLURM_ARRAY_JOB_ID": "30", "SLURM_ARRAY_TASK_ID": "3"}
    allocation = this_allocation(array)
    assert allocation is not None
    assert (allocation.job_id, allocation.address) == ("30", "30_3")
    alone = this_allocation({"SLURM_JOB_ID": "30"})
    assert alone is not None
    assert alone.address == "30"


@pytest.mark.parametrize(
    ("partition", "config", "expected"),
    [
        ("", "", Limits()),
        (
            "PartitionName=low DisableRootJobs=NO GraceTime=30 Hidden=NO PreemptMode=REQUEUE State=UP",
            "KillWait                = 5 sec\nPreemptMode             = OFF\nSlurmdTimeout           = 8 sec\n",
            Limits(30.0, "REQUEUE", 5.0),
        ),
        ("PartitionName=all GraceTime=0", "PreemptMode = CANCEL\n", Limits(0.0, "CANCEL", None)),
    ],
)
def test_what_a_cluster_grants(partition: str, config: str, expected: Limits):
    answers = {"job": "JobId=7 Partition=low", "partition": partition, "config": config}
    assert limits_of("7", lambda words: answers[words[words.index("show") + 1]]) == expected


@pytest.mark.parametrize("listed", ["7.batch|run.sh\n7.0|service\n 7.1|ranks\n", "7.0|python\n", ""])
def test_a_signal_goes_to_one_step(listed: str):
    commands: list[list[str]] = []

    def run(words: Sequence[str]) -> str:
        commands.append(list(words))
        return listed

    with nullcontext() if "ranks" in listed else pytest.raises(RunError, match="job 7 has no step ranks"):
        send_signal("7", "KILL", "ranks", run)
        assert commands[-1] == ["scancel", "--signal=KILL", "7.1"]


# What a shell within a step of one core has, and a rank in it; its cluster and its site are to stay.
STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_LIST": "0x1", "SLURM_SRUN_COMM_PORT": "4711",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_GPU_BIND": "single:1", "SLURM_PTY_PORT": "1",
    "SLURM_GPUS": "1", "SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_PER_SOCKET": "1", "SLURM_TRES_PER_TASK": "cpu=1",
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
CLUSTER = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "SBATCH_ACCOUNT": "lab", "HOME": "/h"}


def test_a_job_that_a_step_or_a_rank_submits_inherits_neither():
    seen: dict[str, str] = {}

    def run(words: Sequence[str], env: dict[str, str]) -> str:
        seen.update(env)
        return "17\n"

    assert submit(Path("run.sh"), LauncherArgs().model_dump(), Path("logs"), env=STEP | CLUSTER, run=run) == "17"
    assert seen == CLUSTER


def test_a_job_that_a_step_submitted_by_hand_hands_nothing_of_it_to_its_own_steps():
    ours = {"SLURM_JOB_ID": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_MEM_PER_NODE": "900"}
    ours |= {"SLURM_GPUS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"}
    assert for_steps(STEP | CLUSTER | ours) == CLUSTER | ours
    both = for_steps(CLUSTER | ours | {"SLURM_MEM_PER_CPU": "100"})
    assert both == {name: value for name, value in (CLUSTER | ours).items() if name != "SLURM_MEM_PER_NODE"}


@pytest.mark.parametrize(
    ("n_tasks", "per_node", "nodes", "restarts", "refused"),
    [
        ("1", "2", "1", "0", True),
        ("4", "4", "2", "0", True),
        ("8", "4", "2", "0", False),
        ("8", "4", "1", "1", False),  # requeued on fewer nodes
        ("4", "4", "2", "1", False),  # and on more
        ("1", "", "1", "0", False),
        ("", "2", "1", "0", False),
    ],
)
def test_numbers_of_tasks_that_contradict_each_other_are_named(
    n_tasks: str, per_node: str, nodes: str, restarts: str, refused: bool
):
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": nodes, "SLURM_RESTART_COUNT": restarts}
    env |= {"SLURM_NTASKS": n_tasks, "SLURM_NTASKS_PER_NODE": per_node}
    with pytest.raises(ConfigError, match=r"--ntasks=\d, but --ntasks-per-node=\d") if refused else nullcontext():
        require_tasks_that_fit(env)


def test_a_job_that_is_known_by_its_name_is_submitted_once():
    commands: list[str] = []
    queue = [""]

    def run(words: Sequence[str], env: object = None) -> str:
        commands.append(words[0])
        return queue[0] if words[0] == "squeue" else "17;cluster\n"

    script, asked = Path("run.sh"), LauncherArgs()
    assert submit(script, asked.model_dump(), Path("logs"), once="mine", run=run) == "17"
    queue[0] = "17\n"
    assert submit(script, asked.model_dump(), Path("logs"), once="mine", run=run) == "17"
    assert commands == ["squeue", "sbatch", "squeue"]


SQUEUE = """\
7|RUNNING|None|1-02:03:04|n[1-2]|7_N/A
8|PENDING|Priority|2:00:00||8_N/A
9|CANCELLED|None|INVALID|n3|9_N/A
31|RUNNING|None|2:00:00|n4|30_1
30|PENDING|Priority|2:00:00||30_2
30|PENDING|Priority|2:00:00||30_3
"""
SACCT = """\
12|CANCELLED by 1000|None
12.batch|CANCELLED|
"""


def slurm(words: Sequence[str]) -> str:
    return {"squeue": SQUEUE, "sacct": SACCT}[words[0]]


def test_the_queue_is_read_at_once():
    queue = jobs_in_queue(slurm)
    assert queue["7"] == QueuedJob("7", "RUNNING", "", "1-02:03:04", "n[1-2]")
    assert queue["8"] == QueuedJob("8", "PENDING", "Priority", "2:00:00", "")
    assert [name for name, job in queue.items() if job.is_waiting] == ["8", "30", "30_2", "30_3"]
    assert [name for name, job in queue.items() if not job.is_there] == ["9"]
    assert queue["30_1"] is queue["31"], "a task that has started has an id of its own"


def test_a_job_that_left_the_queue_is_in_the_accounts():
    assert job_of("7", jobs_in_queue(slurm), slurm) == QueuedJob("7", "RUNNING", "", "1-02:03:04", "n[1-2]")
    assert job_of("12", {}, slurm) == QueuedJob("12", "CANCELLED by 1000")
    assert job_of("13", {}, slurm) is None
    assert job_of("", {}, slurm) is None


def test_no_slurm_is_no_answer():
    assert ask_scheduler(["no-such-command-as-this"]) == ask_scheduler(["false"]) == ""
    assert ask_scheduler(["sleep", "5"], timeout_s=0.01) == ""
    assert jobs_in_queue(lambda words: "") == {}
    assert job_of("7", {}, lambda words: "") is None


CONFIG = """\
Configuration data as of 2026-01-01T00:00:00
ClusterName             = night
JobRequeue              = 0
JobContainerType        = job_container/tmpfs
KillWait                = 30 sec
PreemptMode             = REQUEUE
ProctrackType           = proctrack/linuxproc
SLURM_VERSION           = 22.05.8
"""


GOOD = "ClusterName = c\nPreemptMode = {}\nJobRequeue = 1\nProctrackType = proctrack/cgroup\n"


def test_what_a_clusters_settings_mean_for_a_run():
    found = {part: (says, remedy) for part, says, remedy in describe_cluster(lambda words: CONFIG)}
    assert found["slurm"] == ("22.05.8, cluster night", "")
    assert found["preemption"] == ("REQUEUE; 30 sec from SIGTERM to SIGKILL at the time limit", "")
    assert {part for part, (_, remedy) in found.items() if remedy} == {"requeue", "job container", "processes"}
    assert [bool(remedy) for *_, remedy in describe_cluster(lambda words: GOOD.format("REQUEUE"))] == [False, False]
    assert [bool(remedy) for *_, remedy in describe_cluster(lambda words: GOOD.format("CANCEL"))] == [False, True]
    ((part, says, remedy),) = describe_cluster(lambda words: "")
    assert (part, says[:8]) == ("slurm", "not here")
    assert "--local" in remedy
