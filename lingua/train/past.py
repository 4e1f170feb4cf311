"""Find what `lingua replay` needs: which attempt trained a step, with which config, from which checkpoints.

If a step was trained several times, the newest attempt that trained it counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lingua.checkpoint import layout, lookup, publish
from lingua.config.base import ConfigError
from lingua.config.frozen import CONFIG_FILE
from lingua.report.facts import read_run
from lingua.run.find import find_run
from lingua.run.folder import kept_configs
from lingua.run.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Past:
    """The attempts, reports and checkpoints of a run."""

    run_dir: Path
    root: Path
    """Folder of its checkpoints."""
    newest_attempt: int
    freq: int
    """Steps between lines of the metrics."""
    records: Sequence[Mapping[str, Any]] = ()
    published: Mapping[int, int] = field(default_factory=dict)
    """Step -> the attempt that saved it."""
    ended_at: int = 0
    """Step at which the newest attempt ended, as far as is known."""
    last_words: str = ""
    """Message of the newest attempt's failure."""

    @cached_property
    def by_step(self) -> dict[int, list[Mapping[str, Any]]]:
        """Lines of the metrics by step, ordered by attempt."""
        found: dict[int, list[Mapping[str, Any]]] = {}
        for record in sorted(self.records, key=lambda record: record["incarnation"]):
            found.setdefault(record["global_step"], []).append(record)
        return found

    @property
    def reached(self) -> int:
        """The last step that may have been trained; a step that failed is in neither metrics nor checkpoints."""
        lines = [record["global_step"] + self.freq for record in self.records]
        return max([*lines, *(step + self.freq for step in self.published), self.ended_at + 1, self.freq])

    def attempt_of(self, step: int) -> int:
        """Return the newest attempt that reported a step; if none did, the newest that may have trained it.

        That need not be the attempt whose work counts (`limits_of` in history.py): steps after the checkpoint from
        which a newer attempt resumed do not count.
        """
        if step in self.by_step:
            return self.by_step[step][-1]["incarnation"]
        spans: dict[int, list[int]] = {}
        for record in self.records:
            spans.setdefault(record["incarnation"], []).append(record["global_step"])
        by = [attempt for attempt, at in spans.items() if min(at) - self.freq < step < max(at) + self.freq]
        return max(by, default=self.newest_attempt)

    def reported(self, step: int, attempt: int) -> Mapping[str, Any] | None:
        """Return an attempt's line for a step."""
        return next((record for record in self.by_step.get(step, ()) if record["incarnation"] == attempt), None)

    def on_the_way(self, step: int, attempt: int) -> Mapping[str, Any] | None:
        """Return the line for a step of `attempt`, or of the last earlier attempt that trained the step."""
        return next((r for r in reversed(self.by_step.get(step, ())) if r["incarnation"] <= attempt), None)

    def before(self, step: int, attempt: int) -> list[int]:
        """Return the published steps from which this attempt may have reached `step`, the nearest first."""
        return sorted((s for s, by in self.published.items() if s < step and by <= attempt), reverse=True)

    def config_of(self, attempt: int) -> Path:
        """Return the config of an attempt: config.<n>.yaml belongs to the last attempt before a change."""
        kept = kept_configs(self.run_dir)
        return next((path for number, path in kept.items() if number >= attempt), self.run_dir / CONFIG_FILE)


def read_past(run: Path) -> Past:
    """Read a run folder. Raises RunError if it is not one."""
    run_dir = find_run(run)
    facts = read_run(run_dir)
    lines = read_metrics(run_dir / METRICS_FILE)
    failed = [failure for failure in facts.failures if failure.because_of_rank is None]
    ends = [(facts.stop or {}).get("step"), *(failure.step for failure in failed)]
    logging = facts.config.get("logging")
    freq = logging.get("freq") if isinstance(logging, dict) else None
    return Past(
        run_dir=run_dir,
        root=facts.root,
        newest_attempt=facts.attempt.number if facts.attempt else 1,
        freq=freq if isinstance(freq, int) and freq > 0 else 1,
        records=[line for line in lines if {"global_step", "incarnation"} <= line.keys()],
        published={step: publish.attempt_of(facts.root, step) for step in layout.done_steps(facts.root)},
        ended_at=max([0, *(step for step in ends if isinstance(step, int))]),
        last_words=failed[0].message if failed else "",
    )


def check_step(past: Past, step: int, n_steps: int) -> None:
    """Raise ConfigError for a step that the run does not have or has not reached."""
    if step > n_steps:
        raise ConfigError(f"--step {step}: {past.run_dir} has {n_steps} steps; choose one of them")
    if step > past.reached:
        raise ConfigError(
            f"--step {step}: {past.run_dir} has reached step {past.reached} at most; choose an earlier one"
        )


def nothing_before(past: Past, step: int, attempt: int) -> ConfigError:
    """Return the error for a step without a checkpoint before it."""
    there = lookup.some_steps(sorted(past.published))
    whose = f" that attempt {attempt} can have used" if any(s < step for s in past.published) else ""
    return ConfigError(
        f"--step {step}: no checkpoint before it{whose} is left in {past.root}, which has {there}. --from 0 "
        f"trains {step - 1} steps from the start of the run instead. In future, checkpoint.keep_every or "
        "`lingua fork` keeps the checkpoints that you need"
    )
