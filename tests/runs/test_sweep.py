"""A sweep without Slurm, from its command to its report: two points, of which one fails before it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps.cli.main import app
from lingua.config.command_line import run_main
from tests.checkout import ROOT
from tests.trainer import TINY, published


def lingua_sweep(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `lingua sweep ...`."""
    given = ["sweep", *map(str, words)]
    code = run_main(lambda typed: app(typed, prog_name="lingua", standalone_mode=False), given)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.gate
@pytest.mark.soak
def test_two_points_side_by_side(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
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

    code, out, _ = lingua_sweep(capsys, "status", folder, "--json")
    first, second = json.loads(out)["points"]
    assert (code, first["state"], first["step"], first["values"]) == (0, "finished", 4, {"optim.lr": 1e-3})
    assert (second["state"], second["step"], second["busy"]) == ("new", None, False)
    assert "best of those finished: point 1" in lingua_sweep(capsys, "status", folder)[1]

    code, out, _ = lingua_sweep(capsys, "rerun", folder, "--local", "--dry-run")
    assert (code, out) == (0, "point 2 (lr=0.0003): never ran\n")
    code, _, err = lingua_sweep(capsys, "rerun", folder, "1", "--local")
    assert (code, err) == (1, "error: point 1 is finished, so it is not started again\n")

    code, out, _ = lingua_sweep(capsys, "report", folder)
    assert code == 0
    assert out.splitlines()[-2:] == [str(folder / "report.html"), str(folder / "report.png")]
    assert "point 2 (lr=0.0003) never ran" in (folder / "report.html").read_text()

    monkeypatch.chdir(ROOT)
    code, _, err = lingua_sweep(capsys, *words)
    assert code == 2
    assert f"{folder} is a sweep already; `lingua sweep status" in err


def test_words_are_those_of_start_and_json_tells_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(ROOT)
    words = [*TINY, "steps=4", f"dump_dir={tmp_path / 'rates'}", "optim.lr=1e-3,3e-4", "--dry-run"]
    assert lingua_sweep(capsys, *words) == lingua_sweep(capsys, "start", *words)
    code, out, _ = lingua_sweep(capsys, "--json", *words)
    plan = json.loads(out)
    assert (code, plan["points"][1]["values"]) == (0, {"optim.lr": 3e-4})
    assert "#SBATCH --array=1-2\n" in plan["script"]
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_nothing_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    code, _, err = lingua_sweep(capsys, *TINY, f"dump_dir={tmp_path / 'rates'}", "optim.lr=1e-3,3e-4")
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert "there is no sbatch on this machine; run this where Slurm is, or add --local" in err


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["status", "."], 1, "is no sweep: it has no sweep.json"),
        (["report", "."], 1, "is no sweep: it has no sweep.json"),
        (["rerun", "."], 1, "is no sweep: it has no sweep.json"),
        (["rerun", ".", "--skip=tired"], 1, "--skip tired: no such kind of failure; they are config, "),
        (["apps/main/configs/debug.yaml"], 2, "nothing to sweep"),
        (["optim.lr=1,2"], 2, "no config is named"),
    ],
)
def test_mistakes_are_sentences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, sentence: str
):
    monkeypatch.chdir(ROOT)
    told = lingua_sweep(capsys, *words)
    assert (told[0], told[1]) == (code, "")
    assert sentence in told[2]
