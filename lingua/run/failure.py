"""Classify failures, to decide whether restarting a run may help.

`classify` gives every error exactly one kind; an error that no rule matches is a `bug`. `logs/error_<rank>.json` and
`stop.json` have the kind. torch's errors are recognized by name, so that this imports no torch.
"""

from __future__ import annotations

import logging
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from lingua.files import CommandError, DiskError, RunError, entries, read_json, write_json
from lingua.logger import RANK_LOGS
from lingua.masking import public_text

log = logging.getLogger(__name__)


class RankError(RunError):
    """Another rank failed with `kind`, or cannot be reached."""

    def __init__(self, message: str, kind: str = "nccl") -> None:
        super().__init__(message)
        self.kind = kind


class HungError(RunError):
    """This rank counts as hung."""

    kind = "hang"


class TooLargeError(RunError):
    """A model does not fit into memory, whatever the batch size."""


class Kind(NamedTuple):
    """What to do about a kind of failure."""

    restart_may_help: bool
    """The same command may succeed, perhaps on another node."""
    remedy: str


KINDS: dict[str, Kind] = {
    "config": Kind(False, "correct the config; `lingua check` checks it"),
    "setup": Kind(False, "do what the message says, then start it again"),
    "data": Kind(False, "repair the file, or skip its rows with data.skip_rows"),
    "nan": Kind(False, "skip these rows with data.skip_rows, or lower optim.lr"),
    "oom": Kind(False, "lower data.batch_size (grad_acc_steps follows), or set full_activation_checkpointing"),
    "too_large": Kind(
        False, "take a smaller model, or spread it over more GPUs (distributed.dp_shard, distributed.tp_size)"
    ),
    "disk_full": Kind(False, "free disk space or raise the quota; published checkpoints are whole"),
    "occupied": Kind(False, "another attempt owns the run folder: stop that one, or choose another name"),
    "disk": Kind(True, "the disk or its server failed; check whether other jobs on that node can read it"),
    "nccl": Kind(True, "a rank or the network between ranks was lost; see the other error files"),
    "device": Kind(True, "a GPU failed; exclude its node and report it to the administrators"),
    "worker": Kind(True, "a loader process died, often out of memory: lower data.prefetch_size or num_workers"),
    "hang": Kind(True, "logs/stacks_<rank>.txt shows where each rank was"),
    "bug": Kind(True, "the traceback is in the error file and in the log of that rank"),
}
REFUSALS = frozenset({"config", "setup", "data"})
"""Kinds that recur with the same command: before the first step nothing of such a start is worth keeping."""

_BY_CLASS = {
    "ConfigError": "config",
    "DataError": "data",
    "MixedConfigError": "setup",  # not by its message, which has values of the config
    "NonFiniteError": "nan",
    "OccupiedError": "occupied",
    "TooLargeError": "too_large",
    "OutOfMemoryError": "oom",  # torch's
    "MemoryError": "oom",
    "DistError": "nccl",  # torch's, with DistBackendError, DistNetworkError and DistStoreError below it
    "ConnectionError": "nccl",
}
# Messages of torch, NCCL, gloo and CUDA, which raise plain RuntimeErrors; the first match decides.
_BY_MESSAGE: tuple[tuple[str, str], ...] = (
    (r"^Function '\w+' returned nan values", "nan"),  # torch's anomaly detection
    (r"out of memory|can't allocate memory|not enough memory", "oom"),
    (r"device-side assert", "bug"),  # an index out of range, say
    (r"NCCL|\bgloo\b|Connection (closed|reset) by peer|ProcessGroup", "nccl"),
    (r"did not meet the others", "nccl"),
    (r"CUDA error|CUDNN_STATUS|CUBLAS_STATUS|\bECC\b|no CUDA-capable device", "device"),
    (r"loader worker \d+ .*(was killed|ended with exit code)", "worker"),
)


