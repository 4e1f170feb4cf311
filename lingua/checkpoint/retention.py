"""Decide which steps are saved and which checkpoints may be deleted: pure functions of the config and of step numbers.

The newest checkpoint and the newest one known to verify are never deleted, and pinned ones stay. A checkpoint outside
both periods (saved when the run was stopped, or at its end) counts as a dump: it goes once `dump.keep` newer
ones exist. Milestones (every `keep_every` steps, and the chosen `steps`) are kept forever.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lingua.config.frozen import read_frozen
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery


def is_due(step: int, args: CheckpointArgs) -> bool:
    """Return whether the config asks for a checkpoint after this step."""
    return kinds(step, args) != ["stop"]


def kinds(step: int, args: CheckpointArgs) -> list[str]:
    """Return why a checkpoint of this step is saved: dump, eval, milestone, or else stop."""
    due = {
        "dump": args.dump.is_due(step),
        "eval": args.eval.is_due(step),
        "milestone": args.is_milestone(step),
    }
    return [kind for kind, is_one in due.items() if is_one] or ["stop"]


def to_delete(
    done: Collection[int], args: CheckpointArgs, *, verified: Collection[int], pinned: Collection[int] = ()
) -> list[int]:
    """Return the published steps to delete, ascending. Call only after a checkpoint was published.

    `done`: every published step; `verified`: those known to be intact (published or checked by this process).
    """
    steps = sorted(done)
    kept = set(pinned) | set(steps[-1:]) | set(sorted(set(verified) & set(steps))[-1:])
    kept.update(step for step in steps if args.is_milestone(step))
    kept.update(_newest([s for s in steps if args.dump.is_due(s) or not args.eval.is_due(s)], args.dump.keep))
    kept.update(_newest([s for s in steps if args.eval.is_due(s)], args.eval.keep))
    return [step for step in steps if step not in kept]


def _newest(steps: list[int], keep: int) -> list[int]:
    return steps if keep <= 0 else steps[-keep:]


def kept_at_once(args: CheckpointArgs, n_steps: int = 0) -> int | None:
    """Return the largest number of checkpoints on the disk at once, with the one being written; None if all are kept.

    Counts the milestones of all `n_steps`.
    """
    if kept_for_good(args, n_steps):
        return None
    used = _used(args, n_steps).values()
    return max(1, sum(period.keep for period in used)) + len(args.milestones(n_steps)) + 1


def kept_for_good(args: CheckpointArgs, n_steps: int = 0) -> list[str]:
    """Return the keys of the periods whose checkpoints are all kept."""
    return [key for key, period in _used(args, n_steps).items() if period.keep <= 0]


def _used(args: CheckpointArgs, n_steps: int) -> dict[str, SaveEvery]:
    """Return the periods that save within `n_steps` (0: a run of any length) by their keys."""
    periods = {"checkpoint.dump": args.dump, "checkpoint.eval": args.eval}
    return {key: one for key, one in periods.items() if 0 < one.every <= (n_steps or one.every)}


def frozen_periods(run_dir: Path) -> tuple[CheckpointArgs, int | None] | None:
    """Read (periods and milestones, number of steps) from a run's frozen config; return None if there is none.

    Raises ConfigError or ValueError.
    """
    config = read_frozen(run_dir)
    if config is None:
        return None
    section = config.get("checkpoint") or {}
    args = CheckpointArgs.model_validate(
        {k: section[k] for k in ("dump", "eval", "keep_every", "steps") if k in section}
    )
    return args, config.get("steps")
