"""A checkout of this repository in a folder of its own, from which jobs are submitted as a user submits them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson

from lingua.run.metrics import read_metrics
from tests.slurm_cluster import Cluster, until
from tests.trainer import TINY

ROOT = Path(__file__).parents[1]
CONFIG = "apps/main/configs/bytes.yaml"
PARTS = ("lingua", "apps", "scripts", "setup", "pyproject.toml")


class Checkout:
    """`path` is the checkout, `submit` a user's sbatch from a folder that is not the checkout."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.cluster = cluster
        self.path = folder / "my checkout"
        self.home = folder / "home"
        self.home.mkdir()
        for part in PARTS:
            if (ROOT / part).is_dir():  # without compiled code, which others may be writing at this moment
                shutil.copytree(ROOT / part, self.path / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / part, self.path / part)

    def submit(self, script: str, words: Sequence[str], *flags: str, **env: str) -> str:
        """`sbatch FLAGS apps/main/configs/SCRIPT` with EXTRA_ARGS; returns the job id."""
        variables = {
            "BASE_DIR": str(self.path),
            "CONFIG_FILE": CONFIG,
            "EXTRA_ARGS": " ".join(words),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
            **env,
        }
        passed = "--export=ALL,BASE_DIR,CONFIG_FILE"
        path = self.path / "apps/main/configs" / script
        return self.cluster.sbatch(passed, *flags, str(path), cwd=self.home, **variables)

    def run_dir(self, name: str) -> Path:
        return self.path / "out" / name

    def said(self, job_id: str) -> str:
        """All that a job has said, wherever."""
        logs = sorted(self.path.glob(f"out/*/logs/{job_id}.*"))
        files = [self.home / f"slurm-{job_id}.out", *logs]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in files if path.exists())

    def wait_for_step(self, name: str, step: int, timeout_s: float = 240.0) -> int:
        """Until the run has trained so far; returns the newest step."""
        metrics = self.run_dir(name) / "metrics.jsonl"

        def reached() -> int | None:
            newest = newest_step(metrics)
            return newest if newest is not None and newest >= step else None

        return until(reached, f"step {step} of {name}", timeout_s)

    def wait_for_start(self, name: str, number: int, timeout_s: float = 240.0) -> int:
        """Until start `number` of the run has trained a step; returns its first one."""
        metrics = self.run_dir(name) / "metrics.jsonl"

        def trained() -> int | None:
            records = read_metrics(metrics) if metrics.is_file() else []
            return min((r["global_step"] for r in records if r["incarnation"] >= number), default=None)

        return until(trained, f"a step of start {number} of {name}", timeout_s)

    def finish(self, job_id: str, timeout_s: float = 300.0) -> None:
        """Wait until the job is over, and all right."""
        facts = self.cluster.wait(job_id, timeout_s=timeout_s)
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), f"{facts}\n{self.said(job_id)}"


def newest_step(metrics: Path) -> int | None:
    if not metrics.is_file():
        return None
    return max((record["global_step"] for record in read_metrics(metrics)), default=None)


def stop_of(run_dir: Path) -> dict[str, object]:
    return orjson.loads((run_dir / "stop.json").read_bytes())


def tiny(name: str, steps: int, *more: str) -> list[str]:
    """Words of a tiny run under `out/`. Its ranks may be long in coming: several tests share a few cores."""
    return [*TINY[1:], "distributed.timeout_s=120", f"name={name}", f"steps={steps}", *more]


def undisturbed(folder: Path, steps: int, *more: str) -> list[str]:
    """Words of the same run in another folder, without Slurm."""
    return [*TINY, f"dump_dir={folder}", f"steps={steps}", *more]
