"""Reads a run folder as it is at this moment; decides nothing.

Only reads: a file that is missing, damaged or of another version counts as absent. Takes a dozen small files and the
last 64 KiB of the metrics, however long the run is.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from lingua.checkpoint.layout import CHECKPOINTS, EVALS, done_mark, done_steps, parse_folder
from lingua.checkpoint.lookup import hint_at_step, step_in_memory
from lingua.checkpoint.shm.area import SHM
from lingua.config.frozen import CONFIG_FILE
from lingua.config.yaml_layers import MAX_VALUES, n_values
from lingua.files import RunError, entries, read_json
from lingua.logger import RANK_LOGS
from lingua.run.failure import Failure, read_failures
from lingua.run.folder import STOP_FILE
from lingua.run.lock import FOLDER, Attempt, newest_attempt
from lingua.run.metrics import METRICS_FILE, VALIDATION_FILE
from lingua.slurm import SlurmJob

_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class RunFacts:
    """What a run folder says."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    now_s: float = 0.0
    """When the folder was read, in seconds since the epoch."""
    attempt: Attempt | None = None
    """The newest."""
    stop: dict[str, Any] | None = None
    stop_age_s: float | None = None
    earlier: tuple[dict[str, Any] | None, ...] = ()
    """stop.json of each attempt before the newest; None for one that was killed."""
    failures: tuple[Failure, ...] = ()
    """Of the newest attempt."""
    metrics: dict[str, Any] | None = None
    """Its last line."""
    metrics_age_s: float | None = None
    validation: dict[str, Any] | None = None
    evaluated_step: int | None = None
    checkpoint: int | None = None
    """Step of the newest published checkpoint."""
    checkpoint_age_s: float | None = None
    in_memory: int | None = None
    """Newest step that is whole in this machine's memory, from where the next start here saves it first."""
    job: SlurmJob | None = None
    """The newest attempt's, where Slurm knows it."""

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.path.name))

    @property
    def n_steps(self) -> int | None:
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def job_id(self) -> str:
        return self.attempt.owner.slurm_job_id if self.attempt is not None and not self.attempt.copied_from else ""


def find_run(path: Path) -> Path:
    """Return the run folder that a path means. Raises RunError if it is none."""
    if (path / CONFIG_FILE).is_file():
        return path
    inside = find_runs(path)
    if step := hint_at_step(path):
        raise RunError(f"{path} is not a run folder{step}")
    hint = f"did you mean {inside[0]}?" if inside else "`lingua runs FOLDER` lists the runs below a folder"
    raise RunError(f"{path} is not a run folder: it has no {CONFIG_FILE}; {hint}")


def find_runs(folder: Path, depth: int = 4) -> list[Path]:
    """Return the run folders at or below a folder, by name; does not look inside a run."""
    if (folder / CONFIG_FILE).is_file() and (folder / FOLDER).is_dir():
        return [folder]
    if depth == 0:
        return []
    below = [path for path in entries(folder) if path.is_dir() and not path.name.startswith(".")]
    return [run for path in below for run in find_runs(path, depth - 1)]


def read_run(path: Path, job: SlurmJob | None = None, now_s: float | None = None) -> RunFacts:
    """Read a run folder."""
    now_s = time.time() if now_s is None else now_s

    def age_s(file: Path) -> float | None:
        try:
            return max(0.0, now_s - file.stat().st_mtime)
        except OSError:
            return None

    config, attempt = _config(path), None
    with suppress(OSError, RunError):
        attempt = newest_attempt(path)
    earlier = range(1, attempt.number if attempt is not None else 1)
    section = config.get("checkpoint")
    root = section.get("path") if isinstance(section, dict) else None
    root = Path(root) if root and isinstance(root, str) else path / CHECKPOINTS
    done = done_steps(root)
    evaluated = (parse_folder(each.name) for each in entries(path / EVALS) if (each / "results.json").is_file())
    return RunFacts(
        path=path,
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
        evaluated_step=max((step for step in evaluated if step is not None), default=None),
        checkpoint=done[-1] if done else None,
        checkpoint_age_s=age_s(done_mark(root, done[-1])) if done else None,
        in_memory=_in_memory(path, root, section if isinstance(section, dict) else {}),
        job=job,
    )


def _in_memory(path: Path, root: Path, section: dict[str, Any]) -> int | None:
    if section.get("async_save_mode") is None:
        return None
    with suppress(OSError, RunError):
        return step_in_memory(path, root, shm=Path(str(section.get("shm_path") or SHM)))
    return None


def last_line(path: Path) -> dict[str, Any] | None:
    """Return the last whole record of a metrics file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.readlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(orjson.JSONDecodeError):  # torn by a kill, or cut by the seek
            record = orjson.loads(line)
            if isinstance(record, dict) and all(type(record.get(k, 0)) is int for k in ("global_step", "incarnation")):
                return {key: value for key, value in record.items() if "/" not in key or isinstance(value, int | float)}
    return None


def _config(path: Path) -> dict[str, Any]:
    """Return a run's config, read in C since there may be hundreds of runs; {} if it is damaged."""
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)((path / CONFIG_FILE).read_bytes())
        node = loader.get_single_node()
        tree = None if node is None or n_values(node) > MAX_VALUES else loader.construct_document(node)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def json_object_in(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file; None if there is none, or it is damaged."""
    with suppress(OSError, RunError):
        record = read_json(path)
        return record if isinstance(record, dict) else None
    return None
