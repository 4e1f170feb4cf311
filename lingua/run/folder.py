"""Record in a run's folder its command, its environment without secrets, and how it ended.

Values that look like secrets are never written (lingua/masking.py). `stop.json` repeats the exit code, since launchers
in between change it (torchrun turns 75 into 1).
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from lingua.config.base import show
from lingua.files import DISK, entries, read_bytes, write_reserved, write_whole
from lingua.logger import RANK_LOGS
from lingua.masking import command_line, public_text, public_tree, public_variables
from lingua.run.provenance import RUN_FILE
from lingua.scheduler import DIRECTIVE, OWN_VARIABLES
from lingua.signals import STOP_REQUEST

log = logging.getLogger(__name__)

STOP_FILE = "stop.json"
_ROOM, _ROOM_BYTES = ".stop.json.room", 16 << 10
EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_REQUEUE = 75  # EX_TEMPFAIL in sysexits.h: saved, to be restarted
EXIT_HUNG = 76  # the watchdog ended it
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C: a person ended it, so it is not requeued

_SHOWN = re.compile(
    rf"^({OWN_VARIABLES}|CUDA|NCCL|TORCH|PYTORCH|OMP|MKL|GLOO|LINGUA|WANDB|HF|UV|PYTHON|TRITON)"
    r"|^(PATH|LD_LIBRARY_PATH|HOSTNAME|USER|TMPDIR|BASE_DIR|CONFIG_FILE|EXTRA_ARGS|VIRTUAL_ENV)$"
)


def public_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that explain a run, with secrets masked."""
    return public_variables({name: value for name, value in sorted(env.items()) if _SHOWN.search(name)})


def public_value(key: str, value: Any, at_most: int = 80) -> str:
    """Format the value of a config key, with secrets masked."""
    return public_text(show(public_tree(value, key), at_most))


def describe_start(run_dir: Path, argv: list[str], env: Mapping[str, str] = os.environ) -> None:
    """Write run.sh (the command of the newest attempt; that of `lingua launch` stays) and env.txt."""
    command, script = command_line([sys.executable, *argv]), run_dir / "run.sh"
    if not script.is_file() or f"\n{DIRECTIVE}".encode() not in read_bytes(script):
        write_whole(script, f"#!/usr/bin/env bash\ncd {shlex.quote(os.getcwd())}\nexec {command}\n".encode())
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in public_environment(env).items()]
    write_whole(run_dir / "env.txt", "".join(lines).encode(), mode=0o600)


def end_asked_for(received: str) -> tuple[str, int]:
    """Return (reason for stop.json, exit code) of a run that a signal or `lingua stop` asked to stop."""
    if received == STOP_REQUEST:
        return "asked", EXIT_INTERRUPTED
    return "signal", EXIT_INTERRUPTED if received == "SIGINT" else EXIT_REQUEUE


def archive_exit_records(run_dir: Path, attempt: int) -> None:
    """Rename an earlier attempt's exit records, so that stop.json and the like are the newest attempt's.

    Attempt 1 has logs/stop.0001.json, logs/run.0001.json, logs/error_0.0001.json and logs/stacks_0.0001.txt.
    """
    left = [path for path in entries(run_dir / RANK_LOGS) if re.fullmatch(r"(error|stacks)_\d+\.(json|txt)", path.name)]
    for path in (run_dir / STOP_FILE, run_dir / RUN_FILE, *left):
        target = run_dir / RANK_LOGS / f"{path.stem}.{attempt:04d}{path.suffix}"
        if path.is_file():
            target.parent.mkdir(exist_ok=True)
            path.replace(target)


def kept_configs(run_dir: Path) -> dict[int, Path]:
    """Return each config.<n>.yaml by n, ascending: the config of the last attempt before a change."""
    named = ((re.fullmatch(r"config\.(\d+)\.yaml", path.name), path) for path in entries(run_dir))
    return dict(sorted((int(found[1]), path) for found, path in named if found))


def reserve_last_words(run_dir: Path) -> None:
    """Allocate room for stop.json, so that a run whose disk fills up can still write it. Raises OSError."""
    room = run_dir / _ROOM
    if not room.exists():
        DISK.close(DISK.create(room))  # with the usual file mode: other users may ask why the run ended
    DISK.close(DISK.reserve(room, _ROOM_BYTES))


def describe_stop(run_dir: Path, reason: str, exit_code: int, **more: Any) -> None:
    """Write stop.json: why the newest attempt ended. If that fails, log it; there is still the exit code."""
    record, path = public_tree({"reason": reason, "exit_code": exit_code, **more}), run_dir / STOP_FILE
    try:
        try:
            write_whole(path, _json(record))
        except OSError as error:
            log.warning("cannot write %s: %s", path, error.strerror or error)
            write_reserved(run_dir / _ROOM, path, _json(record | {"error": str(record.get("error", ""))[:2000]}))
    except OSError as error:
        log.warning("nor into the room that was reserved for it: %s", error.strerror or error)


def _json(record: dict[str, Any]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n"
