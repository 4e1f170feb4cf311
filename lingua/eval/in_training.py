"""How a run sees to its evaluations: not at all, by an evaluator beside it, or in the training process.

Promise of the last (`async_eval_gpus: null`): after a checkpoint of `checkpoint.eval.every`, and the last, the ranks
measure a copy of the weights that they hold, bit for bit what `lingua eval` finds in that checkpoint; the training
model, its random states and the order of the data are not touched. The results are the verdict once the checkpoint is
published, and not before. A stop asked of any rank ends an evaluation within a batch; a start makes up for what is
owed, with the weights that it has just loaded where they are the ones, else from the published folder. What fails is
given up with its reason, also after MAX_KILLED starts in a row that were killed at it; training goes on.
Cost: training stands still meanwhile. Each rank holds the whole model once more, in `eval.generator.dtype`.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lingua.checkpoint import layout
from lingua.checkpoint.load_weights import copy_weights
from lingua.checkpoint.lookup import Checkpoint
from lingua.checkpoint.manager import SaveReport
from lingua.checkpoint.state import restore_rng, rng_state
from lingua.config.base import ConfigError
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.train import TrainArgs
from lingua.distributed.parallelize import DTYPES
from lingua.distributed.process_group import World, first_given, on_every_rank, patient
from lingua.eval.evaluator import Beat, Evaluator, Stopped
from lingua.eval.harness_tasks import be_offline
from lingua.eval.measures import Measures, Together
from lingua.eval.spawn import OwnEvaluator, devices_beside
from lingua.files import RunError
from lingua.run.folder import EXIT_REQUEUE
from lingua.run.lock import this_process
from lingua.run.metrics import MetricLogger
from lingua.run.watchdog import Watchdog
from lingua.slurm import can_submit, this_allocation, this_job
from lingua.train.learner import Run
from lingua.train.load_model import bare_model

log = logging.getLogger(__name__)

MAX_KILLED = 3
"""Fewer than the starts without progress that a job is given (launcher.max_retries): then training goes on without."""
LOOK_S = 10.0
"""Between two looks whether a checkpoint that is evaluated already has been published."""
HEAR_S = 1.0
"""Between two looks, during an evaluation, whether another rank has left it."""
HELD = "the weights that we hold"


class Evaluation:
    """What the loop tells of its checkpoints; this one, of a run that evaluates nothing by itself, does nothing.

    Collective unless it says otherwise. True: a rank was asked to stop, and all have heard.
    """

    def begin(self) -> bool:
        """Before the first step of this start, and where there is no step left."""
        return False

    def saved(self, report: SaveReport, *, last: bool = False) -> bool:
        """After a save, before anything else changes the weights. `last`: the run's last step."""
        return False

    def look(self) -> None:
        """Now and then. Local, on every rank."""

    def end(self, exit_code: int) -> None:
        """The run has ended so. Local, on every rank."""


class Beside(Evaluation):
    """By an evaluator of its own, which rank 0 starts and later starts find again (lingua/eval/spawn.py)."""

    def __init__(self, run: Run) -> None:
        self._is_due = run.args.checkpoint.eval.is_due
        self._own = own_evaluator(run) if run.world.is_main else None

    def begin(self) -> bool:
        if self._own is not None:
            self._own.ensure()
        return False

    def saved(self, report: SaveReport, *, last: bool = False) -> bool:
        if self._own is not None and (last or self._is_due(report.step)):
            self._own.ensure()  # it may have died
        return False

    def end(self, exit_code: int) -> None:
        if self._own is not None and exit_code != EXIT_REQUEUE:  # then the next start has one of its own
            self._own.hand_over()


def own_evaluator(run: Run) -> OwnEvaluator:
    """The evaluator that a run with `async_eval_gpus` starts."""
    args, place = run.args, run.world.rank_info
    assert args.eval is not None
    assert args.async_eval_gpus is not None
    slurm, devices = None, None
    if can_submit(os.environ):
        slurm = args.evaluation_job()
    else:
        n_gpus = torch.cuda.device_count()
        found = devices_beside(os.environ, n_gpus, place.local_world_size, args.async_eval_gpus)
        if found is None:
            log.warning(
                "async_eval_gpus is %d, but the ranks leave none of %d GPUs free: evaluations are made on the CPU; "
                "start fewer ranks, or set async_eval_gpus=null", args.async_eval_gpus, n_gpus,
            )  # fmt: skip
        devices = found or ""
    return OwnEvaluator(run.run_dir.absolute(), args.app, args.eval, slurm, devices)


def make_evaluation(
    run: Run, watchdog: Watchdog, measures: Measures | None, metrics: MetricLogger | None, incarnation: int
) -> Evaluation:
    """How this run sees to its evaluations; `measures`: of `make_measures`."""
    if measures is not None:
        return InTraining(run, watchdog, measures, metrics, incarnation)
    if run.args.eval is not None and run.args.eval.automatic:
        return Beside(run)
    return Evaluation()


def make_measures(args: TrainArgs, world: World) -> Measures | None:
    """What this run's own ranks will measure; None: nothing. Raises ConfigError for what is missing. Collective."""
    if args.eval is None or args.async_eval_gpus is not None or not args.eval.automatic:
        return None
    if this_allocation(os.environ) is not None:  # compute nodes: what is not in the cache would only be waited for
        be_offline()
    given, evaluated = args, args.eval
    return on_every_rank(lambda: Measures(given, evaluated, world))


