"""What a checkpoint holds, read without torch: the same as torch says, and nothing is executed."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from lingua.checkpoint import dcp, layout, metadata
from lingua.checkpoint.metadata import TensorFacts, read_scalars, read_tensors, scalar_differences, tensor_differences
from lingua.files import RunError
from tests.trainer import TINY, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by two ranks, each with half of every tensor."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    words = [*TINY, "steps=2", "checkpoint.dump.every=1", "checkpoint.dump.keep=0"]
    result = train([*words, "distributed.fsdp_type=full_shard", f"dump_dir={run_dir}"], n_ranks=2)
    assert result.exit_code == 0, result.output
    return run_dir


def folder(run: Path, step: int) -> Path:
    return layout.folder(run / layout.CHECKPOINTS, step)


@pytest.mark.ranks
def test_tensors_are_those_that_torch_reads(run: Path) -> None:
    mine, theirs = read_tensors(folder(run, 2)), dcp.tensor_properties(folder(run, 2))
    assert {name: (fact.shape, f"torch.{fact.dtype}") for name, fact in mine.items()} == {
        name: (shape, str(dtype)) for name, (shape, dtype) in theirs.items()
    }
    embedding = mine["model.tok_embeddings.weight"]
    assert embedding.files == ("model.00000.distcp", "model.00001.distcp")
    assert embedding.size_bytes == 258 * 32 * 4
    assert not any(fact.same_as for fact in mine.values())


@pytest.mark.ranks
def test_scalars(run: Path) -> None:
    scalars = read_scalars(folder(run, 2))
    assert scalars["ranks"] == 2
    assert scalars["shared"]["step"] == 2
    assert [group["weight_decay"] for group in scalars["param_groups"]] == [0.1, 0.0]
    assert scalars["data"]["rows"] == 2 * 2 * 2  # steps, ranks, rows of a rank
    assert scalars["data"]["lanes"] == 12
    (source,) = scalars["data"]["sources"].values()
    assert source["epochs_begun"] == 1


@pytest.mark.ranks
def test_two_steps_differ_in_what_a_step_changes(run: Path) -> None:
    a, b = (read_scalars(folder(run, step)) for step in (1, 2))
    assert {d.what for d in scalar_differences(a, b)} == {
        "shared.step",
        "shared.total_tokens",
        "param_groups.0.lr",
        "param_groups.1.lr",
        "data.rows",
        "data.lanes_hash",
    }
    assert tensor_differences(read_tensors(folder(run, 1)), read_tensors(folder(run, 2))) == []


# -- what must not be trusted --------------------------------------------------------------------------------------


def write(folder: Path, content: bytes) -> Path:
    (folder / layout.METADATA).write_bytes(content)
    return folder


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Hostile(), "posix.system"),
        ({"storage_data": Path}, "pathlib.Path"),
        (eval, "builtins.eval"),
    ],
)
def test_nothing_is_executed(tmp_path: Path, value: object, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=rf"is refused: it names {re.escape(named)}, which no checkpoint needs"):
        read_tensors(write(tmp_path, pickle.dumps(value)))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("value", [1, {}, {"state_dict_metadata": {}}, None, "text", [1, 2]])
def test_what_is_no_metadata_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(RunError, match="is refused"):
        read_tensors(write(tmp_path, pickle.dumps(value)))


@pytest.mark.ranks
def test_every_truncation_is_refused(run: Path, tmp_path: Path) -> None:
    whole = (folder(run, 2) / layout.METADATA).read_bytes()
    for n_bytes in range(0, len(whole), 101):
        with pytest.raises(RunError, match="is refused"):
            read_tensors(write(tmp_path, whole[:n_bytes]))


def test_no_checkpoint_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a checkpoint folder: it has no \.metadata"):
        read_tensors(tmp_path)
    assert read_scalars(tmp_path) == {}  # another program's folder has none


@pytest.mark.parametrize(
    "document", [[], {}, {"world_size": "x"}, {"world_size": 1, "shared": {}, "param_groups": [1]}]
)
def test_no_state_of_a_run(tmp_path: Path, document: object) -> None:
    (tmp_path / layout.train_state_file(0)).write_bytes(orjson.dumps(document))
    with pytest.raises(RunError, match=r"train_state\.00000\.json is not a training state"):
        read_scalars(tmp_path)


# -- differences ---------------------------------------------------------------------------------------------------


def test_tensor_differences() -> None:
    fact = TensorFacts((2, 3), "float32", ("f",))
    a = {"same": fact, "shape": fact, "type": fact, "gone": fact}
    b = {"same": TensorFacts((2, 3), "float32", ("elsewhere",)), "new": fact}
    b |= {"shape": TensorFacts((3, 2), "float32", ()), "type": TensorFacts((2, 3), "bfloat16", ())}
    assert [(d.what, d.a, d.b) for d in tensor_differences(a, b)] == [
        ("gone", "float32 [2, 3]", None),
        ("new", None, "float32 [2, 3]"),
        ("shape", "float32 [2, 3]", "float32 [3, 2]"),
        ("type", "float32 [2, 3]", "bfloat16 [2, 3]"),
    ]


def test_scalar_differences() -> None:
    a = {"ranks": 1, "groups": [{"lr": 1.0, "betas": [0.9, 0.95]}], "only": {"here": 1}}
    b = {"ranks": 1, "groups": [{"lr": 2.0, "betas": [0.9, 0.99]}, {"lr": 0.0}]}
    assert [(d.what, d.a, d.b) for d in scalar_differences(a, b)] == [
        ("groups.0.lr", 1.0, 2.0),
        ("groups.0.betas", [0.9, 0.95], [0.9, 0.99]),
        ("only.here", 1, None),
        ("groups.1.lr", None, 0.0),
    ]


def test_every_type_is_torchs_own() -> None:
    import torch

    for name, width in metadata.DTYPE_BYTES.items():
        assert getattr(torch, name).itemsize == width
