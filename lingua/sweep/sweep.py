"""`lingua sweep`: start many runs from one config, as one array job, or on this machine a few at a time.

Nothing is written or submitted unless every point passes the check that training makes. The code is frozen once, for
all points, and the folder of a sweep appears atomically. A point is a run like any other: script, signals, requeue and
run folder are those of `lingua launch`.

    <sweep>/sweep.json            the swept keys and values, and the submitted jobs
            run.sh                sbatch's script; bash run.sh 2 runs point 2 here
            code/                 the code
            tasks/2.yaml 2.json   the resolved config of point 2, and its job file
            logs/                 output of points before their run folder exists
            2/                    run folder of point 2
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

from lingua.config.base import ConfigError, plain
from lingua.config.command_line import CommandLine, app_schema, choose_app
from lingua.config.compose import examine
from lingua.config.frozen import CONFIG_FILE, read_config
from lingua.config.keys.launch import LauncherArgs
from lingua.config.yaml_layers import Origin, Point, stack_layers
from lingua.console import duration
from lingua.files import (
    DISK,
    CommandError,
    RunError,
    make_folder,
    make_folders,
    own_temporary,
    read_json,
    remove_leftover,
    write_json,
    write_whole,
)
from lingua.launch.job import write_job
from lingua.launch.local_ranks import POLL_S, signals_passed_on, start_below
from lingua.launch.submit import RUN_SCRIPT, check_job_code, complete_launcher, must_be_checkout, run_script, submit_run
from lingua.logger import RANK_LOGS
from lingua.masking import public_tree, public_word
from lingua.report.diff import flatten, label
from lingua.run.code_snapshot import freeze_code
from lingua.run.folder import EXIT_FAILED, EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_REQUEUE
from lingua.scheduler import Runner, array_of, array_task, outside_job, run_command
from lingua.sweep.grid import plain_overrides, points_of, read_axes
from lingua.train.check import load

SWEEP_FILE = "sweep.json"
TASKS = "tasks"
_ENDS = {EXIT_FINISHED: "finished", EXIT_REQUEUE: "saved, and can go on,"}


@dataclass(frozen=True)
class Submission:
    """Points that were submitted together."""

    job: str
    points: list[int]


@dataclass(frozen=True)
class Sweep:
    """A sweep that has a folder. Points count from 1, like array tasks and run folders."""

    folder: Path
    name: str
    typed: list[str]
    keys: list[str]
    """The keys that are swept."""
    points: list[dict[str, Any]]
    """Values by key."""
    at_once: int | None = None
    """Number of points that run at the same time; None for all under Slurm, one here."""
    jobs: list[Submission] = field(default_factory=list)

    @property
    def numbers(self) -> range:
        return range(1, len(self.points) + 1)

    def values(self, number: int) -> dict[str, Any]:
        return self.points[number - 1]

    def run_dir(self, number: int) -> Path:
        return self.folder / str(number)

    def task_file(self, number: int) -> Path:
        """Return the job file of a point; its YAML is beside it."""
        return self.folder / TASKS / f"{number}.json"

    @property
    def script(self) -> Path:
        return (self.folder / RUN_SCRIPT).absolute()

    def address(self, number: int) -> str | None:
        """Return Slurm's name of the newest job of a point, or None if it was never submitted."""
        return next((array_task(each.job, number) for each in reversed(self.jobs) if number in each.points), None)

    def save(self, folder: Path) -> None:
        """Write sweep.json into `folder`, the sweep's or a draft of it."""
        record = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_json(folder / SWEEP_FILE, public_tree(record | {"typed": [public_word(word) for word in self.typed]}))


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep. Raises RunError if the folder is not one."""
    if not (folder / SWEEP_FILE).is_file():
        remedy = "`lingua sweep CONFIG optim.lr=1e-3,3e-4` starts one"
        raise CommandError(f"{folder} is not a sweep: it has no {SWEEP_FILE}; {remedy}")
    record = read_json(folder / SWEEP_FILE)
    return Sweep(folder, **{**record, "jobs": [Submission(**each) for each in record["jobs"]]})


# -- planning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A sweep whose points are all checked; nothing is written yet."""

    sweep: Sweep
    lines: list[CommandLine]
    checked: list[Any]
    """The `check.Checked` of each point."""
    script: str
    """run.sh."""

    @property
    def launcher(self) -> LauncherArgs:
        return self.checked[0].args.launcher

    @property
    def warnings(self) -> list[str]:
        """The warnings of all points, each once."""
        return list(dict.fromkeys(warning for checked in self.checked for warning in checked.warnings))


