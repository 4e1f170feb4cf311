"""A preemptible run with its evaluator on a real Slurm: every checkpoint judged, by jobs, as by hand afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.files import read_json
from tests.checkout import Checkout, tiny
from tests.evaluated import EVAL, by_hand, evaluations, make_data
from tests.runs.test_slurm_signals import preempt
from tests.slurm_cluster import until

pytestmark = pytest.mark.slurm

EVERY = 500


@pytest.mark.gate
def test_preempted_and_every_checkpoint_is_evaluated_by_a_job_of_its_own(checkout: Checkout, tmp_path: Path) -> None:
    """The run starts its evaluator, and so does its second start; a last job records what is left at the end."""
    words = tiny("judged", 2 * EVERY, "checkpoint.dump.every=100000", f"checkpoint.eval.every={EVERY}", *EVAL)
    words += [f"data.root_dir={make_data(tmp_path)}", "data.sources.mine=1.0", "logging.freq=10"]
    words += ["async_eval_gpus=1", "slurm.ncpu=1", "slurm.mem=100M", "slurm.time=20"]
    job_id = checkout.submit("preemptible_4.slurm", words, "--partition=low", "--ntasks-per-node=1")
    run_dir = checkout.run_dir("judged")
    checkout.wait_for_step("judged", 20)
    preempt(checkout, job_id, 1)
    checkout.finish(job_id)
    assert len(list((run_dir / "evals/incarnations").glob("*.json"))) >= 2, "each start has started one"
    steps = [EVERY, 2 * EVERY]
    last = until(lambda: sorted(run_dir.glob("logs/*.evaluator.out")), "the last job")[0]
    until(lambda: "ends: the run is finished" in last.read_text(), "the end of the last job", 300)
    found = evaluations(run_dir)
    assert found == by_hand(run_dir, steps)
    for step in steps:
        (job,) = run_dir.glob(f"evals/{step:010d}/start-*/run.sh")
        assert "#SBATCH --gpus-per-node=1\n" in job.read_text()
        assert read_json(job.parent / "results.json")["metrics"] == found[step]
    until(lambda: not checkout.cluster.run("squeue", "--noheader").strip(), "an empty queue")
