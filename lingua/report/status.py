"""How a run is doing and what ended it: decisions and sentences on the facts of its folder.

Promise: pure functions of `RunFacts`; what the facts do not say is not claimed. Torch-free.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from lingua.console import duration, figure
from lingua.report.facts import RunFacts
from lingua.run.failure import KINDS, Failure
from lingua.run.folder import EXIT_REQUEUE
from lingua.run.lock import DEAD_AFTER_S, Owner

_SILENT_S = 3 * DEAD_AFTER_S  # another machine's view of a shared disk may be a minute old, and so may its clock
LIVING = ("running", "starting")


@dataclass(frozen=True)
class Status:
    """A run in figures; the record that `--json` prints. None: not known (yet)."""

    path: str
    name: str
    state: str
    """new, starting, running, queued, finished, saved (by a signal; wants to go on), stopped, failed, killed."""
    step: int | None
    n_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    """Per device."""
    left_s: float | None
    """Seconds of training left, when it goes on at its present speed."""
    metrics_age_s: float | None
    checkpoint: int | None
    checkpoint_age_s: float | None
    validation: dict[str, float]
    validated_step: int | None
    evaluated_step: int | None
    starts: int
    host: str
    job: str
    job_state: str
    job_left: str
    """Of the job's time limit, in Slurm's words."""
    kind: str | None
    """Of the failure."""


def is_alive(facts: RunFacts, me: Owner) -> bool:
    """Return whether the newest attempt still owns the folder, as far as can be seen from here."""
    return facts.attempt is not None and facts.attempt.is_alive(me, facts.now_s, _SILENT_S)


def state_of(facts: RunFacts, me: Owner) -> str:
    """One word; `Status.state` lists them."""
    if facts.attempt is None:
        return "new"
    if is_alive(facts, me):
        trained = facts.metrics is not None and facts.metrics.get("incarnation") == facts.attempt.number
        return "running" if trained else "starting"
    if facts.job is not None and facts.job.is_waiting:
        return "queued"
    if facts.stop is None:
        return "failed" if facts.failures else "killed"
    match facts.stop.get("reason"):
        case "finished":
            return "finished"
        case "error":
            return "failed"
    return "saved" if facts.stop.get("exit_code") == EXIT_REQUEUE else "stopped"


def has_trained(facts: RunFacts, status: Status) -> bool:
    """Return whether a run is more than attempts that failed before training."""
    ended = [*facts.earlier, facts.stop]
    return status.state != "failed" or status.step is not None or any(s is None or "step" in s for s in ended)


def status_of(facts: RunFacts, me: Owner) -> Status:
    """The run in figures."""
    state, metrics = state_of(facts, me), facts.metrics or {}
    cause = root_cause(facts.failures)
    stop = facts.stop or {}
    validation = {key: value for key, value in (facts.validation or {}).items() if "/" in key}
    steps = [step for step in (metrics.get("global_step"), stop.get("step"), facts.checkpoint) if step is not None]
    return Status(
        path=str(facts.path),
        name=facts.name,
        state=state,
        step=max(steps, default=None) if state not in LIVING else metrics.get("global_step", facts.checkpoint),
        n_steps=facts.n_steps,
        loss=metrics.get("loss/out"),
        tokens_per_s=metrics.get("speed/wps"),
        left_s=0.0 if state == "finished" else metrics.get("time/eta_s"),
        metrics_age_s=facts.metrics_age_s,
        checkpoint=facts.checkpoint,
        checkpoint_age_s=facts.checkpoint_age_s,
        validation=validation,
        validated_step=(facts.validation or {}).get("global_step"),
        evaluated_step=facts.evaluated_step,
        starts=facts.attempt.number if facts.attempt is not None else 0,
        host=facts.attempt.owner.host if facts.attempt is not None else "",
        job=facts.job_id,
        job_state=facts.job.state if facts.job is not None else "",
        job_left=facts.job.left if facts.job is not None else "",
        kind=cause.kind if cause is not None and state == "failed" else stop.get("kind"),
    )


def root_cause(failures: tuple[Failure, ...]) -> Failure | None:
    """The failure that the others follow from: one that names no other rank, lost contact last, then the earliest."""
    return min(failures, key=lambda f: (f.because_of_rank is not None, f.kind == "nccl", f.time, f.rank), default=None)


# -- sentences -----------------------------------------------------------------------------------------------------


def describe(status: Status) -> list[str]:
    """A few lines for people, the first of them the name."""
    lines = [f"{status.path}  {status.state}" + (f" ({status.kind})" if status.kind else "")]
    facts = [
        ("step", _step(status)),
        ("speed", "" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f} tokens/s per device"),
        ("left", _left(status)),
        ("checkpoint", "none yet" if status.checkpoint is None else _aged(status.checkpoint, status.checkpoint_age_s)),
        ("evaluation", _evaluation(status)),
        ("job", _job(status)),
        ("attempt", f"{status.starts} on {status.host}" if status.starts else "none yet"),
    ]
    return lines + [f"  {name:<11} {text}" for name, text in facts if text]


def _step(status: Status) -> str:
    if status.step is None:
        return f"0 of {status.n_steps:,}" if status.n_steps else "0"
    of = f" of {status.n_steps:,} ({status.step / status.n_steps:.0%})" if status.n_steps else ""
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    ago = "" if status.metrics_age_s is None else f", {duration(status.metrics_age_s)} ago"
    return f"{status.step:,}{of}{loss}{ago}"


def _left(status: Status) -> str:
    if status.left_s is None or status.state == "finished":
        return ""
    limit = f"; of the job's time {status.job_left}" if status.job_left else ""
    return f"{duration(status.left_s)} of training{limit}"


def _aged(step: int, age_s: float | None) -> str:
    return f"{step:,}" if age_s is None else f"{step:,}, {duration(age_s)} ago"


def _evaluation(status: Status) -> str:
    parts = []
    if status.validated_step is not None:
        values = ", ".join(f"{key} {value:.4f}" for key, value in status.validation.items() if key.endswith("/bpb"))
        parts.append(f"validation at {status.validated_step:,}: {values}")
    if status.evaluated_step is not None:
        parts.append(f"evaluated up to {status.evaluated_step:,}")
    return "; ".join(parts)


def _job(status: Status) -> str:
    return f"{status.job} {status.job_state or '(Slurm does not say)'}" if status.job else ""


COLUMNS = ("run", "state", "step", "of", "loss", "tokens/s", "left", "checkpoint", "job")


def row(one: Status) -> tuple[str, ...]:
    """One run as a row of a table with COLUMNS."""
    return (
        one.path,
        f"{one.state} ({one.kind})" if one.kind else one.state,
        figure(one.step, ","),
        figure(one.n_steps, ","),
        figure(one.loss, ".4f"),
        figure(one.tokens_per_s, ",.0f"),
        duration(one.left_s) if one.left_s is not None and one.state in (*LIVING, "queued") else "-",
        "-" if one.checkpoint is None else _aged(one.checkpoint, one.checkpoint_age_s),
        one.job or "-",
    )


# -- what ended it -------------------------------------------------------------------------------------------------


def why(facts: RunFacts, me: Owner) -> dict[str, str]:
    """What ended a run, in five lines: how, the cause, where it is told, what is saved, and what to do."""
    status = status_of(facts, me)
    cause = root_cause(facts.failures) if status.state in ("failed", "queued") else None
    return {
        "ended": _ended(facts, status),
        "cause": _cause(facts, status, cause),
        "where": _where(facts, status, cause),
        "saved": _saved(status),
        "next": _next(status, cause),
    }


def _ended(facts: RunFacts, status: Status) -> str:
    if status.state == "new":
        return f"{status.path} was never started"
    how = {"saved": "stopped and saved", "stopped": "stopped and saved"}.get(status.state, status.state)
    if status.state in LIVING:
        how = f"not at all: it is {status.state}"
    at = f", step {status.step or 0:,} of {status.n_steps:,}" if status.n_steps else ""
    beat_age_s = None if facts.attempt is None else max(0.0, facts.now_s - facts.attempt.beat_s)
    signs = [beat_age_s, facts.metrics_age_s]
    age_s = min((s for s in signs if s is not None), default=None) if facts.stop is None else facts.stop_age_s
    ago = "" if age_s is None or status.state in LIVING else f", {duration(age_s)} ago"
    return f"{how}{at}{ago}; attempt {status.starts}{_history(facts)}"


def _history(facts: RunFacts) -> str:
    """How the attempts before ended; equal neighbours are counted."""
    told: list[tuple[str, int]] = []
    for stop in facts.earlier:
        word = "killed" if stop is None else str(stop.get("kind") or stop.get("signal") or stop.get("reason"))
        told = [*told[:-1], (word, told[-1][1] + 1)] if told and told[-1][0] == word else [*told, (word, 1)]
    words = [word if n == 1 else f"{n} x {word}" for word, n in told[-6:]]
    return f" (before: {', '.join(words)})" if words else ""


def _cause(facts: RunFacts, status: Status, cause: Failure | None) -> str:
    if cause is not None:
        return f"{cause.kind}: {cause.type}: {_first_line(cause.message)}"
    stop = facts.stop or {}
    match status.state:
        case "failed":
            return f"{stop.get('kind', 'error')}: {_first_line(str(stop.get('error', 'nothing was said')))}"
        case "killed" if facts.job is not None:
            reason = f" ({facts.job.reason})" if facts.job.reason else ""
            return f"Slurm says {facts.job.state}{reason}; the run itself had no time for a word"
        case "killed":
            return "without a word: SIGKILL, a lost node, or no memory left on the host (`dmesg`, `sacct`)"
        case "saved":
            return f"{stop.get('signal', 'a signal')}: preemption, the time limit, or a person sent it"
        case "stopped":
            return "a person: " + ("Ctrl-C" if stop.get("signal") == "SIGINT" else str(stop.get("signal")))
        case "finished":
            return "all steps are done"
        case "queued" if facts.job is not None:
            how = stop.get("signal") or "killed"
            return f"{how}; job {facts.job.id} is {facts.job.state} {facts.job.reason}".rstrip()
    return "-"


def _where(facts: RunFacts, status: Status, cause: Failure | None) -> str:
    job = f", Slurm job {status.job} {status.job_state}".rstrip() if status.job else ""
    if cause is None:
        return f"{status.host or '-'}{job}; {facts.path / 'train.log'}"
    files = f"{facts.path}/logs/error_{cause.rank}.json"
    if cause.kind == "hang":
        files += ", stacks_*.txt"
    others = len(facts.failures) - 1
    step = "before the first step" if cause.step is None else f"after step {cause.step:,}"
    more = f" (and {others} that followed)" if others else ""
    return f"rank {cause.rank} on {cause.host}, {step}, {cause.time}{job}; {files}{more}"


def _saved(status: Status) -> str:
    if status.checkpoint is None:
        return "no checkpoint yet: it begins at step 0 again" if status.step else "nothing was trained yet"
    again = max(0, (status.step or 0) - status.checkpoint)
    lost = "no step is lost" if not again else f"{again:,} steps are trained again"
    if status.state in LIVING:
        lost = f"killed now, it would train {again:,} steps again"
    if status.state == "killed":  # the newest steps may not be in the metrics
        lost = "what came after it is trained again"
    return f"checkpoint {_aged(status.checkpoint, status.checkpoint_age_s)}; {lost}"


def _next(status: Status, cause: Failure | None) -> str:
    kind = KINDS.get(cause.kind if cause is not None else status.kind or "")
    if status.state == "failed" and kind is not None:
        return f"a restart {'may help' if kind.restart_may_help else 'would meet it again'}: {kind.remedy}"
    match status.state:
        case "finished":
            return "raise `steps` to go on"
        case "running" | "starting":
            return f"`lingua status {status.path}` follows it"
        case "queued":
            return f"it goes on by itself when Slurm starts job {status.job}"
        case "new":
            return "start it"
    return "start it again: the same command, or the same job, goes on from that checkpoint"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
