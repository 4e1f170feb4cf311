"""A sweep from its words to its folder and its job; nothing is submitted, and no run is started."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import lingua.sweep.sweep
from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.config.yaml_layers import read_yaml
from lingua.files import RunError, read_json
from lingua.launch.job import read_job
from lingua.scheduler import array_of
from lingua.sweep.sweep import (
    Plan,
    Sweep,
    gpus_here,
    make_sweep,
    plan_sweep,
    read_sweep,
    run_points,
    submit_points,
)
from tests.trainer import TINY

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(folder: Path, *words: str, at_once: int | None = None) -> Plan:
    line = parse_command_line([*TINY, "steps=3", f"dump_dir={json.dumps(str(folder))}", *words])
    return plan_sweep(line, ROOT, at_once)


class Sbatch:
    """Takes the place of sbatch; remembers."""

    def __init__(self) -> None:
        self.words: list[list[str]] = []

    def __call__(self, words: Sequence[str], env: Mapping[str, str]) -> str:
        self.words.append(list(words))
        return f"{4710 + len(self.words)}\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["seed=1,2", "optim.lr=1e-3,3e-4", "model.seed=5", "data.seed=5"],
            r"^points 1 \(seed=1 lr=0.001\) and 3 \(seed=2 lr=0.001\) train the same thing: model.seed and data.seed",
        ),
        (["optim.lr=1e-3,0.0010"], "0.001 is given twice"),
        (
            ["data.lanes=null,64"],
            r"^points 1 .* and 2 \(lanes=64\) train the same thing: keep one",
        ),
    ],
)
def test_points_that_train_the_same_are_refused(hostile_dir: Path, words: list[str], problem: str):
    with pytest.raises(ConfigError, match=problem):
        plan(hostile_dir / "x", *words)


def test_a_sweep_over_seeds_trains_different_things(hostile_dir: Path):
    found = plan(hostile_dir / "x", "seed=1,2", "model.seed=null,5", "checkpoint.path=${dump_dir}/elsewhere")
    trees = [each.frozen for each in found.checked]
    assert [(t["model"]["seed"], t["data"]["seed"]) for t in trees] == [(1, 1), (5, 1), (2, 2), (5, 2)]


def test_a_sweep_is_frozen_and_submitted_once(hostile_dir: Path):
    folder, sbatch = hostile_dir / "rates", Sbatch()
    made = make_sweep(plan(folder, "optim.lr=1e-3,3e-4", "seed=1,2", at_once=2), ROOT)
    assert sorted(path.name for path in folder.iterdir()) == ["code", "run.sh", "sweep.json", "tasks"]
    assert "#SBATCH --array=1-4%2\n" in made.script.read_text()
    config = read_yaml(folder / "tasks" / "3.yaml").tree
    assert (config["optim"]["lr"], config["seed"], config["dump_dir"]) == (3e-4, 1, str(folder / "3"))
    assert config["name"] == "bytes lr=0.0003 seed=1"
    assert read_json(folder / "tasks" / "3.json")["origins"]["optim.lr"] == "command line"
    assert read_job(made.task_file(3), None).run_dir == made.run_dir(3)
    known = submit_points(made, list(made.numbers), env={}, run=sbatch)
    known = submit_points(known, [4, 2], env={}, run=sbatch)
    shared = ["sbatch", "--parsable", f"--chdir={folder / 'logs'}"]
    assert sbatch.words == [[*shared, f"--array={which}%2", str(folder / "run.sh")] for which in ("1-4", "2,4")]
    assert read_sweep(folder) == known
    assert [known.address(number) for number in known.numbers] == ["4711_1", "4712_2", "4711_3", "4712_4"]


def test_the_script_finds_the_job_file_of_its_point(hostile_dir: Path):
    made = make_sweep(plan(hostile_dir / "rates", "optim.lr=1e-3,3e-4"), ROOT)
    (made.folder / "code" / "scripts" / "job.sh").write_text('printf "%s" "$JOB_FILE"')
    for words, env in ((["2"], {}), ([], {"SLURM_ARRAY_TASK_ID": "2"})):
        done = subprocess.run(["bash", str(made.script), *words], env=env, capture_output=True, text=True, check=True)
        assert done.stdout == str(made.task_file(2))
    done = subprocess.run(["bash", str(made.script)], env={}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "say which point: bash run.sh 2" in done.stderr


def test_points_are_told_apart_where_they_are_tracked(tmp_path: Path):
    made = plan(tmp_path / "rates", "optim.lr=1,2", "logging.wandb={project: p, name: mine, id: abc}")
    for checked in made.checked:
        tracked = checked.args.logging.wandb
        assert (tracked.name, tracked.id, tracked.group, tracked.project) == (None, None, "bytes", "p")


def test_a_group_of_configs_is_swept_too(tmp_path: Path):
    words = ["apps/main/configs/debug.yaml", "model=llama_280M,llama_1B", f"dump_dir={tmp_path / 'sizes'}"]
    made = plan_sweep(parse_command_line(words), ROOT)
    assert [checked.args.model.dim for checked in made.checked] == [1024, 2048]


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        ([], ["nothing to sweep: name several values of a key"]),
        (["optim.lrr=1,2"], ["command line: unknown key optim.lrr; did you mean optim.lr?"]),
        (
            ["model.dim=32,33,wide"],
            [
                "model: dim 33 is not a multiple of n_heads 2",
                "point 3 (dim=wide): command line: model.dim is 'wide'",
            ],
        ),
        (["optim.lr=1,x", "seed=1,2"], ["point 3 (lr=x seed=1) and 1 more: command line: optim.lr is 'x'"]),
        (["optim.lr=1,2", "checkpoint.path=/c"], ["checkpoint.path is /c for several points, which would take each"]),
        (["distributed.dp_replicate=1,2"], ["points 1 and 2 ask for 1 and 2 GPUs per node"]),
    ],
)
def test_every_point_is_checked_before_anything_is_written(tmp_path: Path, words: list[str], problems: list[str]):
    with pytest.raises(ConfigError) as refused:
        plan(tmp_path / "rates", *words)
    assert len(refused.value.problems) == len(problems), refused.value.problems
    for said, expected in zip(refused.value.problems, problems, strict=True):
        assert expected in said
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_in_a_file_is_said_with_its_line(tmp_path: Path):
    config = tmp_path / "exp.yaml"
    config.write_text(f"base: [{ROOT / TINY[0]}]\ngrid:\n  optim.lrr: [1, 2]\ndump_dir: {tmp_path / 'new'}\n")
    with pytest.raises(ConfigError, match=rf"{config}:3: unknown key optim.lrr"):
        plan_sweep(parse_command_line([str(config)]), ROOT)


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        ("sweep.json", "is a sweep already; `lingua sweep status"),
        ("config.yaml", "is a run folder; give the sweep another name"),
        ("notes.txt", "exists and is not empty"),
    ],
)
def test_a_folder_that_is_taken(tmp_path: Path, there: str, sentence: str):
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates" / there).write_text("{}")
    with pytest.raises(ConfigError, match=sentence):
        plan(tmp_path / "rates", "optim.lr=1,2")


def test_a_sweep_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*words: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lingua.sweep.sweep, "write_job", fail)
    with pytest.raises(RunError, match="No space left on device"):
        make_sweep(plan(tmp_path / "rates", "optim.lr=1,2"), ROOT)
    assert list(tmp_path.iterdir()) == []


def test_no_sweep_no_answer(tmp_path: Path):
    with pytest.raises(RunError, match=r"is not a sweep: it has no sweep\.json"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("numbers", "at_once", "text"),
    [([1, 2, 3], None, "1-3"), ([3, 1, 2], 2, "1-3%2"), ([2], None, "2"), ([1, 2, 4, 6, 7], 1, "1-2,4,6-7%1")],
)
def test_arrays(numbers: list[int], at_once: int | None, text: str):
    assert array_of(numbers, at_once) == text


# -- without Slurm -------------------------------------------------------------------------------------------------


def here(folder: Path, body: str, n_points: int, at_once: int, n_ranks: int = 1) -> Sweep:
    """A sweep whose script does `body`; $1 is the point."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "run.sh").write_text(body)
    sweep = Sweep(folder, "here", [], ["x"], [{"x": i} for i in range(n_points)], at_once)
    for number in sweep.numbers:
        sweep.task_file(number).write_text(json.dumps({"n_ranks": n_ranks}))
        sweep.task_file(number).with_suffix(".yaml").write_text("device: auto\n")
    return sweep


