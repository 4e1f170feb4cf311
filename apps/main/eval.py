"""Evaluate checkpoints: one by hand, or each one of a run as it appears.

usage: python -m apps.main.eval [ckpt=]RUN[@STEP] [config=FILE] [key=value ...]      by hand
       python -m apps.main.eval follow=RUN [config=FILE] [key=value ...]             as they appear, until the run ends
       python -m apps.main.eval prefetch CONFIG [key=value ...]                      fetch data sets, on a login node

  RUN[@STEP]      a run (its newest checkpoint), a step of it, a checkpoint folder, or a folder or file of weights
  config=FILE     what to measure, such as apps/main/configs/eval.yaml; or the config of a run, for weights that have
                  none near them. Without it: the section `eval` of the run's config
  key=value       a key of that section: validation.max_steps=100 harness=null newest_first=true
  --once          with follow: end as soon as nothing waits
  --slurm         with follow: submit a Slurm job for each checkpoint; needs neither GPU nor torch here
  --alone         with follow: leave if the run has an evaluator that it started; the run itself uses this
  --trust         run code that a config beside weights names
  --json          print the results as JSON

By hand the results are printed, and with dump_dir=FOLDER written to FOLDER/results.json. Following writes
evals/<step>/results.json and metrics.eval.jsonl into the run folder. You may kill it and start it again at any time,
and start several to share the work. Started by torchrun or srun, all ranks share each evaluation.
Exit codes: 0 all is evaluated, 75 stopped by a signal, 130 Ctrl-C, 2 bad config, 1 other failures.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import sys

from lingua.config.command_line import leave, run_main
from lingua.eval.command import evaluate


def main(words: list[str], app: str = str(__package__)) -> int:
    """Run the evaluation that a command line asks for; return the exit code."""
    return evaluate(words, app, str(__doc__))


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
