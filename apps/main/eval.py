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
Cost: see follow.py. What is wrong with the words is told without torch.
Exit codes: 0 all is evaluated, 75 told by a signal to stop, 130 Ctrl-C, 2 bad config, 1 other failures.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from lingua.args import ConfigError
from lingua.compose import compose
from lingua.entry import CommandLine, app_module, choose_app, leave, parse_command_line, run_main, with_ckpt
from lingua.evalargs import EvalArgs
from lingua.evaltasks import load_tasks
from lingua.freeze import CONFIG_FILE
from lingua.layers import stack_layers

from .args import TrainArgs
from .described import config_of, described

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
    order = read_command_line(line)
    app = str(dict(word.split("=", 1) for word in line.overrides).get("app", ""))
    if (app := app or choose_app(CommandLine(config=str(order.run_config)))) != __package__:
        return app_module(app, "eval").main(words)
    run_args, args = order.compose()
    from .follow import carry_out

    return carry_out(order, run_args, args, line)


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


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
