"""Which published checkpoints still need an evaluation, and seeing to it that each gets exactly one. Torch-free.

Promise: a checkpoint is seen by its `.done` mark only. Each one of `checkpoint.eval.every`, and the run's last, is
evaluated once, however many evaluators there are and wherever they are killed: `evals/<step>/results.json` appears
whole, then one line in `metrics.eval.jsonl`. What fails is tried again, later and later, and given up in the end with
the reason in `evals/<step>/failed.json`. Everything ends: an evaluation, a wait, a claim, a pin.
Cost: a few looks at small files every POLL_S seconds; nothing is held while there is nothing to do.

There is no list of what is to be done: a restart reads the folders again. Evaluators agree by the lock that runs have
too, one for each step's folder, and each of its numbers is a try:

    evals/follow.json                            somebody evaluates this run: retention waits for them
    evals/0000001000/incarnations/0000000001.json    try 1: whose, and is it alive
                     try-0001.json                   how it ended, unless it was killed or successful
                     results.json | failed.json      the verdict; names the start that saved the checkpoint
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from lingua.args import Args, ConfigError, Text
from lingua.checkpoint import layout, publish
from lingua.checkpoint.lookup import Checkpoint, run_root
from lingua.checkpoint.pins import Follower, Verdict, follow, pinned, verdict
from lingua.checkpoint.survey import Periods, periods_of
from lingua.files import DISK, Files, RunError, entries, read_json, write_json
from lingua.metrics import EVAL_FILE, EvaluationTracker, JsonLines, LoggingArgs, WandbArgs, read_metrics
from lingua.runfolder import EXIT_FINISHED, EXIT_REQUEUE, STOP_FILE
from lingua.runlock import FOLDER as TRIES
from lingua.runlock import OccupiedError, Owner, RunLock, newest_start, this_process
from lingua.schema import GeneratorArgs

log = logging.getLogger(__name__)

POLL_S = 30.0
LEASE_S = 3600.0
"""Of the checkpoint that is being evaluated; renewed while that goes on."""
LOOK_S = 10.0
"""Between two looks, during an evaluation, whether it is still ours to do."""
SAY_AGAIN_S = 600.0
"""Between two times that retention is told of us."""
MAX_KILLED = 8
"""Tries that ended without a word, after which the checkpoint itself is taken for the cause."""

# -- keys ----------------------------------------------------------------------------------------------------------


class HarnessArgs(Args):
    """lm-evaluation-harness; keys are those of its `simple_evaluate`."""

    tasks: list[Text | dict[str, Any]] = []
    """Task names, or mappings with `task` and its settings."""
    include_path: str | None = None
    """Folder of further task files."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question. Null: the task's own."""
    device: Text | None = None
    """Kept for lingua's configs; generator.device decides."""
    use_cache: Text | None = None
    """File of cached answers."""
    cache_requests: bool = False
    """Cache built requests."""
    rewrite_requests_cache: bool = False
    """Build that cache anew."""
    delete_requests_cache: bool = False
    """Delete that cache."""
    limit: Annotated[float, Field(gt=0)] | Annotated[int, Field(gt=0)] | None = None
    """Questions per task (a fraction: share of them). Null: all."""
    bootstrap_iters: Annotated[int, Field(ge=0)] = 100000
    """Resamples for standard errors."""
    check_integrity: bool = False
    """Run the tasks' own checks."""
    write_out: bool = False
    """Print the first prompts."""
    log_samples: bool = True
    """Keep every question and answer, in evals/<step>/samples.json."""
    system_instruction: str | None = None
    """System text before every prompt."""
    apply_chat_template: bool | Text = False
    """Wrap prompts in the chat template."""
    fewshot_as_multiturn: bool = False
    """Examples as turns of a conversation."""
    gen_kwargs: Text | dict[str, Any] | None = None
    """Overrides for generation tasks."""
    verbosity: Text = "INFO"
    """Log level of the harness."""
    predict_only: bool = False
    """Answers without scores."""
    random_seed: int = 0
    """Seed of python's random."""
    numpy_random_seed: int = 1234
    """Seed of numpy."""
    torch_random_seed: int = 1234
    """Seed of torch."""
    fewshot_random_seed: int = 1234
    """Seed of the examples' choice."""


