"""The checkpoint service, one process per node: writes complete slots to the disk and publishes them. Torch-free.

    python -m lingua.checkpoint.shm.service RUN_DIR [--shm PATH] [--wait-s N] [--linger-s N]

It outlives the ranks of its node, never the job. If it is killed at any line, the next service or the next attempt
continues from the slots' marks. A disk that fails is tried again, later and later; a slot is given up only when its
step is published, when it does not hold what was staged, or when a newer attempt does not want it. The loop here never
touches the durable disk itself, so it can also report a disk that hangs.
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
from collections.abc import Callable, Sequence
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
    Region,
    Save,
    ServedRun,
    Slot,
    make_region,
    read_run,
)
from lingua.checkpoint.shm.drain import FencedError, NodeMissingError, Throttle
from lingua.files import DISK, Files, RunError

log = logging.getLogger(__name__ if __name__ != "__main__" else "lingua.checkpoint.shm.service")

POLL_S = 0.05
SILENT_S = 30.0
"""A disk that takes no byte for so long is reported."""
LONGEST_PAUSE_S = 60.0
"""Between two attempts on a disk that fails."""
ENDING_PAUSE_S = 4.0
"""The same, once the run ends: whoever waits has not much time."""
PATIENCE_S = 3600.0
"""How long a disk that fails is tried after the last rank has gone."""


# -- decisions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A complete slot that waits to be drained."""

    number: int
    step: int
    size_bytes: int


def next_to_drain(
    waiting: Sequence[Candidate], *, ending: bool, time_left_s: float | None, bytes_per_s: float | None
) -> int | None:
    """Which slot to drain next, by its number; None: none.

    In order of steps as long as the run goes on. When it ends only the newest matters, and then only if it fits into
    the time that is left: two halves are none. What was never measured is tried, and where the end did not come when
    it was expected, everything is.
    """
    if not waiting:
        return None
    chosen = max(waiting, key=lambda c: c.step) if ending else min(waiting, key=lambda c: c.step)
    if time_left_s is not None and bytes_per_s and 0 <= time_left_s < chosen.size_bytes / bytes_per_s:
        return None
    return chosen.number


def pause_s(attempt: int) -> float:
    """After the n-th failure in a row, n from 1: 1, 2, 4, ... up to a minute."""
    return min(LONGEST_PAUSE_S, 2.0 ** (attempt - 1))


# -- the loop ------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One slot on its way to the disk."""

    slot: Slot
    save: Save
    facts: Manifest
    run: ServedRun
    future: Future[bool]
    started_s: float
    throttle: Throttle
    writing: threading.Event = field(default_factory=threading.Event)
    """Set while it needs the disk for itself."""

    @property
    def size_bytes(self) -> int:
        return sum(fact.size_bytes for fact in self.facts.values())


