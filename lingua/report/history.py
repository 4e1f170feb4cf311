"""Builds the history of a run from its folder: every attempt, what came of its steps, and where the time went.

Only reads: a file that is missing, damaged or of an older version leaves a gap and no wrong figure. If a run went back
to a checkpoint, what the newer attempt trained counts, and the rest is reported as lost. Reads the metrics once (see
`series.py`), and a small file per attempt, checkpoint and evaluation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lingua.checkpoint.layout import EVALS, FAILED, RESULTS, done_mark, done_steps, parse_folder
from lingua.checkpoint.lookup import root_of
from lingua.files import RunError, entries
from lingua.report.facts import RunFacts, json_object_in
from lingua.report.series import ATTEMPT, STEP, WHEN, Table, is_number, read_table, records_in, when
from lingua.report.status import is_alive, root_cause, state_of
from lingua.run.failure import Failure
from lingua.run.lock import Attempt, Owner, attempt_files, read_attempt
from lingua.run.metrics import CHECKPOINT_FILE, EVAL_FILE, METRICS_FILE, VALIDATION_FILE

LOSS, TOKENS, LR, GRAD_NORM = "loss/out", "optim/total_tokens", "optim/lr", "optim/grad_norm"
ABOVE_FLOOR = "loss/above_floor"
HEADS = tuple(f"loss/head_{i}" for i in range(8))
"""Losses of a model that predicts several tokens: the first eight."""
WPS, MFU, HFU = "speed/wps", "speed/mfu", "speed/hfu"
_STEP_S, _LOAD_S, _STALL_S = "speed/curr_iter_time", "speed/data_load_time", "checkpoint/stall_s"
_KEYS = (LOSS, ABOVE_FLOOR, *HEADS, TOKENS, LR, GRAD_NORM, WPS, MFU, HFU, _STEP_S, _LOAD_S, _STALL_S)
TRAINED_S = "trained_s"
"""Seconds of training that counts up to a line, with waiting for data, without start-up, validation and saves."""

SPENT = {
    "training": "training that counts",
    "loading": "waiting for data",
    "saving": "held up by checkpoints",
    "validating": "validation",
    "starting": "start-up, until the first step",
    "lost": "lost: trained again, or killed before it was saved",
    "other": "ending, and steps not reported yet",
    "idle": "not running",
}
"""Kinds of time, in the order of the report."""


@dataclass(frozen=True)
class PastAttempt(Attempt):
    """An attempt and what came of it. None: no file says so."""

    begun_s: float | None = None
    """When its first step began."""
    ended_s: float | None = None
    """Its last sign of life; now, while it is running."""
    first_step: int | None = None
    """The step that it resumed from."""
    last_step: int | None = None
    """The last step that it reported."""
    end: str = ""
    """running, finished, killed, ...: how it ended, in a word or two."""


@dataclass(frozen=True)
class Event:
    """What happened to the checkpoint of a step."""

    kind: str
    """staged, published, failed, evaluated, given up."""
    step: int
    at_s: float
    attempt: int
    seconds: float | None = None
    """staged: training was paused; published: from memory to the disk (or the whole save); evaluated: all of it."""
    size_bytes: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Scores:
    """The figures of a validation or an evaluation."""

    step: int
    attempt: int
    at_s: float
    values: dict[str, float]
    seconds: float = 0.0


@dataclass(frozen=True)
class History:
    """The history of a run."""

    facts: RunFacts
    state: str
    now_s: float
    attempts: list[PastAttempt]
    metrics: Table
    """The lines that count, with the column TRAINED_S."""
    undone: Table
    """Lines of steps that a later attempt trained again, or will train again."""
    events: list[Event]
    validations: list[Scores] = field(default_factory=list)
    evaluations: list[Scores] = field(default_factory=list)
    spent: list[dict[str, float]] = field(default_factory=list)
    """Seconds by kind, of each attempt; `idle` is the time after it."""

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind, of the whole run."""
        return {kind: sum(one[kind] for one in self.spent) for kind in SPENT}

    def at(self, steps: np.ndarray, key: str) -> np.ndarray:
        """Return a column that grows with the steps at `steps`, interpolated between lines."""
        xs, ys = self.metrics.curve(key)
        if len(xs) == 0:
            return np.full(len(steps), np.nan)
        if self.attempts and self.attempts[0].first_step == 0:
            xs, ys = np.append(0.0, xs), np.append(0.0, ys)
        return np.interp(steps, xs, ys)


