"""Inside a job: freeze what was submitted, start the ranks, wait, and say whether the job goes back into the queue.

    python -m lingua.launch.job begin              first start of a *.slurm script: CONFIG_FILE and EXTRA_ARGS say what
    python -m lingua.launch.job hold JOB_FILE      every start: run what JOB_FILE froze

Promise: what runs is what was submitted. `begin` checks the config as training does and freezes it, and the code, into
the run folder; each later start of the job runs those, edits of the working tree notwithstanding. `hold` outlives its
ranks: signals are theirs, it only notes that they came. It requeues by `requeue.judge` alone, and never a job that is
being cancelled. With RESERVE_S left of the time limit it requeues a job whose ranks still run: late is lost.
What fails in here ends in a verdict too: a fact that cannot be read counts as unknown and is judged without.
Cost: half a second per start; no torch. `hold` sleeps in between.

A job file lies in <run>/jobs, or in the folder `tasks` of a sweep, whose points share one frozen code.

    <run>/code/               the code
          jobs/4711.yaml      the config, resolved       jobs/4711.json    words typed, places of the values
          jobs/4711.tries.json                           failed starts in a row, nodes to avoid
          logs/4711.out       what this process says     logs/4711.0.out   what rank 0 says
    $BASE_DIR/.jobs/4711      link to jobs/4711.json, by which a requeued job finds its run
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import orjson

from lingua.checkpoint.layout import CHECKPOINTS, done_steps
from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine, parse_command_line, run_main
from lingua.config.frozen import dump_yaml, read_config
from lingua.config.keys.launch import LauncherArgs
from lingua.files import RunError, make_folder, read_json, write_json, write_whole
from lingua.launch.local_ranks import PATIENCE_S, rank_env, run_ranks
from lingua.launch.requeue import Outcome, Verdict, judge
from lingua.logger import RANK_LOGS
from lingua.run.code_snapshot import environment, freeze_code
from lingua.run.failure import KINDS, Failure, classify, read_failures
from lingua.run.folder import EXIT_FAILED, STOP_FILE
from lingua.run.lock import attempt_files, newest_attempt
from lingua.slurm import (
    Allocation,
    JobState,
    job_state,
    log_pattern,
    requeue,
    step_command,
    this_allocation,
    this_node_name,
)
from lingua.train.check import load

JOBS = "jobs"
LINKS = ".jobs"
RESERVE_S = 15.0
"""Left of the time limit when a job whose ranks still run is requeued."""
GRACE_RESERVE_S = 3.0
"""Left of a preemption's grace at that moment: at its end Slurm requeues by itself, where it is set up to."""
NODE_CHECK = "lingua.selfcheck.node_check"
SERVICE = "lingua.checkpoint.shm.service"
RANKS_STEP, SERVICE_STEP = "ranks", "service"
"""Names of the job's steps, as `squeue --steps` shows them."""
SERVICE_WAIT_S = 600.0
"""For the first rank: longer than torch takes to be imported from a slow shared disk."""
LOOKS = 3
"""At a fact about the run, before it counts as unknown."""
LOOK_AGAIN_S = 0.5
_UNKNOWN = (-1, -1)
NO_REQUEUE = "launcher.requeue is false"
REFUSED = "Slurm did not take the job back"
"""In the log of a job that did not come back for a reason that is not ours; `lingua drill` looks for the two."""

log = logging.getLogger(__name__)
T = TypeVar("T")


# -- freezing ------------------------------------------------------------------------------------------------------


def freeze_job(checked: Any, line: CommandLine, tree: Path, key: str) -> Path:
    """Freeze a checked config (an app's `check.load`) and the code of `tree` for one job; returns the job file."""
    run_dir = make_folder(Path(checked.args.dump_dir).absolute(), "dump_dir")
    freeze_code(tree, run_dir, again="refreeze" in line.flags)
    job_file = make_folder(run_dir / JOBS, "dump_dir") / f"{key}.json"
    write_job(checked, line, job_file)
    return job_file


def write_job(checked: Any, line: CommandLine, job_file: Path) -> None:
    """A checked config as a job file, with the YAML beside it."""
    facts = {
        "typed": line.typed,
        "accept_change": "accept-change" in line.flags,
        "n_ranks": checked.resolved.world_size,
        "origins": checked.composed.origins(),
    }
    write_whole(job_file.with_suffix(".yaml"), dump_yaml(checked.frozen))
    write_json(job_file, facts)


