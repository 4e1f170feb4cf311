"""What Slurm takes away comes back and ends bitwise equal; what a person ends stays ended. On a real Slurm."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from lingua.files import read_json
from lingua.launch.job import RANKS_STEP, SERVICE_STEP
from lingua.slurm import send_signal
from tests.checkout import Checkout, tiny, undisturbed
from tests.slurm_cluster import until
from tests.trainer import fingerprint, losses, published, train

pytestmark = pytest.mark.slurm

LONG = 100_000
"""Steps that nobody waits for."""
STEADY = "optim.scheduler=constant"
"""For runs that are compared at a step which nobody knows before."""


def preempt(checkout: Checkout, job_id: str, starts: int) -> None:
    """A job of the partition `high` takes the nodes for a moment; returns when `job_id` has been requeued."""
    facts = checkout.cluster.job(job_id)
    node = facts["NodeList"]
    assert facts["JobState"] == "RUNNING", facts
    words = ["--partition=high", f"--nodelist={node}", "--gpus-per-node=8", "--output=/dev/null", "--wrap=true"]
    checkout.cluster.sbatch(*words, cwd=checkout.home)
    until(lambda: checkout.cluster.job(job_id)["Restarts"] == str(starts), f"requeue {starts} of job {job_id}")


def cancel(checkout: Checkout, job_id: str, run_dir: Path) -> int:
    """End a run as a person does; returns its newest checkpoint."""
    checkout.cluster.run("scancel", job_id)
    checkout.cluster.wait(job_id, "CANCELLED")
    return published(run_dir)[-1]


def assert_undisturbed(run_dir: Path, calm: Path, step: int) -> None:
    """Every step was trained, and the checkpoint is that of a run that nobody disturbed, bit for bit."""
    assert losses(run_dir).keys() >= set(range(1, step + 1))
    assert train(undisturbed(calm, step, STEADY), n_ranks=2).exit_code == 0
    assert fingerprint(run_dir, step) == fingerprint(calm, step)


@pytest.mark.gate
def test_preempted_three_times_and_bitwise_equal(checkout: Checkout, tmp_path: Path):
    words = tiny("taken", LONG, STEADY, "checkpoint.dump.every=100000")
    job_id = checkout.submit("preemptible_4.slurm", words, "--partition=low", "--ntasks-per-node=2")
    run_dir, step = checkout.run_dir("taken"), 0
    for n in (1, 2, 3):
        step = checkout.wait_for_step("taken", step + 20)
        preempt(checkout, job_id, n)
        assert published(run_dir)[-1] >= step, "nothing was saved in the grace"
        step = published(run_dir)[-1]
    checkout.wait_for_step("taken", step + 20)
    assert_undisturbed(run_dir, tmp_path / "calm", cancel(checkout, job_id, run_dir))


def test_a_service_step_saves_what_preemption_left_in_memory_and_may_be_killed(
    checkout: Checkout, tmp_path: Path, shm: Path
):
    """With async_save_mode shm: the service is a step of its own beside that of the ranks.

    With grace_s so short the ranks leave as soon as all is in memory: the batch script waits for the service.
    """
    words = tiny("staged", LONG, STEADY, "checkpoint.dump.every=50", "checkpoint.async_save_mode=shm")
    words += [f"checkpoint.shm_path={shm}", "checkpoint.grace_s=5", "launcher.tasks_per_node=per_node"]
    job_id = checkout.submit("preemptible_4.slurm", words, "--partition=low", "--ntasks-per-node=2")
    run_dir = checkout.run_dir("staged")
    step = checkout.wait_for_step("staged", 60)
    assert (run_dir / "logs" / f"{job_id}.service.0.out").exists()
    preempt(checkout, job_id, 1)
    assert published(run_dir)[-1] >= step, "the batch script waits for the service"
    checkout.wait_for_step("staged", published(run_dir)[-1] + 20)
    send_signal(job_id, "KILL", SERVICE_STEP, run=lambda words: checkout.cluster.run(*words))
    until(lambda: (run_dir / "logs" / "checkpoint_service.0.log").exists(), "a service that the ranks begin")
    step = published(run_dir)[-1]
    until(lambda: published(run_dir)[-1] > step + 50, "checkpoints after the death of the service")
    assert_undisturbed(run_dir, tmp_path / "calm", cancel(checkout, job_id, run_dir))


def test_preemption_reaches_the_ranks_of_one_task_per_node(checkout: Checkout):
    words = tiny("below", LONG, "launcher.tasks_per_node=per_node")
    job_id = checkout.submit("preemptible_4.slurm", words, "--partition=low", "--ntasks-per-node=2")
    step = checkout.wait_for_step("below", 5)
    preempt(checkout, job_id, 1)
    assert published(checkout.run_dir("below"))[-1] >= step


@pytest.mark.gate
def test_the_time_limit_saves_and_requeues(checkout: Checkout):
    """USR2 comes before the limit; the requeued job goes on where it was.

    The limit is brought near when the run trains: a start takes its time on a busy machine.
    """
    words = tiny("limited", LONG, "launcher.tasks_per_node=per_node")
    job_id = checkout.submit("sphinx_1.slurm", words, "--time=20", "--signal=USR2@30", "--ntasks-per-node=2")
    step = checkout.wait_for_step("limited", 1)
    hours, minutes, seconds = map(int, checkout.cluster.job(job_id)["RunTime"].split(":"))
    limit = (3600 * hours + 60 * minutes + seconds + 50) // 60 + 1  # so 50 to 110 s are left
    checkout.cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={limit}")
    until(lambda: checkout.cluster.job(job_id)["Restarts"] == "1", "the requeue")
    run_dir = checkout.run_dir("limited")
    (saved,) = published(run_dir)[-1:]
    assert saved >= step
    assert read_json(run_dir / "stop.json")["signal"] == "SIGUSR2"
    assert "back into the queue: the time was up after" in checkout.said(job_id)
    assert checkout.wait_for_start("limited", 2) == saved + 1


@pytest.mark.parametrize("words", [[], ["--signal=KILL"]])
def test_a_cancelled_job_stays_cancelled(checkout: Checkout, words: list[str]):
    job_id = checkout.submit("sphinx_1.slurm", tiny("cancelled", LONG))
    step = checkout.wait_for_step("cancelled", 5)
    checkout.cluster.run("scancel", *words, job_id)
    checkout.cluster.wait(job_id, "CANCELLED")
    log = checkout.run_dir("cancelled") / "logs" / f"{job_id}.out"
    until(lambda: "the job ends" in log.read_text(), "the last words of the job")
    facts = checkout.cluster.job(job_id)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    (saved,) = published(checkout.run_dir("cancelled"))
    assert saved >= step, "a cancelled run is saved too, as far as KillWait allows"


def test_usr2_to_tasks_of_their_own_saves_and_requeues(checkout: Checkout):
    job_id = checkout.submit("sphinx_1.slurm", tiny("told", LONG), "--ntasks-per-node=2")
    step = checkout.wait_for_step("told", 5)
    checkout.cluster.run("scancel", "--signal=USR2", job_id)
    until(lambda: checkout.cluster.job(job_id)["Restarts"] == "1", "the requeue")
    assert published(checkout.run_dir("told"))[-1] >= step


@pytest.mark.gate
def test_ranks_that_are_killed_after_a_polite_end_come_back(checkout: Checkout):
    """The second start has moved away what the first said at its end, and leaves no word of its own."""
    job_id = checkout.submit("sphinx_1.slurm", tiny("killed", LONG, "checkpoint.dump.every=20"), "--ntasks-per-node=2")
    checkout.wait_for_step("killed", 5)
    checkout.cluster.run("scancel", "--signal=USR2", job_id)
    until(lambda: checkout.cluster.job(job_id)["Restarts"] == "1", "the requeue after a polite end")
    saved = checkout.wait_for_start("killed", 2) - 1
    send_signal(job_id, "KILL", RANKS_STEP, run=lambda words: checkout.cluster.run(*words))
    until(lambda: checkout.cluster.job(job_id)["Restarts"] == "2", "the requeue after the kill")
    assert checkout.wait_for_start("killed", 3) > saved
    assert "back into the queue: it failed with" in checkout.said(job_id)


def test_a_failure_without_progress_is_not_tried_for_ever(checkout: Checkout):
    """A module that dies on import ends the job after launcher.max_retries requeues, and says so."""
    words = tiny("broken", 10, "launcher.max_retries=1")
    (checkout.path / "apps/main/transformer.py").write_text("raise OSError('a disk went away')\n")
    job_id = checkout.submit("sphinx_1.slurm", words)
    facts = checkout.cluster.wait(job_id)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1")
    said = checkout.said(job_id)
    assert "it failed with exit code 1 without a step gained; retry 1 of 1" in said
    assert "2 attempts in a row gained no step" in said


HANGING = """
def _advance_and_hang(run, advance=Run.advance):
    import os, pathlib, time

    advance(run)
    second_start = pathlib.Path("out/stuck/incarnations/0000000002.json")
    if run.step == 30 and os.environ["SLURM_PROCID"] == "1" and not second_start.exists():
        time.sleep(10_000)


