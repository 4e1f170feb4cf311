"""`lingua launch`: check a config, freeze it with the code, write `run.sh` into the run folder, submit it.

Promise: nothing is written or submitted unless the config passes the check that training makes. The script is a pure
function of what it is made from, and holds any path, however it is spelled. Submitted with sbatch, or started with
bash on a machine without Slurm, it runs the same frozen code and config; typing `sbatch run.sh` again goes on.
Cost: a second; no torch.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine
from lingua.config.keys.launch import LauncherArgs
from lingua.files import make_folder, write_whole
from lingua.launch.job import JOBS, freeze_job
from lingua.logger import RANK_LOGS
from lingua.run.code_snapshot import FOLDER as CODE
from lingua.slurm import run_command
from lingua.train.check import load

RUN_SCRIPT = "run.sh"
BODY = Path("scripts", "job.sh")
_HOW = "# Made by `lingua launch`. sbatch run.sh: submit it again; bash run.sh: run it here, without Slurm."
_HOW_ARRAY = "# Made by `lingua sweep`. sbatch --array=2 run.sh: submit point 2 again; bash run.sh 2: run it here."
_TASK = "${1:-${SLURM_ARRAY_TASK_ID:?say which point: bash run.sh 2}}"
# Characters that an #SBATCH line takes without quotes; sbatch ends it at a blank.
_PLAIN = re.compile(r"[\w@%+=:,./\[\]|&*()-]*")


@dataclass(frozen=True)
class Script:
    """What a run.sh is made from."""

    name: str
    launcher: LauncherArgs
    """With gpus filled in."""
    base_dir: Path
    python: Path
    job_file: Path
    """Of an array, any one of the folder that holds those of its tasks, 1.json and so on."""
    array: str = ""
    """`1-3%2`: an array of these tasks, so many at a time. Empty: none."""

    @property
    def run_dir(self) -> Path:
        """The run folder, or that of the sweep: it holds the code."""
        return self.job_file.parents[1]


def render(script: Script) -> str:
    """The text of run.sh. Raises ConfigError for a setting that an #SBATCH line cannot hold."""
    lines = [f"#SBATCH {option}" for option in sbatch_options(script.name, script.launcher, script.array)]
    job_file, how = shlex.quote(str(script.job_file)), _HOW
    if script.array:
        job_file, how = f"{shlex.quote(str(script.job_file.parent))}/{_TASK}.json", _HOW_ARRAY
    variables = {"BASE_DIR": script.base_dir, "PYTHON": script.python}
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
    body = shlex.quote(str(script.run_dir / CODE / BODY))
    what = [*exports, f"export JOB_FILE={job_file}", *script.launcher.setup, f"source {body}"]
    return "\n".join(["#!/usr/bin/env bash", how, *lines, *what, ""])


def sbatch_options(name: str, launcher: LauncherArgs, array: str = "") -> list[str]:
    """What a job asks of Slurm, an option each. Raises ConfigError for a setting that an #SBATCH line cannot hold."""
    named = {
        "job-name": re.sub(r"[^\w.@+-]+", "_", name),
        "nodes": launcher.nodes,
        "ntasks-per-node": launcher.gpus or 1,
        "gpus-per-node": launcher.gpus or None,
        "cpus-per-task": launcher.cpus_per_gpu,
        "mem": launcher.mem,
        "time": launcher.time,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "exclude": launcher.exclude,
        "comment": launcher.comment,
        "signal": f"USR2@{launcher.signal_s}" if launcher.signal_s else None,
        "array": array,
        "distribution": "block",
        "open-mode": "append",
    }
    given = [f"--{name}={_quoted(name, str(value))}" for name, value in named.items() if value not in (None, "")]
    flags = ["--exclusive"] if launcher.exclusive else []
    flags.append("--requeue" if launcher.requeue else "--no-requeue")
    return [*given, *flags, *(_directive(option) for option in launcher.directives)]


def _quoted(name: str, value: str) -> str:
    if _PLAIN.fullmatch(value):
        return value
    if re.search(r'["\\\n\r]', value):
        raise ConfigError(f"launcher.{name}: {value!r} holds a quote, backslash or newline; an #SBATCH line cannot")
    return f'"{value}"'


def _directive(option: str) -> str:
    if not option.startswith("--") or "\n" in option:
        raise ConfigError(f"launcher.directives: {option!r} is no option of sbatch; write '--name=value'")
    return option


def launch(
    line: CommandLine,
    *,
    base_dir: Path,
    dry_run: bool = False,
    local: bool = False,
    env: Mapping[str, str] = os.environ,
    run: Callable[..., str] = run_command,
) -> int:
    """Check, freeze, write run.sh, submit; returns an exit code. Raises ConfigError or RunError."""
    must_be_checkout(base_dir)
    checked = load(line)
    launcher = complete_launcher(checked)
    key = "launch-" + sha256(repr((line.config, line.overlays, line.overrides)).encode()).hexdigest()[:8]
    job_file = Path(checked.args.dump_dir).absolute() / JOBS / f"{key}.json"
    script = Script(
        name=checked.args.name,
        launcher=launcher,
        base_dir=base_dir,
        python=Path(sys.executable),
        job_file=job_file,
    )
    text = render(script)
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if dry_run:
        print(text, end="")
        return 0
    freeze_job(checked, line, base_dir, key)
    path = script.run_dir / RUN_SCRIPT
    write_whole(path, text, mode=0o755)
    if local:
        # Nothing stays in between that would have to pass signals on.
        os.execvpe("bash", ["bash", str(path)], without_slurm(env))
    print(f"job {submit(path, launcher, env=env, run=run)}: {path}")
    return 0


def submit(
    script: Path,
    launcher: LauncherArgs,
    options: Sequence[str] = (),
    *,
    env: Mapping[str, str] = os.environ,
    run: Callable[..., str] = run_command,
) -> str:
    """Hand a run.sh to sbatch; returns the job id. Slurm's own words go into the folder's logs/."""
    logs = make_folder(script.parent / RANK_LOGS, "dump_dir")
    words = ["sbatch", "--parsable", f"--chdir={logs}", *options, str(script)]
    return run(words, env=not_overruled(launcher, env)).strip().partition(";")[0]


def must_be_checkout(base_dir: Path) -> None:
    if not (base_dir / BODY).is_file():
        raise ConfigError(f"{base_dir} is no checkout of lingua: it has no {BODY}; go to yours and launch from there")


def without_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job that runs here, even inside an allocation."""
    return {name: value for name, value in env.items() if not name.startswith("SLURM_")}


def complete_launcher(checked: Any) -> LauncherArgs:
    """The `launcher` section of a checked config, with gpus filled in."""
    launcher: LauncherArgs = checked.args.launcher
    gpus = launcher.gpus if launcher.gpus is not None else _share(checked.resolved.world_size, launcher.nodes)
    return launcher.model_copy(update={"gpus": gpus})


def _share(n_ranks: int, n_nodes: int) -> int:
    if n_ranks % n_nodes:
        raise ConfigError(f"launcher.nodes is {n_nodes}, but the config speaks of {n_ranks} ranks; set launcher.gpus")
    return n_ranks // n_nodes


def not_overruled(launcher: LauncherArgs, env: Mapping[str, str]) -> dict[str, str]:
    """The environment without the SBATCH_* variables (of a site file, say) that the config is more exact than.

    sbatch lets them overrule #SBATCH lines.
    """
    names = {"time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE"}
    said = {names.get(key, f"SBATCH_{key.upper()}") for key, value in launcher.model_dump().items() if value}
    return {name: value for name, value in env.items() if name not in said}
