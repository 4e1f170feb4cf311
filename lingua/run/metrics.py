"""Write the metrics of a run: `metrics.jsonl` and the like, wandb, TensorBoard and trackio.

A line is written whole or retried with the next; a full disk is reported once and never ends the run, and neither does
a tracker (tracking.py). Every line has its attempt, to distinguish lines after a rollback from those before. wandb uses
our step, which may go back.
"""

from __future__ import annotations

import logging
import netrc
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import orjson

from lingua.config.keys.logging import NO_TENSORBOARD, LoggingArgs, TrackioArgs, WandbArgs
from lingua.files import no_follow, read_bytes
from lingua.masking import public_tree, public_word
from lingua.run.tracking import Tracker

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "metrics.validation.jsonl"
CHECKPOINT_FILE = "metrics.checkpoint.jsonl"
EVAL_FILE = "metrics.eval.jsonl"
PROBE_FILE = "probe.jsonl"
SAMPLES_FILE = "samples.jsonl"
_TAIL_BYTES = 64 << 10
_HELD_LINES = 10_000  # kept in memory while they cannot be written
BEGIN_S = 10.0
"""How long an attempt waits for its trackers to start; records are held for those that take longer."""
WANDB_INIT_S = 30
"""After this long without an answer from the server, wandb tracks offline. WANDB_INIT_TIMEOUT overrides it."""
FINISH_S = 60.0
"""How long the end of a run waits for its trackers to send the rest."""
HURRIED_FINISH_S = 5.0
"""The same for a run that failed or was asked to stop: a job's grace period may be short."""


# -- files -------------------------------------------------------------------------------------------------------


class JsonLines:
    """Appends one JSON object per line to a file; lines that cannot be written are kept and retried."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: deque[bytes] = deque(maxlen=_HELD_LINES)
        self._warned = False

    def write(self, record: Mapping[str, Any]) -> None:
        self._held.append(orjson.dumps(dict(record), option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        try:
            self._flush()
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("cannot write %s: %s; the run tries again", self.path, error.strerror or error)

    def _flush(self) -> None:
        with open(
            self.path, "ab", buffering=0, opener=no_follow
        ) as file:  # unbuffered: nothing is written later, on closing
            start = file.tell()
            lines = b"".join(self._held)
            if start and not _ends_with_newline(self.path):  # torn by an earlier kill
                lines = b"\n" + lines
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                os.ftruncate(file.fileno(), start)
                raise
        self._held.clear()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def record_in(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None if the line is truncated by a kill or malformed."""
    with suppress(orjson.JSONDecodeError):
        record = orjson.loads(line)
        if isinstance(record, dict) and all(type(record.get(key, 0)) is int for key in ("global_step", "incarnation")):
            return record
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all records of a metrics file; [] if there is no file."""
    lines = read_bytes(path).splitlines() if path.is_file() else []
    return [record for record in map(record_in, lines) if record is not None]


def last_line(path: Path) -> dict[str, Any] | None:
    """Return the numbers and notes of the last record, or None if there is no file or no record."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.readlines()
    except OSError:
        return None
    found = next((record for line in reversed(lines) if (record := record_in(line)) is not None), None)
    return found and {key: v for key, v in found.items() if "/" not in key or isinstance(v, int | float)}


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- trackers ----------------------------------------------------------------------------------------------------