Run.advance = _advance_and_hang
"""


@pytest.mark.gate
def test_a_rank_that_hangs_is_found_dumped_and_requeued(checkout: Checkout, tmp_path: Path):
    """Rank 1 sleeps after step 30 of the first start; what was published before counts as progress."""
    build = checkout.path / "lingua/train/build.py"
    build.write_text(build.read_text() + HANGING)
    words = tiny("stuck", 40, "checkpoint.dump.every=20", "watchdog.min_s=10", "launcher.max_retries=0")
    job_id = checkout.submit("preemptible_4.slurm", words, "--ntasks-per-node=2")
    checkout.finish(job_id)
    run_dir = checkout.run_dir("stuck")
    assert checkout.cluster.job(job_id)["Restarts"] == "1"
    stop = read_json(run_dir / "logs" / "stop.0001.json")
    assert (stop["exit_code"], stop["kind"]) == (76, "hang")
    stacks = [(run_dir / "logs" / f"stacks_{rank}.0001.txt").read_text() for rank in (0, 1)]
    assert "in _advance_and_hang" in stacks[1]
    assert "in _advance_and_hang" not in stacks[0]
    assert "back into the queue: it failed with exit code 76 after 20 steps" in checkout.said(job_id)
    assert losses(run_dir).keys() == set(range(1, 41)), "steps 21 to 30 were trained twice, with equal losses"
    assert published(run_dir) == [20, 40]


def test_a_bad_node_is_named_and_avoided(checkout: Checkout):
    """The node check finds a node unfit: the job goes back into the queue and comes to another one."""
    bad = checkout.cluster.nodes[0]
    check = checkout.path / "lingua/selfcheck/node_check.py"
    check.write_text(
        check.read_text().replace("    checks: list", f"    if this_node_name(os.environ) == {bad!r}:\n        "
                                  "return ['device cuda:3: it is on fire']\n    checks: list")
    )  # fmt: skip
    words = tiny("picky", 3, "launcher.node_check=true", "launcher.max_retries=1")
    blocked = [checkout.cluster.sbatch("--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=sleep 1000",
                                       cwd=checkout.home) for node in checkout.cluster.nodes[1:]]  # fmt: skip
    job_id = checkout.submit("sphinx_1.slurm", words)
    until(lambda: checkout.cluster.job(job_id)["ExcNodeList"] == bad, f"a requeue without {bad}")
    assert f"{bad} is not fit to train: device cuda:3: it is on fire" in checkout.said(job_id)
    checkout.cluster.run("scancel", *blocked)
    checkout.finish(job_id)
    assert checkout.cluster.job(job_id)["NodeList"] != bad
    assert published(checkout.run_dir("picky")) == [3]


def test_a_second_job_for_the_same_run_leaves(checkout: Checkout):
    words = tiny("once", LONG)
    first = checkout.submit("sphinx_1.slurm", words)
    checkout.wait_for_step("once", 1)
    second = checkout.submit("sphinx_1.slurm", words)
    facts = checkout.cluster.wait(second)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert f"Slurm job {first}; stop that one first" in checkout.said(second)
    assert "another job trains in this run folder" in checkout.said(second)
    assert checkout.cluster.job(first)["JobState"] == "RUNNING"


def test_two_runs_on_a_node_share_neither_port_nor_gpu(checkout: Checkout):
    node = checkout.cluster.nodes[0]
    flags = [f"--nodelist={node}", "--ntasks-per-node=2"]
    jobs = [checkout.submit("sphinx_1.slurm", tiny(name, LONG), *flags) for name in ("left", "right")]
    for name in ("left", "right"):
        checkout.wait_for_step(name, 1)
    assert [checkout.cluster.job(job_id)["JobState"] for job_id in jobs] == ["RUNNING", "RUNNING"]
    env = [dict(line.split("=", 1) for line in (checkout.run_dir(name) / "env.txt").read_text().splitlines())
           for name in ("left", "right")]  # fmt: skip
    gpus = sorted(variables["CUDA_VISIBLE_DEVICES"] for variables in env)
    assert len(set(gpus)) == 2
    assert all(gpus)


def test_a_shell_in_a_big_allocation_trains_alone_and_is_never_requeued(checkout: Checkout, tmp_path: Path):
    command = [sys.executable, "-m", "apps.main.train", *undisturbed(tmp_path / "alone", 2)]
    done = subprocess.run(
        ["salloc", "--ntasks=4", "--quiet", *command],
        cwd=checkout.path, env=checkout.cluster.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert published(tmp_path / "alone") == [2]
    assert orjson.loads((tmp_path / "alone" / "stop.json").read_bytes())["reason"] == "finished"


@pytest.mark.parametrize("all_is_gone", [True, False], ids=["power", "slurmd"])
def test_a_lost_node_and_on_with_fewer(checkout: Checkout, all_is_gone: bool):
    """One of two nodes dies, or only its slurmd; Slurm requeues, the job is given one node, no row is lost or doubled.

    Where only the daemon died, the rank there lives on: it must end by itself.
    """
    cluster, lost = checkout.cluster, checkout.cluster.nodes[2]
    words = tiny("shrinking", LONG, "checkpoint.dump.every=20")
    job_id = checkout.submit("sphinx_1.slurm", words, f"--nodelist={cluster.nodes[0]},{lost}", "--nodes=2")
    run_dir = checkout.run_dir("shrinking")
    checkout.wait_for_step("shrinking", 25)
    assert " on 2 x CPU" in (run_dir / "train.log").read_text()
    cluster.kill_node(lost, all_is_gone=all_is_gone)
    try:
        cluster.wait(job_id, "PENDING")
        cluster.run("scontrol", "update", f"JobId={job_id}", "ReqNodeList=", "NumNodes=1-1", "NumTasks=1", "NumCPUs=4")
        first = checkout.wait_for_start("shrinking", 2)
        assert first > 20, "it begins where the newest checkpoint is"
        assert " on 1 x CPU" in (run_dir / "train.log").read_text()
        assert cluster.processes_of(lost) == [], "no rank of the first start is left"
        cluster.run("scancel", job_id)
        cluster.wait(job_id, "CANCELLED")
    finally:
        cluster.start_node(lost)
    audit = [sys.executable, "-m", "apps.cli.main", "data", "audit", str(run_dir)]
    done = subprocess.run(audit, cwd=checkout.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: cluster.idle_nodes() == 3, "three idle nodes")
