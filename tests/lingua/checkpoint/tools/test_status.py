"""What is told of a run's checkpoints, and whether one can still come; looking writes nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lingua.checkpoint import layout, publish
from lingua.checkpoint.retention import kinds
from lingua.checkpoint.tools.status import await_done, leases, survey, why_never
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.files import RunError, write_json
from lingua.run.lock import RunLock
from tests.checkpoints import FILES, content, make_run, names_under, publish_step, write_part


def test_everything_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    root = make_run(tmp_path, 2, 3, 4, 6, 7, dump={"every": 2, "keep": 1}, eval={"every": 3, "keep": 0}, keep_every=4)
    publish.set_aside(tmp_path, root, 7, "later")
    (layout.folder(root, 3) / FILES[0]).unlink()
    write_part(root, 8)
    publish.pin(root, 2, "eval-17", expires_at=500.0)
    publish.pin(root, 2, "eval-16", expires_at=50.0)
    (root / "0000000005").mkdir()
    before = names_under(tmp_path)

    found = survey(tmp_path, now=lambda: 100.0)

    assert names_under(tmp_path) == before
    assert found.trained_by is None
    assert [(one.step, one.kinds) for one in found.published] == [
        (2, ["dump"]),
        (3, ["eval"]),
        (4, ["dump", "milestone"]),
        (6, ["dump", "eval"]),
    ]
    assert [one.pinned_by for one in found.published] == [["eval-17"], [], [], []]
    assert [one.problems for one in found.published] == [[], [".metadata is missing or not a plain file"], [], []]
    first = found.published[0]
    manifest_bytes = (layout.folder(root, 2) / layout.MANIFEST).stat().st_size
    assert first.size_bytes == sum(len(content(2, name)) for name in FILES) + manifest_bytes
    assert (first.incarnation, first.seconds) == (1, 1.5)
    (coming,) = found.moving
    assert (coming.step, coming.what, coming.size_bytes) == (8, "coming", sum(len(content(8, n)) for n in FILES))
    assert sorted((one.path.name, one.what) for one in found.set_aside) == [
        ("0000000007.later-1", "later"),
        ("checkpoint_0000000007.done.later-1", "later"),
    ]
    assert found.unmarked == [5]


def test_who_trains_is_told(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    with RunLock(tmp_path):
        assert f"process {os.getpid()} on" in str(survey(tmp_path).trained_by)
    assert survey(tmp_path).trained_by is None


def test_a_mark_that_cannot_be_read_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    root = make_run(tmp_path, 1)
    layout.done_mark(root, 1).write_text("{}")
    (one,) = survey(tmp_path).published
    assert (one.incarnation, one.seconds) == (None, None)
    assert one.size_bytes > 0
    assert "is not a checkpoint's mark" in one.problems[0]


def test_a_lease_that_cannot_be_read_has_run_out(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    pins = tmp_path / layout.PINS
    pins.mkdir()
    (pins / "0000000001.me.json").write_text("{")
    (pins / ".0000000001.me.json.tmp-1").write_text("{")
    assert [(pin.reader, pin.expires_at) for pin in leases(tmp_path)] == [("me", 0.0)]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run: it has no config\.yaml"):
        survey(tmp_path)
    with pytest.raises(RunError, match="absent does not exist"):
        survey(tmp_path / "absent")


@pytest.mark.parametrize(
    ("step", "expected"), [(4, ["dump"]), (6, ["eval"]), (12, ["dump", "eval"]), (10, ["milestone"]), (7, ["stop"])]
)
def test_kinds(step: int, expected: list[str]) -> None:
    args = CheckpointArgs(dump=SaveEvery(every=4, keep=1), eval=SaveEvery(every=6, keep=1), keep_every=10)
    assert kinds(step, args) == expected


# -- waiting -------------------------------------------------------------------------------------------------------

FINISHED = {"reason": "finished", "exit_code": 0, "step": 40}


@pytest.mark.parametrize(
    ("done", "is_coming", "stop", "reason"),
    [
        ([], False, None, None),
        ([10, 20], False, None, None),
        ([10, 40], False, None, "has published later steps and not this one: it has 10, 40"),
        ([10, 40], True, None, None),
        ([10], False, FINISHED, r"has ended \(finished, step 40\), and its newest checkpoint is 10"),
        ([], False, {"reason": "error", "exit_code": 1}, r"has ended \(error\), and it has no checkpoint"),
        ([10], True, FINISHED, None),
        ([10], False, {"reason": "signal", "exit_code": 75, "step": 12}, None),  # Slurm starts it again
    ],
)
def test_whether_step_30_can_still_come(
    done: list[int], is_coming: bool, stop: dict[str, Any] | None, reason: str | None
) -> None:
    told = why_never(30, done, is_coming, stop)
    if reason is None:
        assert told is None
    else:
        assert told is not None
        assert re.search(reason, told), told


class Clock:
    """A clock that only sleeping moves; something happens when it has slept `n` times."""

    def __init__(self, start_s: float, n: int = 0, happens: Callable[[], object] = lambda: None) -> None:
        self.time_s, self.n_left, self.happens = start_s, n, happens

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds
        self.n_left -= 1
        if self.n_left == 0:
            self.happens()


def wait(run_dir: Path, step: int, clock: Clock, timeout_s: float | None = None) -> str | None:
    return await_done(run_dir, step, timeout_s, now=clock.now, sleep=clock.sleep)


def test_it_comes_while_we_wait(tmp_path: Path) -> None:
    root = make_run(tmp_path, 1)
    assert wait(tmp_path, 1, Clock(0)) is None
    assert wait(tmp_path, 2, Clock(0, 3, lambda: publish_step(root, 2))) is None


def test_the_time_is_up(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    clock = Clock(1000)
    assert wait(tmp_path, 2, clock, timeout_s=12) == "it is not published after 12 s; the run has 1"
    assert clock.time_s == 1012


def test_a_run_that_has_ended_may_still_be_publishing_for_a_minute(tmp_path: Path) -> None:
    root = make_run(tmp_path, 1)
    stop = tmp_path / "stop.json"
    write_json(stop, FINISHED)
    clock = Clock(stop.stat().st_mtime)
    assert "has ended" in str(wait(tmp_path, 2, clock))
    assert 60 < clock.time_s - stop.stat().st_mtime < 70
    write_part(root, 2)  # its service is at work
    assert "not published after 100 s" in str(wait(tmp_path, 2, Clock(clock.time_s), timeout_s=100))


def test_needs_no_torch() -> None:
    tools = "lingua.checkpoint.tools"
    modules = f"{tools}.status, {tools}.gc, {tools}.copy, lingua.checkpoint.metadata"
    probe = f"import sys, {modules}; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
