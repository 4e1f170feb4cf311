"""What the ranks decide about slots: which one to fill, what is worth saving, what to resume from. Pure, torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from lingua.checkpoint import publish
from lingua.checkpoint.publish import Manifest
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


class Newest(NamedTuple):
    """The newest published checkpoint, as its mark describes it."""

    step: int = -1
    attempt: int = 0
    manifest_xxh3_128: str = ""


@dataclass(frozen=True)
class Found:
    """A node's part of a save, complete in the memory of a node of this start."""

    number: int
    """Of the slot."""
    save: Save
    facts: Manifest = field(default_factory=dict)
    is_free: bool = False
    """The slot is free: the save was published, or given up."""


@dataclass(frozen=True)
class Point:
    """A snapshot in memory that a start resumes from."""

    parts: tuple[tuple[int, Found], ...]
    """Of each node that saved it: which node of this start holds its part, and the part."""

    @property
    def step(self) -> int:
        return self.parts[0][1].save.step

    @property
    def facts(self) -> Manifest:
        return {name: fact for _, part in self.parts for name, fact in part.facts.items()}


def worth_saving(found: Iterable[Save], run_id: str, newest: Newest) -> set[tuple[int, int]]:
    """Return (attempt, step) of snapshots that are complete on all their nodes and newer than the newest on the disk.

    `found`: the complete saves of all nodes. Only the most recent attempt matters: it would already have rescued
    anything that an earlier one left.
    """
    parts: dict[tuple[int, int], set[int]] = {}
    n_nodes: dict[tuple[int, int], int] = {}
    for save in found:
        if save.run_id == run_id:
            parts.setdefault((save.attempt, save.step), set()).add(save.node)
            n_nodes[save.attempt, save.step] = save.n_nodes
    good = {
        key
        for key, nodes in parts.items()
        if len(nodes) == n_nodes[key] and key[1] > newest.step and key[0] >= newest.attempt
    }
    last = max((attempt for attempt, _ in good), default=0)
    return {key for key in good if key[0] == last}


def resume_point(nodes: Sequence[Sequence[Found]], run_id: str, newest: Newest) -> Point | None:
    """Return the snapshot in memory that a start resumes from, or None: then from the newest checkpoint on the disk.

    `nodes`: what is complete in the memory of each node of this start. It is the newest snapshot worth saving, or else
    the very one that is the newest on the disk, if memory still holds all of it. How many ranks and nodes there were
    does not matter, nor on which of the nodes a part lies.
    """
    unsaved = [part.save for of_node in nodes for part in of_node if not part.is_free]
    if wanted := worth_saving(unsaved, run_id, newest):
        return _whole(nodes, run_id, *max(wanted, key=lambda key: key[1]))
    same = {part.save.attempt for of_node in nodes for part in of_node if part.save.step == newest.step}
    points = [_whole(nodes, run_id, attempt, newest.step, even_free=True) for attempt in sorted(same)]
    return next((point for point in points if point is not None and _is(point, newest, run_id)), None)


def _whole(
    nodes: Sequence[Sequence[Found]], run_id: str, attempt: int, step: int, *, even_free: bool = False
) -> Point | None:
    """Gather the parts of a save; None if one is missing. Of several the one in use counts."""
    parts: dict[int, tuple[int, Found]] = {}
    for number, of_node in enumerate(nodes):
        for part in sorted(of_node, key=lambda part: part.is_free):
            save = part.save
            if (save.run_id, save.attempt, save.step) == (run_id, attempt, step) and (even_free or not part.is_free):
                parts.setdefault(save.node, (number, part))
    is_whole = bool(parts) and len(parts) == next(iter(parts.values()))[1].save.n_nodes
    return Point(tuple(parts[node] for node in sorted(parts))) if is_whole else None


def _is(point: Point, newest: Newest, run_id: str) -> bool:
    """Return whether a snapshot is what was published, by the checksum of the manifest, which names those of files."""
    manifest = publish.manifest_bytes(newest.step, newest.attempt, point.facts, run_id)
    return xxhash.xxh3_128_hexdigest(manifest) == newest.manifest_xxh3_128


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
