"""A sweep on a real Slurm: an array job of which a point fails and another is requeued; status, rerun, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import Checkout
from tests.slurm_cluster import until
from tests.trainer import TINY, published

pytestmark = pytest.mark.slurm

GRID = """\
base: [{config}]
name: rates
launcher: {{gpus: 1, cpus_per_gpu: 1, mem: 100M, partition: low}}
grid:
  paired:
    optim.lr: [1e-3, 1e9, 2e-3]
    steps: [3, 3, 100000]
"""


def sweep(checkout: Checkout, *words: object) -> str:
    """Output of `lingua sweep ...`, typed in the checkout."""
    command = [sys.executable, "-m", "apps.cli.main", "sweep", *map(str, words)]
    return checkout.cluster.run(*command, cwd=checkout.path, PYTHONPATH=str(checkout.path), OMP_NUM_THREADS="1")


def points(checkout: Checkout, folder: Path) -> list[dict[str, Any]]:
    return json.loads(sweep(checkout, "status", folder, "--json"))["points"]


@pytest.mark.gate
def test_an_array_with_a_failing_point(checkout: Checkout, tmp_path: Path):
    cluster, folder, config = checkout.cluster, tmp_path / "it's; 100%j", tmp_path / "rates.yaml"
    config.write_text(GRID.format(config=checkout.path / TINY[0]))
    where = f"dump_dir={json.dumps(str(folder))}"
    said = sweep(checkout, config, *TINY[1:], where, "checkpoint.dump.every=0")
    array = said.splitlines()[-1].removeprefix("job ").partition(":")[0]
    tasks = [f"{array}_{i}" for i in (1, 2, 3)]

    # The last task of an array has the array's own job id. Stopped by a signal, it goes back into the queue alone.
    until(lambda: points(checkout, folder)[2]["step"], "a step of point 3")
    assert cluster.job(tasks[2])["JobId"] == array
    assert cluster.wait(tasks[0])["JobState"] == "COMPLETED"
    assert cluster.wait(tasks[1])["JobState"] == "FAILED"
    cluster.run("scancel", "--signal=USR2", tasks[2])
    until(lambda: cluster.job(tasks[2])["Restarts"] == "1", "point 3 is requeued")
    assert [cluster.job(task)["Restarts"] for task in tasks[:2]] == ["0", "0"]
    assert len(published(folder / "3")) == 1

    first, second, third = points(checkout, folder)
    assert (first["state"], first["step"], first["values"]["optim.lr"]) == ("finished", 3, 1e-3)
    assert (second["state"], second["kind"], second["busy"]) == ("failed", "nan", False)
    assert (third["busy"], third["job"]) == (True, tasks[2])
    assert third["state"] in ("saved", "queued", "starting", "running")  # it has just been put back

    # Only what failed starts again; what waits or runs is left alone.
    said = sweep(checkout, "rerun", folder)
    again = said.splitlines()[-1].removeprefix("job ").partition(":")[0]
    assert "point 2 (lr=1e+09 steps=3): failed (nan" in said
    assert said.splitlines()[-1].endswith(f"1 points of {folder}")
    assert cluster.wait(f"{again}_2")["JobState"] == "FAILED"
    assert cluster.job(tasks[2])["JobState"] in ("PENDING", "RUNNING", "CONFIGURING")

    # What a person cancels stays away until a person wants it.
    step = published(folder / "3")[-1]
    until(lambda: (points(checkout, folder)[2]["step"] or 0) > step, "point 3 goes on")
    cluster.run("scancel", tasks[2])
    cluster.wait(tasks[2], "CANCELLED")
    assert json.loads(sweep(checkout, "rerun", folder, "--dry-run", "--json"))["points"] == [2, 3]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        sweep(checkout, "rerun", folder, "1")
    assert "point 1 is finished, so it cannot be started again" in refused.value.stderr

    told = json.loads(sweep(checkout, "report", folder, "--json"))
    assert (told["best"], told["ranked_by"]) == (1, "loss")
    page = (folder / "report.html").read_text()
    assert "point 2 (lr=1e+09 steps=3) failed at step" in page
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sum(1 for _ in folder.glob("*/code")) == 0, "the code is frozen once, for all points"
