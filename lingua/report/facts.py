"""Read the current state of a run folder, without judging it.

A file that is missing, damaged or of another version counts as absent. Reads a dozen small files and the last 64 KiB of
the metrics, however long the run is.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingua.checkpoint.layout import done_mark, done_steps, evaluated_steps
from lingua.checkpoint.lookup import root_in, step_in_memory
from lingua.checkpoint.shm.area import SHM
from lingua.config.frozen import CONFIG_FILE
from lingua.config.yaml_layers import read_leniently
from lingua.files import RunError, json_object_in
from lingua.logger import RANK_LOGS
from lingua.run.failure import Failure, read_failures
from lingua.run.folder import STOP_FILE
from lingua.run.lock import Attempt, newest_attempt
from lingua.run.metrics import CHECKPOINT_FILE, METRICS_FILE, VALIDATION_FILE, last_line, read_metrics
from lingua.run.startup import EVENT
from lingua.scheduler import QueuedJob


@dataclass(frozen=True)
class RunFacts:
    """The contents of a run folder."""

    path: Path
    root: Path = Path()  # of its checkpoints
    config: dict[str, Any] = field(default_factory=dict)
    now_s: float = 0.0  # when the folder was read, in seconds since the epoch
    attempt: Attempt | None = None  # the newest; `failures` and `job` are its own
    stop: dict[str, Any] | None = None
    stop_age_s: float | None = None
    earlier: tuple[dict[str, Any] | None, ...] = ()  # stop.json of each earlier attempt; None: it was killed
    failures: tuple[Failure, ...] = ()
    metrics: dict[str, Any] | None = None  # the last line
    metrics_age_s: float | None = None
    validation: dict[str, Any] | None = None
    evaluated_step: int | None = None
    startup: dict[str, Any] | None = None  # the newest attempt's that has trained a step: seconds, parts, incarnation
    checkpoint: int | None = None  # step of the newest published one
    checkpoint_age_s: float | None = None
    in_memory: int | None = None  # newest complete step in this machine's memory; an attempt here resumes from it
    job: QueuedJob | None = None  # None if Slurm does not know it

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.path.name))

    @property
    def job_id(self) -> str:
        return self.attempt.owner.slurm_job_id if self.attempt is not None and not self.attempt.copied_from else ""


def _startup(path: Path) -> dict[str, Any] | None:
    with suppress(OSError):
        notes = read_metrics(path / CHECKPOINT_FILE)
        return next((note for note in reversed(notes) if note.get("event") == EVENT), None)
    return None


def read_run(path: Path) -> RunFacts:
    """Read a run folder; Slurm is not asked."""
    now_s = time.time()

    def age_s(file: Path) -> float | None:
        with suppress(OSError):
            return max(0.0, now_s - file.stat().st_mtime)
        return None

    config, attempt = read_leniently(path / CONFIG_FILE), None
    with suppress(OSError, RunError):
        attempt = newest_attempt(path)
    root = root_in(config, path)
    done = done_steps(root)
    section, in_memory = config.get("checkpoint"), None
    if isinstance(section, dict) and section.get("async_save_mode") is not None:
        with suppress(OSError, RunError):
            in_memory = step_in_memory(path, root, shm=Path(str(section.get("shm_path") or SHM)))
    earlier = range(1, attempt.number if attempt is not None else 1)
    return RunFacts(
        path=path,
        root=root,
        config=config,
        now_s=now_s,
        attempt=attempt,
        stop=json_object_in(path / STOP_FILE),
        stop_age_s=age_s(path / STOP_FILE),
        earlier=tuple(json_object_in(path / RANK_LOGS / f"stop.{number:04d}.json") for number in earlier),
        failures=tuple(read_failures(path)),
        metrics=last_line(path / METRICS_FILE),
        metrics_age_s=age_s(path / METRICS_FILE),
        validation=last_line(path / VALIDATION_FILE),
        startup=_startup(path),
        evaluated_step=max(evaluated_steps(path), default=None),
        checkpoint=done[-1] if done else None,
        checkpoint_age_s=age_s(done_mark(root, done[-1])) if done else None,
        in_memory=in_memory,
    )