class EvalValidationArgs(Args):
    """Held-out loss at evaluation."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Documents per source, at most. Null: all."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens by which the context moves on in documents longer than it; each token is scored once, and sees at least
    max_seqlen - stride before it. Smaller is nearer to the whole context, and dearer. Null: half of max_seqlen."""
    use_val_from_train_src: bool = True
    """Use the `*.val.jsonl` beside the training sources."""
    root_dir: str = ""
    """Folder of further held-out sources."""
    sources: list[Text] | dict[str, Any] = []
    """Further held-out sources under root_dir."""


class EvalArgs(Args):
    """What an evaluation measures."""

    name: Text = "evals"
    """Name of the evaluation."""
    dump_dir: str | None = None
    """Where results go. Null: <run>/evals."""
    metric_log_dir: str | None = None
    """Where metrics.eval.jsonl is. Null: the run folder."""
    ckpt_dir: str = ""
    """Checkpoint to evaluate."""
    generator: GeneratorArgs = GeneratorArgs()
    """Sampling and scoring."""
    harness: HarnessArgs | None = HarnessArgs()
    """lm-evaluation-harness. Null: not run."""
    validation: EvalValidationArgs | None = EvalValidationArgs()
    """Held-out loss. Null: not measured."""
    wandb: WandbArgs | None = None
    """wandb run of a hand-started evaluation."""
    logging: LoggingArgs | None = None
    """Logging of a hand-started evaluation."""
    core_metrics: dict[str, float] | None = None
    """Weight of each metric (<task>/<metric>, or a task for its first) in `core_eval/overall_avg`."""
    terminal_eval_wandb: bool = False
    """After the last evaluation, one wandb run with training and evaluation metrics joined."""
    wipe_ckpt: bool = False
    """Give a checkpoint up to retention as soon as it is evaluated."""
    global_step: int | None = None
    """Step the checkpoint belongs to. Null: from its name."""
    newest_first: bool = False
    """Of several checkpoints that wait, the newest first. false: in order."""
    max_tries: Annotated[int, Field(ge=1)] = 3
    """Failures after which a checkpoint is given up, with the reason in evals/<step>/failed.json."""
    backoff_s: Annotated[float, Field(ge=0)] = 60.0
    """Pause after the first failure of a checkpoint; doubled after each."""
    timeout_hours: Annotated[float, Field(gt=0)] = 12.0
    """An evaluation that takes longer has failed; with --slurm, its time in the queue counts."""
    max_pinned_hours: Annotated[float, Field(gt=0)] = 24.0
    """For so long a checkpoint waits for its evaluation, whatever retention says; then it may be deleted, loudly."""
    idle_hours: Annotated[float, Field(gt=0)] = 24.0
    """An evaluator with nothing to do ends when its run has been silent for so long."""


# -- decisions -----------------------------------------------------------------------------------------------------


class Try(NamedTuple):
    """One attempt at an evaluation."""

    end: Literal["running", "failed", "stopped", "killed"]
    """stopped: its evaluator was asked to leave; killed: it ended without a word."""
    at_s: float
    """When it ended; of one that was killed, its last sign of life."""
    why: str = ""


