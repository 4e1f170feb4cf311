"""What may be deleted: a pure function of numbers, asked only after a checkpoint has been published.

Promise: the newest checkpoint and the newest one known to verify are never given up, and what is pinned stays.
A checkpoint outside both rhythms (a stop's, the last one's) counts as a dump: it goes once `dump.keep` newer ones
exist. Milestones (every `keep_every` steps, 0: none) are kept for good.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lingua.checkpoint import retention
from lingua.config.frozen import read_frozen
from lingua.config.keys.checkpoint import CheckpointArgs


@dataclass(frozen=True)
class Rhythm:
    """Every how many steps, and how many of the newest to keep. `every` <= 0: never; `keep` <= 0: all."""

    every: int
    keep: int

    def holds(self, step: int) -> bool:
        return self.every > 0 and step > 0 and step % self.every == 0


def is_milestone(step: int, keep_every: int) -> bool:
    return Rhythm(keep_every, 0).holds(step)


def is_due(step: int, dump: Rhythm, evaluation: Rhythm, keep_every: int = 0) -> bool:
    """Whether a checkpoint is to be made after this step."""
    return dump.holds(step) or evaluation.holds(step) or is_milestone(step, keep_every)


def _newest(steps: list[int], keep: int) -> list[int]:
    return steps if keep <= 0 else steps[-keep:]


def to_delete(
    done: Collection[int],
    dump: Rhythm,
    evaluation: Rhythm,
    *,
    verified: Collection[int],
    pinned: Collection[int] = (),
    keep_every: int = 0,
) -> list[int]:
    """Published steps that nobody needs any more, ascending.

    `done`: every published step; `verified`: those known to be intact (published or checked by this process).
    """
    steps = sorted(done)
    kept = set(pinned) | set(steps[-1:]) | set(sorted(set(verified) & set(steps))[-1:])
    kept.update(step for step in steps if is_milestone(step, keep_every))
    kept.update(_newest([s for s in steps if dump.holds(s) or not evaluation.holds(s)], dump.keep))
    kept.update(_newest([s for s in steps if evaluation.holds(s)], evaluation.keep))
    return [step for step in steps if step not in kept]


def kept_at_once(dump: Rhythm, evaluation: Rhythm, keep_every: int = 0, n_steps: int = 0) -> int | None:
    """Checkpoints on the disk at the worst moment: all that are kept and the one being written. None: unbounded.

    With `keep_every`, the milestones of all `n_steps` are counted.
    """
    used = [rhythm for rhythm in (dump, evaluation) if rhythm.every > 0]
    if any(rhythm.keep <= 0 for rhythm in used):
        return None
    milestones = n_steps // keep_every if keep_every > 0 else 0
    return max(1, sum(rhythm.keep for rhythm in used)) + milestones + 1


@dataclass(frozen=True)
class Periods:
    """When a run saves and what it keeps."""

    dump: retention.Rhythm
    evaluation: retention.Rhythm
    keep_every: int
    n_steps: int | None

    def kinds(self, step: int) -> list[str]:
        holds = {
            "dump": self.dump.holds(step),
            "eval": self.evaluation.holds(step),
            "milestone": retention.is_milestone(step, self.keep_every),
        }
        return [kind for kind, is_one in holds.items() if is_one] or ["stop"]


def periods_of(run_dir: Path) -> Periods | None:
    """The periods of a run's frozen config; None where there is none. Raises ConfigError or ValueError."""
    config = read_frozen(run_dir)
    if config is None:
        return None
    section = config.get("checkpoint") or {}
    args = CheckpointArgs.model_validate({k: section[k] for k in ("dump", "eval", "keep_every") if k in section})
    dump, evaluation = (retention.Rhythm(period.every, period.keep) for period in (args.dump, args.eval))
    return Periods(dump, evaluation, args.keep_every, config.get("steps"))
