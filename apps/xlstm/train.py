"""Train: `python -m apps.xlstm.train config=FILE [key=value ...]`, as apps/main/train.py."""

from __future__ import annotations

from apps.main.train import main as train
from lingua.config.command_line import program

from .args import TrainArgs

main = program(__name__, train, schema=TrainArgs)
