"""What ranks tell each other while one of them is stuck in a collective."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from lingua.distributed.peers import Peers
from tests.ports import free_port
from tests.ranks import run_on_ranks

SECRET = b"known to the ranks alone"


@pytest.mark.ranks
def test_a_message_arrives_while_the_main_thread_waits_in_a_collective():
    port = free_port()

    def act(rank: int) -> list[bytes | None]:
        store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0)
        peers, heard = Peers(store, rank, 3, SECRET), list[bytes | None]()
        heard.append(peers.received())
        dist.barrier()

        def listen() -> None:
            while peers.received() is None:
                time.sleep(0.01)
            heard.append(peers.received())

        listening = threading.Thread(target=listen)
        listening.start()
        if rank == 2:
            peers.send(b"rank 2 has no data")
            peers.send(b"again")  # the first one stands
            listening.join()
        dist.all_reduce(torch.ones(1))  # which rank 2 enters only when it has heard itself
        listening.join()
        peers.leave(within_s=10)  # rank 0 goes last, or the others could not have asked
        return heard

    assert run_on_ranks(act, 3) == [[None, b"rank 2 has no data"]] * 3


def test_rank_0_does_not_wait_for_ever_for_those_who_are_gone():
    store = dist.TCPStore("127.0.0.1", free_port(), 1, is_master=True)
    store.set("lingua/left", "a stranger's: torch's server closes the connection of who adds to it")
    store.set("lingua/left/1", "a stranger's")
    naps: list[float] = []
    Peers(store, 0, 3, SECRET).leave(within_s=1, sleep=naps.append)
    assert sum(naps) == pytest.approx(1, abs=0.06)
    Peers(store, 1, 3, SECRET).leave(within_s=1)
    Peers(store, 2, 3, SECRET).leave(within_s=1)
    naps.clear()
    Peers(store, 0, 3, SECRET).leave(within_s=1, sleep=naps.append)
    assert naps == []


def test_what_a_stranger_puts_into_the_store_ends_nothing():
    store = dist.TCPStore("127.0.0.1", free_port(), 1, is_master=True)
    peers = Peers(store, 0, 2, SECRET)
    end = b'{"rank": 1, "reason": "asked", "exit_code": 130, "message": "stop"}'
    for key in ("lingua/end", "lingua/evaluation/1/left"):
        store.set(key, end.decode())
    Peers(store, 1, 2, b"a guess").send(end)
    Peers(store, 1, 2, b"a guess").set_flag("lingua/evaluation/1/left")
    assert peers.received() is None
    assert not peers.is_set("lingua/evaluation/1/left")
    Peers(store, 1, 2, SECRET).send(b"rank 1 has no data")
    Peers(store, 1, 2, SECRET).set_flag("lingua/evaluation/1/left")
    assert peers.received() == b"rank 1 has no data"
    assert peers.is_set("lingua/evaluation/1/left")
    assert not peers.is_set("lingua/evaluation/2/left")
