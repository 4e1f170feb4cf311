"""Write one save from its slot to the disk and publish it, for the service. Torch-free, blocking.

Files are hashed while they are written and must match what the ranks hashed in memory. A step of several nodes is
published by node 0, once each of the others has reported on the disk that all of its files are written. A save that
failed at any line can be retried.

    incarnation-3/0000001500/                      the files of all nodes
    incarnation-3/part-0000001500-1.json           node 1's files are written: names and checksums
    incarnation-3/writer-0000001500-1.json         node 1's service is writing; touched as a heartbeat
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lingua.checkpoint import layout, publish
from lingua.checkpoint.publish import CHUNK_BYTES, DamagedError, FileFacts, Manifest
from lingua.checkpoint.shm.area import Save, ServedRun
from lingua.files import DISK, Buffer, Files, RunError, is_plain_file, read_json, write_json
from lingua.run.lock import Owner, certainly, owner_in, this_process
from lingua.run.place import copied_from, place_of

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Between two heartbeats of a service that writes a step."""
LOOK_S = 0.25
"""Between two looks at what other nodes have written."""
HANDOVER_S = 600.0
"""How long an attempt waits for an older one's service that is writing a step."""
SILENT_BEATS = 3
"""Missed heartbeats after which a service on another machine is considered dead."""


_WRITER = re.compile(r"writer-(\d{10})-\d+\.json", re.ASCII)


class FencedError(RunError):
    """A newer attempt of the run has closed this one's staging dir: its saves are not wanted any more."""


class NodeMissingError(RunError):
    """Another node did not write its part of a step."""


@dataclass(frozen=True)
class StagedSlot:
    """A complete slot that waits to be drained."""

    number: int
    step: int
    size_bytes: int


def next_to_drain(
    waiting: Sequence[StagedSlot], *, ending: bool, time_left_s: float | None, bytes_per_s: float | None
) -> int | None:
    """Choose the number of the slot to drain next, or None.

    While the run continues, it is the oldest step. When the run ends, only the newest, and only if it can be written in
    the time left: half a checkpoint is useless. Without a measured rate, or after the deadline, it is tried anyway.
    """
    if not waiting:
        return None
    chosen = max(waiting, key=lambda c: c.step) if ending else min(waiting, key=lambda c: c.step)
    if time_left_s is not None and bytes_per_s and 0 <= time_left_s < chosen.size_bytes / bytes_per_s:
        return None
    return chosen.number


@dataclass
class Throttle:
    """Limits the rate of all threads together. The limit may change at any time; None for no limit."""

    limit_bytes_per_s: float | None = None
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    done_bytes: int = 0
    """Bytes let through so far; shows progress."""
    _free_at_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def let_through(self, n_bytes: int) -> None:
        with self._lock:
            self.done_bytes += n_bytes
            if not self.limit_bytes_per_s:
                return
            begin_s = max(self._free_at_s, self.now())
            self._free_at_s = begin_s + n_bytes / self.limit_bytes_per_s
        while self.limit_bytes_per_s and (wait_s := begin_s - self.now()) > 0:
            self.sleep(min(wait_s, LOOK_S))


