"""Describe the state of a run and why it ended: pure functions of `RunFacts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lingua.console import duration, figure
from lingua.report.facts import RunFacts
from lingua.run.failure import KINDS, Failure
from lingua.run.folder import EXIT_REQUEUE
from lingua.run.lock import DEAD_AFTER_S, Owner
from lingua.run.startup import parts_in
from lingua.scheduler import ACCOUNTS

_SILENT_S = 3 * DEAD_AFTER_S  # another machine's view of a shared disk may lag by a minute, and so may its clock
LIVING = ("running", "starting")


@dataclass(frozen=True)
class Status:
    """The figures of a run, as `--json` prints them; None if not known (yet)."""

    path: str
    name: str
    state: str
    """new, starting, running, queued, finished, saved (after a signal; to be resumed), stopped, failed, killed."""
    step: int | None
    n_steps: int | None
    loss: float | None  # mean since the previous line of metrics, as in the log
    tokens_per_s: float | None  # per device; None unless it runs, like left_s
    left_s: float | None  # remaining training time at this speed
    metrics_age_s: float | None
    checkpoint: int | None
    checkpoint_age_s: float | None
    validation: dict[str, float]
    validated_step: int | None
    evaluated_step: int | None
    starts: int  # number of attempts
    host: str
    job: str
    job_state: str
    job_left: str  # rest of its time limit, in Slurm's format
    kind: str | None  # kind of failure
    startup: dict[str, float] | None = None  # seconds by part of the newest attempt, once it has trained a step
    phase: str | None = None  # phase of the next step, and its end: `anneal, to step 1000`


def is_alive(facts: RunFacts, me: Owner) -> bool:
    """Return whether the newest attempt still owns the folder, as far as this machine can tell."""
    return facts.attempt is not None and facts.attempt.is_alive(me, facts.now_s, _SILENT_S)


def state_of(facts: RunFacts, me: Owner) -> str:
    """Return the state in one word; `Status.state` lists them."""
    if facts.attempt is None:
        return "new"
    if is_alive(facts, me):
        trained = facts.metrics is not None and facts.metrics.get("incarnation") == facts.attempt.number
        return "running" if trained else "starting"
    if facts.job is not None and facts.job.is_waiting:
        return "queued"
    if facts.stop is None:
        return "failed" if facts.failures else "killed"
    otherwise = "saved" if facts.stop.get("exit_code") == EXIT_REQUEUE else "stopped"
    return {"finished": "finished", "error": "failed"}.get(str(facts.stop.get("reason")), otherwise)


def has_trained(facts: RunFacts, status: Status) -> bool:
    """Return whether any attempt of a run got further than a failure before training."""
    ended = [*facts.earlier, facts.stop]
    return status.state != "failed" or status.step is not None or any(s is None or "step" in s for s in ended)


def status_of(facts: RunFacts, me: Owner) -> Status:
    """Return the figures of a run."""
    state, cause = state_of(facts, me), root_cause(facts.failures)
    metrics, stop, attempt, job = facts.metrics or {}, facts.stop or {}, facts.attempt, facts.job
    validation = {key: value for key, value in (facts.validation or {}).items() if "/" in key}
    steps = [step for step in (metrics.get("global_step"), stop.get("step"), facts.checkpoint) if isinstance(step, int)]
    step = max(steps, default=None) if state not in LIVING else metrics.get("global_step", facts.checkpoint)
    return Status(
        path=str(facts.path),
        name=facts.name,
        state=state,
        step=step,
        n_steps=n_steps if isinstance(n_steps := facts.config.get("steps"), int) else None,
        loss=metrics.get("loss/mean", metrics.get("loss/out")),
        tokens_per_s=metrics.get("speed/wps") if state == "running" else None,
        left_s=metrics.get("time/eta_s") if state == "running" else 0.0 if state == "finished" else None,
        metrics_age_s=facts.metrics_age_s,
        checkpoint=facts.checkpoint,
        checkpoint_age_s=facts.checkpoint_age_s,
        validation=validation,
        validated_step=(facts.validation or {}).get("global_step"),
        evaluated_step=facts.evaluated_step,
        starts=attempt.number if attempt is not None else 0,
        host=attempt.owner.host if attempt is not None else "",
        job=facts.job_id,
        job_state=job.state if job is not None else "",
        job_left=job.left if job is not None else "",
        kind=cause.kind if cause is not None and state == "failed" else stop.get("kind"),
        startup=_startup(facts),
        phase=next(
            (f"{name}, to step {last:,}" for name, _, last in phases_in(facts.config) if (step or 0) < last), None
        ),
    )


def _startup(facts: RunFacts) -> dict[str, float] | None:
    """Return the startup time of the newest attempt: seconds by part, and the total as `s`."""
    note = facts.startup
    if note is None or facts.attempt is None or note.get("incarnation") != facts.attempt.number:
        return None
    return {"s": sum(parts_in(note).values()), **parts_in(note)}


def phases_in(config: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Return (name, updates before it, its last update) of each phase in a frozen config."""
    listed = config.get("phases")
    found, first = [], 0
    for phase in listed if isinstance(listed, list) else ():
        if not isinstance(phase, dict) or not isinstance(last := phase.get("until"), int):
            return []  # not ours
        found.append((str(phase.get("name")), first, int(last)))
        first = int(last)
    return found


