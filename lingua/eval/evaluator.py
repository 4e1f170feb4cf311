"""Evaluate each published checkpoint that is due exactly once. Torch-free.

Any number of evaluators may work at once, and each may be killed anywhere: `evals/<step>/results.json` appears as a
whole, then one line in `metrics.eval.jsonl`. A failed evaluation is retried at growing intervals, and finally given up
with the reason in `evals/<step>/failed.json`. Evaluations, waits, claims and pins all have time limits.

There is no work queue: a restart reads the folders again. Evaluators coordinate with the lock that runs use too, one
per step's folder:

    evals/follow.json                            retention waits for the evaluations of this run
    evals/0000001000/incarnations/0000000001.json    attempt 1: owner and heartbeat
                     try-0001.json                   how it ended, unless it was killed or succeeded
                     results.json | failed.json      the verdict, with the attempt that saved the checkpoint
                     start-3/results.json            results for the checkpoint that attempt 3 saved: from a Slurm job,
                                                     or from training before its publication; adopted later
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from lingua.checkpoint import layout, publish
from lingua.checkpoint.lookup import Checkpoint, run_root
from lingua.checkpoint.pins import Follower, follow, pinned, verdict
from lingua.checkpoint.retention import frozen_periods
from lingua.config.base import ConfigError
from lingua.config.keys.checkpoint import SaveEvery
from lingua.config.keys.eval import EvalArgs
from lingua.eval.plan import MAX_KILLED, Candidate, Decision, EvalAttempt, RunState, decide, is_due
from lingua.files import DISK, Files, RunError, make_folders, read_json, write_json
from lingua.run.folder import EXIT_FINISHED, EXIT_REQUEUE, STOP_FILE
from lingua.run.lock import OccupiedError, Owner, RunLock, attempt_files, living_attempt, newest_attempt, this_process
from lingua.run.metrics import EVAL_FILE, JsonLines, read_metrics

log = logging.getLogger(__name__)

LEASE_S = 3600.0
"""Lease on the checkpoint that is being evaluated; renewed during the evaluation."""
LOOK_S = 10.0
"""Interval at which an evaluation checks that it still holds its lock."""
FOLLOWER_S = 600.0
"""Interval at which an evaluator renews follow.json."""

# -- files ---------------------------------------------------------------------------------------------------------


def attempt_file(folder: Path, number: int) -> Path:
    return folder / f"try-{number:04d}.json"


def read_attempts(folder: Path, me: Owner, now: Callable[[], float]) -> tuple[EvalAttempt, ...]:
    """Return the attempts at the evaluation of one step, in order."""
    alive = living_attempt(folder, me, now)
    attempts: list[EvalAttempt] = []
    for number, path in attempt_files(folder).items():
        if (ended := attempt_file(folder, number)).is_file():
            record = read_json(ended)
            attempts.append(EvalAttempt(record["end"], float(record["at_s"]), record["why"]))
        elif alive is not None and number == alive.number:
            attempts.append(EvalAttempt("running", now()))
        else:
            attempts.append(EvalAttempt("killed", path.stat().st_mtime))
    return tuple(attempts)


def logged_evaluations(file: Path) -> set[tuple[int, int]]:
    """Return (step, attempt that saved the checkpoint) of each line of a metrics.eval.jsonl."""
    return {(r["global_step"], r.get("incarnation", 0)) for r in read_metrics(file) if "global_step" in r}


def read_run_state(run_dir: Path, newest_mark_s: float, me: Owner, now: Callable[[], float]) -> RunState:
    """Read the state of the run. `newest_mark_s`: time of the newest publication, or of the evaluator's start."""
    newest = newest_attempt(run_dir)
    if newest is not None and newest.is_alive(me, now()):
        return RunState(has_ended=False, finished=False, silent_s=0.0)
    seen_s, exit_code = newest_mark_s, EXIT_REQUEUE
    with suppress(FileNotFoundError):
        exit_code = read_json(run_dir / STOP_FILE).get("exit_code", EXIT_REQUEUE)
        seen_s = max(seen_s, (run_dir / STOP_FILE).stat().st_mtime)
    if newest is not None:
        seen_s = max(seen_s, newest.beat_s)
    return RunState(exit_code != EXIT_REQUEUE, exit_code == EXIT_FINISHED, max(0.0, now() - seen_s))


