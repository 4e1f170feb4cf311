"""Rank 0 learns that a process is gone from the connection that its kernel closes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from lingua.distributed.lifeline import Lifelines, hold

GREETINGS = [b"one of rank 1", b"one of rank 2"]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def be_rank(address: tuple[str, int], greeting: bytes, said: Connection) -> None:
    line = hold(address, greeting)
    said.send(line is not None)
    signal.pause()


def start(listener: socket.socket, greeting: bytes) -> multiprocessing.Process:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=be_rank, args=(listener.getsockname(), greeting, there))
    process.start()
    assert here.recv()
    return process


def until_broken(lines: Lifelines) -> list[int]:
    while not (found := lines.broken()):
        pass
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_is_missed_once_and_one_that_is_stopped_is_not(listener: socket.socket, how: int):
    lines = Lifelines(listener, GREETINGS)
    first, second = (start(listener, greeting) for greeting in GREETINGS)
    assert first.pid is not None
    assert second.pid is not None
    os.kill(second.pid, signal.SIGSTOP)
    assert lines.broken() == []
    os.kill(first.pid, how)
    assert until_broken(lines) == [1]
    assert lines.broken() == []
    second.kill()
    assert until_broken(lines) == [2]
    for process in (first, second):
        process.join()


def test_strangers_are_sent_away_and_take_nobodys_place(listener: socket.socket):
    lines, address = Lifelines(listener, GREETINGS), listener.getsockname()
    rank = hold(address, GREETINGS[0])
    while lines.broken() or not lines._known:
        pass
    strangers = [socket.create_connection(address) for _ in range(20)]
    for number, stranger in enumerate(strangers):
        stranger.sendall(GREETINGS[0] if number == 3 else b"GET / HTTP/1.1\r\n" * 100)
    for stranger in strangers:
        stranger.setblocking(False)
        while True:
            assert lines.broken() == []
            try:
                assert stranger.recv(1) == b""
            except BlockingIOError:
                continue
            except ConnectionResetError:
                pass
            break
        stranger.close()
    assert rank is not None
    rank.close()
    assert until_broken(lines) == [1]


def test_without_a_connection_a_rank_goes_on_with_a_warning(listener: socket.socket, caplog: pytest.LogCaptureFixture):
    address = listener.getsockname()
    listener.close()
    assert hold(address, GREETINGS[0]) is None
    assert "the others notice late" in caplog.text