def classify(error: BaseException) -> str:
    """Return the kind of a failure: a key of KINDS."""
    if isinstance(error, RankError | HungError | DiskError):
        return error.kind
    names = {cls.__name__ for cls in type(error).__mro__}
    found = next((kind for name, kind in _BY_CLASS.items() if name in names), None)
    if found is not None:
        return found
    if isinstance(error, OSError):
        return "disk_full" if DiskError.of(error).kind == "disk_full" else "disk"
    if isinstance(error, RuntimeError):  # RunError too
        text = str(error)
        if isinstance(error, RunError) and ("disk is full" in text or "quota is used up" in text):
            return "disk_full"
        found = next((kind for pattern, kind in _BY_MESSAGE if re.search(pattern, text, re.IGNORECASE)), None)
        return found or ("setup" if isinstance(error, RunError) else "bug")
    return "config" if isinstance(error, ValueError) and not isinstance(error, UnicodeError) else "bug"


def carried(error: Exception, message: str | None = None) -> RunError:
    """Return the error for other ranks to raise, with the same kind and, by default, the same message."""
    message = str(error) if message is None else message
    if isinstance(error, DiskError):
        return DiskError(message, error.errno, error.path)
    if isinstance(error, OSError):
        return DiskError.of(error, message)
    kind = classify(error)
    if kind == "setup":
        return (CommandError if isinstance(error, CommandError) else RunError)(message)
    return RankError(message, kind)


@contextmanager
def fits(what: str) -> Iterator[None]:
    """Raise TooLargeError, which names `what`, if the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if classify(error) != "oom":
            raise
        raise TooLargeError(f"{what} does not fit into the memory; {KINDS['too_large'].remedy}") from error


def mark_known(error: Exception) -> Exception:
    """Mark an error that all ranks raise, so that it need not be sent."""
    setattr(error, "known_to_all", True)  # noqa: B010 - of any class
    return error


def known_to_all(error: Exception) -> bool:
    return getattr(error, "known_to_all", False)


# -- error files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """The failure of one rank of one attempt, as in error_<rank>.json."""

    kind: str
    type: str
    message: str
    traceback: str
    rank: int
    step: int | None
    """Updates done; None before training."""
    incarnation: int | None
    """Number of the attempt, under its name in files; None before the run folder was opened."""
    host: str = ""
    time: str = ""
    because_of_rank: int | None = None
    """The rank that failed first, if this rank leaves because of it."""


def failure_of(error: BaseException, **more: Any) -> Failure:
    """Describe an error that was raised in this process, with secrets masked."""
    return Failure(
        kind=classify(error),
        type=type(error).__name__,
        message=public_text(str(error)),
        traceback=public_text("".join(traceback.format_exception(error))),
        host=socket.gethostname(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    )


def error_file(run_dir: Path, rank: int) -> Path:
    return run_dir / RANK_LOGS / f"error_{rank}.json"


def stacks_file(run_dir: Path, rank: int) -> Path:
    return run_dir / RANK_LOGS / f"stacks_{rank}.txt"


def record(run_dir: Path, failure: Failure) -> None:
    """Write error_<rank>.json. If that fails, log it; it must not hide the failure itself."""
    path = error_file(run_dir, failure.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(failure) | {"restart_may_help": KINDS[failure.kind].restart_may_help})
    except OSError as error:
        log.warning("cannot write %s: %s", path, error.strerror or error)


def read_failures(run_dir: Path) -> list[Failure]:
    """Read the newest attempt's failures, by rank; files that cannot be read are left out."""
    found = []
    for path in entries(run_dir / RANK_LOGS):
        if re.fullmatch(r"error_\d+\.json", path.name):
            try:
                facts = read_json(path)
                fields = {name: facts[name] for name in Failure.__dataclass_fields__}
                found.append(TypeAdapter(Failure).validate_python(fields))
            except (OSError, RunError, KeyError, TypeError, ValueError):
                log.warning("%s cannot be read", path)
    return sorted(found, key=lambda failure: failure.rank)