@pytest.mark.parametrize(("at_once", "together"), [(1, "1"), (2, "2")])
def test_so_many_at_a_time(tmp_path: Path, at_once: int, together: str):
    """The first wait until as many run as may; each writes down how many do, and the first wait for each other."""
    body = f"""
        cd {tmp_path}; touch run.$1
        until [[ $1 -gt {at_once} || $(ls run.* | wc -l) -ge {at_once} ]]; do sleep 0.01; done
        ls run.* | wc -l > draft.$1; mv draft.$1 count.$1
        until [[ $1 -gt {at_once} || $(ls count.* | wc -l) -ge {at_once} ]]; do sleep 0.01; done
        rm run.$1; exit $(( $1 == 3 ? 7 : 0 ))
    """
    said: list[str] = []
    opened: set[Path] = set()

    def report(text: str) -> None:
        said.append(text)
        opened.update(path for n in Path("/proc/self/fd").iterdir() if (path := n.resolve()).suffix == ".out")

    sweep = here(tmp_path / "sweep", body, 4, at_once)
    assert run_points(sweep, [1, 2, 3, 4], report=report, sleep=lambda _: None) == 1
    assert not opened, "a thousand points must not take a thousand descriptors"
    assert (tmp_path / "count.1").read_text().strip() == together
    assert max(int((tmp_path / f"count.{i}").read_text()) for i in sweep.numbers) <= at_once
    assert [text.partition(" after ")[0] for text in said if "ended" in text] == ["point 3 ended with exit code 7"]
    assert len(said) == 8


