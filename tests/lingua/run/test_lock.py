"""One owner of a run folder: who is refused, who may take over, and who learns that it was overtaken."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lingua.files import RunError, read_json
from lingua.run.lock import OccupiedError, Owner, RunLock, certainly, living_attempt, newest_attempt, this_process
from tests.ranks import exit_code_of


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.time = 1e9
        self.while_asleep: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.while_asleep()


ELSEWHERE = Owner(host="node-b", boot_id="other", pid_space="other", pid=1, started="7")


def lock_of(run_dir: Path, me: Owner | None = None, clock: Clock | None = None) -> RunLock:
    clock = clock or Clock()
    return RunLock(run_dir, me, now=clock.now, sleep=clock.sleep)


def test_numbers_go_up(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with RunLock(tmp_path) as lock:
            assert lock.attempt == number
    assert read_json(tmp_path / "incarnations" / "0000000003.json")["released"]
    assert sorted(os.listdir(tmp_path / "incarnations")) == [f"000000000{n}.json" for n in (1, 2, 3)]


def test_the_second_is_refused(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(OccupiedError, match=rf"is being trained by process {os.getpid()} on .*; stop"),
    ):
        RunLock(tmp_path).acquire()


def test_a_dead_process_of_this_host_holds_nobody_up(tmp_path: Path) -> None:
    assert exit_code_of(lambda: RunLock(tmp_path).acquire()) == 0
    assert lock_of(tmp_path).acquire() == 2  # the clock stands still: no waiting was needed


def test_certainty() -> None:
    me = this_process()
    assert certainly(me, me) is True
    assert certainly(replace(me, started="1"), me) is False  # the pid was given to somebody else
    assert certainly(replace(me, pid=2**22 + 1), me) is False
    assert certainly(replace(me, boot_id="before the reboot"), me) is None
    assert certainly(replace(me, pid_space="a container"), me) is None
    assert certainly(ELSEWHERE, me) is None
    first = replace(ELSEWHERE, slurm_job_id="17", slurm_restarts=0)
    assert certainly(first, replace(me, slurm_job_id="17", slurm_restarts=1)) is False
    assert certainly(first, replace(me, slurm_job_id="17", slurm_restarts=0)) is None
    assert certainly(first, replace(me, slurm_job_id="18", slurm_restarts=1)) is None


def test_a_silent_owner_elsewhere_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    clock = Clock()
    assert lock_of(tmp_path, ELSEWHERE, clock).acquire() == 1
    began = clock.time
    assert lock_of(tmp_path, None, clock).acquire() == 2
    assert 60 < clock.time - began < 70


def test_a_beating_owner_elsewhere_refuses_at_its_next_beat(tmp_path: Path) -> None:
    clock = Clock()
    owner = lock_of(tmp_path, replace(ELSEWHERE, slurm_job_id="17"), clock)
    owner.acquire()
    clock.while_asleep = lambda: os.utime(tmp_path / "incarnations" / "0000000001.json", (clock.time, clock.time))
    with pytest.raises(OccupiedError, match="process 1 on node-b, Slurm job 17; stop"):
        lock_of(tmp_path, None, clock).acquire()


def test_an_owner_elsewhere_that_lets_go_is_followed_at_once(tmp_path: Path) -> None:
    clock = Clock()
    owner = lock_of(tmp_path, ELSEWHERE, clock)
    owner.acquire()
    clock.while_asleep = owner.release
    began = clock.time
    assert lock_of(tmp_path, None, clock).acquire() == 2
    assert clock.time - began < 10


def test_one_of_many_wins(tmp_path: Path) -> None:
    results: list[int | None] = []

    def start(n: int) -> None:
        try:
            results.append(lock_of(tmp_path, replace(this_process(), slurm_job_id=str(n))).acquire())
        except OccupiedError:
            results.append(None)

    threads = [threading.Thread(target=start, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=str) == [1] + [None] * 7


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path) as lock:
        assert lock.attempt == 1
        with pytest.raises(OccupiedError):
            RunLock(tmp_path).acquire()


def test_an_overtaken_owner_learns_it(tmp_path: Path) -> None:
    clock = Clock()
    asleep = lock_of(tmp_path, ELSEWHERE, clock)
    asleep.acquire()
    asleep.check()
    clock.time += 100
    lock_of(tmp_path, None, clock).acquire()
    with pytest.raises(RunError, match=r"attempt 2 of this run has taken over .*attempt 1, stops"):
        asleep.check()


def test_without_an_injected_clock_the_file_servers_is_used(tmp_path: Path) -> None:
    lock_of(tmp_path, ELSEWHERE).acquire()  # its beat lies decades back
    assert RunLock(tmp_path).acquire() == 2


def test_reading_shows_who_owns_the_run_and_writes_nothing(tmp_path: Path) -> None:
    assert newest_attempt(tmp_path) is None
    assert living_attempt(tmp_path) is None
    clock = Clock()
    with lock_of(tmp_path, clock=clock):
        before = sorted(os.listdir(tmp_path / "incarnations"))
        found = living_attempt(tmp_path)
        assert found is not None
        assert (found.number, found.released, found.beat_s) == (1, False, clock.time)
        assert str(found).startswith(f"attempt 1 (process {os.getpid()} on ")
        assert sorted(os.listdir(tmp_path / "incarnations")) == before
    assert living_attempt(tmp_path) is None
    released = newest_attempt(tmp_path)
    assert released is not None
    assert released.released_s is not None
    lock_of(tmp_path, replace(ELSEWHERE, slurm_job_id="17"), clock).acquire()
    for later_s, alive in ((30, True), (90, False)):  # only its heartbeat can tell
        assert (living_attempt(tmp_path, now=lambda later_s=later_s: clock.time + later_s) is not None) == alive
    assert str(newest_attempt(tmp_path)) == "attempt 2 (process 1 on node-b, Slurm job 17)"


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"^cannot lock .*file: Not a directory"):
        RunLock(tmp_path / "file").acquire()


@pytest.mark.parametrize(("content", "problem"), [("", "is not valid JSON"), ("[]", "whose"), ('{"a": 1}', "whose")])
def test_a_damaged_record_names_the_file(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "incarnations").mkdir()
    (tmp_path / "incarnations" / "0000000001.json").write_text(content)
    with pytest.raises(RunError, match=rf"0000000001\.json .*{problem}"):
        RunLock(tmp_path).acquire()
