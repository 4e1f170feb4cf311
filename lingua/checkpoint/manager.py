"""The training loop's interface to checkpoints: when one is due, save, find the newest good one, load.

Rank 0 decides for all ranks. A save that fails (full disk, quota, a broken disk) costs that checkpoint and nothing
else: its remains are removed, older ones stay, and all ranks get the same report. The last save of a run is retried a
few times if the fault may be transient. Every rank calls every method at the same step, except those marked "Local".
`sync_writer.py` writes to the disk while training waits, `shm/coordinator.py` stages in memory.

    manager = CheckpointManager(args.checkpoint, run_dir, device=device, lock=lock)
    step = manager.resume(state)               # from memory, or the newest that verifies; damaged ones are set aside
    manager.prepare(state)                     # before step 1: plan the files, check the room
    ...
    manager.before_update(); optimizer.step()
    if manager.is_due(step): report = manager.save(step, state)
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lingua.checkpoint import dcp, documents, layout, pins, publish, retention
from lingua.checkpoint.capacity import DiskRoom
from lingua.checkpoint.restore import Restorer
from lingua.checkpoint.shm import drain
from lingua.checkpoint.shm.area import ServedRun
from lingua.checkpoint.shm.coordinator import LEAVE_S, Coordinator, NoSlotError
from lingua.checkpoint.shm.decisions import Newest, Point
from lingua.checkpoint.shm.service_client import StartService, start_service
from lingua.checkpoint.state import Tensors, TrainState, tensors_of
from lingua.checkpoint.sync_writer import DirectWriter
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.distributed.process_group import Ranks
from lingua.files import DISK, DiskError, Files, RunError, free_bytes, human_bytes, make_folder, write_whole
from lingua.run.failure import RankError
from lingua.run.lock import RunLock, this_process
from lingua.scheduler import this_job

log = logging.getLogger(__name__)

FINAL_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses before the last save is tried again on a disk that refuses it."""


@dataclass
class SaveReport:
    """Outcome of a save; identical on all ranks."""

    step: int
    path: Path
    published: bool
    """It is on the disk, verified and marked."""
    staged: bool = False
    """It is complete in memory; the checkpoint service writes it to the disk."""
    error: str | None = None
    """One sentence: why there is no checkpoint of this step."""
    size_bytes: int = 0
    seconds: float = 0.0
    """Time that the caller waited."""
    synchronous: bool = False
    """The caller waited for the whole copy: to the disk, or to memory that could not be pinned (on rank 0)."""
    deleted: list[int] = field(default_factory=list)
    """Steps that retention deleted afterwards, or with async_cleanup will delete. Empty if the service does it."""