def read_history(facts: RunFacts, me: Owner, now_s: float) -> History:
    """Build the history of a run."""
    table = read_table(facts.path / METRICS_FILE, _KEYS)
    notes = [r for r in records_in(facts.path / CHECKPOINT_FILE) if isinstance(r.get("event"), str)]
    validations = _scores(facts.path / VALIDATION_FILE)
    attempts = read_attempts(facts, table, notes, me, now_s)
    counts = counting(attempts, table)
    return History(
        facts=facts,
        state=state_of(facts, me),
        now_s=now_s,
        attempts=attempts,
        metrics=_with_time(attempts, table, counts),
        undone=table.where(~counts),
        events=sorted(_events(facts, notes), key=lambda event: event.at_s),
        validations=that_count(attempts, validations),
        evaluations=that_count(attempts, _scores(facts.path / EVAL_FILE)),
        spent=account(attempts, table, counts, validations, notes),
    )


# -- attempts ------------------------------------------------------------------------------------------------------


def read_attempts(
    facts: RunFacts, table: Table, notes: Sequence[Mapping[str, Any]], me: Owner, now_s: float
) -> list[PastAttempt]:
    """Return every attempt that left a file or a line of metrics, the first one first."""
    files = attempt_files(facts.path)
    begun = {r[ATTEMPT]: r for r in notes if r["event"] == "begun" and isinstance(r.get(ATTEMPT), int)}
    numbers = sorted({*files, *begun, *(int(n) for n in np.unique(table[ATTEMPT]) if np.isfinite(n))})
    found = [_read_attempt(n, files.get(n), begun.get(n), table.where(table[ATTEMPT] == n)) for n in numbers]
    ends = [_end_of(attempt, facts, me) for attempt in found]
    attempts = [replace(attempt, end=end) for attempt, end in zip(found, ends, strict=True)]
    if attempts and attempts[-1].end == "running":
        attempts[-1] = replace(attempts[-1], ended_s=now_s)
    return in_order(attempts)


