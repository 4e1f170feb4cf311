"""A sweep without Slurm, from its command to its report: two points, of which one fails before it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tests.cli import Lingua
from tests.trainer import TINY, published


@pytest.fixture(name="lingua")
def _lingua(capsys: pytest.CaptureFixture[str]) -> Lingua:
    return Lingua(capsys, "sweep")


@pytest.mark.gate
@pytest.mark.soak
def test_two_points_side_by_side(lingua: Lingua, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = tmp_path / "it's; `exit` 100%"
    cheap = "deterministic=false"  # what that imports takes longer than this run
    words = [*TINY, cheap, "steps=4", f"dump_dir={json.dumps(str(folder))}", "optim.lr=1e-3,3e-4"]
    no_second = 'launcher.setup=["[[ $1 != 2 ]] || exit 3"]'
    command = [sys.executable, "-m", "apps.cli.main", "sweep", *words, no_second, "--local", "--at-once=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}  # inside an allocation too
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text() for path in (folder / "logs").iterdir())
    assert done.returncode == 1, done.stderr + logs
    assert "point 2 (lr=0.0003) runs; log: " in done.stdout
    assert "point 1 finished after" in done.stdout
    assert "point 2 ended with exit code 3 after" in done.stdout
    assert published(folder / "1") == [4]

    code, out, _ = lingua("status", folder, "--json")
    first, second = json.loads(out)["points"]
    assert (code, first["state"], first["step"], first["values"]) == (0, "finished", 4, {"optim.lr": 1e-3})
    assert (second["state"], second["step"], second["busy"]) == ("new", None, False)
    assert "best of those finished: point 1" in lingua("status", folder)[1]

    code, out, _ = lingua("rerun", folder, "--local", "--dry-run")
    assert (code, out) == (0, "point 2 (lr=0.0003): never ran\n")
    code, _, err = lingua("rerun", folder, "1", "--local")
    assert (code, err) == (1, "error: point 1 is finished, so it cannot be started again\n")

    code, out, _ = lingua("report", folder)
    assert code == 0
    assert out.splitlines()[-2:] == [str(folder / "report.html"), str(folder / "report.png")]
    assert "point 2 (lr=0.0003) never ran" in (folder / "report.html").read_text()

    monkeypatch.chdir(ROOT)
    code, _, err = lingua(*words)
    assert code == 2
    assert f"{folder} is a sweep already; `lingua sweep status" in err


def test_words_are_those_of_start_and_json_tells_the_plan(
    lingua: Lingua, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(ROOT)
    words = [*TINY, "steps=4", f"dump_dir={tmp_path / 'rates'}", "optim.lr=1e-3,3e-4", "--dry-run"]
    assert lingua(*words) == lingua("start", *words)
    code, out, _ = lingua("--json", *words)
    plan = json.loads(out)
    assert (code, plan["points"][1]["values"]) == (0, {"optim.lr": 3e-4})
    assert "#SBATCH --array=1-2\n" in plan["script"]
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_nothing_is_written(lingua: Lingua, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    code, _, err = lingua(*TINY, f"dump_dir={tmp_path / 'rates'}", "optim.lr=1e-3,3e-4")
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert "there is no sbatch on this machine; run this where Slurm is, or add --local" in err


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["status", "."], 2, "is not a sweep: it has no sweep.json"),
        (["report", "."], 2, "is not a sweep: it has no sweep.json"),
        (["rerun", "."], 2, "is not a sweep: it has no sweep.json"),
        (["rerun", ".", "--skip=tired"], 2, "--skip tired: unknown kind of failure; choose from config, "),
        (["apps/main/configs/debug.yaml"], 2, "nothing to sweep"),
        (["optim.lr=1,2"], 2, "no config is named"),
    ],
)
def test_mistakes_are_sentences(
    lingua: Lingua, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, sentence: str
):
    monkeypatch.chdir(ROOT)
    told = lingua(*words)
    assert (told[0], told[1]) == (code, "")
    assert sentence in told[2]
