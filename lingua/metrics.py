"""Metrics of a run: `metrics.jsonl` and its like, wandb and TensorBoard.

Promise: a line is written whole or retried with the next; a disk that fills up is reported once and never ends the
run; every line carries its incarnation, so lines after a rollback can be told from those before. wandb counts by our
own step, which may go back. Torch-free: values come in as plain numbers.
Cost: one small write per `logging.freq` steps, not fsynced.
"""

from __future__ import annotations

import logging
import netrc
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import orjson
from pydantic import Field

from lingua.args import Args, Text

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "metrics.validation.jsonl"
CHECKPOINT_FILE = "metrics.checkpoint.jsonl"
EVAL_FILE = "metrics.eval.jsonl"
PROBE_FILE = "probe.jsonl"
_HELD_LINES = 10_000  # lines kept in memory while the disk refuses them


class WandbArgs(Args):
    """Weights & Biases run; keys are those of `wandb.init`."""

    project: Text | None = None
    """Project."""
    entity: Text | None = None
    """Team or user. Null: the account's default."""
    name: Text | None = None
    """Display name. Null: the run's."""
    group: Text | None = None
    """Group. Null: the run's name; its evaluations are in the same."""
    tags: list[Text] | None = None
    """Tags."""
    notes: Text | None = None
    """Notes."""
    job_type: Text | None = None
    """Kind of job."""
    dir: Text | None = None
    """Folder of wandb's files. Null: <dump_dir>/wandb."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Null: online where an API key is at hand, otherwise offline."""
    id: Text | None = None
    """Run id. Null: made at the first start and kept over restarts."""
    config_exclude_keys: list[str] | None = None
    """Config keys not sent."""
    config_include_keys: list[str] | None = None
    """Only these config keys are sent."""
    anonymous: Text | None = None
    """Anonymous mode."""
    allow_val_change: bool | None = None
    """Config values may change on resume."""
    resume: bool | Text | None = None
    """wandb's own resume rule. Null: allow."""
    force: bool | None = None
    """Stop without an account."""
    tensorboard: bool | None = None
    """Mirror TensorBoard."""
    sync_tensorboard: bool | None = None
    """Upload TensorBoard files."""
    monitor_gym: bool | None = None
    """Kept for lingua's configs."""
    save_code: bool | None = None
    """Upload the main script."""
    fork_from: Text | None = None
    """wandb's fork_from."""
    resume_from: Text | None = None
    """wandb's resume_from."""


class LoggingArgs(Args):
    """What is reported, how often, and where to."""

    freq: Annotated[int, Field(ge=1)] = 10
    """Steps between two lines."""
    acc_freq: Annotated[int, Field(ge=1)] | None = None
    """Micro steps between two lines with gradient accumulation. Null: steps only."""
    wandb: WandbArgs | None = None
    """Null: no wandb."""
    tensorboard: bool = False
    """Write TensorBoard files too (needs the tensorboard package)."""


# -- files -------------------------------------------------------------------------------------------------------


