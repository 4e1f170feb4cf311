"""run.sh as text (golden files), and what is done with it. Real submissions: tests/runs/test_slurm_launch.py."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.config.keys.launch import LaunchEnvArgs, LauncherArgs
from lingua.files import RunError
from lingua.launch.job import rank_variables, read_job
from lingua.launch.submit import launch, run_script
from lingua.scheduler import RefusedError
from tests.trainer import TINY

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parents[1] / "golden"
EVERYTHING = LauncherArgs(
    nodes=3, gpus=8, tasks_per_node="per_node", cpus_per_gpu=20, mem="2438G", time="2-00:00:00", partition="h200",
    account="lab", qos="high", constraint="[48G|80G]", exclude="gpu[003-007]", exclusive=True, comment="two words",
    signal_s=300, requeue=False, env=LaunchEnvArgs(set={"NCCL_DEBUG": "INFO"}),
    setup=["module load cuda/12.8", "ulimit -l unlimited"], directives=["--reservation=night", "--mail-type=END"],
)  # fmt: skip


def script(launcher: LauncherArgs, base: str = "/home/me/lingua", name: str = "llama", array: str = "") -> str:
    job_file = Path(base, "out/llama/jobs/launch-1.json")
    return run_script(name, launcher, Path(base), job_file, array, python="/opt/venv/bin/python")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("launch_plain.sh", script(LauncherArgs(gpus=1))),
        ("launch_cpu.sh", script(LauncherArgs(gpus=0, nodes=2, signal_s=0))),
        ("sweep.sh", script(LauncherArgs(nodes=2, gpus=8), "/home/it's me", array="1-12%4")),
        ("launch_everything.sh", script(EVERYTHING, "/home/my self/it's; echo $HOME\n&/lingua", "a run; rm -rf")),
    ],
)
def test_the_script_is_what_it_was(name: str, text: str):
    path = GOLDEN / name
    if not path.is_file():
        path.write_text(text)
        pytest.fail(f"{path} was not there and is written now; read it and commit it")
    assert text == path.read_text(), f"read the difference; if it is meant, rm {path} and run this again"
    subprocess.run(["bash", "-n", "-c", text], check=True)


@pytest.mark.parametrize(
    ("launcher", "sentence"),
    [
        (LauncherArgs(gpus=1, comment='say "hi"'), "launcher.comment: .* holds a quote"),
        (LauncherArgs(gpus=1, partition="a\nb"), "launcher.partition: .* newline"),
        (LauncherArgs(gpus=1, directives=["reservation=x"]), "launcher.directives: 'reservation=x' is not an option"),
        (LauncherArgs(gpus=1, directives=["--x=1\nrm"]), "launcher.directives"),
    ],
)
def test_what_an_sbatch_line_cannot_hold_is_refused(launcher: LauncherArgs, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        script(launcher)


class Sbatch:
    """Takes the place of sbatch; remembers."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.env: dict[str, str] = {}

    def __call__(self, words: Sequence[str], env: Mapping[str, str]) -> str:
        self.words, self.env = list(words), dict(env)
        return "4711;cluster\n"


