"""Take a run back to the checkpoint before a step that went wrong, and skip the rows of that step.

A rewind depends only on the exact state: losses that all ranks know, and the rows skipped so far, both part of each
checkpoint. So nothing needs to be written at the moment of a rewind. A run that is killed in the middle resumes from a
checkpoint before the step, sees the same loss and decides the same. From whichever checkpoint it resumes, the run goes
on as if `data.skip_rows` had named these rows from the beginning.
"""

from __future__ import annotations

import logging

from lingua.data.loader import PASSED, rows_ahead, saved_state
from lingua.data.pack import merged
from lingua.distributed.parallelize import reshard
from lingua.train.build import enter, fresh_shared, pass_over
from lingua.train.learner import Run
from lingua.train.monitor import NonFiniteError, RewindAsked

log = logging.getLogger(__name__)


def rewind(run: Run, asked: RewindAsked) -> None:
    """Restore the newest checkpoint before the step that went wrong, and skip its rows from now on. Collective.

    Raises NonFiniteError if there is no such checkpoint, or after too many rewinds.
    """
    args, live = run.args.optim.rewind, run.shared
    passed = live.get(PASSED, [])
    lately = [one["step"] for one in passed if one["step"] > asked.step - args.limit_steps]
    if len(lately) >= args.limit:
        story = "; ".join(one["why"] for one in passed[-args.limit :])
        text = f"optim.rewind.limit is {args.limit} within {args.limit_steps} steps, and the run went back from {story}"
        raise NonFiniteError(f"{asked.why}. {text}")
    reshard(run.model)
    if run.manager.rewind(asked.step, run.state) is None:
        raise NonFiniteError(f"{asked.why}, and there is no checkpoint before it to go back to; save more often")
    data, size = saved_state(run.state.per_rank_all), run.size
    first = live.get("first_row", 0) + run.phase.row_shift + (asked.step - 1) * size.rows_per_step
    turns = range(first, first + args.steps * size.rows_per_step)
    rows = merged([(row, row) for row in rows_ahead(data, run.args.data.skip_rows, turns)])
    entry = {"step": asked.step, "rows": [list(span) for span in rows], "why": asked.why}
    changes = {"tracking_id": live["tracking_id"], PASSED: [*passed, entry]}
    run.state.shared = fresh_shared() | run.state.shared | changes
    pass_over(run.phases, run.shared)
    enter(run, data, run.manager)
    where = f"step {run.step}{f' (phase {run.phase.name})' if run.phase.written else ''}"
    log.warning("%s. Back to %s; rows %s are passed over", asked.why, where, entry["rows"])
