"""`lingua drill`, the work: a small run, struck again and again where it runs, then compared with a calm one.

Promise: does nothing that a user of the cluster may not do, and nothing to other jobs; whatever it started is ended
with it, also by Ctrl-C. Times are those of the run folder's file server, since clocks of nodes differ.
Cost: the given minutes, the queue's, and those of the undisturbed run, which trains as many steps without a break.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import orjson

from lingua.checkpoint import layout, publish
from lingua.checkpoint.capacity import PRIVATE_SHM
from lingua.checkpoint.shm.slots import SERVICE_LOCK, region_of
from lingua.config.command_line import CommandLine, parse_command_line
from lingua.config.frozen import CONFIG_FILE, dump_yaml, read_config
from lingua.files import RunError, write_whole
from lingua.launch.job import NO_REQUEUE, RANKS_STEP, REFUSED, SERVICE_STEP
from lingua.launch.submit import launch
from lingua.logger import MAIN_LOG, RANK_LOGS
from lingua.report.facts import last_line
from lingua.run.folder import EXIT_INTERRUPTED
from lingua.run.metrics import METRICS_FILE, read_metrics
from lingua.selfcheck.drill_plan import (
    N_STEPS,
    SAVING,
    SOURCE,
    Blow,
    Facts,
    Struck,
    blows,
    run_config,
    text_lines,
)
from lingua.slurm import (
    JobState,
    Limits,
    Runner,
    cancel,
    job_state,
    limits_of,
    outside_job,
    requeue,
    run_command,
    send_signal,
)

log = logging.getLogger(__name__)

LOOK_S = 0.1
ASK_S = 1.0
"""Between two questions to Slurm's controller."""
SETTLED_S = 5.0
"""A job that is over for so long does not come back: what is requeued passes through such states."""
END_WITHIN_S = 300.0
"""A cancelled job that is not over by then has come back: longer than any KillWait."""


# -- what can be seen ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A checkpoint that was published."""

    start: int
    at_s: float
    """By the file server's clock."""


