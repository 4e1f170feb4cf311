"""Read the state of a sweep's points, and decide which to start again and which was best.

Finished points are ranked by held-out bits per byte after the last step if all have it, else by the training loss,
averaged over the last twentieth of the reported steps since one batch is noise. A point that is queued or running is
never started again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lingua.config.frozen import CONFIG_FILE
from lingua.console import figure
from lingua.files import CommandError, RunError
from lingua.report.diff import curve, short_names, spell
from lingua.report.facts import RunFacts, read_run
from lingua.report.status import LIVING, state_of, status_of, why
from lingua.run.lock import Owner, this_process
from lingua.run.metrics import METRICS_FILE, VALIDATION_FILE, read_metrics
from lingua.scheduler import QueuedJob
from lingua.sweep.sweep import Sweep

LOSS = "loss/out"
TOKENS = "optim/total_tokens"
BPB = "/bpb"
LOSS_IS = "training loss in nats per token, averaged over the last twentieth of the reported steps"
_SMOOTHED_PART = 1 / 20
_UNTIL_ASKED = ("finished", "stopped")  # started again only if named


@dataclass(frozen=True)
class PointStatus:
    """The figures of a point, as `--json` prints them. None: not known yet."""

    point: int
    values: dict[str, Any]
    run: str
    state: str
    """As in `lingua status`; new: never ran."""
    kind: str | None
    """Kind of the failure."""
    cause: str
    """Why it failed or was killed."""
    step: int | None
    n_steps: int | None
    loss: float | None
    """Training loss in nats per token, averaged over the last twentieth of the reported steps."""
    best: float | None
    """The lowest value of that average."""
    best_step: int | None
    held_out: float | None
    """Newest held-out bits per byte, the mean of the sources."""
    held_out_step: int | None
    job: str
    """Slurm's id of the job or array task."""
    job_state: str
    busy: bool
    """It is queued or running."""


@dataclass(frozen=True)
class Curve:
    """The training loss of a point."""

    steps: list[int]
    tokens: list[float]
    """Tokens trained up to each step."""
    losses: list[float]
    """Averaged losses."""


# -- reading -------------------------------------------------------------------------------------------------------


def read_points(sweep: Sweep, queue: dict[str, QueuedJob], me: Owner | None = None) -> list[tuple[PointStatus, Curve]]:
    """Read the current state of every point."""
    return [_read_point(sweep, number, queue, me or this_process()) for number in sweep.numbers]


def _read_point(sweep: Sweep, number: int, queue: dict[str, QueuedJob], me: Owner) -> tuple[PointStatus, Curve]:
    run_dir, address = sweep.run_dir(number), sweep.address(number)
    facts = read_run(run_dir) if (run_dir / CONFIG_FILE).is_file() else RunFacts(run_dir)
    job = queue.get(address or "") or queue.get(facts.job_id)
    facts = replace(facts, job=job)
    status = status_of(facts, me)
    training, tokens = _records(run_dir / METRICS_FILE, LOSS), _records(run_dir / METRICS_FILE, TOKENS)
    steps = sorted(training)
    smooth = smoothed([training[step] for step in steps])
    held_out_step, held_out = _held_out(run_dir / VALIDATION_FILE)
    lowest = min(range(len(smooth)), key=smooth.__getitem__, default=None)
    point = PointStatus(
        point=number,
        values=sweep.values(number),
        run=str(run_dir),
        state=state_of_point(facts, me),
        kind=status.kind,
        cause=why(facts, me)["cause"] if status.state in ("failed", "killed") else "",
        step=status.step,
        n_steps=status.n_steps,
        loss=smooth[-1] if smooth else None,
        best=None if lowest is None else smooth[lowest],
        best_step=None if lowest is None else steps[lowest],
        held_out=held_out,
        held_out_step=held_out_step,
        job=job.array_task or job.id if job is not None else address or facts.job_id,
        job_state=job.state if job is not None else "",
        busy=state_of(facts, me) in LIVING or (job is not None and job.is_there),
    )
    return point, Curve(steps, [tokens.get(step, 0.0) for step in steps], smooth)


def state_of_point(facts: RunFacts, me: Owner) -> str:
    """Return `status.state_of`, or the queue's state for a job whose training has not begun (again)."""
    state, job = state_of(facts, me), facts.job
    if job is None or state in LIVING or state == "finished":
        return state
    if job.is_waiting:
        return "queued"
    if job.is_there and facts.job_id != job.id:
        return "starting"
    return "failed" if state == "new" and not job.is_there else state


