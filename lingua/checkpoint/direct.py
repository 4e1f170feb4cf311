"""The synchronous way of a checkpoint: every rank writes its files to the disk and waits, then rank 0 publishes.

Promise: a failure costs that checkpoint only; its remains are removed and all ranks hear the reason.
Cost: the caller waits for hashing, writing and fsync of this rank's share, and for two small collectives.
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
from lingua.checkpoint.publish import Manifest, disk_sentence
from lingua.checkpoint.ranks import Ranks, raise_if
from lingua.checkpoint.state import TrainState, scalars_json
from lingua.files import Files, RunError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """What one rank has to say about its files."""

    facts: Manifest
    error: str | None = None
    is_bug: bool = False
    """Not the disk's fault: nothing that a later save would do better."""


@dataclass
class DirectWriter:
    """Writes and publishes checkpoints of one run."""

    root: Path
    incarnation: int
    ranks: Ranks
    files: Files
    direct_io: bool
    readback: bool
    check_owner: Callable[[], None]
    """On rank 0: raises RunError when a newer start owns the run."""

    def save(
        self, step: int, plan: dcp.WritePlan, state: TrainState, tensors: dict[str, Tensor], total_bytes: int
    ) -> tuple[str | None, int]:
        """(why there is no checkpoint, or None; its bytes). Collective. Raises RunError for a bug on any rank."""
        started = time.perf_counter()
        written = self.ranks.gather(self._write(step, plan, state, tensors, total_bytes))
        error = self.ranks.from_main(lambda: self._publish(step, written, started, total_bytes))
        if any(of_rank.is_bug for of_rank in written):
            raise_if(error)
        return error, sum(fact.size_bytes for of_rank in written for fact in of_rank.facts.values())

    def _write(
        self, step: int, plan: dcp.WritePlan, state: TrainState, tensors: dict[str, Tensor], total_bytes: int
    ) -> _Written:
        """Write this rank's files. Raises nothing: the others must hear what went wrong."""
        folder = layout.coming(layout.folder(self.root, step), self.incarnation)
        facts: Manifest = {}
        try:
            self.files.mkdir(folder)
            for file in plan.files:
                content = dcp.file_content(file, tensors)
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
            return _Written(facts, disk_sentence(error, self.root, total_bytes))
        except Exception:
            return _Written(facts, f"rank {self.ranks.rank} failed:\n{traceback.format_exc()}", is_bug=True)
        return _Written(facts)

    def _publish(self, step: int, written: list[_Written], started: float, total_bytes: int) -> str | None:
        """On rank 0, with every rank's facts: publish, or clear away; returns what went wrong."""
        problem = next((of_rank.error for of_rank in written if of_rank.error is not None), None)
        if problem is None:
            facts = {name: fact for of_rank in written for name, fact in of_rank.facts.items()}
            try:
                self.check_owner()
                seconds = time.perf_counter() - started
                publish.publish(self.root, step, self.incarnation, facts, seconds=seconds, files=self.files)
                return None
            except OSError as error:
                problem = disk_sentence(error, self.root, total_bytes)
            except RunError:
                publish.abandon(self.root, step, self.incarnation, files=self.files)
                raise
        publish.abandon(self.root, step, self.incarnation, files=self.files)
        return f"checkpoint {step} is lost, older ones are untouched: {problem}"
