"""The text of Slurm jobs: batch scripts, their #SBATCH lines, names of logs, and the words of a step."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lingua.config.base import ConfigError
from lingua.config.keys.launch import JobArgs, LauncherArgs

# Characters that an #SBATCH line takes without quotes; sbatch ends it at a blank.
_PLAIN = re.compile(r"[\w@%+=:,./\[\]|&*()-]*")


def job_script(name: str, asked: JobArgs, lines: Sequence[str], *, array: str = "", note: str = "") -> str:
    """Write a job script (`array`: `1-3%2`). Raises ConfigError for a setting that an #SBATCH line cannot hold."""
    options = (f"#SBATCH {option}" for option in _sbatch_options(name, asked, array))
    return "\n".join(["#!/usr/bin/env bash", *([note] if note else []), *options, *lines, ""])


def code_lines(base_dir: Path, code: Path, command: Sequence[str]) -> list[str]:
    """Return the lines of a job script that run one command in `base_dir` with the modules of `code`."""
    return [
        f"cd -- {shlex.quote(str(base_dir))} || exit 2",
        f"export LINGUA_TRUST=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"exec {shlex.join(command)}",
    ]


def _sbatch_options(name: str, asked: JobArgs, array: str) -> list[str]:
    named = {
        "job-name": re.sub(r"[^\w.@+-]+", "_", name),
        "nodes": asked.nodes,
        "ntasks-per-node": asked.gpus or 1,
        "gpus-per-node": asked.gpus or None,
        "cpus-per-task": asked.cpus_per_gpu,
        "mem": asked.mem,
        "time": asked.time,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "exclude": asked.exclude,
        "comment": asked.comment,
        "signal": f"USR2@{asked.signal_s}" if isinstance(asked, LauncherArgs) and asked.signal_s else None,
        "array": array,
        "distribution": "block",
        "open-mode": "append",
    }
    given = [f"--{name}={_quoted(name, str(value))}" for name, value in named.items() if value not in (None, "")]
    flags = ["--exclusive"] if asked.exclusive else []
    flags.append("--requeue" if isinstance(asked, LauncherArgs) and asked.requeue else "--no-requeue")
    for option in asked.directives:
        if not option.startswith("--") or "\n" in option:
            raise ConfigError(f"launcher.directives: {option!r} is not an option of sbatch; write '--name=value'")
    return [*given, *flags, *asked.directives]


def _quoted(name: str, value: str) -> str:
    if re.search(r'["\\\n\r]', value):
        raise ConfigError(f"launcher.{name}: {value!r} holds a quote, backslash or newline; an #SBATCH line cannot")
    return value if _PLAIN.fullmatch(value) else f'"{value}"'


def log_pattern(folder: Path, name: str) -> str:
    """Name a file in `folder` for the output of a job or step; `name` may hold %t (task) and %n (node)."""
    return str(folder).replace("%", "%%") + f"/%j.{name}.out"


def step_command(
    command: Sequence[str],
    *,
    name: str = "",
    output: str = "",
    n_tasks: int | None = None,
    n_nodes: int | None = None,
    cpus_per_task: int | None = None,
    wait_s: float | None = None,
    end_together: bool = False,
    shares: bool = False,
) -> list[str]:
    """Return the command that runs `command` as a step of this job, once per task.

    `wait_s`: how long tasks may outlive the first that ends. `end_together`: a task that fails ends the others.
    `shares`: the step takes nothing that other steps need.

    GPUs of a node are not bound to tasks: NCCL's direct path needs every rank to see all of them. `--gpu-bind=none`
    would do more: it unsets CUDA_VISIBLE_DEVICES (Slurm 22.05), and two jobs that share a node without device cgroups
    would take the same GPUs.
    """
    named = {
        "job-name": name,
        "output": output,
        "open-mode": "append" if output else "",
        "ntasks": n_tasks,
        "nodes": n_nodes,
        "cpus-per-task": cpus_per_task,
        "wait": None if wait_s is None else f"{wait_s:.0f}",
        "kill-on-bad-exit": int(end_together),
    }
    options = [f"--{key}={value}" for key, value in named.items() if value not in (None, "")]
    return ["srun", "--export=ALL", "--input=none", *options, *(["--overlap", "--mem=0"] if shares else []), *command]
