"""The ranks of one node as processes below this one: `python -m lingua.ranks N COMMAND...`.

Promise: each rank gets torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, ...). SIGTERM, SIGUSR1, SIGUSR2 and SIGINT
are passed on and the ranks get all the time they need to save; torchrun dies of SIGUSR2 and kills its workers 30 s
after SIGTERM. When a rank fails, the others get PATIENCE_S to end by themselves. No rank outlives this process.
Cost: one sleeping process; no torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from lingua.slurm import this_node

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
PATIENCE_S = 120.0
"""For the others to end after the first has: longer than it takes to hear of a lost rank, shorter than a grace."""
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1  # prctl(2)


def rank_env(env: Mapping[str, str], local_rank: int, n_local: int, node: int, n_nodes: int) -> dict[str, str]:
    """The environment of one rank, with torchrun's names."""
    return {
        **env,
        "RANK": str(node * n_local + local_rank),
        "WORLD_SIZE": str(n_nodes * n_local),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(n_local),
    }


def exit_code_of(codes: Sequence[int]) -> int:
    """One code for all: the highest, a signal's as a shell reports it."""
    return max(128 - code if code < 0 else code for code in codes)


def run_ranks(
    command: Sequence[str],
    envs: Sequence[Mapping[str, str]],
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run a command once per environment until all have ended; returns their exit code."""
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        # A signal between two starts would miss the second: it waits until all are there.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        for env in envs:
            # A group of its own: Ctrl-C on a terminal reaches a rank once, through this process, and not twice.
            ranks.append(
                subprocess.Popen(command, env=dict(env), preexec_fn=_unblocked(die_with_parent), process_group=0)
            )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        first_end_s: float | None = None
        while alive := [rank for rank in ranks if rank.poll() is None]:
            if first_end_s is None and len(alive) < len(ranks):
                first_end_s = now()
            if first_end_s is not None and now() - first_end_s > PATIENCE_S:
                for rank in alive:
                    rank.kill()
            sleep(POLL_S)
        return exit_code_of([rank.returncode for rank in ranks])
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _unblocked(act: Callable[[], None]) -> Callable[[], None]:
    def begin() -> None:
        act()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    return begin


def main(words: Sequence[str]) -> int:
    n_local, command = int(words[0]), words[1:]
    node, n_nodes = this_node(os.environ)
    return run_ranks(command, [rank_env(os.environ, i, n_local, node, n_nodes) for i in range(n_local)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