class MetricLogger:
    """Sends each record to metrics.jsonl and the trackers. On rank 0 only; a context manager."""

    def __init__(
        self,
        run_dir: Path,
        args: LoggingArgs,
        *,
        attempt: int,
        run_name: str,
        config: Mapping[str, Any],
        wandb_id: str | None = None,
        wall_time: Callable[[], float] = time.time,
    ) -> None:
        self._lines = JsonLines(run_dir / METRICS_FILE)
        self._validation_lines = JsonLines(run_dir / VALIDATION_FILE)
        self._checkpoint_lines = JsonLines(run_dir / CHECKPOINT_FILE)
        self._probe_lines = JsonLines(run_dir / PROBE_FILE)
        self._sample_lines = JsonLines(run_dir / SAMPLES_FILE)
        self._attempt = attempt
        self._wall_time = wall_time
        self._finish_s = FINISH_S
        self._trackers: list[Tracker] = []
        self.wandb_id: str | None = None
        """Id to keep in checkpoints, so that a resumed run continues the same wandb run."""
        if args.wandb is not None:
            settings = wandb_settings(args.wandb, run_dir, run_name, wandb_id)
            self.wandb_id = settings["id"]
            self._trackers.append(wandb_tracker(settings, config))
        if args.tensorboard:
            self._trackers.append(_tensorboard_tracker(run_dir))
        if args.trackio is not None:
            trackio, tree = args.trackio, public_tree(config)
            self._trackers.append(Tracker("trackio", [lambda: _TrackioRun(trackio, run_name, tree)]))
        for tracker in self._trackers:
            tracker.wait_until_begun(BEGIN_S)

    def log(self, record: Mapping[str, float | int]) -> None:
        """Write a record of training; needs the key `global_step`."""
        self._send(self._lines, record)

    def log_validation(self, record: Mapping[str, float | int]) -> None:
        """Write a record of held-out losses, `<source>/bpb` and the like."""
        self._send(self._validation_lines, record, "validation/")

    def log_checkpoint(self, record: Mapping[str, Any]) -> None:
        """Write an event of the checkpoint of `global_step`, to the file only."""
        self._write(self._checkpoint_lines, record)

    def log_probe(self, record: Mapping[str, float | int]) -> None:
        """Write a record of a probe, hundreds of figures, to its file only."""
        self._write(self._probe_lines, record)

    def log_sample(self, record: Mapping[str, Any]) -> None:
        """Write a generated sample, to its file only."""
        self._write(self._sample_lines, record)

    def track(self, record: Mapping[str, float | int]) -> None:
        """Send a record of an evaluation, which is in its own file, to the trackers; needs `global_step`."""
        for tracker in self._trackers:
            tracker.log(record)

    def hurry(self) -> None:
        """Wait only briefly for the trackers at the end: the run was asked to stop."""
        self._finish_s = HURRIED_FINISH_S

    def _write(self, lines: JsonLines, record: Mapping[str, Any]) -> None:
        created_at = datetime.fromtimestamp(self._wall_time(), tz=UTC).isoformat()
        lines.write({**record, "incarnation": self._attempt, "created_at": created_at})

    def _send(self, lines: JsonLines, record: Mapping[str, float | int], prefix: str = "") -> None:
        self._write(lines, record)
        self.track({key if key == "global_step" else prefix + key: value for key, value in record.items()})

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for tracker in self._trackers:
            tracker.close(*((0, self._finish_s) if kind is None else (1, HURRIED_FINISH_S)))


class EvaluationTracker:
    """Sends a run's evaluations to a separate wandb run, `<id>_eval` in the same group."""

    def __init__(
        self,
        args: WandbArgs | None,
        run_dir: Path,
        run_name: str,
        config: Mapping[str, Any],
        training_id: Callable[[int], str | None],
    ) -> None:
        """`args`: the training run's; None without wandb. `training_id`: id of the wandb run that trained a step."""
        self._args, self._run_dir, self._run_name, self._config = args, run_dir, run_name, config
        self._training_id = training_id
        self._tracker: Tracker | None = None

    def log(self, record: Mapping[str, float | int]) -> None:
        """Send one evaluation; needs the key `global_step`."""
        if self._args is None:
            return
        if self._tracker is None:
            args = evaluation_wandb(self._args, self._run_name, self._training_id(int(record["global_step"])))
            self._tracker = wandb_tracker(wandb_settings(args, self._run_dir, self._run_name), self._config)
            self._tracker.wait_until_begun(BEGIN_S)
        self._tracker.log(record)

    def close(self, *, hurry: bool = False) -> None:
        """Send the rest. `hurry`: this process was asked to stop."""
        if self._tracker is not None:
            self._tracker.close(0, HURRIED_FINISH_S if hurry else FINISH_S)


