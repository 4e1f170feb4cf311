"""What the training loop sees of checkpoints: when one is due, save, find the newest good one, load.

Promise: one rank decides and all ranks hear it. A save that fails (full disk, quota, a broken disk) costs that
checkpoint and nothing else: its remains are removed, older ones stay, all ranks get the same report. Every rank calls
every method at the same step; collectives run on the calling thread only, on a process group of their own with a long
time-out.
Cost: the synchronous path blocks for hashing, writing and fsync of this rank's share, and two small collectives.

    manager = CheckpointManager(args.checkpoint, run_dir, device=device, lock=lock)
    step = manager.latest()                    # newest that verifies; worse ones are set aside
    if step is not None: manager.load(step, state)
    manager.prepare(state)                     # before step 1: plan the files, is there room?
    ...
    if manager.is_due(step): report = manager.save(step, state)
"""

from __future__ import annotations

import errno
import logging
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
import torch
import torch.distributed as dist

from lingua.checkpoint import dcp, layout, lookup, publish, retention
from lingua.checkpoint.publish import Manifest
from lingua.checkpoint.state import TrainState, restore_scalars, scalars_of, tensors_of
from lingua.files import DISK, Files, RunError, free_bytes, human_bytes, make_folder, read_json
from lingua.runlock import RunLock
from lingua.schema import CheckpointArgs

log = logging.getLogger(__name__)
T = TypeVar("T")

SLOWEST_DISK = timedelta(hours=4)
"""How long ranks wait for the slowest one's writing, reading or verifying."""


@dataclass
class SaveReport:
    """How a save went; the same on all ranks."""

    step: int
    path: Path
    published: bool
    error: str | None = None
    """Why there is no checkpoint of this step, in one sentence."""
    size_bytes: int = 0
    seconds: float = 0.0
    deleted: list[int] = field(default_factory=list)
    """Steps that retention gave up afterwards (with async_cleanup: will give up)."""


@dataclass(frozen=True)
class _Written:
    """What one rank has to say about its files."""

    facts: Manifest
    error: str | None = None
    is_bug: bool = False
    """Not the disk's fault: nothing that a later save would do better."""


class Ranks:
    """The few exchanges a checkpoint needs. Alone, they cost nothing."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self._group: dist.ProcessGroup | None = None
        if self.size > 1:
            group = dist.new_group(backend="gloo", timeout=SLOWEST_DISK)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_main(self, act: Callable[[], T]) -> T:
        """What `act` returns on rank 0, on every rank; or its RunError or OSError, on every rank."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer = [act(), None]
            except (RunError, OSError) as error:
                answer = [None, f"{error}"]
            except BaseException:
                if self._group is not None:  # the others must not wait for us
                    dist.broadcast_object_list([None, "rank 0 failed, see its log"], src=0, group=self._group)
                raise
        if self._group is not None:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise RunError(answer[1])
        return answer[0]


def _raise_if(error: str | None) -> None:
    if error is not None:
        raise RunError(error)


