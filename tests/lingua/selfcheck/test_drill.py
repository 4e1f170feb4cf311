"""`lingua drill`, the work, on a run that is played by a few lines: each promise that is broken is told."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

import lingua.launch.job
import lingua.scheduler
import lingua.selfcheck.drill
from lingua.checkpoint import layout, publish
from lingua.config.command_line import CommandLine
from lingua.config.keys.launch import LauncherArgs
from lingua.config.yaml_layers import read_yaml
from lingua.files import RunError
from lingua.launch.job import NO_REQUEUE, REFUSED
from lingua.selfcheck.drill import Drill, OnSlurm, RunWatch, describe
from lingua.selfcheck.drill_plan import EVERY, Seen, broken, not_granted
from lingua.slurm import Allocation, Limits
from tests.fakes import Clock


class Played:
    """A site whose runs train a step whenever somebody waits, and answer every signal; with one `fault` of these:

    forbids, forgets, loses, stays_down, may_not_requeue, dies, differs, drifts, comes_back.
    """

    kinds: Sequence[str] = ("TERM", "KILL")
    requeues = True

    def __init__(self, fault: str = "") -> None:
        self.clock, self.fault = Clock(), fault
        self.config: dict[str, Any] = {}
        self.attempts: dict[str, int] = {}
        self.step, self.trains, self.is_closed, self.waits = 0, False, False, -1

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def root(self) -> Path:
        return Path(self.config["dump_dir"]) / layout.CHECKPOINTS

    def start(self, line: CommandLine, base_dir: Path) -> None:
        assert line.config is not None
        self.config = read_yaml(Path(line.config)).tree
        self.begin()

    def begin(self) -> None:
        self.attempts[self.name] = self.attempts.get(self.name, 0) + 1
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root.parent / "train.log").touch()
        publish.open_staging_dir(self.root, self.attempts[self.name])
        self.step, self.trains = max(layout.done_steps(self.root), default=0), True

    def sleep(self, seconds: float) -> None:
        self.clock.sleep(seconds)
        self.waits -= 1
        if not self.waits:
            self.begin()
        if self.trains and self.step < self.config["steps"]:
            self.step += 1
            loss = 1.0 / self.step + (self.fault == "drifts" and self.name == "taken")
            record = {"global_step": self.step, "loss/out": loss, "incarnation": self.attempts[self.name]}
            with (self.root.parent / "metrics.jsonl").open("ab") as lines:
                lines.write(orjson.dumps(record) + b"\n")
            if self.step % EVERY == 0 or self.step == self.config["steps"]:
                self.save()

    def save(self) -> None:
        if self.step in layout.done_steps(self.root):
            return
        attempt = self.attempts[self.name]
        folder = layout.coming(layout.folder(self.root, self.step), attempt)
        folder.mkdir()
        noise = self.name.encode() if self.fault == "differs" else b""
        facts = {"model.bin": publish.write_hashed(folder / "model.bin", [b"%d" % self.step + noise])}
        publish.publish(self.root, self.step, attempt, facts)

    def inject(self, kind: str, run_dir: Path) -> str:
        if kind == "TERM" and self.fault == "forbids":
            return "Access denied"
        if kind == "TERM" and self.fault != "forgets":
            self.save()
        if self.fault == "loses":
            newest = max(layout.done_steps(self.root))
            layout.done_mark(self.root, newest).unlink()
            shutil.rmtree(layout.folder(self.root, newest))
        self.trains, self.waits = False, -1 if self.fault in ("stays_down", "may_not_requeue", "dies") else 10
        return ""

    def is_over(self) -> bool:
        return not self.trains and self.fault in ("may_not_requeue", "dies")

    def why_over(self, run_dir: Path) -> tuple[bool, str]:
        return (False, "FileNotFoundError: stop.json") if self.fault == "dies" else (True, "Access denied")

    def end(self) -> bool:
        self.trains, self.waits = False, -1
        return self.fault != "comes_back"

    def close(self) -> None:
        self.is_closed = True

    def limits(self) -> Limits:
        return Limits(grace_s=30.0, preempt_mode="REQUEUE")


def play(tmp_path: Path, fault: str = "") -> tuple[Seen, Played]:
    site = Played(fault)
    drill = Drill(
        tmp_path / "drill", [], site, minutes=1, patience_s=60, base_dir=tmp_path,  # pyright: ignore[reportArgumentType]
        report=lambda text: None, now=site.clock.now, sleep=site.sleep,
    )  # fmt: skip
    return drill.run(seed=1), site


def test_a_run_that_keeps_its_promises(tmp_path: Path):
    facts, place = play(tmp_path)
    assert list(broken(facts)) == []
    assert list(not_granted(facts)) == []
    assert {blow.kind for blow in facts.injected} == {"TERM", "KILL"}
    assert (facts.not_requeued, facts.stayed_away, place.is_closed) == ("", True, True)
    assert place.attempts == {"taken": len(facts.injected) + 1, "calm": 1}
    assert facts.last_step in facts.published
    assert all(blow.safe_s is None or blow.safe_s >= 0 for blow in facts.injected), "None: it had just been saved"
    assert any(blow.safe_s is not None for blow in facts.injected if blow.kind == "TERM")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("forgets", r"TERM at step \d+ was not answered by a checkpoint"),
        ("loses", r"checkpoint \d+ was published and is lost: the newest is now"),
        pytest.param(
            "dies",
            r"after (TERM|KILL) at step \d+ the job did not go back into the queue: FileNotFoundError: stop",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "stays_down", r"after (TERM|KILL) at step \d+ the run did not train again", marks=pytest.mark.soak
        ),
        pytest.param(
            "differs", r"not equal to the undisturbed run: model.bin of checkpoint \d+", marks=pytest.mark.soak
        ),
        pytest.param("drifts", r"not equal to the undisturbed run: the loss of step 1 is", marks=pytest.mark.soak),
        pytest.param("comes_back", r"the job was cancelled and came back", marks=pytest.mark.soak),
    ],
)
def test_each_broken_promise_is_found(tmp_path: Path, fault: str, sentence: str):
    facts, place = play(tmp_path, fault)
    assert any(re.search(sentence, each) for each in broken(facts)), list(broken(facts))
    assert place.is_closed


def test_what_the_cluster_does_not_grant_is_seen(tmp_path: Path):
    facts, _ = play(tmp_path, "may_not_requeue")
    assert facts.not_requeued == "Access denied"
    assert not list(broken(facts)), "the drill has submitted it again"
    refused, _ = play(tmp_path / "again", "forbids")
    assert list(not_granted(refused)) == ["TERM was refused: Access denied"]
    assert "TERM: refused (Access denied)" in [describe(blow) for blow in refused.injected]


def test_a_damaged_checkpoint_counts_as_lost(tmp_path: Path):
    facts, _ = play(tmp_path)
    watch = RunWatch(tmp_path / "drill" / "taken")
    watch.verify()
    assert watch.lost == {}
    (layout.folder(watch.root, facts.last_step) / "model.bin").write_bytes(b"?")
    watch.verify()
    assert list(watch.lost) == [facts.last_step]


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path):
    (tmp_path / "drill" / "data" / "words").mkdir(parents=True)
    with pytest.raises(RunError, match="exists already; choose another folder with --folder"):
        play(tmp_path)


class Cluster:
    """A place whose job 7 was submitted a moment ago, and Slurm's answers: the job's states one after the other."""

    def __init__(self) -> None:
        self.states, self.asked, self.clock = ["RUNNING"], list[str](), Clock()
        self.site = OnSlurm(self.run, now=self.clock.now, sleep=self.clock.sleep)

    def run(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        self.asked.append(" ".join(words))
        if words[:2] == ["scontrol", "requeue"]:
            raise RunError("scontrol requeue was refused: Access/permission denied")
        state = self.states.pop(0) if words[0] == "scontrol" and len(self.states) > 1 else self.states[0]
        return {"sbatch": "7;cluster\n", "squeue": "7.0|service\n7.1|ranks\n"}.get(words[0], f"JobState={state}")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    frozen = tmp_path / "run.sh", "", LauncherArgs(), True
    monkeypatch.setattr(lingua.selfcheck.drill, "freeze_launch", lambda line, base_dir: frozen)
    cluster = Cluster()
    cluster.site.start(CommandLine(), Path())
    cluster.asked.clear()
    return cluster


@pytest.mark.parametrize(
    ("kind", "asked", "refused"),
    [
        ("TERM", "scancel --signal=TERM 7", ""),
        ("USR2", "scancel --signal=USR2 7", ""),
        ("KILL", "scancel --signal=KILL 7.1", ""),
        ("service", "scancel --signal=KILL 7.0", ""),
        ("requeue", "scontrol requeue 7", "scontrol requeue was refused: Access/permission denied"),
    ],
)
def test_how_each_fault_is_injected(kind: str, asked: str, refused: str, cluster: Cluster, tmp_path: Path):
    assert cluster.site.inject(kind, tmp_path) == refused
    assert cluster.asked[-1] == asked


def test_a_job_that_passes_through_the_end_is_not_over(cluster: Cluster):
    cluster.states, answers = ["FAILED", "PENDING", "FAILED"], []
    for _ in range(10):
        cluster.clock.sleep(1.5)
        answers.append(cluster.site.is_over())
    assert answers == [False] * 6 + [True] * 4


@pytest.mark.parametrize(
    ("states", "stayed"),
    [(["COMPLETING", "CANCELLED"], True), (["COMPLETING", "PENDING"], False), (["COMPLETED"], False)],
)
def test_whether_a_cancelled_job_stays_so(states: list[str], stayed: bool, cluster: Cluster):
    cluster.states = list(states)
    assert cluster.site.end() is stayed
    assert cluster.asked[0] == "scancel 7"


@pytest.mark.parametrize(
    ("state", "log", "by_cluster", "text"),
    [
        ("FAILED", "FileNotFoundError: [Errno 2] stop.json\n\n", False, "FileNotFoundError: [Errno 2] stop.json ("),
        ("FAILED", "job: the job ends: no step was gained\n", False, "no step was gained"),
        ("FAILED", "", False, "nothing ("),
        ("FAILED", None, False, "it is FAILED, and its log cannot be read"),
        ("FAILED", f"job: back into the queue\njob: {REFUSED}: Access denied\n", True, "Access denied"),
        ("COMPLETED", f"job: the job ends: the time was up, and {NO_REQUEUE}\n", True, NO_REQUEUE),
        ("NODE_FAIL", "job: \n", True, "job 7 is NODE_FAIL"),
    ],
)
def test_whose_fault_it_is_that_a_job_did_not_come_back(
    tmp_path: Path, cluster: Cluster, state: str, log: str | None, by_cluster: bool, text: str
):
    """The cluster's only if the log of the job or its state says so; everything else is ours."""
    cluster.states = [state]
    if log is not None:
        (tmp_path / "logs" / "7.out").write_text(log)
    found = cluster.site.why_over(tmp_path)
    assert found[0] is by_cluster
    assert text in found[1]


def test_what_a_job_says_when_slurm_refuses_is_what_the_drill_looks_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def refuse(address: str, avoid: Sequence[str]) -> None:
        raise RunError("scontrol requeue was refused: Access denied")

    monkeypatch.setattr(lingua.scheduler, "requeue", refuse)
    lingua.launch.job.send_back(Allocation("7", 0, 1, 1, 1))
    assert f"{REFUSED}: scontrol requeue was refused: Access denied" in caplog.text
