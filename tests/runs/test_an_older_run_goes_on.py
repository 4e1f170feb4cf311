"""Run folder, checkpoint and frozen job that lingua left behind in November 2026, before its modules moved."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer import losses, published, train

ROOT = Path(__file__).parents[2]
OLD_RUN = ROOT / "tests" / "fixtures" / "run_2026_11"
"""Killed after the checkpoint of step 3 of 6."""
UNDISTURBED = {
    1: 6.322847366333008,
    2: 6.325019836425781,
    3: 6.129157066345215,
    4: 6.045624732971191,
    5: 6.047235488891602,
    6: 5.899648189544678,
}
"""Losses of the same run without the kill, trained to its end by the code of that month."""


def test_the_run_goes_on_with_its_data_and_its_state(tmp_path: Path):
    run_dir = shutil.copytree(OLD_RUN, tmp_path / "run")
    result = train([str(run_dir / "config.yaml"), f"dump_dir={run_dir}"])
    assert result.exit_code == 0, result.output
    assert published(run_dir) == [3, 6]
    # Bitwise on the machine of that run; another processor rounds its products in another order.
    assert losses(run_dir) == pytest.approx(UNDISTURBED, rel=1e-5)


@pytest.mark.parametrize("code", ["lingua/job.py", "lingua/launch/job.py"], ids=["old code", "new code"])
def test_a_requeued_job_runs_the_code_that_it_froze(tmp_path: Path, code: str):
    run_dir = shutil.copytree(OLD_RUN, tmp_path / "run")
    module = run_dir / "code" / code
    module.parent.mkdir(parents=True)
    for package in {module.parent, run_dir / "code" / "lingua"}:
        (package / "__init__.py").touch()
    module.write_text("import sys; print('frozen', *sys.argv[1:])")
    job = run_dir / "jobs" / "4711.json"
    env = os.environ | {"BASE_DIR": str(tmp_path), "JOB_FILE": str(job), "PYTHON": sys.executable}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT / 'scripts' / 'job.sh'}"], env=env, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == (f"frozen hold {job}\n", 0), done.stderr
