"""The checkpoint service, one process per node: writes complete slots to the disk and publishes them. Torch-free.

    python -m lingua.checkpoint.shm.service RUN_DIR [--shm PATH] [--wait-s N] [--linger-s N]

It outlives the ranks of its node, never the job. If it is killed at any line, the next service or the next attempt
continues from the slots' marks. A failing disk is retried with backoff; a slot is given up only when its step is
published, when it does not hold what was staged, or when a newer attempt does not want it. The loop here never touches
the durable disk itself, so it can also report a disk that hangs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lingua.checkpoint import layout, pins, publish, retention
from lingua.checkpoint.publish import DamagedError, Manifest
from lingua.checkpoint.shm import drain
from lingua.checkpoint.shm.area import (
    SERVICE_LOCK,
    SHM,
    TRAINER_LOCK,
    EventKind,
    Events,
    Save,
    ServedRun,
    ShmArea,
    Slot,
    make_area,
    read_run,
)
from lingua.checkpoint.shm.drain import FencedError, NodeMissingError, StagedSlot, Throttle, next_to_drain
from lingua.checkpoint.shm.part_server import PartServer, keep_serving
from lingua.checkpoint.shm.replica import Copier
from lingua.files import DISK, Files, RunError

log = logging.getLogger(__name__ if __name__ != "__main__" else "lingua.checkpoint.shm.service")

POLL_S = 0.05
SILENT_S = 30.0
"""A disk that accepts no byte for this long is reported."""
LONGEST_PAUSE_S = 60.0
"""Longest pause between two saves to a disk that fails."""
ENDING_PAUSE_S = 4.0
"""The same when the run ends, since the ranks wait."""
PATIENCE_S = 3600.0
"""How long a failing disk is tried again after the last rank has left."""


# -- decisions -----------------------------------------------------------------------------------------------------


def pause_s(n_failures: int) -> float:
    """Return the pause after the n-th failure in a row, n from 1: 1, 2, 4, ... up to a minute."""
    return min(LONGEST_PAUSE_S, 2.0 ** (n_failures - 1))


# -- the loop ------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One slot that is being drained."""

    slot: Slot
    save: Save
    facts: Manifest
    run: ServedRun
    future: Future[bool]
    started_s: float
    throttle: Throttle
    writing: threading.Event = field(default_factory=threading.Event)
    """Set while it writes; cleared while it waits for other nodes."""

    @property
    def size_bytes(self) -> int:
        return sum(fact.size_bytes for fact in self.facts.values())


