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

from lingua.config.base import ConfigError
from lingua.config.command_line import (
    app_module,
    leave,
    parse_command_line,
    run_main,
    with_ckpt,
)
from lingua.config.compose import compose
from lingua.config.keys.eval import EvalArgs
from lingua.eval.harness_tasks import load_tasks
from lingua.eval.order import is_about_measures, read_command_line

from .args import TrainArgs


def main(words: list[str]) -> int:
    """Evaluate what the words of a command line say; returns the exit code."""
    if words[:1] == ["prefetch"]:
        return prefetch(words[1:])
    line = parse_command_line(with_ckpt(words), ["once", "json", "alone"])
    if line.flags.get("help"):
        print(__doc__)
        return 0
    order = read_command_line(line)
    if order.app != __package__:
        return app_module(order.app, "eval").main(words)
    run_args, args = order.compose()
    from lingua.eval.follow import carry_out

    return carry_out(order, run_args, args, line)


def prefetch(words: list[str]) -> int:
    """Fetch the data of a config's harness tasks into Hugging Face's cache; jobs then read it from there."""
    line = parse_command_line(words)
    if line.config is None:
        raise ConfigError("command line: no config whose data sets are fetched; write lingua eval prefetch CONFIG")
    if is_about_measures(line.config):
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
