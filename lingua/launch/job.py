"""Run a job: freeze the submitted config and code, start the ranks, wait, and decide whether to requeue the job.

    python -m lingua.launch.job begin              first start of a *.slurm script, by CONFIG_FILE and EXTRA_ARGS
    python -m lingua.launch.job hold JOB_FILE      every start: run what JOB_FILE froze

A job runs exactly what was submitted: `begin` checks the config as training does and freezes it with the code; every
start of the job runs those, whatever happens to the working tree. `hold` outlives its ranks and leaves signals to them.
It requeues only by `requeue.judge`, never a job that is being cancelled, and, with RESERVE_S left of the time limit,
also one whose ranks still run. Its own errors do not end the job: a fact that cannot be read counts as unknown.

A job file is in <run>/jobs, or in the folder `tasks` of a sweep, whose points share one copy of the code.

    <run>/code/               the code
          jobs/4711.yaml      the resolved config        jobs/4711.json    command line, origins of the values
          jobs/4711.tries.json                           failed attempts in a row, nodes to avoid
          logs/4711.out       output of this process     logs/4711.0.out   output of rank 0
    $BASE_DIR/.jobs/4711      link to jobs/4711.json, by which a requeued job finds its run
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import orjson

from lingua import scheduler
from lingua.checkpoint.layout import done_steps
from lingua.checkpoint.lookup import root_in
from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine, parse_command_line, run_main
from lingua.config.frozen import dump_yaml, read_config
from lingua.config.keys.launch import LauncherArgs
from lingua.files import RunError, make_folder, read_json, write_json, write_whole
from lingua.launch.local_ranks import PATIENCE_S, meeting_point, rank_env, run_ranks
from lingua.launch.requeue import Outcome, RequeueDecision, judge
from lingua.logger import RANK_LOGS
from lingua.masking import MASK, public_word
from lingua.run.code_snapshot import environment, freeze_code
from lingua.run.failure import KINDS, Failure, classify, read_failures
from lingua.run.folder import EXIT_FAILED, STOP_FILE
from lingua.run.lock import attempt_files, newest_attempt
from lingua.train.check import load

JOBS = "jobs"
LINKS = ".jobs"
RESERVE_S = 15.0
"""Time left when a job is requeued although its ranks still run."""
GRACE_RESERVE_S = 3.0
"""The same in the grace of a preemption, after which Slurm itself requeues if it is configured to."""
NODE_CHECK = "lingua.selfcheck.node_check"
SERVICE = "lingua.checkpoint.shm.service"
RANKS_STEP, SERVICE_STEP = "ranks", "service"
"""Names of the job's steps, as `squeue --steps` shows them."""
SERVICE_WAIT_S = 600.0
"""How long the service waits for the first rank: longer than an import of torch from a slow shared disk."""
LOOKS = 3
"""Number of tries to read a fact about the run before it counts as unknown."""
LOOK_AGAIN_S = 0.5
_UNKNOWN = (-1, -1)
NO_REQUEUE = "launcher.requeue is false"
REFUSED = "Slurm did not take the job back"
"""Logged by a job that was not requeued for a reason outside lingua; `lingua drill` looks for these two."""

log = logging.getLogger(__name__)
T = TypeVar("T")


# -- freezing ------------------------------------------------------------------------------------------------------


def freeze_job(checked: Any, line: CommandLine, tree: Path, key: str) -> Path:
    """Freeze a checked config (an app's `check.load`) and the code of `tree` for one job; return the job file."""
    run_dir = make_folder(Path(checked.args.dump_dir).absolute(), "dump_dir")
    freeze_code(tree, run_dir, again="refreeze" in line.flags)
    job_file = make_folder(run_dir / JOBS, "dump_dir") / f"{key}.json"
    write_job(checked, line, job_file)
    return job_file