class CheckpointManager:
    """Checkpoints of one run. `lock` (rank 0's) gives the number of the attempt and is checked before each publish."""

    def __init__(
        self,
        args: CheckpointArgs,
        run_dir: Path,
        *,
        device: torch.device | str = "cpu",
        lock: RunLock | None = None,
        files: Files = DISK,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        start_service: StartService = start_service,
    ) -> None:
        self.args = args
        self.run_dir = Path(run_dir)
        self.root = Path(args.path) if args.path else self.run_dir / layout.CHECKPOINTS
        self.device = torch.device(device)
        self._lock = lock
        self._files = files
        self._ranks = Ranks()
        self._plan: dcp.WritePlan | None = None
        self._total_bytes = 0
        self._cleaner = ThreadPoolExecutor(max_workers=1) if args.async_cleanup else None
        self._cleaning: Future[None] | None = None
        self._now, self._wall_clock, self._sleep = now, wall_clock, sleep
        self._published_at_s = self._safe_until_s = now()
        """When the newest checkpoint was published and its snapshot taken; at first, when this attempt began."""
        self._staged_at_s: dict[int, float] = {}
        self._n_uncopied = 0
        """Number of failed copies of another node's part."""
        self._last_save: dict[str, float] = {}
        self.published_since: list[dict[str, float]] = []
        """Step and seconds of each checkpoint that the service published since the caller last emptied this list."""
        self._restorer = Restorer(self.run_dir, self.root, self._ranks, files, args)
        self.attempt, run_id, newest_done = self._ranks.from_main(self._look)
        self._background = self._join_background(run_id, start_service)
        self._point: Point | None = None
        """The snapshot in memory that `resume` tries first."""
        if self._background:
            self._background.find_unsaved(newest_done)
            self._point = self._background.resume_point(newest_done)
        newest_done = self._ranks.from_main(self._open_staging_dir)
        if self._background:
            self._background.open()
            self._point = self._background.resume_point(newest_done)
        self._published = self._ranks.from_main(lambda: set(layout.done_steps(self.root)))
        self._direct = DirectWriter(
            self.root,
            self.attempt,
            self._ranks,
            files,
            direct_io=args.direct_io,
            readback=args.verify == "readback",
            run_id=run_id,
            check_owner=self._check_owner,
        )

    # -- start -----------------------------------------------------------------------------------------------------

    def _look(self) -> tuple[int, str, Newest]:
        """On rank 0: return (attempt, id of the run, the newest checkpoint)."""
        make_folder(self.root, "checkpoint.path" if self.args.path else "dump_dir")
        if self._lock is not None:
            self._lock.bind(self.root)
        done = layout.done_steps(self.root)
        if (run_id := documents.read_run_id(self.root)) is None:
            run_id = (self._id_of(done[-1]) if done else None) or secrets.token_hex(8)
            write_whole(self.root / layout.RUN_ID, run_id)
        return self._lock.attempt if self._lock else 0, run_id, self._newest_done()

    def _newest_done(self) -> Newest:
        if not (done := layout.done_steps(self.root)):
            return Newest()
        mark = publish.mark_facts(self.root, done[-1])
        return Newest(done[-1], mark.get("incarnation", 0), mark.get("manifest_xxh3_128", ""))

    def _id_of(self, step: int) -> str | None:
        """Return the run id in a checkpoint's manifest, for a folder that was assembled by hand."""
        try:
            return publish.read_manifest_document(layout.folder(self.root, step)).run_id
        except publish.DamagedError:
            return None

    def _open_staging_dir(self) -> Newest:
        """Fence off earlier attempts; return the newest checkpoint."""
        if self.args.async_save_mode:
            me, beyond = this_process(*this_job(os.environ)), -1 if self._point is None else self._point.step
            drain.await_older_writers(self.root, self.attempt, me, beyond=beyond)
        try:
            publish.open_staging_dir(self.root, self.attempt, files=self._files)
            self._check_owner()  # last: an attempt that takes over later closes the staging dir
        except OSError as error:
            raise publish.disk_error(error, self.root, 0) from error
        return self._newest_done()

    def _join_background(self, run_id: str, start: StartService) -> Coordinator | None:
        if self.args.async_save_mode is None:
            return None
        run_dir, root = Path(os.path.realpath(self.run_dir)), Path(os.path.realpath(self.root))
        run = ServedRun(run_id, run_dir, root, self.attempt, self.args, this_job(os.environ))
        try:
            return Coordinator(run, self._ranks, self.device, files=self._files, start=start)
        except NoSlotError as error:
            self._warn_synchronous(str(error), strict=self.args.strict)
            return None

    def prepare(self, state: TrainState, n_steps: int = 0) -> int:
        """Plan the files, check that they fit on the disk and in memory, and return the bytes of a checkpoint.

        `n_steps`: steps of the whole run, whose milestones must all fit. Raises RunError if the disk is too small.
        """
        self._make_plan(tensors_of(state))
        self._ranks.from_main(lambda: self._check_room(n_steps))
        return self._total_bytes

    def _make_plan(self, tensors: Tensors) -> dcp.WritePlan:
        if self._plan is not None and self._plan.fits(tensors.by_name):
            return self._plan
        rank = self._ranks.rank
        local_plans = self._ranks.gather(dcp.local_plan(tensors.by_name, is_coordinator=rank == 0))
        plans, metadata = self._ranks.from_main(lambda: dcp.global_plan(local_plans, tensors.paths, tensors.aliases))
        self._plan = dcp.write_plan(tensors.by_name, plans[rank], rank, metadata if rank == 0 else None)
        own_bytes = sum(file.size_bytes for file in self._plan.files) + len(self._plan.metadata or b"")
        self._total_bytes = sum(self._ranks.gather(own_bytes))
        if self._background is not None:
            problem = self._background.prepare(self._plan, self._restorer.verified)
            if problem is not None:
                self._leave_background(problem)
        return self._plan

    def _leave_background(self, why: str, *, final: bool = False) -> None:
        """Save synchronously from now on; with `strict` only a `final` save may. Collective."""
        self._warn_synchronous(why, strict=self.args.strict and not final)
        assert self._background is not None
        self._background.await_rescue()  # or two would write the same step
        self._background.close()
        self._background = None

    def _warn_synchronous(self, why: str, *, strict: bool) -> None:
        if strict:
            raise RunError(f"{why}; or allow synchronous saves with checkpoint.strict=false")
        if self._ranks.rank == 0:
            log.warning("saves are synchronous: %s", why)

    def _check_room(self, n_steps: int) -> None:
        held_bytes = sum(publish.mark_facts(self.root, step).get("bytes", 0) for step in self._published)
        budget = self.args.disk_budget_gb
        room = DiskRoom(
            free_bytes=free_bytes(self.root),
            held_bytes=held_bytes,
            checkpoint_bytes=self._total_bytes,
            at_once=retention.kept_at_once(self.args, n_steps),
            budget_bytes=int(budget * 1e9) if budget else None,
        )
        if (problem := room.problem(self.root)) is not None:
            raise RunError(problem)
        if warning := room.warning(self.root, retention.kept_for_good(self.args, n_steps)):
            log.info("%s", warning)

    def _check_owner(self) -> None:
        if self._lock is not None:
            self._lock.check()

    # -- when ------------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Return whether the config asks for a checkpoint after this step. Local."""
        return retention.is_due(step, self.args)

    def has(self, step: int) -> bool:
        """Return whether this step is known to be published; the same on all ranks. Local."""
        return step in self._published

    # -- save ------------------------------------------------------------------------------------------------------

    def before_update(self) -> None:
        """Wait until parameters and optimizer state are copied. Call before they change. Local."""
        if self._background is not None:
            self._background.before_update()

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        final: bool = False,
        stopping: bool = False,
        deadline_s: float | None = None,
    ) -> SaveReport:
        """Save a checkpoint, then let retention delete older ones. The report tells of a failure.

        The `final` save is retried if that may help, and returns only when the checkpoint is on the disk, or raises
        RunError. It stays in memory, as the report then says, if the job ends first (`deadline_s`, seconds since the
        epoch) or, with `stopping` (the run will be resumed), if the disk keeps failing.
        """
        if step in self._published:
            return SaveReport(step, layout.folder(self.root, step), published=True)
        started = time.perf_counter()
        tensors = tensors_of(state)
        plan = self._make_plan(tensors)
        if self._background is not None:
            try:
                return self._save_in_background(step, state, tensors, started, final, stopping, deadline_s)
            except NoSlotError as error:
                self._leave_background(str(error), final=final)
        return self._save_directly(step, state, tensors, plan, started, final, deadline_s)

    def _save_in_background(
        self,
        step: int,
        state: TrainState,
        tensors: Tensors,
        started: float,
        final: bool,
        stopping: bool,
        deadline_s: float | None,
    ) -> SaveReport:
        assert self._background is not None
        self._ranks.from_main(lambda: self._lock.look() if self._lock else None)  # without waiting for the disk
        error = self._background.save(step, state, tensors.by_name, final=final, deadline_s=deadline_s)
        report = SaveReport(step, layout.folder(self.root, step), published=False, staged=error is None, error=error)
        report.seconds = time.perf_counter() - started
        report.size_bytes = self._total_bytes if report.staged else 0
        if report.staged:
            self._staged_at_s[step] = self._now()
            rate = self._total_bytes / 1e9 / report.seconds
            self._last_save |= {"checkpoint/stall_s": report.seconds, "checkpoint/stage_gb_per_s": rate}
            report.synchronous = self._background.is_synchronous
            self._last_save["checkpoint/synchronous"] = float(report.synchronous)
        if self._ranks.rank == 0:
            if error is not None:
                log.error("%s", error)
            else:
                size = human_bytes(self._total_bytes)
                log.info("checkpoint %d: %s staged in %.0f ms", step, size, 1000 * report.seconds)
        if final and report.staged:
            report.error = self._background.finish(step, deadline_s, stopping)
            report.published = report.error is None
            if report.published:
                self._published.add(step)
        return report

    def _save_directly(
        self,
        step: int,
        state: TrainState,
        tensors: Tensors,
        plan: dcp.WritePlan,
        started: float,
        final: bool,
        deadline_s: float | None,
    ) -> SaveReport:
        error, size_bytes = self._direct.save(step, plan, state, tensors.by_name, self._total_bytes)
        for pause_s in FINAL_PAUSES_S if final else ():
            if error is None or not self._may_try_again(error, pause_s, deadline_s):
                break
            if self._ranks.rank == 0:
                log.warning("%s; trying again in %g s", error, pause_s)
            self._sleep(pause_s)
            error, size_bytes = self._direct.save(step, plan, state, tensors.by_name, self._total_bytes, again=True)
        report = SaveReport(step, layout.folder(self.root, step), published=error is None, synchronous=True)
        report.seconds = time.perf_counter() - started
        if error is not None:
            report.error = str(error)
            if self._ranks.rank == 0:
                log.error("%s", error)
            if final:
                raise error
            return report
        report.size_bytes = size_bytes
        self._published.add(step)
        self._restorer.verified.add(step)
        self._published_at_s = self._safe_until_s = self._now()
        rate = size_bytes / 1e9 / report.seconds
        self._last_save = {
            "checkpoint/stall_s": report.seconds,
            "checkpoint/drain_gb_per_s": rate,
            "checkpoint/synchronous": 1.0,
        }
        report.deleted = self._ranks.from_main(self._retain)
        self._published.difference_update(report.deleted)
        if self._ranks.rank == 0:
            size = human_bytes(size_bytes)
            log.info("checkpoint %d: %s in %.2f s (%.2f GB/s) at %s", step, size, report.seconds, rate, report.path)
        return report

    def _may_try_again(self, error: RunError, pause_s: float, deadline_s: float | None) -> bool:
        if not isinstance(error, DiskError) or not error.may_pass:
            return False
        latest_s = None if deadline_s is None else deadline_s - LEAVE_S - pause_s
        return self._ranks.from_main(lambda: latest_s is None or self._wall_clock() < latest_s)

    # -- retention -------------------------------------------------------------------------------------------------

    def _retain(self) -> list[int]:
        """On rank 0: apply retention; return the deleted steps. Disk errors are only logged."""
        try:
            held = pins.held_steps(self.run_dir, self.root, time.time())
            done = layout.done_steps(self.root)
        except (RunError, OSError) as error:
            log.warning("no checkpoint is deleted, since the pins or the folder cannot be read: %s", error)
            return []
        steps = retention.to_delete(done, self.args, verified=self._restorer.verified, pinned=held.steps)
        for step in sorted(held.overdue & set(steps)):
            log.error("%s", pins.overdue_message(step))
        if self._cleaner is None:
            self._retire(steps)
        else:
            self._wait_for_cleaner()
            self._cleaning = self._cleaner.submit(self._retire, steps)
        return steps

    def _retire(self, steps: list[int]) -> None:
        for step in steps:
            try:
                publish.retire(self.root, step, self.attempt, files=self._files)
            except OSError as error:
                log.warning("cannot delete checkpoint %d: %s", step, error)

    def _wait_for_cleaner(self) -> None:
        if self._cleaning is not None:
            self._cleaning.result()
            self._cleaning = None

    # -- resume ----------------------------------------------------------------------------------------------------

    def resume(self, state: TrainState) -> int | None:
        """Restore the newest state, in place, and return its step, or None if there is none.

        A snapshot that is complete in the nodes' memory is used without waiting for the disk; otherwise `latest` is.
        Raises as `latest` and `load`.
        """
        background, point = self._background, self._point
        if background is not None and point is not None:
            why = self._restorer.load_snapshot(background.snapshot(point), state)
            if why is None:
                background.resumed_from(point)
                return point.step
            if self._ranks.rank == 0:
                log.error("checkpoint %d cannot be loaded from memory; the disk is waited for: %s", point.step, why)
        self.await_rescue()
        step = self._restorer.load_latest(self._published, state)
        if step is None and point is not None:
            what = f"checkpoint {point.step}, the only one, was in memory and is lost; the same command begins anew"
            raise RankError(what, "disk")
        return step

    def owes(self, step: int) -> bool:
        """Return whether a step is in memory and not known to be on the disk. Local."""
        return self._background is not None and self._background.is_staged(step) and step not in self._published

    def await_rescue(self) -> None:
        """Wait until the snapshots that earlier attempts left in memory are on the disk. Raises RunError on failure."""
        if self._background is not None:
            self._background.await_rescue()
        self._published = self._ranks.from_main(lambda: set(layout.done_steps(self.root)))

    def latest(self) -> int | None:
        """Return the newest published step that verifies, the same on all ranks; None if nothing was published.

        Snapshots in memory are saved first. A checkpoint that does not verify is set aside (renamed, never deleted) and
        reported. Raises RunError if none verifies: only a person may decide to begin again at step 0.
        """
        self.await_rescue()
        return self._restorer.latest(self._published)

    def load(self, step: int, state: TrainState) -> None:
        """Restore a published step into `state`, in place; later checkpoints and their evaluations are set aside.

        Raises RunError, on all ranks, if it cannot be loaded.
        """
        self._restorer.load(step, self._published, state)

    def rewind(self, before: int, state: TrainState) -> int | None:
        """Restore the newest step before `before` that verifies, and return it, or None if there is none.

        Pending saves are settled first, so that none of a step that is trained again is published later.
        """
        if self._background is not None:
            self._background.settle()
        published = self._ranks.from_main(lambda: set(layout.done_steps(self.root)))
        step = self._restorer.load_latest({each for each in published if each < before}, state)
        if step is not None:
            self._published = self._ranks.from_main(lambda: set(layout.done_steps(self.root)))
            self._restorer.forget_later(step, self._published)
        return step

    def load_from(self, path: str | Path, state: TrainState, *, optimizer: bool = True) -> Path:
        """Restore the state in RUN, RUN@step or a checkpoint folder; return the folder."""
        return self._restorer.load_from(path, state, optimizer=optimizer)

    def load_folder(self, folder: Path, state: TrainState) -> None:
        """Restore the full state from a checkpoint folder of ours, without verifying it."""
        self._restorer.load_folder(folder, state)

    # -- the rest --------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return what the newest save cost, and how much work a crash now would lose. Local."""
        for event in self._background.new_events() if self._background else ():
            if event["kind"] == "published":
                self._published_at_s = self._now()
                self._safe_until_s = self._staged_at_s.get(event["step"], self._safe_until_s)
                self._staged_at_s = {s: t for s, t in self._staged_at_s.items() if s > event["step"]}
                self._last_save["checkpoint/drain_gb_per_s"] = event["gb_per_s"]
                self.published_since.append({"global_step": event["step"], "seconds": event["seconds"]})
            elif event["kind"] == "uncopied":
                self._n_uncopied += 1
        counts = {} if self._background is None else {"checkpoint/skipped": float(self._background.n_skipped)}
        counts |= {"checkpoint/uncopied": float(self._n_uncopied)} if self.args.replicate else {}
        return {
            **self._last_save,
            **counts,
            "checkpoint/age_of_newest_done_s": self._now() - self._published_at_s,
            "checkpoint/lost_work_at_risk_s": self._now() - self._safe_until_s,
        }

    def close(self) -> None:
        """Wait for retention; snapshots in memory are left to the service. Local."""
        self._wait_for_cleaner()
        if self._cleaner is not None:
            self._cleaner.shutdown()
        if self._background is not None:
            self._background.close()
