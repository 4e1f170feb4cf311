"""A tracker that fails or blocks, at any of its calls, is one warning and nothing else."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from lingua.run.tracking import SILENT_S, Session, Tracker
from tests.fakes import Clock

WAIT_S = 60.0  # for what happens at once


class Failing:
    """A session that fails, as `act` says, at a call of the given name; the others are noted in `sent`."""

    def __init__(self, sent: list[Any], fail_at: str = "", act: Callable[[], Any] = lambda: None) -> None:
        self._sent, self._fail_at, self._act = sent, fail_at, act
        self.folder: str | None = f"run {len(sent)}"
        self._note("begin", "begin")

    def _note(self, name: str, what: Any) -> None:
        if name == self._fail_at:
            self._act()
        self._sent.append(what)

    def log(self, record: Mapping[str, Any]) -> None:
        self._note("log", record["global_step"])

    def finish(self, exit_code: int) -> None:
        self._note("finish", f"finish {exit_code}")


def refuse() -> None:
    raise ConnectionResetError("Connection lost\nand more")


def leave() -> None:
    raise SystemExit(3)


@contextmanager
def blocked() -> Iterator[tuple[Callable[[], None], threading.Event]]:
    """(a call that does not return before the end of the context, whether it was reached)."""
    reached, over = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        over.wait()

    try:
        yield block, reached
    finally:
        over.set()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def track(*ways: Callable[[], Session], exit_code: int = 0) -> None:
    tracker = Tracker("wandb", ways)
    for step in (1, 2, 3):
        tracker.log({"global_step": step})
    tracker.close(exit_code, WAIT_S)
    tracker.log({"global_step": 4})


def test_all_goes_to_the_session_in_order(caplog: pytest.LogCaptureFixture):
    sent: list[Any] = []
    track(lambda: Failing(sent), exit_code=1)
    assert sent == ["begin", 1, 2, 3, "finish 1"]
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("act", [refuse, leave])
@pytest.mark.parametrize("fail_at", ["begin", "log"])
def test_what_fails_goes_on_in_the_next_way_without_losing_a_record(
    fail_at: str, act: Callable[[], None], caplog: pytest.LogCaptureFixture
):
    sent: list[Any] = []
    track(lambda: Failing([], fail_at, act), lambda: Failing(sent))
    assert sent == ["begin", 1, 2, 3, "finish 0"]
    (warning,) = warnings_in(caplog)
    assert warning.startswith(
        "wandb: " + ("ConnectionResetError: Connection lost; " if act is refuse else "SystemExit: 3")
    )
    assert "offline" in warning
    assert "`wandb sync 'run 0'" in warning


@pytest.mark.parametrize("fail_at", ["begin", "log", "finish"])
def test_when_all_ways_have_failed_one_warning_says_so(fail_at: str, caplog: pytest.LogCaptureFixture):
    track(lambda: Failing([], fail_at, refuse), lambda: Failing([], fail_at, refuse))
    *_, warning = warnings_in(caplog)
    assert "Connection lost; this attempt is no longer tracked there. The run continues" in warning
    assert ("`wandb sync 'run 0'" in warning) == (fail_at != "begin")
    assert len(warnings_in(caplog)) == (2 if fail_at == "log" else 1)  # offline, then not at all


@pytest.mark.parametrize("fail_at", ["begin", "log"])
def test_a_call_that_does_not_return_holds_nothing_up(fail_at: str, caplog: pytest.LogCaptureFixture):
    clock, sent = Clock(), []
    with blocked() as (block, reached):
        tracker = Tracker("wandb", [lambda: Failing(sent, fail_at, block)], now=clock.now)
        tracker.log({"global_step": 1})
        assert reached.wait(WAIT_S)
        clock.sleep(SILENT_S)
        tracker.log({"global_step": 2})
        assert warnings_in(caplog) == []
        clock.sleep(1)
        tracker.log({"global_step": 3})
        assert f"wandb: no answer for {SILENT_S:.0f} s; " in "".join(warnings_in(caplog))
        tracker.close(0, WAIT_S)  # and is not waited for
    tracker._thread.join(WAIT_S)
    assert sent == (["begin"] if fail_at == "begin" else ["begin", 1])  # what came back late stops there
    assert len(warnings_in(caplog)) == 1


def test_the_end_of_a_run_waits_for_so_long_and_no_longer(caplog: pytest.LogCaptureFixture):
    with blocked() as (block, reached):
        tracker = Tracker("wandb", [lambda: Failing([], "finish", block)])
        tracker.close(0, 0.01)
        assert reached.wait(WAIT_S)
        (warning,) = warnings_in(caplog)
        assert "wandb: it did not end within 0.01 s; " in warning


def test_records_are_held_up_to_a_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr("lingua.run.tracking._HELD_RECORDS", 2)
    with blocked() as (block, reached):
        tracker = Tracker("wandb", [lambda: Failing([], "begin", block)])
        assert reached.wait(WAIT_S)
        for step in range(5):
            tracker.log({"global_step": step})
        tracker.close(0, WAIT_S)
        (warning,) = warnings_in(caplog)
        assert "it has not taken the last 2 records" in warning
