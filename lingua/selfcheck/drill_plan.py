"""`lingua drill`, the decisions: what the run is, what is done to it next, and whether the promises held. Pure.

Promise: a verdict claims nothing that was not seen. What a cluster does not grant (a shared /dev/shm, a long grace, the
right to requeue) is told apart from a promise of ours that was broken: only the latter fails the drill.
Cost: none; `drillrun.py` does the work.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingua.slurm import Limits

LONGEST_PAUSE_S = 8.0
"""Of training between two blows, at most."""
EVERY = 20
"""Steps between two checkpoints of the run."""
N_STEPS = 1_000_000
"""More than a drill trains."""
SOURCE = "words"

SAVING = ("TERM", "USR2")
"""Blows after which nothing may be lost: nobody kills the run."""


# -- the run -------------------------------------------------------------------------------------------------------


def run_config(folder: Path, name: str, n_steps: int, minutes: float) -> dict[str, Any]:
    """The config of a run of the drill. Its rate of learning depends on no number of steps: so runs can be compared."""
    return {
        "name": name,
        "dump_dir": str(folder / name),
        "steps": n_steps,
        "seed": 1,
        "deterministic": True,
        "sample_prompt": None,
        "model": {"dim": 64, "n_layers": 2, "n_heads": 2},
        "data": {
            "root_dir": str(folder / "data"),
            "sources": {SOURCE: 1.0},
            "tokenizer": {"name": "bytes"},
            "seq_len": 64,
            "batch_size": 2,
        },
        "optim": {"lr": 1.0e-3, "warmup": 10, "scheduler": "constant"},
        "distributed": {"model_dtype": "fp32"},
        "checkpoint": {"dump": {"every": EVERY, "keep": 3}, "async_save_mode": "shm"},
        "logging": {"freq": 1},
        "launcher": {"gpus": 1, "cpus_per_gpu": 2, "mem": "8G", "time": str(int(minutes) + 30), "max_retries": 1000},
    }


def text_lines(seed: int = 1, n_lines: int = 4000) -> Iterator[dict[str, str]]:
    """Synthetic documents: sentences of made-up words, the same for the same seed. About 1 MB."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(500)]
    for _ in range(n_lines):
        yield {"text": " ".join(rng.choices(words, k=rng.randint(20, 60)))}


# -- what is done to it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blow:
    """What is done to the run next."""

    kind: str
    after_s: float
    """Seconds of training before it."""


def blows(kinds: Sequence[str], seed: int) -> Iterator[Blow]:
    """Endless and at random, but each kind once before any comes again."""
    rng = random.Random(seed)
    while True:
        for kind in rng.sample(list(kinds), len(kinds)):
            yield Blow(kind, rng.uniform(0.5, LONGEST_PAUSE_S))


# -- the verdict ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Struck:
    """A blow and what came of it."""

    kind: str
    step: int
    """Of the newest metrics at that moment."""
    saved: int | None = None
    """The newest checkpoint that this start has published. None: none ever was."""
    safe_s: float | None = None
    """From the blow until that was published, by the clock of the run folder's disk; None: it was there before."""
    back_s: float | None = None
    """From the blow until the run trained again. None: it did not."""
    refused: str = ""
    """The cluster's words, where the user may not do this."""
    ended: str = ""
    """The last words of the job, where the run came back only because the drill submitted it again."""


