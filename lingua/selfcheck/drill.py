"""Carry out `lingua drill`: train a small run, inject faults repeatedly, compare it with an undisturbed run.

It does only what users of a cluster may do to their own jobs, and ends everything that it started, even after Ctrl-C.
Times are those of the run folder's file server, since clocks of nodes differ.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson

from lingua import scheduler
from lingua.checkpoint import layout, publish
from lingua.checkpoint.capacity import PRIVATE_SHM
from lingua.checkpoint.shm.area import SERVICE_LOCK, area_of
from lingua.config.command_line import CommandLine, parse_command_line
from lingua.config.frozen import CONFIG_FILE, dump_yaml, read_config
from lingua.files import RunError, write_whole
from lingua.launch.job import NO_REQUEUE, RANKS_STEP, REFUSED, SERVICE_STEP
from lingua.launch.submit import freeze_launch, submit_run
from lingua.logger import MAIN_LOG, RANK_LOGS
from lingua.run.folder import EXIT_INTERRUPTED
from lingua.run.metrics import METRICS_FILE, last_line, read_metrics
from lingua.selfcheck.drill_plan import N_STEPS, SAVING, SOURCE, Fault, Injected, Seen, faults, run_config, text_lines

log = logging.getLogger(__name__)

POLL_S = 0.1
ASK_S = 1.0
"""Interval between queries to Slurm's controller."""
SETTLED_S = 5.0
"""How long a job must be over before it counts as ended, since a requeued job passes through the same states."""
END_WITHIN_S = 300.0
"""A cancelled job that is not over by then has come back; longer than any KillWait."""


# -- observation ---------------------------------------------------------------------------------------------------


