"""Which nodes are not fit: judged from ranks' answers, and by real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lingua.node_check import Answer, check_device, check_folder, judge, local_problems, main, nodes_of_ranks
from tests.trainer import free_port

ROOT = Path(__file__).parents[2]
NODES = ["n1", "n1", "n2", "n2"]
FINE = {rank: Answer(node, []) for rank, node in enumerate(NODES)}


@pytest.mark.parametrize(
    ("answers", "network", "bad", "problems"),
    [
        (FINE, {}, [], {}),
        (FINE | {2: Answer("n2", ["device cuda:0: wrong"])}, {}, ["n2"], {"n2": ["device cuda:0: wrong"]}),
        ({0: FINE[0], 1: FINE[1], 3: FINE[3]}, {}, ["n2"], {"n2": ["rank 2 did not answer in time"]}),
        (FINE, {3: "nccl: x"}, ["n2"], {"n2": ["rank 3: nccl: x"]}),
        (FINE, dict.fromkeys(range(4), "x"), [], {"network": [f"rank {rank}: x" for rank in range(4)]}),
    ],
)
def test_who_is_to_blame(answers: Any, network: Any, bad: list[str], problems: Any):
    verdict = judge(answers, network, NODES, 1.0)
    assert (verdict.bad_nodes, verdict.problems, verdict.ok) == (bad, problems, not problems)


def test_the_node_of_each_rank():
    assert nodes_of_ranks(["n1", "n2"], 2) == ["n1", "n2"]
    assert nodes_of_ranks(["n1", "n2"], 4) == NODES  # one task per node, which starts its ranks
    assert (
        nodes_of_ranks([], 2) == nodes_of_ranks(["n1", "n2", "n3"], 2) == ["the node of rank 0", "the node of rank 1"]
    )


class Wrong(torch.Tensor):
    """A device that miscounts in one place."""

    def __matmul__(self, other: Any) -> torch.Tensor:
        product = torch.matmul(self.as_subclass(torch.Tensor), other)
        product[3, 4] += 1
        return product


def test_a_device_that_computes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch):
    assert check_device(torch.device("cpu")) is None
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, where: to(self, where).as_subclass(Wrong))
    assert "1 of 262144 numbers of a matrix product are wrong" in (check_device("cpu") or "")
    monkeypatch.undo()
    assert "device cuda:9" in (check_device("cuda:9") or "") or torch.cuda.device_count() > 9


def test_folders_are_written_to_and_read_back(tmp_path: Path):
    assert local_problems([torch.device("cpu")], tmp_path / "new" / "run", 0, shm=tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert "No such file" in (check_folder(tmp_path / "nothing") or "")
    (problem,) = local_problems([], None, 1 << 60, shm=tmp_path)
    assert "needed; see who left files there" in problem


def test_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--dir", str(tmp_path), "--device", "cpu", "--shm-gib", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["--device", "cpu", "--shm-gib", "1e9"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["bad_nodes"] == [os.environ.get("SLURMD_NODENAME") or os.uname().nodename]


def start(rank: int, n_ranks: int, port: int, node: str, *words: str) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": n_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    tasks = f"1(x{n_ranks})"
    step = {"SLURM_STEP_NODELIST": f"n[1-{n_ranks}]", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURMD_NODENAME": node}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in place.items()}, **step}
    command = [sys.executable, "-m", "lingua.node_check", "--device", "cpu", "--shm-gib", "0", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.ranks
def test_ranks_sum_up_and_name_the_node_that_does_not_come(tmp_path: Path):
    """At the same time: a pair that is fit, and three of whom the last never comes."""
    pair, three = free_port(), free_port()
    started = [start(rank, 2, pair, f"n{rank + 1}") for rank in range(2)]
    started += [start(rank, 3, three, f"n{rank + 1}", "--within", "20") for rank in range(2)]
    said = [process.communicate() for process in started]
    verdict = json.loads(said[0][0])
    assert (verdict["ok"], verdict["bad_nodes"], verdict["n_ranks"]) == (True, [], 2), said[0]
    assert said[1][0] == ""
    verdict = json.loads(said[2][0])
    assert (verdict["ok"], verdict["bad_nodes"]) == (False, ["n3"])
    assert verdict["problems"] == {"n3": ["rank 2 did not answer in time"]}
    assert [process.returncode for process in started] == [0, 0, 1, 0]
