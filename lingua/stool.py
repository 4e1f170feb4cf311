"""Meta Lingua's submit command: `python -m lingua.stool script=apps.main.train config=... nodes=1 ngpu=8`.

It does the same as `lingua launch`, whose `launcher.*` keys it sets. Meta Lingua's other keys are refused or ignored
with a message, never silently.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import sys
from collections.abc import Sequence
from pathlib import Path

from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine, parse_command_line, run_main
from lingua.launch.submit import launch

HELP = """usage: python -m lingua.stool [script=apps.main.train] config=FILE [KEY=VALUE ...]

  nodes ngpu ncpu mem time partition account qos constraint exclude
                          what the job asks of Slurm (ncpu: cores per GPU, time: minutes)
  launcher=sbatch|bash    submit, or run here
  other keys              override the config

`lingua launch` is the same with the config's own keys."""

LAUNCHER_KEYS = {
    "nodes": "nodes",
    "ngpu": "gpus",
    "ncpu": "cpus_per_gpu",
    "mem": "mem",
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
}
# Keys without an effect: the value that is refused, and why.
GONE = {
    "copy_code": ("false", "the code is always frozen into the run folder; leave it out"),
    "override": ("true", "a run folder is never deleted; choose another name, or remove the folder yourself"),
    "dirs_exists_ok": ("", "a run that exists is resumed"),
    "stdout": ("", "logs are in the run folder"),
    "anaconda": ("", "the Python that submits is the Python that runs"),
}


def translate(words: Sequence[str]) -> tuple[CommandLine, bool]:
    """Return (command line of `lingua launch`, whether to run here). Raises ConfigError."""
    line, local, kept = parse_command_line(words), False, []
    for word in line.overrides:
        key, _, value = word.partition("=")
        if word in ("launcher=sbatch", "launcher=bash"):
            local = value == "bash"
        elif key == "time" and value == "-1":
            continue
        elif key in LAUNCHER_KEYS:
            kept.append(f"launcher.{LAUNCHER_KEYS[key]}={value}")
        elif key in GONE:
            refused, why = GONE[key]
            if value.lower() == refused:
                raise ConfigError(f"command line: {word}: {why}")
            print(f"{word}: {why}", file=sys.stderr)
        else:
            kept.append(word)
    line.overrides = kept
    return line, local


def main(words: list[str]) -> int:
    line, local = translate(words)
    if line.flags.get("help"):
        print(HELP)
        return 0
    return launch(line, base_dir=Path.cwd(), local=local)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
