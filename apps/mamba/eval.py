"""Evaluate: `python -m apps.mamba.eval [ckpt=]RUN[@STEP] [key=value ...]`, as apps/main/eval.py."""

from __future__ import annotations

from apps.main.eval import main as evaluate
from lingua.config.command_line import program

main = program(__name__, evaluate, app=str(__package__))
