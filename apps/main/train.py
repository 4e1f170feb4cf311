"""Train: `python -m apps.main.train config=apps/main/configs/debug.yaml [key=value ...]`. The loop is in loop.py.

A run killed at any line continues from its newest published checkpoint when the same command is given again, bit for
bit with `deterministic`. A stop signal on any rank ends all ranks after the same step, with a checkpoint. A failure of
any rank ends all within seconds (lingua/run/watchdog.py). Exit codes: 0 finished, 75 saved and asks to be started
again, 130 ended by a person (saved), 76 hung, 1 and 2 failures.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import sys
from pathlib import Path

from lingua.config.base import ConfigError
from lingua.config.command_line import leave, parse_command_line, run_main
from lingua.config.keys import train
from lingua.distributed.meeting import told_to_others
from lingua.distributed.place import find_rank_info
from lingua.logger import on_terminal, start_logging
from lingua.run.folder import EXIT_FINISHED
from lingua.run.startup import StartUp
from lingua.train.check import load

from .args import TrainArgs

HELP = """Train, or go on with a run that was stopped or killed.

usage: python -m apps.main.train [config=]FILE [+OVERLAY ...] [key=value ...] [--accept-change] [--trust] [--debug]

  FILE             a YAML config; apps/main/configs/debug.yaml is the one to begin with
  +OVERLAY         a YAML file, or the name of one in configs/overlays, on top of it
  key=value        any key of the config, dotted: optim.lr=1e-3; a group pick: model=llama_7B
  --accept-change  go on although a key that changes what the run computes is not as it was
  --trust          run code that a config beside weights names
  --debug          show tracebacks

`lingua check FILE` shows what would run; `lingua schema --reference` lists every key.
Exit codes: 0 finished, 75 saved and asks to be started again, 130 ended by a person: Ctrl-C or `lingua stop` (saved),
2 bad config, 76 hung, 1 other failures."""


def main(words: list[str], schema: type[train.TrainArgs] = TrainArgs) -> int:
    """Train the run that a command line describes, with the config of an app; return the exit code."""
    startup = StartUp()
    startup.reached("python")
    own: str = schema.model_fields["app"].default
    place = find_rank_info()
    start_logging(place.rank, own_packages=("lingua", str(__package__), own))
    with told_to_others(place):
        line = parse_command_line(words, ["accept-change"])
        if line.flags.get("help"):
            print(HELP)
            return 0
        checked = load(line, place.world_size, starting=True, here=True, schema=schema)
        app = checked.args.app
        if app != own:
            raise ConfigError(f"app is {app}, but this is {own}.train; type python -m {app}.train")
    startup.reached("config")
    from .loop import start  # loads torch: an error in the config is reported without this wait

    startup.reached("torch")
    code = start(checked, words, place, startup)
    if code == EXIT_FINISHED and place.is_main and on_terminal():
        from lingua.train.start import make_page

        make_page(Path(checked.args.dump_dir))
    return code


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
