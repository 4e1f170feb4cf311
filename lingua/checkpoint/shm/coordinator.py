"""The asynchronous way of a checkpoint, as the ranks see it: which slot, who else is there, what has become of it.

Promise: all ranks take the same slot or none, by one small gather per save. A slot that is being drained is never
touched; one that waits may be overwritten by a newer save, if all nodes agree on that. Complete snapshots that an
earlier start of the run left on these nodes are on the disk before anything is resumed. The service is started again
when it dies, a few times; what it reports is logged, and its bugs are ours.
Cost: per save one gather of a few hundred bytes beside the copy.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lingua.checkpoint.shm import drain
from lingua.checkpoint.shm.messages import Events, Session, write_session
from lingua.checkpoint.shm.slots import SERVICE_LOCK, TRAINER_LOCK, Save, Slot, State, make_region
from lingua.distributed.process_group import Ranks
from lingua.files import DISK, DiskError, Files, ProcessLock, RunError, raise_if
from lingua.run.failure import RankError, carried
from lingua.run.lock import Owner, this_process

log = logging.getLogger(__name__)

LOOK_S = 0.05
HANDOVER_S = 600.0
"""How long a start waits for a service of an older one that is writing a step."""
SILENT_BEATS = 3
"""A writer elsewhere that has not shown itself for so many beats is dead."""
LEAVE_S = 5.0
"""What ranks need to leave before the job ends."""
RESTARTS = 3
"""Of the service, until it has published something."""
TRIES = 4
"""Of the service to save what somebody waits for, on a disk that fails in a way that may pass: some seconds."""
START_S = 30.0
"""How long a service may take to start."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


class NoSlotError(RunError):
    """Some rank has no slot to fill and will never have one. Raised on all of them."""


# -- decisions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlotView:
    """A slot as one node sees it."""

    state: State | None
    step: int = -1


def choose_slot(nodes: Sequence[dict[int, SlotView]]) -> int | None:
    """The slot for the next save: one that is free everywhere, else the newest that no node is draining yet.

    `nodes`: each node's usable slots by number. None: there is none.
    """
    common = sorted(set.intersection(*(set(node) for node in nodes)))
    for number in common:
        if all(node[number].state == "free" for node in nodes):
            return number
    idle = [n for n in common if all(node[n].state in ("free", "staged") for node in nodes)]
    return max(idle, key=lambda n: max(node[n].step for node in nodes), default=None)


def worth_saving(found: Iterable[Save], run_id: str, newest_done: tuple[int, int]) -> set[tuple[int, int]]:
    """(incarnation, step) of what an earlier start left complete in memory and what is newer than the newest on disk.

    `found`: the complete saves of all nodes; `newest_done`: (step, incarnation) of the newest published checkpoint.
    Of several starts only the last counts: what the one before left, it would have taken itself.
    """
    parts: dict[tuple[int, int], set[int]] = {}
    n_nodes: dict[tuple[int, int], int] = {}
    for save in found:
        if save.run_id == run_id:
            parts.setdefault((save.incarnation, save.step), set()).add(save.node)
            n_nodes[save.incarnation, save.step] = save.n_nodes
    step_done, incarnation_done = newest_done
    good = {
        key
        for key, nodes in parts.items()
        if len(nodes) == n_nodes[key] and key[1] > step_done and key[0] >= incarnation_done
    }
    last = max((incarnation for incarnation, _ in good), default=0)
    return {key for key in good if key[0] == last}


def is_refusal(event: dict[str, Any]) -> bool:
    """Whether the disk has refused a checkpoint; what cannot be deleted is `failing` too."""
    return event["kind"] == "failing" and "errno" in event


def refusal(event: dict[str, Any]) -> DiskError:
    """What the service has said, as an error."""
    return DiskError(event["why"], event.get("errno"))


# -- the service as a process --------------------------------------------------------------------------------------


class Started(Protocol):
    """A process that was started."""

    def poll(self) -> int | None:
        """Its exit code; None: it runs."""


StartService = Callable[[Path, Path, Path], Started]
"""(run folder, memory file system, log file) -> a service of this node."""


