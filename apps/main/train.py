"""Train: `python -m apps.main.train config=apps/main/configs/debug.yaml [key=value ...]`. The loop is `train`.

Promise: killed at any line, the same command goes on from the newest published checkpoint; with `deterministic` bit
for bit. A stop signal on any rank ends all ranks after the same step, with a checkpoint; a failure of any rank ends all
within seconds (lingua/guard.py). Exit codes: 0 finished, 75 saved and asks to be started again, 130 ended by a person
(saved), 76 hung, 1 and 2 failures.
Cost beside forward, backward and optimizer: one all-reduce of a few numbers per step, read one step late.

Letters: B rows of a micro step, S positions, G rows of a step over all ranks.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lingua.agreement import code_of
from lingua.args import ConfigError
from lingua.attention import RowDocuments
from lingua.checkpoint.manager import SaveReport
from lingua.distributed import Votes, find_place, first_given, from_main, pick_device, set_environment, start_world
from lingua.entry import leave, parse_command_line, run_main
from lingua.files import RunError
from lingua.guard import Guard
from lingua.logger import start_logging
from lingua.lossscale import is_overflow
from lingua.metrics import VALIDATION_FILE, MetricLogger, read_metrics
from lingua.optim import measure_gradient, optimizer_step
from lingua.parallel import begin_micro_step, forward_precision
from lingua.peers import Peers
from lingua.probe import probe
from lingua.profilewindows import Requests, take_request
from lingua.profiling import Profiler
from lingua.progress import Lap, Meter, ProgressLine
from lingua.runfolder import EXIT_FINISHED, describe_stop, end_asked_for
from lingua.signals import STOP_REQUEST, StopSignals, noted
from lingua.slurm import job_end_s

from .build import Run, build_run
from .check import load
from .evaluate import Evaluation, make_evaluation, make_measures
from .start import (
    RunFolder,
    make_meter,
    open_run_folder,
    say_finished_already,
    say_goodbye,
    say_hello,
    say_sample,
    settle_config,
    start_metrics,
    use_embedded_corpus,
)
from .validate import validate

log = logging.getLogger(f"{__package__}.train")  # also under `python -m`, where __name__ is "__main__"

HELP = """Train, or go on with a run that was stopped or killed.

usage: python -m apps.main.train [config=]FILE [+OVERLAY ...] [key=value ...] [--accept-change] [--debug]

  FILE             a YAML config; apps/main/configs/debug.yaml is the one to begin with
  +OVERLAY         a YAML file, or the name of one in configs/overlays, on top of it
  key=value        any key of the config, dotted: optim.lr=1e-3; a group pick: model=llama_7B
  --accept-change  go on although a key that changes what the run computes is not as it was
  --debug          show tracebacks

