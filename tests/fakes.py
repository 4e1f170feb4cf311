"""Small real stand-ins, shared by the tests. A disk that fails or dies at its n-th operation; a tiny model."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from lingua.files import Files

OPERATIONS = ("create", "write", "fsync", "close", "mkdir", "fsync_dir", "rename", "link", "remove", "rmdir")
NEEDS_ROOM = ("create", "write", "fsync", "mkdir")


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class FaultyFiles(Files):
    """A disk whose operation number `fail_at` (from 1) fails, and with `lasting` every one after it.

    A failing write writes half of its data first, as real disks do. Only `operations` are counted and fail.
    `n_done` counts; with fail_at = 0 nothing ever fails.
    """

    def __init__(
        self,
        fail_at: int = 0,
        *,
        error: int = errno.ENOSPC,
        lasting: bool = False,
        operations: Collection[str] = OPERATIONS,
    ) -> None:
        self.fail_at = fail_at
        self.error = error
        self.lasting = lasting
        self.n_done = 0
        self.log: list[str] = []
        for name in operations:
            setattr(self, name, partial(self._operate, name, getattr(super(), name)))

    def _operate(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        self.n_done += 1
        self.log.append(f"{name} {args[0]}")
        if self.fail_at and (self.n_done == self.fail_at or (self.lasting and self.n_done > self.fail_at)):
            if name == "write":
                operation(args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2])
            if name == "close":
                operation(*args)  # a close that reports an error has closed all the same
            self._fail(name)
        return operation(*args)

    def _fail(self, name: str) -> None:
        raise OSError(self.error, os.strerror(self.error), name)


class KillFiles(FaultyFiles):
    """A disk at whose n-th operation the process dies at once; for forked processes."""

    KILLED = 137

    def _fail(self, name: str) -> None:
        os._exit(self.KILLED)