def start_service(run_dir: Path, shm: Path, log_file: Path) -> Started:
    """Start the service of this node in a session of its own, so that it outlives us."""
    command = [sys.executable, "-m", "lingua.checkpoint.shm.service", os.path.realpath(run_dir), "--shm", str(shm)]
    home = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as said:
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


# -- the courier ---------------------------------------------------------------------------------------------------


@dataclass
class _Report:
    """What a rank tells the others before a save."""

    usable: set[int]
    problem: str | None = None
    fatal: RunError | None = None
    is_gone: bool = False
    """The region's names have vanished, as RemoveIPC of systemd does it (logind.conf(5)); what is mapped stays."""
    slots: dict[int, SlotView] | None = None
    """A leader's view of its node."""


class Coordinator:
    """One rank's side of the asynchronous path. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        run_dir: Path,
        shm: Path,
        ranks: Ranks,
        session: Session,
        *,
        files: Files = DISK,
        start: StartService = start_service,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Join the region of this node. `session` lacks nothing but what differs between nodes.

        Raises RunError, on all ranks, when a region cannot be had: NoSlotError, when there is no room for it.
        """
        self._run_dir, self._shm, self._ranks, self._files = run_dir, shm, ranks, files
        self._start, self._now, self._wall_clock, self._sleep = start, now, wall_clock, sleep
        self._session = session
        self._rescued: list[int] = []
        self._starts = 0
        self._service: Started | None = None
        self.mark_error: OSError | None = None
        """Why this node's slot did not get its mark at the last save; whoever reads it sets it back."""
        self._fatal: RunError | None = None
        self._n_refusals = 0
        """By the disk, since it last took a checkpoint."""
        self._outcomes: dict[int, dict[str, Any]] = {}
        """The last word on each step since the last save."""
        self.problems: list[str] = []
        """What went wrong since the caller last emptied this; the same on all ranks."""
        self._lock: ProcessLock | None = None
        joined = ranks.on_each(self._join)
        if no_room := next((why for _, why in joined if why is not None), None):
            self.close()
            raise NoSlotError(no_room)
        self.node = node_of(ranks.rank, [place for place, _ in joined])
        self.is_leader = ranks.rank == self.node.leader
        self._events = Events(self.region)

    def _join(self) -> tuple[tuple[str, str, int, int] | None, str | None]:
        """Enter the region; returns its place, and why there is no room for it. Local."""
        try:
            return self._enter(), None
        except OSError as error:
            return None, _no_room(error)

    def _enter(self) -> tuple[str, str, int, int]:
        """Make the region if need be and hold its lock; returns what tells it from all others. Local."""
        while True:
            self.region = make_region(self._run_dir, self._shm, files=self._files)
            try:
                lock = self.region.lock(TRAINER_LOCK)
            except FileNotFoundError:
                continue  # a service that leaves has just removed the region
            if lock.take(shared=True) and lock.is_current():
                self._lock = lock
                for record in (self.region.session, self.region.events):
                    record.reserve(files=self._files)
                facts = self.region.folder.stat()
                me = this_process()
                return me.host, me.boot_id, facts.st_dev, facts.st_ino
            lock.close()
            self._sleep(LOOK_S)

    # -- start -----------------------------------------------------------------------------------------------------

    def find_unsaved(self, newest_done: tuple[int, int]) -> set[tuple[int, int]]:
        """(incarnation, step) of the snapshots in memory that are worth saving; all others are forgotten."""
        own = self._complete() if self.is_leader else {}
        found = [save for of_rank in self._ranks.gather(list(own.values())) for save in of_rank]
        wanted = worth_saving(found, self._session.run_id, newest_done)
        self._rescued = [n for n, save in own.items() if (save.incarnation, save.step) in wanted]
        for slot in self.region.slots() if self.is_leader else []:
            if slot.number not in self._rescued:
                slot.change("staged", "free", files=self._files)
        if self._ranks.rank == 0 and wanted:
            steps = sorted(step for _, step in wanted)
            log.info("checkpoints %s of an earlier start are still in memory; they are saved before going on", steps)
        return wanted

    def _complete(self) -> dict[int, Save]:
        lock = self.region.lock(SERVICE_LOCK)
        try:
            if lock.take():  # no service lives, and none starts before we are done
                self.region.recover(files=self._files)
        finally:
            lock.close()
        for slot in self.region.slots():
            slot.change("claimed", "staged", files=self._files)
        return {slot.number: found[0] for slot in self.region.slots() if (found := slot.complete())}

    def open(self, unsaved: set[tuple[int, int]]) -> None:
        """Tell the services that this start has begun, and wait until they have saved what was found.

        Call when the passage of this start is open. Raises RunError when the disk refuses.
        """
        self.tell(rescue=tuple(sorted(unsaved)))
        self._ranks.on_each(self._await_rescue)

    def tell(self, **changes: Any) -> None:
        """Change what the services go by: fields of `Session`."""
        self._session = replace(self._session, **changes)
        self._ranks.on_each(self._tell_node)

    def _tell_node(self) -> None:
        if self.is_leader:
            write_session(self.region, self._session, files=self._files)
            self._ensure_service()

    def _await_rescue(self) -> None:
        while any(self.region.slot(number).state() != "free" for number in self._rescued):
            events = self.read_events()
            refused = next((refusal(event) for event in reversed(events) if is_refusal(event)), None)
            error = self._fatal or (refused if refused is not None and not self._may_pass(refused) else None)
            if error is not None:
                raise carried(
                    error,
                    f"this node's memory holds a newer checkpoint than the disk, and it cannot be saved: {error}. "
                    f"Mend that and start again on {socket.gethostname()}",
                )
            self._ensure_service()
            self._sleep(LOOK_S)

    def make_slots(self, n_slots: int, names: set[str]) -> str | None:
        """Make the folders of `n_slots` slots, remove further ones, and clear what else lies in them.

        `names`: this rank's files. Returns why there is no room, None otherwise.
        """
        of_all = self._ranks.gather(names)
        keep = set().union(*(of_all[rank] for rank in self.node.ranks))

        def act() -> str | None:
            try:
                self.region.make_slots(n_slots, keep, files=self._files)
            except OSError as error:
                return _no_room(error)
            return None

        return next((why for why in self._ranks.on_each(act if self.is_leader else lambda: None) if why), None)

    # -- save ------------------------------------------------------------------------------------------------------

    def take_slot(self, step: int, usable: set[int], problem: str | None, fatal: RunError | None = None) -> int | None:
        """The slot to fill with `step`, marked already; None: all are taken.

        `usable`: this rank's allocated slots; `problem`: why its part of the last save is not there. Raises RunError,
        on all ranks, for what no later save would do better, `fatal` of any rank included.
        """
        report = self._report(usable, problem)
        report.fatal = report.fatal or fatal
        reports = self._ranks.gather(report)
        raise_if(next((r.fatal for r in reports if r.fatal), None))
        for problem in dict.fromkeys(r.problem for r in reports if r.problem):
            self.problems.append(problem)
        everywhere = set.intersection(*(r.usable for r in reports))
        if not everywhere or any(r.is_gone for r in reports):
            gone = [f"{self.region.folder} was removed by somebody"] if any(r.is_gone for r in reports) else []
            raise NoSlotError("; ".join(self.problems + gone) or "no slot could be allocated")
        nodes = [{n: view for n, view in r.slots.items() if n in everywhere} for r in reports if r.slots is not None]
        number = choose_slot(nodes)
        if number is None or not self._claim(number, [node[number] for node in nodes]):
            return None
        self._outcomes.clear()
        if self.is_leader:
            try:
                self.region.slot(number).put_mark(self.save_of(step), files=self._files)
            except OSError as error:  # the others hear of it later; without a mark nobody takes the slot
                self.mark_error = error
        return number

    def withdraw(self, number: int) -> bool:
        """Take back a save that is lost on some node; False: a service has begun with the part of another one."""
        slot = self.region.slot(number)
        own = not self.is_leader or slot.state() == "free" or slot.change("staged", "free", files=self._files)
        return all(self._ranks.gather(own))

    def _report(self, usable: set[int], problem: str | None) -> _Report:
        """What this rank tells the others. Local."""
        report = _Report(problem=problem, usable=usable)
        report.is_gone = self._lock is not None and not self._lock.is_current()
        if not self.is_leader or report.is_gone:
            return report
        try:
            self.read_events()
            self._ensure_service()
        except RunError as error:
            report.fatal = carried(error)
        report.fatal = report.fatal or self._fatal
        report.slots = {slot.number: self._view(slot) for slot in self.region.slots()}
        return report

    def _view(self, slot: Slot) -> SlotView:
        save = slot.save()
        return SlotView(slot.state(), save.step if save else -1)

    def _claim(self, number: int, nodes: list[SlotView]) -> bool:
        """Whether a slot may be overwritten: no service has begun with it anywhere."""
        if all(node.state == "free" for node in nodes):
            return True
        slot = self.region.slot(number)
        is_staged = self.is_leader and nodes[self.node.number].state == "staged"
        won = not is_staged or slot.change("staged", "claimed", files=self._files)
        if all(self._ranks.gather(won)):
            if self._ranks.rank == 0:
                log.warning("checkpoint %d gave its slot to a newer one", max(node.step for node in nodes))
            return True
        if is_staged and won:
            slot.change("claimed", "staged", files=self._files)
        return False

    def save_of(self, step: int) -> Save:
        """What the mark of this node's slot says. Local."""
        session, node = self._session, self.node
        return Save(session.run_id, session.incarnation, step, node.ranks, node.number, node.n_nodes)

    # -- end -------------------------------------------------------------------------------------------------------

    def is_late(self, deadline_s: float | None) -> bool:
        """Whether so little is left until the job ends that the ranks must leave. Local."""
        return deadline_s is not None and self._wall_clock() > deadline_s - LEAVE_S

    def await_published(self, step: int, deadline_s: float | None, stopping: bool = False) -> str | None:
        """Wait until a staged step is on the disk; None if it is, what is missing if it stays in memory.

        `deadline_s`: seconds since the epoch when the job ends, if that is known; it stays in memory then. Where that
        is not known and the disk refuses the step TRIES times, it stays there too if the run is only `stopping`.
        Raises RunError, on all ranks, when the disk refuses the step otherwise, and when it is lost.
        """
        next_word_s = self._now() + 10.0
        self._n_refusals = 0  # those of earlier steps do not count
        while True:
            is_settled, missing = self._ranks.on_each(lambda: self._outcome(step, deadline_s, stopping))[0]
            if is_settled:
                return missing
            if self._now() > next_word_s and self._ranks.rank == 0:
                log.info("waiting until checkpoint %d is on the disk", step)
                next_word_s = self._now() + 10.0
            self._sleep(LOOK_S)

    def _outcome(self, step: int, deadline_s: float | None, stopping: bool) -> tuple[bool, str | None]:
        """Whether the fate of a step is known to this node, and what is missing if it is not published. Local."""
        if not self.is_leader:
            return False, None
        self.read_events()
        raise_if(self._fatal)
        self._ensure_service()
        event = self._outcomes.get(step, {"kind": "nothing"})
        if event["kind"] == "lost":
            raise RankError(event["why"], "disk")  # a rank that trains it again may save it
        if event["kind"] == "published":
            return True, None
        is_over = self.is_late(deadline_s)
        if event["kind"] == "failing" and deadline_s is None and not self._may_pass(refusal(event)):
            if not stopping or not refusal(event).may_pass:
                raise refusal(event)
            is_over = True
        if not is_over:
            return False, None
        trouble = f" ({event['why']})" if "why" in event else ""
        return True, f"checkpoint {step} is in the memory of {socket.gethostname()}, but not on the disk yet{trouble}"

    def close(self) -> None:
        """Leave the region; its service stays until all is saved. Local."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- the service -----------------------------------------------------------------------------------------------

    def read_events(self) -> list[dict[str, Any]]:
        """What this node's service has said to this start; logged here. Local, for leaders."""
        events = [event for event in self._events.read() if event["incarnation"] == self._session.incarnation]
        for event in events:
            self._log(event)
            if event["kind"] in ("published", "lost", "failing"):
                self._outcomes[event["step"]] = event
                self._n_refusals += is_refusal(event)
            if event["kind"] == "published":
                self._starts, self._n_refusals = min(self._starts, 1), 0
            elif event["kind"] in ("failed", "fenced"):
                self._fatal = RankError(event["why"], "bug") if event["kind"] == "failed" else RunError(event["why"])
        return events

    def _may_pass(self, refused: DiskError) -> bool:
        """Whether it is worth waiting for the service's next attempt."""
        return refused.may_pass and self._n_refusals < TRIES

    def _log(self, event: dict[str, Any]) -> None:
        if event["kind"] == "published":
            log.info(
                "checkpoint %d is published, %.1f s after it was taken up (%.2f GB/s)",
                event["step"], event["seconds"], event["gb_per_s"],
            )  # fmt: skip
        elif event["kind"] == "recovered":
            log.info("%s", event["why"])
        elif event["kind"] != "retired" or "why" in event:
            log.error("%s", event["why"])

    def _service_lives(self) -> bool:
        lock = self.region.lock(SERVICE_LOCK)
        try:
            return lock.holder() is not None
        finally:
            lock.close()

    def _ensure_service(self) -> None:
        """Start the node's service if there is none. Raises RunError when it dies again and again. Local, leaders."""
        log_file = self._run_dir / "logs" / f"checkpoint_service.{self.node.number}.log"
        while not self._service_lives():
            if self._starts > RESTARTS:
                raise RunError(f"the checkpoint service of this node has ended {self._starts} times; see {log_file}")
            if self._starts:
                log.warning("the checkpoint service of this node is gone; starting another")
            self._starts += 1
            self._service = self._start(self._run_dir, self._shm, log_file)
            looks = 0
            while self._service.poll() is None and not self._service_lives():
                looks += 1
                if looks > START_S / LOOK_S:
                    raise RunError(f"the checkpoint service did not start within {START_S:.0f} s; see {log_file}")
                self._sleep(LOOK_S)


