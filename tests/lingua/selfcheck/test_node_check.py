"""Which nodes are not fit: judged from ranks' answers, and by real ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lingua.distributed.place import RankInfo
from lingua.selfcheck.node_check import (
    NodeAnswer,
    NodeReport,
    check_device,
    check_folder,
    check_together,
    judge,
    local_problems,
    main,
    nodes_of_ranks,
)
from tests.ports import free_port

NODES = ["n1", "n1", "n2", "n2"]
FINE = {rank: NodeAnswer(node, []) for rank, node in enumerate(NODES)}


@pytest.mark.parametrize(
    ("answers", "network", "bad", "problems"),
    [
        (FINE, {}, [], {}),
        (FINE | {2: NodeAnswer("n2", ["device cuda:0: wrong"])}, {}, ["n2"], {"n2": ["device cuda:0: wrong"]}),
        ({0: FINE[0], 1: FINE[1], 3: FINE[3]}, {}, ["n2"], {"n2": ["rank 2 did not answer in time"]}),
        (FINE, {3: "nccl: x"}, ["n2"], {"n2": ["rank 3: nccl: x"]}),
        (FINE, dict.fromkeys(range(4), "x"), [], {"network": [f"rank {rank}: x" for rank in range(4)]}),
    ],
)
def test_who_is_to_blame(answers: Any, network: Any, bad: list[str], problems: Any):
    report = judge(answers, network, NODES, 1.0)
    assert (report.bad_nodes, report.problems, report.ok) == (bad, problems, not problems)


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


def together(present: list[int], n_ranks: int, within_s: float) -> dict[int, NodeReport | None]:
    """The reports of those ranks of a job that are there; one node each."""
    port, nodes, context = free_port(), [f"n{rank}" for rank in range(n_ranks)], multiprocessing.get_context("fork")
    reports: Any = context.Queue()

    def act(rank: int) -> None:
        place = RankInfo(rank, n_ranks, master=("127.0.0.1", port))
        answer = NodeAnswer(nodes[rank], [])
        reports.put((rank, check_together(place, answer, torch.device("cpu"), nodes, within_s)))

    processes = [context.Process(target=act, args=(rank,)) for rank in present]
    for process in processes:
        process.start()
    found = dict(reports.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    return found


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_ranks_that_are_all_there_sum_up():
    found = together([0, 1, 2], 3, within_s=60)
    assert found[0] is not None
    assert (found[0].ok, found[0].bad_nodes, found[0].n_ranks) == (True, [], 3)
    assert (found[1], found[2]) == (None, None)


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_rank_that_does_not_come_names_its_node():
    found = together([0, 1], 3, within_s=8)
    assert found[0] is not None
    assert (found[0].ok, found[0].bad_nodes) == (False, ["n2"])
    assert found[0].problems == {"n2": ["rank 2 did not answer in time"]}
