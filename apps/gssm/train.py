"""Train: `python -m apps.gssm.train config=FILE [key=value ...]`. The loop is apps/main/train.py."""

from __future__ import annotations

import sys
from functools import partial

from apps.main.train import main as train
from lingua.config.command_line import leave, run_main

from .args import TrainArgs

main = partial(train, schema=TrainArgs)

if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