@dataclass
class RunWatch:
    """Observations of a run folder so far."""

    run_dir: Path
    published: dict[int, tuple[int, float]] = field(default_factory=dict)
    """(attempt, time of its mark) of every checkpoint ever seen, by step."""
    lost: dict[int, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.run_dir / layout.CHECKPOINTS

    @property
    def newest(self) -> int:
        return max(self.published, default=0)

    def look(self) -> tuple[int, int]:
        """Update; return (attempt that wrote the newest metrics, their step), or (0, 0) before the first."""
        newest, done = self.newest, layout.done_steps(self.root)
        for step in set(done) - set(self.published):
            with contextlib.suppress(FileNotFoundError, RunError):  # retention was faster
                at_s = layout.done_mark(self.root, step).stat().st_mtime
                self.published[step] = publish.attempt_of(self.root, step), at_s
        if newest > max(done, default=0) and newest not in self.lost:
            self.lost[newest] = f"the newest is now {max(done, default='none')}"
        record = last_line(self.run_dir / METRICS_FILE) or {}
        return int(record.get("incarnation", 0)), int(record.get("global_step", 0))

    def newest_of(self, attempt: int) -> int | None:
        """Return the newest checkpoint published by attempts up to this one."""
        return max((step for step, (by, _) in self.published.items() if by <= attempt), default=None)

    def server_time_s(self) -> float:
        """Return the time of the disk's clock."""
        probe = self.run_dir / ".clock"
        write_whole(probe, b"")
        os.utime(probe)
        return probe.stat().st_mtime

    def verify(self) -> None:
        """Read every checkpoint, and count damaged ones as lost."""
        for step in layout.done_steps(self.root):
            try:
                facts = publish.read_marked_manifest(self.root, step)
                problems = publish.damage(layout.folder(self.root, step), facts)
            except publish.DamagedError as error:
                problems = [str(error)]
            if problems:
                self.lost[step] = "; ".join(problems)


def differences(disturbed: Path, undisturbed: Path, step: int) -> list[str]:
    """Return the differences of two runs up to a step: in files of its checkpoint, and in losses."""
    left, right = (publish.read_marked_manifest(run / layout.CHECKPOINTS, step) for run in (disturbed, undisturbed))
    found = [f"{name} of checkpoint {step}" for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
    expected = losses(undisturbed)
    for at, values in losses(disturbed).items():
        if at <= step and values != expected.get(at):
            found.append(f"the loss of step {at} is {values} and not {expected.get(at)}")
            break
    return found


def losses(run_dir: Path) -> dict[int, set[float]]:
    """Return the losses of each step; a step that was trained several times should have only one."""
    found: dict[int, set[float]] = {}
    for record in read_metrics(run_dir / METRICS_FILE):
        found.setdefault(record["global_step"], set()).add(record["loss/out"])
    return found


# -- where it runs -------------------------------------------------------------------------------------------------


class OnSlurm:
    """Runs the drill as jobs of this user."""

    kinds: Sequence[str] = (*SAVING, "KILL", "requeue", "service")
    requeues = True
    """Whether a run should come back by itself."""

    def __init__(
        self,
        run: scheduler.Runner = scheduler.run_command,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._run, self._now, self._sleep = run, now, sleep
        self._job_id = ""
        self._asked_s, self._over_since_s = float("-inf"), float("inf")

    def start(self, line: CommandLine, base_dir: Path) -> None:
        """Start a run or resume it."""
        script, _, launcher, _ = freeze_launch(line, base_dir)
        self._job_id, self._over_since_s = submit_run(script, launcher, run=self._run), float("inf")

    def inject(self, kind: str, run_dir: Path) -> str:
        """Inject a fault; return Slurm's message if it refuses."""
        try:
            if kind == "requeue":
                scheduler.requeue(self._job_id, run=self._run)
            elif kind in SAVING:
                scheduler.send_signal(self._job_id, kind, run=self._run)
            else:
                scheduler.send_signal(self._job_id, "KILL", RANKS_STEP if kind == "KILL" else SERVICE_STEP, self._run)
        except RunError as error:
            return str(error)
        return ""

    def is_over(self) -> bool:
        """Return whether the run has ended and will not come back by itself."""
        now_s = self._now()
        if now_s - self._asked_s >= ASK_S:
            self._asked_s = now_s
            self._over_since_s = min(self._over_since_s, now_s) if self._state().over else float("inf")
        return now_s - self._over_since_s > SETTLED_S

    def why_over(self, run_dir: Path) -> tuple[bool, str]:
        """Return (whether the cluster caused the end of the run, how the job ended)."""
        if (state := self._state()).taken_away:
            return True, f"job {self._job_id} is {state.name}"
        path = run_dir / RANK_LOGS / f"{self._job_id}.out"
        try:
            lines = path.read_text(errors="replace").split("\n")
        except OSError as error:
            return False, f"it is {state.name}, and its log cannot be read: {error}"
        refused = next((line for line in reversed(lines) if REFUSED in line or NO_REQUEUE in line), None)
        last = refused or next((line for line in reversed(lines) if line.strip()), "nothing")
        return refused is not None, f"{last.strip()} ({path})"

    def _state(self) -> scheduler.JobState:
        try:
            return scheduler.job_state(self._job_id, self._run)
        except RunError as error:
            log.warning("%s", error)
            return scheduler.JobState()

    def end(self) -> bool:
        """End the run as a user does, wait, and return whether it stayed ended."""
        scheduler.cancel(address=self._job_id, run=self._run)
        until_s = self._now() + END_WITHIN_S
        while not self.is_over():
            if self._now() > until_s:
                return False
            self._sleep(ASK_S)
        return self._state().taken_away

    def close(self) -> None:
        """Cancel the job if it is not over."""
        if self._job_id and not self._state().over:
            scheduler.cancel(address=self._job_id, run=self._run)

    def limits(self) -> scheduler.Limits:
        try:
            return scheduler.limits_of(self._job_id, self._run)
        except RunError as error:
            log.warning("%s", error)
            return scheduler.Limits()


class OnThisMachine:
    """Runs the drill as processes on this machine, without Slurm; the drill itself restarts them."""

    kinds: Sequence[str] = (*SAVING, "KILL", "service")
    requeues = False

    def __init__(self, output: Path) -> None:
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, line: CommandLine, base_dir: Path) -> None:
        script, *_ = freeze_launch(line, base_dir)
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                ["bash", str(script)], env=scheduler.outside_job(os.environ), stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def inject(self, kind: str, run_dir: Path) -> str:
        assert self._process is not None
        if kind == "service":
            shm = Path(read_config(run_dir / CONFIG_FILE)["checkpoint"]["shm_path"])
            lock = area_of(run_dir, shm).lock(SERVICE_LOCK)
            pid = lock.holder()
            lock.close()
            if pid is None:
                return "no checkpoint service runs"
            os.kill(pid, signal.SIGKILL)
        else:
            self._process.send_signal(signal.Signals[f"SIG{kind}"])  # the ranks die with it
        return ""

    def is_over(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def why_over(self, run_dir: Path) -> tuple[bool, str]:
        return True, f"its output is in {self._output}"

    def end(self) -> bool:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        return self._process.wait() == EXIT_INTERRUPTED

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def limits(self) -> scheduler.Limits:
        return scheduler.Limits()


# -- the drill -----------------------------------------------------------------------------------------------------


class OutOfPatienceError(RunError):
    """The run did not reach the state that the drill waits for."""


@dataclass
class Drill:
    """One drill in one folder."""

    folder: Path
    overrides: Sequence[str]
    site: OnSlurm | OnThisMachine
    minutes: float
    patience_s: float
    base_dir: Path
    report: Callable[[str], object] = log.info
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._watch = RunWatch(self.folder / "taken")
        self._not_requeued = ""

    def run(self, seed: int) -> Seen:
        """Run the drill; end everything that it started when this returns or raises."""
        self._make_data()
        try:
            return self._compare(self._disturb(seed))
        finally:
            self.site.close()

    def _disturb(self, seed: int) -> Seen:
        watch, injected = self._watch, []
        line = self._line("taken", N_STEPS)
        self.site.start(line, self.base_dir)
        limits = self.site.limits()
        self._wait(lambda: watch.look()[0] > 0, "trained no step")
        self.report("the run trains; now faults are injected")
        ends_s = self.now() + 60 * self.minutes
        for fault in faults(self.site.kinds, seed):
            self._train_for(fault.after_s)
            if self.now() >= ends_s and injected:
                break
            injected.append(self._inject(fault, line))
            self.report(describe(injected[-1]))
            if injected[-1].back_s is None:
                break
        stayed_away = self.site.end()
        watch.look()
        watch.verify()
        last_step, trained = max(layout.done_steps(watch.root), default=0), losses(watch.run_dir)
        messages = (watch.run_dir / MAIN_LOG).read_text(errors="replace")
        warning = re.search(rf"{re.escape(PRIVATE_SHM)} \((.*?)\)", messages)
        return Seen(
            injected=injected,
            published=frozenset(watch.published),
            lost=watch.lost,
            last_step=last_step,
            holes=[step for step in range(1, last_step + 1) if step not in trained],
            stayed_away=stayed_away,
            private_shm=warning[1] if warning else "",
            not_requeued=self._not_requeued,
            limits=limits,
        )

    def _compare(self, seen: Seen) -> Seen:
        if not seen.last_step:
            return seen
        self.report(f"stopped at checkpoint {seen.last_step}; an undisturbed run now trains as far")
        undisturbed = RunWatch(self.folder / "calm")
        self.site.start(self._line("calm", seen.last_step), self.base_dir)
        deadline_s = self.now() + self.patience_s
        while seen.last_step not in layout.done_steps(undisturbed.root):
            if self.site.is_over() or self.now() > deadline_s:
                return replace(seen, uncompared=f"it came to step {undisturbed.look()[1]} of {seen.last_step}")
            self.sleep(POLL_S)
        return replace(seen, differences=differences(self._watch.run_dir, undisturbed.run_dir, seen.last_step))

    def _inject(self, fault: Fault, line: CommandLine) -> Injected:
        """Inject a fault and wait until the run trains again."""
        watch, site, ended = self._watch, self.site, ""
        attempt, step = watch.look()
        before, at_s, clock_s = watch.newest, self.now(), watch.server_time_s()
        if refused := site.inject(fault.kind, watch.run_dir):
            return Injected(fault.kind, step, refused=refused)

        def is_back() -> bool:
            nonlocal ended
            now_in, _ = watch.look()
            if fault.kind == "service":  # the ranks survive, and the service that they start next publishes
                return watch.newest > before
            if now_in == attempt and site.is_over():
                if site.requeues:
                    by_cluster, why = site.why_over(watch.run_dir)
                    self._not_requeued, ended = (why, ended) if by_cluster else (self._not_requeued, why)
                site.start(line, self.base_dir)
            return now_in > attempt

        back_s = None
        try:
            self._wait(is_back, f"did not train again after {fault.kind}")
            back_s = self.now() - at_s
        except OutOfPatienceError as error:
            log.warning("%s", error)
        saved = watch.newest_of(attempt)
        saved_at_s = watch.published[saved][1] if saved is not None else 0.0
        safe_s = saved_at_s - clock_s if saved_at_s >= clock_s and back_s is not None else None
        return Injected(fault.kind, step, saved=saved, safe_s=safe_s, back_s=back_s, ended=ended)

    def _wait(self, found: Callable[[], bool], what: str) -> None:
        deadline_s = self.now() + self.patience_s
        while not found():
            if self.now() > deadline_s:
                minutes = self.patience_s / 60
                raise OutOfPatienceError(f"the run {what} within {minutes:g} minutes; see {self._watch.run_dir}")
            self.sleep(POLL_S)

    def _train_for(self, seconds: float) -> None:
        until_s = self.now() + seconds
        while self.now() < until_s:
            self._watch.look()
            self.sleep(POLL_S)

    def _make_data(self) -> None:
        source = self.folder / "data" / SOURCE
        try:
            source.mkdir(parents=True)
        except FileExistsError:
            raise RunError(f"{self.folder} exists already; choose another folder with --folder") from None
        lines = (orjson.dumps(line) for line in text_lines())
        write_whole(source / f"{SOURCE}.chunk.00.jsonl", b"\n".join(lines) + b"\n")

    def _line(self, name: str, n_steps: int) -> CommandLine:
        config = self.folder / f"{name}.yaml"
        write_whole(config, dump_yaml(run_config(self.folder, name, n_steps, self.minutes)).encode())
        return parse_command_line([str(config), *self.overrides])


def describe(injected: Injected) -> str:
    """Format a fault as one line."""
    if injected.refused:
        return f"{injected.kind}: refused ({injected.refused})"
    safe = f", safe after {injected.safe_s:.1f} s" if injected.safe_s is not None else ""
    back = f"training again after {injected.back_s:.0f} s" if injected.back_s is not None else "did not come back"
    again = f", submitted again by the drill: {injected.ended}" if injected.ended else ""
    return f"{injected.kind} at step {injected.step}: checkpoint {injected.saved}{safe}; {back}{again}"