`lingua check FILE` tells what would run; `lingua schema --reference` lists every key.
Exit codes: 0 finished, 75 saved and asks to be started again, 130 ended by a person: Ctrl-C or `lingua stop` (saved),
2 bad config, 76 hung, 1 other failures."""


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


def train(run: Run, guard: Guard, judge: Judge) -> SaveReport:
    """Train until the last step, or until a rank is asked to stop, and save; returns how that went.

    Raises NonFiniteError when a step went wrong and `optim.on_nonfinite` or `max_skips` says to stop; parameters and
    optimizer are then as before that step, and nothing is saved on top of the last checkpoint.
    """
    args, size, device, loss_scale = run.args, run.size, run.world.device, run.loss_scale
    parameters = list(run.model.parameters())
    precision = forward_precision(run.model, args.distributed, device)
    batches = run.batches()
    votes: Votes[StepFacts] = Votes(device)
    meter, profiler = judge.meter, judge.profiler
    halted = torch.zeros((), dtype=torch.bool, device=device)  # once set, the optimizer moves no more
    run.model.train()
    meter.start(run.step)
    judge.note("begun")

    with profiler:
        profiler.start(run.step)
        while run.step < size.n_steps and not judge.stop:
            lr, rows = run.lr, []
            loss_sum = torch.zeros((), device=device)
            profiler.mark("rest")
            for micro_step in range(size.grad_acc_steps):
                with meter.loading():
                    batch, tokens, labels, documents = next(batches)  # (B, S) each
                profiler.mark("data")
                rows += [int(batch.rows.min()), int(batch.rows.max())]
                is_last = micro_step == size.grad_acc_steps - 1
                begin_micro_step(run.model, args.distributed, is_last=is_last)
                loss = run.loss_share(precision, tokens, labels, documents)
                profiler.mark("forward")
                run.backward(loss)
                profiler.mark("backward")
                loss_sum += loss.detach()
                if is_last and args.probe_freq and (run.step + 1) % args.probe_freq == 0:
                    judge.report_probe(probe_batch(run, precision, tokens, labels, documents))
                    profiler.mark("rest")

            grad_norm, finite, divisor = measure_gradient(parameters, args.optim.clip, run.loss_factor)
            if args.optim.on_nonfinite == "stop":
                halted |= ~finite if loss_scale is None else ~finite & ~loss_scale.can_mend(loss_sum)
            moves = finite & ~halted
            run.manager.before_update()
            optimizer_step(run.optimizer, lr, moves, divisor)
            run.optimizer.zero_grad()
            profiler.mark("optimizer")
            run.advance()
            guard.pulse.beat(run.step)

            facts = StepFacts(run.step, lr, min(rows), max(rows) + size.dp_size - 1, meter.lap())
            numbers = [loss_sum, grad_norm, ~moves, float(guard.asked), *profiler.requests.ballot()]
            judge.hear(votes.cast(facts, numbers if run.loss_factor is None else [*numbers, run.loss_factor]))
            if loss_scale is not None:
                loss_scale.update(finite)
            profiler.step(run.step)
            judge.progress.advance(run.step)
            judge.evaluation.look()
            if run.step % args.gc_collect_freq == 0:
                gc.collect()
            if args.validation.every and run.step % args.validation.every == 0 and run.step < size.n_steps:
                with meter.paused(), guard.pulse.during("validation"):
                    judge.report_validation(validate(run, guard))
            if run.manager.is_due(run.step) and run.step < size.n_steps:
                judge.hear(votes.read())  # what is saved must have been judged
                with meter.paused(), guard.pulse.during("checkpoint"):
                    report = run.manager.save(run.step, run.snapshot())
                judge.report_save(report)
                with meter.paused():
                    judge.hear_of_stop(judge.evaluation.saved(report))
        judge.hear(votes.read())

    job_ends_s = job_end_s(os.environ, args.checkpoint.grace_s, time.time()) if judge.stop else None
    with guard.pulse.during("checkpoint"):
        report = run.manager.save(run.step, run.snapshot(), final=True, stopping=judge.stop, deadline_s=job_ends_s)
    judge.report_save(report)
    return report


def probe_batch(
    run: Run, precision: AbstractContextManager, tokens: Tensor, labels: Tensor, documents: RowDocuments | None
) -> dict[str, float]:
    """Statistics of the model on a micro batch, and of the gradients that are there. Collective."""

    def forward() -> None:
        with precision:
            run.model(tokens, labels=labels, documents=documents, loss=run.validation_loss)

    found = probe(run.model, run.world.device, forward, None if documents is None else documents.ids)
    if run.loss_factor is None:
        return found
    factor = run.loss_factor.item()
    return {key: value / factor if "/grad/" in key else value for key, value in found.items()}


class Judge:
    """Reads each step's votes: loss, gradient norm, whether it went wrong, whether to stop, what to profile."""

    def __init__(
        self,
        run: Run,
        meter: Meter,
        progress: ProgressLine,
        metrics: MetricLogger | None,
        evaluation: Evaluation,
        profiler: Profiler,
    ) -> None:
        self.stop = False
        """A rank has been asked to stop: the same answer on all ranks after the same step."""
        self.meter = meter
        self.evaluation = evaluation
        self.progress = progress
        self.profiler = profiler
        self._run = run
        self._metrics = metrics
        self._skips_in_a_row = 0

    def hear(self, verdict: tuple[StepFacts, list[float]] | None) -> None:
        if verdict is None:
            return
        facts, (loss_sum, norm_sum, bad_ranks, stop_ranks, signalled, asked, *scale_sum) = verdict
        n_ranks = self._run.world.place.world_size
        self.profiler.hear([signalled, asked])
        self.hear_of_stop(stop_ranks > 0)
        scale = scale_sum[0] / n_ranks if scale_sum else None
        if bad_ranks > 0 and scale is not None and is_overflow(loss_sum, scale):
            self._run.shared["skipped_steps"] += 1
            log.info("step %d overflowed at loss scale %g: halved; the optimizer did not move", facts.step, scale)
        elif bad_ranks > 0:
            self._skip_or_halt(facts, loss_sum / n_ranks, norm_sum / n_ranks)
        elif not math.isfinite(loss_sum):  # only a loss that does not depend on the parameters can do that
            raise NonFiniteError(f"step {facts.step}: the loss is {loss_sum}, although its gradient is finite")
        else:
            self._skips_in_a_row = 0
        if facts.step % self._run.args.logging.freq == 0 or facts.step == self._run.size.n_steps:
            self._report(facts, loss_sum / n_ranks, norm_sum / n_ranks, scale)

    def hear_of_stop(self, agreed: bool) -> None:
        """`agreed`: by all ranks, to stop."""
        if agreed and not self.stop:
            self.stop = True
            if self._metrics is not None:
                self._metrics.hurry()
            log.info("asked to stop: saving after this step (a second Ctrl-C would leave without saving)")

    def report_validation(self, losses: dict[str, float] | None) -> dict[str, float]:
        """Held-out losses at the present step, handed through. None: all ranks agreed to stop instead."""
        if losses is None:
            self.hear_of_stop(True)
            return {}
        seconds = {"seconds": losses["seconds"]} if losses else {}
        losses = {key: value for key, value in losses.items() if key != "seconds"}  # no clock in a checkpoint
        if self._metrics is not None and losses:
            log.info("validation at step %d: %s", self._run.step, "  ".join(f"{k} {v:.4f}" for k, v in losses.items()))
            self._metrics.log_validation({"global_step": self._run.step, **losses, **seconds})
        return losses

    def report_save(self, report: SaveReport) -> None:
        """How a save went."""
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
        """What a probe has seen in the step that is about to end."""
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

    def _report(self, facts: StepFacts, loss: float, grad_norm: float, loss_scale: float | None) -> None:
        run = self._run
        record = {
            "global_step": facts.step,
            "acc_step": 0,
            "loss/out": loss,
            "optim/grad_norm": grad_norm,
            "optim/lr": facts.lr,
            "optim/total_tokens": run.shared["total_tokens"] - (run.step - facts.step) * run.size.tokens_per_step,
            "optim/skipped_steps": run.shared["skipped_steps"],
            **({} if loss_scale is None else {"optim/loss_scale": loss_scale}),
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


# -- entry -------------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """Train what the words of a command line say; returns the exit code."""
    line = parse_command_line(words, ["accept-change"])
    if line.flags.get("help"):
        print(HELP)
        return 0
    place = find_place()
    start_logging(place.rank, own_packages=("lingua", str(__package__)))
    checked = load(line, place.world_size)
    args, size = checked.args, checked.resolved
    if args.app != __package__:
        raise ConfigError(f"app is {args.app}, but this is {__package__}.train; type python -m {args.app}.train")
    device = pick_device(args.device, place)
    set_environment(args.env, place, on_gpu=device.type == "cuda")
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals(args.stop_signals))
        requests = Requests()
        if args.profiling.signal not in (None, *args.stop_signals):
            stack.enter_context(noted(args.profiling.signal, requests.signal))
        guard = stack.enter_context(Guard(place.rank, signals, args.watchdog, Path(args.dump_dir)))
        with guard.reporting():
            same = checked.frozen | code_of(["lingua", args.app, *args.plugins])
            world = stack.enter_context(start_world(args.distributed, place, device, same))
            if world.store is not None:
                guard.join(Peers(world.store, place.rank, place.world_size))
            folder = stack.enter_context(open_run_folder(checked, words, world))
            guard.open(folder.incarnation)
            if folder.lock is not None:
                folder.lock.on_stop_request = lambda: signals.ask(STOP_REQUEST)
                folder.lock.on_beat = lambda: look_for_request(folder, requests)
                guard.last_acts.append(folder.lock.release)
            use_embedded_corpus(args)
            measures = make_measures(args, world)
            meter = make_meter(args, size, world)  # measures the machine before loader workers use it
            run = build_run(args, size, folder.path, world, folder.lock, stack)
            settle_config(run, checked, folder.incarnation)
            guard.pulse.step = run.step
            say_hello(run, checked, meter, folder.incarnation)
            metrics = start_metrics(run, folder.incarnation, stack)
            progress = stack.enter_context(ProgressLine(args.name, size.n_steps, shown=world.is_main))
            guard.last_acts.append(progress.stop)
            evaluation = make_evaluation(run, guard, measures, metrics, folder.incarnation)
            profiler = Profiler(args.profiling, folder.path, device, place.rank, requests)
            judge = Judge(run, meter, progress, metrics, evaluation, profiler)
            exit_code = train_to_the_end(run, guard, judge, words)
            evaluation.end(exit_code)
            return exit_code


