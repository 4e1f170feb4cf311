"""A run's past, for those who go back into it: which attempt trained a step, with which config, what it reported, and
the checkpoints that lie before. Torch-free.

Promise: only reads. Where a step was trained several times, the newest attempt that trained it is meant.
Cost: the whole metrics file once.
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
from lingua.files import entries
from lingua.report.facts import find_run, read_run
from lingua.run.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Past:
    """What a run folder remembers."""

    run_dir: Path
    root: Path
    """Of its checkpoints."""
    newest_attempt: int
    freq: int
    """Steps between two lines of the metrics."""
    records: Sequence[Mapping[str, Any]] = ()
    published: Mapping[int, int] = field(default_factory=dict)
    """Step -> the attempt that published it."""
    ended_at: int = 0
    """Updates done when the newest attempt ended, as far as it could tell."""
    last_words: str = ""
    """Of a newest attempt that failed."""

    @cached_property
    def by_step(self) -> dict[int, list[Mapping[str, Any]]]:
        """The lines of each step, in the order of the attempts."""
        found: dict[int, list[Mapping[str, Any]]] = {}
        for record in sorted(self.records, key=lambda record: record["incarnation"]):
            found.setdefault(record["global_step"], []).append(record)
        return found

    @property
    def reached(self) -> int:
        """No later step can have been trained: a last one that went wrong is in no line and in no checkpoint."""
        lines = [record["global_step"] + self.freq for record in self.records]
        return max([*lines, *(step + self.freq for step in self.published), self.ended_at + 1, self.freq])

    def attempt_of(self, step: int) -> int:
        """The attempt that trained a step last.

        That need not be the one whose work counts (`limits_of` in runhistory.py): what came after the checkpoint that a
        newer attempt went back to counts no more, also where that attempt has not come so far yet.

        The newest that reported it; else, lines being `freq` steps apart, the newest that can have come by; else the
        newest.
        """
        if step in self.by_step:
            return self.by_step[step][-1]["incarnation"]
        spans: dict[int, list[int]] = {}
        for record in self.records:
            spans.setdefault(record["incarnation"], []).append(record["global_step"])
        by = [attempt for attempt, at in spans.items() if min(at) - self.freq < step < max(at) + self.freq]
        return max(by, default=self.newest_attempt)

    def reported(self, step: int, attempt: int) -> Mapping[str, Any] | None:
        """What an attempt reported of a step."""
        return next((record for record in self.by_step.get(step, ()) if record["incarnation"] == attempt), None)

    def on_the_way(self, step: int, attempt: int) -> Mapping[str, Any] | None:
        """What was reported of a step by `attempt`, or by the last attempt before it that trained the step."""
        return next((r for r in reversed(self.by_step.get(step, ())) if r["incarnation"] <= attempt), None)

    def before(self, step: int, attempt: int) -> list[int]:
        """Published steps from which this attempt can have come to `step`, the nearest first."""
        return sorted((s for s, by in self.published.items() if s < step and by <= attempt), reverse=True)

    def config_of(self, attempt: int) -> Path:
        """The config that an attempt ran: config.<n>.yaml is kept of the last attempt before a change."""
        kept = [path for path in entries(self.run_dir) if path.match("config.[0-9]*.yaml")]
        numbers = {int(path.name.split(".")[1]): path for path in kept if path.name.split(".")[1].isdecimal()}
        later = [number for number in numbers if number >= attempt]
        return numbers[min(later)] if later else self.run_dir / CONFIG_FILE


def read_past(run: Path) -> Past:
    """Raises RunError where there is no run."""
    run_dir = find_run(run)
    facts, root = read_run(run_dir), lookup.root_of(run_dir)
    lines = read_metrics(run_dir / METRICS_FILE)
    stop, failed = facts.stop or {}, [failure for failure in facts.failures if failure.because_of_rank is None]
    return Past(
        run_dir=run_dir,
        root=root,
        newest_attempt=facts.attempt.number if facts.attempt else 1,
        freq=int((facts.config.get("logging") or {}).get("freq") or 1),
        records=[line for line in lines if {"global_step", "incarnation"} <= line.keys()],
        published={step: publish.incarnation_of(root, step) for step in layout.done_steps(root)},
        ended_at=max([stop.get("step") or 0, *(failure.step or 0 for failure in failed)]),
        last_words=failed[0].message if failed else "",
    )


def check_step(past: Past, step: int, n_steps: int) -> None:
    """Refuse a step that the run has not, or not yet. Raises ConfigError."""
    if step > n_steps:
        raise ConfigError(f"--step {step}: {past.run_dir} has {n_steps} steps; choose one of them")
    if step > past.reached:
        raise ConfigError(
            f"--step {step}: {past.run_dir} has not come so far, at most to step {past.reached}; choose an earlier one"
        )


def nothing_before(past: Past, step: int, attempt: int) -> ConfigError:
    """There is no checkpoint to go to a step from."""
    there = lookup.some_steps(sorted(past.published))
    whose = f" that attempt {attempt} can have come by" if any(s < step for s in past.published) else ""
    return ConfigError(
        f"--step {step}: no checkpoint before it{whose} is left in {past.root}, which has {there}. --from 0 begins "
        f"where the run began and trains {step - 1} steps to get there. For another time: checkpoint.keep_every keeps "
        "milestones for good, and `lingua fork` pins the checkpoint that it goes on from"
    )
