"""Save synchronously: every rank writes its files to the disk, then rank 0 publishes the checkpoint.

A failure costs that checkpoint only: its remains are removed and all ranks get the reason, with its errno.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lingua.checkpoint import dcp, layout, publish
from lingua.checkpoint.publish import Manifest, disk_error
from lingua.checkpoint.staging_buffers import StagingBuffers
from lingua.checkpoint.state import TrainState, scalars_json
from lingua.distributed.process_group import Ranks
from lingua.files import DiskError, Files, RunError
from lingua.run.failure import RankError, carried, classify
from lingua.run.lock import OvertakenError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """The files that one rank has written, and its error."""

    facts: Manifest
    error: RunError | None = None
    is_bug: bool = False
    """Not the disk's fault: a later save would fail as well."""


@dataclass
class DirectWriter:
    """Writes and publishes checkpoints of one run."""

    root: Path
    attempt: int
    ranks: Ranks
    files: Files
    direct_io: bool
    readback: bool
    run_id: str
    check_owner: Callable[[], None]
    """On rank 0: raises OvertakenError if another attempt has the run, RunError if another run has its checkpoints."""

    def save(
        self,
        step: int,
        plan: dcp.WritePlan,
        state: TrainState,
        tensors: dict[str, Tensor],
        total_bytes: int,
        *,
        again: bool = False,
    ) -> tuple[RunError | None, int]:
        """Return (why there is no checkpoint, or None; its bytes). Collective. Raises RunError for a bug on any rank.

        `again`: this attempt has just failed to save the step; if only the last renames are missing, finish them.
        """
        started = time.perf_counter()
        if again:
            try:
                if self.ranks.from_main(lambda: self._is_published(step)):
                    return None, total_bytes
            except DiskError as error:  # on all ranks; writing now would set aside a folder that may lack only its mark
                return error, 0
        written = self.ranks.gather(self._write(step, plan, state, tensors, total_bytes))
        error = self.ranks.from_main(lambda: self._publish(step, written, started, total_bytes))
        if error is not None and any(of_rank.is_bug for of_rank in written):
            raise error
        return error, sum(fact.size_bytes for of_rank in written for fact in of_rank.facts.values())

    def _is_published(self, step: int) -> bool:
        """On rank 0: finish leftover renames; return whether the step is published after all."""
        publish.resume(self.root, step, self.attempt, files=self.files)
        if not layout.done_mark(self.root, step).exists():
            return False
        self.files.fsync_dir(self.root)
        return publish.attempt_of(self.root, step) == self.attempt

    def _write(
        self, step: int, plan: dcp.WritePlan, state: TrainState, tensors: dict[str, Tensor], total_bytes: int
    ) -> _Written:
        """Write this rank's files. Returns errors instead of raising them: the other ranks must know."""
        folder = layout.coming(layout.folder(self.root, step), self.attempt)
        facts: Manifest = {}
        try:
            self.files.mkdir(folder)
            buffers = StagingBuffers()
            for file in plan.files:
                content = buffers.stream(dcp.file_content(file, tensors))
                facts[file.name] = publish.write_hashed(
                    folder / file.name,
                    publish.in_pages(content) if self.direct_io else content,
                    direct_io=self.direct_io,
                    readback=self.readback,
                    files=self.files,
                )
            small = {layout.train_state_file(self.ranks.rank): scalars_json(state, self.ranks.rank, self.ranks.size)}
            if plan.metadata is not None:
                small[layout.METADATA] = plan.metadata
            for name, content in small.items():
                facts[name] = publish.write_hashed(folder / name, [content], readback=self.readback, files=self.files)
            self.files.fsync_dir(folder)
        except OSError as error:
            return _Written(facts, disk_error(error, self.root, total_bytes))
        except Exception as error:
            bug = RankError(f"rank {self.ranks.rank} failed:\n{traceback.format_exc()}", classify(error))
            return _Written(facts, bug, is_bug=True)
        return _Written(facts)

    def _publish(self, step: int, written: list[_Written], started: float, total_bytes: int) -> RunError | None:
        """On rank 0: publish what all ranks have written, or remove it; return what went wrong."""
        problem = next((of_rank.error for of_rank in written if of_rank.error is not None), None)
        try:
            self.check_owner()  # also after an error: it may come from an attempt that has taken over
            if problem is None:
                facts = {name: fact for of_rank in written for name, fact in of_rank.facts.items()}
                seconds = time.perf_counter() - started
                publish.publish(
                    self.root, step, self.attempt, facts, run_id=self.run_id, seconds=seconds, files=self.files
                )
                return None
        except OSError as error:
            problem = problem or disk_error(error, self.root, total_bytes)
        except OvertakenError:  # our staging dir may hold the other attempt's files
            raise
        except RunError:
            publish.abandon(self.root, step, self.attempt, files=self.files)
            raise
        publish.abandon(self.root, step, self.attempt, files=self.files)
        return carried(problem, f"checkpoint {step} is lost, older ones are untouched: {problem}")