@contextmanager
def at_work(run: ServedRun, save: Save, *, files: Files = DISK) -> Iterator[None]:
    """Keep a heartbeat file while a step is being written. Raises OSError."""
    path = run.writer_file(save.step, save.node)
    write_json(path, asdict(this_process(*run.job)) | {"folder": asdict(place_of(run.root))}, files=files)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            with suppress(OSError):  # the write itself reports what is wrong with the disk
                os.utime(path)

    thread = threading.Thread(target=beat, name="writer-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError):
            files.remove(path)


def busy_writers(root: Path, before: int, me: Owner, beyond: int = -1) -> dict[Path, tuple[float, bool | None]]:
    """Return the heartbeat files of services of attempts before `before`, with (last beat, alive; None: unknown).

    `beyond`: ignore those that write this step or an earlier one.
    """
    found: dict[Path, tuple[float, bool | None]] = {}
    for attempt, staging_dir in layout.staging_dirs(root):
        if attempt >= before:
            continue
        for path in staging_dir.glob("writer-*.json"):
            if (step := _WRITER.match(path.name)) and int(step[1]) <= beyond:
                continue
            with suppress(OSError, RunError):  # it is just being removed
                record = read_json(path)
                alive = False if copied_from(record, root) else certainly(owner_in(record), me)
                if alive is not False:
                    found[path] = (path.stat().st_mtime, alive)
    return found


def await_older_writers(
    root: Path,
    attempt: int,
    me: Owner,
    *,
    beyond: int = -1,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait up to HANDOVER_S while a service of an older attempt is writing a step; on rank 0, before fencing it off.

    Waits for a service on this machine while it lives, for one elsewhere while its heartbeat continues. `beyond`: do
    not wait for this step or earlier ones, which are in memory and can be written again.
    """
    begun_s, seen = now(), {}
    while now() - begun_s < HANDOVER_S:
        busy = busy_writers(root, attempt, me, beyond)
        for path, (beat, alive) in list(busy.items()):
            if path not in seen:
                log.info("waiting for the checkpoint service of an earlier attempt, which is writing (%s)", path.name)
            if path not in seen or seen[path][0] != beat:
                seen[path] = (beat, now())
            if alive is None and now() - seen[path][1] > SILENT_BEATS * BEAT_S:
                del busy[path]
        if not busy:
            return
        sleep(LOOK_S)
    log.warning("an earlier attempt's checkpoint service has been writing for %.0f s; it is shut out", HANDOVER_S)


# -- one save ------------------------------------------------------------------------------------------------------


def store(
    slot: Path,
    save: Save,
    facts: Manifest,
    run: ServedRun,
    throttle: Throttle,
    *,
    on_written: Callable[[], None],
    seconds: Callable[[], float],
    files: Files = DISK,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Write this node's files of a save and publish its step; return whether it was this node that published.

    `on_written` is called when the files are on the disk, before other nodes are waited for. Raises OSError when the
    disk fails, and DamagedError, NodeMissingError or FencedError when there will be no such step.
    """
    try:
        require_ours(run)
        if is_published(save, run, files=files):
            return save.node == 0 and publish.attempt_of(run.root, save.step) == run.attempt
        with at_work(run, save, files=files):
            if not has_part(save, facts, run):
                write_files(slot, facts, save.step, run, throttle, files)
            on_written()
            return publish_step(save, facts, run, seconds, files=files, sleep=sleep)
    except (OSError, DamagedError, NodeMissingError) as error:
        if isinstance(why := why_missing(run), FencedError):
            raise why from error
        try:
            if isinstance(error, OSError):
                clear_away(save, facts, run, files=files)
            else:
                give_up(save, facts, run, str(error), files=files)
        except OSError as other:
            log.warning("cannot clear what is left of step %d: %s", save.step, other)
        raise


def write_files(
    slot: Path, facts: Manifest, step: int, run: ServedRun, throttle: Throttle, files: Files = DISK
) -> None:
    """Write this node's files of a step and make them durable.

    Raises OSError if the disk fails, DamagedError if the slot does not hold what its ranks reported, FencedError.
    """
    folder = run.folder(step)
    try:
        files.mkdir(folder)
    except FileNotFoundError:
        raise why_missing(run) from None

    def write(item: tuple[str, FileFacts, mmap.mmap | bytes]) -> tuple[int, Path, FileFacts]:
        name, expected, content = item
        parts = _chunks(memoryview(content), throttle)
        descriptor, written = publish.write_unsynced(folder / name, parts, direct_io=run.args.direct_io, files=files)
        if written != expected:
            files.close(descriptor)
            raise DamagedError(f"{slot / name} was changed after it was staged")
        return descriptor, folder / name, written

    opened = [(name, fact, mapped(slot / name, fact)) for name, fact in facts.items()]  # now: names may vanish later
    largest_first = sorted(opened, key=lambda item: -item[1].size_bytes)
    with ThreadPoolExecutor(max_workers=run.args.drain_threads, initializer=_step_back) as pool:
        writing = [pool.submit(write, item) for item in largest_first]
    unsynced = [future.result() for future in writing if future.exception() is None]
    try:
        for future in writing:
            future.result()
        while unsynced:  # one at a time: in parallel they took twice as long on ext4
            publish.sync_written(*unsynced.pop(), readback=run.args.verify == "readback", files=files)
    finally:
        for descriptor, *_ in unsynced:
            files.close(descriptor)
    files.fsync_dir(folder)


def _step_back() -> None:
    """Give this thread the lowest priority (on Linux niceness is per thread)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def mapped(path: Path, fact: FileFacts) -> mmap.mmap | bytes:
    """Return the content of a file in a slot. Raises OSError, DamagedError."""
    if not is_plain_file(path) or path.stat().st_size < fact.size_bytes:  # small files have room to spare
        raise DamagedError(f"{path} is not the file that was staged")
    if fact.size_bytes == 0:
        return b""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, fact.size_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _chunks(content: memoryview, throttle: Throttle) -> Iterator[Buffer]:
    for start in range(0, len(content), CHUNK_BYTES):
        chunk = content[start : start + CHUNK_BYTES]
        throttle.let_through(len(chunk))
        yield chunk


def require_ours(run: ServedRun) -> None:
    """Raise FencedError if a newer attempt, or another run, has the run's folder; OSError if that is gone."""
    if not run.staging_dir.exists():
        raise why_missing(run)
    run_id = None
    with suppress(RunError):  # it is damaged: no other run wrote it
        run_id = publish.read_run_id(run.root)
    if run_id not in (None, run.run_id):
        raise FencedError(f"{run.root} holds another run's checkpoints now: the folder of this one was replaced")


def why_missing(run: ServedRun) -> Exception:
    """Return the error that explains why a file in the staging dir was not found."""
    if run.root.exists() and not run.staging_dir.exists():
        return FencedError(f"{run.staging_dir} is gone: a newer attempt of this run has begun")
    return FileNotFoundError(2, "the run's folder is gone", str(run.root))


def is_published(save: Save, run: ServedRun, *, files: Files = DISK) -> bool:
    """Return whether a step is published. Finishes the last renames that a dead service of this attempt left undone.

    Raises OSError.
    """
    if save.node == 0:
        publish.resume(run.root, save.step, run.attempt, files=files)
    if not layout.done_mark(run.root, save.step).exists():
        return False
    files.fsync_dir(run.root)
    return True


def publish_step(
    save: Save,
    facts: Manifest,
    run: ServedRun,
    seconds: Callable[[], float],
    *,
    files: Files = DISK,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Publish a step whose files of this node are written; with several nodes, wait for them or for node 0.

    Returns whether this node published it. Raises OSError, FencedError, NodeMissingError.
    """
    if save.n_nodes > 1 and not has_part(save, facts, run):
        _write_part(save, run, {"files": {name: asdict(fact) for name, fact in facts.items()}}, files)
    if save.node > 0:
        _await_mark(save, run, sleep)
        return False
    everything = facts if save.n_nodes == 1 else _await_parts(save, run, sleep)
    publish.publish(run.root, save.step, run.attempt, everything, run_id=run.run_id, seconds=seconds(), files=files)
    _remove_parts(save, run, range(save.n_nodes), files)
    return True


def _loss_in(path: Path) -> str | None:
    """Return why a node has given up its part of a step, or None if it has not."""
    part = _read_part_file(path)
    return part.get("lost") if part else None


def _read_part_file(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (FileNotFoundError, RunError):  # not there, or not readable: a crash of the file server may cut it short
        return None


def _write_part(save: Save, run: ServedRun, what: dict[str, Any], files: Files) -> None:
    part = {"incarnation": save.attempt, "step": save.step, **what}
    write_json(run.part_file(save.step, save.node), part, files=files)


def has_part(save: Save, facts: Manifest, run: ServedRun) -> bool:
    """Return whether this node has already reported its files as written, after which nobody may touch them.

    Raises NodeMissingError if there will be no such step.
    """
    if save.n_nodes == 1:
        return False
    _read_part(save, run, 0)
    return _read_part(save, run, save.node) == facts


def _await_parts(save: Save, run: ServedRun, sleep: Callable[[float], None]) -> Manifest:
    everything: Manifest = {}
    missing = set(range(save.n_nodes))
    for _ in range(int(run.args.node_timeout_s / LOOK_S) + 1):
        for node in sorted(missing):
            part_facts = _read_part(save, run, node)
            if part_facts is not None:
                everything |= part_facts
                missing.discard(node)
        if not missing:
            return everything
        if not run.staging_dir.exists():
            raise why_missing(run)
        sleep(LOOK_S)
    raise NodeMissingError(
        f"node {min(missing)} of {save.n_nodes} has not written its part of checkpoint {save.step} within "
        f"{run.args.node_timeout_s:.0f} s"
    )


def _read_part(save: Save, run: ServedRun, node: int) -> Manifest | None:
    part = _read_part_file(run.part_file(save.step, node))
    if part is None or (part["incarnation"], part["step"]) != (save.attempt, save.step):
        return None  # or left by an older attempt for the same step
    if "lost" in part:
        raise NodeMissingError(f"on node {node}, {part['lost']}")
    return {name: FileFacts(**fact) for name, fact in part["files"].items()}


def _await_mark(save: Save, run: ServedRun, sleep: Callable[[float], None]) -> None:
    mark = layout.done_mark(run.root, save.step)
    for _ in range(int(2 * run.args.node_timeout_s / LOOK_S) + 1):  # longer than node 0 waits for us
        if mark.exists():
            return
        is_settled = not run.part_file(save.step, save.node).exists()
        if not run.staging_dir.exists():
            raise why_missing(run)
        _read_part(save, run, 0)  # raises if node 0 has given up
        if is_settled:
            return  # published, and meanwhile deleted by retention
        sleep(LOOK_S)
    raise NodeMissingError(
        f"node 0 has not published checkpoint {save.step} within {2 * run.args.node_timeout_s:.0f} s"
    )


def clear_away(save: Save, facts: Manifest, run: ServedRun, *, files: Files = DISK) -> None:
    """Remove this node's files of a failed save, before it is retried. Raises OSError."""
    if layout.done_mark(run.root, save.step).exists():
        return  # published; only the last fsync has failed
    if save.n_nodes == 1:
        publish.abandon(run.root, save.step, run.attempt, files=files)
    elif not run.part_file(save.step, save.node).exists():
        _remove_own(save, facts, run, files)


def give_up(save: Save, facts: Manifest, run: ServedRun, why: str, *, files: Files = DISK) -> None:
    """Report to the other nodes that there will be no such step. Node 0 cleans up for all. Raises OSError."""
    if save.n_nodes > 1:
        _write_part(save, run, {"lost": why}, files)
    if save.node == 0:
        publish.abandon(run.root, save.step, run.attempt, files=files)
        _remove_parts(save, run, range(1, save.n_nodes), files)
    elif _loss_in(run.part_file(save.step, 0)):  # otherwise node 0 may still publish what we have written
        _remove_own(save, facts, run, files)


def _remove_own(save: Save, facts: Manifest, run: ServedRun, files: Files) -> None:
    for name in facts:
        with suppress(FileNotFoundError):
            files.remove(run.folder(save.step) / name)


def _remove_parts(save: Save, run: ServedRun, nodes: Iterable[int], files: Files) -> None:
    for node in nodes if save.n_nodes > 1 else ():
        with suppress(FileNotFoundError):
            files.remove(run.part_file(save.step, node))