class CheckpointManager:
    """Synchronous checkpoints of one run. `lock` (rank 0's) gives the incarnation and is asked before each publish."""

    def __init__(
        self,
        args: CheckpointArgs,
        run_dir: Path,
        *,
        device: torch.device | str = "cpu",
        lock: RunLock | None = None,
        files: Files = DISK,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.args = args
        self.run_dir = Path(run_dir)
        self.root = Path(args.path) if args.path else self.run_dir / layout.CHECKPOINTS
        self.device = torch.device(device)
        self._lock = lock
        self._files = files
        self._dump = retention.Rhythm(args.dump.every, args.dump.keep)
        self._eval = retention.Rhythm(args.eval.every, args.eval.keep)
        self._sizes_only = args.verify_on_load == "sizes"
        self._ranks = Ranks()
        self._plan: dcp.WritePlan | None = None
        self._total_bytes = 0
        self._verified: set[int] = set()
        self._cleaner = ThreadPoolExecutor(max_workers=1) if args.async_cleanup else None
        self._cleaning: Future[None] | None = None
        self._now = now
        self._safe_since_s = now()
        """When the newest checkpoint was published; until one is, when this start began."""
        self._last_save: dict[str, float] = {}
        self.incarnation, self._published = self._ranks.from_main(self._begin)

    def _begin(self) -> tuple[int, set[int]]:
        incarnation = self._lock.incarnation if self._lock else 0
        make_folder(self.root, "checkpoint.path" if self.args.path else "dump_dir")
        if self.args.async_save_mode is not None:
            log.warning(
                "checkpoint.async_save_mode %s: not built yet, saves are synchronous", self.args.async_save_mode
            )
        publish.open_passage(self.root, incarnation, files=self._files)
        return incarnation, set(layout.done_steps(self.root))

    # -- when ------------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint after this step."""
        return retention.is_due(step, self._dump, self._eval, self.args.keep_every)

    def has(self, step: int) -> bool:
        """Whether this step is published already."""
        return step in self._published

    # -- save ------------------------------------------------------------------------------------------------------

    def prepare(self, state: TrainState) -> int:
        """Plan the files and make sure that one checkpoint fits on the disk; returns its bytes. Collective.

        Raises RunError with the numbers when it does not fit.
        """
        self._make_plan(state)
        self._ranks.from_main(self._check_room)
        return self._total_bytes

    def save(self, step: int, state: TrainState, *, final: bool = False) -> SaveReport:
        """Write and publish a checkpoint, then let retention delete older ones. Collective.

        A failure is told in the report; with `final` it raises RunError, since nothing comes after.
        """
        path = layout.folder(self.root, step)
        if step in self._published:
            return SaveReport(step, path, published=True)
        started = time.perf_counter()
        self._make_plan(state)
        written = self._ranks.gather(self._write(step, state))
        error = self._ranks.from_main(lambda: self._publish(step, written, started))
        if final or any(of_rank.is_bug for of_rank in written):
            _raise_if(error)
        report = SaveReport(step, path, published=error is None, error=error)
        report.seconds = time.perf_counter() - started
        if error is not None:
            return report
        report.size_bytes = sum(fact.size_bytes for of_rank in written for fact in of_rank.facts.values())
        self._published.add(step)
        self._verified.add(step)
        self._safe_since_s = self._now()
        self._last_save = {
            "checkpoint/stall_s": report.seconds,
            "checkpoint/drain_gb_per_s": report.size_bytes / 1e9 / report.seconds,
        }
        report.deleted = self._ranks.from_main(self._retain)
        self._published.difference_update(report.deleted)
        if self._ranks.rank == 0:
            rate = report.size_bytes / 1e9 / report.seconds
            size = human_bytes(report.size_bytes)
            log.info("checkpoint %d: %s in %.2f s (%.2f GB/s) at %s", step, size, report.seconds, rate, path)
        return report

    def _make_plan(self, state: TrainState) -> None:
        tensors = tensors_of(state)
        if self._plan is not None and self._plan.fits(tensors.by_name):
            return
        rank = self._ranks.rank
        local_plans = self._ranks.gather(dcp.local_plan(tensors.by_name, is_coordinator=rank == 0))
        plans, metadata = self._ranks.from_main(lambda: dcp.global_plan(local_plans, tensors.paths, tensors.aliases))
        self._plan = dcp.write_plan(tensors.by_name, plans[rank], rank, metadata if rank == 0 else None)
        own_bytes = sum(file.size_bytes for file in self._plan.files) + len(self._plan.metadata or b"")
        self._total_bytes = sum(self._ranks.gather(own_bytes))

    def _check_room(self) -> None:
        free, needed = free_bytes(self.root), self._total_bytes
        if free < needed:
            raise RunError(
                f"{self.root} has {human_bytes(free)} free, but one checkpoint takes {human_bytes(needed)}; "
                "make room, or choose another disk with dump_dir or checkpoint.path"
            )
        at_once = retention.kept_at_once(self._dump, self._eval, self.args.keep_every)
        missing = needed * (at_once or 0) - free - needed * len(self._published)
        if missing > 0:
            log.warning(
                "checkpoints will take %d x %s, which is %s more than %s has; lower checkpoint.dump.keep or eval.keep",
                at_once, human_bytes(needed), human_bytes(missing), self.root,
            )  # fmt: skip

    def _write(self, step: int, state: TrainState) -> _Written:
        """Write this rank's files into the temporary folder. Raises nothing: the others must hear what went wrong."""
        assert self._plan is not None
        folder = layout.coming(layout.folder(self.root, step), self.incarnation)
        readback = self.args.verify == "readback"
        facts: Manifest = {}
        try:
            self._files.mkdir(folder)
            tensors = tensors_of(state).by_name
            for file in self._plan.files:
                content = dcp.file_content(file, tensors)
                facts[file.name] = publish.write_hashed(
                    folder / file.name, content, readback=readback, files=self._files
                )
            small = {layout.train_state_file(self._ranks.rank): self._scalars(state)}
            if self._plan.metadata is not None:
                small[layout.METADATA] = self._plan.metadata
            for name, content in small.items():
                facts[name] = publish.write_hashed(folder / name, [content], readback=readback, files=self._files)
            self._files.fsync_dir(folder)
        except OSError as error:
            return _Written(facts, self._sentence(error))
        except Exception:
            return _Written(facts, f"rank {self._ranks.rank} failed:\n{traceback.format_exc()}", is_bug=True)
        return _Written(facts)

    def _scalars(self, state: TrainState) -> bytes:
        document = scalars_of(state, self._ranks.rank, self._ranks.size)
        return orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)

    def _publish(self, step: int, written: list[_Written], started: float) -> str | None:
        """On rank 0, with every rank's facts: publish, or clear away; returns what went wrong."""
        problem = next((of_rank.error for of_rank in written if of_rank.error is not None), None)
        if problem is None:
            facts = {name: fact for of_rank in written for name, fact in of_rank.facts.items()}
            try:
                if self._lock is not None:
                    self._lock.check()
                seconds = time.perf_counter() - started
                publish.publish(self.root, step, self.incarnation, facts, seconds=seconds, files=self._files)
                return None
            except OSError as error:
                problem = self._sentence(error)
        publish.abandon(self.root, step, self.incarnation, files=self._files)
        problem = f"checkpoint {step} is lost, older ones are untouched: {problem}"
        log.error("%s", problem)
        return problem

    def _sentence(self, error: OSError) -> str:
        where = error.filename or self.root
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
            free, needed = human_bytes(free_bytes(self.root)), human_bytes(self._total_bytes)
            return f"{reason} at {self.root} ({free} free, a checkpoint takes {needed}); make room"
        return f"{where}: {error.strerror or error}"

    # -- retention -------------------------------------------------------------------------------------------------

    def _retain(self) -> list[int]:
        """On rank 0: delete what nobody needs; a disk that refuses is reported, not fatal."""
        try:
            pinned = publish.pinned_steps(self.root, time.time())
        except (RunError, OSError) as error:
            log.warning("no checkpoint is deleted, since the pins cannot be read: %s", error)
            return []
        done = layout.done_steps(self.root)
        steps = retention.to_delete(
            done,
            self._dump,
            self._eval,
            verified=self._verified,
            pinned=pinned,
            keep_every=self.args.keep_every,
        )
        if self._cleaner is None:
            self._retire(steps)
        else:
            self._wait_for_cleaner()
            self._cleaning = self._cleaner.submit(self._retire, steps)
        return steps

    def _retire(self, steps: list[int]) -> None:
        for step in steps:
            try:
                publish.retire(self.root, step, self.incarnation, files=self._files)
            except OSError as error:
                log.warning("cannot delete checkpoint %d: %s", step, error)

    def _wait_for_cleaner(self) -> None:
        if self._cleaning is not None:
            self._cleaning.result()
            self._cleaning = None

    # -- resume ----------------------------------------------------------------------------------------------------

    def latest(self) -> int | None:
        """The newest published step that verifies, the same on all ranks; None for a fresh start. Collective.

        All ranks share the reading. What does not verify is set aside (renamed, never deleted) and reported. Raises
        RunError when there were some and none verifies: beginning again at step 0 is for a person to decide.
        """
        set_aside: list[int] = []
        while True:
            self._published = self._ranks.from_main(lambda: set(layout.done_steps(self.root)))
            if not self._published:
                _raise_if(
                    f"none of the checkpoints {set_aside} in {self.root} verifies; they are set aside there. "
                    "Look at the disk; the same command begins again at step 0"
                    if set_aside
                    else None
                )
                return None
            step = max(self._published)
            problems = self._damage(step)
            if not problems:
                self._verified.add(step)
                return step
            self._ranks.from_main(partial(self._set_aside, [step], "broken", "; ".join(problems)))
            set_aside.append(step)

    def _damage(self, step: int) -> list[str]:
        """What is wrong with a published checkpoint, judged by all ranks, each reading a part. Collective."""
        folder = layout.folder(self.root, step)

        def manifest() -> Manifest | str:
            try:
                return publish.read_marked_manifest(self.root, step)
            except publish.DamagedError as error:
                return str(error)

        facts = self._ranks.from_main(manifest)
        if isinstance(facts, str):
            return [facts]
        mine = dict(sorted(facts.items())[self._ranks.rank :: self._ranks.size])
        problems: list[str] = []
        unjudged: str | None = None
        try:
            problems = publish.damage(folder, mine, sizes_only=self._sizes_only)
        except OSError as error:
            unjudged = f"cannot read checkpoint {step}: {error}; mend that, or move {folder} and its mark away"
        found = self._ranks.gather((problems, unjudged))
        _raise_if(next((message for _, message in found if message), None))
        return [problem for problems, _ in found for problem in problems]

    def _set_aside(self, steps: list[int], reason: str, why: str) -> None:
        for step in sorted(steps, reverse=True):
            log.error("CHECKPOINT %d IS SET ASIDE as %s in %s: %s", step, reason, self.root, why)
            publish.set_aside(self.run_dir, self.root, step, reason, files=self._files)

    def load(self, step: int, state: TrainState) -> None:
        """Restore a published step into `state`, in place; later checkpoints and their evaluations are set aside.

        Collective. Raises RunError, on all ranks, when it cannot be loaded.
        """
        if step not in self._published:
            raise RunError(f"{self.root} has no checkpoint of step {step}; it has {sorted(self._published) or 'none'}")
        if step not in self._verified:
            if problems := self._damage(step):
                raise RunError(f"checkpoint {step} in {self.root} does not verify: {'; '.join(problems)}")
            self._verified.add(step)
        self.load_folder(layout.folder(self.root, step), state)
        later = sorted(s for s in self._published if s > step)
        if later:
            why = f"the run goes on from step {step}"
            self._ranks.from_main(lambda: self._set_aside(later, "later", why))
            self._published.difference_update(later)

    def load_from(self, path: str | Path, state: TrainState, *, optimizer: bool = True) -> Path:
        """Restore the full state of RUN, RUN@step or a checkpoint folder; returns that folder. Collective.

        Without `optimizer` that one stays fresh.
        """
        folder = self._ranks.from_main(lambda: lookup.intact(path, sizes_only=self._sizes_only).folder)
        self.load_folder(folder, state, optimizer=optimizer)
        return folder

    def load_folder(self, folder: Path, state: TrainState, *, optimizer: bool = True) -> None:
        """Restore the full state from a checkpoint folder of ours, wherever it lies; not verified here. Collective."""
        started = time.perf_counter()
        error: str | None = None
        try:
            self._load_local(folder, state, optimizer)
        except (RunError, OSError) as caught:
            error = str(caught)
        except Exception:
            error = f"loading {folder} failed on rank {self._ranks.rank}:\n{traceback.format_exc()}"
        _raise_if(next((message for message in self._ranks.gather(error) if message), None))
        if self._ranks.rank == 0:
            n_ranks, seconds = len(state.per_rank_all), time.perf_counter() - started
            log.info("loaded full state from %s (saved by %d ranks) in %.2f s", folder, n_ranks, seconds)

    def _load_local(self, folder: Path, state: TrainState, optimizer: bool) -> None:
        first = read_json(folder / layout.train_state_file(0))
        try:
            n_ranks = int(first["world_size"])
            documents = [first, *(read_json(folder / layout.train_state_file(rank)) for rank in range(1, n_ranks))]
        except (KeyError, TypeError):
            raise RunError(f"{folder / layout.train_state_file(0)} is not the state of a run") from None
        tensors = tensors_of(state)
        wanted = {name: t for name, t in tensors.by_name.items() if optimizer or name.startswith("model.")}
        there = {name for name in dcp.tensor_properties(folder) if optimizer or name.startswith("model.")}
        if extra := sorted(there - set(wanted) - set(tensors.aliases)):
            raise RunError(f"{folder} holds what this model and optimizer do not have: {dcp.some(extra)}")
        dcp.read_into(folder, wanted)
        restore_scalars(state, documents, self._ranks.rank, self._ranks.size, optimizer=optimizer)

    def metrics(self) -> dict[str, float]:
        """What the newest save cost, and how much work a crash at this moment would lose."""
        age_s = self._now() - self._safe_since_s
        return {**self._last_save, "checkpoint/age_of_newest_done_s": age_s, "checkpoint/lost_work_at_risk_s": age_s}

    def close(self) -> None:
        """Wait for background deletion."""
        self._wait_for_cleaner()
        if self._cleaner is not None:
            self._cleaner.shutdown()
