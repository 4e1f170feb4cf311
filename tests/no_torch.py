"""Commands of a login node, each as it is typed, in one process that must not have loaded torch at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
from apps.cli.main import main
for words in json.loads(sys.argv.pop()):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
print("torch" in sys.modules, file=sys.stderr)
"""


def said_without_torch(folder: Path, *commands: Sequence[str]) -> str:
    """What `lingua ...` prints in `folder`, one command after another; each must end with exit code 0."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("False\n"), done.stderr
    return done.stdout
