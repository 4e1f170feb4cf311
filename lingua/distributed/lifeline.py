"""Connections by which rank 0 notices within seconds that another rank's process has ended, however it ended.

The kernel closes the sockets of a process that ends or is killed; keepalive detects a node that no longer answers.
Under NCCL nothing else would tell: the survivors wait in a collective until its timeout. A process that is slow or
stopped keeps its connection; the watchdog handles those.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

log = logging.getLogger(__name__)

CONNECT_S = 30.0
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds of silence before the first probe, seconds between probes, and lost probes until the node counts as gone."""


def hold(address: tuple[str, int], greeting: bytes) -> socket.socket | None:
    """Connect to rank 0 for the lifetime of this process. Log a warning and return None if that fails."""
    try:
        line = socket.create_connection(address, timeout=CONNECT_S)
        line.sendall(greeting)
    except OSError as error:
        log.warning(
            "no connection to rank 0 at %s:%d (%s): if this rank is killed, the others notice late",
            *address, error.strerror or error,
        )  # fmt: skip
        return None
    _keep_alive(line)
    return line


class Lifelines:
    """Rank 0's ends of the connections."""

    def __init__(self, listener: socket.socket, greetings: Sequence[bytes]) -> None:
        """`greetings`: the first bytes from rank 1, 2, ...; all of one length, and known only to these ranks."""
        listener.setblocking(False)
        self._listener = listener
        self._ranks = {greeting: rank for rank, greeting in enumerate(greetings, 1)}
        self._most_new, self._greeting_bytes = 2 * len(greetings), max(map(len, greetings), default=0)
        self._new: dict[socket.socket, bytes] = {}
        """Connections without a rank yet, and what they have sent so far."""
        self._known: dict[int, socket.socket] = {}

    def broken(self) -> list[int]:
        """Return the ranks whose connection has ended since the last call. Never waits."""
        self._accept()
        broken = [rank for rank, line in self._known.items() if _received(line) == b""]
        for rank in broken:
            self._known.pop(rank).close()
        return broken

    def _accept(self) -> None:
        while len(self._new) < self._most_new:  # limits the descriptors that strangers cost
            try:
                line, _ = self._listener.accept()
            except OSError:  # nobody is waiting, or the peer has left again
                break
            _keep_alive(line)
            line.setblocking(False)
            self._new[line] = b""
        for line, before in list(self._new.items()):
            more = _received(line)
            if more is None:
                continue
            self._new[line] = greeting = before + more
            rank = self._ranks.pop(greeting, None)  # once: a stranger may have overheard it
            if rank is not None:
                self._known[rank] = self._take(line)
            elif not more or len(greeting) >= self._greeting_bytes:
                self._take(line).close()

    def _take(self, line: socket.socket) -> socket.socket:
        del self._new[line]
        return line


def _received(line: socket.socket) -> bytes | None:
    """Return what has arrived, b"" if the connection has ended, None if it is silent."""
    try:
        return line.recv(128)
    except BlockingIOError:
        return None
    except OSError:  # reset, or keepalive found nobody
        return b""


def _keep_alive(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
