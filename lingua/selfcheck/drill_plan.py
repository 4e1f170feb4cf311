"""Decisions of `lingua drill`: the run's config, the next fault, whether the promises held. Pure functions.

What a cluster does not grant (a shared /dev/shm, a long grace period, the right to requeue) is reported separately from
broken promises; only the latter fail the drill.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingua.scheduler import Limits

LONGEST_PAUSE_S = 8.0
"""Maximum seconds of training between faults."""
EVERY = 20
"""Steps between checkpoints of the run."""
N_STEPS = 1_000_000
"""More steps than a drill trains."""
SOURCE = "words"

SAVING = ("TERM", "USR2")
"""Faults after which nothing may be lost, since the run is not killed."""


# -- the run -------------------------------------------------------------------------------------------------------


def run_config(folder: Path, name: str, n_steps: int, minutes: float) -> dict[str, Any]:
    """Return the config of a run. Its learning rate does not depend on `n_steps`, so runs can be compared."""
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
    """Yield documents of made-up words, about 1 MB; the same for the same seed."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(500)]
    for _ in range(n_lines):
        yield {"text": " ".join(rng.choices(words, k=rng.randint(20, 60)))}


# -- faults --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A fault to inject into the run."""

    kind: str
    after_s: float
    """Seconds of training before it."""


def faults(kinds: Sequence[str], seed: int) -> Iterator[Fault]:
    """Yield random faults endlessly; each kind comes once before any is repeated."""
    rng = random.Random(seed)
    while True:
        for kind in rng.sample(list(kinds), len(kinds)):
            yield Fault(kind, rng.uniform(0.5, LONGEST_PAUSE_S))


@dataclass(frozen=True)
class Injected:
    """A fault and its outcome."""

    kind: str
    step: int
    """Step of the newest metrics at that moment."""
    saved: int | None = None
    """The newest checkpoint that the attempt published, if any."""
    safe_s: float | None = None
    """Seconds until it was published, by the clock of the run folder's disk. None: it was published before."""
    back_s: float | None = None
    """Seconds until the run trained again. None: it did not."""
    refused: str = ""
    """Slurm's message, if the user may not do this."""
    ended: str = ""
    """The last log line of the job, if the run came back only because the drill submitted it again."""


@dataclass(frozen=True)
class Seen:
    """The observations of a drill."""

    injected: Sequence[Injected] = ()
    published: frozenset[int] = frozenset()
    """Steps that were ever published."""
    lost: Mapping[int, str] | None = None
    """Published steps that disappeared without a newer one, or do not verify: step -> how."""
    last_step: int = 0
    """The newest checkpoint at the end."""
    holes: Sequence[int] = ()
    """Steps up to `last_step` that no attempt trained."""
    differences: Sequence[str] | None = None
    """Differences from the undisturbed run in the last checkpoint and the losses. None: there was no such run."""
    uncompared: str = ""
    """Why there was none."""
    stayed_away: bool | None = None
    """Whether the cancelled job stayed cancelled. None: not observed."""
    private_shm: str = ""
    """The run's warning about its /dev/shm."""
    not_requeued: str = ""
    """Why Slurm did not requeue a job that asked for it. Empty: it did, or there is no Slurm."""
    limits: Limits = field(default_factory=Limits)


# -- judgment ------------------------------------------------------------------------------------------------------


def broken(seen: Seen) -> Iterator[str]:
    """Yield the broken promises, one sentence each."""
    done = [fault for fault in seen.injected if not fault.refused]
    if not done:
        yield "nothing was proved: no fault was injected while the run was training; give it more minutes"
    for fault in done:
        what = f"{fault.kind} at step {fault.step}"
        if fault.back_s is None:
            yield f"after {what} the run did not train again"
        if fault.ended:
            yield f"after {what} the job did not go back into the queue: {fault.ended}"
        if fault.kind in SAVING and (fault.saved is None or fault.saved < fault.step):
            yield f"{what} was not answered by a checkpoint; the newest is {fault.saved}"
    for step, how in (seen.lost or {}).items():
        yield f"checkpoint {step} was published and is lost: {how}"
    if seen.holes:
        yield f"{len(seen.holes)} steps were never trained, the first is {seen.holes[0]}"
    if seen.differences is None:
        yield f"not compared with an undisturbed run: {seen.uncompared or 'there is no checkpoint'}"
    for difference in seen.differences or ():
        yield f"not equal to the undisturbed run: {difference}"
    if seen.stayed_away is False:
        yield "the job was cancelled and came back"


def not_granted(seen: Seen) -> Iterator[str]:
    """Yield what the cluster does not grant, one sentence each."""
    if seen.private_shm:
        yield f"/dev/shm is not shared or is cleared: {seen.private_shm}"
    if seen.not_requeued:
        yield f"a job may not requeue itself here: submit the same script again to resume ({seen.not_requeued})"
    yield from seen.limits.missing(max(_seconds_to_safe(seen), default=0.0))
    for kind, words in sorted({fault.kind: fault.refused for fault in seen.injected if fault.refused}.items()):
        yield f"{kind} was refused: {words}"


def _seconds_to_safe(seen: Seen) -> list[float]:
    """Return the durations of saves after faults that leave the run time to save."""
    return [fault.safe_s for fault in seen.injected if fault.kind in SAVING and fault.safe_s is not None]


def report(seen: Seen) -> dict[str, Any]:
    """Return the report that `--json` prints; without it, it is printed as lines."""
    safe_s, back_s = _seconds_to_safe(seen), [fault.back_s for fault in seen.injected if fault.back_s is not None]
    problems = list(broken(seen))
    return {
        "kept": not problems,
        "blows": dict(sorted(Counter(fault.kind for fault in seen.injected).items())),
        "steps": seen.last_step,
        "checkpoints_published": len(seen.published),
        "checkpoints_lost": len(seen.lost or {}),
        "bitwise_equal": None if seen.differences is None else not seen.differences,
        "signal_to_safe_median_s": statistics.median(safe_s) if safe_s else None,
        "signal_to_safe_max_s": max(safe_s, default=None),
        "back_median_s": statistics.median(back_s) if back_s else None,
        "back_max_s": max(back_s, default=None),
        "broken": problems,
        "not_granted_here": list(not_granted(seen)),
    }