def look_for_request(folder: RunFolder, requests: Requests) -> None:
    """Take what `lingua profile` asks of this start."""
    request = take_request(folder.path, folder.incarnation)
    if request is not None:
        requests.ask(request)


def train_to_the_end(run: Run, guard: Guard, judge: Judge, words: list[str]) -> int:
    """The loop with what comes before and after it; leaves stop.json and returns the exit code."""
    args, n_steps = run.args, run.size.n_steps
    report: SaveReport | None = None
    judge.hear_of_stop(judge.evaluation.begin())
    if run.step >= n_steps and was_validated(run):
        if judge.stop:
            return say_stopped(run, guard, None)
        say_finished_already(run)
        describe_end(run, "finished", EXIT_FINISHED)
        return EXIT_FINISHED
    if run.step < n_steps:
        if run.step == 0 and args.validation.at_ends:
            run.shared["validation_at_start"] = judge.report_validation(validate(run, guard))
        elif not was_validated(run):  # a stop came in between
            judge.report_validation(validate(run, guard))
        gc.disable()
        report = None if judge.stop else train(run, guard, judge)  # stopped already: there is nothing new
        gc.enable()
    stopped, after = run.step < n_steps, {}
    if not stopped and args.validation.at_ends:
        with guard.pulse.during("validation"):
            losses = validate(run, guard)
        stopped, after = losses is None, judge.report_validation(losses)
    if not stopped and report is not None:
        stopped = judge.evaluation.saved(report, last=True)
    if stopped:
        return say_stopped(run, guard, report.error if report is not None else None)
    if args.sample_prompt is not None:
        say_sample(run, args.sample_prompt)
    say_goodbye(run, words, run.shared.get("validation_at_start", {}), after)
    describe_end(run, "finished", EXIT_FINISHED)
    return EXIT_FINISHED