class Service:
    """The service of one area. `tick` is one pass; `run` repeats it until nothing is left to do."""

    def __init__(
        self,
        area: ShmArea,
        *,
        files: Files = DISK,
        executor: Executor | None = None,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        wait_s: float = 0.0,
        linger_s: float | None = None,
    ) -> None:
        """`wait_s`: for the first rank; `linger_s`: after the last one (None: from the run's config)."""
        self.area = area
        self._files = files
        self._executor = executor or ThreadPoolExecutor(max_workers=8, thread_name_prefix="drain")
        self._now, self._wall_clock, self._sleep = now, wall_clock, sleep
        self._n_writes_before = area.session.n_writes()
        self._own = area.lock(SERVICE_LOCK)
        self._trainers = area.lock(TRAINER_LOCK)
        self._jobs: list[_Job] = []
        self._to_retain: ServedRun | None = None
        self._retiring: Future[list[int]] | None = None
        self._verified: set[int] = set()
        self._rate_bytes_per_s: float | None = None
        self._failures = 0
        self._not_before_s = self._failed_at_s = 0.0
        self._alone_since_s: float | None = None
        self._first_rank_until_s = now() + wait_s
        self._linger_s = linger_s
        self._progress = (0.0, 0)
        self._silent = False
        self._attempt = 0
        self._fenced = -1
        self._server: PartServer | None = None
        self._copier = Copier(area, self._report, files=files, now=now, sleep=sleep)
        self._events = Events(area)
        self._unsent: deque[dict[str, Any]] = deque()
        self._sending = threading.Lock()

    def take(self) -> bool:
        """Become the area's service; return False if there is one already, or the area has just been removed."""
        if not (self._own.take() and self.is_current()):
            return False
        self.area.recover(files=self._files)
        return True

    def is_current(self) -> bool:
        """Return whether the area is still the one that was opened; another one of that name must not be touched."""
        return self._own.is_current() and self._trainers.is_current()

    def run(self) -> None:
        """Serve until the ranks have left and nothing is left to save. Report a bug to the ranks."""
        try:
            while self.tick():
                self._sleep(POLL_S)
            self._leave()
        except (RunError, OSError):
            raise
        except BaseException:
            self._report("failed", self._attempt, step=0, why=traceback.format_exc())
            raise

    def tick(self) -> bool:
        """Make one pass over the area; return False when nothing is left to do."""
        run = self._read_run()
        self._attempt = run.attempt if run else 0
        alone = self._trainers.holder() is None
        for job in [job for job in self._jobs if job.future.done()]:
            self._jobs.remove(job)
            self._settle(job)
        self._begin_retention()
        self._report_silence()
        self._send_events()
        if run is not None:
            self._server = keep_serving(self._server, self.area, run)
            self._copier.follow(run)
            self._throttle_jobs(run, alone)
            self._begin_next(run, alone)
        return self._is_needed(run, alone)

    def _read_run(self) -> ServedRun | None:
        """Read the run; None before a rank has described it. Raises RunError if ranks of another version have."""
        n_writes = self.area.session.n_writes()  # first: a rank may write between the two
        try:
            return read_run(self.area)
        except RunError:
            if n_writes != self._n_writes_before:
                raise
            return None  # an earlier version left it; the first rank replaces it

    # -- one slot --------------------------------------------------------------------------------------------------

    def _begin_next(self, run: ServedRun, alone: bool) -> None:
        if run.ending:
            self._not_before_s = min(self._not_before_s, self._failed_at_s + ENDING_PAUSE_S)
        if any(job.writing.is_set() for job in self._jobs) or self._now() < self._not_before_s:
            return
        if self._fenced == run.attempt:
            return
        waiting: dict[int, tuple[Slot, Save, Manifest]] = {}
        for slot in self.area.slots():
            if slot.state() == "staged" and (found := slot.complete()):
                if run.wants(found[0]):
                    waiting[slot.number] = (slot, *found)
                elif run.gives_up(found[0]):
                    slot.change("staged", "free", files=self._files)
        candidates = [
            StagedSlot(number, save.step, sum(fact.size_bytes for fact in facts.values()))
            for number, (_, save, facts) in waiting.items()
        ]
        left_s = None if run.deadline_s is None else run.deadline_s - self._wall_clock()
        ending = alone or run.ending
        number = next_to_drain(candidates, ending=ending, time_left_s=left_s, bytes_per_s=self._rate_bytes_per_s)
        if number is not None:
            self._begin(*waiting[number], run)

    def _begin(self, slot: Slot, save: Save, facts: Manifest, run: ServedRun) -> None:
        if not slot.change("staged", "draining", files=self._files):
            return  # a rank was faster and fills it again
        found = slot.complete()
        if found != (save, facts):  # a rank was even faster: this is another save, being filled
            slot.change("draining", "staged", files=self._files)
            return
        job = _Job(slot, save, facts, run, Future(), self._now(), Throttle(run.bytes_per_s))
        job.writing.set()
        self._progress = (self._now(), 0)
        self._jobs.append(job)
        job.future = self._executor.submit(self._store, job)

    def _store(self, job: _Job) -> bool:
        """In a thread: write and publish a save; return whether this node published it."""
        try:
            return drain.store(
                job.slot.folder,
                job.save,
                job.facts,
                job.run,
                job.throttle,
                on_written=lambda: self._written(job),
                seconds=lambda: self._now() - job.started_s,
                files=self._files,
                sleep=self._sleep,
            )
        finally:
            job.writing.clear()

    def _written(self, job: _Job) -> None:
        if job.save.n_nodes > 1:
            job.writing.clear()  # from here on it waits for others
        if job.throttle.limit_bytes_per_s is None:
            self._rate_bytes_per_s = job.size_bytes / max(self._now() - job.started_s, 1e-9)

    def _settle(self, job: _Job) -> None:
        """Report the outcome of a job and free its slot, or stage it again."""
        step, attempt = job.save.step, job.run.attempt
        try:
            published_here = job.future.result()
        except FencedError as error:
            self._fenced = attempt
            self._report("fenced", attempt, step=step, why=str(error))
            job.slot.change("draining", "staged", files=self._files)
        except (DamagedError, NodeMissingError) as error:
            self._report(
                "lost", attempt, step=step, why=f"checkpoint {step} is lost, older ones are untouched: {error}"
            )
            job.slot.change("draining", "free", files=self._files)
        except OSError as error:
            self._failures += 1
            again_s = pause_s(self._failures)
            self._failed_at_s = self._now()
            self._not_before_s = self._failed_at_s + again_s
            job.slot.change("draining", "staged", files=self._files)
            why = f"{publish.disk_sentence(error, job.run.root, job.size_bytes)}; it stays in memory"
            why = f"checkpoint {step}: {why}, next attempt in {again_s:.0f} s"
            self._report("failing", attempt, step=step, why=why, errno=error.errno)
        else:
            self._settled(job, published_here)

    def _settled(self, job: _Job, published_here: bool) -> None:
        if self._failures:
            self._failures = 0
            why = "the disk accepts checkpoints again"
            self._report("recovered", job.run.attempt, step=job.save.step, why=why)
        if job.save.node == 0:
            self._report_published(job)
        job.slot.change("draining", "free", files=self._files)  # last, or a death before the report would lose it
        if published_here:
            self._verified.add(job.save.step)
            self._to_retain = job.run

    def _report_published(self, job: _Job) -> None:
        seconds = self._now() - job.started_s
        rate = job.size_bytes / 1e9 / max(seconds, 1e-9)
        self._report(
            "published", job.run.attempt,
            step=job.save.step, seconds=seconds, bytes=job.size_bytes, gb_per_s=rate,
        )  # fmt: skip

    # -- retention -------------------------------------------------------------------------------------------------

    def _begin_retention(self) -> None:
        """Start one pass for all steps that were published during the last one."""
        if self._retiring is not None and self._retiring.done():
            ended, self._retiring = self._retiring, None
            ended.result()  # raises a bug
        if self._to_retain is not None and not self._is_retiring():
            run, self._to_retain = self._to_retain, None
            self._retiring = self._executor.submit(self._retire, run)

    def _is_retiring(self) -> bool:
        return self._retiring is not None and not self._retiring.done()

    def _retire(self, run: ServedRun) -> list[int]:
        """In a thread: apply retention; return the deleted steps."""
        try:
            held = pins.held_steps(run.run_dir, run.root, self._wall_clock())
        except (RunError, OSError) as error:
            why = f"no checkpoint is deleted, since the pins cannot be read: {error}"
            self._report("failing", run.attempt, step=0, why=why)
            return []
        staging_dir = layout.staging_dir(run.root, run.attempt)
        interrupted = {found.step for found in layout.temporaries(staging_dir) if found.kind == "trash"}
        steps = retention.to_delete(
            layout.done_steps(run.root),
            run.args,
            verified=self._verified | set(run.verified),
            pinned=held.steps,
        )
        for step in [*sorted(interrupted), *steps]:
            try:
                if step in interrupted:
                    publish.resume(run.root, step, run.attempt, files=self._files)
                else:
                    publish.retire(run.root, step, run.attempt, files=self._files)
            except OSError as error:
                if isinstance(why := drain.why_missing(run), FencedError):
                    self._report("fenced", run.attempt, step=step, why=str(why))
                    break
                self._report("failing", run.attempt, step=0, why=f"cannot delete checkpoint {step}: {error}")
            else:
                self._verified.discard(step)
                why = {"why": pins.overdue_message(step)} if step in held.overdue else {}
                self._report("retired", run.attempt, step=step, **why)
        return steps

    # -- the rest --------------------------------------------------------------------------------------------------

    def _throttle_jobs(self, run: ServedRun, alone: bool) -> None:
        hurry = alone or run.ending
        for job in self._jobs:
            job.throttle.limit_bytes_per_s = None if hurry else run.bytes_per_s

    def _report_silence(self) -> None:
        """Report a disk that has stopped accepting data, and its recovery."""
        writing = [job for job in self._jobs if job.writing.is_set()]
        done_bytes = sum(job.throttle.done_bytes for job in writing)
        since_s, last_bytes = self._progress
        if not writing or done_bytes != last_bytes:
            self._progress = (self._now(), done_bytes)
            if self._silent:
                self._silent = False
                self._report("recovered", self._attempt, step=0, why="the disk answers again")
        elif self._now() - since_s > SILENT_S and not self._silent:
            self._silent = True
            step = writing[0].save.step
            why = f"the disk has accepted nothing of checkpoint {step} for {SILENT_S:.0f} s; training continues"
            self._report("silent", self._attempt, step=step, why=why)

    def _is_needed(self, run: ServedRun | None, alone: bool) -> bool:
        if not alone:
            self._alone_since_s = None
            self._first_rank_until_s = 0.0
            return True
        if self._jobs or self._to_retain is not None or self._is_retiring():
            return True
        if run is None:
            return self._now() < self._first_rank_until_s
        if self._alone_since_s is None:
            self._alone_since_s = self._now()
            self._take_back_claims()
        alone_s = self._now() - self._alone_since_s
        unsaved = [slot for slot in self.area.slots() if slot.complete()]
        if unsaved and self._fenced != run.attempt:
            return alone_s < PATIENCE_S
        linger_s = run.args.linger_s if self._linger_s is None else self._linger_s
        return alone_s < linger_s or self._now() < self._first_rank_until_s

    def _take_back_claims(self) -> None:
        """Stage slots again that dead ranks had claimed: their save may still be complete."""
        if self._trainers.take():
            for slot in self.area.slots():
                slot.change("claimed", "staged", files=self._files)
            self._trainers.release()

    def _leave(self) -> None:
        """Free the memory, unless it holds an unsaved snapshot or ranks have entered meanwhile."""
        if self._trainers.take() and self.is_current():  # from here on no rank enters before we are done
            run = read_run(self.area)
            unsaved = [found[0] for slot in self.area.slots() if (found := slot.complete())]
            if steps := [save.step for save in unsaved if run is not None and self._may_be_missed(save, run)]:
                log.error("leaving although steps %s are only in memory; the next attempt here saves them", steps)
            else:
                self._copier.stop()
                self.area.remove(files=self._files)
        self.close()

    def _may_be_missed(self, save: Save, run: ServedRun) -> bool:
        """Return whether a save must be kept, even after a newer attempt fenced us off: that one may have died."""
        if self._fenced != run.attempt:
            return True
        root = run.root
        newest = max(layout.done_steps(root), default=-1)
        return save.step > newest and (newest < 0 or publish.attempt_of(root, newest) <= save.attempt)

    def close(self) -> None:
        self._executor.shutdown(wait=False)
        self._trainers.close()
        self._own.close()

    def _report(self, kind: EventKind, attempt: int, **facts: Any) -> None:
        """Send an event to the ranks of an attempt, and log it."""
        self._unsent.append({"kind": kind, "incarnation": attempt, "at_s": self._wall_clock(), **facts})
        self._send_events()
        level = logging.INFO if kind in ("published", "recovered", "retired", "copied") else logging.ERROR
        log.log(level, "%s %s", kind, facts)

    def _send_events(self) -> None:
        with self._sending:
            while self._unsent:
                try:
                    self._events.send(self._unsent[0])
                except OSError as error:  # the area's names have vanished; draining continues
                    log.error("cannot send the ranks %s: %s", self._unsent[0], error)
                    return  # until the next pass
                self._unsent.popleft()


