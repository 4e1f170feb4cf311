"""Save in the background, all ranks together: allocate slots, choose one per save, copy into it, track the outcome.

A save costs the caller one memory copy and one gather of a few hundred bytes. All ranks take the same slot or none. A
slot that is being drained is never touched; one that waits may be overwritten by a newer save if all nodes agree. If
every slot is being drained the save is skipped, counted and reported; only the last save of a run waits. If a node's
memory is short, that is known before step 1; if it fails later, NoSlotError asks the caller for a synchronous save.
An attempt may resume at once from the newest complete snapshot that an earlier one left in memory; the services write
these snapshots to the disk meanwhile, and their slots are reused only after that.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingua.checkpoint import capacity, dcp
from lingua.checkpoint.shm.area import TRAINER_LOCK, Save, ServedRun, Slot, make_area
from lingua.checkpoint.shm.decisions import (
    Found,
    Newest,
    Point,
    SlotView,
    choose_slot,
    node_of,
    resume_point,
    unsaved,
)
from lingua.checkpoint.shm.found import keep, release, survey
from lingua.checkpoint.shm.moved import adopt
from lingua.checkpoint.shm.part_server import PartReader, address_of_this_node
from lingua.checkpoint.shm.service_client import ServiceClient, StartService, say_who_is_waited_for, start_service
from lingua.checkpoint.shm.slot_writer import SlotWriter
from lingua.checkpoint.shm.snapshot import Snapshot
from lingua.checkpoint.state import TrainState, scalars_json
from lingua.distributed.place import find_rank_info
from lingua.distributed.process_group import Ranks
from lingua.files import DISK, Files, ProcessLock, RunError
from lingua.run.failure import carried
from lingua.run.lock import this_process

log = logging.getLogger(__name__)

LOOK_S = 0.05
SLOT_LOOK_S = 0.2
"""Between two looks for a free slot, each of them collective."""
LEAVE_S = 5.0
"""Seconds that ranks need to leave before the job ends."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


class NoSlotError(RunError):
    """A rank has no slot to fill and will never have one. Raised on all ranks."""


# -- the ranks -----------------------------------------------------------------------------------------------------


@dataclass
class _Report:
    """A rank's report to the others before a save."""

    usable: set[int]
    """Its allocated slots."""
    occupied: set[int]
    """Slots that hold a snapshot of an earlier attempt."""
    problem: str | None = None
    is_gone: bool = False
    """The area's names have vanished, as by RemoveIPC of systemd (logind.conf(5)); mapped memory stays."""
    slots: dict[int, SlotView] | None = None
    """A leader's view of its node."""