def test_a_signal_reaches_the_points_and_no_other_begins(tmp_path: Path):
    body = f"trap 'touch {tmp_path}/heard.$1; exit 75' TERM; touch {tmp_path}/on.$1; while :; do sleep 0.01; done"
    sweep, sent = here(tmp_path / "sweep", body, 3, 2), []

    def send_once(_: float) -> None:
        if not sent and all((tmp_path / f"on.{i}").exists() for i in (1, 2)):
            sent.append(signal.raise_signal(signal.SIGTERM))

    said: list[str] = []
    assert run_points(sweep, [1, 2, 3], report=said.append, sleep=send_once) == 75
    assert sorted(text.partition(" after ")[0] for text in said[2:]) == [
        "point 1 saved, and can go on,",
        "point 2 saved, and can go on,",
    ]
    assert sorted(path.name for path in tmp_path.glob("heard.*")) == ["heard.1", "heard.2"]
    assert not (tmp_path / "on.3").exists()


def test_points_side_by_side_share_out_the_gpus(tmp_path: Path):
    body = f"echo $CUDA_VISIBLE_DEVICES $SLURM_JOB_ID > {tmp_path}/gpus.$1"
    sweep = here(tmp_path / "sweep", body, 2, 2, n_ranks=2)
    env = {"SLURM_JOB_ID": "7", "PATH": "/bin:/usr/bin"}
    assert run_points(sweep, [1, 2], env=env, gpus=["0", "1", "5", "6"], report=lambda _: None) == 0
    assert [(tmp_path / f"gpus.{i}").read_text() for i in (1, 2)] == ["0,1\n", "5,6\n"]
    with pytest.raises(ConfigError, match="2 ranks each need 4 GPUs, but 3 are here; use --at-once 1"):
        run_points(sweep, [1, 2], gpus=["0", "1", "2"])


def test_gpus_here(tmp_path: Path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus_here({}, tmp_path) == ["0", "1"]
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "3,GPU-8f"}, tmp_path) == ["3", "GPU-8f"]
    assert gpus_here({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