@dataclass(frozen=True)
class Candidate:
    """A published checkpoint that is to be evaluated, and how far that is."""

    step: int
    published_at_s: float
    verdict: Verdict | None = None
    is_logged: bool = False
    """Its line is in metrics.eval.jsonl."""
    tries: tuple[Try, ...] = ()

    @property
    def is_busy(self) -> bool:
        return any(one.end == "running" for one in self.tries)

    @property
    def failures(self) -> list[Try]:
        return [one for one in self.tries if one.end == "failed"]

    @property
    def n_killed(self) -> int:
        """How many of the newest tries were killed."""
        alive = (n for n, one in enumerate(reversed(self.tries)) if one.end != "killed")
        return next(alive, len(self.tries))


class RunState(NamedTuple):
    """How the run is that makes the checkpoints."""

    has_ended: bool
    """It said so and asks for no other start."""
    finished: bool
    """It came to its last step."""
    silent_s: float
    """Since its last sign of life; 0 while it trains."""


class Decision(NamedTuple):
    """What an evaluator does next."""

    act: Literal["record", "give_up", "evaluate", "wait", "end"]
    step: int = -1
    why: str = ""


ENDED_SILENT_S = 600.0
"""A run that has ended unfinished may be started again; for so long its evaluator waits for that."""


def is_due(step: int, periods: Periods) -> bool:
    """Whether a checkpoint is to be evaluated: by `checkpoint.eval.every`, or as the run's last."""
    return periods.evaluation.holds(step) or (step > 0 and step == periods.n_steps)


def decide(candidates: Sequence[Candidate], run: RunState, args: EvalArgs, now_s: float) -> Decision:
    """What to do next. `candidates`: all that are due, in any order."""
    free = [one for one in sorted(candidates, key=lambda c: c.step) if not one.is_busy]
    for one in free:
        if one.verdict == "evaluated" and not one.is_logged:
            return Decision("record", one.step)
    owed = [one for one in free if one.verdict is None]
    for one in owed:
        if why := hopeless(one, args.max_tries):
            return Decision("give_up", one.step, why)
    ready = [one for one in owed if now_s >= not_before_s(one, args.backoff_s)]
    if ready:
        return Decision("evaluate", ready[-1 if args.newest_first else 0].step)
    if waiting := [one.step for one in candidates if one.verdict is None or one.is_busy]:
        return Decision("wait", why=f"steps {waiting} are with another evaluator, or failed a moment ago")
    if run.finished:
        return Decision("end", why="the run is finished, and nothing is left to evaluate")
    patience_s = min(ENDED_SILENT_S, 3600 * args.idle_hours) if run.has_ended else 3600 * args.idle_hours
    if run.silent_s >= patience_s:
        return Decision(
            "end", why=f"nothing is left to evaluate, and the run is silent for {run.silent_s / 3600:.1f} h"
        )
    return Decision("wait")


def hopeless(candidate: Candidate, max_tries: int) -> str | None:
    """Why a checkpoint is given up; None: it is not."""
    failures = candidate.failures
    if len(failures) >= max_tries:
        return f"{len(failures)} tries failed, the last with: {failures[-1].why}"
    if candidate.n_killed >= MAX_KILLED:
        return f"{candidate.n_killed} evaluators in a row were killed while they were at it; is there enough memory?"
    return None


def not_before_s(candidate: Candidate, backoff_s: float) -> float:
    """When a checkpoint may be tried again: after the n-th failure, backoff_s * 2**(n-1) later."""
    failures = candidate.failures
    return failures[-1].at_s + backoff_s * 2 ** (len(failures) - 1) if failures else 0.0


# -- what lies there -----------------------------------------------------------------------------------------------


def try_file(folder: Path, number: int) -> Path:
    return folder / f"try-{number:04d}.json"


def read_tries(folder: Path, me: Owner, now: Callable[[], float]) -> tuple[Try, ...]:
    """The attempts at one step's evaluation, in order."""
    start = newest_start(folder, me, now)
    tries: list[Try] = []
    for path in entries(folder / TRIES):
        if path.suffix != ".json" or not path.stem.isdecimal():
            continue
        number = int(path.stem)
        ended = try_file(folder, number)
        if ended.is_file():
            record = read_json(ended)
            tries.append(Try(record["end"], float(record["at_s"]), record["why"]))
        elif start is not None and number == start.incarnation and start.alive:
            tries.append(Try("running", now()))
        else:
            tries.append(Try("killed", path.stat().st_mtime))
    return tuple(tries)


