"""Who leaves, when, and with which words: decisions of one rank, with the clock, the others and the exit in hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

import lingua.run.watchdog
from lingua.config.keys.watchdog import WatchdogArgs
from lingua.files import RunError
from lingua.run.failure import HungError, RankError, mark_known, read_failures
from lingua.run.lock import OvertakenError
from lingua.run.watchdog import End, Watchdog
from lingua.signals import STOP_REQUEST, StopSignals

FAILED_ELSEWHERE = End(2, "error", 1, "DataError: line 7", "data")


class Room:
    """The store at which ranks meet: the first message stands."""

    def __init__(self, message: End | None = None, killed: Sequence[int] = ()) -> None:
        self.killed = list(killed)
        self.message = None if message is None else orjson.dumps(message.__dict__)
        self.left = 0

    def send(self, message: bytes) -> None:
        self.message = self.message or message

    def received(self) -> bytes | None:
        return self.message

    def gone(self) -> list[int]:
        return self.killed

    def leave(self, within_s: float) -> None:
        self.left += 1


class Rank:
    """A guarded rank whose process only seems to end."""

    def __init__(self, run_dir: Path, rank: int = 0, watchdog: WatchdogArgs | None = None) -> None:
        self.run_dir, self.time_s, self.exit_codes = run_dir, 0.0, list[int]()
        self.signals = StopSignals([], now=lambda: self.time_s)
        self.watchdog = Watchdog(
            rank, self.signals, watchdog, run_dir, now=lambda: self.time_s, leave=self.exit_codes.append
        )
        self.watchdog.open(3)

    @property
    def stop(self) -> dict[str, Any]:
        return orjson.loads((self.run_dir / "stop.json").read_bytes())


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "ECHO_S", "LOST_S"):
        monkeypatch.setattr(lingua.run.watchdog, name, 0.001)
    monkeypatch.setattr(lingua.run.watchdog.logging, "shutdown", lambda: None)


def listen(rank: Rank, room: Any) -> None:
    """What the listening thread does, here and now."""
    rank.watchdog._peers = room
    rank.watchdog._listen()


@pytest.mark.parametrize(
    ("received", "reason", "exit_code"),
    [("SIGTERM", "signal", 75), ("SIGUSR2", "signal", 75), ("SIGINT", "signal", 130), (STOP_REQUEST, "asked", 130)],
)
def test_a_stop_before_the_first_step_ends_it_at_once(tmp_path: Path, received: str, reason: str, exit_code: int):
    rank, room = Rank(tmp_path), Room()
    rank.watchdog._peers = room
    rank.watchdog.look()
    assert rank.exit_codes == []
    rank.signals.ask(received)
    rank.watchdog.look()
    assert rank.exit_codes == []  # the first step may be about to end
    rank.time_s += lingua.run.watchdog.START_GRACE_S
    rank.watchdog.look()
    assert rank.exit_codes == [exit_code]
    assert (rank.stop["reason"], rank.stop["signal"], rank.stop["exit_code"]) == (reason, received, exit_code)
    assert room.left == 1

    other = Rank(tmp_path / "other", rank=1)  # which got no signal
    listen(other, room)
    assert other.exit_codes == [exit_code]
    assert not (tmp_path / "other" / "stop.json").exists()  # that is for rank 0 to say


def test_after_the_first_step_the_loop_decides(tmp_path: Path):
    rank = Rank(tmp_path)
    rank.watchdog.heartbeat.beat(1)
    rank.signals.ask("SIGTERM")
    rank.time_s += lingua.run.watchdog.START_GRACE_S
    rank.watchdog.look()
    assert rank.exit_codes == []
    assert rank.watchdog.asked


def test_a_hang_is_written_down_with_stacks_and_told(tmp_path: Path):
    rank, room = Rank(tmp_path, watchdog=WatchdogArgs(other_s=10)), Room()
    rank.watchdog._peers = room
    rank.time_s = 11
    rank.watchdog.look()
    assert rank.exit_codes == [76]
    assert (rank.stop["kind"], rank.stop["exit_code"]) == ("hang", 76)
    assert "test_a_hang_is_written_down" in (tmp_path / "logs" / "stacks_0.txt").read_text()
    (failure,) = read_failures(tmp_path)
    assert (failure.kind, failure.type) == ("hang", HungError.__name__)

    other = Rank(tmp_path, rank=1)
    listen(other, room)
    assert other.exit_codes == [76]
    assert (tmp_path / "logs" / "stacks_1.txt").exists()


def test_the_failure_of_another_rank_is_taken_over_with_its_kind(tmp_path: Path):
    rank, released = Rank(tmp_path), list[str]()
    rank.watchdog.at_exit += [lambda: released.append("lock"), lambda: 1 // 0, lambda: released.append("terminal")]
    listen(rank, Room(FAILED_ELSEWHERE))
    assert rank.exit_codes == [1]
    assert released == ["lock", "terminal"]  # one that fails does not keep the others from being done
    (failure,) = read_failures(tmp_path)
    assert (failure.kind, failure.because_of_rank, failure.rank) == ("data", 2, 0)
    assert failure.message == "rank 2 failed, so rank 0 leaves: DataError: line 7"
    assert (rank.stop["kind"], rank.stop["rank"], rank.stop["error"]) == ("data", 2, "rank 2: DataError: line 7")


def test_a_rank_that_is_gone_without_a_word_is_named_to_all(tmp_path: Path):
    rank, room = Rank(tmp_path), Room(killed=[2])
    listen(rank, room)
    assert rank.exit_codes == [1]
    (failure,) = read_failures(tmp_path)
    assert (failure.kind, failure.because_of_rank) == ("nccl", 2)
    assert failure.message.startswith("rank 2 is gone without a word: its process was killed")
    assert (rank.stop["kind"], rank.stop["rank"]) == ("nccl", 2)
    other = Rank(tmp_path, rank=1)
    listen(other, room)
    assert "rank 2 is gone" in read_failures(tmp_path)[1].message


def test_what_a_rank_said_before_it_was_gone_counts(tmp_path: Path):
    rank = Rank(tmp_path)
    listen(rank, Room(FAILED_ELSEWHERE, killed=[2]))
    assert rank.stop["error"] == "rank 2: DataError: line 7"


def test_an_own_failure_is_told_and_raised(tmp_path: Path):
    rank, room = Rank(tmp_path), Room()
    rank.watchdog._peers = room
    with pytest.raises(RunError, match="no room"), rank.watchdog.reporting():
        raise RunError("no room")
    assert End(**orjson.loads(room.message or b"")) == End(0, "error", 1, "RunError: no room", "setup")
    assert rank.exit_codes == []  # the main thread ends by itself, ...
    rank.time_s += lingua.run.watchdog.LEAVE_WITHIN_S + 1
    rank.watchdog.look()
    assert rank.exit_codes == [1]  # ... or is ended


def test_what_all_ranks_raise_is_told_to_none(tmp_path: Path):
    rank, room = Rank(tmp_path), Room()
    rank.watchdog._peers = room
    with pytest.raises(RankError), rank.watchdog.reporting():
        raise mark_known(RankError("rank 1: DataError: line 7", "data"))
    assert room.message is None
    assert rank.stop["kind"] == "data"


def test_who_lost_contact_hears_whose_fault_it_was(tmp_path: Path):
    """Nobody said why: then the sentence is this rank's own."""
    rank = Rank(tmp_path)
    rank.watchdog._peers = Room()
    with (
        pytest.raises(RankError, match=r"connection to another rank was lost.*Connection closed"),
        rank.watchdog.reporting(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer\nmore")
    assert rank.stop["kind"] == "nccl"


def test_a_store_that_is_gone_ends_a_rank_that_does_not_end_by_itself(tmp_path: Path):
    class Gone(Room):
        def received(self) -> bytes | None:
            raise RuntimeError("Failed to recv\nmore")

    rank = Rank(tmp_path, rank=1)
    listen(rank, Gone())
    assert rank.exit_codes == [1]
    assert read_failures(tmp_path)[0].message == "rank 0 or its node is gone (Failed to recv)"

    over = Rank(tmp_path / "over", rank=1)
    over.watchdog._closed.set()
    listen(over, Gone())
    assert over.exit_codes == []


def test_the_folder_of_another_attempt_is_left_alone(tmp_path: Path):
    from lingua.run.lock import OccupiedError

    rank = Rank(tmp_path)
    rank.watchdog._attempt = None  # it was never ours
    with pytest.raises(OccupiedError), rank.watchdog.reporting():
        raise OccupiedError("out/x is being trained by process 7")
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_ends_in_good_order_leaves_no_thread(tmp_path: Path):
    with StopSignals(["SIGUSR1"]) as signals, Watchdog(0, signals, WatchdogArgs(), tmp_path) as watchdog:
        watchdog.join(Room())
        threads = list(watchdog._threads)
        assert all(thread.is_alive() for thread in threads)
    assert not any(thread.is_alive() for thread in threads)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_a_thread_has_found_ends_all_ranks(tmp_path: Path):
    rank, room = Rank(tmp_path), Room()
    rank.watchdog._peers = room
    rank.watchdog.fail(RunError("the folder belongs to another run"))
    rank.watchdog.look()
    assert rank.exit_codes == [1]
    assert rank.stop["reason"] == "error"
    assert room.message is not None
    assert "the folder belongs to another run" in room.message.decode()


def test_an_overtaken_rank_ends_and_leaves_nothing_in_what_is_anothers_folder(tmp_path: Path):
    rank, room, other = Rank(tmp_path), Room(), Rank(tmp_path, rank=1)
    rank.watchdog._peers = room
    rank.watchdog.fail(OvertakenError("attempt 4 of this run has taken over"))
    rank.watchdog.look()
    assert rank.exit_codes == [1]
    listen(other, room)
    assert other.exit_codes == [1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("thread", ["watch", "listen"])
def test_a_bug_in_a_thread_of_the_watchdog_ends_all_ranks(tmp_path: Path, thread: str):
    """Or nobody would look at the clock, or hear another rank that leaves."""

    class Broken(Room):
        def received(self) -> bytes | None:
            raise ZeroDivisionError("what was never thought of")

    rank, room = Rank(tmp_path), Broken()
    if thread == "watch":
        rank.watchdog._peers = room
        rank.watchdog.look = room.received  # pyright: ignore[reportAttributeAccessIssue]
        rank.watchdog._start(rank.watchdog._watch, "watchdog")
    else:
        rank.watchdog.join(room)
    for each in rank.watchdog._threads:
        each.join(300)
    assert rank.exit_codes == [1]
    assert (rank.stop["reason"], rank.stop["kind"]) == ("error", "bug")
    assert room.message is not None
    assert "ZeroDivisionError: what was never thought of" in room.message.decode()
    assert "in received" in str(read_failures(tmp_path)[0].traceback)
