"""Comparing tensors, and one file of the weights: bitwise, a few tensors at a time, whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, save

from lingua.checkpoint import dcp
from lingua.checkpoint.load_weights import open_source
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.metadata import TensorFacts, read_tensors
from lingua.checkpoint.state import TrainState
from lingua.checkpoint.tools import diff
from lingua.checkpoint.tools.diff import CONSOLIDATED, batches, consolidate, largest_differences
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.files import RunError
from tests.trainer import TINY, train


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save(dict(tensors), storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [
        ([], []),
        ([1], [["0"]]),
        ([4, 4, 4], [["0", "1"], ["2"]]),
        ([99, 1, 1], [["0"], ["1", "2"]]),
        ([4, 99], [["0"], ["1"]]),
    ],
)
def test_batches(sizes: list[int], cut: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "BATCH_BYTES", 8)
    facts = {str(n): TensorFacts((size,), "uint8", ()) for n, size in enumerate(sizes)}
    assert list(batches(facts)) == cut


@pytest.mark.filterwarnings("ignore")
def test_largest_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "BATCH_BYTES", 50)
    nan = torch.tensor([1.0, float("nan")])
    a = {
        "equal": torch.arange(9.0), "float": torch.zeros(4), "half": torch.zeros(4, dtype=torch.bfloat16),
        "nan": nan, "count": torch.tensor(3), "was nan": nan, "sign": torch.tensor([0.0]), "empty": torch.zeros(0),
    }  # fmt: skip
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["float"][2] = -0.5
    b["half"][0] = 0.25
    b["count"] += 2
    b["was nan"] = torch.tensor([1.0, 1.0])
    b["sign"] = -b["sign"]
    folders = write(tmp_path / "a", a), write(tmp_path / "b", b)
    found = dict(largest_differences(*folders, read_tensors(folders[0])))
    assert str(found.pop("was nan")) == "nan"
    assert found == {"equal": 0, "float": 0.5, "half": 0.25, "nan": 0, "count": 2, "sign": 0, "empty": 0}


# -- one file of the weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, each with half of every tensor."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    result = train([*TINY, "steps=2", "distributed.fsdp_type=full_shard", f"dump_dir={run_dir}"], n_ranks=2)
    assert result.exit_code == 0, result.output
    return run_dir / "checkpoints" / "0000000002"


@pytest.mark.ranks
@pytest.mark.parametrize("mapped", [False, True])
def test_consolidated_weights_are_the_checkpoints(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    monkeypatch.setattr(diff, "BATCH_BYTES", 20_000)  # the embedding alone is larger
    file = tmp_path / CONSOLIDATED
    facts, read = read_tensors(step), []
    n_bytes = consolidate(step, facts, file, read.append)
    assert n_bytes == file.stat().st_size
    weights = torch.load(file, weights_only=True, mmap=mapped)["model"]
    source = open_source(step)
    assert weights.keys() == source.shapes.keys()
    assert not [name for name in weights if not torch.equal(weights[name], source.read(name))]
    assert sum(read) == sum(fact.size_bytes for name, fact in facts.items() if name.startswith("model."))
    assert list(tmp_path.iterdir()) == [file]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.tok_embeddings.weight


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    model = Tied()
    state = TrainState(model, torch.optim.AdamW(model.parameters()))
    folder = CheckpointManager(CheckpointArgs(), tmp_path / "run").save(1, state).path
    facts = read_tensors(folder)
    assert facts["model.output.weight"].same_as == "model.tok_embeddings.weight"
    assert [name for name, fact in facts.items() if fact.same_as] == ["model.output.weight"]
    consolidate(folder, facts, tmp_path / CONSOLIDATED)
    weights = torch.load(tmp_path / CONSOLIDATED, weights_only=True)["model"]
    assert torch.equal(weights["output.weight"], model.output.weight)
    assert weights["output.weight"].data_ptr() == weights["tok_embeddings.weight"].data_ptr()


@pytest.mark.ranks
def test_a_kill_leaves_no_file_and_the_next_call_makes_it(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, facts = tmp_path / CONSOLIDATED, read_tensors(step)

    def die(folder: Path, tensors: dict[str, Tensor]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dcp, "read_into", die)
        with pytest.raises(KeyboardInterrupt):
            consolidate(step, facts, file)
    assert not file.exists()
    consolidate(step, facts, file)
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_an_error_before_the_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied()
    folder = (
        CheckpointManager(CheckpointArgs(), tmp_path / "run")
        .save(1, TrainState(model, torch.optim.AdamW(model.parameters())))
        .path
    )
    allocated: list[tuple[int, int]] = []

    def refuse(descriptor: int, offset: int, n_bytes: int) -> None:
        allocated.append((offset, os.fstat(descriptor).st_size - n_bytes))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left") as caught:
        consolidate(folder, read_tensors(folder), tmp_path / CONSOLIDATED)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / f".{CONSOLIDATED}.tmp"))
    assert allocated == [(0, 0)]  # the whole file
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_nothing_to_consolidate(tmp_path: Path) -> None:
    facts = {"optim.state.x": TensorFacts((1,), "float32", ())}
    with pytest.raises(RunError, match="holds no weights"):
        consolidate(tmp_path, facts, tmp_path / CONSOLIDATED)
    assert list(tmp_path.iterdir()) == []