def plan_sweep(line: CommandLine, base_dir: Path, at_once: int | None = None) -> Plan:
    """Find the points and check all of them. Raises ConfigError with all problems."""
    must_be_checkout(base_dir)
    if line.config is None:
        raise ConfigError("no config is named; name one, as in `lingua sweep exp.yaml optim.lr=1e-3,3e-4`")
    app = choose_app(line)
    schema = app_schema(app)
    read = stack_layers(line.config, line.overlays, [], schema)
    axes = read_axes(read.tree, read.marks, line.overrides)
    if not axes:
        raise ConfigError(
            "nothing to sweep: name several values of a key, as in optim.lr=1e-3,3e-4, "
            f"or write a block `grid:` into {line.config}"
        )
    base = replace(line, overrides=plain_overrides(line.overrides))
    common = examine(base.config, base.overlays, base.overrides, schema, {})
    if common.composed is None:
        raise ConfigError(common.complaints)
    args, points = common.composed.args, points_of(axes)
    folder = Path(args.dump_dir)
    _must_be_free(folder)
    lines = [replace(base, point=_completed(point, i, folder, args)) for i, point in enumerate(points, 1)]
    values = [{key: plain(value) for key, (value, _) in point.items()} for point in points]
    checked = _check(lines, [label(each) for each in values], partial(load, schema=schema, starting=True))
    _must_not_share(checked)
    _must_differ(checked, [label(each) for each in values])
    sweep = Sweep(folder, args.name, line.typed, list(values[0]), values, at_once)
    check_job_code(line, checked[0])
    launcher = _same_launcher(checked)
    array = array_of(sweep.numbers, at_once)
    script = run_script(sweep.name, launcher, base_dir, sweep.task_file(1).absolute(), array)
    return Plan(sweep, lines, checked, script)


def _must_be_free(folder: Path) -> None:
    if (folder / SWEEP_FILE).is_file():
        raise ConfigError(
            f"{folder} is a sweep already; `lingua sweep status {folder}` shows it, `lingua sweep rerun {folder}` "
            "starts what failed, name=NEW starts another"
        )
    if (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} is a run folder; give the sweep another name: name=NEW")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; give the sweep another name, name=NEW, or remove it")


def _completed(point: Point, number: int, folder: Path, args: Any) -> Point:
    """Add the keys that separate the runs of the points."""
    values = {key: value for key, (value, _) in point.items()}
    own: dict[str, Any] = {"name": f"{args.name} {label(values)}", "dump_dir": str(folder / str(number))}
    if args.logging.wandb is not None:  # each point has its own tracking id, displayed under the run's name
        group = args.logging.wandb.group or args.name
        own |= {"logging.wandb.name": None, "logging.wandb.id": None, "logging.wandb.group": group}
    return {**point, **{key: (value, Origin(f"point {number}")) for key, value in own.items()}}


def _check(lines: Sequence[CommandLine], labels: Sequence[str], load: Callable[[CommandLine], Any]) -> list[Any]:
    """Check every point; a problem of several points is reported once, with the first one."""
    checked, wrong = [], dict[str, list[int]]()
    for number, line in enumerate(lines, 1):
        try:
            checked.append(load(line))
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(number)
    if wrong:
        raise ConfigError([_about(problem, numbers, labels) for problem, numbers in wrong.items()])
    return checked


def _about(problem: str, numbers: list[int], labels: Sequence[str]) -> str:
    if len(numbers) == len(labels):
        return problem
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return f"point {numbers[0]} ({labels[numbers[0] - 1]}){more}: {problem}"


def _must_not_share(checked: Sequence[Any]) -> None:
    folders = [Path(each.args.checkpoint.path).absolute() for each in checked if each.args.checkpoint.path]
    shared = next((folder for folder in folders if folders.count(folder) > 1), None)
    if shared is not None:
        raise ConfigError(
            f"checkpoint.path is {shared} for several points, which would take each other's checkpoints; leave it out, "
            "or write ${dump_dir} into it"
        )


# Keys that may differ between points without any effect on what they train.
_OF_A_POINT = {"name", "dump_dir", "seed", "checkpoint.path", "eval.dump_dir", "eval.metric_log_dir"}


def _must_differ(checked: Sequence[Any], labels: Sequence[str]) -> None:
    """Refuse points that train the same thing. `seed` alone has no effect if model.seed and data.seed are set."""
    seen: dict[str, int] = {}
    for number, each in enumerate(checked, 1):
        tree = flatten(each.frozen)
        trained = {key: tree[key] for key in tree if key not in _OF_A_POINT and not key.startswith("logging.")}
        first = seen.setdefault(repr(sorted(trained.items())), number)
        if first == number:
            continue
        remedy = "keep one of them"
        if each.args.seed != checked[first - 1].args.seed:
            remedy = (
                "model.seed and data.seed are set, so that seed changes nothing; leave them out, or set them to null"
            )
        raise ConfigError(
            f"points {first} ({labels[first - 1]}) and {number} ({labels[number - 1]}) train the same thing: {remedy}"
        )