class Service:
    """The service of one region. `tick` is one pass; `run` goes on until there is nothing left to do."""

    def __init__(
        self,
        region: Region,
        *,
        files: Files = DISK,
        executor: Executor | None = None,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        wait_s: float = 0.0,
        linger_s: float | None = None,
    ) -> None:
        """`wait_s`: for the first rank; `linger_s`: after the last one (None: as the run says)."""
        self.region = region
        self._files = files
        self._executor = executor or ThreadPoolExecutor(max_workers=8, thread_name_prefix="drain")
        self._now, self._wall_clock, self._sleep = now, wall_clock, sleep
        self._own = region.lock(SERVICE_LOCK)
        self._trainers = region.lock(TRAINER_LOCK)
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
        self._incarnation = 0
        self._fenced = -1
        self._events = Events(region)
        self._unsaid: deque[dict[str, Any]] = deque()
        self._saying = threading.Lock()

    def take(self) -> bool:
        """Become the region's service; False: there is one already, or the region has just been removed."""
        if not (self._own.take() and self.is_current()):
            return False
        self.region.recover(files=self._files)
        return True

    def is_current(self) -> bool:
        """Whether the region is still the one that was opened. Nobody else's may be touched by its name."""
        return self._own.is_current() and self._trainers.is_current()

    def run(self) -> None:
        """Serve until the ranks are gone and nothing is left to save."""
        while self.tick():
            self._sleep(POLL_S)
        self._leave()

    def tick(self) -> bool:
        """One pass over the region; False: there is nothing left to do here."""
        run = read_run(self.region)
        self._incarnation = run.incarnation if run else 0
        alone = self._trainers.holder() is None
        for job in [job for job in self._jobs if job.future.done()]:
            self._jobs.remove(job)
            self._settle(job)
        self._begin_retention()
        self._report_silence()
        self._tell_ranks()
        if run is not None:
            self._throttle_jobs(run, alone)
            self._begin_next(run, alone)
        return self._is_needed(run, alone)

    # -- one slot --------------------------------------------------------------------------------------------------

    def _begin_next(self, run: ServedRun, alone: bool) -> None:
        if run.ending:
            self._not_before_s = min(self._not_before_s, self._failed_at_s + ENDING_PAUSE_S)
        if any(job.writing.is_set() for job in self._jobs) or self._now() < self._not_before_s:
            return
        if self._fenced == run.incarnation:
            return
        waiting: dict[int, tuple[Slot, Save, Manifest]] = {}
        for slot in self.region.slots():
            if slot.state() == "staged" and (found := slot.complete()):
                if run.wants(found[0]):
                    waiting[slot.number] = (slot, *found)
                elif run.gives_up(found[0]):
                    slot.change("staged", "free", files=self._files)
        candidates = [
            Candidate(number, save.step, sum(fact.size_bytes for fact in facts.values()))
            for number, (_, save, facts) in waiting.items()
        ]
        left_s = None if run.deadline_s is None else run.deadline_s - self._wall_clock()
        ending = alone or run.ending
        number = next_to_drain(candidates, ending=ending, time_left_s=left_s, bytes_per_s=self._rate_bytes_per_s)
        if number is not None:
            self._begin(*waiting[number], run)

    def _begin(self, slot: Slot, save: Save, facts: Manifest, run: ServedRun) -> None:
        if not slot.change("staged", "draining", files=self._files):
            return  # a rank was faster and fills it anew
        if slot.complete() != (save, facts):  # it was even faster: what is marked now is another save, being filled
            slot.change("draining", "staged", files=self._files)
            return
        job = _Job(slot, save, facts, run, Future(), self._now(), Throttle(run.bytes_per_s))
        job.writing.set()
        self._progress = (self._now(), 0)
        self._jobs.append(job)
        job.future = self._executor.submit(self._store, job)

    def _store(self, job: _Job) -> bool:
        """In a thread: from the slot to the published checkpoint. Returns whether it was us who published it."""
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
        """What became of a slot."""
        step, start = job.save.step, job.run.incarnation
        try:
            published_here = job.future.result()
        except FencedError as error:
            self._fenced = start
            self._say("fenced", start, step=step, why=str(error))
            job.slot.change("draining", "staged", files=self._files)
        except (DamagedError, NodeMissingError) as error:
            self._say("lost", start, step=step, why=f"checkpoint {step} is lost, older ones are untouched: {error}")
            job.slot.change("draining", "free", files=self._files)
        except OSError as error:
            self._failures += 1
            again_s = pause_s(self._failures)
            self._failed_at_s = self._now()
            self._not_before_s = self._failed_at_s + again_s
            job.slot.change("draining", "staged", files=self._files)
            why = f"{publish.disk_sentence(error, job.run.root, job.size_bytes)}; it stays in memory"
            why = f"checkpoint {step}: {why}, next attempt in {again_s:.0f} s"
            self._say("failing", start, step=step, why=why, errno=error.errno)
        except BaseException:
            self._say("failed", start, step=step, why=traceback.format_exc())
            raise
        else:
            self._settled(job, published_here)

    def _settled(self, job: _Job, published_here: bool) -> None:
        if self._failures:
            self._failures = 0
            why = "the disk takes checkpoints again"
            self._say("recovered", job.run.incarnation, step=job.save.step, why=why)
        if job.save.node == 0:
            self._say_published(job)
        job.slot.change("draining", "free", files=self._files)  # last: else a death here would leave it unsaid
        if published_here:
            self._verified.add(job.save.step)
            self._to_retain = job.run

    def _say_published(self, job: _Job) -> None:
        seconds = self._now() - job.started_s
        rate = job.size_bytes / 1e9 / max(seconds, 1e-9)
        self._say(
            "published", job.run.incarnation,
            step=job.save.step, seconds=seconds, bytes=job.size_bytes, gb_per_s=rate,
        )  # fmt: skip

    # -- retention -------------------------------------------------------------------------------------------------

    def _begin_retention(self) -> None:
        """Once for all steps that were published while the last pass was at work."""
        if self._to_retain is not None and not self._is_retiring():
            run, self._to_retain = self._to_retain, None
            self._retiring = self._executor.submit(self._retire, run)

    def _is_retiring(self) -> bool:
        return self._retiring is not None and not self._retiring.done()

    def _retire(self, run: ServedRun) -> list[int]:
        """In a thread: delete what nobody needs any more."""
        try:
            held = pins.held_steps(run.run_dir, run.root, self._wall_clock())
        except (RunError, OSError) as error:
            why = f"no checkpoint is deleted, since the pins cannot be read: {error}"
            self._say("failing", run.incarnation, step=0, why=why)
            return []
        passage = layout.passage(run.root, run.incarnation)
        interrupted = {found.step for found in layout.temporaries(passage) if found.kind == "trash"}
        steps = retention.to_delete(
            layout.done_steps(run.root),
            run.args,
            verified=self._verified | set(run.verified),
            pinned=held.steps,
        )
        for step in [*sorted(interrupted), *steps]:
            try:
                if step in interrupted:
                    publish.resume(run.root, step, run.incarnation, files=self._files)
                else:
                    publish.retire(run.root, step, run.incarnation, files=self._files)
            except OSError as error:
                if isinstance(why := drain.why_missing(run), FencedError):
                    self._say("fenced", run.incarnation, step=step, why=str(why))
                    break
                self._say("failing", run.incarnation, step=0, why=f"cannot delete checkpoint {step}: {error}")
            else:
                self._verified.discard(step)
                why = {"why": pins.farewell(step)} if step in held.overdue else {}
                self._say("retired", run.incarnation, step=step, **why)
        return steps

    # -- the rest --------------------------------------------------------------------------------------------------

    def _throttle_jobs(self, run: ServedRun, alone: bool) -> None:
        hurry = alone or run.ending
        for job in self._jobs:
            job.throttle.limit_bytes_per_s = None if hurry else run.bytes_per_s

    def _report_silence(self) -> None:
        """Tell of a disk that takes nothing any more, and of its return."""
        writing = [job for job in self._jobs if job.writing.is_set()]
        done_bytes = sum(job.throttle.done_bytes for job in writing)
        since_s, last_bytes = self._progress
        if not writing or done_bytes != last_bytes:
            self._progress = (self._now(), done_bytes)
            if self._silent:
                self._silent = False
                self._say("recovered", self._incarnation, step=0, why="the disk answers again")
        elif self._now() - since_s > SILENT_S and not self._silent:
            self._silent = True
            step = writing[0].save.step
            why = f"the disk has taken nothing of checkpoint {step} for {SILENT_S:.0f} s; training goes on"
            self._say("silent", self._incarnation, step=step, why=why)

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
        unsaved = [slot for slot in self.region.slots() if slot.complete()]
        if unsaved and self._fenced != run.incarnation:
            return alone_s < PATIENCE_S
        linger_s = run.args.linger_s if self._linger_s is None else self._linger_s
        return alone_s < linger_s or self._now() < self._first_rank_until_s

    def _take_back_claims(self) -> None:
        """Ranks that died while they took the slot of a save that waits: it may still be complete."""
        if self._trainers.take():
            for slot in self.region.slots():
                slot.change("claimed", "staged", files=self._files)
            self._trainers.release()

    def _leave(self) -> None:
        """Give the memory back, unless it holds what could not be saved or ranks have come meanwhile."""
        if self._trainers.take() and self.is_current():  # from here on no rank comes before we are done
            run = read_run(self.region)
            unsaved = [found[0] for slot in self.region.slots() if (found := slot.complete())]
            if steps := [save.step for save in unsaved if run is not None and self._may_be_missed(save, run)]:
                log.error("leaving although steps %s are in memory only; a start on this node saves them", steps)
            else:
                self.region.remove(files=self._files)
        self.close()

    def _may_be_missed(self, save: Save, run: ServedRun) -> bool:
        """Whether what is in memory is worth keeping; also where a newer start shut us out, which may have died."""
        if self._fenced != run.incarnation:
            return True
        root = run.root
        newest = max(layout.done_steps(root), default=-1)
        return save.step > newest and (newest < 0 or publish.incarnation_of(root, newest) <= save.incarnation)

    def close(self) -> None:
        self._executor.shutdown(wait=False)
        self._trainers.close()
        self._own.close()

    def _say(self, kind: EventKind, incarnation: int, **facts: Any) -> None:
        """Tell the ranks of the start whom it concerns."""
        self._unsaid.append({"kind": kind, "incarnation": incarnation, "at_s": self._wall_clock(), **facts})
        self._tell_ranks()
        level = logging.INFO if kind in ("published", "recovered", "retired") else logging.ERROR
        log.log(level, "%s %s", kind, facts)

    def _tell_ranks(self) -> None:
        with self._saying:
            while self._unsaid:
                try:
                    self._events.send(self._unsaid[0])
                except OSError as error:  # the region's names have vanished: the disk gets its bytes
                    log.error("cannot tell the ranks %s: %s", self._unsaid[0], error)
                    return  # until the next pass
                self._unsaid.popleft()


