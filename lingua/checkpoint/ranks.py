"""The few exchanges between ranks that checkpoints need. Imports torch; alone it costs nothing.

Promise: one rank decides and all hear it, its errors too. Collectives run on the calling thread only, on a process
group of their own with a time-out as long as the slowest disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lingua.failure import RankError, carried, classify
from lingua.files import RunError

T = TypeVar("T")

SLOWEST_DISK = timedelta(hours=4)
"""How long ranks wait for the slowest one's writing, reading or verifying."""


class Ranks:
    """This rank among all ranks of the run."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self._group: dist.ProcessGroup | None = None
        if self.size > 1:
            group = dist.new_group(backend="gloo", timeout=SLOWEST_DISK)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_main(self, act: Callable[[], T]) -> T:
        """What `act` returns on rank 0, on every rank; or its RunError or OSError, on every rank."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer = [act(), None]
            except (RunError, OSError) as error:
                answer = [None, carried(error)]
            except BaseException as error:
                if self._group is not None:  # the others must not wait for us
                    told = RankError("rank 0 failed, see its log", classify(error))
                    dist.broadcast_object_list([None, told], src=0, group=self._group)
                raise
        if self._group is not None:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        raise_if(answer[1])
        return answer[0]

    def on_each(self, act: Callable[[], T]) -> list[T]:
        """What `act` returned on each rank, on every rank; or the first RunError or OSError, on every rank."""
        value: T | None = None
        error: RunError | None = None
        try:
            value = act()
        except (RunError, OSError) as caught:
            error = carried(caught)
        answers = self.gather((value, error))
        raise_if(next((error for _, error in answers if error is not None), None))
        return [value for value, _ in answers]  # pyright: ignore[reportReturnType] - without an error there is one


@dataclass(frozen=True)
class Node:
    """This rank's node, as far as checkpoints are concerned: ranks that share one region of memory."""

    number: int
    n_nodes: int
    ranks: tuple[int, ...]

    @property
    def leader(self) -> int:
        """The rank that acts for the node."""
        return self.ranks[0]


def node_of(rank: int, places: list[Any]) -> Node:
    """Ranks of equal place are on one node; nodes are numbered in the order of their first rank."""
    distinct = list(dict.fromkeys(places))
    ranks = tuple(other for other, place in enumerate(places) if place == places[rank])
    return Node(distinct.index(places[rank]), len(distinct), ranks)


def raise_if(error: RunError | None) -> None:
    if error is not None:
        raise error
