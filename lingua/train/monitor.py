"""Act on each step's reduced numbers: log, skip, halt, rewind, or notice a stop."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from lingua.checkpoint.manager import SaveReport
from lingua.console import Progress
from lingua.data.loader import PASSED
from lingua.distributed.process_group import StepReduce
from lingua.files import RunError
from lingua.optim.spikes import RECENT, Recent, remember, spike_limit
from lingua.optim.update import is_overflow
from lingua.profiling.profiler import Profiler
from lingua.run.metrics import MetricLogger
from lingua.run.startup import EVENT, FIRST_STEP, StartUp
from lingua.run.throughput import Lap, Meter
from lingua.signals import SignalFlag
from lingua.train.learner import Run, StepDone

log = logging.getLogger(__name__)

_SAMPLE_LINES = 12  # shown; the file has all


class NonFiniteError(RunError):
    """A step's loss or gradient is not finite, or is a spike beyond the limit of skips or rewinds."""


class RewindAsked(Exception):  # noqa: N818 - not an error: the loop continues after it
    """A step went wrong, and the config says to go back to before it. All ranks raise this at the same step."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(why)
        self.step, self.why = step, why


@dataclass(frozen=True)
class StepFacts:
    """Facts about a step that the host knows while the device still computes it."""

    step: int
    lr: float
    first_row: int
    last_row: int
    lap: Lap


class StepMonitor:
    """Reads each step's sums over ranks: loss, gradient norm, errors, and requests to stop, save or profile."""

    def __init__(
        self,
        run: Run,
        meter: Meter,
        progress: Progress,
        metrics: MetricLogger | None,
        profiler: Profiler,
        save_asked: SignalFlag,
        startup: StartUp,
    ) -> None:
        self.stop = False
        """A rank has been asked to stop; set on all ranks after the same step."""
        self.save = False
        """A rank has been asked to save a checkpoint and go on; set likewise."""
        self.save_asked = save_asked
        self._startup = startup
        self._unreported: dict[str, float] = {}
        """Metrics for the next report only."""
        self.meter = meter
        self.progress = progress
        self.profiler = profiler
        self._run = run
        self._metrics = metrics
        self._skips_in_a_row = 0
        self._losses: list[float] = []
        """Of the steps since the last report."""
        self._recent: Recent = ()
        """Recent losses, with action `warn`; otherwise `shared` holds them under RECENT."""
        self._in_spike = False
        self._reduce: StepReduce[StepFacts] = StepReduce(run.world.device)

    def begin(self) -> None:
        """Note that the first step begins."""
        self.note("begun")
        self._startup.leave_out()  # the time of a validation before it

    def submit(self, done: StepDone, stop_asked: bool) -> None:
        """Start summing a step's numbers over ranks, and act on the sums of the previous step. Collective."""
        if not self._startup.is_over:
            self._end_startup()
        last_row = max(done.rows) + self._run.size.dp_size - 1
        facts = StepFacts(done.step, done.lr, min(done.rows), last_row, self.meter.lap())
        numbers = {**done.numbers, "stop": float(stop_asked), "save": self.save_asked.take()}
        numbers |= self.profiler.requests.numbers()
        self._read(self._reduce.submit(facts, numbers))
        self.profiler.step(done.step)
        self.progress.advance(1)

    def _end_startup(self) -> None:
        """Report the duration of the startup, once the device has finished the first step too."""
        startup, device = self._startup, self._run.world.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        startup.reached(FIRST_STEP)
        startup.is_over = True
        self._unreported = startup.metrics()
        self.note(EVENT, seconds=startup.seconds, parts=startup.parts)
        if self._metrics is not None:
            log.info("%s", startup)

    def catch_up(self) -> None:
        """Wait for the sums of the newest step and act on them."""
        self._read(self._reduce.result())

    def _read(self, reduced: tuple[StepFacts, dict[str, float]] | None) -> None:
        """Act on the sums of a step over all ranks, or on nothing if there is none yet.

        Sums whose name has a slash are metrics: their mean over ranks is logged.
        """
        if reduced is None:
            return
        facts, sums = reduced
        spike: str | None = None
        n_ranks = self._run.world.rank_info.world_size
        means = {name: value / n_ranks for name, value in sums.items() if "/" in name}
        self.profiler.read(sums)
        self.note_stop(sums["stop"] > 0)
        self.save |= sums["save"] > 0
        loss_sum, scale = sums["loss/out"], means.get("optim/loss_scale")
        if sums.get("spiked", 0) > 0:
            self._skip_or_halt(facts, means["loss/out"], means["optim/grad_norm"], self._run.args.optim.on_spike.action)
        elif sums["unmoved"] > 0 and scale is not None and is_overflow(loss_sum, scale):
            self._run.shared["skipped_steps"] += 1
            log.info("step %d overflowed at loss scale %g: halved; the optimizer did not move", facts.step, scale)
        elif sums["unmoved"] > 0:
            self._skip_or_halt(facts, means["loss/out"], means["optim/grad_norm"], self._run.args.optim.on_nonfinite)
        elif not math.isfinite(loss_sum):  # possible only for a loss that does not depend on the parameters
            raise NonFiniteError(f"step {facts.step}: the loss is {loss_sum}, although its gradient is finite")
        else:
            self._skips_in_a_row = 0
            self._losses.append(means["loss/out"])
            spike = self._judge(facts, means["loss/out"])
        if facts.step % self._run.args.logging.freq == 0 or facts.step == self._run.size.n_steps:
            self._report(facts, means)
        if spike is not None:
            raise RewindAsked(facts.step, spike)

    def _judge(self, facts: StepFacts, loss: float) -> str | None:
        """Record the loss of an updated step; return why the run must go back, or None."""
        shared, args = self._run.shared, self._run.args.optim.on_spike
        recent = self._recent if args.action == "warn" else shared.get(RECENT, ())
        limit = spike_limit(recent, facts.step, args, self._run.phase.first)
        why = f"{_where(facts)}: the loss {loss:.4f} is a spike, above {limit:.4f}"
        if loss > limit and args.action == "rewind":
            return why
        if loss > limit and not self._in_spike:
            log.warning("%s: %g standard deviations over the %d steps before", why, args.threshold, args.window)
        self._in_spike = loss > limit
        recent = remember(recent, facts.step, loss, args)
        if args.action == "warn":
            self._recent = recent
        else:
            shared[RECENT] = recent
        return None

    def forget(self) -> None:
        """Discard the steps after the one that went wrong, but keep requests made meanwhile. Collective."""
        late = self._reduce.result()
        if late is not None:
            self.profiler.read(late[1])
            self.save |= late[1]["save"] > 0
        self._skips_in_a_row, self._in_spike, self._losses = 0, False, []

    def rewound(self) -> None:
        """Restart meter and progress at the step to which the run went back."""
        run, passed = self._run, self._run.shared[PASSED][-1]
        self.meter.start(run.step)
        self.progress.begin(run.args.name, run.size.n_steps, "steps", done=run.step)
        self.note("rewind", wrong_step=passed["step"], rows=passed["rows"], why=passed["why"])

    def note_stop(self, agreed: bool) -> None:
        """Note a stop, if all ranks have `agreed` to it."""
        if agreed and not self.stop:
            self.stop = True
            if self._metrics is not None:
                self._metrics.hurry()
            log.info("asked to stop: saving after this step (a second Ctrl-C would leave without saving)")

    def report_validation(self, losses: dict[str, float] | None) -> dict[str, float]:
        """Log held-out losses at the current step and return them. None means that all ranks agreed to stop instead."""
        if losses is None:
            self.note_stop(True)
            return {}
        seconds = {"seconds": losses["seconds"]} if losses else {}
        losses = {key: value for key, value in losses.items() if key != "seconds"}  # no clock in a checkpoint
        if self._metrics is not None and losses:
            log.info("validation at step %d: %s", self._run.step, "  ".join(f"{k} {v:.4f}" for k, v in losses.items()))
            self._metrics.log_validation({"global_step": self._run.step, **losses, **seconds})
        return losses

    def report_sample(self, text: str | None) -> None:
        """Log a continuation of the run's prompt at the current step; None if no sample could be made."""
        prompt = self._run.args.sample_prompt
        if self._metrics is not None and text is not None:
            lines = f"{prompt}{text}".splitlines()[:_SAMPLE_LINES]
            log.info("a sample:%s", "".join(f"\n    {line}" for line in lines))
            self._metrics.log_sample({"global_step": self._run.step, "prompt": prompt, "text": text})

    def report_save(self, report: SaveReport) -> None:
        """Record the outcome of a save."""
        if not report.seconds:
            return  # the checkpoint existed already
        cost = {"seconds": report.seconds, "bytes": report.size_bytes, "synchronous": report.synchronous}
        if report.staged:
            self.note("staged", **cost)
        if report.error is not None:
            self.note("failed", error=report.error)
        elif report.published:
            self.note("published", **({} if report.staged else cost))

    def note(self, event: str, **facts: Any) -> None:
        """Record an event at the current step, for `lingua report`."""
        if self._metrics is not None:
            self._metrics.log_checkpoint({"global_step": self._run.step, "event": event, **facts})

    def report_probe(self, statistics: dict[str, float]) -> None:
        """Record the statistics of a probe of the step in progress."""
        if self._metrics is not None:
            self._metrics.log_probe({"global_step": self._run.step + 1, **statistics})

    def _skip_or_halt(self, facts: StepFacts, loss: float, grad_norm: float, action: str) -> None:
        run, optim = self._run, self._run.args.optim
        is_spike = math.isfinite(loss) and math.isfinite(grad_norm)
        what = f"{_where(facts)}: loss {loss}, gradient norm {grad_norm} is {'a spike' if is_spike else 'not finite'}"
        skips = str([*run.args.data.skip_rows, [facts.first_row, facts.last_row]]).replace(" ", "")
        if action == "rewind":
            raise RewindAsked(facts.step, what)
        self._skips_in_a_row += 1
        run.shared["skipped_steps"] += 1
        if action == "skip" and self._skips_in_a_row <= optim.max_skips:
            log.warning("%s; the optimizer did not move", what)
            return
        limit = f", and so were the {optim.max_skips} steps before it" if action == "skip" else ""
        raise NonFiniteError(
            f"{what}{limit}. Nothing was updated. Since the data order is fixed, a restart meets these "
            f"rows again: pass over them with data.skip_rows='{skips}', or lower optim.lr"
        )

    def _report(self, facts: StepFacts, means: dict[str, float]) -> None:
        run = self._run
        record = {
            "global_step": facts.step,
            "acc_step": 0,
            **means,
            **({"loss/mean": sum(self._losses) / len(self._losses)} if len(self._losses) > 1 else {}),
            **({} if run.floor is None else {"loss/above_floor": means["loss/out"] - run.floor.nats}),
            "optim/lr": facts.lr,
            "optim/total_tokens": run.shared["total_tokens"] - (run.step - facts.step) * run.size.tokens_per_step,
            "optim/skipped_steps": run.shared["skipped_steps"],
            **({"optim/rewinds": len(run.shared[PASSED])} if PASSED in run.shared else {}),
            **self.meter.read(facts.step, facts.lap),
            **self.profiler.memory.report(),
            **run.loader.stats(),
            **run.manager.metrics(),
            **self._unreported,
        }
        self._unreported, self._losses = {}, []
        self.progress.report(record)
        if self._metrics is not None:
            self._metrics.log({key: value for key, value in record.items() if math.isfinite(value)})
            for published in run.manager.published_since:
                self._metrics.log_checkpoint({**published, "event": "published"})
        run.manager.published_since.clear()


def _where(facts: StepFacts) -> str:
    return f"step {facts.step} (rows {facts.first_row} to {facts.last_row})"