def root_cause(failures: tuple[Failure, ...]) -> Failure | None:
    """Return the failure that caused the others: blaming no other rank, not a lost connection, the earliest."""
    return min(failures, key=lambda f: (f.because_of_rank is not None, f.kind == "nccl", f.time, f.rank), default=None)


def describe(status: Status) -> list[str]:
    """Describe a run in a few lines, first its path and state."""
    one, step = status, figure(status.step or 0, ",")
    if one.n_steps:
        step += f" of {one.n_steps:,}" + ("" if one.step is None else f" ({one.step / one.n_steps:.0%})")
    if one.step is not None:
        step += ("" if one.loss is None else f", loss {one.loss:.4f}") + _ago(one.metrics_age_s)
    left = "" if one.left_s is None or one.state == "finished" else f"{duration(one.left_s)} of training"
    bpb = ", ".join(f"{key} {value:.4f}" for key, value in one.validation.items() if key.endswith("/bpb"))
    validated = "" if one.validated_step is None else f"validation at {one.validated_step:,}: {bpb}"
    evaluated = "" if one.evaluated_step is None else f"evaluated up to {one.evaluated_step:,}"
    lines = {
        "step": step,
        "phase": one.phase or "",
        "speed": "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f} tokens/s per device",
        "left": left + (f"; of the job's time {one.job_left}" if left and one.job_left else ""),
        "checkpoint": _checkpoint(one, "none yet"),
        "evaluation": "; ".join(filter(None, (validated, evaluated))),
        "job": f"{one.job} {one.job_state or '(Slurm does not say)'}" if one.job else "",
        "attempt": f"{one.starts} on {one.host}" if one.starts else "none yet",
    }
    return [f"{one.path}  {state_text(one)}", *(f"  {name:<11} {text}" for name, text in lines.items() if text)]


def state_text(status: Status) -> str:
    """Format the state as in `failed (nan)`."""
    return f"{status.state} ({status.kind})" if status.kind else status.state


def _checkpoint(status: Status, none: str) -> str:
    return none if status.checkpoint is None else f"{status.checkpoint:,}{_ago(status.checkpoint_age_s)}"


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} ago"


COLUMNS = ("run", "state", "step", "of", "loss", "tokens/s", "left", "checkpoint", "job")


def row(one: Status) -> tuple[str, ...]:
    """Return a run as a row of a table with COLUMNS."""
    left = duration(one.left_s) if one.left_s else "-"
    figures = figure(one.step, ","), figure(one.n_steps, ","), figure(one.loss), figure(one.tokens_per_s, ",.0f")
    return (one.path, state_text(one), *figures, left, _checkpoint(one, "-"), one.job or "-")


def why(facts: RunFacts, me: Owner) -> dict[str, str]:
    """Explain why a run ended: how, the cause, where to look, what is saved, and what to do next."""
    status = status_of(facts, me)
    cause = root_cause(facts.failures) if status.state in ("failed", "queued") else None
    return {
        "ended": _ended(facts, status),
        "cause": _cause(facts, status, cause).partition("\n")[0],
        "where": _where(facts, status, cause),
        "saved": _saved(facts, status),
        "next": _next(facts, status, cause),
    }


def _ended(facts: RunFacts, status: Status) -> str:
    if facts.attempt is None:
        return f"{status.path} was never started"
    how, ago = status.state, ""
    if status.state in ("saved", "stopped"):
        how = "stopped" if _unsaved(facts) or status.checkpoint is None else "stopped and saved"
    if status.state in LIVING:
        how = f"not at all: it is {status.state}"
    else:
        seen_s = [max(0.0, facts.now_s - facts.attempt.beat_s), facts.metrics_age_s]
        ago = _ago(min(s for s in seen_s if s is not None) if facts.stop is None else facts.stop_age_s)
    at = f", step {status.step or 0:,} of {status.n_steps:,}" if status.n_steps else ""
    ends = ("killed" if s is None else str(s.get("kind") or s.get("signal") or s.get("reason")) for s in facts.earlier)
    counts = [(end, len(list(same))) for end, same in groupby(ends)][-6:]
    before = ", ".join(end if n == 1 else f"{n} x {end}" for end, n in counts)
    return f"{how}{at}{ago}; attempt {status.starts}" + (f" (before: {before})" if before else "")


