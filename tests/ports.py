"""Ports for tests."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A TCP port nobody listens on, and none that the kernel gives to others, such as gloo, in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # below net.ipv4.ip_local_port_range
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
