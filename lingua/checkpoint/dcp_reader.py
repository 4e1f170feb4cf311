"""Read a checkpoint's tensors in one pass: hash each file while it is read and copy each tensor once, to its target.

Several files are read at a time. Extra memory: the buffers of `verified`, and each saved tensor of which a target is
not a contiguous range of bytes (tensor parallelism on another number of ranks, another dtype, another writer).
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage] - part of the format: what .metadata holds
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lingua.checkpoint import layout
from lingua.checkpoint.dcp import Contents, Reader, blob
from lingua.checkpoint.staging_buffers import pinned_buffers
from lingua.checkpoint.verified import CHUNK_BYTES, VERIFY_THREADS, Manifest, differs

READERS = min(4, VERIFY_THREADS)
"""Files that a rank reads at a time."""

Pieces = Callable[[str, int, int | None], Iterable[memoryview]]
"""Yields the bytes of a file between two offsets (None: its end), in order; each piece is valid until the next."""


def pieces_in(content: Contents) -> Pieces:
    """Return a reader of files that are in memory."""

    def pieces(name: str, begin: int, end: int | None) -> Iterator[memoryview]:
        of_file = content(name)
        while len(piece := of_file[begin : begin + CHUNK_BYTES if end is None else min(end, begin + CHUNK_BYTES)]):
            yield piece
            begin += len(piece)

    return pieces


class _Blob:
    """A saved tensor, or shard of one, whose bytes arrive in pieces and are copied to their targets."""

    def __init__(self, place: _StorageInfo, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        self.begin, self.end = place.offset, place.offset + place.length
        self._dtype, self._sizes = dtype, sizes
        self._head, self._size_bytes, tail = blob(dtype, sizes)
        self._wanted: list[tuple[ReadItem, Tensor]] = []
        self._direct: list[tuple[int, Tensor]] = []
        """Targets that are a contiguous range of the blob: its offset in the blob, and the target's bytes."""
        self._kept: Tensor | None = None
        """All bytes of the blob, if a target is not such a range or another writer laid the blob out."""
        if place.length != len(self._head) + self._size_bytes + len(tail):
            self._keep(0)

    def want(self, item: ReadItem, target: Tensor) -> None:
        self._wanted.append((item, target))
        if tuple(item.lengths[1:]) != self._sizes[1:] or target.dtype != self._dtype or not target.is_contiguous():
            self._keep(0)
        elif target.numel():
            row_bytes = self._size_bytes // max(1, self._sizes[0]) if self._sizes else 0
            begin = len(self._head) + (item.storage_offsets[0] * row_bytes if self._sizes else 0)
            self._direct.append((begin, target.view(-1).view(torch.uint8)))

    @property
    def device(self) -> torch.device | None:
        """The GPU that holds a target, or None."""
        return next((target.device for _, target in self._wanted if target.device.type == "cuda"), None)

    def _keep(self, n_known: int) -> None:
        """Keep the bytes from now on; the `n_known` before them were equal to our head's."""
        if self._kept is None:
            self._kept = torch.empty(self.end - self.begin, dtype=torch.uint8)
            self._kept[:n_known] = torch.tensor(list(self._head[:n_known]), dtype=torch.uint8)

    def feed(self, piece: Tensor, at: int) -> None:
        """Take the bytes that begin at `at`; copies to a GPU are only queued."""
        if self._kept is None and at < len(self._head):
            head = self._head[at : at + len(piece)]
            if bytes(piece[: len(head)].numpy()) != head:
                self._keep(at)
        if self._kept is not None:
            self._kept[at : at + len(piece)] = piece
            return
        for begin, target in self._direct:
            first, last = max(at, begin), min(at + len(piece), begin + len(target))
            if first < last:
                target[first - begin : last - begin].copy_(piece[first - at : last - at], non_blocking=True)

    def complete(self) -> None:
        """Fill the targets that need all bytes. Call when these have arrived."""
        if self._kept is None:
            return
        kept, begin = self._kept, len(self._head)
        if bytes(kept[:begin].numpy()) == self._head and self._size_bytes:
            source = kept[begin : begin + self._size_bytes].view(self._dtype).view(self._sizes)
        else:  # another program or version of torch wrote it
            source = torch.load(io.BytesIO(bytes(kept.numpy())), map_location="cpu", weights_only=True)
        for item, target in self._wanted:
            part = source
            for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(axis, start, length)
            target.copy_(part)
        self._kept = None


