"""Forked workers, memory and disk space, for the stages of the preparation.

No worker outlives the process that started it, and its exceptions are raised in that process.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from lingua.data.prepare.external_sort import drop_window
from lingua.files import RunError, free_bytes, human_bytes, is_short_of_inodes

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_most_workers = 0
_peak_alone = 0  # bytes resident in this process before its first workers
_task: Callable[[int], Any] | None = None  # forked processes inherit it, with all that it refers to


def _run_task(number: int) -> Any:
    assert _task is not None
    return _task(number)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: prctl(2)
    if os.getppid() != parent:  # the parent died before prctl
        os._exit(9)


def each(todo: list[int], task: Callable[[int], _Result], n_workers: int) -> Iterator[tuple[int, _Result]]:
    """Yield (number, task(number)) in the order of completion, from `n_workers` forked processes (1: this one)."""
    if n_workers == 1:
        for number in todo:
            yield number, task(number)
        return
    global _task, _most_workers, _peak_alone
    drop_window()  # each worker has its own
    if not _most_workers:
        _peak_alone = _own_peak_bytes()
        with suppress(OSError):  # some sandboxes lack it: then the peak is a larger bound
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc(5)
    _task, _most_workers = task, max(_most_workers, n_workers)
    pool = ProcessPoolExecutor(
        n_workers, multiprocessing.get_context("fork"), initializer=_die_with, initargs=(os.getpid(),)
    )
    try:
        futures = {pool.submit(_run_task, number): number for number in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed, perhaps by lack of memory; give the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        _task = None


def peak_rss_bytes() -> int:
    """Return an upper bound of the memory resident at once: the sum of the peaks of this process and its workers."""
    workers = _most_workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return max(_peak_alone, _own_peak_bytes() + workers)


def _own_peak_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024  # ru_maxrss includes the process before exec


def available_bytes() -> int:
    """Return the memory that the machine can give without swapping."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(facts["MemAvailable"].split()[0]) * 1024


def rss_bytes() -> int:
    """Return the resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_disk_full(error: BaseException) -> bool:
    """Return whether space or quota ran out. hf_xet tells that only in its message."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "quota exceeded" in str(error)


@contextmanager
def disk_of(folder: Path, option: str) -> Iterator[None]:
    """Turn a full disk into a sentence with a remedy; finished parts are kept."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        lacking = "inodes" if is_short_of_inodes(folder) else "space"
        raise RunError(
            f"no {lacking} left for {folder} ({human_bytes(free_bytes(folder))} free; a quota may be lower); "
            f"free some or choose another {option}, then give the same command again: it continues from here"
        ) from None


def need_space(folder: Path, n_bytes: int, option: str) -> None:
    if n_bytes > (free := free_bytes(folder)):
        raise RunError(
            f"{folder} needs {human_bytes(n_bytes)} ({n_bytes} bytes) and has {human_bytes(free)} free; "
            f"free some space or choose another {option}, then give the same command again: it continues from here"
        )