def write_job(checked: Any, line: CommandLine, job_file: Path) -> None:
    """Write a checked config as a job file, with the YAML beside it, which only its owner may read."""
    if MASK in str(checked.frozen["launcher"]):
        masked = [f"launcher.env.set.{name}" for name, text in checked.args.launcher.env.set.items() if MASK in text]
        what = f"{', '.join(masked) or 'launcher'} holds {MASK} in place of a secret, which no run folder keeps"
        raise ConfigError(f"{what}; set it again on the command line")
    write_whole(job_file.with_suffix(".yaml"), dump_yaml(checked.frozen), mode=0o600)  # ranks need its secrets
    accepted, n_ranks = "accept-change" in line.flags, checked.resolved.world_size
    origins = checked.composed.origins()
    typed = [public_word(word) for word in line.typed]
    write_json(job_file, {"typed": typed, "accept_change": accepted, "n_ranks": n_ranks, "origins": origins})


def begin(env: Mapping[str, str]) -> int:
    """Freeze what a *.slurm script submitted, then exec `hold` with the frozen code."""
    scheduler.require_tasks_that_fit(env)
    base_dir, allocation = Path.cwd(), scheduler.this_allocation(env)
    words = [env["CONFIG_FILE"], *env.get("EXTRA_ARGS", "").split()]
    line = parse_command_line(words, ["accept-change", "refreeze"])
    checked = load(line, allocation.n_tasks if allocation else None, starting=True, here=True)
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
    draft.replace(link)  # a reinstalled cluster counts its jobs from 1 again


# -- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldJob:
    """The content of a job file, and Slurm's allocation."""

    run_dir: Path
    checkpoints: Path
    app: str
    launcher: LauncherArgs
    n_ranks: int
    train_words: list[str]
    shm: str | None
    """Memory file system of the checkpoint service, or None if there is no service."""
    allocation: scheduler.Allocation | None

    @property
    def name(self) -> str:
        return self.allocation.job_id if self.allocation else "local"


def read_job(job_file: Path, allocation: scheduler.Allocation | None) -> HeldJob:
    """Read a job file. Raises OSError, RunError or ConfigError."""
    config = job_file.with_suffix(".yaml")
    try:
        tree = read_config(config)
    except FileNotFoundError:
        raise RunError(
            f"{config} is missing: no such job or point was frozen, or its folder was moved; submit it again"
        ) from None
    launcher = LauncherArgs.model_validate(tree.get("launcher", {}))
    facts = read_json(job_file)
    accepted = ["--accept-change"] if facts["accept_change"] else []
    checkpoint = tree.get("checkpoint", {})
    run_dir = Path(tree["dump_dir"]).absolute()
    return HeldJob(
        run_dir=run_dir,
        checkpoints=root_in(tree, run_dir),
        app=tree["app"],
        launcher=launcher,
        n_ranks=allocation.n_tasks if allocation else facts["n_ranks"],
        train_words=[str(config), *accepted],
        shm=checkpoint["shm_path"] if checkpoint.get("async_save_mode") == "shm" else None,
        allocation=allocation,
    )


def ranks_command(job: HeldJob) -> list[str]:
    """Return the command of the ranks: only srun, or one of our processes per node, is between Slurm and Python."""
    train = [sys.executable, "-u", "-m", f"{job.app}.train", *job.train_words]
    slurm = job.allocation
    if slurm is None:
        return train
    per_node, n_local = job.launcher.tasks_per_node == "per_node", job.n_ranks // slurm.n_nodes
    below = [sys.executable, "-m", "lingua.launch.local_ranks", str(n_local)] if per_node else []
    return scheduler.step_command(
        [*below, *train],
        name=RANKS_STEP,
        output=scheduler.log_pattern(job.run_dir / RANK_LOGS, scheduler.TASK),
        n_tasks=slurm.n_nodes if per_node else job.n_ranks,
        cpus_per_task=(slurm.cpus_per_task or 1) * (n_local if per_node else 1),
        wait_s=PATIENCE_S,
    )


