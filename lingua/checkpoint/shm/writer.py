"""The asynchronous way of a checkpoint on one rank: memory for it, the snapshot, and what became of it.

Promise: a save costs the caller one memory copy; it is skipped, counted and reported when every slot is being written;
only the last save of a run waits. Where a node's memory does not suffice, that is known before step 1. Where it fails
later, NoSlotError asks the caller for a synchronous save.
Cost: see `stage.py`, `coordinator.py` and `service.py`; the process spends nothing between two saves.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lingua.checkpoint import capacity, dcp
from lingua.checkpoint.shm.coordinator import Coordinator, NoSlotError
from lingua.checkpoint.shm.staging import Stager
from lingua.checkpoint.state import TrainState, scalars_json
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.distributed.process_group import Ranks
from lingua.files import Files, RunError, free_bytes
from lingua.run.failure import RankError, carried, classify

log = logging.getLogger(__name__)

LOOK_S = 0.2


class BackgroundWriter:
    """Stages checkpoints of one run. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        args: CheckpointArgs,
        coordinator: Coordinator,
        ranks: Ranks,
        device: torch.device,
        files: Files,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.coordinator = coordinator
        self._args, self._ranks, self._device, self._files = args, ranks, device, files
        self._sleep = sleep
        self._stager: Stager | None = None
        self.n_skipped = 0
        """Saves that found no slot."""
        self._newest: int | None = None
        """Step of the last save that was staged."""
        self._number = 0
        """Its slot."""

    # -- memory ----------------------------------------------------------------------------------------------------

    def prepare(self, plan: dcp.WritePlan, env: Mapping[str, str] = os.environ) -> str | None:
        """Allocate the slots, in a thread; why that is impossible, None otherwise."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None
        own_bytes = sum(file.size_bytes for file in plan.files)
        sizes = self._ranks.gather(own_bytes)
        slot_bytes = sum(sizes[rank] for rank in self.coordinator.node.ranks)
        offers = self._ranks.on_each(lambda: self._room(slot_bytes))
        wanted = self._args.slots
        n_slots = min(offer.slots(wanted) for offer in offers)
        tightest = min(offers, key=lambda offer: offer.slots(wanted))
        if n_slots == 0:
            return f"{tightest.sentence(1)}; lower the memory use, or take more nodes"
        if n_slots < wanted and self._ranks.rank == 0:
            log.warning("%s; %d slots are used", tightest.sentence(wanted), n_slots)
        self._say_private(env)
        stager = Stager(self.coordinator.region, self._ranks.rank, plan, device=self._device, files=self._files)
        if why := self.coordinator.make_slots(n_slots, stager.names):
            stager.close()
            return why
        stager.allocate(n_slots)
        self._stager = stager
        return None

    def _room(self, slot_bytes: int) -> capacity.MemoryRoom:
        region = self.coordinator.region
        held = sum(path.lstat().st_blocks * 512 for slot in region.slots() for path in slot.folder.iterdir())
        limit, used = capacity.memory_limit(Path("/proc/self/cgroup").read_text())
        return capacity.MemoryRoom(free_bytes(region.folder) + held, limit, max(0, used - held), slot_bytes)

    def _say_private(self, env: Mapping[str, str]) -> None:
        if self._ranks.rank != 0:
            return
        try:
            of_init = Path("/proc/1/mountinfo").read_text()
        except OSError:
            of_init = None
        shm = self._args.shm_path
        why = capacity.private_shm(Path("/proc/self/mountinfo").read_text(), of_init, env, shm)
        if why is not None:
            log.warning(
                "%s %s (%s): a checkpoint that is only in memory when the job ends is lost",
                shm, capacity.PRIVATE_SHM, why,
            )  # fmt: skip

    # -- save ------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, state: TrainState, tensors: dict[str, Tensor], *, final: bool, deadline_s: float | None
    ) -> str | None:
        """Stage a snapshot; why there is none, None otherwise. The `final` one hurries the services, and waits.

        Raises NoSlotError, on all ranks, when there is no slot at all that it could wait for, or when memory failed the
        save before, and RunError, on all ranks, for a bug.
        """
        assert self._stager is not None
        if final:
            self.coordinator.tell(ending=True, deadline_s=deadline_s)
        if step == self._newest:
            return None  # as it is
        scalars, bug = self._scalars(state)
        number = self._take_slot(step, bug)
        while number is None and final and not self._ranks.from_main(lambda: self.coordinator.is_late(deadline_s)):
            self._sleep(LOOK_S)
            number = self._take_slot(step, bug)
        if number is None:
            self.n_skipped += 1
            return f"checkpoint {step} is skipped: every slot is still being written to the disk"
        self._stager.fill(number, self.coordinator.save_of(step), tensors, scalars, state.model)
        self._newest, self._number = step, number
        return None

    def _scalars(self, state: TrainState) -> tuple[bytes, RunError | None]:
        """This rank's JSON, and why there is none: the other ranks must hear of that. Local."""
        try:
            return scalars_json(state, self._ranks.rank, self._ranks.size), None
        except Exception as error:
            what = f"rank {self._ranks.rank} failed:\n{traceback.format_exc()}"
            return b"", RankError(what, classify(error))

    def _take_slot(self, step: int, bug: RunError | None) -> int | None:
        assert self._stager is not None
        usable, failed = self._stager.usable_slots()
        problem = None if failed is None else f"rank {self._ranks.rank}: a slot cannot be allocated: {failed}"
        if error := self._why_lost():
            problem = f"rank {self._ranks.rank}: the last checkpoint is lost: {error}"
            usable = usable if self._args.strict else set()  # strict: never synchronous
        return self.coordinator.take_slot(step, usable, problem, bug)

    def _why_lost(self) -> OSError | None:
        """Why this rank's part of the last save is not in memory; told once. Local."""
        assert self._stager is not None
        error = self._stager.wait_until_ready() or self.coordinator.mark_error
        self.coordinator.mark_error = None
        return error

    def finish(self, step: int, deadline_s: float | None, stopping: bool) -> str | None:
        """Wait until a staged step is on the disk; None if it is, what is missing if it stays in memory.

        Raises RunError, on all ranks, when it will not be there: NoSlotError, when memory failed it. See
        `Coordinator.await_published`.
        """
        lost = [error for error in self._ranks.gather(self._why_lost()) if error is not None]
        if lost:
            why = f"checkpoint {step} is lost: {lost[0]}"
            raise NoSlotError(why) if self.coordinator.withdraw(self._number) else carried(lost[0], why)
        return self.coordinator.await_published(step, deadline_s, stopping)

    def before_update(self) -> None:
        """Call before parameters or optimizer state change. Local."""
        if self._stager is not None:
            self._stager.before_update()

    def close(self) -> None:
        """Local."""
        if self._stager is not None:
            self._stager.close()
        self.coordinator.close()
