"""Serve and read parts of snapshots over TCP: each service serves those in its node's memory. Torch-free.

A service listens only if its run has several nodes. Before any data is sent, both sides prove with HMACs of nonces that
they know the run's secret. Rank 0 draws a secret per attempt; it is sent through the process group and stored in the
areas, which only their user may read. The data is not encrypted, as between ranks. Every answer carries the checksum of
its bytes; whole files are hashed on the node that holds them. A connection is dropped after PATIENCE_S of silence.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import mmap
import os
import secrets
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import orjson

from lingua.checkpoint.publish import DamagedError, FileFacts
from lingua.checkpoint.shm.area import PartKey, Save, ServedRun, ShmArea
from lingua.checkpoint.shm.drain import mapped
from lingua.files import Buffer, RunError

log = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""How long the other side may take to send its next bytes."""
NONCE_BYTES = PROOF_BYTES = 32
DOCUMENT_BYTES = 16 << 20
"""Longest JSON document: the names and checksums of some 100,000 files."""
_HEAD = struct.Struct("!IQ")
"""Sizes in bytes of the document and of the content after it."""


def public_name(secret: str) -> str:
    """Return a hash that identifies a secret without revealing it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def address_of_this_node(master: tuple[str, int] | None) -> str:
    """Return the address by which other nodes reach this one: the local end of its route to rank 0, at `master`."""
    if master is None:
        return "127.0.0.1"
    family, *_, address = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of UDP: nothing is sent
        own = str(probe.getsockname()[0])
    # A host may know itself by an address that other nodes cannot use: 127.0.1.1, on Debian.
    return master[0] if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own


# -- one connection ------------------------------------------------------------------------------------------------


class _Wire:
    """A connection over which JSON documents are sent, with bytes after them. Raises OSError."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(PATIENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def take(self, n_bytes: int) -> memoryview:
        content = memoryview(bytearray(n_bytes))
        n_taken = 0
        while n_taken < n_bytes:
            n_new = self.connection.recv_into(content[n_taken:])
            if n_new == 0:
                raise ConnectionError("the other side has closed the connection")
            n_taken += n_new
        return content

    def send(self, document: Any, content: Buffer = b"") -> None:
        text = orjson.dumps(document)
        self.connection.sendall(_HEAD.pack(len(text), len(content)) + text)
        self.connection.sendall(content)

    def receive(self, content_bytes: int = 0) -> tuple[Any, memoryview]:
        """Return a document and the content after it, of at most `content_bytes`."""
        n_text, n_content = _HEAD.unpack(self.take(_HEAD.size))
        if n_text > DOCUMENT_BYTES or n_content > content_bytes:
            raise ConnectionError(f"the other side sends {n_text} and {n_content} bytes, which nobody asked for")
        return orjson.loads(self.take(n_text)), self.take(n_content)


def _proof(secret: str, side: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret.encode(), side + nonces, "sha256")


# -- the service's side --------------------------------------------------------------------------------------------


class PartServer:
    """Serves the parts in an area to readers that know the secret, in daemon threads."""

    def __init__(self, area: ShmArea, host: str) -> None:
        """Listen, at the port of the previous service if that is free."""
        self._area, self.host, self.secret = area, host, ""
        self._listener: socket.socket | None = None
        ports = [0]
        with suppress(OSError, TypeError, KeyError):
            ports.insert(0, int(area.address.read()["port"]))
        for port in ports:
            try:
                self._listener = _listen(host, port)
                threading.Thread(target=self._accept, args=(self._listener,), name="parts", daemon=True).start()
                break
            except OSError as error:
                log.error("cannot listen at %s, port %d: %s", host, port, error)

    def admit(self, secret: str) -> None:
        """Serve readers that know this secret from now on; write the address to the area (port 0: not listening)."""
        if secret == self.secret:
            return
        self.secret = secret
        port = self._listener.getsockname()[1] if self._listener else 0
        said = {"pid": os.getpid(), "host": self.host, "port": port, "for": public_name(secret)}
        try:
            self._area.address.write(said)
        except OSError as error:
            log.error("cannot say where this service listens: %s", error)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it is closed
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection,), name="part", daemon=True).start()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, orjson.JSONDecodeError):
            wire, secret = _Wire(connection), self.secret
            mine = secrets.token_bytes(NONCE_BYTES)
            connection.sendall(mine)
            nonces = mine + wire.take(NONCE_BYTES)
            if not secret or not hmac.compare_digest(wire.take(PROOF_BYTES), _proof(secret, b"reader", nonces)):
                log.warning("a process at %s, which does not know the secret of this run, is refused", connection)
                return
            connection.sendall(_proof(secret, b"server", nonces))
            contents: dict[tuple[PartKey, str], mmap.mmap | bytes] = {}
            while secret == self.secret:
                connection.settimeout(None)  # the next request may come late
                asked = wire.receive()[0]
                connection.settimeout(PATIENCE_S)
                self._answer(wire, asked, contents)

    def _answer(self, wire: _Wire, asked: Any, contents: dict[tuple[PartKey, str], mmap.mmap | bytes]) -> None:
        try:
            if "newest" in asked:
                return wire.send(self._newest(*asked["newest"]))
            key, name = PartKey(asked["part"]), str(asked["name"])
            if (key, name) not in contents:
                contents[key, name] = self._open(key, name)
            piece = memoryview(contents[key, name])[asked["start"] : asked["start"] + asked["bytes"]]
        except (OSError, RunError, KeyError, TypeError, ValueError) as error:
            wire.send({"why": f"{type(error).__name__}: {error}"})
        else:
            wire.send({"xxh3_128": FileFacts.of(piece).xxh3_128}, piece)

    def _open(self, key: PartKey, name: str) -> mmap.mmap | bytes:
        slot, facts = self._area.find(key)
        return mapped(slot.folder / name, facts[name])

    def _newest(self, run_id: str, attempt: int) -> Any:
        """Return the newest complete part of an attempt and its ranks' records, or None."""
        found = [(found[0], slot) for slot in self._area.slots() if (found := slot.complete(even_free=True))]
        ours = [(save.number, save, slot) for save, slot in found if (save.run_id, save.attempt) == (run_id, attempt)]
        if not ours:
            return None
        _, save, slot = max(ours, key=lambda one: one[0])
        return {"save": asdict(save), "ready": [slot.ready(rank).read() for rank in save.ranks]}


