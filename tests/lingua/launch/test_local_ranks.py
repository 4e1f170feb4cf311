"""Ranks below one process: real ones, each a few lines of Python."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lingua.launch.local_ranks import PATIENCE_S, exit_code_of, rank_env, run_ranks
from tests.slurm_cluster import until

ROOT = Path(__file__).parents[3]
SAVES = """
import os, signal, sys, time
from pathlib import Path
def save(number, frame):
    Path(sys.argv[1], f"saved{os.environ['RANK']}").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(getattr(signal, sys.argv[2]), save)
Path(sys.argv[1], f"ready{os.environ['RANK']}").touch()
while True:
    time.sleep(0.05)
"""


def spawn(n_ranks: int, folder: Path, name: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start ranks that end with 75 at this signal."""
    ranks = [sys.executable, "-c", SAVES, str(folder), name]
    command = [*before, sys.executable, "-m", "lingua.launch.local_ranks", str(n_ranks), *ranks]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT", "SIGHUP"])
def test_a_signal_reaches_every_rank_and_75_comes_back(tmp_path: Path, name: str):
    spawner = spawn(2, tmp_path, name)
    try:
        until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), "two ranks")
        spawner.send_signal(signal.Signals[name])
        assert spawner.wait(60) == 75
    finally:
        spawner.kill()
        spawner.wait()
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [name, name]


def test_ranks_die_with_a_spawner_that_is_killed(tmp_path: Path):
    spawner = spawn(1, tmp_path, "SIGUSR2")
    until((tmp_path / "ready0").exists, "a rank")
    (pid,) = Path(f"/proc/{spawner.pid}/task/{spawner.pid}/children").read_text().split()
    spawner.kill()
    spawner.wait()

    def gone() -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    until(gone, "the rank's end")


def test_ranks_save_when_their_spawner_is_killed(tmp_path: Path):
    spawner = spawn(2, tmp_path, "SIGTERM")
    until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), "two ranks")
    spawner.kill()
    spawner.wait()
    until(lambda: all((tmp_path / f"saved{rank}").exists() for rank in (0, 1)), "two saves")


def test_below_nohup_the_ranks_outlive_their_terminal(tmp_path: Path):
    spawner = spawn(1, tmp_path, "SIGTERM", before=["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"])
    try:
        until((tmp_path / "ready0").exists, "a rank")
        spawner.send_signal(signal.SIGHUP)
        spawner.send_signal(signal.SIGTERM)
        assert spawner.wait(60) == 75
    finally:
        spawner.kill()
        spawner.wait()


def test_the_others_are_ended_when_one_failed_and_patience_is_over():
    clock = iter([0.0, 1.0, PATIENCE_S + 1, PATIENCE_S + 2, PATIENCE_S + 3])
    fails, hangs = "import sys; sys.exit(3)", "import time; time.sleep(600)"
    envs = [{**os.environ, "WHAT": fails}, {**os.environ, "WHAT": hangs}]
    command = [sys.executable, "-c", "import os; exec(os.environ['WHAT'])"]
    code = run_ranks(command, envs, now=lambda: next(clock, 1e9), sleep=lambda seconds: None)
    assert code == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("codes", "expected"), [([0, 0], 0), ([75, 75], 75), ([0, 1], 1), ([75, -9], 137), ([2, 1], 2)]
)
def test_one_exit_code_for_all(codes: list[int], expected: int):
    assert exit_code_of(codes) == expected


def test_a_rank_knows_its_place():
    env = rank_env({"HOME": "/h"}, local_rank=1, n_local=4, node=2, n_nodes=3)
    assert env == {"HOME": "/h", "RANK": "9", "WORLD_SIZE": "12", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
