"""Make rows in this process, or in worker processes that own disjoint lanes and pass rows through shared memory.

Both give the same rows in the same order. A worker imports neither torch nor the user's program; it ignores SIGTERM,
SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 (the trainer decides when to end) and dies with its parent. The trainer gets its
error after the rows made before it. The memory has no name, so nothing can be left in /dev/shm. Nobody polls: both
sides block in `read` on a pipe.
Cost: one process start (about 0.3 s, without the tokenizer file), `prefetch_size` batches of memory, one copy per row.

A worker has a ring of slots. It writes a row with its state into the next slot, then a byte into the pipe `ready`; the
trainer copies the slot out and writes a byte into the pipe `free`. One byte per row says what the slot holds:

    worker    wait for a free slot, slot 0 <- row, ready <- R, slot 1 <- row, ready <- R, slot 2 <- error, ready <- E
    trainer   read ready: R, copy slot 0, free <- F;           R, copy slot 1, free <- F;  E: raise

End of file on either pipe means that the other side has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import orjson

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs
from lingua.data.blocked_source import DataError, OpenedData
from lingua.data.pack import Lane, LanePosition, PackedRow
from lingua.data.sources import open_data
from lingua.files import DiskError, RunError
from lingua.tokenizer import Tokenizer, build_tokenizer

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_ROW, _LOG, _ERROR = b"RLE"
_MAX_SLOTS = 32 << 10  # one byte each fits the pipes (64 KiB), so nobody ever blocks in a write
_MESSAGE_CHARS = 1200  # fits a slot's note even if JSON escapes every character
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


class Slots:
    """A ring of slots in anonymous shared memory: a note (JSON), S + n_views - 1 tokens, S document ids or none."""

    def __init__(self, descriptor: int, n_slots: int, args: DataArgs) -> None:
        self.n_slots, self._n_tokens = n_slots, args.row_tokens
        self._n_doc_ids = args.seq_len * args.doc_mask
        # Room for an error message, and for the position in each source; untouched pages cost nothing.
        self._note = 8192 + 512 * len(args.sources)
        self._slot_bytes = -(-(4 + self._note + 4 * (self._n_tokens + self._n_doc_ids)) // 64) * 64
        os.ftruncate(descriptor, n_slots * self._slot_bytes)
        self._memory = mmap.mmap(descriptor, n_slots * self._slot_bytes)

    def put(self, slot: int, note: bytes, row: PackedRow | None = None) -> None:
        at = slot % self.n_slots * self._slot_bytes
        if len(note) > self._note:
            raise RuntimeError(f"a loader state of {len(note)} bytes is more than the {self._note} that were expected")
        self._memory[at : at + 4] = len(note).to_bytes(4, "little")
        self._memory[at + 4 : at + 4 + len(note)] = note
        if row is not None:
            tokens, doc_ids = self._arrays(at)
            tokens[:] = row.tokens
            if row.doc_ids is not None:
                doc_ids[:] = row.doc_ids

    def note(self, slot: int) -> bytes:
        at = slot % self.n_slots * self._slot_bytes
        n = int.from_bytes(self._memory[at : at + 4], "little")
        return self._memory[at + 4 : at + 4 + n]

    def row(self, slot: int, number: int) -> PackedRow:
        tokens, doc_ids = self._arrays(slot % self.n_slots * self._slot_bytes)
        return PackedRow(tokens.copy(), doc_ids.copy() if self._n_doc_ids else None, number)

    def close(self) -> None:
        self._memory.close()

    def _arrays(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        both = np.frombuffer(self._memory, np.int32, self._n_tokens + self._n_doc_ids, at + 4 + self._note)
        return both[: self._n_tokens], both[self._n_tokens :]


# -- in the trainer ------------------------------------------------------------------------------------------------


class InProcess:
    """Makes rows in this process, on demand."""

    def __init__(self, data: OpenedData, tokenizer: Tokenizer, states: dict[int, dict[str, Any]]) -> None:
        self._bad, self.close = data.bad, data.close
        self._lanes = {lane: Lane(lane, data, tokenizer, state) for lane, state in states.items()}

    def next(self, lane: int) -> tuple[PackedRow, LanePosition]:
        """Return the lane's next row, and the lane's position after it."""
        made = self._lanes[lane]
        return made.next(), made.position()

    def counts(self) -> dict[str, int]:
        """Return the number of lines read, and of bad ones by kind."""
        return self._bad.counts()


class Workers:
    """Makes rows of this rank's lanes in n processes; lane number i of the rank belongs to worker i % n."""

    def __init__(
        self, args: DataArgs, n_lanes: int, lanes: list[int], first: int, states: dict[int, dict[str, Any]]
    ) -> None:
        """`first`: index in `lanes` of the lane that gives the next row."""
        n = min(args.num_workers, len(lanes))
        n_slots = min(-(-args.prefetch_size * args.batch_size // n), _MAX_SLOTS)
        self._of_lane = {lane: i % n for i, lane in enumerate(lanes)}
        turns = lanes[first:] + lanes[:first]
        self._workers: list[_Worker] = []
        try:
            for index in range(n):
                own = [lane for lane in turns if self._of_lane[lane] == index]
                setup = {
                    "parent": os.getpid(),
                    "die_with_parent": threading.current_thread() is threading.main_thread(),
                    "args": args.model_dump(mode="json"),
                    "n_lanes": n_lanes,
                    "states": [[lane, states[lane]] for lane in own],
                    "n_slots": n_slots,
                }
                self._workers.append(_Worker(index, args, setup))
        except BaseException:
            self.close()
            raise

    def next(self, lane: int) -> tuple[PackedRow, dict[str, Any]]:
        return self._workers[self._of_lane[lane]].next()

    def counts(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for worker in self._workers:
            total.update(worker.counts)
        return dict(total)

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Worker:
    """The trainer's end of one worker."""

    def __init__(self, index: int, args: DataArgs, setup: dict[str, Any]) -> None:
        self._index, self._slot, self._arrived, self._closed = index, 0, b"", False
        self.counts: dict[str, int] = {}
        memory = os.memfd_create("lingua-rows")
        self._slots = Slots(memory, setup["n_slots"], args)
        self._ready, ready = os.pipe()
        free, self._free = os.pipe()
        try:
            self.process = _start([ready, free, memory])
        except BaseException:
            self._release()
            raise
        finally:
            for descriptor in (memory, ready, free):
                os.close(descriptor)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stream:  # if it is dead, `next` reports it
            stream.write(orjson.dumps(setup))

    def next(self) -> tuple[PackedRow, dict[str, Any]]:
        while True:
            kind, slot = self._wait()
            note = orjson.loads(self._slots.note(slot))
            if kind == _ROW:
                number, state, self.counts = note
                row = self._slots.row(slot, number)
                self._give_back()
                return row, state
            if kind == _LOG:
                logger.log(note["level"], "%s", note["message"])
                self._give_back()
            else:
                self.close()
                raise error_in(note)

    def _wait(self) -> tuple[int, int]:
        """Wait until something arrives; return its kind and its slot."""
        if not self._arrived:
            if self._closed:
                raise RunError(f"loader worker {self._index} has ended; build a new loader")
            self._arrived = os.read(self._ready, 4096)
            if not self._arrived:
                self._raise_death()
        kind, self._arrived = self._arrived[0], self._arrived[1:]
        self._slot += 1
        return kind, self._slot - 1

    def _give_back(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; its slots are still valid
            os.write(self._free, b"F")

    def _raise_death(self) -> NoReturn:
        code = self.process.wait()
        self.close()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (memory may have run out: lower data.prefetch_size or num_workers)" if code == -9 else ""
        raise RunError(f"loader worker {self._index} (pid {self.process.pid}) {how}{hint}; start again to continue")

    def close(self) -> None:
        """Kill the worker at once: it has nothing to save."""
        if not self._closed:
            self._closed, self._arrived = True, b""
            self.process.kill()
            self.process.wait()
            self._release()

    def _release(self) -> None:
        self._slots.close()
        os.close(self._ready)
        os.close(self._free)


def _start(descriptors: list[int]) -> subprocess.Popen[bytes]:
    """Start a worker. Its signals are blocked until it ignores them itself."""
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # Each worker has one thread: the lanes are the parallelism.
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **single, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lingua.data.workers", *map(str, descriptors)],
            stdin=subprocess.PIPE,
            pass_fds=descriptors,
            env=environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_ERRORS: dict[str, type[Exception]] = {
    "data": DataError, "config": ConfigError, "os": OSError, "run": RunError, "bug": RuntimeError
}  # fmt: skip


def error_in(note: dict[str, Any]) -> Exception:
    """Return the error that a worker reports, with the same type and errno."""
    if note["errno"] is not None:
        return DiskError(note["message"], note["errno"], note["path"])
    return _ERRORS[note["kind"]](note["message"])


# -- in the worker -------------------------------------------------------------------------------------------------


class _Outbox(logging.Handler):
    """The worker's end: puts rows, log records and finally an error into free slots."""

    def __init__(self, ready: int, free: int, slots: Slots) -> None:
        super().__init__(logging.INFO)
        self._ready, self._free, self._slots = ready, free, slots
        self._slot, self._n_free = 0, slots.n_slots

    def put(self, kind: int, note: bytes, row: PackedRow | None = None) -> None:
        if self._n_free == 0:
            self._n_free = len(os.read(self._free, 4096))
            if self._n_free == 0:
                raise BrokenPipeError
        self._slots.put(self._slot, note, row)
        self._slot, self._n_free = self._slot + 1, self._n_free - 1
        os.write(self._ready, bytes([kind]))

    def emit(self, record: logging.LogRecord) -> None:
        self.put(_LOG, _note({"level": record.levelno, "message": record.getMessage()}))

    def fail(self, error: BaseException) -> None:
        kind = next((name for name, type_ in _ERRORS.items() if isinstance(error, type_)), "bug")
        message = str(error) if kind != "bug" else "in a loader worker: " + traceback.format_exc()[-_MESSAGE_CHARS:]
        of_disk = DiskError.of(error) if isinstance(error, OSError) else error
        number, path = getattr(of_disk, "errno", None), getattr(of_disk, "path", None)
        self.put(_ERROR, _note({"kind": kind, "message": message, "errno": number, "path": path}))


def _note(note: dict[str, Any]) -> bytes:
    note["message"] = str(note["message"]).encode("utf-8", "replace").decode()[: _MESSAGE_CHARS + 100]
    return orjson.dumps(note)


def _rows(args: DataArgs, n_lanes: int, states: dict[int, dict[str, Any]]) -> Iterator[tuple[PackedRow, bytes]]:
    """Yield the rows of the worker's lanes in turn, each with its note."""
    rows = InProcess(open_data(args, n_lanes), build_tokenizer(args.tokenizer), states)
    while True:
        for lane in states:
            row, position = rows.next(lane)
            yield row, orjson.dumps([row.number, position.state(), rows.counts()])


def main(ready: int, free: int, memory: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    given = sys.stdin.buffer.read()
    if not given:
        return  # the trainer failed before it sent the setup
    setup = orjson.loads(given)
    if setup["die_with_parent"]:  # the kernel goes by the thread that started us
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != setup["parent"]:
        return
    args = DataArgs.model_validate(setup["args"])
    outbox = _Outbox(ready, free, Slots(memory, setup["n_slots"], args))
    logging.getLogger().addHandler(outbox)
    try:
        for row, note in _rows(args, setup["n_lanes"], dict(setup["states"])):
            outbox.put(_ROW, note, row)
    except BrokenPipeError:
        return  # the trainer is gone
    except BaseException as error:
        outbox.fail(error)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
