"""Generate: `python -m apps.xlstm.generate ckpt=RUN [prompt=... ...]`, as apps/main/generate.py."""

from __future__ import annotations

from apps.main.generate import main as generate
from lingua.config.command_line import program

main = program(__name__, generate, app=str(__package__))