def begin(env: Mapping[str, str]) -> int:
    """First start of a job that a *.slurm script submitted; becomes `hold`, run by the frozen code."""
    base_dir, allocation = Path.cwd(), this_allocation(env)
    words = [env["CONFIG_FILE"], *env.get("EXTRA_ARGS", "").split()]
    line = parse_command_line(words, ["accept-change", "refreeze"])
    checked = load(line, allocation.n_tasks if allocation else None)
    for warning in checked.warnings:
        log.warning("%s", warning)
    key = allocation.job_id if allocation else "local"
    job_file = freeze_job(checked, line, base_dir, key)
    if allocation is not None:
        _link(base_dir / LINKS / key, job_file)
    code = environment(job_file.parents[1] / "code", env)
    os.execve(sys.executable, [sys.executable, "-m", __spec__.name, "hold", str(job_file)], {**env, **code})


def _link(link: Path, target: Path) -> None:
    draft = make_folder(link.parent, "BASE_DIR") / f".{link.name}-{os.getpid()}"
    draft.symlink_to(target)
    draft.replace(link)  # a cluster that was set up anew counts its jobs from 1


# -- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What `hold` holds."""

    run_dir: Path
    app: str
    launcher: LauncherArgs
    n_ranks: int
    train_words: list[str]
    shm: str | None
    """Memory file system of the checkpoint service. None: no service is asked for."""
    allocation: Allocation | None

    @property
    def name(self) -> str:
        return self.allocation.job_id if self.allocation else "local"


def read_job(job_file: Path, allocation: Allocation | None) -> Job:
    """The job that a job file froze. Raises OSError, RunError or ConfigError when it cannot be read."""
    config = job_file.with_suffix(".yaml")
    try:
        tree = read_config(config)
    except FileNotFoundError:
        raise RunError(
            f"{config} is not there: no such job or point was frozen, or its folder was moved; submit it anew"
        ) from None
    launcher = LauncherArgs.model_validate(tree.get("launcher", {}))
    facts = read_json(job_file)
    accepted = ["--accept-change"] if facts["accept_change"] else []
    checkpoint = tree.get("checkpoint", {})
    return Job(
        run_dir=Path(tree["dump_dir"]).absolute(),
        app=tree["app"],
        launcher=launcher,
        n_ranks=allocation.n_tasks if allocation else facts["n_ranks"],
        train_words=[str(config), *accepted],
        shm=checkpoint["shm_path"] if checkpoint.get("async_save_mode") == "shm" else None,
        allocation=allocation,
    )


def ranks_command(job: Job) -> list[str]:
    """The step of the ranks: nothing but srun, or one process of ours per node, stands between Slurm and Python."""
    train = [sys.executable, "-u", "-m", f"{job.app}.train", *job.train_words]
    slurm = job.allocation
    if slurm is None:
        return train
    per_node, n_local = job.launcher.tasks_per_node == "per_node", job.n_ranks // slurm.n_nodes
    below = [sys.executable, "-m", "lingua.launch.local_ranks", str(n_local)] if per_node else []
    return step_command(
        [*below, *train],
        name=RANKS_STEP,
        output=log_pattern(job.run_dir / RANK_LOGS, "%t"),
        n_tasks=slurm.n_nodes if per_node else job.n_ranks,
        cpus_per_task=(slurm.cpus_per_task or 1) * (n_local if per_node else 1),
        wait_s=PATIENCE_S,
    )


def node_check_command(job: Job) -> list[str] | None:
    """The step that says which nodes are bad, with as many tasks as ranks; None: not asked for."""
    if job.allocation is None or not job.launcher.node_check:
        return None
    return step_command([sys.executable, "-m", NODE_CHECK, f"--dir={job.run_dir}"], n_tasks=job.n_ranks)


def read_bad_nodes(said: str) -> dict[str, list[str]]:
    """What is wrong, by bad node, from what the node check said: a line of JSON, among others perhaps."""
    for line in said.splitlines():
        if line.startswith("{"):
            try:
                verdict = orjson.loads(line)
                return {node: verdict["problems"].get(node, []) for node in verdict["bad_nodes"]}
            except (ValueError, KeyError):
                continue
    return {}


