"""Small real stand-ins, shared by the tests. A disk that fails or dies at its n-th operation; a tiny model."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lingua.files import Files

OPERATIONS = ("create", "reserve", "write", "fsync", "close", "mkdir", "fsync_dir", "rename", "link", "remove", "rmdir")
NEEDS_ROOM = ("create", "reserve", "write", "fsync", "mkdir")


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class At(NamedTuple):
    """An operation by what it does: the n-th whose words match a pattern.

    Words are the operation and its paths: "write /run/a.json", "rename /run/.a.json.tmp-12 /run/a.json".
    """

    pattern: str
    nth: int = 1


class FaultyFiles(Files):
    """A disk one of whose operations fails: number `fail_at` (from 1), and with `lasting` every one after it, or `At`.

    A failing write writes half of its data first, as real disks do. Only `operations` are counted and fail.
    `n_done` counts; with fail_at = 0 nothing ever fails.
    """

    def __init__(
        self,
        fail_at: int | At = 0,
        *,
        error: int = errno.ENOSPC,
        lasting: bool = False,
        operations: Collection[str] = OPERATIONS,
    ) -> None:
        self.fail_at = fail_at
        self.error = error
        self.lasting = lasting
        self.n_done = 0
        self._counting = threading.Lock()
        self.log: list[str] = []
        for name in operations:
            setattr(self, name, partial(self._operate, name, getattr(super(), name)))

    def _operate(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        if self._is_hit(name, args):
            if name == "write":
                operation(args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2])
            if name == "close":
                operation(*args)  # a close that reports an error has closed all the same
            self._fail(name)
        return operation(*args)

    def _is_hit(self, name: str, args: Sequence[Any]) -> bool:
        """Count an operation and tell whether it is to fail; several threads may ask."""
        paths = args[:2] if name in ("rename", "link") else args[:1]
        words = " ".join([name, *(str(path_of(path)) for path in paths)])
        with self._counting:
            self.n_done += 1
            self.log.append(words)
            if isinstance(self.fail_at, At):
                return (
                    bool(re.search(self.fail_at.pattern, words))
                    and self._n_like(self.fail_at.pattern) == self.fail_at.nth
                )
            return self.fail_at > 0 and (self.n_done == self.fail_at or (self.lasting and self.n_done > self.fail_at))

    def _n_like(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.log)

    def _fail(self, name: str) -> None:
        raise OSError(self.error, os.strerror(self.error), name)


def path_of(place: int | Path) -> Path:
    """Where an open descriptor leads; a path is one already."""
    return Path(os.readlink(f"/proc/self/fd/{place}")) if isinstance(place, int) else place


class FillingMemory:
    """A memory file system that others fill, its bytes and its names, once there is a file `full`.

    Called, it makes every `Files` of this process see that.
    """

    def __init__(self, memory: Path, full: Path) -> None:
        self._memory, self._full = memory, full

    def __call__(self, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
        for name in NEEDS_ROOM:
            set_attribute(Files, name, self._guarded(name, getattr(Files, name)))

    def _guarded(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(files: Files, place: int | Path, *args: Any) -> Any:
            path = path_of(place)
            if path.is_relative_to(self._memory) and self._full.exists() and self._takes_room(name, place, path, *args):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return operation(files, place, *args)

        return operate

    def _takes_room(self, name: str, place: int | Path, path: Path, *args: Any) -> bool:
        if name == "fsync" or (name == "mkdir" and path.exists()):
            return False
        if name in ("create", "mkdir") or not path.exists():
            return True
        end = os.lseek(place, 0, os.SEEK_CUR) + len(args[0]) if isinstance(place, int) else args[0]
        return end > path.stat().st_blocks * 512


class FrozenFiles(FaultyFiles):
    """A disk whose user is frozen before operation `fail_at`, and wakes up after a newer start has begun."""

    def __init__(self, fail_at: int, newer_start: Callable[[], None]) -> None:
        super().__init__(fail_at)
        self._newer_start = newer_start

    def _operate(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        if self._is_hit(name, args):
            self._newer_start()
        return operation(*args)


class KillFiles(FaultyFiles):
    """A disk at whose n-th operation the process dies at once; for forked processes."""

    KILLED = 137

    def _fail(self, name: str) -> None:
        os._exit(self.KILLED)


class BlockingFiles(FaultyFiles):
    """A disk whose n-th operation does not return, or not before there is a file `until`; then `mark` is there."""

    def __init__(self, fail_at: int | At, mark: Path | None = None, *, until: Path | None = None) -> None:
        super().__init__(fail_at)
        self._mark, self._until = mark, until

    def _operate(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        if self._is_hit(name, args):
            if self._mark is not None:
                self._mark.touch()
            while self._until is None or not self._until.exists():
                time.sleep(0.01)
        return operation(*args)
