"""Copy this rank's tensors into its files in a slot, one memory copy per tensor.

The slot holds the tensors as they were at the moment of the call, as the final bytes of the files. The rank reports
`ready` after all of them are hashed. On a GPU the copies run on their own stream during the next forward and backward;
`before_update` makes the optimizer wait for them, and buffers, which a forward may change, are copied before it starts.
The caller waits for the copy at memory speed (GPU: for its launch). Allocation, first touch, pinning and hashing happen
in a thread. A save writes only to memory that was allocated before.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.tensor import DTensor

from lingua.checkpoint import layout
from lingua.checkpoint.capacity import memory_limit
from lingua.checkpoint.dcp import FilePlan, WritePlan
from lingua.checkpoint.publish import FileFacts, Manifest
from lingua.checkpoint.shm.area import Save, ShmArea, Slot, served_by
from lingua.files import DISK, Files, human_bytes

log = logging.getLogger(__name__)

STRETCH_BYTES = 64 << 20
"""Bytes that are allocated or touched between two checks of `closing`."""
SMALL_BYTES = 1 << 20
"""Room for a rank's JSON is a multiple of this, since it grows from save to save."""
PAGE_BYTES = 4096


class SlotFile:
    """One file of one slot, mapped into this process."""

    def __init__(self, slot: Slot, plan: FilePlan, device: torch.device, closing: threading.Event) -> None:
        """Allocate, touch, write the constant spans and pin. Raises OSError: no room, or `closing`.

        Always makes a new file: a stopped rank of an earlier attempt may write into the old one when it wakes up.
        """
        self.plan = plan
        self._targets: dict[int, Tensor] = {}
        path = slot.folder / plan.name
        with suppress(FileNotFoundError):
            DISK.remove(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for start in range(0, plan.size_bytes, STRETCH_BYTES):
                _raise_if_closing(closing)  # a hole in a full /dev/shm would be a SIGBUS later
                os.posix_fallocate(descriptor, start, min(STRETCH_BYTES, plan.size_bytes - start))
            self._map = mmap.mmap(descriptor, plan.size_bytes)
        finally:
            os.close(descriptor)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        for start in range(0, plan.size_bytes, STRETCH_BYTES):
            _raise_if_closing(closing)
            self.bytes[start : start + STRETCH_BYTES : PAGE_BYTES].fill_(0)
        for part in plan.parts:
            if part.constant is not None:
                self._map[part.offset : part.offset + part.size_bytes] = part.constant
        self.pinned = device.type == "cuda" and _pin(self.bytes)

    def target(self, part_number: int, source: Tensor) -> Tensor:
        """Return the bytes of a span as a tensor like `source`."""
        if part_number not in self._targets:
            part = self.plan.parts[part_number]
            assert source.numel() * source.element_size() == part.size_bytes, f"{part.index} changed its size"
            stretch = self.bytes[part.offset : part.offset + part.size_bytes]
            self._targets[part_number] = stretch.view(source.dtype).view(source.shape)
        return self._targets[part_number]

    def facts(self) -> FileFacts:
        with memoryview(self._map) as content:
            return FileFacts.of(content)

    def close(self) -> None:
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())  # pyright: ignore[reportOptionalMemberAccess]
            self.pinned = False


def _raise_if_closing(closing: threading.Event) -> None:
    if closing.is_set():
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))


