"""Where ranks meet: who may listen in, who is missing, and that nobody waits for a rank that cannot come."""

import logging
import os
import socket

import pytest
import torch.distributed as dist

import lingua.distributed.meeting
from lingua.config.base import ConfigError
from lingua.distributed.meeting import agree, meet, open_store, told_to_others
from lingua.distributed.place import RankInfo
from lingua.files import DiskError
from lingua.run.failure import RankError, classify, known_to_all
from tests.ports import free_port
from tests.ranks import run_on_ranks


@pytest.fixture
def port() -> int:
    return free_port()


def at(port: int, rank: int = 0, size: int = 2, host: str = "127.0.0.1", local: int = 2) -> RankInfo:
    return RankInfo(rank, size, rank, local, (host, port))


def come(place: RankInfo, error: Exception | None) -> None:
    """Meet the others, or fail before that."""
    with told_to_others(place):
        if error is not None:
            raise error
    meet(place, 60, {})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_store_listens_at_the_address_that_is_used_and_at_no_other(port: int, host: str):
    store = open_store(at(port, host=host), 30)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5)  # of this host too
    store.set("a", "b")
    assert open_store(at(port, 1, host=host), 30).get("a") == b"b"


def test_a_name_that_means_this_host_alone_is_not_what_other_nodes_look_for(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Debian's 127.0.1.1. An address of a router, which no interface here has, is reached on all interfaces as well."""
    answers = {"node7": "127.0.1.1", "router": "192.0.2.1"}  # TEST-NET-1
    look_up = socket.getaddrinfo

    def found(host: str, *more: object, **options: object) -> object:
        return look_up(answers.get(host, host), *more, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    for host, local, everywhere in (("node7", 1, True), ("router", 1, True), ("node7", 2, False)):
        with lingua.distributed.meeting.listen(at(port, host=host, local=local), port) as listener:
            assert (listener.getsockname()[0] == "0.0.0.0") == everywhere
        assert (f"MASTER_ADDR {host} is not an address of this host, so" in caplog.text) == (host == "router")


def test_a_port_that_is_taken_is_said_at_once(port: int):
    with socket.create_server(("127.0.0.1", port)), pytest.raises(RankError, match=f"MASTER_PORT {port}: another proc"):
        meet(at(port), 600, {})


def test_who_is_missing_is_said_with_what_to_type(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(lingua.distributed.meeting, "SAY_AFTER_S", 0.0)
    for rank, whom in ((0, "ranks 1-3"), (1, "rank 0")):
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(RankError, match=f"within 0 s: {whom} did not come"):
            meet(at(port, rank, 4), 0.3, {})
        (said,) = [record.message for record in caplog.records]
        assert f"rank {rank} of 4 waits at 127.0.0.1:{port} for {whom}" in said
        assert "type: env -u RANK -u WORLD_SIZE COMMAND" in said


def test_a_second_process_of_the_same_rank_is_refused(port: int):
    store = open_store(at(port), 30)
    dist.PrefixStore("lingua/meeting", store).append("here/1", f"{'0' * 32}\n")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RankError, match=r"rank 1 is at MASTER_PORT \d+ already"):
        meet(at(port, 1), 30, {})


def test_ranks_of_another_world_are_refused(port: int):
    store = open_store(at(port, size=1), 30)
    agree(store, at(port, size=1), 30)
    with pytest.raises(RankError, match="WORLD_SIZE is 1 on rank 0 and 2 on rank 1"):
        meet(at(port, 1, 2), 30, {})


@pytest.mark.ranks
def test_what_a_stranger_puts_into_the_store_before_the_ranks_come_ends_nothing(port: int):
    words = ["not a number", "", "{}", "[1,", '{"digest": 3, "failed": null}', '{"world_size": "two"}']

    def act(rank: int) -> tuple[str, bool]:
        store = open_store(at(port, rank), 60)
        if rank == 0:
            theirs = ["verdict", *(f"{what}/{other}" for what in ("here", "rank") for other in range(2))]
            for key in theirs:
                for text in words if key == "rank/1" else words[:1]:
                    dist.PrefixStore("lingua/meeting", store).set(key, text)
                    assert lingua.distributed.meeting._brought(dist.PrefixStore("lingua/meeting", store), 1) is None
        dist.barrier()
        part = agree(store, at(port, rank), 60)
        store.set("a", "a stranger's")
        part.set(f"a/{rank}", str(rank))
        found = part.get(f"a/{1 - rank}").decode(), part.check(["a"])
        dist.barrier()
        return found

    assert run_on_ranks(act, 2) == [("1", False), ("0", False)]


@pytest.mark.ranks
@pytest.mark.parametrize("failing", [[1], [0], [0, 1, 2]])
def test_nobody_waits_for_a_rank_whose_config_is_refused(port: int, failing: list[int]):
    def act(rank: int) -> tuple[list[str], bool]:
        os.environ["RANK"] = str(rank)
        error = ConfigError(["steps is 0", "optim.lr is no number"]) if rank in failing else None
        with pytest.raises(ConfigError) as caught:
            come(at(port, rank, 3), error)
        return caught.value.problems, known_to_all(caught.value)

    of = {1: "", 3: ""} | {1: f"rank {failing[0]}: "}
    problems = [f"{of[len(failing)]}{text}" for text in ("steps is 0", "optim.lr is no number")]
    assert run_on_ranks(act, 3) == [(problems, True)] * 3, "so that rank 0 alone prints them"


@pytest.mark.ranks
def test_another_error_of_one_rank_keeps_its_kind(port: int):
    def act(rank: int) -> tuple[str, str]:
        error = DiskError("x.yaml: Stale file handle", 116, "x.yaml") if rank == 1 else None
        with pytest.raises((DiskError, RankError)) as caught:
            come(at(port, rank), error)
        return str(caught.value), classify(caught.value)

    assert run_on_ranks(act, 2) == [
        ("rank 1: DiskError: x.yaml: Stale file handle", "disk"),
        ("x.yaml: Stale file handle", "disk"),
    ]


def test_another_program_at_the_port_is_not_waited_for_without_a_limit(port: int, monkeypatch: pytest.MonkeyPatch):
    """Rank 0 cannot listen there and ends; torch's client alone would wait for an answer for ever."""
    monkeypatch.setattr(lingua.distributed.meeting, "SAY_AFTER_S", 0.1)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(RankError, match="does not answer; is MASTER_PORT taken by another program"):
            open_store(at(port, 1), 0.3)
        with pytest.raises(RankError, match="another process listens there"):
            open_store(at(port), 0.3)


def test_an_error_that_nobody_hears_is_still_told(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lingua.distributed.meeting, "TELL_S", 0.2)
    error = ConfigError("steps is 0")
    with pytest.raises(ConfigError, match="steps is 0") as caught, told_to_others(at(port, 1)):
        raise error
    assert not known_to_all(caught.value), "so this rank prints it"