def _records(file: Path, key: str) -> dict[int, float]:
    return curve(read_metrics(file), key)


def _held_out(file: Path) -> tuple[int | None, float | None]:
    """Return (step, mean bits per byte of the sources) of the newest validation."""
    for record in reversed(read_metrics(file)):
        found = [value for key, value in record.items() if key.endswith(BPB) and value is not None]
        if found:
            return record["global_step"], sum(found) / len(found)
    return None, None


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return a trailing mean of each value, over a twentieth of all values."""
    width, averages, total = max(1, round(len(losses) * _SMOOTHED_PART)), [], 0.0
    for i, loss in enumerate(losses):
        total += loss - (losses[i - width] if i >= width else 0.0)
        averages.append(total / min(i + 1, width))
    return averages


# -- deciding ------------------------------------------------------------------------------------------------------


def ranked_by(points: Sequence[PointStatus]) -> str:
    """Return the field that ranks these points, `held_out` or `loss`; lower is better."""
    finished = [point for point in points if point.state == "finished"]
    held_out = finished and all(p.held_out is not None and p.held_out_step == p.step for p in finished)
    return "held_out" if held_out else "loss"


def best_of(points: Sequence[PointStatus]) -> PointStatus | None:
    """Return the finished point with the lowest figure."""
    field = ranked_by(points)
    finished = [point for point in points if point.state == "finished" and getattr(point, field) is not None]
    return min(finished, key=lambda point: getattr(point, field), default=None)


def to_rerun(
    points: Sequence[PointStatus], named: Collection[int] = (), skipped_kinds: Collection[str] = ()
) -> list[int]:
    """Return the points to start again: failed, killed or never run; or those `named`, even if a person stopped them.

    Raises RunError if there are none, or a named point cannot be started.
    """
    for point in points:
        if point.point in named and (point.busy or point.state == "finished"):
            raise RunError(f"point {point.point} is {point.state}, so it cannot be started again")
    unknown = sorted(set(named) - {point.point for point in points})
    if unknown:
        raise CommandError(f"there is no point {unknown[0]}; the points are 1 to {len(points)}")
    chosen = [
        point.point
        for point in points
        if (point.point in named if named else not point.busy and point.state not in _UNTIL_ASKED)
        and point.kind not in skipped_kinds
    ]
    if not chosen:
        counts = {state: sum(p.state == state for p in points) for state in dict.fromkeys(p.state for p in points)}
        states = ", ".join(f"{n} {state}" for state, n in counts.items())
        raise RunError(f"nothing to start again: of {len(points)} points {states}")
    return chosen


# -- showing -------------------------------------------------------------------------------------------------------


def table(sweep: Sweep, points: Sequence[PointStatus]) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
    """Return columns, a row per point, and the right-aligned columns."""
    names, held_out = list(short_names(sweep.keys).values()), any(p.held_out is not None for p in points)
    figures = ["step", "of", "loss", "best", *(["held-out"] if held_out else [])]
    rows = [
        (
            str(point.point),
            *(spell(point.values[key]) for key in sweep.keys),
            state_text(point),
            figure(point.step, ","),
            figure(point.n_steps, ","),
            figure(point.loss),
            figure(point.best),
            *([figure(point.held_out)] if held_out else []),
            f"{point.job} {point.job_state}".strip() or "-",
        )
        for point in points
    ]
    return ["point", *names, "state", *figures, "job"], rows, ["point", *names, *figures]


def notes(points: Sequence[PointStatus]) -> list[str]:
    """Explain the figures of the table and say which point is best."""
    lines, best = [f"loss: {LOSS_IS}; best: its lowest"], best_of(points)
    if any(point.held_out is not None for point in points):
        lines.append("held-out: bits per byte, the mean of the sources")
    if best is not None:
        field = ranked_by(points)
        value = f"{field.replace('_', '-')} {figure(getattr(best, field))}"
        lines.append(f"best of those finished: point {best.point}, {value}, {best.run}")
    return lines


def state_text(point: PointStatus) -> str:
    """Format the state as in `failed (nan)`."""
    state = "never ran" if point.state == "new" else point.state
    return f"{state} ({point.kind})" if point.kind and not point.busy else state


def as_record(sweep: Sweep, points: Sequence[PointStatus]) -> dict[str, Any]:
    best = best_of(points)
    return {
        "sweep": str(sweep.folder),
        "name": sweep.name,
        "keys": sweep.keys,
        "ranked_by": ranked_by(points),
        "best": None if best is None else best.point,
        "points": [asdict(point) for point in points],
    }
