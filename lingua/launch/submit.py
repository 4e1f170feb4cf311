"""`lingua launch`: check a config, freeze it with the code, write `run.sh` into the run folder, submit it.

Nothing is written or submitted unless the config passes the check that training makes. The same run.sh runs under
sbatch and, on a machine without Slurm, under bash; submitting it again resumes the run.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine
from lingua.config.compose import code_named
from lingua.config.keys.launch import LauncherArgs
from lingua.config.trust import check_code
from lingua.files import make_folder, remove_leftover, write_whole
from lingua.launch.job import JOBS, freeze_job
from lingua.logger import RANK_LOGS
from lingua.run.code_snapshot import FOLDER as CODE
from lingua.scheduler import NO_ARRAY, TASK_OF_ARRAY, RefusedError, Runner, job_script, outside_job, run_command, submit
from lingua.train.check import Checked, load

RUN_SCRIPT = "run.sh"
BODY = Path("scripts", "job.sh")


def run_script(
    name: str, launcher: LauncherArgs, base_dir: Path, job_file: Path, array: str = "", python: str = sys.executable
) -> str:
    """Return the text of run.sh. Raises ConfigError for a setting that an #SBATCH line cannot hold.

    `array`: an `array_of` tasks whose job files are 1.json and so on, beside `job_file`.
    """
    variables = {"BASE_DIR": base_dir, "PYTHON": python}
    own = [] if array else [NO_ARRAY]
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
    job = f"{shlex.quote(str(job_file.parent))}/{TASK_OF_ARRAY}.json" if array else shlex.quote(str(job_file))
    body = shlex.quote(str(job_file.parents[1] / CODE / BODY))
    lines = [*own, *exports, f"export JOB_FILE={job}", *launcher.setup, f"source {body}"]
    return job_script(name, launcher.model_dump(), lines, array=array, note=True)


def launch(
    line: CommandLine,
    *,
    base_dir: Path,
    dry_run: bool = False,
    local: bool = False,
    env: Mapping[str, str] = os.environ,
    run: Runner = run_command,
) -> int:
    """Check, freeze, write run.sh, submit; return an exit code. Raises ConfigError or RunError."""
    path, text, launcher, is_new = freeze_launch(line, base_dir, dry_run=dry_run, here=local)
    if dry_run:
        print(text, end="")
        return 0
    if local:
        # exec leaves no process in between that would have to forward signals.
        os.execvpe("bash", ["bash", str(path)], outside_job(env))
    try:
        job = submit_run(path, launcher, env=env, run=run)
    except RefusedError:
        if is_new:
            remove_leftover(path.parent)
        raise
    print(f"job {job}: {path}")
    return 0


def freeze_launch(
    line: CommandLine, base_dir: Path, *, dry_run: bool = False, here: bool = False
) -> tuple[Path, str, LauncherArgs, bool]:
    """Check a config, freeze it with the code and write run.sh; in a dry run, write nothing.

    `here`: it will run on this machine, which must have its data; a login node need not see the nodes' disk. Returns
    the path of run.sh, its text, the job's options, and whether the folder is new. Raises ConfigError or RunError.
    """
    must_be_checkout(base_dir)
    checked = load(line, starting=True, here=here)
    check_job_code(line, checked)
    launcher = complete_launcher(checked)
    key = "launch-" + sha256(repr((line.config, line.overlays, line.overrides)).encode()).hexdigest()[:8]
    job_file = Path(checked.args.dump_dir).absolute() / JOBS / f"{key}.json"
    path, text = job_file.parents[1] / RUN_SCRIPT, run_script(checked.args.name, launcher, base_dir, job_file)
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    is_new = not path.parent.exists()
    if not dry_run:
        freeze_job(checked, line, base_dir, key)
        write_whole(path, text, mode=0o700)
    return path, text, launcher, is_new


def submit_run(
    script: Path,
    launcher: LauncherArgs,
    array: str = "",
    env: Mapping[str, str] = os.environ,
    run: Runner = run_command,
) -> str:
    """Submit a run.sh; return the job id. Slurm's own output goes to the folder's logs/."""
    logs = make_folder(script.parent / RANK_LOGS, "dump_dir")
    return submit(script, launcher.model_dump(), logs, array=array, env=env, run=run)


def must_be_checkout(base_dir: Path) -> None:
    if not (base_dir / BODY).is_file():
        places = "launch from yours, or from what `lingua init` made"
        raise ConfigError(f"{base_dir} is not a checkout of lingua: it has no {BODY}; {places}")


def check_job_code(line: CommandLine, checked: Checked) -> None:
    """Raise ConfigError if shell lines or variables of the job come from an untrusted config beside weights."""
    code = code_named(checked.frozen, checked.composed.marks)
    of_job = {key: names for key, names in code.items() if key.startswith("launcher.")}
    check_code([] if line.config is None else [Path(line.config).expanduser()], of_job)


def complete_launcher(checked: Any) -> LauncherArgs:
    """Return the `launcher` section of a checked config with `gpus` filled in."""
    launcher: LauncherArgs = checked.args.launcher
    gpus = launcher.gpus if launcher.gpus is not None else _share(checked.resolved.world_size, launcher.nodes)
    return launcher.model_copy(update={"gpus": gpus})


def _share(n_ranks: int, n_nodes: int) -> int:
    if n_ranks % n_nodes:
        raise ConfigError(f"launcher.nodes is {n_nodes}, but the config has {n_ranks} ranks; set launcher.gpus")
    return n_ranks // n_nodes
