"""Finding, verifying and loading checkpoints. Every method is collective.

Rank 0 decides and all ranks load the same. A checkpoint that does not verify is set aside: renamed, never deleted, and
reported as an error. Nothing in a checkpoint is executed. A full verification reads every byte once, shared by the
ranks; `sizes` reads only names and sizes.
"""

from __future__ import annotations

import logging
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lingua.checkpoint import dcp, layout, lookup, publish
from lingua.checkpoint.documents import read_states, require_agreement
from lingua.checkpoint.publish import Manifest
from lingua.checkpoint.shm.snapshot import Snapshot
from lingua.checkpoint.state import TrainState, restore_scalars, tensors_of
from lingua.distributed.process_group import Ranks
from lingua.files import Files, RunError, raise_if
from lingua.optim.ema import begin_ema, is_ema
from lingua.run.failure import RankError, carried, classify

log = logging.getLogger(__name__)


class Restorer:
    """Loads from the checkpoints of one run, or from elsewhere."""

    def __init__(self, run_dir: Path, root: Path, ranks: Ranks, files: Files, verify: Literal["full", "sizes"]) -> None:
        self._run_dir, self._root, self._ranks, self._files = run_dir, root, ranks, files
        self._verify = verify
        self.verified: set[int] = set()
        """Steps that were verified and found intact."""

    def latest(self, published: set[int]) -> int | None:
        """Return the newest of the published steps that verifies; see `CheckpointManager.latest`.

        Steps that do not verify are taken out of `published`.
        """
        broken: list[int] = []
        while published:
            step = max(published)
            problems = self.damage(step)
            if not problems:
                return step
            self._ranks.from_main(partial(self._set_aside, [step], "broken", "; ".join(problems)))
            published.discard(step)
            broken.append(step)
        if broken:
            raise RunError(
                f"none of the checkpoints {broken} in {self._root} verifies; they are set aside there. "
                "Check the disk; the same command then begins again at step 0"
            )
        return None

    def damage(self, step: int) -> list[str]:
        """Return what is wrong with a published checkpoint, a sentence each; every rank reads a part of it."""
        if step in self.verified:
            return []
        folder = layout.folder(self._root, step)

        def manifest() -> Manifest | str:
            try:
                return publish.read_marked_manifest(self._root, step)
            except publish.ForeignError:
                raise  # it is whole, and another run's: nothing to set aside
            except publish.DamagedError as error:
                return str(error)
            except OSError as error:
                raise self._unjudged(step, error) from error

        facts = self._ranks.from_main(manifest)
        if isinstance(facts, str):
            return [facts]
        mine = dict(sorted(facts.items())[self._ranks.rank :: self._ranks.size])
        problems: list[str] = []
        unjudged: RunError | None = None
        try:
            problems = publish.damage(folder, mine, sizes_only=self._verify == "sizes")
        except OSError as error:
            unjudged = self._unjudged(step, error)
        found = self._ranks.gather((problems, unjudged))
        raise_if(next((error for _, error in found if error is not None), None))
        everything = [problem for problems, _ in found for problem in problems]
        if not everything:
            self.verified.add(step)
        return everything

    def _unjudged(self, step: int, error: OSError) -> RunError:
        remedy = f"repair that, or move {layout.folder(self._root, step)} and its mark away"
        return carried(error, f"cannot read checkpoint {step}: {error}; {remedy}")

    def _set_aside(self, steps: list[int], reason: str, why: str) -> None:
        for step in sorted(steps, reverse=True):
            log.error("CHECKPOINT %d IS SET ASIDE as %s in %s: %s", step, reason, self._root, why)
            publish.set_aside(self._run_dir, self._root, step, reason, files=self._files)

    def load(self, step: int, published: set[int], state: TrainState) -> None:
        """Restore a published step into `state`, in place; later ones and their evaluations are set aside."""
        if step not in published:
            raise RunError(f"{self._root} has no checkpoint of step {step}; it has {sorted(published) or 'none'}")
        if problems := self.damage(step):
            raise RunError(f"checkpoint {step} in {self._root} does not verify: {'; '.join(problems)}")
        self.load_folder(layout.folder(self._root, step), state)
        later = sorted(s for s in published if s > step)
        if later:
            why = f"the run continues from step {step}"
            self._ranks.from_main(lambda: self._set_aside(later, "later", why))
            published.difference_update(later)

    def load_from(self, path: str | Path, state: TrainState, *, optimizer: bool = True) -> Path:
        """Restore the state in RUN, RUN@step or a checkpoint folder; return the folder."""
        sizes_only = self._verify == "sizes"
        folder = self._ranks.from_main(lambda: lookup.intact(path, sizes_only=sizes_only).folder)
        self.load_folder(folder, state, optimizer=optimizer)
        there, told = publish.read_manifest_document(folder).step, state.shared.get("step")
        if told != there:
            raise RunError(f"{folder} holds step {there}, but its state is of step {told}; take another checkpoint")
        return folder

    def load_folder(self, folder: Path, state: TrainState, *, optimizer: bool = True) -> None:
        """Restore the full state from a checkpoint folder of ours, without verifying it."""
        started = time.perf_counter()
        error: RunError | None = None
        try:
            self._load_local(folder, state, optimizer)
        except RunError as caught:
            error = carried(caught)
        except OSError as caught:
            error = carried(caught, f"cannot load {folder}: {caught}; see whether its disk is well")
        except Exception as caught:
            what = f"loading {folder} failed on rank {self._ranks.rank}:\n{traceback.format_exc()}"
            error = RankError(what, classify(caught))
        raise_if(next((each for each in self._ranks.gather(error) if each is not None), None))
        if self._ranks.rank == 0:
            n_ranks, seconds = len(state.per_rank_all), time.perf_counter() - started
            log.info("loaded full state from %s (saved by %d ranks) in %.2f s", folder, n_ranks, seconds)

    def load_snapshot(self, opened: AbstractContextManager[Snapshot], state: TrainState) -> str | None:
        """Restore the full state from memory; return why that is impossible, or None. Then the state is undefined.

        Checksums are compared while the tensors are copied, each file by a rank of the node that holds it.
        """
        started, problem = time.perf_counter(), None
        try:
            with opened as snapshot:
                self._load_local(snapshot.folder, state, True, snapshot)
        except (RunError, OSError) as error:
            problem = str(error)
        except Exception:  # a bug in what comes from the disk too will be raised there
            problem = f"rank {self._ranks.rank}:\n{traceback.format_exc()}"
        problem = next((each for each in self._ranks.gather(problem) if each is not None), None)
        if problem is None and self._ranks.rank == 0:
            n_ranks, seconds = len(state.per_rank_all), time.perf_counter() - started
            log.info("loaded full state from memory (saved by %d ranks) in %.2f s", n_ranks, seconds)
        return problem

    def _load_local(self, folder: Path, state: TrainState, optimizer: bool, snapshot: Snapshot | None = None) -> None:
        found: list[Future[str | None]] = []
        with ThreadPoolExecutor(publish.VERIFY_THREADS) as pool:
            if snapshot is not None and self._verify == "full":
                found = [pool.submit(snapshot.damage, name) for name in snapshot.to_verify]
            self._read_local(folder, state, optimizer, snapshot)
        if problems := [problem for each in found if (problem := each.result())]:
            raise publish.DamagedError(f"{folder}: {'; '.join(problems)}")

    def _read_local(self, folder: Path, state: TrainState, optimizer: bool, snapshot: Snapshot | None) -> None:
        documents = read_states(folder) if snapshot is None else read_states(folder, snapshot.json)
        try:
            self._take(folder, documents, state, optimizer, snapshot)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise RunError(f"{folder} cannot be restored: {said}; take another checkpoint") from error

    def _take(
        self,
        folder: Path,
        documents: list[dict[str, Any]],
        state: TrainState,
        optimizer: bool,
        snapshot: Snapshot | None,
    ) -> None:
        tensors = tensors_of(state)
        metadata = dcp.read_metadata(folder, None if snapshot is None else snapshot.content)
        named = dcp.properties_in(metadata)
        averages = optimizer and state.has_ema and any(map(is_ema, named))

        def counts(name: str) -> bool:
            return name.startswith("model.") or (averages if is_ema(name) else optimizer)

        wanted = {name: t for name, t in tensors.by_name.items() if counts(name)}
        manifest = publish.read_manifest_document(folder) if snapshot is None else snapshot.manifest()
        require_agreement(folder, documents, dcp.files_of(metadata), manifest)
        there = {name for name in named if counts(name)}
        if extra := sorted(there - set(wanted) - set(tensors.aliases)):
            raise RunError(f"{folder} holds what this model and optimizer do not have: {dcp.some(extra)}")
        dcp.read_into(folder, wanted, metadata, None if snapshot is None else snapshot.content)
        if state.has_ema and not averages:
            begin_ema(state.optimizer, anew=True)
        restore_scalars(state, documents, self._ranks.rank, self._ranks.size, optimizer=optimizer)