@dataclass(frozen=True)
class Facts:
    """What a drill has seen."""

    struck: Sequence[Struck] = ()
    published: frozenset[int] = frozenset()
    """Steps that were published at some time."""
    lost: Mapping[int, str] | None = None
    """Published steps that went away although nothing newer was there, or do not verify: step -> how."""
    last_step: int = 0
    """The newest checkpoint at the end."""
    holes: Sequence[int] = ()
    """Steps up to that one that no start trained."""
    differences: Sequence[str] | None = None
    """To the undisturbed run, at the last checkpoint and in the losses. None: there was none to compare with."""
    uncompared: str = ""
    """Why there was none."""
    stayed_away: bool | None = None
    """Whether the cancelled job stayed cancelled. None: it was not seen."""
    private_shm: str = ""
    """The run's warning."""
    not_requeued: str = ""
    """Why Slurm did not take back a job that asked for it. Empty: it did, or there is no Slurm."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Verdict:
    """Which promises were broken, and what this cluster does not grant."""

    broken: list[str]
    limits: list[str]

    @property
    def kept(self) -> bool:
        return not self.broken


def judge(facts: Facts) -> Verdict:
    """The verdict on what was seen."""
    return Verdict([*_broken(facts)], [*_limits(facts)])


def _broken(facts: Facts) -> Iterator[str]:
    done = [blow for blow in facts.struck if not blow.refused]
    if not done:
        yield "nothing was proved: no blow fell on a run that trained; give it more minutes"
    for blow in done:
        if blow.back_s is None:
            yield f"after {blow.kind} at step {blow.step} the run did not train again"
        if blow.ended:
            yield f"after {blow.kind} at step {blow.step} the job did not go back into the queue: {blow.ended}"
        if blow.kind in SAVING and (blow.saved is None or blow.saved < blow.step):
            yield f"{blow.kind} at step {blow.step} was not answered by a checkpoint; the newest is {blow.saved}"
    for step, how in (facts.lost or {}).items():
        yield f"checkpoint {step} was published and is lost: {how}"
    if facts.holes:
        yield f"{len(facts.holes)} steps were never trained, {facts.holes[0]} the first of them"
    if facts.differences is None:
        yield f"not compared with an undisturbed run: {facts.uncompared or 'there is no checkpoint'}"
    for difference in facts.differences or ():
        yield f"not equal to the undisturbed run: {difference}"
    if facts.stayed_away is False:
        yield "the job was cancelled and came back"


def _limits(facts: Facts) -> Iterator[str]:
    slowest_s = max(seconds_to_safe(facts.struck), default=0.0)
    limits = facts.limits
    if facts.private_shm:
        yield f"/dev/shm is not shared or is cleared: {facts.private_shm}"
    if facts.not_requeued:
        yield (
            "a job may not requeue itself here: submit the same script again, it goes on where it was "
            f"({facts.not_requeued})"
        )
    if limits.grace_s is not None and limits.preempt_mode not in ("", "OFF") and limits.grace_s <= slowest_s:
        yield (
            f"a preempted job has {limits.grace_s:.0f} s (GraceTime) and a save took up to {slowest_s:.1f} s: what was "
            "trained since the last checkpoint may be lost; lower checkpoint.dump.every"
        )
    if limits.preempt_mode == "CANCEL":
        yield "a preempted job is cancelled here (PreemptMode=CANCEL); it comes back if it saves within its grace"
    if limits.kill_wait_s is not None and limits.kill_wait_s <= slowest_s:
        yield (
            f"scancel and scontrol requeue leave {limits.kill_wait_s:.0f} s (KillWait) and a save took up to "
            f"{slowest_s:.1f} s: a run cancelled that way may lose what it trained since its last checkpoint"
        )
    for kind in sorted({blow.kind for blow in facts.struck if blow.refused}):
        words = next(blow.refused for blow in facts.struck if blow.kind == kind and blow.refused)
        yield f"{kind} was refused: {words}"


def seconds_to_safe(struck: Sequence[Struck]) -> list[float]:
    """Of the blows that a run can answer by saving."""
    return [blow.safe_s for blow in struck if blow.kind in SAVING and blow.safe_s is not None]


def report(facts: Facts, verdict: Verdict) -> dict[str, Any]:
    """What `--json` prints, and people are shown as lines."""
    safe_s = seconds_to_safe(facts.struck)
    back_s = [blow.back_s for blow in facts.struck if blow.back_s is not None]
    counts = {kind: sum(b.kind == kind for b in facts.struck) for kind in sorted({b.kind for b in facts.struck})}
    return {
        "kept": verdict.kept,
        "blows": counts,
        "steps": facts.last_step,
        "checkpoints_published": len(facts.published),
        "checkpoints_lost": len(facts.lost or {}),
        "bitwise_equal": None if facts.differences is None else not facts.differences,
        "signal_to_safe_median_s": statistics.median(safe_s) if safe_s else None,
        "signal_to_safe_max_s": max(safe_s, default=None),
        "back_median_s": statistics.median(back_s) if back_s else None,
        "back_max_s": max(back_s, default=None),
        "broken": verdict.broken,
        "not_granted_here": verdict.limits,
    }