def say_stopped(run: Run, guard: Guard, unsaved: str | None) -> int:
    """Leave the word that the run was asked to stop; `unsaved`: why without a checkpoint. Returns the exit code.

    Collective.
    """
    received = first_given(guard.received)
    assert received is not None, "the votes said so"
    reason, exit_code = end_asked_for(received)
    if run.world.is_main:
        if unsaved is None:
            log.info("stopped by %s after step %d, saved; the same command goes on from there", received, run.step)
        else:
            log.warning("stopped by %s after step %d: %s", received, run.step, unsaved)
    describe_end(run, reason, exit_code, signal=received, unsaved=unsaved)
    return exit_code


def was_validated(run: Run) -> bool:
    """Whether nothing is owed at this step: a kill or a stop may come between a step and its validation. Collective."""
    every, at_end = run.args.validation.every, run.step >= run.size.n_steps
    due = run.args.validation.at_ends if at_end else run.step and every and run.step % every == 0
    if not due or not run.held_out:
        return True
    file = run.run_dir / VALIDATION_FILE
    return from_main(lambda: file.is_file() and any(r["global_step"] == run.step for r in read_metrics(file)))


def describe_end(run: Run, reason: str, exit_code: int, **more: str | None) -> None:
    """Leave stop.json."""
    if run.world.is_main:
        describe_stop(run.run_dir, reason, exit_code, step=run.step, **more)


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
