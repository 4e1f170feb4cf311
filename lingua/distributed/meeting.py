"""Rendezvous of the ranks before anything is built: at a store that rank 0 opens at MASTER_ADDR:MASTER_PORT.

The store listens only at that address. Each rank brings its config, or the reason why it cannot take part; rank 0
compares them and writes one verdict, which all ranks read, so that all continue or all leave. Missing ranks are named
after SAY_AFTER_S. What other hosts write into the store is ignored, unless it is forged to look like a rank's message.
Imports torch only for the rendezvous: a config is checked before.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import logging
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import TypeAdapter, ValidationError

from lingua.config.base import ConfigError
from lingua.distributed.peers import Peers
from lingua.distributed.place import RankInfo
from lingua.distributed.same_config import MixedConfigError, difference, spell_ranks
from lingua.run.failure import RankError, classify, mark_known

if TYPE_CHECKING:
    import torch.distributed as dist

log = logging.getLogger(__name__)

SAY_AFTER_S = 5.0
TELL_S = 60.0
"""How long a rank that cannot take part waits for the others, to tell them."""
POLL_S = 0.1
_CONNECT_S = 60.0
"""For the first exchange with a store that listens already."""
_HELLO = b"\x00\xce\xf7\x85\x3c" + b"\x0dping"
"""First bytes from torch's client, which waits for their echo without a limit: the query VALIDATE with its magic
number, then PING with four bytes (torch 2.10, csrc/distributed/c10d/TCPStore.cpp and TCPStoreBackend.hpp)."""
_READ_WITHIN_S = 5.0
"""How long rank 0, which usually holds the store, waits for the others to read why they must leave."""


@dataclass(frozen=True)
class Failed:
    """Why a rank cannot take part."""

    problems: list[str]
    type: str
    kind: str


def meet(place: RankInfo, timeout_s: float, config: Mapping[str, Any]) -> dist.Store:
    """Return the store at which all ranks of this run have met with the same config. Collective.

    Raises MixedConfigError if configs differ, on all ranks the error of a rank that cannot take part, and RankError or
    torch's DistError if ranks do not meet.
    """
    return agree(open_store(place, timeout_s), place, timeout_s, config=json.dumps(config))


@contextmanager
def told_to_others(place: RankInfo) -> Iterator[None]:
    """Tell the other ranks of an error in the block, waiting for them for up to TELL_S: all fail if one does.

    Raises the error. ConfigErrors of all ranks are raised together, and rank 0 prints them.
    """
    try:
        yield
    except Exception as error:
        if place.world_size == 1 or place.master is None:
            raise
        problems = error.problems if isinstance(error, ConfigError) else [f"{type(error).__name__}: {error}"]
        type_name = ConfigError.__name__ if isinstance(error, ConfigError) else type(error).__name__
        failed = Failed(problems=problems, type=type_name, kind=classify(error))
        try:
            agree(open_store(place, TELL_S), place, TELL_S, failed=failed)
        except ConfigError as verdict:
            if isinstance(error, ConfigError):
                raise verdict from None
        except RuntimeError as others:  # they did not come, or report the same error
            log.debug("%s", others)
        raise


def open_store(place: RankInfo, timeout_s: float) -> dist.Store:
    """Return the store at which the ranks meet. Raises RankError or torch's DistError."""
    import torch.distributed as dist

    assert place.master is not None
    (host, port), timeout = place.master, timedelta(seconds=timeout_s)
    if place.has_agent:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    elif place.is_main:
        listener = listen(place, port)
        store = dist.TCPStore(
            host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    else:
        _wait_for_main(place, timeout_s)
        connect = timedelta(seconds=min(timeout_s, _CONNECT_S))
        store = dist.TCPStore(host, port, is_master=False, timeout=connect, wait_for_workers=False)
    store.set_timeout(timeout)
    return store


# -- connecting ----------------------------------------------------------------------------------------------------


def listen(place: RankInfo, port: int) -> socket.socket:
    """Return a socket that listens where the other ranks look for rank 0, and on no other interface."""
    assert place.master is not None
    host, _ = place.master
    try:
        found = [(family, address) for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise RankError(f"MASTER_ADDR {host} has no address: {error.strerror}; set it to one of this host") from None
    if place.local_world_size < place.world_size and host != "localhost" and not _is_address(host):
        # A host may know itself by an address that other nodes cannot use: 127.0.1.1, on Debian.
        found = [each for each in found if not ipaddress.ip_address(str(each[1][0]).partition("%")[0]).is_loopback]
    for family, address in (*found, (socket.AF_INET, ("", port))):  # last: all interfaces, as behind NAT
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            listener.close()
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                taken = "another process listens there" if error.errno == errno.EADDRINUSE else error.strerror
                raise RankError(
                    f"rank 0 cannot listen at {host}, MASTER_PORT {port}: {taken}; give all ranks another MASTER_PORT"
                ) from None
        else:
            if found and not address[0]:
                log.warning(
                    "MASTER_ADDR %s is not an address of this host, so rank 0 listens on all interfaces; unless a "
                    "router leads here, set it to an address of this host", host,
                )  # fmt: skip
            return listener
    raise RankError(f"rank 0 cannot listen at {host}:{port}; set MASTER_ADDR to an address of this host")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Patience:
    """Waits for other ranks; logs which ones after SAY_AFTER_S, and raises RankError at the timeout."""

    def __init__(self, place: RankInfo, timeout_s: float) -> None:
        self._place, self._timeout_s = place, timeout_s
        self._began_s, self._has_said = time.monotonic(), False

    def over(self, seconds: float) -> bool:
        return time.monotonic() - self._began_s > seconds

    def wait(self, ranks: list[int], why: str = "") -> None:
        place = self._place
        assert place.master is not None
        me, whom = f"rank {place.rank} of {place.world_size}", spell_ranks(ranks)
        where = f"at {place.master[0]}:{place.master[1]}"
        if self.over(self._timeout_s):
            raise RankError(
                f"{me} did not meet the others {where} within {self._timeout_s:.0f} s: {whom} did not come{why}; "
                "see whether they all started, and why not in their logs"
            )
        if self.over(SAY_AFTER_S) and not self._has_said:
            self._has_said = True
            unset = " ".join(f"-u {name}" for name in place.said_by)
            log.warning(
                "%s waits %s for %s%s, for up to %.0f s. Start those too, or see in their output why they ended; to "
                "run alone, type: env %s COMMAND", me, where, whom, why, self._timeout_s, unset,
            )  # fmt: skip
        time.sleep(POLL_S)


def _wait_for_main(place: RankInfo, timeout_s: float) -> None:
    """Wait until a store answers at rank 0's address: torch's client would wait forever for another program."""
    assert place.master is not None
    patience = _Patience(place, timeout_s)
    while True:
        listens = False
        try:
            with socket.create_connection(place.master, SAY_AFTER_S) as there:
                listens = True
                there.sendall(_HELLO)
                there.recv(1)
                return
        except TimeoutError:
            taken = "what listens there does not answer; is MASTER_PORT taken by another program?"
            patience.wait([0], f" ({taken if listens else 'timed out'})")
        except OSError as error:
            patience.wait([0], f" ({error.strerror or error})")


# -- the verdict ---------------------------------------------------------------------------------------------------


def agree(
    store: dist.Store, place: RankInfo, timeout_s: float, config: str = "{}", failed: Failed | None = None
) -> dist.Store:
    """Return a part of the store for later use, once all ranks have come with the same config (as JSON).

    Raises on all ranks otherwise. Collective.
    """
    import torch.distributed as dist

    whole, store = store, dist.PrefixStore("lingua/meeting", store)
    here, me = f"here/{place.rank}", secrets.token_hex(16)
    store.append(here, f"\n{me}\n")  # pyright: ignore[reportAttributeAccessIssue] - stubs lack it
    first = next(line for line in store.get(here).split() if re.fullmatch(rb"[0-9a-f]{32}", line))
    if not place.has_agent and first != me.encode():  # an agent's store outlives its ranks
        raise RankError(
            f"rank {place.rank} is at MASTER_PORT {place.master and place.master[1]} already: two runs have one port, "
            "or two processes one RANK; give each its own"
        )
    digest = hashlib.sha256(config.encode()).hexdigest()
    store.set(f"config/{digest}", config)
    store.set(f"rank/{place.rank}", orjson.dumps(asdict(_Brought(digest, failed))).decode())
    if place.is_main:
        verdict = _judge(store, place, timeout_s)
        store.set("verdict", orjson.dumps(asdict(verdict)).decode())
    else:
        verdict = _read_verdict(store, place, timeout_s)
    if verdict.world_size != place.world_size:
        raise RankError(
            f"WORLD_SIZE is {verdict.world_size} on rank 0 and {place.world_size} on rank {place.rank}; "
            "start all ranks of a run alike"
        )
    if verdict.problems:
        Peers(store, place.rank, place.world_size, secret=b"").leave(_READ_WITHIN_S)
        raise mark_known(verdict.error())
    return dist.PrefixStore(verdict.part, whole)


@dataclass(frozen=True)
class _Brought:
    """A rank's entry: the digest of its config, or why it cannot take part."""

    digest: str
    failed: Failed | None


@dataclass(frozen=True)
class _Verdict:
    """Problems with which all ranks leave; none if all continue."""

    world_size: int
    problems: list[str]
    type: str = ""
    kind: str = ""
    part: str = field(default_factory=lambda: secrets.token_hex(16))
    """Prefix of the store for later use, where nobody has written yet."""

    def error(self) -> Exception:
        if self.type == ConfigError.__name__:
            return ConfigError(self.problems)
        sentence = "; ".join(self.problems)
        return RankError(sentence, self.kind) if self.type else MixedConfigError(sentence)


def _brought(store: dist.Store, rank: int) -> _Brought | None:
    """Return a rank's entry, or None if the rank has not come (a malformed entry is not a rank's)."""
    with suppress(ValidationError):
        return TypeAdapter(_Brought).validate_json(store.get(key)) if store.check([key := f"rank/{rank}"]) else None
    return None


def _read_verdict(store: dist.Store, place: RankInfo, timeout_s: float) -> _Verdict:
    patience = _Patience(place, timeout_s)
    while True:
        with suppress(ValidationError):
            return TypeAdapter(_Verdict).validate_json(store.get("verdict"))
        patience.wait([0])  # a stranger's entry, which rank 0 will replace


def _judge(store: dist.Store, place: RankInfo, timeout_s: float) -> _Verdict:
    """Read the entries of all ranks, or, if one has failed, those that come within SAY_AFTER_S; return the verdict."""
    patience, missing = _Patience(place, timeout_s), list(range(place.world_size))
    brought: dict[int, _Brought] = {}
    failed: dict[int, Failed] = {}
    while True:
        brought |= {rank: found for rank in missing if (found := _brought(store, rank)) is not None}
        missing = [rank for rank in missing if rank not in brought]
        failed = {rank: why for rank in sorted(brought) if (why := brought[rank].failed) is not None}
        if not missing or (failed and patience.over(SAY_AFTER_S)):
            break
        patience.wait(missing)
    if not failed:
        digests = [brought[rank].digest for rank in range(place.world_size)]
        if len(set(digests)) == 1:
            return _Verdict(place.world_size, [])
        configs = {digest: orjson.loads(store.get(f"config/{digest}")) for digest in dict.fromkeys(digests)}
        sentence = difference([configs[digest] for digest in digests])
        return _Verdict(place.world_size, [sentence] if sentence else [])
    ranks: dict[str, list[int]] = {}
    for rank, failure in failed.items():
        for problem in failure.problems:
            ranks.setdefault(problem, []).append(rank)
    everywhere = place.world_size
    problems = [
        problem if len(having) == everywhere else f"{spell_ranks(having)}: {problem}"
        for problem, having in ranks.items()
    ]
    first = failed[min(failed)]
    return _Verdict(place.world_size, problems, first.type, first.kind)
