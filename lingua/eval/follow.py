"""What `eval` does once its command line is understood: measure one checkpoint, or those of a run as they appear.

Promise: see `eval.py`. All ranks share each evaluation, rank 0 decides for all.
Cost: each rank holds the model's weights once, while it evaluates; nothing while it waits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingua.checkpoint.lookup import Checkpoint
from lingua.config.command_line import CommandLine
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.train import TrainArgs
from lingua.console import show_json
from lingua.distributed.process_group import (
    find_place,
    from_main,
    on_every_rank,
    pick_device,
    set_environment,
    start_world,
)
from lingua.distributed.same_config import code_of
from lingua.eval.evaluator import Beat, Evaluator, evaluation_tracker, write_results
from lingua.eval.harness_tasks import be_offline
from lingua.eval.measures import Measures
from lingua.eval.spawn import alone
from lingua.files import RunError, make_folder
from lingua.logger import start_logging
from lingua.run.folder import EXIT_FINISHED, end_asked_for
from lingua.signals import StopSignals
from lingua.slurm import this_allocation

if TYPE_CHECKING:
    from lingua.eval.order import Order

log = logging.getLogger(__name__)

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR2")


def carry_out(order: Order, run_args: TrainArgs, args: EvalArgs, line: CommandLine) -> int:
    """Evaluate what is ordered; returns the exit code."""
    place = find_place()
    start_logging(place.rank, own_packages=("lingua", "apps", order.app))
    if this_allocation(os.environ) is not None:  # compute nodes: what is not in the cache would only be waited for
        be_offline()
    device = pick_device(args.generator.device, place)
    set_environment(run_args.env, place, on_gpu=device.type == "cuda")
    timeout_s = int(3600 * args.timeout_hours) + 600  # ranks may wait for the slowest one's share
    same = {**run_args.model_dump(mode="json"), "eval": args.model_dump(mode="json")}
    same |= code_of(["lingua", run_args.app, *run_args.plugins])
    with start_world(DistributedArgs(timeout_s=timeout_s), place, device, same) as world:
        measures = on_every_rank(lambda: Measures(run_args, args, world))
        if order.follow:
            return follow_alone(Path(order.place), measures, line)
        found = measures.measure(order.place, lambda: None)
    if place.is_main:
        show(order.place, found, args.dump_dir, as_json=bool(line.flags.get("json")))
    return 0


def follow_alone(run_dir: Path, measures: Measures, line: CommandLine) -> int:
    """`follow`, with --alone unless the run has another evaluator that it started."""
    with ExitStack() as stack:
        if line.flags.get("alone") and not from_main(lambda: stack.enter_context(alone(run_dir))):
            return EXIT_FINISHED
        return follow(run_dir, measures, once=bool(line.flags.get("once")))


def follow(run_dir: Path, measures: Measures, *, once: bool) -> int:
    """Evaluate the run's checkpoints as they appear; returns the exit code. Rank 0 decides for all."""
    if not measures.world.is_main:
        return _obey(measures)
    with StopSignals(SIGNALS) as signals:

        def measure(checkpoint: Checkpoint, beat: Beat) -> Mapping[str, Any]:
            ckpt = f"{checkpoint.run_dir}@{checkpoint.step}"
            return measures.measure(from_main(lambda: ckpt), beat)

        def sleep(seconds: float) -> None:
            from_main(lambda: "")  # a sign of life
            signals.wait(seconds)

        def is_stopping() -> bool:
            return signals.received is not None

        tracker = evaluation_tracker(measures.run_args, run_dir)
        evaluator = Evaluator(run_dir, measures.args, measure, on_record=tracker.log, stopping=is_stopping, sleep=sleep)
        log.info("evaluating the checkpoints of %s", run_dir)
        try:
            why = evaluator.follow(once=once)
        finally:
            from_main(_nothing)
            tracker.close(hurry=signals.received is not None)
    log.info("the evaluator of %s ends: %s", run_dir, why)
    return EXIT_FINISHED if signals.received is None else end_asked_for(signals.received)[1]


def _obey(measures: Measures) -> int:
    """Be one of the other ranks, until rank 0 has nothing more to do."""
    with StopSignals(SIGNALS):  # rank 0 gets them too, and decides
        while (ckpt := from_main(_nothing)) is not None:
            try:
                if ckpt:
                    measures.measure(ckpt, lambda: None)
            except (RunError, OSError, ValueError) as error:  # rank 0 has heard of it, and writes it down
                log.warning("%s", error)
    return EXIT_FINISHED


def _nothing() -> str | None:
    return None


def show(ckpt: str, found: Mapping[str, Any], dump_dir: str | None, *, as_json: bool) -> None:
    """Print results, and write them where they are wanted."""
    if dump_dir:
        write_results(make_folder(Path(dump_dir), "eval.dump_dir"), {"ckpt": ckpt}, found)
    metrics = {name: value for name, value in found.items() if name not in ("details", "samples")}
    if as_json:
        show_json({"ckpt": ckpt, "details": found.get("details", {}), "metrics": metrics})
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:,.6g}")
