"""Read what earlier attempts of a run left, and whether they bind its config.

A run is bound to its config as soon as the next attempt would resume from a checkpoint, on disk or in this machine's
memory. Before that, the next attempt begins at step 0, so a wrong config may be corrected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lingua.checkpoint.layout import done_steps, folder, train_state_file
from lingua.checkpoint.lookup import is_resumable, root_of
from lingua.checkpoint.shm.area import SHM
from lingua.config.frozen import Difference, read_frozen
from lingua.config.keys.optim import OptimArgs
from lingua.files import json_object_in
from lingua.optim.schedule import rates_of_longer
from lingua.run.folder import STOP_FILE
from lingua.run.lock import run_in
from lingua.run.metrics import CHECKPOINT_FILE, last_line
from lingua.run.place import why_not_ours


@dataclass(frozen=True)
class Earlier:
    """The attempts of a run so far."""

    config: Mapping[str, Any] | None = None
    """The frozen config, or None before the first attempt."""
    is_bound: bool = False
    """The next attempt would resume from a checkpoint."""
    has_begun: bool = False
    """An attempt reached its first step."""
    why_not_there: str | None = None
    """Why the next attempt must not keep its checkpoints where the config says, or None if it may."""
    step: int | None = None
    """Of the newest published checkpoint."""
    schedule_begin: int = 0
    """Step from which its learning rate schedule counts."""
    ended_by: str = ""
    """Kind of the failure that ended the newest attempt; empty if it did not fail."""

    def allows(self, difference: Difference) -> bool:
        """Return whether a change is the remedy that the newest attempt suggested when it failed."""
        lowered = difference.key == "optim.lr" and difference.new < difference.old
        return self.ended_by == "nan" and lowered

    def with_rates(self, difference: Difference, optim: OptimArgs) -> Difference:
        """Require permission for a new length that raises the learning rate at the point where the run resumes."""
        lengths = difference.old, difference.new
        if difference.key != "steps" or self.step is None or not all(isinstance(n, int) for n in lengths):
            return difference
        begin = self.schedule_begin
        rates = rates_of_longer(optim, self.step - begin, lengths[0] - begin, lengths[1] - begin)
        if rates is None:
            return difference
        effect = f"raises the learning rate of step {self.step + 1:,} from {rates[0]:.3g} to {rates[1]:.3g}"
        return replace(difference, rule="accept", effect=effect)


def read_earlier(run_dir: Path, root: Path | None = None) -> Earlier:
    """Read a run folder. `root`: where the next attempt looks for checkpoints, if that differs from the last one's."""
    config = read_frozen(run_dir)
    why_not_there = None if root is None else why_not_ours(root, run_in(run_dir))
    if config is None:
        return Earlier(why_not_there=why_not_there)
    roots = {root_of(run_dir), *([root] if root is not None else [])}
    step, root_of_it = max(((done[-1], each) for each in roots if (done := done_steps(each))), default=(None, run_dir))
    state = None if step is None else json_object_in(folder(root_of_it, step) / train_state_file(0))
    shared = (state or {}).get("shared")
    begin = shared.get("schedule_begin") if isinstance(shared, dict) else None
    shm = Path((config.get("checkpoint") or {}).get("shm_path") or SHM)
    return Earlier(
        config=config,
        is_bound=is_resumable(run_dir, *roots, shm=shm),
        has_begun=last_line(run_dir / CHECKPOINT_FILE) is not None,
        why_not_there=why_not_there,
        step=step,
        schedule_begin=begin if isinstance(begin, int) else 0,
        ended_by=str((json_object_in(run_dir / STOP_FILE) or {}).get("kind", "")),
    )
