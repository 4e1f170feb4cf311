"""Evaluate with the ranks of a run (`async_eval_gpus: null`), or choose an evaluator beside it.

After each checkpoint of `checkpoint.eval.every`, and after the last one, the ranks evaluate a copy of their weights,
with bit for bit the result of `lingua eval` on that checkpoint. Training pauses meanwhile: its model, random states and
data order do not change, and each rank holds the whole model once more, in `eval.generator.dtype`. The results become
the verdict when the checkpoint is published. A stop request to any rank ends an evaluation within a batch; the next
attempt catches up, with the weights that it has loaded or from the published folder. An evaluation that failed, or in
which MAX_KILLED attempts in a row were killed, is given up with its reason, and training goes on.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lingua.checkpoint import layout
from lingua.checkpoint.load_weights import copy_weights
from lingua.checkpoint.lookup import Checkpoint
from lingua.checkpoint.manager import SaveReport
from lingua.checkpoint.state import averages_of, restore_rng, rng_state
from lingua.config.base import ConfigError
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.train import TrainArgs
from lingua.distributed.process_group import World, first_given, on_every_rank, patient
from lingua.eval.evaluator import Beat, Evaluator, Stopped
from lingua.eval.harness_tasks import be_offline
from lingua.eval.measures import Measures, Together
from lingua.eval.spawn import Beside, Evaluation, devices_beside
from lingua.files import RunError
from lingua.run.lock import this_process
from lingua.run.metrics import MetricLogger
from lingua.run.watchdog import Watchdog
from lingua.scheduler import can_submit, this_allocation, this_job
from lingua.train.learner import Run
from lingua.train.load_model import bare_model, chosen_dtype
from lingua.train.sizes import Phase

log = logging.getLogger(__name__)

MAX_KILLED = 3
"""At most launcher.max_retries, so that the evaluation is given up before the job is."""
LOOK_S = 10.0
"""Interval at which to check whether a checkpoint that is evaluated already has been published."""
PEERS_S = 1.0
"""Interval at which an evaluation checks whether another rank has left it."""
HELD = "the weights that we hold"


def make_measures(args: TrainArgs, phases: Sequence[Phase], world: World) -> Measures | None:
    """Return the measures of this run's own ranks, or None. Raises ConfigError if anything is missing. Collective."""
    if args.eval is None or args.async_eval_gpus is not None or not args.eval.automatic:
        return None
    if this_allocation(os.environ) is not None:  # a compute node would wait in vain for what is not in the cache
        be_offline()
    written = [phase.written.model_copy(update={"until": str(phase.last)}) for phase in phases if phase.written]
    given, evaluated = args.model_copy(update={"phases": written}), args.eval
    by_phase = [(phase.last, phase.args.eval or evaluated) for phase in phases]
    return on_every_rank(lambda: Measures(given, evaluated, world, by_phase))


def make_evaluation(
    run: Run, watchdog: Watchdog, measures: Measures | None, metrics: MetricLogger | None, attempt: int
) -> Evaluation:
    """Return the object that handles this run's evaluations. `measures`: from `make_measures`."""
    args, place = run.args, run.world.rank_info
    if measures is not None:
        return InTraining(run, watchdog, measures, metrics, attempt)
    if args.eval is None or not args.eval.automatic or not run.world.is_main:
        return Evaluation()
    assert args.async_eval_gpus is not None
    asked, devices = None, None
    if can_submit(os.environ):
        asked = args.evaluation_job()
    else:
        n_gpus = torch.cuda.device_count()
        devices = devices_beside(os.environ, n_gpus, place.local_world_size, args.async_eval_gpus)
        if devices is None:
            log.warning(
                "async_eval_gpus is %d, but the ranks leave none of %d GPUs free: evaluations run on the CPU; "
                "start fewer ranks, or set async_eval_gpus=null", args.async_eval_gpus, n_gpus,
            )  # fmt: skip
    return Beside(run.run_dir.absolute(), args.app, args.eval, args.checkpoint.eval.is_due, asked, devices or "")