def logged_evaluations(file: Path) -> set[tuple[int, int]]:
    """(step, start that saved the checkpoint) of each line of a metrics.eval.jsonl."""
    records = read_metrics(file) if file.is_file() else []
    return {(r["global_step"], r.get("incarnation", 0)) for r in records if "global_step" in r}


def read_run_state(run_dir: Path, newest_mark_s: float, me: Owner, now: Callable[[], float]) -> RunState:
    """`newest_mark_s`: when the newest checkpoint was published, or the evaluator came."""
    start = newest_start(run_dir, me, now)
    if start is not None and start.alive:
        return RunState(has_ended=False, finished=False, silent_s=0.0)
    seen_s, exit_code = newest_mark_s, EXIT_REQUEUE
    with suppress(FileNotFoundError):
        exit_code = read_json(run_dir / STOP_FILE).get("exit_code", EXIT_REQUEUE)
        seen_s = max(seen_s, (run_dir / STOP_FILE).stat().st_mtime)
    if start is not None:
        seen_s = max(seen_s, (run_dir / TRIES / f"{start.incarnation:010d}.json").stat().st_mtime)
    return RunState(exit_code != EXIT_REQUEUE, exit_code == EXIT_FINISHED, max(0.0, now() - seen_s))


def training_id(run_dir: Path, step: int) -> str | None:
    """The tracking id that a published checkpoint keeps; None: none, or the checkpoint is gone."""
    try:
        state = read_json(layout.folder(run_root(run_dir), step) / layout.train_state_file(0))
        return state["shared"].get("tracking_id")
    except (OSError, RunError, KeyError, TypeError, AttributeError):
        return None


def evaluation_tracker(run_args: Any, run_dir: Path) -> EvaluationTracker:
    """Where the evaluations of a run are tracked, as its config (the app's TrainArgs) says."""
    config = run_args.model_dump(mode="json")
    return EvaluationTracker(run_args.logging.wandb, run_dir, run_args.name, config, partial(training_id, run_dir))


def write_results(folder: Path, facts: Mapping[str, Any], found: Mapping[str, Any], *, files: Files = DISK) -> None:
    """results.json of what was found, last; samples.json of single questions and answers before. Raises OSError."""
    metrics = {name: value for name, value in found.items() if name not in ("details", "samples")}
    if found.get("samples"):
        write_json(folder / layout.SAMPLES, found["samples"], files=files)
    write_json(folder / layout.RESULTS, {**facts, "details": found.get("details", {}), "metrics": metrics}, files=files)


# -- the evaluator -------------------------------------------------------------------------------------------------

Beat = Callable[[], None]
"""Called between two batches; raises when the evaluation is to be left."""
Measure = Callable[[Checkpoint, Beat], Mapping[str, Any]]
"""Evaluates a checkpoint: metrics by name; under "details" and "samples" what else is to be kept."""


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """This evaluator was asked to leave."""


class LostError(RunError):
    """The evaluation is not ours any more: another evaluator has it, or the run went back before this step."""


