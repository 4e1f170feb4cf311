"""`lingua drill`: the product proves itself, on a real Slurm and without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.checkout import ROOT, Checkout
from tests.slurm_cluster import until


def drill(cwd: Path, env: dict[str, str], *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "apps.cli.main", "drill", "--json", "--patience=3", *words, "device=cpu"]
    done = subprocess.run(command, cwd=cwd, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    said = done.stderr.decode()
    assert done.stdout, said
    told = orjson.loads(done.stdout)
    assert (done.returncode, told["kept"], told["broken"]) == (0, True, []), f"{told}\n{said}"
    assert told["checkpoints_lost"] == 0
    assert told["checkpoints_published"] > 1
    assert told["bitwise_equal"] is True
    return told


@pytest.mark.slurm
def test_one_minute_on_slurm(checkout: Checkout):
    env = checkout.cluster.env | {"PYTHONPATH": str(checkout.path)}
    cpu = ["launcher.partition=low", "launcher.mem=400M"]
    told = drill(checkout.path, env, "--minutes=1", "--seed=6", *cpu)
    assert sum(told["blows"].values()) >= 2
    assert {"service", "TERM"} <= set(told["blows"])
    assert 0 < told["signal_to_safe_max_s"] < 30, "less than the grace of this partition"
    until(lambda: not checkout.cluster.run("squeue", "--noheader"), "nothing is left in the queue")


@pytest.mark.gate
@pytest.mark.soak
def test_some_seconds_without_slurm(tmp_path: Path):
    figure = tmp_path / "figure.svg"
    options = "--minutes=0.4", "--local", f"--folder={tmp_path / 'drill'}", f"--figure={figure}"
    told = drill(ROOT, dict(os.environ), *options)
    steps = told["steps"]
    assert f"equal bit for bit at {steps} of {steps} steps" in figure.read_text()
    assert told["blows"]
    assert told["not_granted_here"] == []
