"""Messages between ranks outside of collectives: a rank is leaving, and why, or has ended without a message.

Messages that end a run are signed: other hosts on the network may reach the store and read and write in it.

This works while the main thread of a rank is stuck in a collective, under gloo and NCCL alike, and needs nothing from
the stuck rank. Rank 0, where the store usually lives, leaves last, so that the messages of the others get through. A
thread polls the store every POLL_S over a separate connection; a step costs nothing.

Aborting the process group would wake the others too, but torch offers that only for NCCL, as an experiment, and it
would not reach a rank that waits for its disk.
"""

from __future__ import annotations

import hmac
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lingua.distributed.lifeline import Lifelines, hold

if TYPE_CHECKING:
    import torch.distributed as dist

_END = "lingua/end"
_LEFT = "lingua/left"
_PORT = "lingua/port"
_HERE = b"here/%09d"


class Peers:
    """The other ranks, reached over the store at which all met. Methods raise torch's DistError if it is gone."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, secret: bytes) -> None:
        """`secret`: known only to these ranks, and never in the store."""
        # A separate connection, since the main thread may be waiting on the other one. (torch's stubs lack `clone`.)
        self._store: dist.Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._rank = rank
        self._world_size = world_size
        self._secret = secret
        self._lifelines: Lifelines | None = None
        self._lifeline: socket.socket | None = None

    def _signed(self, message: bytes) -> bytes:
        return hmac.digest(self._secret, message, "sha256").hex().encode() + b" " + message

    def send(self, message: bytes) -> None:
        """Send a message of one line to all ranks; the first of several wins."""
        self._store.append(_END, self._signed(message).decode() + "\n")  # pyright: ignore[reportAttributeAccessIssue] - stubs lack it

    def received(self) -> bytes | None:
        """Return the message that a rank sent, or None."""
        lines = self._store.get(_END).splitlines() if self._store.check([_END]) else []
        messages = [(line, line.partition(b" ")[2]) for line in lines]
        return next((text for line, text in messages if hmac.compare_digest(line, self._signed(text))), None)

    def set_flag(self, name: str) -> None:
        """Set a flag that all ranks see."""
        self._store.set(name, self._signed(name.encode()).decode())

    def is_set(self, name: str) -> bool:
        """Return whether a rank has set this flag."""
        return self._store.check([name]) and hmac.compare_digest(self._store.get(name), self._signed(name.encode()))

    def watch(self, listener: socket.socket) -> None:
        """Detect, as rank 0, that the process of another rank has ended."""
        greetings = [self._signed(_HERE % rank) for rank in range(1, self._world_size)]
        self._lifelines = Lifelines(listener, greetings)
        port = b"%d" % listener.getsockname()[1]
        self._store.set(_PORT, self._signed(port).decode())

    def let_watch(self, host: str) -> None:
        """Let rank 0, which listens at `host`, detect that this process has ended."""
        signed = self._store.get(_PORT)
        port = signed.partition(b" ")[2]
        if hmac.compare_digest(signed, self._signed(port)):
            self._lifeline = hold((host, int(port)), self._signed(_HERE % self._rank))

    def gone(self) -> list[int]:
        """Return the ranks that have ended without `leave` since the last call; only on rank 0, others return []."""
        broken = [] if self._lifelines is None else self._lifelines.broken()
        return [rank for rank in broken if not self.is_set(f"{_LEFT}/{rank}")]

    def leave(self, within_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Leave, as the last thing a rank does. Rank 0 waits for the others, at most `within_s`."""
        if self._rank:
            self.set_flag(f"{_LEFT}/{self._rank}")
            return
        waited_s, here = 0.0, range(1, self._world_size)
        while (here := [rank for rank in here if not self.is_set(f"{_LEFT}/{rank}")]) and waited_s < within_s:
            sleep(0.05)
            waited_s += 0.05