class InTraining(Evaluation):
    """Evaluates with the ranks of the run. Rank 0 decides and writes; the others take part in measuring."""

    def __init__(
        self,
        run: Run,
        watchdog: Watchdog,
        measures: Measures,
        metrics: MetricLogger | None,
        attempt: int,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._watchdog, self._measures, self._now = run, watchdog, measures, now
        self._attempt = attempt
        self._ranks = Together(self._measure)
        self._period = run.args.checkpoint.eval
        self._n_begun = 0
        self._peers_s = 0.0
        self._is_stopping = False
        self._ahead: set[int] = set()
        """Steps evaluated before their publication. Rank 0 only."""
        self._looked_s = now()
        args: EvalArgs = measures.args.model_copy(update={"max_tries": 1})  # training changes the weights
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
                evaluator.evaluate_ahead(report.step, self._attempt)
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
        """Call `act` on rank 0; the other ranks join its measurements. Return whether a rank was asked to stop."""

        def lead() -> None:
            assert self._evaluator is not None
            act(self._evaluator)

        timeout_s, usual_s = 3600 * self._measures.args.timeout_hours, self._run.args.distributed.timeout_s
        with self._watchdog.heartbeat.during("evaluation"), patient(timeout_s, usual_s):
            self._ranks.led_by_main(lead, self._beat)
            return first_given(self._watchdog.received) is not None

    def _lead(self, checkpoint: Checkpoint, beat: Beat) -> Mapping[str, Any]:
        """Measure a checkpoint for the Evaluator of rank 0, with all ranks."""
        step, run = checkpoint.step, self._run
        # The checkpoint at the start of a phase belongs to the previous one, whose weights and positions may differ.
        source = HELD if step == run.step and step != run.phase.first else f"{checkpoint.run_dir}@{step}"

        def beat_of_both() -> None:
            try:
                beat()
            except Exception:
                self._leave()
                raise
            self._beat()

        try:
            return self._ranks.measure(source, beat_of_both)
        except ConfigError as error:  # must end this evaluation, not the run
            raise RunError(str(error)) from error

    def _measure(self, source: str, beat: Beat) -> dict[str, Any]:
        """Measure the current weights or a checkpoint. Collective: all ranks return the results, or all raise."""
        self._n_begun += 1
        with self._undisturbed():
            try:
                if source != HELD:
                    return self._measures.measure(source, beat)
                run, measures = self._run, self._measures
                stored, device = next(run.model.parameters()).dtype, run.world.device
                dtype = chosen_dtype(measures.args.generator.dtype, device, lambda: stored)
                model = on_every_rank(lambda: bare_model(run.args, run.tokenizer, device, dtype))
                copy_weights(run.model, model, averages_of(run.state) if measures.args.ema else {})
                return measures.measure_model(model, run.tokenizer, beat, run.step)
            except Exception:
                if first_given(self._watchdog.received) is not None:
                    self._is_stopping = True
                    raise Stopped from None
                raise

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Restore random states (harness seeds them) and free memory after an evaluation."""
        random_states = rng_state()
        try:
            yield
        finally:
            restore_rng(random_states)
            gc.collect()  # automatic collection is off in the loop
            if self._run.world.device.type == "cuda":
                torch.cuda.empty_cache()  # batches of many lengths fragment the memory

    # -- one rank --------------------------------------------------------------------------------------------------

    @property
    def _left(self) -> str:
        """Flag that is set when a rank has left the current evaluation."""
        return f"lingua/evaluation/{self._n_begun}/left"

    def _leave(self) -> None:
        """Tell the other ranks, which would otherwise finish their shares first. Local."""
        if self._run.world.peers is not None:
            self._run.world.peers.set_flag(self._left)

    def _abandon(self) -> None:
        """Record that a stop is not a failure, if a thread ends the process. Local."""
        if self._evaluator is not None and self._watchdog.asked:
            self._evaluator.abandon()

    def _beat(self) -> None:
        """Raise Stopped if this rank was asked to stop or another has left. Called before each batch. Local."""
        self._watchdog.heartbeat.sign()
        if self._watchdog.asked:
            self._leave()
            raise Stopped
        peers, now_s = self._run.world.peers, self._now()
        if peers is not None and now_s - self._peers_s >= PEERS_S:
            self._peers_s = now_s
            if peers.is_set(self._left):
                raise Stopped