def write_results(folder: Path, facts: Mapping[str, Any], found: Mapping[str, Any], *, files: Files = DISK) -> None:
    """Write samples.json (all questions and answers), then results.json. Raises OSError."""
    metrics = {name: value for name, value in found.items() if name not in ("details", "samples")}
    if found.get("samples"):
        write_json(folder / layout.SAMPLES, found["samples"], files=files)
    write_json(folder / layout.RESULTS, {**facts, "details": found.get("details", {}), "metrics": metrics}, files=files)


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return (facts, found) as written, or None if there are no results. Raises OSError or RunError."""
    try:
        facts: dict[str, Any] = read_json(folder / layout.RESULTS)
    except FileNotFoundError:
        return None
    samples = folder / layout.SAMPLES
    more = {"details": facts.pop("details"), "samples": read_json(samples) if samples.is_file() else {}}
    return facts, {**facts.pop("metrics"), **more}


# -- the evaluator -------------------------------------------------------------------------------------------------

Beat = Callable[[], None]
"""Called between batches; raises if the evaluation must end."""
MeasureCheckpoint = Callable[[Checkpoint, Beat], Mapping[str, Any]]
"""Returns metrics by name, and more to keep under "details" and "samples"."""


class Stopped(Exception):  # noqa: N818 - not an error
    """This evaluator was asked to stop."""


class LostError(RunError):
    """Another evaluator has taken over this evaluation, or the run went back to before this step."""


class Evaluator:
    """One evaluator of a run. `follow` works until nothing is left to do; `tick` takes one action."""

    def __init__(
        self,
        run_dir: Path,
        args: EvalArgs,
        measure: MeasureCheckpoint,
        *,
        on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
        stopping: Callable[[], bool] = lambda: False,
        max_killed: int = MAX_KILLED,
        me: Owner | None = None,
        files: Files = DISK,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`on_record` gets each line of metrics.eval.jsonl. Raises RunError or ConfigError if this is not a run."""
        self.run_dir = run_dir
        self.root = run_root(run_dir)
        self._args = args
        self._measure, self._on_record, self._stopping = measure, on_record, stopping
        self._max_killed = max_killed
        self._me = me or this_process()
        self._files, self._now, self._sleep = files, now, sleep
        self._period, self._n_steps = self._read_period()
        self._metrics_file = Path(args.metric_log_dir or run_dir) / EVAL_FILE
        self._came_s = now()
        self._renewed_s = float("-inf")
        self._overdue: set[int] = set()
        self._running: tuple[int, int] | None = None
        """(step, number) of the running attempt."""

    def _read_period(self) -> tuple[SaveEvery, int | None]:
        """Return (checkpoint.eval, n_steps). Called each time, since a later attempt of the run may change them."""
        found = frozen_periods(self.run_dir)
        if found is None:
            raise ConfigError(f"{self.run_dir} has no config.yaml, which says what to evaluate; start the run first")
        return found[0].eval, found[1]

    def follow(self, *, once: bool = False) -> str:
        """Evaluate until the run has ended, or with `once` until nothing is due; return why it stopped."""
        before: Decision | None = None
        while True:
            decision = self.tick()
            if decision.act == "end" or (once and decision.act == "wait"):
                return decision.why or "nothing is left to evaluate"
            if self._stopping():
                return "asked to stop"
            if decision.act == "wait" or decision == before:  # do not retry in a loop on a disk that refuses
                self._sleep(self._args.poll_s)
            before = decision

    def catch_up(self, *, measuring: bool = True) -> None:
        """Do everything that is due now, without waiting; without `measuring` only what needs no model."""
        before: Decision | None = None
        while not self._stopping():
            decision = self.tick(measuring=measuring)
            if decision.act in ("wait", "end") or decision == before:
                return
            before = decision

    def tick(self, *, measuring: bool = True) -> Decision:
        """Read the folders, decide, and take one action. A disk error is logged and the action retried later."""
        try:
            self._renew_follower()
            decision = self._decide()
            if decision.act == "evaluate" and not measuring:
                return Decision("wait")
            if decision.act not in ("wait", "end"):
                self._do(decision)
        except OccupiedError as error:  # another evaluator was faster
            log.info("%s", error)
            return Decision("wait")
        except (OSError, RunError) as error:
            log.error("the evaluator of %s cannot continue for now: %s", self.run_dir, error)
            return Decision("wait")
        return decision

    def _renew_follower(self) -> None:
        if self._now() - self._renewed_s >= FOLLOWER_S:
            follower = Follower(self._period.every, 3600 * self._args.max_pinned_hours, self._now())
            follow(self.run_dir, follower, files=self._files)
            self._renewed_s = self._now()

    # -- reading ---------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Return all published checkpoints that are due, ascending."""
        due = [step for step in layout.done_steps(self.root) if is_due(step, self._period, self._n_steps)]
        logged = logged_evaluations(self._metrics_file)
        return [found for step in due if (found := self._candidate(step, logged)) is not None]

    def _candidate(self, step: int, logged: Collection[tuple[int, int]]) -> Candidate | None:
        """Return the candidate, or None if retention has deleted it meanwhile."""
        try:
            published_at_s = layout.done_mark(self.root, step).stat().st_mtime
        except FileNotFoundError:
            return None
        facts = publish.mark_facts(self.root, step)
        saved_by: int = facts.get("incarnation", 0)
        return Candidate(
            step,
            float(facts.get("created_at", published_at_s)),
            verdict(self.run_dir, self.root, step),
            (step, saved_by) in logged,
            read_attempts(layout.evaluation(self.run_dir, step), self._me, self._now),
            (layout.found(self.run_dir, step, saved_by) / layout.RESULTS).is_file(),
        )

    def _decide(self) -> Decision:
        self._period, self._n_steps = self._read_period()
        candidates = self.candidates()
        self._report_overdue(candidates)
        seen_s = max([self._came_s, *(one.published_at_s for one in candidates)])
        run = read_run_state(self.run_dir, seen_s, self._me, self._now)
        return decide(candidates, run, self._args, self._now(), self._max_killed)

    def _report_overdue(self, candidates: Iterable[Candidate]) -> None:
        """Log each checkpoint that has waited too long, once."""
        hours = self._args.max_pinned_hours
        for one in candidates:
            is_late = one.verdict is None and self._now() - one.published_at_s > 3600 * hours
            if is_late and one.step not in self._overdue:
                self._overdue.add(one.step)
                log.error(
                    "CHECKPOINT %d HAS WAITED FOR ITS EVALUATION FOR MORE THAN %g h (eval.max_pinned_hours): retention "
                    "may delete it now", one.step, hours,
                )  # fmt: skip

    # -- acting ----------------------------------------------------------------------------------------------------

    def _do(self, decision: Decision) -> None:
        """Lock the step's folder and carry out the decision, if it still applies."""
        step = decision.step
        with self._claim(step) as lock:
            there = self._candidate(step, logged_evaluations(self._metrics_file))
            if there is None or not there.is_owed:
                return
            if decision.act == "record" and there.verdict is not None:
                self._record(step)
            elif there.verdict is not None:
                return
            elif decision.act == "adopt" and there.is_found:
                self._adopt(step)
            elif decision.act == "give_up":
                self._give_up(step, decision.why)
            elif decision.act == "evaluate":
                self._evaluate(step, lock)

    def _claim(self, step: int) -> RunLock:
        return RunLock(layout.evaluation(self.run_dir, step), self._me, doing="evaluated", sleep=self._sleep)

    def abandon(self) -> None:
        """Record that the running attempt was stopped and did not fail. For a process that exits; from any thread."""
        if self._running is not None:
            self._end_attempt(*self._running, "stopped", "its process was asked to leave")

    def _end_attempt(self, step: int, number: int, end: str, why: str) -> None:
        path = attempt_file(layout.evaluation(self.run_dir, step), number)
        write_json(path, {"end": end, "at_s": self._now(), "why": why}, files=self._files)

    def evaluate_ahead(self, step: int, saved_by: int) -> None:
        """Evaluate a checkpoint that attempt `saved_by` of the run has not published yet; results count once it has.

        `measure` must have the weights itself: the checkpoint that it gets does not exist yet. A failure is final.
        """
        try:
            with self._claim(step) as lock:
                folder = layout.found(self.run_dir, step, saved_by)
                make_folders(folder, files=self._files)
                if self._attempt(step, saved_by, lock, folder, lambda: None):
                    self._end_attempt(step, lock.attempt, "found", "waits for the publication")
        except (OSError, RunError) as error:
            log.error("step %d is not evaluated before its publication: %s", step, error)

    def _evaluate(self, step: int, lock: RunLock) -> None:
        saved_by, limit_s = publish.attempt_of(self.root, step), 3600 * self._args.max_pinned_hours
        with pinned(self.root, step, "eval", lease_s=LEASE_S, limit_s=limit_s, now=self._now) as renew:
            is_done = self._attempt(step, saved_by, lock, layout.evaluation(self.run_dir, step), renew)
        if is_done:
            self._record(step)

    def _attempt(self, step: int, saved_by: int, lock: RunLock, folder: Path, renew: Callable[[], None]) -> bool:
        """Measure, and write the results to `folder`; return whether that worked. Records a failure."""
        checkpoint = Checkpoint(layout.folder(self.root, step), self.root, step, self.run_dir)
        began_s, ended = self._now(), partial(self._end_attempt, step, lock.attempt)
        self._running = (step, lock.attempt)
        log.info("evaluating step %d (attempt %d)", step, lock.attempt)
        try:
            found = dict(self._measure(checkpoint, self._beat(lock, renew)))
            self._check_ours(lock)
            seconds = self._now() - began_s
            write_results(folder, self._facts(step, saved_by, seconds=round(seconds, 3)), found, files=self._files)
        except LostError as error:
            log.warning("leaving the evaluation of step %d: %s", step, error)
            return False
        except Stopped:
            ended("stopped", "asked to stop")
            return False
        except ConfigError:  # would fail again, with any checkpoint
            ended("stopped", "the config is wrong")
            raise
        except Exception as error:
            log.exception("the evaluation of step %d failed", step)
            ended("failed", f"{type(error).__name__}: {error}")
            return False
        except BaseException:
            ended("stopped", "interrupted")
            raise
        finally:
            self._running = None
        log.info("step %d is evaluated, in %.1f s", step, seconds)
        return True

    def _facts(self, step: int, saved_by: int, **more: Any) -> dict[str, Any]:
        return {"version": 1, "global_step": step, "incarnation": saved_by, "created_at": self._now(), **more}

    def _beat(self, lock: RunLock, renew: Callable[[], None]) -> Beat:
        began_s = looked_s = self._now()
        limit_hours = self._args.timeout_hours

        def beat() -> None:
            nonlocal looked_s
            if self._stopping():
                raise Stopped
            if self._now() - began_s > 3600 * limit_hours:
                raise RunError(f"it took longer than eval.timeout_hours={limit_hours:g}; raise that, or measure less")
            if self._now() - looked_s >= LOOK_S:
                looked_s = self._now()
                self._check_ours(lock)
                try:
                    renew()
                    self._renew_follower()
                except OSError as error:  # the lease outlasts a missed renewal
                    log.warning("cannot renew the lease on the checkpoint that is evaluated: %s", error)

        return beat

    def _check_ours(self, lock: RunLock) -> None:
        if not lock.holds():
            raise LostError("another evaluator has taken over, or the run went back to before this step")

    def _adopt(self, step: int) -> None:
        """Make existing results the verdict."""
        saved_by = publish.attempt_of(self.root, step)
        there = read_results(layout.found(self.run_dir, step, saved_by))
        if there is None:
            return
        written, found = there
        facts = self._facts(step, saved_by, **{k: written[k] for k in ("seconds",) if k in written})
        facts["created_at"] = written.get("created_at", facts["created_at"])
        write_results(layout.evaluation(self.run_dir, step), facts, found, files=self._files)
        self._record(step)

    def _give_up(self, step: int, why: str) -> None:
        """Record that there will be no evaluation, so that retention may delete the checkpoint."""
        path = layout.evaluation(self.run_dir, step) / layout.FAILED
        facts = self._facts(step, publish.attempt_of(self.root, step), reason=why)
        write_json(path, facts, files=self._files)
        log.error("STEP %d IS NOT EVALUATED: %s. To attempt it again, remove %s", step, why, path.parent)

    def _record(self, step: int) -> None:
        """Append the results to metrics.eval.jsonl."""
        results = read_json(layout.evaluation(self.run_dir, step) / layout.RESULTS)
        created_at = datetime.fromtimestamp(results["created_at"], tz=UTC).isoformat()
        record = {"global_step": step, **results["metrics"]}
        written = {**record, "incarnation": results["incarnation"], "created_at": created_at}
        JsonLines(self._metrics_file).write(written)
        self._on_record(record)
