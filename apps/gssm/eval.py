"""Evaluate: `python -m apps.gssm.eval [ckpt=]RUN[@STEP] [key=value ...]`, as apps/main/eval.py."""

from __future__ import annotations

import sys
from functools import partial

from apps.main.eval import main as evaluate
from lingua.config.command_line import leave, run_main

main = partial(evaluate, app=str(__package__))

if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