def evaluation_wandb(args: WandbArgs, run_name: str, training_id: str | None) -> WandbArgs:
    """Return the settings of the evaluations' wandb run, from those of the training run."""
    own = {"name": f"{args.name or run_name}_eval", "group": args.group or run_name, "job_type": "eval"}
    return args.model_copy(
        update=own | {"id": f"{training_id or run_name}_eval", "fork_from": None, "resume_from": None}
    )


def wandb_settings(args: WandbArgs, run_dir: Path, run_name: str, wandb_id: str | None = None) -> dict[str, Any]:
    """Return the keywords of `wandb.init`. `wandb_id`: the previous attempt's id, to continue it."""
    settings = {key: value for key, value in args.model_dump().items() if value is not None}
    if wandb_id is not None:  # it was forked or rewound already
        settings.pop("fork_from", None)
        settings.pop("resume_from", None)
    if args.mode is None and not _has_wandb_key():
        settings["mode"] = "offline"
        log.info("wandb: no API key here, so this run is tracked offline; upload it later with `wandb sync`")
    settings.setdefault("dir", str(run_dir))
    settings.setdefault("name", run_name)
    settings.setdefault("group", run_name)
    if "resume_from" in settings:
        settings["id"] = settings["resume_from"].partition("?")[0]  # wandb accepts no other
    settings.setdefault("id", wandb_id or uuid.uuid4().hex[:8])
    if not settings.keys() & {"fork_from", "resume_from"}:  # wandb accepts one of the three
        settings.setdefault("resume", "allow")
    return settings


def wandb_tracker(settings: dict[str, Any], config: Mapping[str, Any]) -> Tracker:
    """Track with wandb: online with `settings`, and offline after a failure."""

    def begin_offline() -> _WandbRun:
        import wandb

        try:
            wandb.teardown()  # if the first helper process is running, the id is in use there
        except (Exception, SystemExit) as error:
            log.debug("wandb.teardown: %s", error)
        return _WandbRun(settings | {"mode": "offline"}, config)

    return Tracker("wandb", [lambda: _WandbRun(settings, config), begin_offline])


class _WandbRun:
    def __init__(self, settings: dict[str, Any], config: Mapping[str, Any]) -> None:
        # wandb would report errors to its maker, and without a network wait 20 s for that at the end.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # takes half a second, and only some runs use it

        limits = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": WANDB_INIT_S}
        sys.argv = [public_word(word) for word in sys.argv]  # wandb keeps it
        self._run = wandb.init(config=public_tree(config), settings=limits, **settings)
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")
        self.folder: str | None = str(Path(self._run.dir).parent)
        self._teardown = wandb.teardown

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(record))

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
        self._teardown()  # or Python does it at exit, without a time limit


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # no ~/.netrc, or a damaged one
        return False


class _TrackioRun:
    folder: str | None = None

    def __init__(self, args: TrackioArgs, run_name: str, config: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports] - in no extra

        settings = {"project": run_name, "name": run_name} | args.model_dump(exclude_none=True)
        self._run = trackio.init(config=dict(config), resume="allow", embed=False, **settings)

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log({key: value for key, value in record.items() if key != "global_step"}, step=record["global_step"])

    def finish(self, exit_code: int) -> None:
        self._run.finish()


def _tensorboard_tracker(run_dir: Path) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(NO_TENSORBOARD) from error
    return Tracker("tensorboard", [lambda: _TensorBoard(SummaryWriter(str(run_dir / "tensorboard")))])


class _TensorBoard:
    folder: str | None = None

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            self._writer.add_scalar(key, value, int(record["global_step"]))

    def finish(self, exit_code: int) -> None:
        self._writer.close()
