import os
import signal
from typing import Any

import pytest

from lingua.config.keys.train import TrainArgs
from lingua.signals import STOP_REQUEST, SignalFlag, StopSignals, noted


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_is_noted_with_its_time_and_nothing_else_happens(name: str):
    with StopSignals([name], now=lambda: 12.5) as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.Signals[name])
        assert (signals.received, signals.received_at_s) == (name, 12.5)


def test_below_nohup_the_end_of_the_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(["SIGHUP"]) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_is_the_one_that_counts():
    with StopSignals(["SIGTERM", "SIGUSR2"]) as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGUSR2"


def test_a_second_interrupt_ends_the_process_at_once():
    child = os.fork()
    if child == 0:
        with StopSignals(["SIGINT"]):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


def test_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(["SIGTERM"]):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_waiting_thread_hears_a_signal_that_python_has_not_handled_yet():
    """As while the main thread is inside a long call; here the handler that would note it is not run at all."""
    with StopSignals(["SIGTERM"]) as signals:
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is None
        signals.wait(10)
        assert signals.received == "SIGTERM"


def test_waiting_ends_on_request_and_other_signals_mean_nothing():
    with StopSignals(["SIGTERM"]) as signals:
        old = signal.signal(signal.SIGUSR1, lambda number, frame: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.wait(10)
        signal.signal(signal.SIGUSR1, old)
        signals.wake()
        signals.wait(10)
        assert signals.received is None


def test_a_request_counts_as_a_signal_does():
    with StopSignals(["SIGTERM"], now=lambda: 7.0) as signals:
        signals.ask(STOP_REQUEST)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.received, signals.received_at_s) == (STOP_REQUEST, 7.0)


@pytest.mark.parametrize(
    ("config", "stop", "save", "profile"),
    [
        ({}, "SIGHUP SIGINT SIGTERM SIGUSR2", "", "SIGUSR1"),
        ({"signals": {"SIGUSR1": "save"}}, "SIGHUP SIGINT SIGTERM SIGUSR2", "SIGUSR1", ""),
        ({"signals": {"SIGUSR2": "save", "SIGHUP": "stop"}}, "SIGHUP SIGINT SIGTERM", "SIGUSR2", "SIGUSR1"),
        ({"signals": {"SIGUSR1": "save", "SIGHUP": "profile"}}, "SIGINT SIGTERM SIGUSR2", "SIGUSR1", "SIGHUP"),
        ({"stop_signals": ["SIGTERM", "SIGUSR1"]}, "SIGHUP SIGTERM SIGUSR1", "", ""),
        ({"profiling": {"signal": "SIGHUP"}}, "SIGINT SIGTERM SIGUSR2", "", "SIGHUP"),
        ({"profiling": {"signal": None}}, "SIGHUP SIGINT SIGTERM SIGUSR2", "", ""),
    ],
)
def test_what_each_signal_does(config: dict[str, Any], stop: str, save: str, profile: str):
    """`signals` counts before the older keys; a config that is read back means the same."""
    first = TrainArgs.model_validate(config)
    for args in (first, TrainArgs.model_validate(first.model_dump())):
        found = {action: " ".join(args.signals_that(action)) for action in ("stop", "save", "profile")}
        assert found == {"stop": stop, "save": save, "profile": profile}


class SignalInTake(SignalFlag):
    """A signal arrives the moment `taken` is read for the first time."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "taken" and not super().__getattribute__("received"):
            super().__getattribute__("note")()
        return value


def test_a_flag_is_set_by_each_of_its_signals_and_taken_once():
    flag = SignalFlag()
    before = signal.getsignal(signal.SIGUSR1)
    with noted(["SIGUSR1", "SIGHUP"], flag):
        for name in ("SIGUSR1", "SIGHUP"):
            os.kill(os.getpid(), signal.Signals[name])
            assert [flag.take(), flag.take()] == [1.0, 0.0]
    late = SignalInTake()
    assert late.take() + late.take() == 1.0, "a signal inside take is seen now or next time"
    assert signal.getsignal(signal.SIGUSR1) == before