class Evaluator:
    """One evaluator of a run. `follow` goes on until there is nothing left to do; `tick` does one thing."""

    def __init__(
        self,
        run_dir: Path,
        args: EvalArgs,
        measure: Measure,
        *,
        on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
        stopping: Callable[[], bool] = lambda: False,
        me: Owner | None = None,
        files: Files = DISK,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`on_record` hears of each line written to metrics.eval.jsonl. Raises RunError, ConfigError: not a run."""
        self.run_dir = run_dir
        self.root = run_root(run_dir)
        self._args = args
        self._measure, self._on_record, self._stopping = measure, on_record, stopping
        self._me = me or this_process()
        self._files, self._now, self._sleep = files, now, sleep
        self._periods = self._read_periods()
        self._metrics_file = Path(args.metric_log_dir or run_dir) / EVAL_FILE
        self._came_s = now()
        self._said_s = float("-inf")
        self._overdue: set[int] = set()

    def _read_periods(self) -> Periods:
        """Anew at each look: a later start of the run may change them."""
        periods = periods_of(self.run_dir)
        if periods is None:
            raise ConfigError(f"{self.run_dir} has no config.yaml, which says what to evaluate; start the run first")
        return periods

    def follow(self, *, once: bool = False) -> str:
        """Evaluate what is due until the run has ended, or with `once` until nothing is; returns why it ends."""
        before: Decision | None = None
        while True:
            decision = self.tick()
            if decision.act == "end" or (once and decision.act == "wait"):
                return decision.why or "nothing is left to evaluate"
            if self._stopping():
                return "asked to stop"
            if decision.act == "wait" or decision == before:  # a disk that refuses is not asked all the time
                self._sleep(POLL_S)
            before = decision

    def tick(self) -> Decision:
        """Look, decide, and do one thing; a disk that refuses is reported and asked again later."""
        try:
            self._tell_retention()
            decision = self._decide()
            if decision.act in ("evaluate", "give_up", "record"):
                self._under_claim(decision)
        except OccupiedError as error:  # another evaluator was faster
            log.info("%s", error)
            return Decision("wait")
        except (OSError, RunError) as error:
            log.error("the evaluator of %s is held up: %s", self.run_dir, error)
            return Decision("wait")
        return decision

    def _tell_retention(self) -> None:
        if self._now() - self._said_s >= SAY_AGAIN_S:
            follower = Follower(self._periods.evaluation.every, 3600 * self._args.max_pinned_hours, self._now())
            follow(self.run_dir, follower, files=self._files)
            self._said_s = self._now()

    # -- looking ---------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """All published checkpoints that are due, ascending."""
        due = [step for step in layout.done_steps(self.root) if is_due(step, self._periods)]
        logged = logged_evaluations(self._metrics_file)
        return [found for step in due if (found := self._candidate(step, logged)) is not None]

    def _candidate(self, step: int, logged: Collection[tuple[int, int]]) -> Candidate | None:
        """None: retention was faster."""
        try:
            published_at_s = layout.done_mark(self.root, step).stat().st_mtime
        except FileNotFoundError:
            return None
        facts = publish.mark_facts(self.root, step)
        return Candidate(
            step,
            float(facts.get("created_at", published_at_s)),
            verdict(self.run_dir, self.root, step),
            (step, facts.get("incarnation", 0)) in logged,
            read_tries(layout.evaluation(self.run_dir, step), self._me, self._now),
        )

    def _decide(self) -> Decision:
        self._periods = self._read_periods()
        candidates = self.candidates()
        self._complain(candidates)
        seen_s = max([self._came_s, *(one.published_at_s for one in candidates)])
        run = read_run_state(self.run_dir, seen_s, self._me, self._now)
        return decide(candidates, run, self._args, self._now())

    def _complain(self, candidates: Iterable[Candidate]) -> None:
        """Say once of each checkpoint that it has waited for too long."""
        limit_s = 3600 * self._args.max_pinned_hours
        for one in candidates:
            if one.verdict is None and self._now() - one.published_at_s > limit_s and one.step not in self._overdue:
                self._overdue.add(one.step)
                log.error(
                    "CHECKPOINT %d HAS WAITED FOR ITS EVALUATION FOR MORE THAN %g h (eval.max_pinned_hours): retention "
                    "may delete it now", one.step, self._args.max_pinned_hours,
                )  # fmt: skip

    # -- doing -----------------------------------------------------------------------------------------------------

    def _under_claim(self, decision: Decision) -> None:
        """Do it as the owner of the step's folder, if it is still to be done then."""
        step = decision.step
        lock = RunLock(layout.evaluation(self.run_dir, step), self._me, doing="evaluated", sleep=self._sleep)
        with lock:
            now_there = self._candidate(step, logged_evaluations(self._metrics_file))
            if now_there is None:
                return
            ended = partial(self._end_try, step, lock.incarnation)
            if decision.act == "record" and now_there.verdict == "evaluated" and not now_there.is_logged:
                self._record(step)
            elif decision.act == "give_up" and now_there.verdict is None:
                self._give_up(step, decision.why)
            elif decision.act == "evaluate" and now_there.verdict is None:
                self._evaluate(step, lock, ended)

    def _end_try(self, step: int, number: int, end: str, why: str) -> None:
        folder = layout.evaluation(self.run_dir, step)
        write_json(try_file(folder, number), {"end": end, "at_s": self._now(), "why": why}, files=self._files)

    def _evaluate(self, step: int, lock: RunLock, ended: Callable[[str, str], None]) -> None:
        checkpoint = Checkpoint(layout.folder(self.root, step), self.root, step, self.run_dir)
        incarnation, began_s = publish.incarnation_of(self.root, step), self._now()
        limit_s = 3600 * self._args.max_pinned_hours
        log.info("evaluating step %d (try %d)", step, lock.incarnation)
        try:
            with pinned(self.root, step, "eval", lease_s=LEASE_S, limit_s=limit_s, now=self._now) as renew:
                found = dict(self._measure(checkpoint, self._beat(lock, renew)))
            self._must_be_ours(lock)
            seconds = self._now() - began_s
            facts = {"version": 1, "global_step": step, "incarnation": incarnation, "seconds": round(seconds, 3)}
            facts["created_at"] = self._now()
            write_results(layout.evaluation(self.run_dir, step), facts, found, files=self._files)
        except LostError as error:
            log.warning("the evaluation of step %d is left: %s", step, error)
            return
        except Stopped:
            ended("stopped", "asked to stop")
            return
        except ConfigError:  # of no use to try that again, with any checkpoint
            ended("stopped", "the config is wrong")
            raise
        except Exception as error:
            log.exception("the evaluation of step %d failed", step)
            ended("failed", f"{type(error).__name__}: {error}")
            return
        except BaseException:
            ended("stopped", "interrupted")
            raise
        log.info("step %d is evaluated, in %.1f s", step, seconds)
        self._record(step)

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
                self._must_be_ours(lock)
                try:
                    renew()
                    self._tell_retention()
                except OSError as error:  # the pin lasts a while without that
                    log.warning("cannot tell retention of the evaluation: %s", error)

        return beat

    def _must_be_ours(self, lock: RunLock) -> None:
        if not lock.holds():
            raise LostError("another evaluator has taken over, or the run went back to before this step")

    def _give_up(self, step: int, why: str) -> None:
        """The verdict that there will be none. Retention may have the checkpoint."""
        record = {"version": 1, "global_step": step, "incarnation": publish.incarnation_of(self.root, step)}
        path = layout.evaluation(self.run_dir, step) / layout.FAILED
        write_json(path, {**record, "reason": why, "created_at": self._now()}, files=self._files)
        log.error("STEP %d IS NOT EVALUATED: %s. To have it tried again, remove %s", step, why, path.parent)

    def _record(self, step: int) -> None:
        """The evaluation's line in metrics.eval.jsonl, made from its results."""
        results = read_json(layout.evaluation(self.run_dir, step) / layout.RESULTS)
        created_at = datetime.fromtimestamp(results["created_at"], tz=UTC).isoformat()
        record = {"global_step": step, **results["metrics"]}
        written = {**record, "incarnation": results["incarnation"], "created_at": created_at}
        JsonLines(self._metrics_file).write(written)
        self._on_record(record)
