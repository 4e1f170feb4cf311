"""Copy another node's parts, so that the loss of a node loses no complete checkpoint. Torch-free.

With `checkpoint.replicate: 1` the service of each node copies the newest parts of the previous node, in a ring, from
that node's memory to its own. Nobody waits for that: a slow or dead neighbor costs only the copy. A copy is a slot
below `copies/`, free until it is complete and its checksums match, then staged. There are as many copies as slots and
the oldest is overwritten, so that one is always complete.

    free -> staged       service: the copy is complete
    staged -> free       service: to be overwritten
    staged -> claimed    leader of a new attempt: until it knows whether it needs the copy
    claimed -> free      leader, when its ranks have loaded; or the copy becomes a slot, which the service then drains
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import xxhash

from lingua.checkpoint.publish import CHUNK_BYTES, DamagedError, FileFacts, Manifest
from lingua.checkpoint.shm.area import PartKey, ServedRun, ShmArea, Slot
from lingua.checkpoint.shm.drain import Throttle
from lingua.checkpoint.shm.part_server import PartReader
from lingua.files import DISK, Files, RunError

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two polls of the other node."""
LONGEST_PAUSE_S = 30.0
"""The same while it does not answer."""
BYTES_PER_S = 1e9
"""Limit on copying: four fifths of 10 Gbit Ethernet."""


class Copier:
    """Copies parts to one area, in a thread of the service."""

    def __init__(
        self,
        area: ShmArea,
        report: Callable[..., None],
        *,
        files: Files = DISK,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._area, self._report, self._files, self._now, self._sleep = area, report, files, now, sleep
        self._run: ServedRun | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._made: set[Path] = set()
        """Files that this process has made; it overwrites only these."""

    def follow(self, run: ServedRun) -> None:
        """Copy parts for this run from now on, if it asks for that."""
        self._run = run
        if run.copy_from is not None and self._thread is None:
            self._thread = threading.Thread(target=self._repeat, name="copy", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop writing. Call before the area is removed."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _repeat(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread: training goes first
        pause_s = LOOK_S
        while not self._stopped.wait(pause_s):
            run, is_well = self._run, pause_s == LOOK_S
            if run is None or run.copy_from is None:
                continue
            try:
                self.copy_newest(run)
                pause_s = LOOK_S
            except (OSError, RunError) as error:
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
                if is_well and self._is_wanted(run):
                    why = f"the newest checkpoint has no copy in this node's memory: {error}"
                    self._report("uncopied", run.attempt, step=0, why=why)

    def copy_newest(self, run: ServedRun) -> None:
        """Copy the newest part of the other node, unless it is here. Raises OSError, DamagedError."""
        assert run.copy_from is not None
        self._run = self._run or run
        with closing(PartReader(run.copy_from, run.secret)) as reader:
            offered = reader.newest(run.run_id, run.attempt)
            copies = self._area.copies
            if offered is None or any(slot.save() == offered[0] for slot in copies.slots()):
                return
            save, ready = offered
            facts = _facts_in(ready)
            if facts is None or (slot := self._slot_to_fill(run.n_copies)) is None:
                return
            started_s, throttle = self._now(), Throttle(BYTES_PER_S, self._now, self._sleep)
            slot.clear_leftovers(facts, files=self._files)
            for name, fact in facts.items():
                self._copy(run, reader, save.key, name, fact, slot, throttle)
            for rank, said in ready.items():
                slot.ready(rank).write(said, files=self._files)
            slot.put_mark(save, files=self._files)
        seconds, n_bytes = self._now() - started_s, sum(fact.size_bytes for fact in facts.values())
        rate = n_bytes / 1e9 / max(seconds, 1e-9)
        self._report("copied", run.attempt, step=save.step, node=save.node, seconds=seconds, gb_per_s=rate)

    def _slot_to_fill(self, n_copies: int) -> Slot | None:
        """Return a free slot, else free the one with the oldest copy; None if a new attempt has claimed all."""
        copies = self._area.copies
        self._files.mkdir(copies.folder)
        slots = [copies.slot(number) for number in range(n_copies)]
        for slot in slots:
            if not slot.folder.exists() or slot.state() is None:
                slot.make(files=self._files)
        staged = [(save.attempt, save.number, slot.number) for slot in slots if (save := slot.save()) is not None]
        oldest_first = [copies.slot(number) for _, _, number in sorted(staged)]
        free = [slot for slot in slots if slot.state() == "free"]
        taken = (slot for slot in oldest_first if slot.change("staged", "free", files=self._files))
        return next(itertools.chain(free, taken), None)

    def _copy(
        self, run: ServedRun, reader: PartReader, key: PartKey, name: str, fact: FileFacts, slot: Slot, limit: Throttle
    ) -> None:
        path = slot.folder / name
        if path not in self._made:  # an earlier process that wakes up may still write into its file
            with suppress(FileNotFoundError):
                self._files.remove(path)
        digest = xxhash.xxh3_128()
        descriptor = self._files.reserve(path, fact.size_bytes)
        self._made.add(path)
        try:
            for start in range(0, fact.size_bytes, CHUNK_BYTES):
                if not self._is_wanted(run):
                    raise DamagedError(f"{slot.folder} is not wanted any more")
                chunk = reader.read(key, name, start, min(CHUNK_BYTES, fact.size_bytes - start))
                limit.let_through(len(chunk))
                digest.update(chunk)
                self._files.write(descriptor, chunk)
        finally:
            self._files.close(descriptor)
        if digest.hexdigest() != fact.xxh3_128:
            raise DamagedError(f"{name} was changed while it was copied")

    def _is_wanted(self, run: ServedRun) -> bool:
        newest = self._run
        wanted = newest is not None and (newest.attempt, newest.copy_from) == (run.attempt, run.copy_from)
        return wanted and not self._stopped.is_set()


def _facts_in(ready: dict[int, Any]) -> Manifest | None:
    """Return the facts of all files in the ranks' records; None if a rank is filling the slot anew."""
    try:
        return {name: FileFacts(**fact) for said in ready.values() for name, fact in said["files"].items()}
    except (TypeError, KeyError):
        return None
