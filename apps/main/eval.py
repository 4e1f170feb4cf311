"""Evaluate checkpoints: one by hand, or each one of a run as it appears.

usage: python -m apps.main.eval [ckpt=]RUN[@STEP] [config=FILE] [key=value ...]      by hand
       python -m apps.main.eval follow=RUN [config=FILE] [key=value ...]             as they appear, until the run ends
       python -m apps.main.eval prefetch CONFIG [key=value ...]                      fetch data sets, on a login node

  RUN[@STEP]      a run (its newest checkpoint), a step of it, a checkpoint folder, or a folder or file of weights
  config=FILE     what to measure, such as apps/main/configs/eval.yaml; or the config of a run, for weights that have
                  none near them. Without it: the section `eval` of the run's config
  key=value       a key of that section: validation.max_steps=100 harness=null newest_first=true
  --once          with follow: end as soon as nothing waits
  --alone         with follow: leave if another one that was started so is there; what a run starts by itself is
  --json          print the results as JSON

By hand the results are printed, and with dump_dir=FOLDER written to FOLDER/results.json. Following writes
evals/<step>/results.json and metrics.eval.jsonl into the run folder; it may be killed and started again at any time,
and started several times to share the work. Started by torchrun or srun, all ranks share each evaluation.
Cost: each rank holds the model's weights once, while it evaluates; nothing while it waits.
Exit codes: 0 all is evaluated, 75 told by a signal to stop, 130 Ctrl-C, 2 bad config, 1 other failures.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.output import show_json
from lingua.args import ConfigError
from lingua.checkpoint.lookup import Checkpoint
from lingua.compose import compose
from lingua.distributed import find_place, from_main, on_every_rank, pick_device, set_environment, start_world
from lingua.entry import CommandLine, app_module, choose_app, parse_command_line, run_main, with_ckpt
from lingua.evalargs import EvalArgs
from lingua.evalstart import alone
from lingua.evaluator import Beat, Evaluator, evaluation_tracker, write_results
from lingua.files import RunError, make_folder
from lingua.freeze import CONFIG_FILE
from lingua.harness import be_offline, load_tasks
from lingua.layers import stack_layers
from lingua.logger import start_logging
from lingua.runfolder import EXIT_FINISHED, end_asked_for
from lingua.schema import DistributedArgs
from lingua.signals import StopSignals
from lingua.slurm import this_allocation

from .args import TrainArgs
from .described import config_of, described
from .measures import Measures

log = logging.getLogger(f"{__package__}.eval")

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR2")


# -- what is to be done --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    place: str
    """The checkpoint, or the run to follow."""
    follow: bool
    run_config: Path
    """Config that tells the model."""
    measures: str | None
    """Config that says what is measured; None: the run's own."""
    overlays: list[str]
    overrides: list[str]

    def compose(self) -> tuple[TrainArgs, EvalArgs]:
        """Config of the run, and what to measure. Raises ConfigError."""
        if self.measures is None and self.run_config.suffix == ".json":  # nothing of ours stands beside it
            run_args = described(self.run_config)
            args = compose(None, self.overlays, self.overrides, EvalArgs).args
        elif self.measures is None:
            overrides = [f"eval.{word}" for word in self.overrides]
            run_args = compose(str(self.run_config), self.overlays, overrides, TrainArgs).args
            args = run_args.eval or EvalArgs()
        else:
            run_args = described(self.run_config)
            args = compose(self.measures, self.overlays, self.overrides, EvalArgs).args
        if self.follow and args.dump_dir:
            raise ConfigError(f"eval.dump_dir is {args.dump_dir}: results go to {self.place}/evals; take it out")
        return run_args, args


def read_command_line(line: CommandLine) -> Order:
    """Raises ConfigError."""
    own, overrides = {}, []
    for word in line.overrides:
        name, _, value = word.partition("=")
        if name in ("ckpt", "ckpt_dir", "follow", "app"):
            own[name] = value
        else:
            overrides.append(word)
    place = own.get("follow") or own.get("ckpt") or own.get("ckpt_dir")
    if not place:
        raise ConfigError("command line: nothing to evaluate; write ckpt=RUN_OR_FOLDER, or follow=RUN")
    if "follow" in own and not (Path(place) / CONFIG_FILE).is_file():
        raise ConfigError(f"follow={place}: no run, it has no {CONFIG_FILE}; start the run first")
    if line.config is not None and not _is_about_measures(line.config):
        return Order(place, "follow" in own, Path(line.config), None, line.overlays, overrides)
    return Order(place, "follow" in own, config_of(place), line.config, line.overlays, overrides)


def _is_about_measures(config: str) -> bool:
    return stack_layers(config, [], [], EvalArgs).tree.keys() <= EvalArgs.model_fields.keys()


# -- entry ---------------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """Evaluate what the words of a command line say; returns the exit code."""
    if words[:1] == ["prefetch"]:
        return prefetch(words[1:])
    line = parse_command_line(with_ckpt(words), ["once", "json", "alone"])
    if line.flags.get("help"):
        print(__doc__)
        return 0
    place = find_place()
    start_logging(place.rank, own_packages=("lingua", str(__package__)))
    order = read_command_line(line)
    app = str(dict(word.split("=", 1) for word in line.overrides).get("app", ""))
    if (app := app or choose_app(CommandLine(config=str(order.run_config)))) != __package__:
        return app_module(app, "eval").main(words)
    run_args, args = order.compose()
    if this_allocation(os.environ) is not None:  # compute nodes: what is not in the cache would only be waited for
        be_offline()
    device = pick_device(args.generator.device, place)
    set_environment(run_args.env, place, on_gpu=device.type == "cuda")
    timeout_s = int(3600 * args.timeout_hours) + 600  # ranks may wait for the slowest one's share
    with start_world(DistributedArgs(timeout_s=timeout_s), place, device) as world:
        measures = on_every_rank(lambda: Measures(run_args, args, world))
        if order.follow:
            return follow_alone(Path(order.place), measures, line)
        found = measures.measure(order.place, lambda: None)
    if place.is_main:
        show(order.place, found, args.dump_dir, as_json=bool(line.flags.get("json")))
    return 0


def prefetch(words: list[str]) -> int:
    """Fetch the data of a config's harness tasks into Hugging Face's cache; jobs then read it from there."""
    line = parse_command_line(words)
    if line.config is None:
        raise ConfigError("command line: no config whose data sets are fetched; write lingua eval prefetch CONFIG")
    if _is_about_measures(line.config):
        args = compose(line.config, line.overlays, line.overrides, EvalArgs).args
    else:
        args = compose(line.config, line.overlays, line.overrides, TrainArgs).args.eval or EvalArgs()
    if args.harness is None or not args.harness.tasks:
        print(f"{line.config} names no harness tasks; there is nothing to fetch")
        return 0
    for name in load_tasks(args.harness):
        print(f"{name}: there")
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
            tracker.close()
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


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
