"""What the earlier starts of a run leave to the next one, and whether its config is bound by them. Torch-free.

Promise: only reads. A run is bound to its config as soon as a checkpoint depends on it: one that the next start would
go on from, on the disk or still in this machine's memory. Before that the next start begins at step 0 again, so that a
mistake of the first one is no reason to refuse its correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingua.checkpoint.lookup import is_resumable, root_of
from lingua.checkpoint.shm.slots import SHM
from lingua.config.frozen import Difference, read_frozen
from lingua.report.facts import json_object_in, last_line
from lingua.run.folder import STOP_FILE
from lingua.run.metrics import CHECKPOINT_FILE


@dataclass(frozen=True)
class Earlier:
    """The starts of a run so far."""

    config: Mapping[str, Any] | None = None
    """The frozen config; None before the first start."""
    is_bound: bool = False
    """Whether the next start would go on from a checkpoint."""
    has_begun: bool = False
    """Whether a start came as far as its first step."""
    ended_by: str = ""
    """Kind of the failure that ended the newest start; empty if it did not fail."""

    def allows(self, difference: Difference) -> bool:
        """Return whether a change is the remedy that the newest start named when it ended."""
        lowered = difference.key == "optim.lr" and difference.new < difference.old
        return self.ended_by == "nan" and lowered


def read_earlier(run_dir: Path, root: Path | None = None) -> Earlier:
    """Read a run folder. `root`: where the next start looks for checkpoints, if not where the last one did."""
    config = read_frozen(run_dir)
    if config is None:
        return Earlier()
    roots = {root_of(run_dir), *([root] if root is not None else [])}
    shm = Path((config.get("checkpoint") or {}).get("shm_path") or SHM)
    return Earlier(
        config=config,
        is_bound=is_resumable(run_dir, *roots, shm=shm),
        has_begun=last_line(run_dir / CHECKPOINT_FILE) is not None,
        ended_by=str((json_object_in(run_dir / STOP_FILE) or {}).get("kind", "")),
    )
