"""Decide which steps are profiled, and how: by plan, or on request during the run. Torch-free.

The decision is a pure function of the config, the steps done and the requests. A request is for one attempt and is
taken once; all ranks agree on its steps with two of the numbers that they reduce in each step anyway. A heartbeat
checks one file.

`lingua profile RUN` writes `incarnations/<attempt>.profile`; rank 0's heartbeat takes it. When its window has closed,
`<trace_folder>/asked_<id>.json` lists the files.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lingua.config.keys.profiling import ProfilerArgs
from lingua.files import DiskError, RunError, read_json, write_json
from lingua.run.lock import FOLDER
from lingua.signals import SignalFlag

log = logging.getLogger(__name__)

Kind = Literal["light", "trace", "memory"]
LIGHT: frozenset[Kind] = frozenset(("light",))
ALL: frozenset[Kind] = frozenset(("light", "trace", "memory"))
MOST_STEPS = 10_000
MOST_HEAVY_STEPS = 20
"""A longer trace is slow to open, and all of it is held in memory until the window closes."""
_ID = re.compile(r"[0-9a-f]{8}")


# -- the decision --------------------------------------------------------------------------------------------------


def lies_in(done: int, warmup: int, n_steps: int, every: int) -> bool:
    """Return whether the step after `done` is in a window of `n_steps` after `warmup`, repeated every `every`."""
    since = done - warmup
    return 0 <= (since % every if every and since >= 0 else since) < n_steps


def planned(args: ProfilerArgs, done: int, rank: int) -> frozenset[Kind]:
    """Return what the config wants profiled in the step after `done` steps of this attempt."""
    if not args.run:
        return frozenset()
    windows: dict[Kind, tuple[int, int]] = {
        "light": (args.light_warmup, args.light_steps),
        "trace": (args.profile_warmup, args.profile_steps),
        "memory": (args.mem_warmup, args.mem_steps),
    }
    now = [kind for kind, (warmup, n_steps) in windows.items() if lies_in(done, warmup, n_steps, args.every)]
    return allowed(args, rank).intersection(now)


def allowed(args: ProfilerArgs, rank: int) -> frozenset[Kind]:
    """Return what a rank may profile: light windows on all ranks, heavy ones on those of `ranks`."""
    return ALL if args.ranks == "all" or rank in args.ranks else LIGHT


# -- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request to profile the next steps. `id` is empty if it came by a signal."""

    n_steps: int
    heavy: bool
    id: str = ""

    @property
    def kinds(self) -> frozenset[Kind]:
        return ALL if self.heavy else LIGHT


class Requests:
    """Requests to profile. Any thread or handler may ask; the loop reduces them until all ranks agree."""

    def __init__(self) -> None:
        self.by_signal = SignalFlag()
        self._asked: deque[Request] = deque()
        self._submitted: deque[Request] = deque()

    def ask(self, request: Request) -> None:
        self._asked.append(request)

    def numbers(self) -> dict[str, float]:
        """Return this rank's numbers for the next reduction: whether a signal came, and a request, each once.

        Only rank 0 reads requests, so their sum over ranks is the number itself.
        """
        request = self._asked.popleft() if self._asked else None
        if request is not None:
            self._submitted.append(request)
        asked = 0 if request is None else 2 * request.n_steps + request.heavy
        return {"profile_signal": self.by_signal.take(), "profile_request": float(asked)}

    def agreed(self, sums: Mapping[str, float], n_steps: int) -> Request | None:
        """Return the request in the sums of all ranks' numbers, if any; `n_steps`: length for a signal."""
        asked = int(sums["profile_request"])
        if asked > 0:
            own_id = self._submitted.popleft().id if self._submitted else ""
            return Request(asked // 2, bool(asked % 2), own_id)
        return Request(n_steps, heavy=True) if sums["profile_signal"] > 0 else None


def request_file(run_dir: Path, attempt: int) -> Path:
    """Return the file of a request to this attempt; later attempts ignore it."""
    return run_dir / FOLDER / f"{attempt:010d}.profile"


def answer_file(folder: Path, request_id: str) -> Path:
    """Return the file that a run writes to its trace folder when the window of a request has closed."""
    return folder / f"asked_{request_id}.json"


def ask_to_profile(run_dir: Path, attempt: int, n_steps: int, heavy: bool) -> Request:
    """Ask an attempt from any machine that sees the folder. Raises RunError for too many steps or a failed write."""
    most = MOST_HEAVY_STEPS if heavy else MOST_STEPS
    if not 1 <= n_steps <= most:
        kind = "a heavy window" if heavy else "a window"
        raise RunError(f"--steps is {n_steps}, but {kind} has 1 to {most} steps; choose one of these")
    path, request = request_file(run_dir, attempt), Request(n_steps, heavy, uuid.uuid4().hex[:8])
    if path.exists():
        raise RunError(f"{run_dir} has not heard the last request yet ({path}); try again in some seconds")
    try:
        write_json(path, asdict(request))
    except OSError as error:
        raise DiskError.of(
            error, f"cannot ask {run_dir} for a profile: {error.strerror} ({path.parent}); its owner can"
        ) from None
    return request


def take_request(run_dir: Path, attempt: int) -> Request | None:
    """Take the pending request to this attempt, if any. Raises OSError."""
    path = request_file(run_dir, attempt)
    if not path.exists():
        return None
    try:
        request = request_in(read_json(path))
    except RunError as error:
        log.warning("not profiled: %s", error)
        request = None
    path.unlink(missing_ok=True)
    return request


def request_in(record: Any) -> Request:
    """Validate a JSON document, which anyone may have written, as a request. Raises RunError."""
    if isinstance(record, Mapping):
        n_steps, heavy, request_id = (record.get(key) for key in ("n_steps", "heavy", "id"))
        if (
            type(n_steps) is int
            and type(heavy) is bool
            and 1 <= n_steps <= (MOST_HEAVY_STEPS if heavy else MOST_STEPS)
            and isinstance(request_id, str)
            and _ID.fullmatch(request_id)
        ):
            return Request(n_steps, heavy, request_id)
    raise RunError(f"{record} asks for no profile; `lingua profile` writes such requests")
