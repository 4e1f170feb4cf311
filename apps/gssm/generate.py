"""Generate: `python -m apps.gssm.generate ckpt=RUN [prompt=... ...]`, as apps/main/generate.py."""

from __future__ import annotations

import sys
from functools import partial

from apps.main.generate import main as generate
from lingua.config.command_line import run_main

main = partial(generate, app=str(__package__))

if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