def _same_launcher(checked: Sequence[Any]) -> LauncherArgs:
    launchers = [complete_launcher(each) for each in checked]
    for number, launcher in enumerate(launchers, 1):
        if launcher != launchers[0]:
            raise ConfigError(
                f"points 1 and {number} ask for {launchers[0].gpus} and {launcher.gpus} GPUs per node, but they are "
                "tasks of one job; set launcher.gpus, or start two sweeps"
            )
    return launchers[0]


# -- making and submitting -----------------------------------------------------------------------------------------


def make_sweep(plan: Plan, base_dir: Path) -> Sweep:
    """Freeze the code and the points and write run.sh. Raises RunError."""
    sweep, folder = plan.sweep, plan.sweep.folder
    make_folder(folder.parent, "dump_dir")
    draft = own_temporary(folder)
    try:
        make_folders(draft / TASKS)
        freeze_code(base_dir, draft)
        for number, line, checked in zip(sweep.numbers, plan.lines, plan.checked, strict=True):
            write_job(checked, line, draft / TASKS / f"{number}.json")
        write_whole(draft / RUN_SCRIPT, plan.script, mode=0o700)
        sweep.save(draft)
        draft.rename(folder)
    except OSError as error:
        raise RunError(f"cannot make {folder}: {error.strerror}; choose another with dump_dir=") from None
    finally:
        remove_leftover(draft)
    DISK.fsync_dir(folder.parent)
    return sweep


def submit_points(
    sweep: Sweep,
    numbers: Sequence[int],
    *,
    env: Mapping[str, str] = os.environ,
    run: Runner = run_command,
) -> Sweep:
    """Submit these points as one array job; return the sweep with that job."""
    launcher = LauncherArgs.model_validate(_config(sweep, numbers[0]).get("launcher", {}))
    job = submit_run(sweep.script, launcher, array_of(numbers, sweep.at_once), env, run)
    known = replace(sweep, jobs=[*sweep.jobs, Submission(job, sorted(numbers))])
    known.save(sweep.folder)
    return known


def _config(sweep: Sweep, number: int) -> dict[str, Any]:
    return read_config(sweep.task_file(number).with_suffix(".yaml"))


# -- without Slurm -------------------------------------------------------------------------------------------------


def run_points(
    sweep: Sweep,
    numbers: Sequence[int],
    *,
    env: Mapping[str, str] = os.environ,
    gpus: Sequence[str] = (),
    report: Callable[[str], object] = print,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run these points on this machine, `at_once` at a time; return an exit code.

    A signal is forwarded to the running points, which save and end; no other starts. `gpus` are divided among them.
    """
    at_once = min(sweep.at_once or 1, len(numbers))
    shares = _shares(sweep, numbers, at_once, gpus)
    logs = make_folder(sweep.folder / RANK_LOGS, "dump_dir")
    waiting, codes, received = list(numbers), dict[int, int](), list[int]()
    slots: dict[int, tuple[int, Popen[bytes], float]] = {}
    processes: list[Popen[bytes]] = []
    with signals_passed_on(processes, received.append):
        while slots or (waiting and not received):
            for slot in range(at_once):
                if slot not in slots and waiting and not received:
                    number = waiting.pop(0)
                    command = ["bash", str(sweep.script), str(number)]
                    with (logs / f"{number}.out").open("ab") as output:
                        start_below(processes, [(command, outside_job(env) | shares[slot], output)])
                    slots[slot] = number, processes[-1], now()
                    report(f"point {number} ({label(sweep.values(number))}) runs; log: {logs / f'{number}.out'}")
            sleep(POLL_S)
            for slot, (number, process, began_s) in list(slots.items()):
                code = process.poll()
                if code is not None:
                    del slots[slot]
                    processes.remove(process)
                    codes[number] = code
                    how = _ENDS.get(code, f"ended with exit code {code}")
                    report(f"point {number} {how} after {duration(now() - began_s)}")
    if len(codes) == len(numbers) and not any(codes.values()):
        return EXIT_FINISHED
    if received:
        return EXIT_INTERRUPTED if signal.SIGINT in received else EXIT_REQUEUE
    return EXIT_FAILED


def _shares(sweep: Sweep, numbers: Sequence[int], at_once: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Return, for each slot, the variables that assign its GPUs."""
    if at_once == 1 or not gpus or _config(sweep, numbers[0]).get("device") == "cpu":
        return [{}] * at_once
    n_ranks = max(read_json(sweep.task_file(number))["n_ranks"] for number in numbers)
    if at_once * n_ranks > len(gpus):
        raise ConfigError(
            f"--at-once {at_once}: {n_ranks} ranks each need {at_once * n_ranks} GPUs, but {len(gpus)} are here; "
            f"use --at-once {max(1, len(gpus) // n_ranks)}"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * n_ranks : (i + 1) * n_ranks])} for i in range(at_once)]


def gpus_here(env: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """Return the GPUs that a run would see here, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [
        str(i) for i in range(len([path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]))
    ]
