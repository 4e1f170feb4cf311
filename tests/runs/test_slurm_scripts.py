"""The Slurm scripts, as they are, on a real Slurm: they run from any folder, and what is wrong is said."""

from pathlib import Path

import pytest

from tests.checkout import Checkout, tiny
from tests.slurm_cluster import until
from tests.trainer import published

pytestmark = pytest.mark.slurm

# Script and the flags that spare two cores.
SCRIPTS = {
    "miso_8": ["--ntasks-per-node=2"],
    "miso_8_silent": ["--ntasks-per-node=1"],
    "miso_16": ["--ntasks-per-node=1"],
    "miso_24": ["--ntasks-per-node=1"],
    "preemptible_1": ["--partition=low"],
    "preemptible_4": ["--partition=low", "--ntasks-per-node=2"],
    "sphinx_1": [],
}
RANKS = {
    "miso_8": 2,
    "miso_8_silent": 1,
    "miso_16": 2,
    "miso_24": 3,
    "preemptible_1": 1,
    "preemptible_4": 2,
    "sphinx_1": 1,
}


@pytest.mark.gate
def test_every_script_trains_to_the_end(checkout: Checkout):
    jobs = {script: checkout.submit(f"{script}.slurm", tiny(script, 4), *flags) for script, flags in SCRIPTS.items()}
    for script, job_id in jobs.items():
        checkout.finish(job_id)
        run_dir = checkout.run_dir(script)
        assert published(run_dir)[-1] == 4  # a job of the low partition may be preempted, and saves then
        assert f" on {RANKS[script]} x CPU" in (run_dir / "train.log").read_text()
        assert len(list((run_dir / "logs").glob(f"{job_id}.[0-9].out"))) == RANKS[script]
        assert f"log: {run_dir}/logs/{job_id}.out" in (checkout.home / f"slurm-{job_id}.out").read_text()
    assert sorted(path.stem for path in (checkout.path / "apps/main/configs").glob("*.slurm")) == sorted(SCRIPTS)


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"BASE_DIR": ""}, "BASE_DIR: is not set; export it (the folder of your checkout)"),
        ({"BASE_DIR": "/nowhere"}, "error: BASE_DIR is /nowhere, but there is no /nowhere/scripts/job.sh; name"),
        ({"CONFIG_FILE": ""}, "error: CONFIG_FILE is not set; export it"),
        ({"CONFIG_FILE": "my.yaml"}, "error: CONFIG_FILE is my.yaml, which does not exist in "),
        ({"PYTHON": "/nowhere/python"}, "error: PYTHON is /nowhere/python, which is not a program here"),
        ({"EXTRA_ARGS": "optim.lrr=1"}, "error: command line: unknown key optim.lrr; did you mean optim.lr?"),
    ],
)
def test_what_is_wrong_ends_the_job_with_one_sentence(checkout: Checkout, env: dict[str, str], sentence: str):
    job_id = checkout.submit("miso_8.slurm", [], **env)
    facts = checkout.cluster.wait(job_id)
    assert facts["JobState"] == "FAILED"
    assert facts["Restarts"] == "0"
    (line,) = (checkout.home / f"slurm-{job_id}.out").read_text().splitlines()
    assert sentence in line


def test_out_and_data_may_be_links(checkout: Checkout, tmp_path: Path):
    (checkout.path / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    checkout.finish(checkout.submit("sphinx_1.slurm", tiny("linked", 2)))
    assert published(tmp_path / "elsewhere" / "linked") == [2]


def test_what_runs_is_what_was_frozen(checkout: Checkout):
    """The first start freezes code and config; a tree that is broken later breaks no requeue."""
    words = tiny("frozen", 100_000, "checkpoint.dump.every=100000")
    job_id = checkout.submit("sphinx_1.slurm", words)
    checkout.wait_for_step("frozen", 1)
    for path in ("apps/main/train.py", "apps/main/loop.py", "lingua/launch/job.py", "lingua/schema.py"):
        (checkout.path / path).write_text("raise SystemExit('edited')\n")
    (checkout.path / "apps/main/configs/bytes.yaml").write_text("steps: many\n")
    checkout.cluster.run("scontrol", "requeue", job_id)
    checkout.cluster.wait(job_id, "PENDING", "RUNNING")

    def restarted() -> bool:
        return "attempt 2 in" in (checkout.run_dir("frozen") / "train.log").read_text()

    until(restarted, "a second start")
    checkout.wait_for_step("frozen", 1)
