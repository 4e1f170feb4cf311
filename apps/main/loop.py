"""The training loop, `train`, and the code before and after it.

A step is forward, backward and optimizer, plus two all-reduces of a few numbers: the label counts during backward, and
the logged statistics, read one step late.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path

from lingua.checkpoint.manager import SaveReport
from lingua.console import Progress
from lingua.distributed.meeting import told_to_others
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import first_given, from_main, pick_device, set_environment, start_world
from lingua.distributed.same_config import code_of
from lingua.eval.in_training import Evaluation, make_evaluation, make_measures
from lingua.profiling.profiler import Profiler
from lingua.profiling.windows import Requests, take_request
from lingua.run.folder import EXIT_FINISHED, describe_stop, end_asked_for
from lingua.run.metrics import VALIDATION_FILE, read_metrics
from lingua.run.startup import StartUp
from lingua.run.watchdog import Watchdog
from lingua.scheduler import job_end_s
from lingua.signals import STOP_REQUEST, SignalFlag, StopSignals, noted
from lingua.train.build import build_run, enter_next
from lingua.train.check import Checked
from lingua.train.learner import Run
from lingua.train.monitor import RewindAsked, StepMonitor
from lingua.train.rewind import rewind
from lingua.train.sample import check_prompt, continued
from lingua.train.start import (
    RunFolder,
    make_meter,
    open_run_folder,
    say_finished_already,
    say_goodbye,
    say_hello,
    settle_config,
    start_metrics,
    use_embedded_corpus,
)
from lingua.train.validate import validate

log = logging.getLogger(__name__)


def train(run: Run, watchdog: Watchdog, monitor: StepMonitor, evaluation: Evaluation) -> SaveReport:
    """Train until the last step, or until a rank is asked to stop; save, and return the outcome of the save.

    Raises NonFiniteError if a step went wrong and the config says to stop; then no further checkpoint is saved. If the
    config says to rewind, the steps after an earlier checkpoint are taken again.
    """
    args, profiler, is_through = run.args, monitor.profiler, False
    run.model.train()
    monitor.meter.start(run.step)
    monitor.begin()

    with profiler:
        profiler.start(run.step)
        while not is_through:
            try:
                take_steps(run, watchdog, monitor, evaluation)
                is_through = True
            except RewindAsked as asked:
                with watchdog.heartbeat.during("checkpoint"):
                    monitor.forget()
                    rewind(run, asked)
                monitor.meter = make_meter(run.args, run.size, run.world)  # it may be in an earlier phase
                monitor.rewound()

    job_ends_s = job_end_s(os.environ, args.checkpoint.grace_s, time.time()) if monitor.stop else None
    with watchdog.heartbeat.during("checkpoint"):
        report = run.manager.save(run.step, run.snapshot(), final=True, stopping=monitor.stop, deadline_s=job_ends_s)
    monitor.report_save(report)
    return report


def take_steps(run: Run, watchdog: Watchdog, monitor: StepMonitor, evaluation: Evaluation) -> None:
    """Take steps, with all that is due after each, until the last one or until a rank is asked to stop.

    Raises RewindAsked or NonFiniteError on all ranks if a step went wrong: one step late, but before it is saved.
    """
    args, size = run.args, run.size
    meter, profiler, batches = monitor.meter, monitor.profiler, run.batches()
    while run.step < size.n_steps and not monitor.stop:
        profiler.mark("rest")
        if run.step == run.phase.last:
            monitor.catch_up()
            run.manager.before_update()
            with watchdog.heartbeat.during("a new phase"):
                enter_next(run, run.manager)
            args, size, batches = run.args, run.size, run.batches()
            meter = monitor.meter = make_meter(args, size, run.world)
            meter.start(run.step)
        for _ in range(size.grad_acc_steps):
            with meter.loading():
                batch = next(batches)
            profiler.mark("data")
            loss = run.forward(batch)
            profiler.mark("forward")
            run.backward(loss)
            profiler.mark("backward")
        if args.probe_freq and (run.step + 1) % args.probe_freq == 0:
            monitor.report_probe(run.probe())
            profiler.mark("rest")
        gradient = run.gradient()
        run.manager.before_update()
        done = run.update(gradient)
        profiler.mark("optimizer")

        watchdog.heartbeat.beat(run.step)
        monitor.submit(done, stop_asked=watchdog.asked)
        evaluation.look()
        if run.step % args.gc_collect_freq == 0:
            gc.collect()
        if args.validation.every and run.step % args.validation.every == 0 and run.step < size.n_steps:
            with meter.paused(), watchdog.heartbeat.during("validation"):
                monitor.report_validation(validate(run, watchdog))
        if args.sample_every and run.step % args.sample_every == 0 and run.step < size.n_steps:
            monitor.catch_up()
            with meter.paused(), watchdog.heartbeat.during("sample"):
                monitor.report_sample(continued(run, args.sample_prompt or ""))
        if (run.manager.is_due(run.step) or monitor.save) and run.step < size.n_steps:
            monitor.catch_up()  # a step is saved only after it was found to be good
            monitor.save = False
            with meter.paused(), watchdog.heartbeat.during("checkpoint"):
                report = run.manager.save(run.step, run.snapshot())
            monitor.report_save(report)
            with meter.paused():
                monitor.note_stop(evaluation.saved(report))
    monitor.catch_up()


# -- before and after --------------------------------------------------------------------------------------------


def start(checked: Checked, words: list[str], place: RankInfo, startup: StartUp) -> int:
    """Start or resume the run that a checked config describes; return the exit code."""
    args, size = checked.args, checked.resolved
    with told_to_others(place):
        device = pick_device(args.device, place)
        set_environment(args.env, place, on_gpu=device.type == "cuda", unset=args.launcher.env.unset)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals(args.signals_that("stop")))
        requests, save_asked = Requests(), SignalFlag()
        stack.enter_context(noted(args.signals_that("profile"), requests.by_signal))
        stack.enter_context(noted(args.signals_that("save"), save_asked))
        watchdog = stack.enter_context(Watchdog(place.rank, signals, args.watchdog, Path(args.dump_dir)))
        with watchdog.reporting():
            same = checked.frozen | code_of(["lingua", args.app, *args.plugins])
            world = stack.enter_context(start_world(args.distributed, place, device, same))
            if world.peers is not None:
                watchdog.join(world.peers)
            folder = stack.enter_context(open_run_folder(checked, words, world, lambda: watchdog.refused))
            watchdog.open(folder.attempt, folder.is_new)
            startup.reached("ranks")
            if folder.lock is not None:
                folder.lock.on_lost = watchdog.fail
                folder.lock.on_stop_request = lambda: signals.ask(STOP_REQUEST)
                folder.lock.on_beat = lambda: look_for_request(folder, requests)
                release = folder.lock.release
                watchdog.at_exit.append(lambda: release(remove=watchdog.refused))
            use_embedded_corpus(args, *(phase.args for phase in checked.phases))
            measures = make_measures(args, checked.phases, world)
            run = build_run(args, checked.phases, folder.path, world, folder.lock, stack, startup)
            meter = make_meter(run.args, run.size, world)
            if args.sample_prompt is not None:
                check_prompt(run, args.sample_prompt)
            settle_config(run, checked, folder.attempt)
            watchdog.heartbeat.step = run.step
            say_hello(run, checked, meter, folder.attempt)
            metrics = start_metrics(run, folder.attempt, stack)
            progress = stack.enter_context(Progress(shown=world.is_main))
            progress.begin(args.name, size.n_steps, "steps", done=run.step)
            watchdog.at_exit.append(progress.stop)
            evaluation = make_evaluation(run, watchdog, measures, metrics, folder.attempt)
            profiler = Profiler(args.profiling, folder.path, device, place.rank, requests)
            monitor = StepMonitor(run, meter, progress, metrics, profiler, save_asked, startup)
            startup.reached("trackers")
            exit_code = train_to_the_end(run, watchdog, monitor, evaluation, words)
            evaluation.end(exit_code)
            return exit_code


def look_for_request(folder: RunFolder, requests: Requests) -> None:
    """Take a request of `lingua profile` to this attempt."""
    request = take_request(folder.path, folder.attempt)
    if request is not None:
        requests.ask(request)


def train_to_the_end(
    run: Run, watchdog: Watchdog, monitor: StepMonitor, evaluation: Evaluation, words: list[str]
) -> int:
    """Run the loop with validation, evaluation and samples around it; write stop.json and return the exit code."""
    args, n_steps = run.args, run.size.n_steps
    report: SaveReport | None = None
    monitor.note_stop(evaluation.begin())
    if run.step >= n_steps and was_validated(run):
        if monitor.stop:
            return say_stopped(run, watchdog, None)
        say_finished_already(run)
        describe_end(run, "finished", EXIT_FINISHED)
        return EXIT_FINISHED
    if run.step < n_steps:
        if run.step == 0 and args.validation.at_ends:
            run.shared["validation_at_start"] = monitor.report_validation(validate(run, watchdog))
        elif not was_validated(run):  # the last attempt stopped between step and validation
            monitor.report_validation(validate(run, watchdog))
        if not monitor.stop or run.manager.owes(run.step):  # an owed checkpoint must reach the disk before the job ends
            gc.disable()
            report = train(run, watchdog, monitor, evaluation)
            gc.enable()
    stopped, after = run.step < n_steps, {}
    if not stopped and run.args.validation.at_ends:  # of the last phase
        with watchdog.heartbeat.during("validation"):
            losses = validate(run, watchdog)
        stopped, after = losses is None, monitor.report_validation(losses)
    if not stopped and report is not None:
        stopped = evaluation.saved(report, last=True)
    if stopped:
        return say_stopped(run, watchdog, report.error if report is not None else None)
    monitor.progress.stop()  # or its bar would mix with the output below
    if args.sample_prompt is not None:
        monitor.report_sample(continued(run, args.sample_prompt))
    say_goodbye(run, words, run.shared.get("validation_at_start", {}), after)
    describe_end(run, "finished", EXIT_FINISHED)
    return EXIT_FINISHED


def say_stopped(run: Run, watchdog: Watchdog, unsaved: str | None) -> int:
    """Log that the run was asked to stop, write stop.json and return the exit code. Collective.

    `unsaved`: why there is no checkpoint of the last step, or None if there is one.
    """
    received = first_given(watchdog.received)
    assert received is not None, "a reduction said so"
    reason, exit_code = end_asked_for(received)
    if run.world.is_main:
        if unsaved is None:
            log.info("stopped by %s after step %d, saved; the same command goes on from there", received, run.step)
        else:
            log.warning("stopped by %s after step %d: %s", received, run.step, unsaved)
    describe_end(run, reason, exit_code, signal=received, unsaved=unsaved)
    return exit_code


def was_validated(run: Run) -> bool:
    """Return whether no validation is due at this step; a kill may come between step and validation. Collective."""
    every, at_end = run.args.validation.every, run.step >= run.size.n_steps
    due = run.args.validation.at_ends if at_end else run.step and every and run.step % every == 0
    if not due or not run.held_out:
        return True
    file = run.run_dir / VALIDATION_FILE
    return from_main(lambda: any(r["global_step"] == run.step for r in read_metrics(file)))


def describe_end(run: Run, reason: str, exit_code: int, **more: str | None) -> None:
    """Write stop.json."""
    if run.world.is_main:
        describe_stop(run.run_dir, reason, exit_code, step=run.step, **more)
