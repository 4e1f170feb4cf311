"""What the ranks decide about slots: which one to fill, what is worth saving, what to resume from. Pure, torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lingua.checkpoint.shm.area import Save, State


@dataclass(frozen=True)
class SlotView:
    """A slot as one node sees it."""

    state: State | None
    step: int = -1


def choose_slot(nodes: Sequence[dict[int, SlotView]]) -> int | None:
    """Choose the slot for the next save: one that is free everywhere, else the newest that no node is draining yet.

    `nodes`: each node's usable slots by number. Returns None if there is none.
    """
    common = sorted(set.intersection(*(set(node) for node in nodes)))
    for number in common:
        if all(node[number].state == "free" for node in nodes):
            return number
    idle = [n for n in common if all(node[n].state in ("free", "staged") for node in nodes)]
    return max(idle, key=lambda n: max(node[n].step for node in nodes), default=None)


def worth_saving(found: Iterable[Save], run_id: str, newest_done: tuple[int, int]) -> set[tuple[int, int]]:
    """Return (attempt, step) of snapshots that are complete on all their nodes and newer than the newest on the disk.

    `found`: the complete saves of all nodes; `newest_done`: (step, attempt) of the newest published checkpoint. Only
    the most recent attempt matters: it would already have rescued anything that an earlier one left.
    """
    parts: dict[tuple[int, int], set[int]] = {}
    n_nodes: dict[tuple[int, int], int] = {}
    for save in found:
        if save.run_id == run_id:
            parts.setdefault((save.attempt, save.step), set()).add(save.node)
            n_nodes[save.attempt, save.step] = save.n_nodes
    step_done, attempt_done = newest_done
    good = {
        key
        for key, nodes in parts.items()
        if len(nodes) == n_nodes[key] and key[1] > step_done and key[0] >= attempt_done
    }
    last = max((attempt for attempt, _ in good), default=0)
    return {key for key in good if key[0] == last}


def resume_point(nodes: Sequence[Sequence[Save]], run_id: str, newest_done: tuple[int, int]) -> Save | None:
    """Return the snapshot in memory that a start resumes from, or None: then from the newest checkpoint on the disk.

    `nodes`: the complete saves in the memory of each node of this start. It is the newest one worth saving, or the
    newest on the disk itself if that was written only now; and all of it must be on the one node, since parts do not
    travel between nodes. How many ranks there were does not matter.
    """
    step_done, attempt_done = newest_done
    found = [save for of_node in nodes for save in of_node]
    newest = max(worth_saving(found, run_id, (step_done - 1, attempt_done)), key=lambda key: key[1], default=None)
    if newest is None or len(nodes) > 1 or (newest[1] == step_done and newest[0] != attempt_done):
        return None
    return next((save for save in found if (save.run_id, save.attempt, save.step) == (run_id, *newest)), None)


@dataclass(frozen=True)
class Node:
    """This rank's node: the ranks that share one area of memory."""

    number: int
    n_nodes: int
    ranks: tuple[int, ...]

    @property
    def leader(self) -> int:
        """The rank that acts for the node."""
        return self.ranks[0]


def node_of(rank: int, areas: list[Any]) -> Node:
    """Group ranks by the area that each has entered; nodes are numbered in the order of their first rank."""
    distinct = list(dict.fromkeys(areas))
    ranks = tuple(other for other, area in enumerate(areas) if area == areas[rank])
    return Node(distinct.index(areas[rank]), len(distinct), ranks)