# -- the process ---------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """Serve a run on this node; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lingua.checkpoint.shm.service",
        description="Write the checkpoints that a run stages in /dev/shm of this node to the disk. A run starts it; "
        "under Slurm it is a job step that starts before the ranks. Ends when the ranks have left and all is saved. "
        "Ignores SIGTERM, SIGUSR1, SIGUSR2, SIGINT and SIGHUP. kill -9 ends it, and nothing is lost by that.",
    )
    parser.add_argument("run_dir", type=Path, help="the run folder (dump_dir); made if it is not there yet")
    parser.add_argument("--shm", type=Path, default=SHM, help="memory file system (checkpoint.shm_path): %(default)s")
    parser.add_argument("--wait-s", type=float, default=0.0, help="seconds to wait for the first rank (%(default)s)")
    parser.add_argument("--linger-s", type=float, help="seconds to stay after the last (checkpoint.linger_s)")
    args = parser.parse_args(words)
    for ignored in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    lines: SimpleQueue[logging.LogRecord] = SimpleQueue()
    form = "%(asctime)s %(levelname)s checkpoint service: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, handlers=[QueueHandler(lines)])
    listener = QueueListener(lines, logging.StreamHandler())  # the log is on a disk that may hang
    listener.start()
    code = 0
    try:
        serve(args.run_dir, args.shm, args.wait_s, args.linger_s)
    except (RunError, OSError) as error:
        log.error("%s", error)
        code = 1
    except Exception:
        log.exception("the checkpoint service has a bug")
        code = 1
    listener.stop()
    return code


def serve(run_dir: Path, shm: Path, wait_s: float, linger_s: float | None = None) -> None:
    """Run the service of a run on this node, unless there is one. Raises RunError, OSError."""
    while True:
        area = make_area(run_dir, shm)
        try:
            service = Service(area, wait_s=wait_s, linger_s=linger_s)
        except FileNotFoundError:
            continue  # a service that leaves has just removed the area
        if service.take():
            service.run()
            return
        is_current = service.is_current()
        service.close()
        if is_current:
            log.info("%s has a service on this node already", run_dir)
            return


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # at once: a thread that waits for the disk must not hold the lock that the next service needs
