"""Build the history of a run from its folder: every attempt, its steps, and where the time went.

A file that is missing, damaged or of an older version leaves a gap, never a wrong figure. If a run went back to a
checkpoint, the steps of the newer attempt count, and the others are reported as lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lingua.checkpoint.layout import EVALS, FAILED, RESULTS, done_mark, done_steps, parse_folder
from lingua.files import RunError, entries, json_object_in
from lingua.report.facts import RunFacts
from lingua.report.series import ATTEMPT, STEP, WHEN, Table, curve, read_table, records_in, when
from lingua.report.status import is_alive, root_cause
from lingua.run.failure import Failure
from lingua.run.lock import Attempt, Owner, attempt_files, read_attempt
from lingua.run.metrics import CHECKPOINT_FILE, EVAL_FILE, METRICS_FILE, SAMPLES_FILE, VALIDATION_FILE, is_number
from lingua.run.startup import EVENT, FIRST_STEP, parts_in

LOSS, TOKENS = "loss/out", "optim/total_tokens"
MEAN_LOSS = "loss/mean"  # over the steps since the previous line; `read_history` fills gaps with the step's own loss
HEADS = tuple(f"loss/head_{i}" for i in range(8))  # the first eight heads of a model that predicts several tokens
_STEP_S, _LOAD_S = "speed/curr_iter_time", "speed/data_load_time"
TRAINED_S, _LOADED_S = "trained_s", "loaded_s"  # computed columns
_LEARNT = (LOSS, MEAN_LOSS, "loss/above_floor", *HEADS, TOKENS, "optim/lr", "optim/grad_norm")
_KEYS = (*_LEARNT, "speed/wps", "speed/mfu", "speed/hfu", _STEP_S, _LOAD_S, TRAINED_S, _LOADED_S)

SPENT = {
    "training": ("training", "training that counts"),
    "loading": ("waiting for data", "waiting for data"),
    "saving": ("checkpoints", "held up by checkpoints"),
    "validating": ("validation", "validation"),
    "starting": ("start-up", "start-up, to the end of the first step"),
    "lost": ("lost, trained again", "lost: trained again, or killed before it was saved"),
    "other": ("ending, unreported", "ending, and steps not reported yet"),
    "idle": ("not running", "not running"),
}
"""Kinds of time in the order of the report: (name in a picture, name in a table)."""


@dataclass(frozen=True)
class PastAttempt(Attempt):
    """An attempt and its outcome; None for facts that no file contains."""

    begun_s: float | None = None  # start of its first step
    ended_s: float | None = None  # its last heartbeat; now, while it is running
    first_step: int | None = None  # the step that it resumed from
    last_step: int | None = None  # the last step that it reported
    end: str = ""  # running, finished, killed, ...
    startup: dict[str, float] = field(default_factory=dict)  # seconds by part, from process start to first step


@dataclass(frozen=True)
class Event:
    """An event in the life of a checkpoint."""

    kind: str
    """staged (`seconds`: training paused), published (`seconds`: from memory to disk), failed, evaluated, given up."""
    step: int
    at_s: float
    attempt: int
    seconds: float | None = None
    size_bytes: int | None = None
    why: str = ""
    """Reason of a failure; `synchronous` if training waited for the whole save."""


@dataclass(frozen=True)
class Scores:
    """The figures of a validation or an evaluation."""

    step: int
    attempt: int
    at_s: float
    values: dict[str, float]
    seconds: float = 0.0


@dataclass(frozen=True)
class Sample:
    """A continuation of a prompt by the model."""

    step: int
    attempt: int
    prompt: str
    text: str


Counted = TypeVar("Counted", Scores, Sample)


@dataclass(frozen=True)
class History:
    """The history of a run."""

    facts: RunFacts
    attempts: list[PastAttempt]
    metrics: Table  # the lines that count; TRAINED_S: seconds of training so far, without startup, validation, saves
    undone: Table  # lines of steps that a later attempt trained again, or will train again
    events: list[Event]
    validations: list[Scores] = field(default_factory=list)
    evaluations: list[Scores] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    spent: list[dict[str, float]] = field(default_factory=list)  # seconds by kind of each attempt; `idle`: after it

    @property
    def seconds(self) -> dict[str, float]:
        return {kind: sum(one[kind] for one in self.spent) for kind in SPENT}

    @property
    def began_s(self) -> float:
        return min(attempt.began_s for attempt in self.attempts if attempt.began_s is not None)

    def at(self, steps: np.ndarray, key: str) -> np.ndarray:
        """Return the values at `steps` of a column that grows with them, interpolated between lines."""
        xs, ys = curve(self.metrics, key)
        if len(xs) and self.attempts and self.attempts[0].first_step == 0:
            xs, ys = np.append(0.0, xs), np.append(0.0, ys)
        return np.interp(steps, xs, ys) if len(xs) else np.full(len(steps), np.nan)


def read_history(facts: RunFacts, me: Owner) -> History:
    """Build the history of a run."""
    table = read_table(facts.path / METRICS_FILE, _KEYS)
    table[MEAN_LOSS] = np.where(np.isfinite(table[MEAN_LOSS]), table[MEAN_LOSS], table[LOSS])
    notes = [r for r in records_in(facts.path / CHECKPOINT_FILE) if isinstance(r.get("event"), str)]
    validations = _scores(facts.path / VALIDATION_FILE)
    attempts = _read_attempts(facts, table, notes, validations, me)
    for attempt in attempts:  # a line has the mean of the steps since the previous line
        mine = table[ATTEMPT] == attempt.number
        n_steps = np.maximum(np.diff(table[STEP][mine], prepend=attempt.first_step or 0), 0)
        for key, total in ((_STEP_S, TRAINED_S), (_LOAD_S, _LOADED_S)):
            table[total][mine] = np.nan_to_num(table[key][mine]) * n_steps
        first = np.flatnonzero(mine)[:1]  # its first step counts as startup
        table[TRAINED_S][first] = np.maximum(table[TRAINED_S][first] - attempt.startup.get(FIRST_STEP, 0.0), 0.0)
    limits = limits_of(attempts)
    counts: np.ndarray = table[STEP] <= [limits.get(number, np.inf) for number in table[ATTEMPT].tolist()]
    for note in notes:
        if note["event"] == "rewind" and ATTEMPT in note:  # this attempt's steps after that one were undone
            before = (table[ATTEMPT] == note[ATTEMPT]) & (table[WHEN] < when(note.get(WHEN)))
            counts &= ~(before & (table[STEP] > note[STEP]))
    metrics = table[counts]
    metrics[TRAINED_S] = np.cumsum(np.nan_to_num(metrics[TRAINED_S]))
    return History(
        facts=facts,
        attempts=attempts,
        metrics=metrics,
        undone=table[~counts],
        events=sorted(_events(facts, notes), key=lambda event: event.at_s),
        validations=that_count(limits, validations),
        evaluations=that_count(limits, _scores(facts.path / EVAL_FILE)),
        samples=that_count(limits, _samples(facts.path / SAMPLES_FILE)),
        spent=_account(attempts, table, counts, validations, notes),
    )


def _read_attempts(
    facts: RunFacts, table: Table, notes: Sequence[Mapping[str, Any]], scores: Sequence[Scores], me: Owner
) -> list[PastAttempt]:
    """Return every attempt that left a file or a line of metrics, in order.

    An attempt begins with its process, as its startup does, if that is known; else when it locked the folder.
    """
    files = attempt_files(facts.path)
    begun = {note[ATTEMPT]: note for note in notes if note["event"] == "begun" and ATTEMPT in note}
    started = {note[ATTEMPT]: parts_in(note) for note in notes if note["event"] == EVENT and ATTEMPT in note}
    found, reported = [], table[ATTEMPT][np.isfinite(table[ATTEMPT])]
    for number in sorted({*files, *begun, *np.unique(reported).astype(int).tolist()}):
        lines, attempt, signs_s = table[table[ATTEMPT] == number], Attempt(number, Owner()), []
        if number in files:
            with suppress(OSError, RunError):
                attempt = read_attempt(files[number])
                signs_s = [attempt.beat_s]
        first_step, begun_s, steps = None, None, lines[STEP]
        if len(steps):
            gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
            first_step = max(0, int(steps[0] - gap))
            begun_s = _number(lines[WHEN][0] - np.nan_to_num(lines[_STEP_S][0]) * (steps[0] - first_step))
            signs_s = [s for s in (*signs_s, _number(lines[WHEN][-1])) if s is not None]
        if number in begun:
            first_step, begun_s = begun[number][STEP], _number(when(begun[number].get(WHEN)))
        end = _end_of(number, facts, me)
        ended_s = facts.now_s if end == "running" else attempt.released_s or max(signs_s, default=begun_s)
        last_step = int(steps[-1]) if len(steps) else None
        began_s, startup = attempt.began_s or begun_s, started.get(number, {})
        if startup and began_s is not None and begun_s is not None:
            before_s = sum(startup.values()) - startup.get(FIRST_STEP, 0.0) + _validated_s(number, begun_s, scores)
            began_s = min(began_s, begun_s - before_s)
        known: dict[str, Any] = vars(attempt) | {"began_s": began_s}
        steps_of = {"begun_s": begun_s, "first_step": first_step, "last_step": last_step}
        found.append(PastAttempt(**known, **steps_of, ended_s=ended_s, end=end, startup=startup))
    return in_order(found)


def _validated_s(number: int, until_s: float, scores: Iterable[Scores]) -> float:
    return sum(one.seconds for one in scores if one.attempt == number and one.at_s <= until_s)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def in_order(attempts: Sequence[PastAttempt]) -> list[PastAttempt]:
    """End each attempt when the next one begins: in a copied folder, heartbeats have the times of the copy."""
    found = list(attempts)
    for i, later in enumerate(found[1:]):
        if later.began_s is not None and (found[i].ended_s or 0.0) > later.began_s:
            found[i] = replace(found[i], ended_s=later.began_s)
    return found


def _end_of(number: int, facts: RunFacts, me: Owner) -> str:
    """Describe the end of an attempt in a word or two."""
    newest = number if facts.attempt is None else facts.attempt.number
    if number == newest:
        return "running" if is_alive(facts, me) else end_in_words(facts.stop, facts.failures)
    return "not known" if number > newest else end_in_words(facts.earlier[number - 1] if number > 0 else None)


def end_in_words(stop: Mapping[str, Any] | None, failures: tuple[Failure, ...] = ()) -> str:
    """Describe the end of an attempt by its stop.json; without one it was killed, unless its ranks report a failure."""
    if stop is None:
        cause = root_cause(failures)
        return "killed" if cause is None else f"failed ({cause.kind})"
    reason = str(stop.get("reason", "not known"))
    return {
        "error": f"failed ({stop.get('kind', 'error')})",
        "signal": f"stopped by {stop.get('signal', 'a signal')}",
        "asked": "stopped by `lingua stop`",
    }.get(reason, reason)


def limits_of(attempts: Sequence[PastAttempt]) -> dict[float, float]:
    """Return the step up to which each attempt counts: the lowest one that a later attempt resumed from."""
    limits: dict[float, float] = {}
    limit = np.inf
    for attempt in reversed(attempts):
        limits[attempt.number] = limit
        if attempt.first_step is not None:
            limit = min(limit, attempt.first_step)
    return limits


def that_count(limits: Mapping[float, float], scores: Iterable[Counted]) -> list[Counted]:
    """Drop scores of steps that a later attempt trained again; return the newest of each step, ascending."""
    newest = {one.step: one for one in scores if one.step <= limits.get(one.attempt, np.inf)}
    return [newest[step] for step in sorted(newest)]


def _account(
    attempts: Sequence[PastAttempt], table: Table, counts: np.ndarray, scores: Sequence[Scores], notes: Iterable[Any]
) -> list[dict[str, float]]:
    """Return the seconds of each attempt by kind. They add up to the time from its start to the next one's."""
    saved: dict[Any, float] = {}
    for note in notes:
        if note["event"] in ("staged", "published") and note.get("bytes"):  # training waited for these
            saved[note.get(ATTEMPT)] = saved.get(note.get(ATTEMPT), 0.0) + (_number(note.get("seconds")) or 0.0)
    accounts = []
    for attempt, later in zip_longest(attempts, attempts[1:]):
        spent = dict.fromkeys(SPENT, 0.0)
        accounts.append(spent)
        if attempt.ended_s is None:
            continue
        if attempt.began_s is not None:
            all_s, mine = max(0.0, attempt.ended_s - attempt.began_s), table[ATTEMPT] == attempt.number
            lines, kept, measured = table[mine], counts[mine], [one for one in scores if one.attempt == attempt.number]
            loaded_s = np.minimum(lines[_LOADED_S], lines[TRAINED_S])
            spent["training"] = float((lines[TRAINED_S] - loaded_s)[kept].sum())
            spent["loading"] = float(loaded_s[kept].sum())
            spent["lost"] = float(lines[TRAINED_S][~kept].sum())
            spent["saving"] = saved.get(attempt.number, 0.0)
            spent["validating"] = sum(one.seconds for one in measured)
            until_s = attempt.ended_s if attempt.begun_s is None else attempt.begun_s
            before_s = 0.0 if attempt.begun_s is None else _validated_s(attempt.number, until_s, scores)
            spent["starting"] = sum(attempt.startup.values()) or max(0.0, until_s - attempt.began_s - before_s)
            if attempt.end == "killed" and len(lines):  # the time since its last line
                spent["lost"] += max(0.0, attempt.ended_s - float(lines[WHEN][-1]))
            spent["other"] = max(0.0, all_s - sum(spent.values()))
        if later is not None and later.began_s is not None:
            spent["idle"] = max(0.0, later.began_s - attempt.ended_s)
    return accounts