class JsonLines:
    """Appends one JSON object per line to a file; lines that the disk refuses are held and tried again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: deque[bytes] = deque(maxlen=_HELD_LINES)
        self._complained = False

    def write(self, record: Mapping[str, Any]) -> None:
        self._held.append(orjson.dumps(dict(record), option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        try:
            self._flush()
            self._complained = False
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("cannot write %s: %s; the run goes on and tries again", self.path, error.strerror or error)

    def _flush(self) -> None:
        with self.path.open("ab", buffering=0) as file:  # what is refused must not be written later, on closing
            start = file.tell()
            lines = b"".join(self._held)
            if start and not _ends_with_newline(self.path):  # torn by an earlier kill
                lines = b"\n" + lines
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                os.truncate(self.path, start)
                raise
        self._held.clear()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a line torn by a kill is left out."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            records.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
    return records


# -- trackers ----------------------------------------------------------------------------------------------------


class MetricLogger:
    """Sends each record to metrics.jsonl and to the trackers asked for. Made on rank 0 only; use as context manager."""

    def __init__(
        self,
        run_dir: Path,
        args: LoggingArgs,
        *,
        incarnation: int,
        run_name: str,
        config: Mapping[str, Any],
        wandb_id: str | None = None,
        wall_time: Callable[[], float] = time.time,
    ) -> None:
        self._lines = JsonLines(run_dir / METRICS_FILE)
        self._validation_lines = JsonLines(run_dir / VALIDATION_FILE)
        self._checkpoint_lines = JsonLines(run_dir / CHECKPOINT_FILE)
        self._probe_lines = JsonLines(run_dir / PROBE_FILE)
        self._incarnation = incarnation
        self._wall_time = wall_time
        self._wandb = _start_wandb(args.wandb, run_dir, run_name, config, wandb_id) if args.wandb else None
        self._tensorboard = _start_tensorboard(run_dir) if args.tensorboard else None

    @property
    def wandb_id(self) -> str | None:
        """Id to keep in checkpoints, so that a resumed run goes on in the same wandb run."""
        return self._wandb.id if self._wandb is not None else None

    def log(self, record: Mapping[str, float | int]) -> None:
        """Write one record of training; needs the key `global_step`."""
        self._send(self._lines, record)

    def log_validation(self, record: Mapping[str, float | int]) -> None:
        """Write one record of held-out losses, `<source>/bpb` and the like."""
        self._send(self._validation_lines, record, "validation/")

    def log_checkpoint(self, record: Mapping[str, Any]) -> None:
        """Write what happened to the checkpoint of `global_step`; to the file only."""
        self._write(self._checkpoint_lines, record)

    def log_probe(self, record: Mapping[str, float | int]) -> None:
        """Write one record of a probe, hundreds of figures: into its file only."""
        self._write(self._probe_lines, record)

    def track(self, record: Mapping[str, float | int]) -> None:
        """Send a record that has a file of its own, an evaluation's, to the trackers; needs `global_step`."""
        if self._wandb is not None:
            self._wandb.log(dict(record))
        if self._tensorboard is not None:
            for key, value in record.items():
                self._tensorboard.add_scalar(key, value, int(record["global_step"]))

    def _write(self, lines: JsonLines, record: Mapping[str, Any]) -> None:
        created_at = datetime.fromtimestamp(self._wall_time(), tz=UTC).isoformat()
        lines.write({**record, "incarnation": self._incarnation, "created_at": created_at})

    def _send(self, lines: JsonLines, record: Mapping[str, float | int], prefix: str = "") -> None:
        self._write(lines, record)
        self.track({key if key == "global_step" else prefix + key: value for key, value in record.items()})

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        if self._tensorboard is not None:
            self._tensorboard.close()


class EvaluationTracker:
    """Sends a run's evaluations to a wandb run of their own, `<id>_eval` in the same group, from the first one on."""

    def __init__(
        self,
        args: WandbArgs | None,
        run_dir: Path,
        run_name: str,
        config: Mapping[str, Any],
        training_id: Callable[[int], str | None],
    ) -> None:
        """`args`: the training run's, None: no wandb. `training_id`: id of the wandb run that trained a step."""
        self._args, self._run_dir, self._run_name, self._config = args, run_dir, run_name, config
        self._training_id = training_id
        self._wandb: Any = None

    def log(self, record: Mapping[str, float | int]) -> None:
        """One evaluation; needs the key `global_step`. What wandb refuses is reported: the files have it."""
        if self._args is None:
            return
        try:
            if self._wandb is None:
                args = evaluation_wandb(self._args, self._run_name, self._training_id(int(record["global_step"])))
                self._wandb = _start_wandb(args, self._run_dir, self._run_name, self._config, None)
            self._wandb.log(dict(record))
        except Exception as error:  # another program's, and the network's
            log.warning("wandb does not take the evaluation of step %s: %s", record["global_step"], error)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def evaluation_wandb(args: WandbArgs, run_name: str, training_id: str | None) -> WandbArgs:
    """The settings of the evaluations' wandb run, made from the training run's."""
    own = {"name": f"{args.name or run_name}_eval", "group": args.group or run_name, "job_type": "eval"}
    return args.model_copy(
        update=own | {"id": f"{training_id or run_name}_eval", "fork_from": None, "resume_from": None}
    )


def _start_wandb(args: WandbArgs, run_dir: Path, run_name: str, config: Mapping[str, Any], wandb_id: str | None) -> Any:
    import wandb  # half a second, and only some runs use it

    settings = {key: value for key, value in args.model_dump().items() if value is not None}
    if args.mode is None and not _has_wandb_key():
        settings["mode"] = "offline"
        log.info("wandb: no API key here, so this run is tracked offline; `wandb sync` uploads it later")
    settings.setdefault("dir", str(run_dir))
    settings.setdefault("name", run_name)
    settings.setdefault("group", run_name)
    settings.setdefault("id", wandb_id or uuid.uuid4().hex[:8])
    settings.setdefault("resume", "allow")
    run = wandb.init(config=dict(config), **settings)
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # no ~/.netrc, or none that can be read
        return False


def _start_tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "logging.tensorboard is true, but the package tensorboard is missing; "
            "`uv pip install tensorboard`, or set logging.tensorboard=false"
        ) from error
    return SummaryWriter(str(run_dir / "tensorboard"))