def service_command(job: Job) -> list[str] | None:
    """The step of the checkpoint service, one process per node; None: not asked for.

    A step of its own, since a process dies with its step; it holds none of what the ranks need.
    """
    if job.allocation is None or job.shm is None:
        return None
    serve = [sys.executable, "-u", "-m", SERVICE, str(job.run_dir), "--shm", job.shm]
    return step_command(
        # Ranks come once per start of a job: to linger for others would cost its grace.
        [*serve, f"--wait-s={SERVICE_WAIT_S:.0f}", "--linger-s=0"],
        name=SERVICE_STEP,
        output=log_pattern(job.run_dir / RANK_LOGS, "service.%n"),
        n_tasks=job.allocation.n_nodes,
        n_nodes=job.allocation.n_nodes,
        cpus_per_task=1,
        shares=True,
    )


def rank_variables(job: Job, env: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks meet, and what the config sets and unsets."""
    n_nodes = job.allocation.n_nodes if job.allocation else 1
    port = free_port(f"{job.name} {job.run_dir}")  # two clusters on one host have jobs of the same number
    wanted = {"MASTER_ADDR": "127.0.0.1" if n_nodes == 1 else _this_host(env), "MASTER_PORT": str(port)}
    taken = {*job.launcher.env.unset, "SLURM_GPU_BIND"}  # a site's default would bind GPUs to tasks
    kept = {name: value for name, value in env.items() if name not in taken}
    return {**kept, **wanted, **job.launcher.env.set}


def free_port(name: str) -> int:
    """A port of this host, below the ephemeral ones, that nobody listens on; two jobs begin to look at two places."""
    first = zlib.crc32(name.encode())
    for i in range(12_000):
        port = 20_000 + (first + i) % 12_000
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise RunError(f"{socket.gethostname()} has no free port between 20000 and 32000; see who listens there")


def _this_host(env: Mapping[str, str]) -> str:
    """A name of this host, where rank 0 will be: the batch script runs on the first node."""
    for name in (this_node_name(env), socket.gethostname()):
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            continue
        return name
    raise RunError(
        f"the name of this node, {socket.gethostname()}, has no address; set MASTER_ADDR in launcher.env.set"
    )


class Holder:
    """Runs one start of a job."""

    def __init__(self, job: Job, sleep: Callable[[float], None] = time.sleep) -> None:
        self.job = job
        self.tries_file = job.run_dir / JOBS / f"{job.name}.tries.json"
        self._sleep = sleep
        self._stop_file = job.run_dir / STOP_FILE
        self._stop_before = self._ask(lambda: _identity(self._stop_file), _UNKNOWN)
        self._first_step = self._newest_step()
        self._starts_before = self._count_starts()
        self._failed_before = self._failures()

    def hold(self, env: Mapping[str, str]) -> int:
        """The whole of a start, up to the verdict; returns the exit code. Whatever fails in here is judged as well."""
        try:
            variables = rank_variables(self.job, env)
            bad_nodes = self.check_nodes(variables)
            exit_code = EXIT_FAILED if bad_nodes else self.run(variables)
        except Exception as error:
            bad_nodes, exit_code = [], EXIT_FAILED
            log.error("this start of the job failed: %s", error, exc_info=_is_bug(error))
        outcome = self.outcome(exit_code)
        if bad_nodes:
            stop = {"exit_code": exit_code, "kind": "device", "bad_nodes": bad_nodes}
            outcome = replace(outcome, stop=stop)
        return self.act(outcome)

    def check_nodes(self, variables: Mapping[str, str]) -> list[str]:
        """The nodes that the node check says are bad."""
        command = node_check_command(self.job)
        if command is None:
            return []
        done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        said = done.stdout.decode(errors="replace")
        print(said, end="", flush=True)
        problems = read_bad_nodes(said) if done.returncode else {}
        for node, sentences in problems.items():
            log.error("%s is not fit to train: %s", node, "; ".join(sentences))
        return sorted(problems)

    def run(self, variables: Mapping[str, str]) -> int | None:
        """Start the steps and wait for them; the ranks' exit code, None when the time is up."""
        if self.job.allocation is None:
            command = ranks_command(self.job)
            return run_ranks(command, [rank_env(variables, i, self.job.n_ranks, 0, 1) for i in range(self.job.n_ranks)])
        service = service_command(self.job)
        serving = None if service is None else subprocess.Popen(service, env=variables, stdin=subprocess.DEVNULL)
        ranks = subprocess.Popen(ranks_command(self.job), env=variables, stdin=subprocess.DEVNULL)
        exit_code = self._wait(ranks)
        n_starts = self._count_starts()
        if serving is None or exit_code is None or (n_starts is not None and n_starts == self._starts_before):
            return exit_code  # no rank came as far as the run folder, so there is nothing to serve
        log.info("the ranks ended with exit code %d; waiting for the checkpoint service", exit_code)
        served = self._wait(serving)
        if served is None:
            log.warning("the checkpoint service still writes and the time is up; its slots stay for the next start")
        elif served:
            log.warning("the step of the checkpoint service ended with exit code %d", served)
        return exit_code

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """Its exit code; None when the time is up but for the reserve."""
        while True:
            state = self._state()
            reserve_s = GRACE_RESERVE_S if state.preempted else RESERVE_S
            left_s = None if state.ends_at_s is None else state.ends_at_s - reserve_s - time.time()
            if left_s is not None and left_s <= 0:
                return process.poll()
            try:
                return process.wait(left_s)
            except subprocess.TimeoutExpired:
                continue  # the limit may have been moved meanwhile: look again

    def outcome(self, exit_code: int | None) -> Outcome:
        """All that the verdict goes by. Raises nothing: what cannot be read is unknown, and the log says so."""
        run_dir, first, last = self.job.run_dir, self._first_step, self._newest_step()
        return Outcome(
            exit_code=exit_code,
            stop=self._ask(self._read_stop, None),
            kinds=frozenset(failure.kind for failure in self._failures() - self._failed_before),
            occupied=self._ask(lambda: owned_by_another(run_dir, self.job.name), False),
            cancelled=self._state().cancelled,
            steps_gained=0 if first is None or last is None else last - first,
            fruitless=self._tries()[0],
        )

    def act(self, outcome: Outcome) -> int:
        """Requeue the job if that is right; returns the exit code."""
        verdict = judge(outcome, self.job.launcher.max_retries)
        if self.job.allocation is None:
            return verdict.exit_code
        if verdict.requeue and not self.job.launcher.requeue:
            verdict = replace(verdict, requeue=False, why=f"{verdict.why}, and {NO_REQUEUE}")
        avoid = sorted({*self._tries()[1], *(outcome.stop or {}).get("bad_nodes", [])})
        if verdict.requeue:
            verdict = self._count(verdict, avoid)
        log.info("%s: %s", "back into the queue" if verdict.requeue else "the job ends", verdict.why)
        if verdict.requeue:
            send_back(self.job.allocation, avoid)
        return verdict.exit_code

    def _count(self, verdict: Verdict, avoid: list[str]) -> Verdict:
        """Keep the count of failed starts. Where that fails every restart may have been one, so that they do end."""
        try:
            make_folder(self.tries_file.parent, "dump_dir")
            write_json(self.tries_file, {"fruitless": verdict.fruitless, "avoid": avoid})
        except Exception as error:
            log.error("cannot count the tries of this job: %s", error, exc_info=_is_bug(error))
            assert self.job.allocation is not None
            if verdict.fruitless and self.job.allocation.restarts >= self.job.launcher.max_retries:
                return replace(verdict, requeue=False, why=f"{verdict.why}, and the tries cannot be counted ({error})")
        return verdict

    # -- facts -----------------------------------------------------------------------------------------------------

    def _ask(self, question: Callable[[], T], unknown: T) -> T:
        """The answer, or `unknown` after LOOKS failures: a job must not die of a look at its own run."""
        for look in range(LOOKS):
            try:
                return question()
            except Exception as error:
                log.warning("a fact about the run is unknown: %s", error, exc_info=_is_bug(error))
                if not isinstance(error, OSError):  # another look would see the same
                    break
                if look < LOOKS - 1:
                    self._sleep(LOOK_AGAIN_S)
        return unknown

    def _read_stop(self) -> dict[str, Any] | None:
        """The stop.json of this start; None: it left none, and what is there is an older start's."""
        now = _identity(self._stop_file)
        if now is None or now == self._stop_before or self._stop_before == _UNKNOWN:
            return None
        stop = read_json(self._stop_file)
        if not isinstance(stop, dict) or not isinstance(stop.get("exit_code"), int):
            raise RunError(f"{self._stop_file} does not say how the run ended")
        return stop

    def _failures(self) -> frozenset[Failure]:
        return self._ask(lambda: frozenset(read_failures(self.job.run_dir)), frozenset())

    def _state(self) -> JobState:
        slurm = self.job.allocation
        if slurm is None:
            return JobState("RUNNING")
        return self._ask(lambda: job_state(slurm.address), JobState("UNKNOWN"))

    def _tries(self) -> tuple[int, list[str]]:
        """(failed starts in a row before this one that gained nothing, nodes to avoid)."""
        return self._ask(self._read_tries, (0, []))

    def _read_tries(self) -> tuple[int, list[str]]:
        slurm = self.job.allocation
        if slurm is None or not slurm.restarts:
            return 0, []  # what is there is of an older job of the same number
        try:
            tries = read_json(self.tries_file)
        except FileNotFoundError:
            return 0, []
        if not isinstance(tries, dict):
            raise RunError(f"{self.tries_file} does not count the tries of a job")
        return int(tries.get("fruitless", 0)), [str(node) for node in tries.get("avoid", [])]

    def _newest_step(self) -> int | None:
        return self._ask(lambda: max(done_steps(self.job.run_dir / CHECKPOINTS), default=0), None)

    def _count_starts(self) -> int | None:
        return self._ask(lambda: len(attempt_files(self.job.run_dir)), None)


def send_back(allocation: Allocation, avoid: Sequence[str] = ()) -> None:
    """Put the job back into the queue, if Slurm takes it; else its exit code still says what it wants."""
    try:
        requeue(allocation.address, avoid)
    except RunError as error:  # no right to, no batch job, no controller
        log.error("%s: %s", REFUSED, error)
    except Exception as error:
        log.error("cannot ask Slurm to take the job back: %s", error, exc_info=_is_bug(error))


def _is_bug(error: Exception) -> bool:
    """Whether a traceback tells more than the sentence."""
    return not isinstance(error, OSError | RunError)


def owned_by_another(run_dir: Path, job_id: str) -> bool:
    """Return whether the newest attempt of the run is another job's, and has not ended by itself."""
    newest = newest_attempt(run_dir)
    return newest is not None and not newest.released and newest.owner.slurm_job_id != job_id


def _identity(path: Path) -> tuple[int, int] | None:
    """Changes when the file is written anew. None: it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def hold(job_file: Path, env: Mapping[str, str]) -> int:
    """Run what a job file froze; returns the job's exit code."""
    allocation = this_allocation(env)
    if allocation is not None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _note)
    job = read_job(job_file, allocation)
    logs = make_folder(job.run_dir / RANK_LOGS, "dump_dir")
    if allocation is not None:
        _speak_into(logs / f"{job.name}.out")
    return Holder(job).hold(env)


def _note(number: int, frame: object) -> None:
    log.info("%s: left to the ranks", signal.Signals(number).name)


def _speak_into(path: Path) -> None:
    """From here on all output goes to `path`; Slurm's own file, in the folder of sbatch, says where."""
    print(f"log: {path}", flush=True)
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def main(words: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s job: %(message)s", force=True)
    if words != ["begin"] and (len(words) != 2 or words[0] != "hold"):
        raise ConfigError("usage: python -m lingua.launch.job begin | hold JOB_FILE")
    try:
        return begin(os.environ) if words == ["begin"] else hold(Path(words[1]), os.environ)
    except Exception as error:
        return _give_up(error, this_allocation(os.environ))


def _give_up(error: Exception, allocation: Allocation | None) -> int:
    """After an error before any rank was started: requeue the job if that may help, else raise the error.

    What the job is was not read, so its restarts are all that can be counted.
    """
    limit = LauncherArgs().max_retries
    if allocation is None or not KINDS[classify(error)].restart_may_help or allocation.restarts >= limit:
        raise error
    log.error("%s", error, exc_info=_is_bug(error))
    log.info("back into the queue: no rank was started; try %d of %d", allocation.restarts + 1, limit)
    send_back(allocation)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
