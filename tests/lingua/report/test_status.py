"""How a run is doing and what ended it, decided on facts alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lingua.report.facts import RunFacts
from lingua.report.status import describe, root_cause, row, state_of, status_of, why
from lingua.run.failure import Failure
from lingua.run.lock import Attempt, Owner
from lingua.slurm import QueuedJob

ME = Owner(host="login", boot_id="a", pid_space="p", pid=1, started="1")
THERE = Owner(host="n1", boot_id="b", pid_space="p", pid=7, started="7", slurm_job_id="42")
ATTEMPT = Attempt(number=3, owner=THERE, beat_s=9995.0)
METRICS = {
    "global_step": 120,
    "incarnation": 3,
    "loss/out": 3.5,
    "loss/mean": 3.25,
    "speed/wps": 5000.0,
    "time/eta_s": 7200.0,
}
RUNNING = RunFacts(
    path=Path("out/x"),
    config={"name": "x", "steps": 1000},
    now_s=10000.0,
    attempt=ATTEMPT,
    earlier=({"reason": "signal", "signal": "SIGTERM"}, None),
    metrics=METRICS,
    metrics_age_s=20.0,
    checkpoint=100,
    checkpoint_age_s=90.0,
    validation={"global_step": 100, "web/bpb": 1.5, "web/nll": 1.0, "incarnation": 3, "created_at": "now"},
)
GONE = replace(RUNNING, attempt=replace(ATTEMPT, beat_s=1000.0))


def ended(reason: str, exit_code: int, **more: Any) -> RunFacts:
    stop = {"reason": reason, "exit_code": exit_code, "step": 120, **more}
    return replace(RUNNING, attempt=replace(ATTEMPT, released=True), stop=stop, stop_age_s=300.0)


def failure(kind: str, rank: int = 0, **more: Any) -> Failure:
    facts = {"type": "SomeError", "message": "line 7\nmore", "traceback": "", "step": 120, "incarnation": 3}
    return Failure(**{"kind": kind, "rank": rank, "host": f"n{rank}", "time": "2026-01-01T00:00:00", **facts, **more})


DATA = replace(
    ended("error", 1, kind="data", error="rank 1: SomeError: line 7"),
    failures=(failure("data", 0, because_of_rank=1), failure("data", 1)),
)


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        (RunFacts(Path("out/x")), "new"),
        (RUNNING, "running"),
        (replace(RUNNING, metrics=None), "starting"),
        (replace(RUNNING, metrics={**METRICS, "incarnation": 2}), "starting"),
        (GONE, "killed"),
        (replace(RUNNING, attempt=replace(ATTEMPT, beat_s=9850.0)), "running"),  # a shared disk shows it late
        (replace(GONE, job=QueuedJob("42", "PENDING", "Priority")), "queued"),
        (replace(GONE, job=QueuedJob("42", "NODE_FAIL")), "killed"),
        (ended("finished", 0), "finished"),
        (ended("signal", 75, signal="SIGTERM"), "saved"),
        (replace(ended("signal", 75, signal="SIGTERM"), job=QueuedJob("42", "PENDING")), "queued"),
        (ended("signal", 130, signal="SIGINT"), "stopped"),
        (ended("asked", 130, signal="lingua stop"), "stopped"),
        (DATA, "failed"),
        (replace(GONE, failures=(failure("nccl", 1),)), "failed"),  # rank 0 was killed, another could still speak
        (replace(RUNNING, attempt=replace(ATTEMPT, owner=replace(ME, started="?"))), "killed"),  # no such process here
    ],
)
def test_the_state_in_one_word(facts: RunFacts, state: str):
    assert state_of(facts, ME) == state


@pytest.mark.parametrize(
    ("note", "startup"),
    [
        (None, None),
        ({"incarnation": 2, "parts": {"torch": 2.0}}, None),  # of the attempt before
        ({"incarnation": 3, "parts": {"torch": 2.0, "data": 0.5}}, {"s": 2.5, "torch": 2.0, "data": 0.5}),
    ],
)
def test_the_start_up_is_that_of_the_newest_attempt(note: dict[str, Any] | None, startup: dict[str, float] | None):
    assert status_of(replace(RUNNING, startup=note), ME).startup == startup


@pytest.mark.parametrize(("step", "phase"), [(119, "main, to step 120"), (120, "anneal, to step 1,000"), (1000, None)])
def test_the_phase_is_the_one_that_does_the_next_step(step: int, phase: str | None):
    config = {**RUNNING.config, "phases": [{"name": "main", "until": 120}, {"name": "anneal", "until": 1000}]}
    status = status_of(replace(RUNNING, config=config, metrics={**METRICS, "global_step": step}), ME)
    assert status.phase == phase
    assert any(line.startswith("  phase") for line in describe(status)) is (phase is not None)
    assert why(replace(ended("finished", 0), config=config), ME)["next"] == "add a phase to train longer"


def test_the_first_failure_is_the_cause():
    assert root_cause(()) is None
    assert root_cause(DATA.failures) == DATA.failures[1]
    lost, hung = failure("nccl", 0), failure("hang", 2, time="2026-01-01T00:00:09")
    assert root_cause((lost, hung)) == hung


def test_a_status_has_the_figures():
    status = status_of(RUNNING, ME)
    assert (status.state, status.step, status.n_steps, status.loss, status.left_s) == ("running", 120, 1000, 3.25, 7200)
    assert (status.checkpoint, status.checkpoint_age_s, status.job) == (100, 90.0, "42")
    assert status.validation == {"web/bpb": 1.5, "web/nll": 1.0}
    assert status_of(ended("finished", 0), ME).left_s == 0
    assert status_of(DATA, ME).kind == "data"


def test_the_status_as_people_read_it():
    facts = replace(RUNNING, job=QueuedJob("42", "RUNNING", left="3:00:00"))
    assert describe(status_of(facts, ME)) == [
        "out/x  running",
        "  step        120 of 1,000 (12%), loss 3.2500, 20s ago",
        "  speed       5,000 tokens/s per device",
        "  left        2h0m of training; of the job's time 3:00:00",
        "  checkpoint  100, 1m30s ago",
        "  evaluation  validation at 100: web/bpb 1.5000",
        "  job         42 RUNNING",
        "  attempt     3 on n1",
    ]
    assert describe(status_of(RunFacts(Path("out/y")), ME)) == [
        "out/y  new",
        "  step        0",
        "  checkpoint  none yet",
        "  attempt     none yet",
    ]


def test_a_run_as_a_row():
    assert row(status_of(RUNNING, ME)) == (
        "out/x", "running", "120", "1,000", "3.2500", "5,000", "2h0m", "100, 1m30s ago", "42",
    )  # fmt: skip
    assert row(status_of(DATA, ME))[1:7] == ("failed (data)", "120", "1,000", "3.2500", "-", "-")  # it has ended
    again = status_of(replace(RUNNING, metrics={**(RUNNING.metrics or {}), "incarnation": 0}), ME)
    assert (again.state, again.tokens_per_s, again.left_s) == ("starting", None, None), (
        "those are of the attempt before"
    )
    assert "left" not in " ".join(describe(again))
    assert row(status_of(RunFacts(Path("y")), ME)) == ("y", "new", *["-"] * 7)


def test_why_a_data_error():
    told = why(DATA, ME)
    assert list(told) == ["ended", "cause", "where", "saved", "next"]
    assert told["ended"] == "failed, step 120 of 1,000, 5m0s ago; attempt 3 (before: SIGTERM, killed)"
    assert told["cause"] == "data: SomeError: line 7"
    assert told["where"].startswith(
        "rank 1 on n1, after step 120, 2026-01-01T00:00:00, Slurm job 42; out/x/logs/error_1"
    )
    assert "(and 1 that followed)" in told["where"]
    assert told["saved"] == "checkpoint 100, 1m30s ago; 20 steps will be trained again"
    assert told["next"].startswith("a restart would fail again: repair the file")


@pytest.mark.parametrize(
    ("facts", "line", "said"),
    [
        (GONE, "cause", "it left no message"),
        (GONE, "ended", "killed, step 120 of 1,000, 20s ago"),  # the newest sign of life
        (replace(GONE, job=QueuedJob("42", "OUT_OF_MEMORY")), "cause", "Slurm says OUT_OF_MEMORY"),
        (
            replace(GONE, job=QueuedJob("42", "FAILED", "NonZeroExitCode")),
            "cause",
            "Slurm says FAILED (NonZeroExitCode)",
        ),
        (replace(GONE, job=QueuedJob("42", "PENDING", "Resources")), "next", "when Slurm starts job 42"),
        (ended("signal", 75, signal="SIGUSR2"), "cause", "SIGUSR2: preemption, the time limit"),
        (ended("signal", 75, signal="SIGUSR2"), "saved", "checkpoint 100"),
        (ended("asked", 130, signal="lingua stop"), "cause", "a person: lingua stop"),
        (ended("signal", 130, signal="SIGINT"), "cause", "a person: Ctrl-C"),
        (ended("finished", 0), "next", "raise `steps`"),
        (RUNNING, "ended", "not at all: it is running"),
        (RUNNING, "saved", "if it is killed now, 20 steps will be trained again"),
        (RunFacts(Path("out/x")), "ended", "out/x was never started"),
        (replace(GONE, checkpoint=None), "saved", "it will begin at step 0 again"),
        (replace(GONE, checkpoint=None), "next", "start it again: the same command, or the same job, begins at step 0"),
        (
            replace(GONE, checkpoint=None, in_memory=50),
            "saved",
            "checkpoint 50 is in this machine's memory, and a start",
        ),
        (replace(GONE, in_memory=101), "next", "resumes from what is in memory, if it starts on this machine"),
        (replace(GONE, in_memory=100), "next", "resumes from that checkpoint"),
        (replace(GONE, checkpoint=None, metrics=None), "saved", "it will begin at step 0 again"),  # no line was written
        (replace(ended("signal", 75, signal="SIGTERM"), checkpoint=None), "ended", "stopped, step 120"),
        (replace(ended("signal", 75, signal="SIGTERM"), checkpoint=None), "next", "begins at step 0"),
        (ended("signal", 75, unsaved="checkpoint 120 is in the memory of n1"), "ended", "stopped, step 120"),
        (ended("signal", 75, unsaved="checkpoint 120 is in the memory of n1"), "saved", "in the memory of n1; on the"),
        (ended("signal", 75, unsaved="checkpoint 120 is in the memory of n1"), "next", "if it starts on n1"),
        (replace(DATA, failures=(failure("hang", 1),)), "next", "a restart may help: logs/stacks_"),
        (replace(DATA, failures=(failure("hang", 1),)), "where", "stacks_*.txt"),
        (replace(DATA, failures=()), "cause", "data: rank 1: SomeError: line 7"),
        (replace(DATA, failures=(failure("setup", 1, step=None),)), "where", "before the first step"),
    ],
)
def test_why_anything_else(facts: RunFacts, line: str, said: str):
    told = why(facts, ME)
    assert said in told[line]
    assert not any("\n" in text for text in told.values())


def test_many_attempts_that_ended_alike_are_counted():
    earlier = (None, *({"reason": "signal", "signal": "SIGTERM"},) * 4, {"reason": "error", "kind": "hang"})
    assert "(before: killed, 4 x SIGTERM, hang)" in why(replace(GONE, earlier=earlier), ME)["ended"]