# -- the process ---------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """Serve a run on this node; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lingua.checkpoint.shm.service",
        description="Take the checkpoints that a run stages in /dev/shm of this node to the disk. A run starts it "
        "itself; under Slurm it is a step of its own, begun before the ranks. Ends when the ranks are gone and all is "
        "saved. Deaf to SIGTERM, SIGUSR2, SIGINT and SIGHUP: kill -9 it if you must, nothing is lost by that.",
    )
    parser.add_argument("run_dir", type=Path, help="the run folder (dump_dir); made if it is not there yet")
    parser.add_argument("--shm", type=Path, default=SHM, help="memory file system (checkpoint.shm_path): %(default)s")
    parser.add_argument("--wait-s", type=float, default=0.0, help="seconds to wait for the first rank (%(default)s)")
    parser.add_argument("--linger-s", type=float, help="seconds to stay after the last (checkpoint.linger_s)")
    args = parser.parse_args(words)
    for deaf in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(deaf, signal.SIG_IGN)
    lines: SimpleQueue[logging.LogRecord] = SimpleQueue()
    form = "%(asctime)s %(levelname)s checkpoint service: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, handlers=[QueueHandler(lines)])
    listener = QueueListener(lines, logging.StreamHandler())  # the log lies on a disk that may hang
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
    """Be the service of a run on this node, unless there is one. Raises RunError, OSError."""
    while True:
        region = make_region(run_dir, shm)
        try:
            service = Service(region, wait_s=wait_s, linger_s=linger_s)
        except FileNotFoundError:
            continue  # one that leaves has just removed the region
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
    os._exit(code)  # at once: a thread that waits for the disk must not keep the next service from its lock
