"""`.metadata` is the same bytes on every Python, and what every Python wrote is read.

`recorded/` holds one small checkpoint in each form. `lingua` is what is written now, on any Python. The others were
written on the Python that they are named after: by the older lingua, whose enums went through getattr on 3.11.2, and by
stock `dcp.save`, which older runs used and which records a path.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,  # pyright: ignore[reportPrivateUsage]
    Metadata,
)

from lingua.checkpoint import dcp, layout, metadata
from lingua.files import RunError

RECORDED = Path(__file__).parent / "recorded"

REDUCE_EX: dict[str, Callable[[Any, int], tuple[Any, ...]]] = {
    "3.11.2": lambda member, _: (getattr, (type(member), member.name)),
    "3.11.7 to 3.14": lambda member, _: (type(member), (member.value,)),
}
"""How an enum's member is pickled there (`Enum.__reduce_ex__`)."""


def tensors() -> dict[str, Tensor]:
    return {"model.w": torch.arange(6, dtype=torch.float32).view(2, 3), "optim.state.w.step": torch.tensor(2.0)}


@pytest.mark.parametrize("python", list(REDUCE_EX))
def test_metadata_is_the_same_bytes_on_every_python(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", REDUCE_EX[python])
    paths = {"model.w": ("model", "w"), "optim.state.w.step": ("optim", "state", "w", "step")}
    _, written = dcp.global_plan([dcp.local_plan(tensors(), True)], paths, {})
    assert written == (RECORDED / "lingua" / layout.METADATA).read_bytes()
    assert b"getattr" not in dcp.metadata_bytes(dcp.read_metadata(RECORDED / "torch-2.10-on-3.11.2"))


@pytest.mark.parametrize("folder", sorted(RECORDED.iterdir()), ids=lambda folder: folder.name)
def test_what_another_python_wrote_is_read(folder: Path) -> None:
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    dcp.read_into(folder, found)
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors().items())
    facts = metadata.read_tensors(folder)
    assert {name: str(fact) for name, fact in facts.items()} == {
        "model.w": "float32 [2, 3]",
        "optim.state.w.step": "float32 []",
    }


# -- getattr gives members of an enum, and nothing else --------------------------------------------------------------


class Call:
    """Unpickling it calls getattr."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.args


READERS: list[Callable[[Path], object]] = [dcp.tensor_properties, metadata.read_tensors]


def folder_with(planned: object, folder: Path) -> Path:
    """Write a `.metadata` that is sound, but for what `planned` is."""
    (folder / layout.METADATA).write_bytes(pickle.dumps(Metadata({}, planner_data=planned, storage_data={})))
    return folder


@pytest.mark.parametrize("read", READERS)
def test_getattr_gives_a_member(tmp_path: Path, read: Callable[[Path], object]) -> None:
    assert read(folder_with(Call(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"), tmp_path)) == {}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "args",
    [
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "__members__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (_MEM_FORMAT_ENCODING, ["TORCH_CHANNELS_LAST"]),
        (_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST", None),
        (_MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST, "name"),
        (Metadata, "__init__"),
        (PosixPath, "unlink"),
        (torch.Size, "numel"),
        (getattr, "__self__"),
        ("text", "format"),
    ],
)
def test_getattr_gives_nothing_else(tmp_path: Path, read: Callable[[Path], object], args: tuple[object, ...]) -> None:
    with pytest.raises(RunError, match=r"\.metadata is refused: "):
        read(folder_with(Call(*args), tmp_path))
