"""Several gloo ranks on one machine, forked from a process that has torch loaded: a start costs milliseconds.

The first failure is reported with its rank and traceback, and no rank outlives the call.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Pipe, wait
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 900.0  # for tests that hang; a slow machine needs minutes

# Autograd starts a thread per GPU at the first backward pass, and a process with such threads cannot fork. A fake
# tensor (so torch.compile) makes torch see eight GPUs where there are none: the first pass comes before any test.
torch.ones(1, requires_grad=True).sum().backward()


def run_on_ranks(fn: Callable[[int], Any], n: int, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Call `fn(rank)` in n processes that share a gloo process group (n = 1: none); returns their results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        started: dict[Any, tuple[int, int]] = {}  # where its result comes from -> (rank, pid)
        try:
            for rank in range(n):
                reader, writer = Pipe(duplex=False)
                pid = fork()
                if pid == 0:
                    _be_rank(fn, rank, n, os.path.join(folder, "store"), writer, timeout_s)
                writer.close()
                started[reader] = (rank, pid)
            return _collect(started, time.monotonic() + timeout_s)
        finally:
            for reader, (_, pid) in started.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                reader.close()


def exit_code_of(fn: Callable[[], Any]) -> int:
    """Call `fn` in a forked process; returns its exit code: 0 when fn returns, 1 when it raises, or what it chose."""
    pid = fork()
    if pid == 0:
        code = 1
        try:
            fn()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork() -> int:
    """os.fork without Python 3.12's warning, and without Inductor's threads: a child would wait for them for ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # python 3.12 on forking with threads: ours hold no lock
        pid = os.fork()
    if pid == 0 and (inductor := sys.modules.get("torch._inductor.async_compile")):
        inductor.AsyncCompile.pool.cache_clear()  # torch 2.11 too forgets its pool of processes only (after_fork)
    return pid


def _be_rank(fn: Callable[[int], Any], rank: int, n: int, store: str, writer: Any, timeout_s: float) -> None:
    """The life of a forked rank; never returns."""
    outcome: tuple[bool, Any] = (False, "died without a word")
    try:
        torch.set_num_threads(1)
        if n > 1:
            timeout = timedelta(seconds=timeout_s)
            dist.init_process_group("gloo", store=dist.FileStore(store, n), rank=rank, world_size=n, timeout=timeout)
        outcome = (True, fn(rank))
        if n > 1:
            dist.barrier()  # a rank that leaves early would make the others' last exchange fail
    except BaseException:
        outcome = (False, traceback.format_exc())
    finally:
        try:
            writer.send_bytes(pickle.dumps(outcome))
        except BaseException:
            writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        finally:
            os._exit(0)


def _collect(started: dict[Any, tuple[int, int]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(started):
        left = [reader for reader, (rank, _) in started.items() if rank not in results]
        ready = wait(left, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"no answer in time from ranks {sorted(started[reader][0] for reader in left)}")
        for reader in (reader for reader in left if reader in ready):
            rank = started[reader][0]
            try:
                fine, result = pickle.loads(reader.recv_bytes())
            except EOFError:
                fine, result = False, "died without a word"
            if not fine:
                raise AssertionError(f"rank {rank} of {len(started)}: {result}")
            results[rank] = result
    return [results[rank] for rank in range(len(started))]