class Coordinator:
    """One rank's side of saving in the background. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        run: ServedRun,
        ranks: Ranks,
        device: torch.device,
        *,
        files: Files = DISK,
        start: StartService = start_service,
        wall_clock: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Join the area of this node.

        Raises RunError, on all ranks, if an area cannot be had: NoSlotError, if there is no room for it.
        """
        self._run, self._ranks, self._device, self._files = run, ranks, device, files
        self._now, self._wall_clock, self._sleep = now, wall_clock, sleep
        self._writer: SlotWriter | None = None
        self._found: list[list[Found]] = []
        """Complete parts that earlier attempts left in the memory of each node."""
        self._rescued: list[int] = []
        """Slots of this node with such parts that the service has not saved yet, as far as is known."""
        self._n_slots, self._keep = 0, set[str]()
        self._mark_error: OSError | None = None
        """Why this node's slot did not get its mark at the last save, until it is reported."""
        self.n_skipped = 0
        """Saves that found no slot."""
        self._newest: int | None = None
        """Step of the last save that was staged."""
        self._number = self._n_saves = 0
        """Its slot, and the number of saves that got a slot."""
        self._lock: ProcessLock | None = None
        joined = ranks.on_each(self._join)
        if no_room := next((why for _, why in joined if why is not None), None):
            self.close()
            raise NoSlotError(no_room)
        self.node = node_of(ranks.rank, [area for area, _ in joined])
        self._service: ServiceClient | None = None
        """On the leader of each node."""
        if ranks.rank == self.node.leader:
            log_file = run.run_dir / "logs" / f"checkpoint_service.{self.node.number}.log"
            self._service = ServiceClient(self.area, run.attempt, log_file, files=files, start=start, sleep=self._sleep)

    def _join(self) -> tuple[tuple[str, str, int, int] | None, str | None]:
        """Make the area if needed and hold its lock; return (identity, None) or (None, why it has no room). Local."""
        try:
            return self._enter(), None
        except OSError as error:
            return None, _no_room(error)

    def _enter(self) -> tuple[str, str, int, int]:
        for looks in itertools.count(1):
            self.area = make_area(self._run.run_dir, Path(self._run.args.shm_path), files=self._files)
            try:
                lock = self.area.lock(TRAINER_LOCK)
            except FileNotFoundError:
                continue  # a service that leaves has just removed the area
            if lock.take(shared=True) and lock.is_current():
                self._lock = lock
                for record in (self.area.session, self.area.events):
                    record.reserve(files=self._files)
                facts = self.area.folder.stat()
                me = this_process()
                return me.host, me.boot_id, facts.st_dev, facts.st_ino
            say_who_is_waited_for(looks, lock, f"it is leaving {self.area.folder}")
            self._sleep(LOOK_S)
        raise AssertionError("itertools.count ended")

    # -- start -----------------------------------------------------------------------------------------------------

    def find_unsaved(self, newest: Newest) -> set[tuple[int, int]]:
        """Return (attempt, step) of the snapshots in memory that must be saved; all others are forgotten."""
        run = self._run
        self._ranks.on_each(lambda: adopt(self.area, run, newest.step, files=self._files) if self._service else None)
        of_ranks = self._ranks.gather(survey(self.area, files=self._files) if self._service else None)
        self._found = [of_node for of_node in of_ranks if of_node is not None]
        points = unsaved(self._found, run.run_id, newest)
        wanted = {(point.parts[0][1].save.attempt, point.step) for point in points}
        own = [part for point in points for holder, part in point.parts if holder == self.node.number]
        kept = self._ranks.on_each(lambda: keep(self.area, own, files=self._files) if self._service else [])
        self._rescued = kept[self._ranks.rank]
        if self._ranks.rank == 0 and wanted:
            steps = [point.step for point in points]
            log.info("checkpoints %s of an earlier attempt are still in memory and will be on the disk", steps)
        self._run = replace(self._run, rescue=tuple(sorted(wanted)))
        return wanted

    def resume_point(self, newest: Newest) -> Point | None:
        """Return the snapshot in memory to resume from, or None. Local, the same on all ranks."""
        return resume_point(self._found, self._run.run_id, newest)

    def open(self) -> None:
        """Send the services this run; they begin to save what was found in memory. Call after `open_staging_dir`."""
        if self.node.n_nodes > 1 and (any(self._found) or self._run.args.replicate):
            secret = self._ranks.from_main(lambda: secrets.token_hex(32))
            self._run = replace(self._run, secret=secret, listen=address_of_this_node(find_rank_info().master))
        self._send(wait=False)  # it starts while the state is loaded

    @contextmanager
    def snapshot(self, point: Point) -> Iterator[Snapshot]:
        """Open the snapshot to resume from; nothing may be staged before all ranks have read it."""
        addresses = self._addresses() if self.node.n_nodes > 1 else []
        with ExitStack() as stack:
            readers: dict[int, PartReader] = {}
            for holder in sorted({holder for holder, _ in point.parts} - {self.node.number}):
                readers[holder] = stack.enter_context(closing(PartReader(addresses[holder], self._run.secret)))
            share = slice(self.node.ranks.index(self._ranks.rank), None, len(self.node.ranks))
            yield Snapshot(point, self.node.number, self.area, readers, share)

    def _addresses(self) -> list[tuple[str, int]]:
        """Return where the service of each node listens. Raises RunError if one does not."""
        of_ranks = self._ranks.on_each(lambda: self._service.address() if self._service else None)
        return [address for address in of_ranks if address is not None]

    def resumed_from(self, point: Point) -> None:
        """Count a snapshot that all ranks have resumed from as staged by this attempt. Local."""
        self._newest = point.step

    @property
    def is_synchronous(self) -> bool:
        """Whether a save waits for the whole copy into this rank's memory. Local."""
        return self._writer is not None and self._writer.is_synchronous

    def is_staged(self, step: int) -> bool:
        """Return whether a step is the newest that was staged, published or not. Local."""
        return step == self._newest

    def await_rescue(self) -> None:
        """Wait until the services have saved what was found in memory. Raises RunError if the disk refuses."""
        is_here = self._lock is not None and self._lock.is_current()
        waits_for = self._rescued if is_here else []  # if the area's names have vanished, so have the marks
        self._ranks.on_each(lambda: self._service.await_rescue(waits_for) if self._service else None)
        self._rescued = []

    def _send(self, *, wait: bool = True, **changes: Any) -> None:
        self._run = replace(self._run, **changes)
        self._ranks.on_each(lambda: self._service.send(self._run, wait=wait) if self._service else None)

    # -- memory ----------------------------------------------------------------------------------------------------

    def prepare(self, plan: dcp.WritePlan, verified: Iterable[int]) -> str | None:
        """Allocate the slots, in a thread; return why that is impossible, or None.

        `verified`: the steps that the ranks have verified, for the service's retention.
        """
        self._send(verified=tuple(sorted(verified)))
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        args = self._run.args
        slot_bytes = [0] * self.node.n_nodes
        for node, size in self._ranks.gather((self.node.number, sum(file.size_bytes for file in plan.files))):
            slot_bytes[node] += size
        own, copied = slot_bytes[self.node.number], slot_bytes[self.node.number - 1]
        offers = self._ranks.on_each(lambda: self._room(own, copied))
        tightest = min(offers, key=lambda offer: offer.slots(args.slots))
        n_slots = tightest.slots(args.slots)
        if n_slots == 0:
            return f"{tightest.sentence(1)}; lower the memory use, or take more nodes"
        if self._ranks.rank == 0:
            if n_slots < args.slots:
                log.warning("%s; %d slots are used", tightest.sentence(args.slots), n_slots)
            if why := capacity.private_shm_here(args.shm_path):
                log.warning(
                    "%s %s (%s): a checkpoint that is only in memory when the job ends is lost",
                    args.shm_path, capacity.PRIVATE_SHM, why,
                )  # fmt: skip
        writer = SlotWriter(self.area, self._ranks.rank, plan, device=self._device, files=self._files)
        if why := self._make_slots(n_slots, writer.names):
            writer.close()
            return why
        writer.allocate(n_slots)
        self._writer, self._n_slots = writer, n_slots
        self._replicate(offers)
        return None

    def _replicate(self, offers: list[capacity.MemoryRoom]) -> None:
        """Let each node copy the parts of the previous one, if that is configured and possible."""
        wanted, addresses = bool(self._run.args.replicate), list[tuple[str, int]]()
        why = capacity.why_no_copies(offers, self._n_slots, self.node.n_nodes) if wanted else None
        if wanted and why is None:
            try:
                addresses = self._addresses()
            except RunError as error:
                why = str(error)
        if why is not None and self._ranks.rank == 0:
            log.warning("checkpoint.replicate is off: %s", why)
        n_copies = self._n_slots if addresses else 0
        self._ranks.on_each(lambda: release(self.area, n_copies, files=self._files) if self._service else None)
        self._send(n_copies=n_copies, copy_from=addresses[self.node.number - 1] if addresses else None)

    def _room(self, slot_bytes: int, copy_bytes: int) -> capacity.MemoryRoom:
        ours = [slot for slot in self.area.slots() if slot.number < self._run.args.slots or slot.state() == "free"]
        held = [slot.folder for slot in (*ours, *self.area.copies.slots())]
        return capacity.room_here(self.area.folder, held, slot_bytes, copy_bytes)

    def _make_slots(self, n_slots: int, names: set[str]) -> str | None:
        """Make `n_slots` slots and remove files that no rank of this node writes; `names`: this rank's files."""
        of_all = self._ranks.gather(names)
        self._keep = set().union(*(of_all[rank] for rank in self.node.ranks))

        def act() -> str | None:
            try:
                self.area.make_slots(n_slots, self._keep, files=self._files)
            except OSError as error:
                return _no_room(error)
            return None

        return next((why for why in self._ranks.on_each(act if self._service else lambda: None) if why), None)

    # -- save ------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, state: TrainState, tensors: dict[str, Tensor], *, final: bool, deadline_s: float | None
    ) -> str | None:
        """Stage a snapshot; return None, or why it was skipped. A `final` save hurries the services and waits.

        Raises NoSlotError, on all ranks, if there is no slot to wait for or if the previous save was lost in memory.
        A bug on one rank, in its threads or in its service is raised on all ranks.
        """
        assert self._writer is not None
        if final:
            self._send(ending=True, deadline_s=deadline_s)
        if step == self._newest:
            return None  # it is staged already
        scalars = functools.cache(lambda: scalars_json(state, self._ranks.rank, self._ranks.size))
        number = self._take_slot(step, scalars)
        while number is None and final and not self._ranks.from_main(lambda: self.is_late(deadline_s)):
            self._sleep(SLOT_LOOK_S)
            number = self._take_slot(step, scalars)
        if number is None:
            self.n_skipped += 1
            if self._service and (why := self._service.why_stopped()):
                log.error("%s", why)
            return f"checkpoint {step} is skipped: every slot is still being written to the disk"
        self._writer.fill(number, self._save_of(step), tensors, scalars(), state.model)
        self._newest, self._number = step, number
        return None

    def _take_slot(self, step: int, scalars: Callable[[], bytes]) -> int | None:
        """Choose the slot to fill and mark it; None if all are taken. Raises as `save`."""
        reports = self._ranks.on_each(lambda: self._report(scalars))
        problems = list(dict.fromkeys(report.problem for report in reports if report.problem))
        everywhere = set.intersection(*(report.usable for report in reports))
        is_gone = any(report.is_gone for report in reports)
        if is_gone or not set.intersection(*(report.usable | report.occupied for report in reports)):
            gone = [f"{self.area.folder} was removed by another process"] if is_gone else []
            raise NoSlotError("; ".join(problems + gone) or "no slot could be allocated")
        for problem in problems if self._ranks.rank == 0 else ():
            log.error("%s", problem)
        nodes = [{n: view for n, view in r.slots.items() if n in everywhere} for r in reports if r.slots is not None]
        number = choose_slot(nodes)
        if number is None or not self._claim(number, [node[number] for node in nodes]):
            return None
        self._n_saves += 1
        if self._service:
            self._service.forget_outcomes()
            try:
                self.area.slot(number).put_mark(self._save_of(step), files=self._files)
            except OSError as error:  # reported at the next save or at the end; without a mark nobody takes the slot
                self._mark_error = error
        return number

    def _report(self, scalars: Callable[[], bytes]) -> _Report:
        """Collect what this rank reports to the others. Local. Raises errors that must end all ranks."""
        assert self._writer is not None
        scalars()  # made now, while the other ranks can still learn that it failed
        rank = self._ranks.rank
        self._take_saved()
        usable, failed = self._writer.usable_slots()
        occupied = self._writer.occupied
        problem = None if failed is None else f"rank {rank}: a slot cannot be allocated: {failed}"
        if error := self._why_lost():
            problem = f"rank {rank}: the last checkpoint is lost: {error}"
            if not self._run.args.strict:  # strict: never synchronous
                usable, occupied = set(), set()
        report = _Report(usable, occupied, problem)
        report.is_gone = self._lock is not None and not self._lock.is_current()
        if self._service and not report.is_gone:
            self._service.check()
            report.slots = {slot.number: self._view(slot) for slot in self.area.slots()}
        return report

    def _why_lost(self) -> OSError | None:
        """Return, once, why this rank's part of the last save is not in memory. Local."""
        assert self._writer is not None
        error = self._writer.wait_until_ready() or self._mark_error
        self._mark_error = None
        return error

    def _view(self, slot: Slot) -> SlotView:
        save = slot.save()
        return SlotView(slot.state(), save.step if save else -1)

    def _claim(self, number: int, nodes: list[SlotView]) -> bool:
        """Claim a slot on all nodes; return False if a service has begun to drain it on one of them."""
        if all(node.state == "free" for node in nodes):
            return True
        slot = self.area.slot(number)
        is_staged = self._service is not None and nodes[self.node.number].state == "staged"
        won = not is_staged or slot.change("staged", "claimed", files=self._files)
        if all(self._ranks.gather(won)):
            if self._ranks.rank == 0:
                log.warning("checkpoint %d gives its slot to a newer one", max(node.step for node in nodes))
            return True
        if is_staged and won:
            slot.change("claimed", "staged", files=self._files)
        return False

    def _save_of(self, step: int) -> Save:
        """Describe a save for the mark of this node's slot. Local."""
        run, node = self._run, self.node
        return Save(run.run_id, run.attempt, step, node.ranks, node.number, node.n_nodes, self._n_saves)

    def before_update(self) -> None:
        """Wait for the copies. Call before parameters or optimizer state change. Local. Raises a bug of our threads."""
        if self._writer is not None:
            self._writer.raise_bug()
            if self._rescued or self._writer.occupied:
                self._take_saved()
            self._writer.before_update()

    def _take_saved(self) -> None:
        """Take over the slots whose snapshot of an earlier attempt has been saved. Local."""
        assert self._writer is not None
        waiting = [number for number in self._rescued if self.area.slot(number).state() != "free"]
        if len(waiting) < len(self._rescued):
            self._rescued = waiting
            try:
                self.area.make_slots(self._n_slots, self._keep, files=self._files)
            except OSError as error:
                log.warning("slots that are free again cannot be cleared: %s", error)
        self._writer.allocate_free()

    def new_events(self) -> list[dict[str, Any]]:
        """Return what this node's service has reported since the last call; empty except on leaders. Local."""
        return self._service.read_events() if self._service else []

    # -- end -------------------------------------------------------------------------------------------------------

    def is_late(self, deadline_s: float | None) -> bool:
        """Return whether the job ends so soon that the ranks must leave. Local."""
        return deadline_s is not None and self._wall_clock() > deadline_s - LEAVE_S

    def finish(self, step: int, deadline_s: float | None, stopping: bool) -> str | None:
        """Wait until a staged step is on the disk; return None, or what is missing if it stays in memory.

        It stays in memory at `deadline_s`, when the job ends (seconds since the epoch). Without a deadline it stays
        there if the disk keeps failing and the run is only `stopping`. Raises RunError, on all ranks, if the step is
        lost: NoSlotError if it was lost in memory.
        """
        lost = [error for error in self._ranks.on_each(self._why_lost) if error is not None]
        if lost:
            why = f"checkpoint {step} is lost: {lost[0]}"
            raise NoSlotError(why) if self.withdraw(self._number) else carried(lost[0], why)
        next_word_s = self._now() + 10.0
        if self._service:
            self._service.expect()
        while True:
            outcomes = self._ranks.on_each(lambda: self._outcome(step, deadline_s, stopping))
            # A save of an earlier attempt may be published by any node.
            is_settled, missing = next((each for each in outcomes if each == (True, None)), outcomes[0])
            if is_settled:
                return missing
            if self._now() > next_word_s and self._ranks.rank == 0:
                log.info("waiting until checkpoint %d is on the disk", step)
                next_word_s = self._now() + 10.0
            self._sleep(LOOK_S)

    def settle(self) -> None:
        """Wait until the staged save is on the disk or has failed; its step may be saved again afterwards."""
        if self._newest is not None:
            try:
                self.finish(self._newest, None, stopping=True)
                self.await_rescue()
            except RunError as error:
                log.warning("%s", error)
            self._newest = None

    def _outcome(self, step: int, deadline_s: float | None, stopping: bool) -> tuple[bool, str | None]:
        if self._service is None:
            return False, None
        is_late = self.is_late(deadline_s)
        return self._service.outcome(step, is_late, has_deadline=deadline_s is not None, stopping=stopping)

    def withdraw(self, number: int) -> bool:
        """Take back a save that one node lost; return False if a service has begun with another node's part."""
        slot = self.area.slot(number)
        is_ours = self._service is None or slot.state() == "free" or slot.change("staged", "free", files=self._files)
        return all(self._ranks.gather(is_ours))

    def close(self) -> None:
        """Leave the area; its service stays until all is saved. Local."""
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _no_room(error: OSError) -> str:
    """Return why there is no room for an area or its slots; raise any other error."""
    if error.errno not in NO_ROOM:
        raise error
    return f"there is no room in memory for checkpoints: {error.filename}: {error.strerror}"
