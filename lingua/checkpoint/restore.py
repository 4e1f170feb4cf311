"""Find, verify and load checkpoints. Every method is collective.

Rank 0 decides and all ranks load the same. A checkpoint that does not verify is set aside: renamed, never deleted, and
reported as an error. Nothing in a checkpoint is executed. Every byte is read once, by the rank that needs it, and
verified while it is read; `verify_on_load: sizes` compares only names and sizes.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from lingua.checkpoint import dcp, layout, lookup, publish
from lingua.checkpoint.dcp_reader import Pieces, StreamReader, pieces_in
from lingua.checkpoint.documents import ManifestDocument, read_states, require_agreement
from lingua.checkpoint.shm.snapshot import Snapshot
from lingua.checkpoint.state import TrainState, restore_scalars, tensors_of
from lingua.checkpoint.verified import Manifest, differs, pieces_of
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.distributed.process_group import Ranks
from lingua.files import Files, RunError, plural, raise_if, read_json
from lingua.optim.ema import begin_ema, is_ema
from lingua.run.failure import RankError, carried, classify

log = logging.getLogger(__name__)


class Restorer:
    """Loads from the checkpoints of one run, or from elsewhere."""

    def __init__(self, run_dir: Path, root: Path, ranks: Ranks, files: Files, args: CheckpointArgs) -> None:
        self._run_dir, self._root, self._ranks, self._files = run_dir, root, ranks, files
        self._verify, self._direct_io = args.verify_on_load, args.direct_io
        self.verified: set[int] = set()
        """Steps that were verified and found intact."""

    def latest(self, published: set[int], damage: Callable[[int], list[str]] | None = None) -> int | None:
        """Return the newest of the published steps that verifies; see `CheckpointManager.latest`.

        Removes steps that do not verify, by `damage`, from `published`.
        """
        broken: list[int] = []
        while published:
            step = max(published)
            problems = (damage or self.damage)(step)
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

    def load_latest(self, published: set[int], state: TrainState) -> int | None:
        """Restore the newest of the published steps that verifies, reading it once; return it. Otherwise as `latest`.

        A step that does not verify leaves `state` undefined until the next one is restored.
        """
        return self.latest(published, lambda step: self._load_verifying(step, state))

    def damage(self, step: int) -> list[str]:
        """Return the problems of a published checkpoint, a sentence each; every rank reads a part of it."""
        if step in self.verified:
            return []
        facts, problems = self._listed(step)
        if not problems and self._verify == "full":
            problems = self._differences(step, facts, sizes_only=False)
        if not problems:
            self.verified.add(step)
        return problems

    def _listed(self, step: int) -> tuple[Manifest, list[str]]:
        """Return a checkpoint's manifest, and the problems with its names and sizes."""

        def manifest() -> Manifest | str:
            try:
                return publish.read_marked_manifest(self._root, step)
            except publish.ForeignError:
                raise  # it is intact but another run's: nothing to set aside
            except publish.DamagedError as error:
                return str(error)
            except OSError as error:
                raise self._unjudged(layout.folder(self._root, step), error) from error

        facts = self._ranks.from_main(manifest)
        return ({}, [facts]) if isinstance(facts, str) else (facts, self._differences(step, facts, sizes_only=True))

    def _differences(self, step: int, facts: Manifest, *, sizes_only: bool) -> list[str]:
        mine = dict(sorted(facts.items())[self._ranks.rank :: self._ranks.size])
        problems: list[str] = []
        unjudged: RunError | None = None
        folder = layout.folder(self._root, step)
        try:
            problems = publish.damage(folder, mine, sizes_only=sizes_only)
        except OSError as error:
            unjudged = self._unjudged(folder, error)
        found = self._ranks.gather((problems, unjudged))
        raise_if(next((error for _, error in found if error is not None), None))
        return [problem for problems, _ in found for problem in problems]

    def _load_verifying(self, step: int, state: TrainState) -> list[str]:
        """Restore a published step and verify it in the same pass; return its problems, a sentence each."""
        facts: Manifest = {}
        if step not in self.verified:
            facts, problems = self._listed(step)
            if problems:
                return problems
        problems = self.load_folder(layout.folder(self._root, step), state, verify=facts)
        if not problems:
            self.verified.add(step)
        return problems

    def _unjudged(self, folder: Path, error: OSError) -> RunError:
        where = f"repair that, or move {folder} and its mark away"
        return carried(error, f"cannot read checkpoint {folder.name}: {error}; {where}")

    def _set_aside(self, steps: list[int], reason: str, why: str) -> None:
        for step in sorted(steps, reverse=True):
            log.error("CHECKPOINT %d IS SET ASIDE as %s in %s: %s", step, reason, self._root, why)
            publish.set_aside(self._run_dir, self._root, step, reason, files=self._files)

    def load(self, step: int, published: set[int], state: TrainState) -> None:
        """Restore a published step into `state`, in place; later ones and their evaluations are set aside."""
        if step not in published:
            raise RunError(f"{self._root} has no checkpoint of step {step}; it has {sorted(published) or 'none'}")
        if problems := self._load_verifying(step, state):
            raise RunError(f"checkpoint {step} in {self._root} does not verify: {'; '.join(problems)}")
        self.forget_later(step, published)

    def forget_later(self, step: int, published: set[int]) -> None:
        """Set aside the steps after the one from which the run continues, and remove them from `published`."""
        later = sorted(s for s in published if s > step)
        if later:
            why = f"the run continues from step {step}"
            self._ranks.from_main(lambda: self._set_aside(later, "later", why))
            published.difference_update(later)

    def load_from(self, path: str | Path, state: TrainState, *, optimizer: bool = True) -> Path:
        """Restore the state in RUN, RUN@step or a checkpoint folder; return the folder."""

        def load(checkpoint: lookup.Checkpoint) -> list[str]:
            problems = self._ranks.from_main(lambda: checkpoint.damage(sizes_only=True))
            if problems:
                return problems
            facts = self._ranks.from_main(checkpoint.manifest)
            needed = {name: fact for name, fact in facts.items() if optimizer or not layout.is_optim_file(name)}
            return self.load_folder(checkpoint.folder, state, optimizer=optimizer, verify=needed)

        folder = lookup.first_intact(self._ranks.from_main(lambda: lookup.find(path)), load).folder
        there, told = publish.read_manifest_document(folder).step, state.shared.get("step")
        if told != there:
            raise RunError(f"{folder} holds step {there}, but its state is of step {told}; take another checkpoint")
        return folder

    def load_folder(
        self, folder: Path, state: TrainState, *, optimizer: bool = True, verify: Manifest | None = None
    ) -> list[str]:
        """Restore the full state from a checkpoint folder of ours; return the problems of the files to `verify`."""
        started, verify = time.perf_counter(), (verify or {}) if self._verify == "full" else {}
        error, problems = None, list[str]()
        try:
            n_saved = sum(name.startswith("train_state") for name in verify)
            mine = {
                n: f for n, f in verify.items() if layout.reader_of(n, n_saved, self._ranks.size) == self._ranks.rank
            }
            problems = self._load_local(self._on_disk(folder, mine), state, optimizer)
        except RunError as caught:
            error = carried(caught)
        except OSError as caught:
            error = self._unjudged(folder, caught)
        except Exception as caught:
            what = f"loading {folder} failed on rank {self._ranks.rank}:\n{traceback.format_exc()}"
            error = RankError(what, classify(caught))
        found = self._ranks.gather((problems, error))
        if everything := [problem for problems, _ in found for problem in problems]:
            return everything
        raise_if(next((error for _, error in found if error is not None), None))
        if self._ranks.rank == 0:
            _say_loaded(str(folder), state, started)
        return []

    def load_snapshot(self, opened: AbstractContextManager[Snapshot], state: TrainState) -> str | None:
        """Restore the full state from memory; return None, or why that failed (the state is then undefined).

        Checksums are compared while the tensors are copied, each file by a rank of the node that holds it.
        """
        started, problem = time.perf_counter(), None
        try:
            with opened as snapshot:
                damaged = self._load_local(self._in_memory(snapshot), state, True)
            problem = f"{snapshot.folder}: {'; '.join(damaged)}" if damaged else None
        except (RunError, OSError) as error:
            problem = str(error)
        except Exception:  # a bug that is not specific to memory is raised again when loading from the disk
            problem = f"rank {self._ranks.rank}:\n{traceback.format_exc()}"
        problem = next((each for each in self._ranks.gather(problem) if each is not None), None)
        if problem is None and self._ranks.rank == 0:
            _say_loaded("memory", state, started)
        return problem

    def _on_disk(self, folder: Path, verify: Manifest) -> _Source:
        def pieces(name: str, begin: int, end: int | None) -> Iterator[memoryview]:
            return pieces_of(folder / name, begin, end, direct_io=self._direct_io)

        manifest = partial(publish.read_manifest_document, folder)
        return _Source(folder, pieces, verify, partial(dcp.read_metadata, folder), read_json, manifest)

    def _in_memory(self, snapshot: Snapshot) -> _Source:
        verify = {name: snapshot.facts[name] for name in snapshot.to_verify if self._verify == "full"}
        metadata = partial(dcp.read_metadata, snapshot.folder, snapshot.content)
        return _Source(snapshot.folder, pieces_in(snapshot.content), verify, metadata, snapshot.json, snapshot.manifest)

    def _load_local(self, source: _Source, state: TrainState, optimizer: bool) -> list[str]:
        """Restore this rank's part, or return the problems of the files that it verifies."""
        small = {name: fact for name, fact in source.verify.items() if not name.endswith(layout.TENSORS)}
        found = [differs(name, source.pieces(name, 0, None), fact) for name, fact in small.items()]
        if problems := [problem for problem in found if problem]:
            return problems
        try:
            return self._take(source, read_states(source.folder, source.json), state, optimizer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise RunError(f"{source.folder} cannot be restored: {said}; take another checkpoint") from error

    def _take(self, source: _Source, documents: list[dict[str, Any]], state: TrainState, optimizer: bool) -> list[str]:
        tensors = tensors_of(state)
        metadata, folder = source.metadata(), source.folder
        named = dcp.properties_in(metadata)
        averages = optimizer and state.has_ema and any(map(is_ema, named))

        def counts(name: str) -> bool:
            return name.startswith("model.") or (averages if is_ema(name) else optimizer)

        wanted = {name: t for name, t in tensors.by_name.items() if counts(name)}
        require_agreement(folder, documents, dcp.files_of(metadata), source.manifest())
        there = {name for name in named if counts(name)}
        if extra := sorted(there - set(wanted) - set(tensors.aliases)):
            raise RunError(f"{folder} holds what this model and optimizer do not have: {dcp.some(extra)}")
        large = {name: fact for name, fact in source.verify.items() if name.endswith(layout.TENSORS)}
        reader = StreamReader(folder, source.pieces, metadata, large)
        dcp.read_into(folder, wanted, metadata, reader)
        if reader.problems:
            return reader.problems
        if state.has_ema and not averages:
            begin_ema(state.optimizer, anew=True)
        restore_scalars(state, documents, self._ranks.rank, self._ranks.size, optimizer=optimizer)
        return []


def _say_loaded(place: str, state: TrainState, started: float) -> None:
    by, seconds = plural(len(state.per_rank_all), "rank"), time.perf_counter() - started
    log.info("loaded full state from %s (saved by %s) in %.2f s", place, by, seconds)


@dataclass(frozen=True)
class _Source:
    """A checkpoint on the disk or in memory, as one rank reads it."""

    folder: Path
    """Its name in messages."""
    pieces: Pieces
    verify: Manifest
    """The files that this rank reads whole and compares."""
    metadata: Callable[[], Metadata]
    json: Callable[[Path], Any]
    manifest: Callable[[], ManifestDocument]
