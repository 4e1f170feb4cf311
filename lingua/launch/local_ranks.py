"""Run the ranks of one node as child processes: `python -m lingua.launch.local_ranks N COMMAND...`.

Each rank gets torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, ...). SIGTERM, SIGUSR1, SIGUSR2, SIGINT and SIGHUP
are forwarded, and the ranks get all the time they need to save; torchrun dies of SIGUSR2 and kills its workers 30 s
after SIGTERM. When a rank ends, the others get PATIENCE_S to end by themselves. If this process is killed, they get
SIGTERM.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from lingua.config.command_line import run_main
from lingua.files import RunError
from lingua.scheduler import STEP_VARIABLES, this_node, this_node_name
from lingua.signals import is_nohup

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
PATIENCE_S = 120.0
"""Time for the other ranks to end after the first: longer than it takes to notice a lost rank, shorter than a grace."""
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1  # prctl(2)


def rank_env(env: Mapping[str, str], local_rank: int, n_local: int, node: int, n_nodes: int) -> dict[str, str]:
    """Return the environment of one rank, with torchrun's names: we are the task of Slurm's step, the rank is not."""
    return {
        **{name: value for name, value in env.items() if name not in STEP_VARIABLES},
        "RANK": str(node * n_local + local_rank),
        "WORLD_SIZE": str(n_nodes * n_local),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(n_local),
    }


def meeting_point(name: str, n_nodes: int, env: Mapping[str, str]) -> dict[str, str]:
    """Return the address on this host where the ranks of a job meet; jobs of different names get different ports."""
    host = "127.0.0.1" if n_nodes == 1 else _this_host(env)
    return {"MASTER_ADDR": host, "MASTER_PORT": str(_free_port(name))}


def _free_port(name: str) -> int:
    """Find a free port of this host below the ephemeral ones; the search begins at a place that depends on the name."""
    first = zlib.crc32(name.encode())
    for i in range(12_000):
        port = 20_000 + (first + i) % 12_000
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise RunError(f"{socket.gethostname()} has no free port between 20000 and 32000; see who listens there")


def _this_host(env: Mapping[str, str]) -> str:
    """Return a name of this host that has an address. Rank 0 runs here: the batch script is on the first node."""
    for name in (this_node_name(env), socket.gethostname()):
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            continue
        return name
    raise RunError(
        f"the name of this node, {socket.gethostname()}, has no address; set MASTER_ADDR in launcher.env.set"
    )


def exit_code_of(codes: Sequence[int]) -> int:
    """Return the highest exit code; a signal counts as 128 plus its number, as in a shell."""
    return max(128 - code if code < 0 else code for code in codes)


def run_ranks(
    command: Sequence[str],
    envs: Sequence[Mapping[str, str]],
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run a command once per environment, wait until all have ended, and return their exit code."""
    ranks: list[subprocess.Popen[bytes]] = []
    with signals_passed_on(ranks):
        start_below(ranks, [(command, env, None) for env in envs])
        first_end_s: float | None = None
        while alive := [rank for rank in ranks if rank.poll() is None]:
            if first_end_s is None and len(alive) < len(ranks):
                first_end_s = now()
            if first_end_s is not None and now() - first_end_s > PATIENCE_S:
                for rank in alive:
                    rank.kill()
            sleep(POLL_S)
        return exit_code_of([rank.returncode for rank in ranks])


@contextmanager
def signals_passed_on(
    processes: list[subprocess.Popen[bytes]], note: Callable[[int], object] = lambda number: None
) -> Iterator[None]:
    """Forward signals of PASSED_ON to all `processes` and to `note` inside the block; kill all processes at its end."""

    def pass_on(number: int, frame: object) -> None:
        note(number)
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON if not is_nohup(number)}
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def start_below(
    processes: list[subprocess.Popen[bytes]],
    commands: Sequence[tuple[Sequence[str], Mapping[str, str], IO[bytes] | None]],
) -> None:
    """Start each (command, environment, output file) and add it to `processes`.

    They get SIGTERM when this process dies, so that they save.
    """
    libc, here = ctypes.CDLL(None), os.getpid()

    def begin() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != here:  # the parent died before prctl
            os.kill(os.getpid(), signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    # A signal between two starts would miss the second process, so it is blocked until all are started.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        for command, env, output in commands:
            # A new process group: Ctrl-C on a terminal reaches each process once, through this one, not twice.
            started = subprocess.Popen(
                command, env=dict(env), stdout=output, stderr=output, preexec_fn=begin, process_group=0
            )
            processes.append(started)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)


def main(words: list[str]) -> int:
    n_local, command = int(words[0]), words[1:]
    node, n_nodes = this_node(os.environ)
    return run_ranks(command, [rank_env(os.environ, i, n_local, node, n_nodes) for i in range(n_local)])


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