def node_check_command(job: HeldJob) -> list[str] | None:
    """Return the command that finds bad nodes, with as many tasks as ranks, or None if it is switched off."""
    if job.allocation is None or not job.launcher.node_check:
        return None
    return scheduler.step_command([sys.executable, "-m", NODE_CHECK, f"--dir={job.run_dir}"], n_tasks=job.n_ranks)


def read_bad_nodes(output: str) -> dict[str, list[str]]:
    """Return the problems by bad node from the node check's line of JSON; other lines may surround it."""
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                report = orjson.loads(line)
                return {node: report["problems"].get(node, []) for node in report["bad_nodes"]}
            except (ValueError, KeyError):
                continue
    return {}


def service_command(job: HeldJob) -> list[str] | None:
    """Return the command of the checkpoint service, one process per node, or None if there is no service.

    It is a separate step, since a process dies with its step, and reserves nothing that the ranks need.
    """
    if job.allocation is None or job.shm is None:
        return None
    serve = [sys.executable, "-u", "-m", SERVICE, str(job.run_dir), "--shm", job.shm]
    return scheduler.step_command(
        # Ranks start once per start of the job: lingering for others would cost its grace.
        [*serve, f"--wait-s={SERVICE_WAIT_S:.0f}", "--linger-s=0"],
        name=SERVICE_STEP,
        output=scheduler.log_pattern(job.run_dir / RANK_LOGS, f"service.{scheduler.NODE}"),
        n_tasks=job.allocation.n_nodes,
        n_nodes=job.allocation.n_nodes,
        cpus_per_task=1,
        shares=True,
    )


def rank_variables(job: HeldJob, env: Mapping[str, str]) -> dict[str, str]:
    """Return the ranks' environment: where they meet, and what the config sets and unsets."""
    # By name and folder, since two clusters on one host may have jobs of the same number.
    meeting = meeting_point(f"{job.name} {job.run_dir}", job.allocation.n_nodes if job.allocation else 1, env)
    kept = {name: value for name, value in env.items() if name not in job.launcher.env.unset}
    return {**scheduler.for_steps(kept), **meeting, **job.launcher.env.set}