def _cause(facts: RunFacts, status: Status, cause: Failure | None) -> str:
    if cause is not None:
        return f"{cause.kind}: {cause.type}: {cause.message.strip()}"
    stop, job = facts.stop or {}, facts.job
    if facts.attempt is not None and facts.attempt.copied_from and status.state == "killed":
        return f"this folder is a copy: {facts.attempt} ran in {facts.attempt.copied_from}, and may still run there"
    texts = {
        "failed": f"{stop.get('kind', 'error')}: {str(stop.get('error', 'no message was left')).strip()}",
        "killed": f"it left no message: SIGKILL, a lost node, or no memory left on the host (`dmesg`, `{ACCOUNTS}`)",
        "saved": f"{stop.get('signal', 'a signal')}: preemption, the time limit, or a person sent it",
        "stopped": "a person: " + ("Ctrl-C" if stop.get("signal") == "SIGINT" else str(stop.get("signal"))),
        "finished": "all steps are done",
    }
    if job is not None:
        reason = f" ({job.reason})" if job.reason else ""
        texts["killed"] = f"Slurm says {job.state}{reason}; the run could leave no message"
        texts["queued"] = f"{stop.get('signal') or 'killed'}; job {job.id} is {job.state} {job.reason}".rstrip()
    return texts.get(status.state, "-")


def _where(facts: RunFacts, status: Status, cause: Failure | None) -> str:
    job = f", Slurm job {status.job} {status.job_state}".rstrip() if status.job else ""
    if cause is None:
        return f"{status.host or '-'}{job}; {facts.path / 'train.log'}"
    files = f"{facts.path}/logs/error_{cause.rank}.json" + (", stacks_*.txt" if cause.kind == "hang" else "")
    step = "before the first step" if cause.step is None else f"after step {cause.step:,}"
    more = f" (and {len(facts.failures) - 1} that followed)" if len(facts.failures) > 1 else ""
    return f"rank {cause.rank} on {cause.host}, {step}, {cause.time}{job}; {files}{more}"


def _unsaved(facts: RunFacts) -> str:
    """Return why the last step of a stopped run is not on disk, as its stop.json says."""
    return str((facts.stop or {}).get("unsaved") or "")


def _is_in_memory(facts: RunFacts, status: Status) -> bool:
    """Return whether a run that ended has left its newest checkpoint in the memory of this machine alone."""
    newest = -1 if status.checkpoint is None else status.checkpoint
    return status.state not in LIVING and facts.in_memory is not None and facts.in_memory > newest


def _saved(facts: RunFacts, status: Status) -> str:
    if unsaved := _unsaved(facts):
        return f"{unsaved}; on the disk: {_checkpoint(status, 'no checkpoint yet')}"
    if _is_in_memory(facts, status):
        text = f"checkpoint {facts.in_memory:,} is in this machine's memory, and a start here resumes from it"
        return f"{text}; on the disk: {_checkpoint(status, 'no checkpoint yet')}"
    if status.checkpoint is None:
        is_new = not status.step and status.state != "killed"
        return "nothing was trained yet" if is_new else "no checkpoint yet: it will begin at step 0 again"
    again = max(0, (status.step or 0) - status.checkpoint)
    otherwise = f"{again:,} steps will be trained again" if again else "no step is lost"
    lost = {
        "killed": "later steps will be trained again",  # the newest may not be in the metrics
        **dict.fromkeys(LIVING, f"if it is killed now, {again:,} steps will be trained again"),
    }.get(status.state, otherwise)
    return f"checkpoint {_checkpoint(status, '')}; {lost}"


def _next(facts: RunFacts, status: Status, cause: Failure | None) -> str:
    kind = KINDS.get(cause.kind if cause is not None else status.kind or "")
    if status.state == "failed" and kind is not None:
        return f"a restart {'may help' if kind.restart_may_help else 'would fail again'}: {kind.remedy}"
    begins = "begins at step 0" if status.checkpoint is None else "resumes from that checkpoint"
    if _is_in_memory(facts, status):
        begins = "resumes from what is in memory, if it starts on this machine"
    if _unsaved(facts):
        begins = f"resumes from what is in memory, if it starts on {status.host}"
    is_copy = facts.attempt is not None and facts.attempt.copied_from
    again = f"the same command with dump_dir={status.path}" if is_copy else "the same command, or the same job,"
    return {
        "finished": f"{'add a phase' if phases_in(facts.config) else 'raise `steps`'} to train longer",
        **dict.fromkeys(LIVING, f"`lingua status {status.path}` follows it"),
        "queued": f"nothing: it goes on when Slurm starts job {status.job}",
        "new": "start it",
    }.get(status.state, f"start it again: {again} {begins}")
