"""`lingua launch` and `python -m lingua.stool`: the same script under Slurm and without it, whatever the path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from tests.checkout import ROOT, Checkout, newest_step
from tests.slurm_cluster import until
from tests.trainer import TINY, published


@pytest.mark.gate
@pytest.mark.ranks
@pytest.mark.soak
def test_the_same_script_runs_without_slurm_and_goes_on(tmp_path: Path):
    run_dir = tmp_path / "it's; `exit`\n100%"
    words = [*TINY, "steps=100000", f"dump_dir={json.dumps(str(run_dir))}", "launcher.gpus=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = subprocess.Popen([sys.executable, "-m", "apps.cli.main", "launch", "--local", *words], cwd=ROOT, env=env)
    try:
        step = until(lambda: newest_step(run_dir / "metrics.jsonl"), "a step")
        launch.send_signal(signal.SIGTERM)
        assert launch.wait(60) == 75
    finally:
        launch.kill()
        launch.wait()
    assert published(run_dir)[-1] >= step
    again = [sys.executable, "-m", "apps.cli.main", "launch", "--local", *words, f"steps={published(run_dir)[-1] + 2}"]
    assert subprocess.run(again, cwd=ROOT, env=env, check=False).returncode == 0
    assert orjson.loads((run_dir / "stop.json").read_bytes())["reason"] == "finished"


@pytest.mark.gate
@pytest.mark.slurm
def test_launched_and_submitted_by_stool(checkout: Checkout, tmp_path: Path):
    run_dir = tmp_path / "it's; `exit`\n%j"
    cpu = ["steps=3", "launcher.cpus_per_gpu=1", "launcher.mem=100M", "launcher.partition=low"]
    launched = checkout.cluster.run(
        sys.executable, "-m", "apps.cli.main", "launch", *TINY, *cpu, f"dump_dir={json.dumps(str(run_dir))}",
        "launcher.nodes=2", "launcher.gpus=1", cwd=checkout.path, PYTHONPATH=str(checkout.path),
        SBATCH_PARTITION="high",
    )  # fmt: skip
    job_id = launched.removeprefix("job ").partition(":")[0]
    facts = checkout.cluster.wait(job_id)
    said = "\n".join(path.read_text() for path in (run_dir / "logs").iterdir())
    assert (facts["JobState"], facts["Partition"], facts["NumNodes"]) == ("COMPLETED", "low", "2"), said
    assert published(run_dir) == [3]
    assert "--signal=USR2@120" in (run_dir / "run.sh").read_text(), "the trainer leaves the script alone"

    stool = checkout.cluster.run(
        sys.executable, "-m", "lingua.stool", "script=apps.main.train", f"config={TINY[0]}", *TINY[1:], "steps=3",
        "name=pool", "nodes=1", "ngpu=1", "ncpu=1", "mem=100M", "partition=main",
        cwd=checkout.path, PYTHONPATH=str(checkout.path),
    )  # fmt: skip
    checkout.finish(stool.removeprefix("job ").partition(":")[0])
    assert published(checkout.run_dir("pool")) == [3]
