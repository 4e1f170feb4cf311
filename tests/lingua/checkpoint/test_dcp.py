"""DCP's files: bytes known ahead, and reading that executes nothing."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from lingua.checkpoint import dcp, layout
from lingua.files import RunError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7), (2, 3, 4)])
def test_a_blob_is_what_torch_loads(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    head, size_bytes, tail = dcp.blob(dtype, shape)
    content = dcp.host_bytes(tensor)
    assert len(content) == size_bytes
    assert len(head) % dcp.ALIGNMENT_BYTES == 0 or size_bytes == 0  # the tensor lies aligned in a slot
    loaded = torch.load(io.BytesIO(head + bytes(content) + tail), weights_only=True)
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    assert dcp.host_bytes(loaded) == content


def test_host_bytes_of_a_view() -> None:
    whole = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert bytes(dcp.host_bytes(whole.t()[1])) == whole[:, 1].contiguous().numpy().tobytes()


def write(folder: Path, tensors: dict[str, Tensor]) -> dcp.WritePlan:
    plans, metadata = dcp.global_plan([dcp.local_plan(tensors, True)], {name: (name,) for name in tensors}, {})
    plan = dcp.write_plan(tensors, plans[0], 0, metadata)
    folder.mkdir(exist_ok=True)
    for file in plan.files:
        (folder / file.name).write_bytes(b"".join(bytes(part) for part in dcp.file_content(file, tensors)))
    (folder / layout.METADATA).write_bytes(metadata)
    return plan


def test_offsets_are_known_before_the_values(tmp_path: Path) -> None:
    tensors = {
        "model.a": torch.rand(3, 5),
        "model.b": torch.rand(7).bfloat16(),
        "optim.state.a.step": torch.tensor(3.0),
    }
    plan = write(tmp_path, tensors)
    assert [file.name for file in plan.files] == ["model.00000.distcp", "optim.00000.distcp"]
    for file in plan.files:
        content = (tmp_path / file.name).read_bytes()
        assert len(content) == file.size_bytes
        for part in file.parts:
            found = content[part.offset : part.offset + part.size_bytes]
            if part.constant is not None:
                assert found == part.constant
            else:
                assert part.index is not None
                assert part.offset % dcp.ALIGNMENT_BYTES == 0
                assert found == bytes(dcp.host_bytes(tensors[part.index.fqn]))
    tensors["model.a"] = torch.rand(3, 6)
    assert not plan.fits(tensors)


@pytest.mark.filterwarnings("ignore")
def test_what_stock_torch_wrote_is_read(tmp_path: Path) -> None:
    """lingua's folders: written by dcp.save, with pickled values among the tensors."""
    weight = torch.rand(3, 5)
    state = {
        "model": {"w": weight},
        "optim": {"state": {"w": {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    assert dcp.tensor_properties(tmp_path) == {
        "model.w": ((3, 5), torch.float32),
        "optim.state.w.step": ((), torch.float32),
    }
    target = torch.zeros(3, 5)
    dcp.read_into(tmp_path, {"model.w": target})
    assert torch.equal(target, weight)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"model.a": torch.rand(3, 5)})
    with pytest.raises(RunError, match=r"model\.a is \(3, 5\) there, \(3, 6\) here, model\.b is missing"):
        dcp.read_into(tmp_path, {"model.a": torch.zeros(3, 6), "model.b": torch.zeros(1)})
    with pytest.raises(RunError, match=r"not a checkpoint folder: it has no \.metadata"):
        dcp.read_into(tmp_path / "absent", {})


# -- hostile files -------------------------------------------------------------------------------------------------


def hostile_metadata(witness: Path) -> dict[str, bytes]:
    """What a stranger's `.metadata` may try, by name."""
    inside = Metadata({}, storage_data={MetadataIndex("a"): Touch(witness)})
    planner = Metadata({}, planner_data=Touch(witness), storage_data={})
    outside = Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo("../../secret", 0, 1)})
    transformed = Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo("a", 0, 1, ["zstd"])})
    shell = b"cposix\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR."
    dotted = b"\x80\x04\x8c\x05torch\x8c\x0bhub.os.path\x93."  # protocol 4 follows dots in names
    return {
        "call": pickle.dumps(Touch(witness)),
        "inside": pickle.dumps(inside),
        "planner": pickle.dumps(planner),
        "shell": shell,
        "dotted": dotted,
        "builtin": b"cbuiltins\neval\n(S'1'\ntR.",
        "torch": b"ctorch\nload\n(S'x'\ntR.",
        "outside": pickle.dumps(outside),
        "transformed": pickle.dumps(transformed),
        "no metadata": pickle.dumps({"a": 1}),
        "no places": pickle.dumps(Metadata({})),
        "not a pickle": b"\x00\x01\x02",
        "empty": b"",
    }


@pytest.mark.parametrize("name", list(hostile_metadata(Path())))
def test_hostile_metadata_is_refused_unexecuted(tmp_path: Path, name: str) -> None:
    witness = tmp_path / "executed"
    (tmp_path / layout.METADATA).write_bytes(hostile_metadata(witness)[name])
    with pytest.raises(RunError, match=r"\.metadata is refused: "):
        dcp.tensor_properties(tmp_path)
    assert not witness.exists()


def test_a_hostile_tensor_is_refused_unexecuted(tmp_path: Path) -> None:
    tensors = {"model.a": torch.rand(300)}
    write(tmp_path, tensors)
    witness = tmp_path / "executed"
    bomb = io.BytesIO()
    torch.save(Touch(witness), bomb)
    file = tmp_path / layout.model_file(0)
    file.write_bytes(bomb.getvalue().ljust(file.stat().st_size, b"\0")[: file.stat().st_size])
    with pytest.raises(RunError, match="cannot be read"):
        dcp.read_into(tmp_path, {"model.a": torch.zeros(300)})
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_pickled_value_is_never_loaded(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    save({"a": Touch(witness)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    with pytest.raises(RunError, match="a is missing"):
        dcp.read_into(tmp_path, {"a": torch.zeros(1)})
    assert not witness.exists()
