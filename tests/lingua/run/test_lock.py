"""One owner of a run folder: who is refused, who may take over, and who learns that it was overtaken."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lingua.files import RunError, read_json, write_json
from lingua.run.lock import (
    Attempt,
    OccupiedError,
    OvertakenError,
    Owner,
    RunLock,
    certainly,
    living_attempt,
    newest_attempt,
    still_owns,
    this_process,
    why_overtaken,
)
from tests.ranks import exit_code_of


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.time, self.awake_s = 1e9, 0.0
        self.while_asleep: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.awake_s

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.awake_s += seconds
        self.while_asleep()


ELSEWHERE = Owner(host="node-b", boot_id="other", pid_space="other", pid=1, started="7")


def lock_of(run_dir: Path, me: Owner | None = None, clock: Clock | None = None) -> RunLock:
    clock = clock or Clock()
    return RunLock(run_dir, me, now=clock.now, monotonic=clock.monotonic, sleep=clock.sleep)


@pytest.mark.parametrize(
    ("attempt", "certain", "age_s", "unchanged_s", "has_beaten", "owns"),
    [
        (Attempt(1, ELSEWHERE, released=True), True, 0, 0, False, False),
        (Attempt(1, ELSEWHERE, copied_from="/runs/a"), True, 0, 0, True, False),
        (Attempt(1, ELSEWHERE), True, 1e6, 1e6, False, True),  # it lives on this host
        (Attempt(1, ELSEWHERE), False, 0, 0, True, False),
        (Attempt(1, ELSEWHERE), None, 5, 0, False, None),
        (Attempt(1, ELSEWHERE), None, 61, 0, False, False),
        (Attempt(1, ELSEWHERE), None, 5, 60, False, None),
        (Attempt(1, ELSEWHERE), None, 5, 61, False, False),
        (Attempt(1, ELSEWHERE), None, -240, 60, False, None),  # the clock was set back
        (Attempt(1, ELSEWHERE), None, -240, 61, False, False),
        (Attempt(1, ELSEWHERE), None, 1e6, 5, True, True),  # the clock was set forward
    ],
)
def test_whether_an_owner_still_owns(
    attempt: Attempt, certain: bool | None, age_s: float, unchanged_s: float, has_beaten: bool, owns: bool | None
) -> None:
    assert still_owns(attempt, certain, age_s=age_s, unchanged_s=unchanged_s, has_beaten=has_beaten) is owns


@pytest.mark.parametrize(
    ("newest", "is_ours", "why"),
    [
        (3, True, None),
        (0, None, None),  # the folder was moved away: nobody has it
        (4, True, "attempt 4 of this run has taken over /run; this one, attempt 3, stops"),
        (4, None, "attempt 4 of this run has taken over /run; this one, attempt 3, stops"),
        (3, False, "another run has begun in /run, after the folder .* was removed or replaced; .* attempt 3, stops"),
        (1, None, None),
    ],
)
def test_why_an_attempt_must_stop(newest: int, is_ours: bool | None, why: str | None) -> None:
    found = why_overtaken(Path("/run"), 3, newest, is_ours)
    assert found is None if why is None else found is not None and re.fullmatch(why, found)


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


@pytest.mark.parametrize("back_s", [240.0, 1e6])
def test_a_clock_that_was_set_back_holds_up_a_minute(tmp_path: Path, back_s: float) -> None:
    clock = Clock()
    lock_of(tmp_path, ELSEWHERE, clock).acquire()
    clock.time -= back_s
    assert lock_of(tmp_path, None, clock).acquire() == 2
    assert 60 < clock.awake_s < 70


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


def test_an_overtaken_owner_is_told_at_its_next_heartbeat_and_signs_nothing(tmp_path: Path) -> None:
    clock, told = Clock(), list[Exception]()
    asleep = lock_of(tmp_path, ELSEWHERE, clock)
    asleep.acquire()
    asleep.on_lost = told.append
    asleep.beat()
    asleep.look()
    clock.time += 100
    lock_of(tmp_path, None, clock).acquire()
    before_s = (tmp_path / "incarnations" / "0000000001.json").stat().st_mtime
    asleep.beat()
    assert [type(error) for error in told] == [OvertakenError]
    assert (tmp_path / "incarnations" / "0000000001.json").stat().st_mtime == before_s
    with pytest.raises(OvertakenError, match="attempt 2 of this run has taken over"):
        asleep.look()


def test_a_look_is_taken_by_the_heartbeats_thread_at_once(tmp_path: Path) -> None:
    lock, told = lock_of(tmp_path), threading.Event()
    lock.acquire()
    lock.on_lost = lambda error: told.set()
    (tmp_path / "incarnations" / "0000000002.json").write_text("{}")
    lock.look()
    assert told.wait(60.0)  # and not only at the next heartbeat
    lock.release()


def test_a_bug_in_the_heartbeats_thread_is_told_and_the_folder_is_not_held_in_silence(tmp_path: Path) -> None:
    def bug() -> None:
        raise ZeroDivisionError("what was never thought of")

    lock, told = lock_of(tmp_path), list[Exception]()
    lock.acquire()
    lock.on_beat, lock.on_lost = bug, told.append
    lock.look()  # wakes the thread
    assert lock._thread is not None
    lock._thread.join(300)
    assert [str(error) for error in told] == ["what was never thought of"]
    for ask in (lock.look, lock.check):
        with pytest.raises(RunError, match=r"the heartbeat in .* failed: ZeroDivisionError: what was never"):
            ask()
    lock.release()


def test_a_run_in_a_folder_that_was_removed_and_made_again_is_another(tmp_path: Path) -> None:
    old = lock_of(tmp_path)
    old.acquire()
    assert old.holds()
    shutil.rmtree(tmp_path / "incarnations")
    old.check()
    assert not old.holds()
    with lock_of(tmp_path, replace(this_process(), slurm_job_id="8")) as new:
        assert new.attempt == old.attempt == 1
        with pytest.raises(OvertakenError, match="another run has begun"):
            old.check()
        old.release()  # its own lock, which is gone
        with pytest.raises(OccupiedError):
            lock_of(tmp_path).acquire()


def test_a_copy_of_a_living_run_is_free_and_the_run_is_not(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    with lock_of(run) as lock:
        shutil.copytree(run, copy)
        found = newest_attempt(copy)
        assert found is not None
        assert found.copied_from == str(run)
        assert living_attempt(copy) is None
        assert living_attempt(run) is not None
        with lock_of(copy) as other:
            assert other.attempt == 2
            assert living_attempt(copy) is not None
            lock.check()
        with pytest.raises(OccupiedError):
            lock_of(run).acquire()


def test_a_living_run_whose_folder_was_renamed_still_owns_it(tmp_path: Path) -> None:
    with lock_of(tmp_path / "run") as lock:
        (tmp_path / "run").rename(tmp_path / "renamed")
        with pytest.raises(OccupiedError):
            lock_of(tmp_path / "renamed").acquire()
        lock.check()
        (tmp_path / "renamed").rename(tmp_path / "run")


def test_an_older_version_s_record_names_no_folder(tmp_path: Path) -> None:
    with lock_of(tmp_path / "run"):
        pass
    path = tmp_path / "run" / "incarnations" / "0000000001.json"
    write_json(path, vars(this_process()) | {"incarnation": 1, "released": False})
    with pytest.raises(OccupiedError):
        lock_of(tmp_path / "run").acquire()