def test_a_launch_freezes_and_submits(
    hostile_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    run_dir, sbatch = hostile_dir / "run", Sbatch()
    line = parse_command_line([*TINY, "steps=2", "launcher.gpus=2", "launcher.partition=mine"])
    line.overrides.append(f"dump_dir={json.dumps(str(run_dir))}")
    env = {"SBATCH_PARTITION": "site", "SBATCH_ACCOUNT": "lab", "HOME": "/h"}
    assert launch(line, base_dir=ROOT, env=env, run=sbatch) == 0
    assert sbatch.words == ["sbatch", "--parsable", f"--chdir={run_dir / 'logs'}", str(run_dir / "run.sh")]
    assert sbatch.env == {"SBATCH_ACCOUNT": "lab", "HOME": "/h"}, "what the config says is not overruled by the site"
    assert capsys.readouterr().out == f"job 4711: {run_dir / 'run.sh'}\n"
    assert (run_dir / "code" / "lingua" / "launch" / "job.py").is_file()
    (config,) = (run_dir / "jobs").glob("launch-*.yaml")
    assert "global_batch_size: 4" in config.read_text(), "two ranks of batch_size 2"
    assert (run_dir / "run.sh").stat().st_mode & 0o111


@pytest.mark.parametrize("error", [RefusedError("sbatch was refused: no partition"), RunError("sbatch gave no answer")])
def test_a_launch_that_slurm_refuses_leaves_no_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RunError
):
    def refuse(words: Sequence[str], env: Mapping[str, str]) -> str:
        raise error

    monkeypatch.chdir(ROOT)
    line = parse_command_line([*TINY, f"dump_dir={tmp_path / 'run'}"])
    with pytest.raises(RunError, match="sbatch"):
        launch(line, base_dir=ROOT, run=refuse)
    is_certain = isinstance(error, RefusedError)  # without an answer the job may wait in the queue
    assert (tmp_path / "run").exists() != is_certain
    (tmp_path / "run").mkdir(exist_ok=True)
    with pytest.raises(RunError, match="sbatch"):
        launch(line, base_dir=ROOT, run=refuse)
    assert (tmp_path / "run" / "run.sh").is_file(), "the folder was there"


def test_only_their_owner_may_read_the_files_of_a_job_that_hold_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    words = [*TINY, f"dump_dir={tmp_path / 'run'}", "steps=2", "launcher.setup=['export HF_TOKEN=s3cr3t']"]
    assert launch(parse_command_line([*words, "launcher.env.set.HF_PAT=s3cr3t"]), base_dir=ROOT, run=Sbatch()) == 0
    holding = {file for file in tmp_path.rglob("*") if file.is_file() and b"s3cr3t" in file.read_bytes()}
    assert {file.suffix for file in holding} == {".yaml", ".sh"}
    assert [oct(file.stat().st_mode & 0o077) for file in holding] == ["0o0"] * 2
    (job_file,) = (tmp_path / "run" / "jobs").glob("launch-*.json")
    assert rank_variables(read_job(job_file, None), {})["HF_PAT"] == "s3cr3t"


def test_a_config_whose_secrets_were_masked_is_not_launched_with_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    words = [*TINY, f"dump_dir={tmp_path / 'run'}", "launcher.env.set.HF_PAT='***'"]
    with pytest.raises(ConfigError, match=r"launcher\.env\.set\.HF_PAT holds \*\*\* in place of a secret"):
        launch(parse_command_line(words), base_dir=ROOT, run=Sbatch())


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    line = parse_command_line(
        [*TINY, f"dump_dir={tmp_path / 'run'}", "launcher.nodes=2", "launcher.gpus=4", "data.lanes=16"]
    )
    assert launch(line, base_dir=ROOT, dry_run=True, run=Sbatch()) == 0
    assert "#SBATCH --ntasks-per-node=4" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "base_dir", "sentence"),
    [
        (
            ["launcher.nodes=2", "distributed.dp_replicate=3", "data.lanes=12"], ROOT,
            "launcher.nodes is 2, but the config has 3 ranks; set launcher.gpus",
        ),
        ([], GOLDEN, r"is not a checkout of lingua: it has no scripts/job\.sh; launch from yours"),
        (["optim.lrr=1"], ROOT, r"unknown key optim\.lrr"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_writes_and_submits_nothing(
    words: list[str], base_dir: Path, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    sbatch = Sbatch()
    with pytest.raises(ConfigError, match=sentence):
        launch(parse_command_line([*TINY, f"dump_dir={tmp_path / 'x'}", *words]), base_dir=base_dir, run=sbatch)
    assert (sbatch.words, list(tmp_path.iterdir())) == ([], [])