@dataclass
class Watch:
    """A run folder, looked at again and again."""

    run_dir: Path
    marks: dict[int, Mark] = field(default_factory=dict)
    """Every checkpoint that was ever seen."""
    lost: dict[int, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.run_dir / layout.CHECKPOINTS

    def look(self) -> tuple[int, int]:
        """(start that the newest metrics are of, their step); (0, 0) before the first."""
        newest, done = max(self.marks, default=0), layout.done_steps(self.root)
        for step in set(done) - set(self.marks):
            with contextlib.suppress(FileNotFoundError, RunError):  # retention was faster
                at_s = layout.done_mark(self.root, step).stat().st_mtime
                self.marks[step] = Mark(publish.incarnation_of(self.root, step), at_s)
        if newest and newest > max(done, default=0) and newest not in self.lost:
            self.lost[newest] = f"the newest is now {max(done, default='none')}"
        record = last_line(self.run_dir / METRICS_FILE) or {}
        return int(record.get("incarnation", 0)), int(record.get("global_step", 0))

    def newest_of(self, start: int) -> int | None:
        """The newest checkpoint that starts up to this one have published."""
        return max((step for step, mark in self.marks.items() if mark.start <= start), default=None)

    def server_time_s(self) -> float:
        """What the disk's own clock says now."""
        probe = self.run_dir / ".clock"
        write_whole(probe, b"")
        os.utime(probe)
        return probe.stat().st_mtime

    def verify(self) -> None:
        """Read every checkpoint that is there, and note those that are damaged."""
        for step in layout.done_steps(self.root):
            try:
                facts = publish.read_marked_manifest(self.root, step)
                problems = publish.damage(layout.folder(self.root, step), facts)
            except publish.DamagedError as error:
                problems = [str(error)]
            if problems:
                self.lost[step] = "; ".join(problems)


def differences(taken: Path, calm: Path, step: int) -> list[str]:
    """In what two runs differ up to a step: files of its checkpoint, and losses."""
    left, right = (publish.read_marked_manifest(run / layout.CHECKPOINTS, step) for run in (taken, calm))
    found = [f"{name} of checkpoint {step}" for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
    undisturbed = losses(calm)
    for at, values in losses(taken).items():
        if at <= step and values != undisturbed.get(at):
            found.append(f"the loss of step {at} is {values} and not {undisturbed.get(at)}")
            break
    return found


def losses(run_dir: Path) -> dict[int, set[float]]:
    """By step; where one was trained several times, the set should have one member all the same."""
    found: dict[int, set[float]] = {}
    for record in read_metrics(run_dir / METRICS_FILE):
        found.setdefault(record["global_step"], set()).add(record["loss/out"])
    return found


# -- where it runs -------------------------------------------------------------------------------------------------


class Place(Protocol):
    """Where a run of the drill runs."""

    kinds: Sequence[str]
    """What can be done to it."""
    requeues: bool
    """Whether it is expected to come back by itself."""

    def start(self, line: CommandLine, base_dir: Path) -> None:
        """Start a run, or go on with it."""
        ...

    def strike(self, kind: str, run_dir: Path) -> str:
        """Do it; returns why not, if it is not allowed."""
        ...

    def is_over(self) -> bool:
        """Whether the run has ended and does not come back by itself."""
        ...

    def last_words(self, run_dir: Path) -> tuple[bool, str]:
        """(whether it was for the cluster to bring the run back, what was said at its end), of a run that is over."""
        ...

    def end(self) -> bool:
        """End the run as a person does, wait, and tell whether it stayed ended."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...

    def limits(self) -> Limits: ...


class OnSlurm:
    """Jobs of this user on a cluster."""

    kinds: Sequence[str] = (*SAVING, "KILL", "requeue", "service")
    requeues = True

    def __init__(
        self,
        run: Runner = run_command,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._run, self._now, self._sleep = run, now, sleep
        self._job_id = ""
        self._asked_s = float("-inf")
        self._over_since_s = float("inf")

    def start(self, line: CommandLine, base_dir: Path) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            launch(line, base_dir=base_dir, run=self._submit)

    def _submit(self, words: Sequence[str], env: Mapping[str, str]) -> str:
        answer = self._run(words, env=env)
        self._job_id, self._over_since_s = answer.strip().partition(";")[0], float("inf")
        return answer

    def strike(self, kind: str, run_dir: Path) -> str:
        job = self._job_id
        try:
            if kind == "requeue":
                requeue(job, run=self._run)
            elif kind in SAVING:
                send_signal(job, kind, run=self._run)
            else:
                send_signal(job, "KILL", step=RANKS_STEP if kind == "KILL" else SERVICE_STEP, run=self._run)
        except RunError as error:
            return str(error)
        return ""

    def is_over(self) -> bool:
        now_s = self._now()
        if now_s - self._asked_s >= ASK_S:
            self._asked_s = now_s
            self._over_since_s = min(self._over_since_s, now_s) if self._state().over else float("inf")
        return now_s - self._over_since_s > SETTLED_S

    def last_words(self, run_dir: Path) -> tuple[bool, str]:
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

    def _state(self) -> JobState:
        try:
            return job_state(self._job_id, self._run)
        except RunError as error:
            log.warning("%s", error)
            return JobState("UNKNOWN")

    def end(self) -> bool:
        cancel(address=self._job_id, run=self._run)
        until_s = self._now() + END_WITHIN_S
        while not self.is_over():
            if self._now() > until_s:
                return False
            self._sleep(ASK_S)
        return self._state().name == "CANCELLED"

    def close(self) -> None:
        if self._job_id and not self._state().over:
            cancel(address=self._job_id, run=self._run)

    def limits(self) -> Limits:
        try:
            return limits_of(self._job_id, self._run)
        except RunError as error:
            log.warning("%s", error)
            return Limits()


class Here:
    """Processes of this machine, without Slurm: nobody starts them again, so the drill does."""

    kinds: Sequence[str] = (*SAVING, "KILL", "service")
    requeues = False

    def __init__(self, output: Path) -> None:
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, line: CommandLine, base_dir: Path) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            launch(line, base_dir=base_dir, run=self._begin)

    def _begin(self, words: Sequence[str], env: Mapping[str, str]) -> str:
        with self._output.open("ab") as said:
            self._process = subprocess.Popen(
                ["bash", words[-1]], env=outside_job(env), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
        return "here"

    def strike(self, kind: str, run_dir: Path) -> str:
        assert self._process is not None
        if kind == "service":
            shm = Path(read_config(run_dir / CONFIG_FILE)["checkpoint"]["shm_path"])
            lock = region_of(run_dir, shm).lock(SERVICE_LOCK)
            pid = lock.holder()
            lock.close()
            if pid is None:
                return "no checkpoint service runs"
            os.kill(pid, signal.SIGKILL)
        else:
            self._process.send_signal(signal.Signals[f"SIG{kind}"])  # its ranks die with it
        return ""

    def is_over(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def last_words(self, run_dir: Path) -> tuple[bool, str]:
        return True, f"its output is in {self._output}"

    def end(self) -> bool:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        return self._process.wait() == EXIT_INTERRUPTED

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def limits(self) -> Limits:
        return Limits()


# -- the drill -----------------------------------------------------------------------------------------------------


class GivenUpError(RunError):
    """Patience is at its end."""


class Drill:
    """One drill in one folder."""

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        place: Place,
        *,
        minutes: float,
        patience_s: float,
        base_dir: Path,
        say: Callable[[str], object] = log.info,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder, self._words, self._place, self._base_dir = folder, words, place, base_dir
        self._minutes, self._patience_s = minutes, patience_s
        self._say, self._now, self._sleep = say, now, sleep
        self._watch = Watch(folder / "taken")
        self._not_requeued = ""

    def run(self, seed: int) -> Facts:
        """Do it; whatever was started is ended when this returns or raises."""
        self._make_data()
        try:
            return self._run(seed)
        finally:
            self._place.close()

    def _run(self, seed: int) -> Facts:
        watch, struck = self._watch, []
        taken = self._line("taken", N_STEPS)
        self._place.start(taken, self._base_dir)
        limits = self._place.limits()
        self._wait(lambda: watch.look()[0] > 0, "trained no step")
        self._say("the run trains; now it is struck")
        ends_s = self._now() + 60 * self._minutes
        for blow in blows(self._place.kinds, seed):
            self._pause(blow.after_s)
            if self._now() >= ends_s and struck:
                break
            struck.append(self._strike(blow, taken))
            self._say(describe(struck[-1]))
            if struck[-1].back_s is None:
                break
        stayed_away = self._place.end()
        watch.look()
        watch.verify()
        facts = Facts(
            struck=struck,
            published=frozenset(watch.marks),
            lost=watch.lost,
            last_step=max(layout.done_steps(watch.root), default=0),
            stayed_away=stayed_away,
            private_shm=self._said_of_shm(),
            not_requeued=self._not_requeued,
            limits=limits,
        )
        trained = losses(watch.run_dir)
        facts = replace(facts, holes=[step for step in range(1, facts.last_step + 1) if step not in trained])
        return self._compare(facts)

    def _compare(self, facts: Facts) -> Facts:
        if not facts.last_step:
            return facts
        self._say(f"stopped at checkpoint {facts.last_step}; the undisturbed run trains as far")
        calm = Watch(self._folder / "calm")
        self._place.start(self._line("calm", facts.last_step), self._base_dir)
        deadline_s = self._now() + self._patience_s
        while facts.last_step not in layout.done_steps(calm.root):
            if self._place.is_over() or self._now() > deadline_s:
                return replace(facts, uncompared=f"it came to step {calm.look()[1]} of {facts.last_step}")
            self._sleep(LOOK_S)
        found = differences(self._watch.run_dir, calm.run_dir, facts.last_step)
        return replace(facts, differences=found)

    def _strike(self, blow: Blow, line: CommandLine) -> Struck:
        """Strike, and wait until the run trains again."""
        watch, place = self._watch, self._place
        start, step = watch.look()
        before, at_s, clock_s = max(watch.marks, default=0), self._now(), watch.server_time_s()
        refused = place.strike(blow.kind, watch.run_dir)
        struck = Struck(blow.kind, step, refused=refused)
        if refused:
            return struck
        ended = ""

        def is_back() -> bool:
            nonlocal ended
            now_in, _ = watch.look()
            if blow.kind == "service":  # the ranks live; the service that they begin publishes
                return max(watch.marks, default=0) > before
            if now_in == start and place.is_over():
                if place.requeues:
                    by_cluster, words = place.last_words(watch.run_dir)
                    if by_cluster:
                        self._not_requeued = words
                    else:
                        ended = words
                place.start(line, self._base_dir)
            return now_in > start

        try:
            self._wait(is_back, f"did not train again after {blow.kind}")
        except GivenUpError as error:
            log.warning("%s", error)
            return replace(struck, saved=watch.newest_of(start), ended=ended)
        saved = watch.newest_of(start)
        mark = watch.marks.get(saved) if saved is not None else None
        safe_s = mark.at_s - clock_s if mark is not None and mark.at_s >= clock_s else None
        return replace(struck, saved=saved, safe_s=safe_s, back_s=self._now() - at_s, ended=ended)

    def _wait(self, found: Callable[[], bool], what: str) -> None:
        deadline_s = self._now() + self._patience_s
        while not found():
            if self._now() > deadline_s:
                raise GivenUpError(
                    f"the run {what} within {self._patience_s / 60:g} minutes; see {self._watch.run_dir}"
                )
            self._sleep(LOOK_S)

    def _pause(self, seconds: float) -> None:
        until_s = self._now() + seconds
        while self._now() < until_s:
            self._watch.look()
            self._sleep(LOOK_S)

    # -- files -----------------------------------------------------------------------------------------------------

    def _make_data(self) -> None:
        source = self._folder / "data" / SOURCE
        try:
            source.mkdir(parents=True)
        except FileExistsError:
            raise RunError(f"{self._folder} is there already; choose another folder with --folder") from None
        lines = (orjson.dumps(line) for line in text_lines())
        write_whole(source / f"{SOURCE}.chunk.00.jsonl", b"\n".join(lines) + b"\n")

    def _line(self, name: str, n_steps: int) -> CommandLine:
        config = self._folder / f"{name}.yaml"
        write_whole(config, dump_yaml(run_config(self._folder, name, n_steps, self._minutes)).encode())
        return parse_command_line([str(config), *self._words])

    def _said_of_shm(self) -> str:
        text = (self._watch.run_dir / MAIN_LOG).read_text(errors="replace")
        found = re.search(rf"{re.escape(PRIVATE_SHM)} \((.*?)\)", text)
        return found[1] if found else ""


def describe(struck: Struck) -> str:
    """One line for people."""
    if struck.refused:
        return f"{struck.kind}: refused ({struck.refused})"
    safe = f", safe after {struck.safe_s:.1f} s" if struck.safe_s is not None else ""
    back = f"training again after {struck.back_s:.0f} s" if struck.back_s is not None else "did not come back"
    again = f", submitted again by the drill: {struck.ended}" if struck.ended else ""
    return f"{struck.kind} at step {struck.step}: checkpoint {struck.saved}{safe}; {back}{again}"