def _events(facts: RunFacts, notes: Iterable[Mapping[str, Any]]) -> Collection[Event]:
    """Return the events of checkpoints, from the trainer's notes, .done marks and folders of evaluations."""
    found: dict[Any, Event] = {}

    def add(kind: str, step: int, at_s: float, record: Mapping[str, Any], why: str = "error") -> None:
        seconds, attempt = _number(record.get("seconds")), record.get(ATTEMPT)
        attempt = attempt if isinstance(attempt, int) else 0
        key = (kind, step, attempt) if kind == "published" else len(found)
        reason = str(record.get(why, "")) or ("synchronous" if record.get("synchronous") else "")
        if key in found:  # the mark has no reason
            reason = reason or found[key].why
        found[key] = Event(kind, step, at_s, attempt, seconds, record.get("bytes") or None, reason)

    for note in notes:
        if note["event"] in ("staged", "published", "failed") and ATTEMPT in note and np.isfinite(when(note.get(WHEN))):
            add(note["event"], note[STEP], when(note.get(WHEN)), note)
    for step in done_steps(facts.root):
        mark = json_object_in(done_mark(facts.root, step)) or {}
        if is_number(mark.get("created_at")) and isinstance(mark.get(ATTEMPT), int):
            add("published", step, mark["created_at"], mark)  # replaces a note: it has the exact time and size
    for folder in entries(facts.path / EVALS):
        step = parse_folder(folder.name)
        for name, kind in ((RESULTS, "evaluated"), (FAILED, "given up")):
            record = json_object_in(folder / name) if step is not None else None
            if record and step is not None and is_number(record.get("created_at")):
                add(kind, step, record["created_at"], record, "reason")
    return found.values()


def _scores(path: Path) -> list[Scores]:
    """Read all scores of a file, in order."""
    found = []
    for record in records_in(path):
        values = {key: v for key, v in record.items() if "/" in key and is_number(v)}
        seconds = _number(record.get("seconds")) or 0.0
        found.append(Scores(record[STEP], record.get(ATTEMPT, 0), when(record.get(WHEN)), values, seconds))
    return found


def _samples(path: Path) -> list[Sample]:
    """Read all samples of a file, in order."""
    return [
        Sample(record[STEP], record.get(ATTEMPT, 0), str(record.get("prompt", "")), str(record.get("text", "")))
        for record in records_in(path)
    ]


def keys_of(scores: Collection[Scores]) -> list[str]:
    """Return the names of all scores, in order of first appearance."""
    return list(dict.fromkeys(key for one in scores for key in one.values))
