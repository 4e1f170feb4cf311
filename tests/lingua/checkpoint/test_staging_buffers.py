"""Tensors of a device reach the disk whole and in order, and the next chunk is under way while one is written."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import Tensor

from lingua.checkpoint.staging_buffers import StagingBuffers, Wait, pinned_buffers


class FakeCopies:
    """Copies that are done only when somebody waits for them; notes what happens."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._numbers = count()

    def begin(self, target: Tensor, source: Tensor) -> Wait:
        number = next(self._numbers)
        self.said.append(f"begin {number}")
        target.fill_(255)  # what a reader that does not wait would see

        def wait() -> None:
            self.said.append(f"wait {number}")
            target.copy_(source)

        return wait


def buffers(size_bytes: int) -> list[Tensor]:
    return [torch.empty(size_bytes, dtype=torch.uint8) for _ in range(2)]


def test_the_next_chunk_is_under_way_while_one_is_written() -> None:
    copies, written = FakeCopies(), bytearray()
    stream = StagingBuffers(lambda: buffers(8), copies.begin).stream
    for content in stream([b"head", torch.arange(20, dtype=torch.uint8), b"tail"]):
        written += content
        copies.said.append(f"write {len(content)}")
    assert bytes(written) == b"head" + bytes(range(20)) + b"tail"
    assert copies.said == [
        "write 4",
        "begin 0", "begin 1", "wait 0", "write 8",
        "begin 2", "wait 1", "write 8",
        "wait 2", "write 4", "write 4",
    ]  # fmt: skip


@pytest.mark.parametrize("size_bytes", [1, 7, 16, 1000])
def test_constants_and_tensors_of_any_size_keep_their_order(size_bytes: int) -> None:
    torch.manual_seed(1)
    tensors = [torch.randn(n).to(dtype) for n, dtype in [(3, torch.float32), (16, torch.bfloat16), (1, torch.float64)]]
    pieces = [b"a", tensors[0], b"b", b"c", tensors[1], tensors[2], memoryview(b"ddd")]
    expected = [bytes(p.view(torch.uint8).numpy()) if isinstance(p, Tensor) else bytes(p) for p in pieces]
    staging = StagingBuffers(lambda: buffers(size_bytes), FakeCopies().begin)
    for _ in range(2):  # the buffers are free again afterwards
        found = b"".join(bytes(content) for content in staging.stream(pieces))
        assert found == b"".join(expected)


def test_without_a_device_nothing_is_allocated_or_held_back() -> None:
    def never() -> list[Tensor]:
        raise AssertionError("there is nothing to copy")

    pieces = iter([b"one", b"two"])
    stream = StagingBuffers(never).stream(pieces)
    assert (next(stream), next(pieces)) == (b"one", b"two")


def test_memory_that_cannot_be_pinned_only_costs_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty

    def refused(*size: int, dtype: torch.dtype, pin_memory: bool = False) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return empty(*size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", refused)
    assert [buffer.numel() for buffer in pinned_buffers()] == [16 << 20] * 2
    assert caplog.messages == ["checkpoint: no pinned memory (CUDA error: out of memory), so it is copied more slowly"]
