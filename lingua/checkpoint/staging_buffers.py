"""Copy tensors from a device to the host in chunks: while one is written to the disk, the next is copied.

`Tensor.cpu` instead needs host memory for a whole tensor, and memory that is not pinned, into which CUDA copies at a
fraction of the bus's rate (CUDA C++ Best Practices Guide, "Pinned Memory").
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lingua.checkpoint.verified import CHUNK_BYTES
from lingua.files import Buffer

log = logging.getLogger(__name__)

N_BUFFERS = 2
"""One is filled while the other is written."""

Wait = Callable[[], None]


class _Chunk(NamedTuple):
    content: Buffer
    copied: Wait | None = None
    """Waits until the content has arrived; None if it has."""
    buffer: Tensor | None = None
    """Staging buffer to free once the content is used."""


def pinned_buffers(n: int = N_BUFFERS) -> list[Tensor]:
    """Allocate buffers; pinned, unless the system refuses, which only costs time."""
    try:
        return [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(n)]
    except RuntimeError as error:
        log.warning("checkpoint: no pinned memory (%s), so it is copied more slowly", str(error).splitlines()[0])
        return [torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(n)]


def begin_copy(target: Tensor, source: Tensor) -> Wait:
    """Begin to copy from a device; return a function that waits for the copy."""
    target.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


class StagingBuffers:
    """Chunks on their way to the host."""

    def __init__(
        self,
        allocate: Callable[[], list[Tensor]] = pinned_buffers,
        begin: Callable[[Tensor, Tensor], Wait] = begin_copy,
    ) -> None:
        """`allocate`: called for the first tensor; returns uint8 buffers of one size."""
        self._allocate, self._begin = allocate, begin
        self._buffers: list[Tensor] = []
        self._free: list[Tensor] = []
        self._waiting: deque[_Chunk] = deque()

    def stream(self, pieces: Iterable[Buffer | Tensor]) -> Iterator[Buffer]:
        """Yield the bytes of the pieces in order, each valid until the next is taken. Tensors are flat, on a device."""
        for piece in pieces:
            if not isinstance(piece, Tensor):
                if self._waiting:
                    self._waiting.append(_Chunk(piece))
                else:
                    yield piece
                continue
            if not self._buffers:
                self._buffers = self._allocate()
                self._free += self._buffers
            for part in piece.view(torch.uint8).split(self._buffers[0].numel()):
                while not self._free:
                    yield from self._next()
                buffer = self._free.pop()
                host = buffer[: part.numel()]
                copied = self._begin(host, part)
                self._waiting.append(_Chunk(memoryview(host.numpy()), copied, buffer))  # pyright: ignore[reportArgumentType]
        while self._waiting:
            yield from self._next()

    def _next(self) -> Iterator[Buffer]:
        chunk = self._waiting.popleft()
        if chunk.copied is not None:
            chunk.copied()
        yield chunk.content
        if chunk.buffer is not None:
            self._free.append(chunk.buffer)