class Holder:
    """Runs one attempt of a job."""

    def __init__(self, job: HeldJob, sleep: Callable[[float], None] = time.sleep) -> None:
        self.job = job
        self.tries_file = job.run_dir / JOBS / f"{job.name}.tries.json"
        self._sleep = sleep
        self._stop_file = job.run_dir / STOP_FILE
        self._stop_before = self._ask(lambda: _identity(self._stop_file), _UNKNOWN)
        self._first_step = self._newest_step()
        self._attempts_before = self._count_attempts()
        self._failed_before = self._failures()

    def hold(self, env: Mapping[str, str]) -> int:
        """Run the attempt and act on its end; return the exit code. An error in here counts as a failed attempt."""
        try:
            variables = rank_variables(self.job, env)
            bad_nodes = self.check_nodes(variables)
            exit_code = EXIT_FAILED if bad_nodes else self.run(variables)
        except Exception as error:
            bad_nodes, exit_code = [], EXIT_FAILED
            log.error("this attempt failed: %s", error, exc_info=_is_bug(error))
        outcome = self.outcome(exit_code)
        if bad_nodes:
            outcome = replace(outcome, stop={"exit_code": exit_code, "kind": "device", "bad_nodes": bad_nodes})
        return self.act(outcome)

    def check_nodes(self, variables: Mapping[str, str]) -> list[str]:
        """Run the node check, if it is configured, and return the bad nodes."""
        command = node_check_command(self.job)
        if command is None:
            return []
        done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        output = done.stdout.decode(errors="replace")
        print(output, end="", flush=True)
        problems = read_bad_nodes(output) if done.returncode else {}
        for node, sentences in problems.items():
            log.error("%s is not fit to train: %s", node, "; ".join(sentences))
        return sorted(problems)

    def run(self, variables: Mapping[str, str]) -> int | None:
        """Start the steps and wait for them; return the ranks' exit code, or None when the time is up."""
        if self.job.allocation is None:
            command = ranks_command(self.job)
            return run_ranks(command, [rank_env(variables, i, self.job.n_ranks, 0, 1) for i in range(self.job.n_ranks)])
        service = service_command(self.job)
        serving = None if service is None else subprocess.Popen(service, env=variables, stdin=subprocess.DEVNULL)
        ranks = subprocess.Popen(ranks_command(self.job), env=variables, stdin=subprocess.DEVNULL)
        exit_code = self._wait(ranks)
        n_attempts = self._count_attempts()
        if serving is None or exit_code is None or (n_attempts is not None and n_attempts == self._attempts_before):
            return exit_code  # no rank reached the run folder, so there is nothing to serve
        log.info("the ranks ended with exit code %d; waiting for the checkpoint service", exit_code)
        served = self._wait(serving)
        if served is None:
            log.warning("the checkpoint service still writes and the time is up; its slots stay for the next attempt")
        elif served:
            log.warning("the step of the checkpoint service ended with exit code %d", served)
        return exit_code

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """Wait for a process; return its exit code, or None once only the reserve is left of the time."""
        while True:
            state = self._state()
            reserve_s = GRACE_RESERVE_S if state.preempted else RESERVE_S
            left_s = None if state.ends_at_s is None else state.ends_at_s - reserve_s - time.time()
            if left_s is not None and left_s <= 0:
                return process.poll()
            try:
                return process.wait(left_s)
            except subprocess.TimeoutExpired:
                continue  # the limit may have changed meanwhile: look again

    def outcome(self, exit_code: int | None) -> Outcome:
        """Collect the facts for the decision. Never raises: an unreadable fact is logged and counts as unknown."""
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
        """Requeue the job if `judge` decides so; return the exit code."""
        decision = judge(outcome, self.job.launcher.max_retries)
        if self.job.allocation is None:
            return decision.exit_code
        if decision.requeue and not self.job.launcher.requeue:
            decision = replace(decision, requeue=False, why=f"{decision.why}, and {NO_REQUEUE}")
        avoid = sorted({*self._tries()[1], *(outcome.stop or {}).get("bad_nodes", [])})
        if decision.requeue:
            decision = self._count(decision, avoid)
        log.info("%s: %s", "back into the queue" if decision.requeue else "the job ends", decision.why)
        if decision.requeue:
            send_back(self.job.allocation, avoid)
        return decision.exit_code

    def _count(self, decision: RequeueDecision, avoid: list[str]) -> RequeueDecision:
        """Store the count of failed attempts. If that fails, count restarts instead, so that the job ends at last."""
        try:
            make_folder(self.tries_file.parent, "dump_dir")
            write_json(self.tries_file, {"fruitless": decision.fruitless, "avoid": avoid})
        except Exception as error:
            log.error("cannot count the retries of this job: %s", error, exc_info=_is_bug(error))
            assert self.job.allocation is not None
            if decision.fruitless and self.job.allocation.restarts >= self.job.launcher.max_retries:
                return replace(decision, requeue=False, why=f"{decision.why}, and retries cannot be counted ({error})")
        return decision

    # -- facts -----------------------------------------------------------------------------------------------------

    def _ask(self, question: Callable[[], T], unknown: T) -> T:
        """Return the answer, or `unknown` after LOOKS failures: reading a fact must not end the job."""
        for look in range(LOOKS):
            try:
                return question()
            except Exception as error:
                log.warning("a fact about the run is unknown: %s", error, exc_info=_is_bug(error))
                if not isinstance(error, OSError):  # it would fail again
                    break
                if look < LOOKS - 1:
                    self._sleep(LOOK_AGAIN_S)
        return unknown

    def _read_stop(self) -> dict[str, Any] | None:
        """Read the stop.json of this attempt; None if there is none, or only an earlier attempt's."""
        now = _identity(self._stop_file)
        if now is None or now == self._stop_before or self._stop_before == _UNKNOWN:
            return None
        stop = read_json(self._stop_file)
        if not isinstance(stop, dict) or not isinstance(stop.get("exit_code"), int):
            raise RunError(f"{self._stop_file} has no exit_code: it is not a stop.json")
        return stop

    def _failures(self) -> frozenset[Failure]:
        return self._ask(lambda: frozenset(read_failures(self.job.run_dir)), frozenset())

    def _state(self) -> scheduler.JobState:
        slurm = self.job.allocation
        if slurm is None:
            return scheduler.JobState()
        return self._ask(lambda: scheduler.job_state(slurm.address), scheduler.JobState())

    def _tries(self) -> tuple[int, list[str]]:
        """Return (failed attempts in a row before this one that gained no step, nodes to avoid)."""
        return self._ask(self._read_tries, (0, []))

    def _read_tries(self) -> tuple[int, list[str]]:
        slurm = self.job.allocation
        if slurm is None or not slurm.restarts:
            return 0, []  # the file may be from an older job with the same number
        try:
            tries = read_json(self.tries_file)
        except FileNotFoundError:
            return 0, []
        if not isinstance(tries, dict):
            raise RunError(f"{self.tries_file} does not hold the retries of a job")
        return int(tries.get("fruitless", 0)), [str(node) for node in tries.get("avoid", [])]

    def _newest_step(self) -> int | None:
        return self._ask(lambda: max(done_steps(self.job.checkpoints), default=0), None)

    def _count_attempts(self) -> int | None:
        return self._ask(lambda: len(attempt_files(self.job.run_dir)), None)