class StreamReader(Reader):
    """Reads each file once, several at a time, and hashes those to `verify` while they are read."""

    def __init__(self, folder: Path, pieces: Pieces, metadata: Metadata, verify: Manifest) -> None:
        super().__init__(folder)
        self._pieces, self._described, self._verify = pieces, metadata.state_dict_metadata, verify
        self.problems: list[str] = []

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[str, dict[int, _Blob]] = {name: {} for name in self._verify}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO())  # refuses
            place = self.storage_data[item.storage_index]
            blobs = files.setdefault(place.relative_path, {})
            if place.offset not in blobs:
                blobs[place.offset] = self._blob(item.storage_index, place)
            blobs[place.offset].want(item, planner.resolve_tensor(item).detach())
        with warnings.catch_warnings(), ThreadPoolExecutor(READERS) as pool:
            warnings.simplefilter("ignore", UserWarning)  # torch: mapped memory is read-only; nothing writes to it
            found = pool.map(self._read, files, [[of[at] for at in sorted(of)] for of in files.values()])
            self.problems = [problem for problem in found if problem]
        read: Future[None] = Future()
        read.set_result(None)
        return read

    def _blob(self, index: MetadataIndex, place: _StorageInfo) -> _Blob:
        described = self._described[index.fqn]
        assert isinstance(described, TensorStorageMetadata)
        sizes = next(chunk.sizes for chunk in described.chunks if chunk.offsets == index.offset)
        return _Blob(place, described.properties.dtype, tuple(sizes))

    def _read(self, name: str, blobs: list[_Blob]) -> str | None:
        """In a thread: read a file; return what is wrong with it if it is in `verify`, else None."""
        device = next((each for one in blobs if (each := one.device) is not None), None)
        inbox = _Inbox(name, blobs, None if device is None else Stage(device))
        fact = self._verify.get(name)
        if fact is not None:
            problem = differs(name, self._pieces(name, 0, None), fact, inbox.take)
            if problem is None:
                inbox.close()
            return problem
        inbox.at = blobs[0].begin
        for piece in self._pieces(name, inbox.at, max(one.end for one in blobs)):
            inbox.take(piece)
        inbox.close()
        return None


class Stage:
    """Staging buffer, pinned if it can be: a GPU copies a piece from it while that is hashed and the next is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        (self._memory,) = pinned_buffers(1)

    def put(self, piece: Tensor) -> Tensor:
        self.settle()
        return self._memory[: len(piece)].copy_(piece)

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


class _Inbox:
    """Hands the bytes of a file to its blobs."""

    def __init__(self, name: str, blobs: list[_Blob], stage: Stage | None) -> None:
        self._name, self._blobs, self._stage, self.at = name, deque(blobs), stage, 0
        self._error: Exception | None = None

    def take(self, piece: memoryview) -> None:
        """Copy a piece to its targets; keep errors until it is known whether the file is damaged."""
        try:
            content = torch.frombuffer(piece, dtype=torch.uint8)
            self._give(content if self._stage is None else self._stage.put(content))
        except Exception as error:
            self._error = self._error or error
            self._blobs.clear()
        self.at += len(piece)

    def _give(self, piece: Tensor) -> None:
        end = self.at + len(piece)
        while self._blobs and (one := self._blobs[0]).begin < end:
            first, last = max(self.at, one.begin), min(end, one.end)
            one.feed(piece[first - self.at : last - self.at], first - one.begin)
            if one.end > end:
                return
            one.complete()
            self._blobs.popleft()

    def close(self) -> None:
        """Wait for the copies, and raise the first error."""
        if self._stage is not None:
            self._stage.settle()
        if self._error is not None:
            raise self._error
        if self._blobs:
            raise ValueError(f"{self._name} ends at byte {self.at}, before what {layout.METADATA} says is in it")