def _pin(memory: Tensor) -> bool:
    """Let the GPU copy into this memory directly; return whether it can."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # pyright: ignore[reportOptionalMemberAccess]
    if int(code) != 0:
        _warn_not_pinned(int(code))
    return int(code) == 0


@cache
def _warn_not_pinned(code: int) -> None:
    """Warn once: a copy to memory that is not pinned blocks the host until it is done (CUDA, "cudaMemcpyAsync")."""
    locked_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    locked = "unlimited" if locked_bytes == resource.RLIM_INFINITY else human_bytes(locked_bytes)
    limit_bytes, used_bytes = memory_limit(Path("/proc/self/cgroup").read_text())
    limit = "no limit" if limit_bytes is None else f"{human_bytes(limit_bytes)}, {human_bytes(used_bytes)} in use"
    log.warning(
        "checkpoint: cudaHostRegister failed with error %d (locked memory, ulimit -l: %s; the job's memory: %s), so "
        "each save is copied synchronously; raise what is too low, or lower checkpoint.slots",
        code, locked, limit,
    )  # fmt: skip


@dataclass
class _Copy:
    """A snapshot that is being copied into a slot."""

    slot: Slot
    save: Save
    small: dict[str, bytes]
    copied: Callable[[], None]
    """Waits for all copies."""


class SlotWriter:
    """Writes one rank's files of the slots of its node."""

    def __init__(self, area: ShmArea, rank: int, plan: WritePlan, *, device: torch.device, files: Files = DISK) -> None:
        self._area, self._rank, self._plan, self._files = area, rank, plan, files
        self._device = device
        self._slots: dict[int, list[SlotFile]] = {}
        self._known_pairs: dict[int, tuple[list[int], list[tuple[Tensor, Tensor]]]] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage")
        self._allocating: list[Future[None]] = []
        self.occupied: set[int] = set()
        """Slots to allocate once they are free."""
        self._hashing: Future[None] | None = None
        self._in_flight: torch.cuda.Event | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._failed: OSError | None = None
        self._closing = threading.Event()

    # -- memory ----------------------------------------------------------------------------------------------------

    def allocate(self, n_slots: int) -> None:
        """Start to allocate, touch and pin this rank's files in the first `n_slots` slots, each once it is free.

        Until then a slot holds a snapshot of an earlier attempt, which must not change.
        """
        self.occupied = set(range(n_slots))
        self.allocate_free()

    def allocate_free(self) -> None:
        """Start to allocate the slots that have become free."""
        free = {number for number in self.occupied if self._area.slot(number).state() == "free"}
        if free:
            self.occupied -= free
            self._allocating.append(self._worker.submit(self._allocate, sorted(free)))

    def _allocate(self, numbers: list[int]) -> None:
        """In a thread: allocate slots; stop at the first for which there is no room."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread uses device 0
        for number in numbers:
            slot, files = self._area.slot(number), []
            try:
                slot.report_unready(self._rank, files=self._files)  # first: its old content becomes invalid
                for plan in self._plan.files:
                    files.append(SlotFile(slot, plan, self._device, self._closing))
                for name, size_bytes in self._small_files().items():
                    self._files.close(self._files.reserve(slot.folder / name, size_bytes))
            except OSError as error:
                self._failed = error
                self._give_back(slot, files)
                return
            self._slots[number] = files

    def _give_back(self, slot: Slot, files: list[SlotFile]) -> None:
        """Free the memory of a slot that could not be allocated whole."""
        for file in files:
            file.close()
        for path in [slot.ready_file(self._rank), *(slot.folder / name for name in self.names)]:
            with suppress(OSError):
                self._files.remove(path)

    def usable_slots(self) -> tuple[set[int], OSError | None]:
        """Wait for the allocation; return the allocated slots' numbers and, once, why another one failed."""
        self.allocate_free()
        for allocating in self._allocating:
            allocating.result()
        self._allocating.clear()
        failed, self._failed = self._failed, None
        return set(self._slots), failed

    @property
    def is_synchronous(self) -> bool:
        """Whether a save waits for the whole copy: on a GPU, if a slot's memory is not pinned."""
        return self._device.type == "cuda" and not all(f.pinned for files in self._slots.values() for f in files)

    @property
    def names(self) -> set[str]:
        """Names of this rank's files in each slot."""
        return {file.name for file in self._plan.files} | set(self._small_files())

    def _small_files(self) -> dict[str, int]:
        """Return the names of this rank's small files and their allocated sizes."""
        metadata = self._plan.metadata
        return {layout.train_state_file(self._rank): SMALL_BYTES} | (
            {} if metadata is None else {layout.METADATA: len(metadata)}
        )

    # -- one save --------------------------------------------------------------------------------------------------

    def fill(self, number: int, save: Save, tensors: dict[str, Tensor], scalars: bytes, model: nn.Module) -> None:
        """Copy the tensors' current values into a slot. A thread then hashes them and reports `ready`."""
        slot = self._area.slot(number)
        try:
            slot.report_unready(self._rank, files=self._files)
        except OSError as error:  # reported by `wait_until_ready`, like all failures of the memory
            self._hashing = Future()
            self._hashing.set_exception(error)
            return
        pairs = self._pairs(number, tensors)
        small = {layout.train_state_file(self._rank): scalars}
        if self._plan.metadata is not None:
            small[layout.METADATA] = self._plan.metadata
        if self._stream is None:
            _copy_all(pairs)
            copied = _nothing
        else:
            copied = self._copy_on_stream(pairs, model)
        self._hashing = self._worker.submit(self._finish, _Copy(slot, save, small, copied))

    def _pairs(self, number: int, tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (target, source) of every copy; looked up again only if a tensor has moved since the last save."""
        addresses = [_address(tensor) for tensor in tensors.values()]
        known = self._known_pairs.get(number)
        if known is not None and known[0] == addresses:
            return known[1]
        planner = DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(tensors))
        pairs: list[tuple[Tensor, Tensor]] = []
        for file in self._slots[number]:
            for part_number, part in enumerate(file.plan.parts):
                if part.index is not None:
                    source: Any = planner.lookup_object(part.index).detach()
                    pairs.append((file.target(part_number, source), source))
        self._known_pairs[number] = (addresses, pairs)  # holds the tensors, so that their addresses are not reused
        return pairs

    def _copy_on_stream(self, pairs: list[tuple[Tensor, Tensor]], model: nn.Module) -> Callable[[], None]:
        assert self._stream is not None
        current = torch.cuda.current_stream(self._device)
        changed_by_forward = {buffer.data_ptr() for buffer in model.buffers()}
        event = torch.cuda.Event()
        at_once, later = [], []
        for target, source in pairs:
            waits = source.data_ptr() not in changed_by_forward and source.device.type != "cpu"
            (later if waits else at_once).append((target, source))
        _copy_all(at_once)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            _copy_all(later)
            event.record()
        self._in_flight = event
        return event.synchronize

    def before_update(self) -> None:
        """Make the device wait until parameters and optimizer state are copied. Call before they change."""
        if self._in_flight is not None:
            self._in_flight.wait(torch.cuda.current_stream(self._device))
            self._in_flight = None

    def _finish(self, staging: _Copy) -> None:
        """In a thread: hash what was copied and report this rank's part as ready."""
        staging.copied()
        facts: Manifest = {file.plan.name: file.facts() for file in self._slots[staging.slot.number]}
        self._require_ours(staging.save)
        for name, content in staging.small.items():
            facts[name] = self._write_small(staging.slot, name, content)
        self._require_ours(staging.save)
        staging.slot.report_ready(self._rank, staging.save, facts, files=self._files)

    def _require_ours(self, save: Save) -> None:
        """Raise OSError if a newer attempt has taken this node's memory while this rank was stopped."""
        if served_by(self._area) not in (None, (save.run_id, save.attempt)):
            raise OSError(errno.ESTALE, "a newer attempt has this memory", str(self._area.folder))

    def _write_small(self, slot: Slot, name: str, content: bytes) -> FileFacts:
        room_bytes = self._small_files()[name]
        if len(content) > room_bytes:
            room_bytes = -(-len(content) // SMALL_BYTES) * SMALL_BYTES
        descriptor = self._files.reserve(slot.folder / name, room_bytes)
        try:
            self._files.write(descriptor, content)
        finally:
            self._files.close(descriptor)
        return FileFacts.of(memoryview(content))

    def wait_until_ready(self) -> OSError | None:
        """Wait until the last save is hashed and reported; return why that failed, if memory was the reason."""
        if self._hashing is None:
            return None
        try:
            self._hashing.result()
        except OSError as error:
            return error
        finally:
            self._hashing = None
        return None

    def raise_bug(self) -> None:
        """Raise a thread's exception, except OSError, which is reported elsewhere. Does not wait for threads."""
        for future in (self._hashing, *self._allocating):
            error = future.exception() if future is not None and future.done() else None
            if error is not None and not isinstance(error, OSError):
                raise error

    def close(self) -> None:
        """Wait for the thread and unmap the slots; their content stays."""
        self._closing.set()
        self._worker.shutdown(wait=True)
        for files in self._slots.values():
            for file in files:
                file.close()
        self._slots.clear()
        self._known_pairs.clear()


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each source to its target, by one call for all: 0.3 ms for 912 small ones, a loop in Python 0.7 ms."""
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources, non_blocking=True)


def _address(tensor: Tensor) -> int:
    """Return the address of this rank's part of a tensor."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # to_local() costs a view
    return local.data_ptr()


def _nothing() -> None:
    pass