def _read_attempt(number: int, file: Path | None, begun: Mapping[str, Any] | None, lines: Table) -> PastAttempt:
    attempt, sign_s = Attempt(number, Owner()), None
    if file is not None:
        with suppress(OSError, RunError):
            attempt = read_attempt(file)
            sign_s = attempt.beat_s
    steps, times = lines[STEP], lines[WHEN]
    first_step, begun_s = None, None
    if len(steps):
        gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
        first_step = max(0, int(steps[0] - gap))
        begun_s = _number(times[0] - np.nan_to_num(lines[_STEP_S][0]) * (steps[0] - first_step))
        sign_s = max([s for s in (sign_s, _number(times[-1])) if s is not None], default=None)
    if begun is not None:
        first_step, begun_s = int(begun[STEP]), _number(when(begun.get(WHEN)))
    return replace(
        PastAttempt(**vars(attempt)),
        began_s=attempt.began_s or begun_s,
        begun_s=begun_s,
        ended_s=attempt.released_s or sign_s or begun_s,
        first_step=first_step,
        last_step=int(steps[-1]) if len(steps) else None,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def in_order(attempts: Sequence[PastAttempt]) -> list[PastAttempt]:
    """End each attempt when the next one begins: in a copied folder, the times of heartbeats are those of the copy."""
    found = list(attempts)
    for i, later in enumerate(found[1:]):
        if later.began_s is not None and (found[i].ended_s or 0.0) > later.began_s:
            found[i] = replace(found[i], ended_s=later.began_s)
    return found


def _end_of(attempt: PastAttempt, facts: RunFacts, me: Owner) -> str:
    """Say how an attempt ended, in a word or two."""
    if facts.attempt is not None and attempt.number > facts.attempt.number:
        return "not known"
    if facts.attempt is None or attempt.number == facts.attempt.number:
        return "running" if is_alive(facts, me) else end_in_words(facts.stop, facts.failures)
    before = facts.earlier[attempt.number - 1 : attempt.number]
    return end_in_words(before[0] if before else None)


def end_in_words(stop: Mapping[str, Any] | None, failures: tuple[Failure, ...] = ()) -> str:
    """Say how an attempt ended by its stop.json; without one it was killed, unless its ranks report a failure."""
    if stop is None:
        cause = root_cause(failures)
        return "killed" if cause is None else f"failed ({cause.kind})"
    reason = str(stop.get("reason", "not known"))
    return {
        "error": f"failed ({stop.get('kind', 'error')})",
        "signal": f"stopped by {stop.get('signal', 'a signal')}",
        "asked": "stopped by `lingua stop`",
    }.get(reason, reason)


# -- what counts ---------------------------------------------------------------------------------------------------


def limits_of(attempts: Sequence[PastAttempt]) -> dict[int, float]:
    """Return the step up to which the work of each attempt counts: the lowest one that a later attempt resumed from.

    For the attempt that computed a step, counting or not, see `Past.attempt_of` in past.py.
    """
    limits: dict[int, float] = {}
    limit = np.inf
    for attempt in reversed(attempts):
        limits[attempt.number] = limit
        if attempt.first_step is not None:
            limit = min(limit, attempt.first_step)
    return limits


def counting(attempts: Sequence[PastAttempt], table: Table) -> np.ndarray:
    """Return a mask of the lines that no later attempt trained again."""
    mask = np.ones(len(table), dtype=bool)
    for number, limit in limits_of(attempts).items():
        mask &= (table[ATTEMPT] != number) | (table[STEP] <= limit)
    return mask


def that_count(attempts: Sequence[PastAttempt], scores: Iterable[Scores]) -> list[Scores]:
    """Drop the figures of steps that a later attempt trained again; return the newest of each step, ascending."""
    limits = limits_of(attempts)
    newest = {one.step: one for one in scores if one.step <= limits.get(one.attempt, np.inf)}
    return [newest[step] for step in sorted(newest)]


# -- where the time went -------------------------------------------------------------------------------------------


def _with_time(attempts: Sequence[PastAttempt], table: Table, counts: np.ndarray) -> Table:
    """Return the lines that count, with TRAINED_S."""
    seconds = np.zeros(len(table))
    for attempt in attempts:
        mine = table[ATTEMPT] == attempt.number
        seconds[mine] = _seconds(attempt, table.where(mine), _STEP_S)
    kept = table.where(counts)
    return Table({**kept.columns, TRAINED_S: np.cumsum(seconds[counts])})


def _seconds(attempt: PastAttempt, lines: Table, key: str) -> np.ndarray:
    """Return the seconds that the steps of each line of an attempt took; `key` has the mean of a step."""
    n_steps = np.maximum(np.diff(lines[STEP], prepend=attempt.first_step or 0), 0)
    return np.nan_to_num(lines[key]) * n_steps


def account(
    attempts: Sequence[PastAttempt],
    table: Table,
    counts: np.ndarray,
    validations: Sequence[Scores],
    notes: Iterable[Mapping[str, Any]],
) -> list[dict[str, float]]:
    """Return the seconds of each attempt by kind. They add up to the time from its beginning to the next one's."""
    saved: dict[Any, float] = {}
    for note in notes:
        if note["event"] in ("staged", "published") and note.get("bytes"):  # training waited for these
            saved[note.get(ATTEMPT)] = saved.get(note.get(ATTEMPT), 0.0) + (_number(note.get("seconds")) or 0.0)
    accounts = []
    for i, attempt in enumerate(attempts):
        chosen = table[ATTEMPT] == attempt.number
        mine = [one for one in validations if one.attempt == attempt.number]
        one = _account_attempt(attempt, table.where(chosen), counts[chosen], mine, saved.get(attempt.number))
        later = attempts[i + 1].began_s if i + 1 < len(attempts) else None
        if later is not None and attempt.ended_s is not None:
            one["idle"] = max(0.0, later - attempt.ended_s)
        accounts.append(one)
    return accounts


def _account_attempt(
    attempt: PastAttempt, lines: Table, counts: np.ndarray, validations: Sequence[Scores], saving_s: float | None
) -> dict[str, float]:
    spent = dict.fromkeys(SPENT, 0.0)
    if attempt.began_s is None or attempt.ended_s is None:
        return spent
    all_s = max(0.0, attempt.ended_s - attempt.began_s)
    trained_s = _seconds(attempt, lines, _STEP_S)
    loaded_s = np.minimum(_seconds(attempt, lines, _LOAD_S), trained_s)
    spent["training"] = float((trained_s - loaded_s)[counts].sum())
    spent["loading"] = float(loaded_s[counts].sum())
    spent["lost"] = float(trained_s[~counts].sum())
    spent["saving"] = _stalls_s(lines[_STALL_S]) if saving_s is None else saving_s
    spent["validating"] = sum(one.seconds for one in validations)
    if attempt.begun_s is None:
        spent["starting"] = all_s
    else:
        before_s = sum(one.seconds for one in validations if one.at_s <= attempt.begun_s)
        spent["starting"] = max(0.0, attempt.begun_s - attempt.began_s - before_s)
    if attempt.end == "killed" and len(lines):  # what it trained since its last line
        spent["lost"] += max(0.0, attempt.ended_s - float(lines[WHEN][-1]))
    spent["other"] = max(0.0, all_s - sum(spent.values()))
    return spent


def _stalls_s(stalls: np.ndarray) -> float:
    """Return the seconds of all saves: each line repeats the newest one's."""
    there = stalls[np.isfinite(stalls)]
    return float(there[np.diff(there, prepend=np.nan) != 0].sum()) if len(there) else 0.0


# -- checkpoints and scores ----------------------------------------------------------------------------------------


def _events(facts: RunFacts, notes: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Return what happened to checkpoints: from the trainer's notes, .done marks and folders of evaluations."""
    events = []
    for note in notes:
        at_s, step, attempt = when(note.get(WHEN)), int(note[STEP]), note.get(ATTEMPT)
        if note["event"] in ("staged", "published", "failed") and np.isfinite(at_s) and isinstance(attempt, int):
            size_bytes, why = note.get("bytes"), str(note.get("error", ""))
            seconds = _number(note.get("seconds"))
            events.append(Event(note["event"], step, at_s, attempt, seconds, size_bytes or None, why))
    noted = {(event.step, event.attempt): i for i, event in enumerate(events) if event.kind == "published"}
    try:
        root = root_of(facts.path)
    except (ValueError, TypeError, AttributeError):  # a config that cannot be read, or holds something else there
        root = facts.path / "checkpoints"
    for step in done_steps(root):
        record = json_object_in(done_mark(root, step)) or {}
        if not is_number(record.get("created_at")) or not isinstance(record.get(ATTEMPT), int):
            continue
        seconds, size_bytes = _number(record.get("seconds")), record.get("bytes")
        event = Event("published", step, record["created_at"], record[ATTEMPT], seconds, size_bytes)
        if (step, event.attempt) in noted:  # the mark has the exact time and size
            events[noted[step, event.attempt]] = event
        else:
            events.append(event)
    for folder in entries(facts.path / EVALS):
        step = parse_folder(folder.name)
        for name, kind in ((RESULTS, "evaluated"), (FAILED, "given up")):
            record = json_object_in(folder / name) if step is not None else None
            if record and step is not None and is_number(record.get("created_at")):
                seconds, why = _number(record.get("seconds")), str(record.get("reason", ""))
                events.append(Event(kind, step, record["created_at"], _attempt_in(record), seconds, None, why))
    return events


def _attempt_in(record: Mapping[str, Any]) -> int:
    number = record.get(ATTEMPT)
    return number if isinstance(number, int) else 0


def _scores(path: Path) -> list[Scores]:
    """Read all figures of a file, in its order."""
    found = []
    for record in records_in(path):
        values = {key: float(v) for key, v in record.items() if "/" in key and is_number(v)}
        seconds = _number(record.get("seconds")) or 0.0
        found.append(Scores(int(record[STEP]), _attempt_in(record), when(record.get(WHEN)), values, seconds))
    return found


def keys_of(scores: Collection[Scores]) -> list[str]:
    """Return the names of all figures, in order of first appearance."""
    return list(dict.fromkeys(key for one in scores for key in one.values))
