"""One pass over a checkpoint's files gives the bits that torch's own reader gives, wherever the pieces end."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from lingua.checkpoint import layout, publish, restore
from lingua.checkpoint.dcp_reader import Stage, _Blob, _Inbox
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.verified import pieces_of
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from tests.tiny import assert_equal, make, snapshot, train

SIZES = (4, 6)
SAVED = torch.arange(24, dtype=torch.float32).view(SIZES)
BOXES = [((0, 0), (4, 6)), ((1, 0), (2, 6)), ((0, 2), (4, 3)), ((3, 5), (1, 1)), ((0, 0), (0, 6))]


def saved(tensor: Tensor, by: str = "us") -> bytes:
    """What torch writes; or what another version of it might, of the same length or not."""
    file = io.BytesIO()
    torch.save(tensor, file, _disable_byteorder_record=by == "a shorter one")
    return file.getvalue().replace(b"archive/", b"brchive/" if by == "another" else b"archive/")


def box_of(offsets: tuple[int, ...], lengths: tuple[int, ...]) -> ReadItem:
    index, zeros = MetadataIndex("x"), torch.Size([0] * len(offsets))
    return ReadItem(LoadItemType.TENSOR, index, zeros, index, torch.Size(offsets), torch.Size(lengths))


@pytest.mark.parametrize("piece_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("by", ["us", "another", "a shorter one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_box_arrives(piece_bytes: int, by: str, dtype: torch.dtype):
    content = b"head" + saved(SAVED, by) + b"tail"
    blob = _Blob(_StorageInfo("f", 4, len(content) - 8), torch.float32, SIZES)
    targets = [torch.full(lengths, -1.0, dtype=dtype) for _, lengths in BOXES]
    for box, target in zip(BOXES, targets, strict=True):
        blob.want(box_of(*box), target)
    inbox = _Inbox("f", [blob], None)
    for start in range(0, len(content), piece_bytes):
        inbox.take(memoryview(bytearray(content[start : start + piece_bytes])))
    inbox.close()
    for ((row, column), (n, m)), target in zip(BOXES, targets, strict=True):
        assert torch.equal(target, SAVED[row : row + n, column : column + m].to(dtype))


def test_a_number_without_axes_arrives():
    content, target = saved(torch.tensor(3.0)), torch.zeros(())
    blob = _Blob(_StorageInfo("f", 0, len(content)), torch.float32, ())
    blob.want(box_of((), ()), target)
    inbox = _Inbox("f", [blob], None)
    inbox.take(memoryview(bytearray(content)))
    inbox.close()
    assert target == 3.0


def test_a_file_that_ends_early_is_no_success():
    content = saved(SAVED)
    blob = _Blob(_StorageInfo("f", 0, len(content)), torch.float32, SIZES)
    blob.want(box_of((0, 0), SIZES), torch.zeros(SIZES))
    inbox = _Inbox("f", [blob], None)
    inbox.take(memoryview(bytearray(content[:-1])))
    with pytest.raises(ValueError, match=r"f ends at byte \d+, before what \.metadata says is in it"):
        inbox.close()


def test_pinned_memory_is_filled_again_only_after_its_copies(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for a GPU: copies happen when they are waited for."""

    class Later:
        """A target on a device."""

        def __init__(self, target: Tensor) -> None:
            self.target = target

        def __len__(self) -> int:
            return len(self.target)

        def __getitem__(self, span: slice) -> Later:
            return Later(self.target[span])

        def copy_(self, source: Tensor, *, non_blocking: bool) -> None:
            assert non_blocking
            assert source.untyped_storage().data_ptr() == stage._memory.untyped_storage().data_ptr()
            begun.append((self.target, source))

    class Stream:
        def synchronize(self) -> None:
            for target, source in begun:
                target.copy_(source)
            begun.clear()

    begun: list[tuple[Tensor, Tensor]] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory, **more: empty(*sizes, **more))
    stage = Stage(torch.device("cuda"))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    content, target = saved(SAVED), torch.zeros(SIZES)
    blob = _Blob(_StorageInfo("f", 0, len(content)), torch.float32, SIZES)
    blob.want(box_of((0, 0), SIZES), target)
    blob._direct = [(begin, Later(flat)) for begin, flat in blob._direct]  # pyright: ignore[reportAttributeAccessIssue]
    inbox = _Inbox("f", [blob], stage)
    for start in range(0, len(content), 50):
        inbox.take(memoryview(bytearray(content[start : start + 50])))
    inbox.close()
    assert torch.equal(target, SAVED)


# -- whole checkpoints ---------------------------------------------------------------------------------------------


def two_steps(run_dir: Path) -> tuple[CheckpointArgs, Path, list[dict[str, Tensor]]]:
    args = CheckpointArgs(dump=SaveEvery(every=1, keep=-1), eval=SaveEvery(every=0))
    manager, state, states = CheckpointManager(args, run_dir), make(), []
    for step in (1, 2):
        train(state, step, step)
        assert manager.save(step, state).published
        states.append(snapshot(state))
    manager.close()
    return args, manager.root, states


def test_a_resume_reads_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args, root, states = two_steps(tmp_path)
    read: dict[str, int] = {}

    def counting(path: Path, begin: int = 0, end: int | None = None, *, direct_io: bool = True) -> Iterator[memoryview]:
        for piece in pieces_of(path, begin, end, direct_io=direct_io):
            read[path.name] = read.get(path.name, 0) + len(piece)
            yield piece

    for module in (restore, publish):
        monkeypatch.setattr(module, "pieces_of", counting)
    state = make()
    assert CheckpointManager(args, tmp_path).resume(state) == 2
    assert_equal(snapshot(state), states[1])
    assert read == {name: fact.size_bytes for name, fact in publish.read_marked_manifest(root, 2).items()}


@pytest.mark.parametrize("name", [layout.model_file(0), layout.optim_file(0), layout.train_state_file(0), ".metadata"])
@pytest.mark.parametrize("at", [0, -200])
def test_what_is_damaged_is_found_on_the_way_and_the_one_before_is_restored_whole(tmp_path: Path, name: str, at: int):
    args, root, states = two_steps(tmp_path)
    path = layout.folder(root, 2) / name
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    state = make()
    assert CheckpointManager(args, tmp_path).resume(state) == 1
    assert_equal(snapshot(state), states[0])
    assert (root / "0000000002.broken-1").is_dir()


def test_the_rank_that_wants_most_of_a_file_reads_it():
    def readers(n_saved: int, n_ranks: int) -> list[int]:
        return [layout.reader_of(layout.model_file(rank), n_saved, n_ranks) for rank in range(n_saved)]

    assert readers(4, 4) == [0, 1, 2, 3]
    assert readers(4, 2) == [0, 0, 1, 1]
    assert readers(2, 4) == [0, 2]
    assert readers(3, 2) == [0, 0, 1]
    assert readers(5, 1) == [0] * 5
    assert layout.reader_of(layout.METADATA, 4, 4) == 0
    assert layout.reader_of(layout.model_file(9), 0, 2) == 1  # a folder that somebody put together