class InTraining(Evaluation):
    """Evaluates with the ranks of the run. Rank 0 decides and writes, the others do as it says."""

    def __init__(
        self,
        run: Run,
        watchdog: Watchdog,
        measures: Measures,
        metrics: MetricLogger | None,
        incarnation: int,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._watchdog, self._measures, self._now = run, watchdog, measures, now
        self._incarnation = incarnation
        self._ranks = Together(self._measure)
        self._period = run.args.checkpoint.eval
        self._n_begun = 0
        self._heard_s = 0.0
        self._is_stopping = False
        self._ahead: set[int] = set()
        """Steps that were evaluated before they were published; of rank 0."""
        self._looked_s = now()
        # In here nothing is tried again: the weights move on.
        args: EvalArgs = measures.args.model_copy(update={"max_tries": 1})
        self._evaluator = (
            Evaluator(
                run.run_dir,
                args,
                self._lead,
                on_record=metrics.track if metrics is not None else lambda record: None,
                stopping=lambda: watchdog.asked or self._is_stopping,
                max_killed=MAX_KILLED,
                me=this_process(*this_job(os.environ)),
            )
            if run.world.is_main
            else None
        )
        watchdog.at_exit.append(self._abandon)

    def begin(self) -> bool:
        return self._together(lambda evaluator: evaluator.catch_up())

    def saved(self, report: SaveReport, *, last: bool = False) -> bool:
        if report.error is not None or not (last or self._period.is_due(report.step)):
            return False

        def act(evaluator: Evaluator) -> None:
            if not report.published:
                self._ahead.add(report.step)
                evaluator.evaluate_ahead(report.step, self._incarnation)
            evaluator.catch_up()

        return self._together(act)

    def look(self) -> None:
        if self._evaluator is None or not self._ahead or self._now() - self._looked_s < LOOK_S:
            return
        self._looked_s = self._now()
        published = {step for step in self._ahead if layout.done_mark(self._evaluator.root, step).exists()}
        if published:
            self._evaluator.catch_up(measuring=False)
            self._ahead -= published

    # -- all ranks -------------------------------------------------------------------------------------------------

    def _together(self, act: Callable[[Evaluator], None]) -> bool:
        """Do `act` on rank 0; the other ranks measure what it measures."""

        def lead() -> None:
            assert self._evaluator is not None
            act(self._evaluator)

        timeout_s, usual_s = 3600 * self._measures.args.timeout_hours, self._run.args.distributed.timeout_s
        with self._watchdog.heartbeat.during("evaluation"), patient(timeout_s, usual_s):
            self._ranks.led_by_main(lead, self._beat)
            return first_given(self._watchdog.received) is not None

    def _lead(self, checkpoint: Checkpoint, beat: Beat) -> Mapping[str, Any]:
        """An Evaluator's `measure`, on rank 0."""
        source = HELD if checkpoint.step == self._run.step else f"{checkpoint.run_dir}@{checkpoint.step}"

        def beat_of_both() -> None:
            try:
                beat()
            except Exception:
                self._leave()
                raise
            self._beat()

        try:
            return self._ranks.measure(source, beat_of_both)
        except ConfigError as error:  # of this evaluation: it must not end the run
            raise RunError(str(error)) from error

    def _measure(self, source: str, beat: Beat) -> dict[str, Any]:
        """Collective; all ranks come back with the results, or all raise."""
        self._n_begun += 1
        with self._undisturbed():
            try:
                if source != HELD:
                    return self._measures.measure(source, beat)
                run, measures = self._run, self._measures
                dtype = DTYPES[measures.args.generator.dtype]
                model = on_every_rank(lambda: bare_model(run.args, run.tokenizer, run.world.device, dtype))
                copy_weights(run.model, model)
                return measures.measure_model(model, run.tokenizer, beat)
            except Exception:
                if first_given(self._watchdog.received) is not None:
                    self._is_stopping = True
                    raise Stopped from None
                raise

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """What an evaluation leaves behind in the process is put back: random states (harness seeds them), memory."""
        random_states = rng_state()
        try:
            yield
        finally:
            restore_rng(random_states)
            gc.collect()  # python's own collector is off in the loop
            if self._run.world.device.type == "cuda":
                torch.cuda.empty_cache()  # or batches of all lengths would leave the memory in pieces

    # -- one rank --------------------------------------------------------------------------------------------------

    @property
    def _left(self) -> str:
        """Key under which a rank says that it has left the present evaluation."""
        return f"lingua/evaluation/{self._n_begun}/left"

    def _leave(self) -> None:
        """Let the others know, who would do the rest of their shares first. Local."""
        if self._run.world.store is not None:
            self._run.world.store.set(self._left, "1")

    def _abandon(self) -> None:
        """When the process is ended from beside its main thread: being asked to stop is no failure. Local."""
        if self._evaluator is not None and self._watchdog.asked:
            self._evaluator.abandon()

    def _beat(self) -> None:
        """Before each batch. Raises Stopped when this rank was asked to stop, or another has left. Local."""
        self._watchdog.heartbeat.sign()
        if self._watchdog.asked:
            self._leave()
            raise Stopped
        store, now_s = self._run.world.store, self._now()
        if store is not None and now_s - self._heard_s >= HEAR_S:
            self._heard_s = now_s
            if store.check([self._left]):
                raise Stopped