def _no_room(error: OSError) -> str:
    """Why there is no room for a region or its slots; raises what is something else."""
    if error.errno not in NO_ROOM:
        raise error
    return f"there is no room in memory for checkpoints: {error.filename}: {error.strerror}"


# -- the start before ours -----------------------------------------------------------------------------------------


def await_older_writers(
    root: Path,
    incarnation: int,
    me: Owner,
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait, within bounds, while a service of an older start is at work on a step; on rank 0, before it is shut out.

    One on this machine is waited for as long as it lives; one elsewhere as long as it shows itself.
    """
    begun_s, seen = now(), {}
    while now() - begun_s < HANDOVER_S:
        busy = drain.busy_writers(root, incarnation, me)
        for path, (beat, alive) in list(busy.items()):
            if path not in seen:
                log.info("waiting for the checkpoint service of an earlier start, which is writing (%s)", path.name)
            if path not in seen or seen[path][0] != beat:
                seen[path] = (beat, now())
            if alive is None and now() - seen[path][1] > SILENT_BEATS * drain.BEAT_S:
                del busy[path]
        if not busy:
            return
        sleep(LOOK_S * 4)
    log.warning("an earlier start's checkpoint service has been writing for %.0f s; it is shut out", HANDOVER_S)


@dataclass(frozen=True)
class Node:
    """This rank's node, as far as checkpoints are concerned: ranks that share one region of memory."""

    number: int
    n_nodes: int
    ranks: tuple[int, ...]

    @property
    def leader(self) -> int:
        """The rank that acts for the node."""
        return self.ranks[0]


def node_of(rank: int, places: list[Any]) -> Node:
    """Ranks of equal place are on one node; nodes are numbered in the order of their first rank."""
    distinct = list(dict.fromkeys(places))
    ranks = tuple(other for other, place in enumerate(places) if place == places[rank])
    return Node(distinct.index(places[rank]), len(distinct), ranks)
