"""The text of Slurm jobs: batch scripts, #SBATCH lines, log names, step commands. Import it from scheduler.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingua.files import ConfigError

Asked = Mapping[str, Any]
"""Keys of JobArgs or LauncherArgs, with their values."""
DIRECTIVE = "#SBATCH"  # prefix of lines of a script that only Slurm reads
RUN_STEP = "srun"  # starts a step
_NOTE = "# Made by `lingua launch`. sbatch run.sh: submit it again; bash run.sh: run it here, without Slurm."
_NOTE_OF_ARRAY = "# Made by `lingua sweep`. sbatch --array=2 run.sh: submit point 2 again; bash run.sh 2: run it here."
TASK_OF_ARRAY = "${1:-${SLURM_ARRAY_TASK_ID:?say which point: bash run.sh 2}}"  # its number, in the script of an array
# Otherwise a job submitted by hand from an array task would believe to be that task, and requeue it.
NO_ARRAY = "unset ${!SLURM_ARRAY_@}"
TASK, NODE = "%t", "%n"  # of a step, for the name in `log_pattern`
OWN_LOGS = "slurm-*.out"  # logs of jobs that were submitted without an `output`, in the folder they start in

_SAME = ("mem", "time", "partition", "account", "qos", "constraint", "exclude", "comment")
# Characters that an #SBATCH line accepts without quotes; sbatch ends a value at a blank.
_PLAIN = re.compile(r"[\w@%+=:,./\[\]|&*()-]*")


def job_script(name: str, asked: Asked, lines: Sequence[str], *, array: str = "", note: bool = False) -> str:
    """Return a job script; `note`: add how to submit it. Raises ConfigError for a setting that #SBATCH cannot hold."""
    notes = [_NOTE_OF_ARRAY if array else _NOTE] if note else []
    options = (f"{DIRECTIVE} {option}" for option in _sbatch_options(name, asked, array))
    return "\n".join(["#!/usr/bin/env bash", *notes, *options, *lines, ""])


def code_lines(base_dir: Path, code: Path, command: Sequence[str]) -> list[str]:
    """Return the lines of a job script that run one command in `base_dir` with the modules of `code`."""
    return [
        f"cd -- {shlex.quote(str(base_dir))} || exit 2",
        f"export LINGUA_TRUST=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"exec {shlex.join(command)}",
    ]


def array_of(numbers: Sequence[int], at_once: int | None = None) -> str:
    """Format tasks as an array: [1, 2, 3, 7] -> `1-3,7`, with `%2` for two at once."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return text if at_once is None else f"{text}%{at_once}"


def _sbatch_options(name: str, asked: Asked, array: str) -> list[str]:
    named = {
        "job-name": re.sub(r"[^\w.@+-]+", "_", name),
        "nodes": asked["nodes"],
        "ntasks-per-node": asked["gpus"] or 1,
        "gpus-per-node": asked["gpus"] or None,
        "cpus-per-task": asked["cpus_per_gpu"],
        **{key: asked[key] for key in _SAME},
        "signal": f"USR2@{asked['signal_s']}" if asked.get("signal_s") else None,
        "array": array,
        "distribution": "block",
        "open-mode": "append",
    }
    given = [f"--{name}={_quoted(name, str(value))}" for name, value in named.items() if value not in (None, "")]
    flags = ["--exclusive"] if asked["exclusive"] else []
    flags.append("--requeue" if asked.get("requeue") else "--no-requeue")
    for option in asked["directives"]:
        if not option.startswith("--") or "\n" in option:
            raise ConfigError(f"launcher.directives: {option!r} is not an option of sbatch; write '--name=value'")
    return [*given, *flags, *asked["directives"]]


def _quoted(name: str, value: str) -> str:
    if re.search(r'["\\\n\r]', value):
        raise ConfigError(f"launcher.{name}: {value!r} holds a quote, backslash or newline; an #SBATCH line cannot")
    return value if _PLAIN.fullmatch(value) else f'"{value}"'


def time_limit(text: str) -> str:
    """Return a value of `launcher.time`. Raises ValueError if sbatch would refuse it."""
    form = 'a time limit such as 90 (minutes), "8:00:00" or "2-00:00:00"'
    return _spelled(text, r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", form)


def memory(text: str) -> str:
    """Return a value of `launcher.mem`. Raises ValueError if sbatch would refuse it."""
    return _spelled(text, r"\d+[KMGTkmgt]?", 'an amount of memory such as "64G"')


def _spelled(text: str, pattern: str, form: str) -> str:
    if text and not re.fullmatch(pattern, text, re.ASCII):
        raise ValueError(f"{text!r} is not {form}; sbatch would refuse it")
    return text


def log_pattern(folder: Path, name: str) -> str:
    """Name a file in `folder` for the output of a job or step; `name` may hold TASK and NODE."""
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
    `shares`: the step reserves no resources that other steps need.

    GPUs of a node are not bound to tasks: NCCL's direct path needs every rank to see all of them. `--gpu-bind=none` is
    not used: it also unsets CUDA_VISIBLE_DEVICES (Slurm 22.05), and two jobs that share a node without device cgroups
    would use the same GPUs.
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
    return [RUN_STEP, "--export=ALL", "--input=none", *options, *(["--overlap", "--mem=0"] if shares else []), *command]
