"""Checkpoint services in forked processes: they start in milliseconds, may die at any line, and outlive no test.

A spawner, forked from the test, forks each service on request and waits for its end, so all of them are known by pid
whoever asked for them. The kernel kills a service with its spawner and the spawner with the test.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lingua.train.build
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.shm import service
from lingua.checkpoint.shm.service_client import ServiceProcess
from lingua.files import DISK, Files
from tests.ranks import fork
from tests.trainer import Hook

PR_SET_PDEATHSIG = 1
GONE_WITHIN_S = 300.0
"""Services that are still there so long after their last rank has gone are killed, and the test fails."""

FilesOf = Callable[[int], Files]


def plain_files(start: int) -> Files:
    return DISK


class Services:
    """Starts services (`start` is what a manager takes as `start_service`). A context manager.

    `files(n)` is the disk of the n-th service, n from 1; `prepare` is called in each before it begins.
    """

    def __init__(self, files: FilesOf = plain_files, prepare: Callable[[], None] = lambda: None) -> None:
        self._asking, self._asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._answers, self._answering = os.pipe()
        self._pid = fork()
        if self._pid == 0:
            _Spawner(self._asked, self._answering, files, prepare).serve_and_exit()

    def start(self, run_dir: Path, shm: Path, log_file: Path) -> ServiceProcess:
        """Also from other processes."""
        life, held = os.pipe()
        words = json.dumps(["start", str(run_dir), str(shm), str(log_file)]).encode()
        socket.send_fds(self._asking, [words], [held])
        os.close(held)
        return _ForkedService(life)

    def kill(self) -> int:
        """Kill -9 those that live; how many these were."""
        return self._ask("kill")

    def wait(self) -> int:
        """Wait until all have ended; how many did not and were killed."""
        return self._ask("wait")

    def _ask(self, word: str) -> int:
        self._asking.send(json.dumps([word]).encode())
        answer = os.read(self._answers, 1)
        assert answer, "the spawner of services died"
        return answer[0]

    def __enter__(self) -> Services:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        stubborn = self.wait() if kind is None else self.kill()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._asking.close()
        self._asked.close()
        os.close(self._answers)
        os.close(self._answering)
        assert kind is not None or not stubborn, f"{stubborn} services were still there after {GONE_WITHIN_S} s"


class _ForkedService:
    """Tells a service's end by the closing of a pipe that it holds open."""

    def __init__(self, life: int) -> None:
        self._life = life

    def poll(self) -> int | None:
        return 1 if select.select([self._life], [], [], 0)[0] else None

    def __del__(self) -> None:
        os.close(self._life)


class _Spawner:
    """The life of the process between a test and its services."""

    def __init__(self, asked: socket.socket, answering: int, files: FilesOf, prepare: Callable[[], None]) -> None:
        self._asked, self._answering, self._files, self._prepare = asked, answering, files, prepare
        self._living: dict[int, int] = {}  # pidfd -> pid
        self._n_started = 0

    def serve_and_exit(self) -> None:
        _die_with_parent()
        try:
            while True:
                for descriptor in self._ready([self._asked.fileno(), *self._living], None):
                    if descriptor in self._living:
                        self._reap(descriptor)
                    else:
                        words, held, _, _ = socket.recv_fds(self._asked, 65536, 1)
                        self._obey(json.loads(words))
                        for descriptor in held:
                            os.close(descriptor)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _ready(self, descriptors: list[int], timeout_s: float | None) -> list[int]:
        return select.select(descriptors, [], [], timeout_s)[0]

    def _obey(self, words: list[str]) -> None:
        if words[0] == "start":
            self._start(*(Path(word) for word in words[1:]))
            return
        if words[0] == "wait":
            deadline = time.monotonic() + GONE_WITHIN_S
            while self._living and (left := deadline - time.monotonic()) > 0:
                for descriptor in self._ready(list(self._living), left):
                    self._reap(descriptor)
        n_killed = len(self._living)
        for descriptor, pid in list(self._living.items()):
            os.kill(pid, signal.SIGKILL)
            self._reap(descriptor)
        os.write(self._answering, bytes([n_killed]))

    def _reap(self, descriptor: int) -> None:
        os.waitpid(self._living.pop(descriptor), 0)
        os.close(descriptor)

    def _start(self, run_dir: Path, shm: Path, log_file: Path) -> None:
        self._n_started += 1
        pid = fork()
        if pid == 0:
            self._be_service(run_dir, shm, log_file)
        self._living[os.pidfd_open(pid)] = pid

    def _be_service(self, run_dir: Path, shm: Path, log_file: Path) -> None:
        code = 99
        try:
            _die_with_parent()
            os.setsid()
            log_file.parent.mkdir(parents=True, exist_ok=True)
            said = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            logging.getLogger().handlers.clear()
            logging.getLogger("lingua").setLevel(logging.NOTSET)  # whatever a test before has set
            self._prepare()
            service.Service = partial(service.Service, files=self._files(self._n_started))
            code = service.main([str(run_dir), "--shm", str(shm)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def served_by(services: Services, files: Callable[[int], Files] = plain_files) -> Hook:
    """Hook: a trainer's checkpoints go through these services, and through rank r's disk `files(r)`."""

    def hook(rank: int) -> None:
        manager = partial(CheckpointManager, start_service=services.start, files=files(rank))
        setattr(lingua.train.build, "CheckpointManager", manager)  # noqa: B010

    return hook


def both(*hooks: Hook) -> Hook:
    """Hook: all of these."""

    def hook(rank: int) -> None:
        for each in hooks:
            each(rank)

    return hook
