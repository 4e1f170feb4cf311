"""Reads each step's reduced numbers: logs, skips or halts, and notices a stop."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from lingua.checkpoint.manager import SaveReport
from lingua.console import Progress
from lingua.distributed.process_group import StepReduce
from lingua.files import RunError
from lingua.optim.update import is_overflow
from lingua.profiling.profiler import Profiler
from lingua.run.metrics import MetricLogger
from lingua.run.throughput import Lap, Meter
from lingua.signals import SignalFlag
from lingua.train.learner import Run, StepDone

log = logging.getLogger(__name__)


class NonFiniteError(RunError):
    """Loss or gradient of a step is not finite."""


@dataclass(frozen=True)
class StepFacts:
    """What the host knows of a step while the device still computes it."""

    step: int
    lr: float
    first_row: int
    last_row: int
    lap: Lap


class StepMonitor:
    """Reads each step's sums over ranks: loss, gradient norm, whether it went wrong, to stop, what to profile."""

    def __init__(
        self,
        run: Run,
        meter: Meter,
        progress: Progress,
        metrics: MetricLogger | None,
        profiler: Profiler,
        save_asked: SignalFlag,
    ) -> None:
        self.stop = False
        """A rank has been asked to stop: the same answer on all ranks after the same step."""
        self.save = False
        """A rank has been asked for a checkpoint and to go on; likewise."""
        self.save_asked = save_asked
        self.meter = meter
        self.progress = progress
        self.profiler = profiler
        self._run = run
        self._metrics = metrics
        self._skips_in_a_row = 0
        self._reduce: StepReduce[StepFacts] = StepReduce(run.world.device)

    def submit(self, done: StepDone, stop_asked: bool) -> None:
        """Start to sum a step's numbers over ranks, and act on the sums of the step before. Collective."""
        last_row = max(done.rows) + self._run.size.dp_size - 1
        facts = StepFacts(done.step, done.lr, min(done.rows), last_row, self.meter.lap())
        numbers = {**done.numbers, "stop": float(stop_asked), "save": self.save_asked.take()}
        numbers |= self.profiler.requests.numbers()
        self._read(self._reduce.submit(facts, numbers))
        self.profiler.step(done.step)
        self.progress.advance(1)

    def catch_up(self) -> None:
        """Act on the sums of the newest step too; waits for them."""
        self._read(self._reduce.result())

    def _read(self, reduced: tuple[StepFacts, dict[str, float]] | None) -> None:
        """Act on the sums of a step over all ranks, or on nothing if there is none yet.

        Sums whose name has a slash are metrics: their mean over ranks is logged.
        """
        if reduced is None:
            return
        facts, sums = reduced
        n_ranks = self._run.world.rank_info.world_size
        means = {name: value / n_ranks for name, value in sums.items() if "/" in name}
        self.profiler.read(sums)
        self.note_stop(sums["stop"] > 0)
        self.save |= sums["save"] > 0
        loss_sum, scale = sums["loss/out"], means.get("optim/loss_scale")
        if sums["unmoved"] > 0 and scale is not None and is_overflow(loss_sum, scale):
            self._run.shared["skipped_steps"] += 1
            log.info("step %d overflowed at loss scale %g: halved; the optimizer did not move", facts.step, scale)
        elif sums["unmoved"] > 0:
            self._skip_or_halt(facts, means["loss/out"], means["optim/grad_norm"])
        elif not math.isfinite(loss_sum):  # only a loss that does not depend on the parameters can do that
            raise NonFiniteError(f"step {facts.step}: the loss is {loss_sum}, although its gradient is finite")
        else:
            self._skips_in_a_row = 0
        if facts.step % self._run.args.logging.freq == 0 or facts.step == self._run.size.n_steps:
            self._report(facts, means)

    def note_stop(self, agreed: bool) -> None:
        """`agreed`: by all ranks, to stop."""
        if agreed and not self.stop:
            self.stop = True
            if self._metrics is not None:
                self._metrics.hurry()
            log.info("asked to stop: saving after this step (a second Ctrl-C would leave without saving)")

    def report_validation(self, losses: dict[str, float] | None) -> dict[str, float]:
        """Held-out losses at the present step, handed through. None: all ranks agreed to stop instead."""
        if losses is None:
            self.note_stop(True)
            return {}
        seconds = {"seconds": losses["seconds"]} if losses else {}
        losses = {key: value for key, value in losses.items() if key != "seconds"}  # no clock in a checkpoint
        if self._metrics is not None and losses:
            log.info("validation at step %d: %s", self._run.step, "  ".join(f"{k} {v:.4f}" for k, v in losses.items()))
            self._metrics.log_validation({"global_step": self._run.step, **losses, **seconds})
        return losses

    def report_save(self, report: SaveReport) -> None:
        """Note how a save went."""
        if not report.seconds:
            return  # it was there already
        cost = {"seconds": report.seconds, "bytes": report.size_bytes}
        if report.staged:
            self.note("staged", **cost)
        if report.error is not None:
            self.note("failed", error=report.error)
        elif report.published:
            self.note("published", **({} if report.staged else cost))

    def note(self, event: str, **facts: float | str) -> None:
        """Write what happened at the present step, for `lingua report`."""
        if self._metrics is not None:
            self._metrics.log_checkpoint({"global_step": self._run.step, "event": event, **facts})

    def report_probe(self, statistics: dict[str, float]) -> None:
        """Note what a probe saw in the step that is about to end."""
        if self._metrics is not None:
            self._metrics.log_probe({"global_step": self._run.step + 1, **statistics})

    def _skip_or_halt(self, facts: StepFacts, loss: float, grad_norm: float) -> None:
        run, optim = self._run, self._run.args.optim
        rows = [facts.first_row, facts.last_row]
        what = f"step {facts.step} (rows {rows[0]} to {rows[1]}): loss {loss}, gradient norm {grad_norm}"
        skips = str([*run.args.data.skip_rows, rows]).replace(" ", "")
        self._skips_in_a_row += 1
        run.shared["skipped_steps"] += 1
        if optim.on_nonfinite == "skip" and self._skips_in_a_row <= optim.max_skips:
            log.warning("%s is not finite; the optimizer did not move", what)
            return
        limit = f", and so were the {optim.max_skips} steps before it" if optim.on_nonfinite == "skip" else ""
        raise NonFiniteError(
            f"{what} is not finite{limit}. Nothing was updated. Since the data order is fixed, a restart meets these "
            f"rows again: pass over them with data.skip_rows='{skips}', or lower optim.lr"
        )

    def _report(self, facts: StepFacts, means: dict[str, float]) -> None:
        run = self._run
        record = {
            "global_step": facts.step,
            "acc_step": 0,
            **means,
            **({} if run.floor is None else {"loss/above_floor": means["loss/out"] - run.floor.nats}),
            "optim/lr": facts.lr,
            "optim/total_tokens": run.shared["total_tokens"] - (run.step - facts.step) * run.size.tokens_per_step,
            "optim/skipped_steps": run.shared["skipped_steps"],
            **self.meter.read(facts.step, facts.lap),
            **self.profiler.memory.report(),
            **run.loader.stats(),
            **run.manager.metrics(),
        }
        self.progress.report(record)
        if self._metrics is not None:
            self._metrics.log({key: value for key, value in record.items() if math.isfinite(value)})
            for published in run.manager.published_since:
                self._metrics.log_checkpoint({**published, "event": "published"})
        run.manager.published_since.clear()