def _listen(host: str, port: int) -> socket.socket:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # A host may resolve its own name to a loopback address, which other nodes cannot reach.
    if host not in (address[0], "localhost") and ipaddress.ip_address(address[0]).is_loopback:
        family, address = socket.AF_INET, ("", port)
    return socket.create_server(address[:2], family=family)


def keep_serving(server: PartServer | None, area: ShmArea, run: ServedRun) -> PartServer | None:
    """Start a server if the run asks for one at a new host; give the server the run's secret, and return it."""
    if run.listen and (server is None or server.host != run.listen):
        if server is not None:
            server.close()
        server = PartServer(area, run.listen)
    if server is not None:
        server.admit(run.secret)
    return server


# -- the reader's side ---------------------------------------------------------------------------------------------


class PartReader:
    """Reads parts that another node holds. Thread-safe."""

    def __init__(self, address: tuple[str, int], secret: str) -> None:
        """Connect, and prove to each other that both sides know the secret. Raises OSError."""
        self._address, self._asking = address, threading.Lock()
        self._wire = _Wire(socket.create_connection(address, PATIENCE_S))
        try:
            nonces = bytes(self._wire.take(NONCE_BYTES)) + secrets.token_bytes(NONCE_BYTES)
            self._wire.connection.sendall(nonces[NONCE_BYTES:] + _proof(secret, b"reader", nonces))
            if not hmac.compare_digest(self._wire.take(PROOF_BYTES), _proof(secret, b"server", nonces)):
                raise ConnectionError(f"what listens at {address} does not know the secret of this run")
        except BaseException:
            self.close()
            raise

    def read(self, key: PartKey, name: str, start: int, n_bytes: int) -> memoryview:
        """Return bytes of a file. Raises OSError, DamagedError."""
        with self._asking:
            self._wire.send({"part": key, "name": name, "start": start, "bytes": n_bytes})
            answer, content = self._wire.receive(n_bytes)
        if "why" in answer:
            raise DamagedError(f"{self._address[0]} has no {name} for us: {answer['why']}")
        if len(content) != n_bytes or FileFacts.of(content).xxh3_128 != answer["xxh3_128"]:
            raise DamagedError(f"{name} was damaged on its way from {self._address[0]}")
        return content

    def newest(self, run_id: str, attempt: int) -> tuple[Save, dict[int, Any]] | None:
        """Return the newest complete part of an attempt there and its ranks' records, or None. Raises OSError."""
        with self._asking:
            self._wire.send({"newest": [run_id, attempt]})
            answer = self._wire.receive()[0]
        if answer is None or "why" in answer:
            return None
        save = Save(**{**answer["save"], "ranks": tuple(answer["save"]["ranks"])})
        return save, dict(zip(save.ranks, answer["ready"], strict=True))

    def close(self) -> None:
        self._wire.connection.close()


class RemoteFile:
    """A file in the memory of another node; slicing reads from it."""

    def __init__(self, reader: PartReader, key: PartKey, name: str, size_bytes: int) -> None:
        self._reader, self._key, self._name, self._size_bytes = reader, key, name, size_bytes

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, span: slice) -> memoryview:
        start, stop, _ = span.indices(self._size_bytes)
        return self._reader.read(self._key, self._name, start, stop - start)