def send_back(allocation: scheduler.Allocation, avoid: Sequence[str] = ()) -> None:
    """Requeue the job if Slurm accepts it; otherwise only its exit code asks for a restart."""
    try:
        scheduler.requeue(allocation.address, avoid)
    except RunError as error:  # no right to, no batch job, no controller
        log.error("%s: %s", REFUSED, error)
    except Exception as error:
        log.error("cannot ask Slurm to take the job back: %s", error, exc_info=_is_bug(error))


def _is_bug(error: Exception) -> bool:
    """Return whether a traceback would help."""
    return not isinstance(error, OSError | RunError)


def owned_by_another(run_dir: Path, job_id: str) -> bool:
    """Return whether the newest attempt of the run is another job's, and has not ended by itself."""
    newest = newest_attempt(run_dir)
    if newest is None or newest.released or newest.copied_from:
        return False
    return newest.owner.slurm_job_id != job_id


def _identity(path: Path) -> tuple[int, int] | None:
    """Return a value that changes when the file is rewritten, or None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def hold(job_file: Path, env: Mapping[str, str]) -> int:
    """Run what a job file froze; return the job's exit code."""
    scheduler.require_tasks_that_fit(env)
    allocation = scheduler.this_allocation(env)
    if allocation is not None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _note)
    job = read_job(job_file, allocation)
    logs = make_folder(job.run_dir / RANK_LOGS, "dump_dir")
    if allocation is not None:
        _redirect_output(logs / f"{job.name}.out")
    return Holder(job).hold(env)


def _note(number: int, frame: object) -> None:
    log.info("%s: left to the ranks", signal.Signals(number).name)


def _redirect_output(path: Path) -> None:
    """Print the name of the log into Slurm's own file (slurm-<job>.out), then send all further output to the log."""
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
        return _give_up(error, scheduler.this_allocation(os.environ))


def _give_up(error: Exception, allocation: scheduler.Allocation | None) -> int:
    """Requeue a job that failed before any rank was started if that may help; otherwise raise the error.

    The job file has not been read, so only restarts can be counted.
    """
    limit = LauncherArgs().max_retries
    if allocation is None or not KINDS[classify(error)].restart_may_help or allocation.restarts >= limit:
        raise error
    log.error("%s", error, exc_info=_is_bug(error))
    log.info("back into the queue: no rank was started; retry %d of %d", allocation.restarts + 1, limit)
    send_back(allocation)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
