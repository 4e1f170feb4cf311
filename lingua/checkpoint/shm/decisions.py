"""Decisions of the ranks: which slot to fill, which snapshots to save, which one to resume from. Pure, torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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


Place = Literal["used", "free", "copy"]
"""used: a slot whose save is not on the disk yet; free: a slot that still holds its last save; copy: of another node's
part."""


@dataclass(frozen=True)
class Found:
    """A node's part of a save, complete in the memory of a node of this attempt."""

    save: Save
    facts: Manifest = field(default_factory=dict)
    place: Place = "used"


@dataclass(frozen=True)
class Point:
    """A snapshot in memory that an attempt resumes from."""

    parts: tuple[tuple[int, Found], ...]
    """For each node that saved it: (node of this attempt that holds its part, the part)."""

    @property
    def step(self) -> int:
        return self.parts[0][1].save.step

    @property
    def facts(self) -> Manifest:
        return {name: fact for _, part in self.parts for name, fact in part.facts.items()}


def unsaved(nodes: Sequence[Sequence[Found]], run_id: str, newest: Newest) -> list[Point]:
    """Return the snapshots that are complete in memory and newer than the newest on the disk, by step.

    `nodes`: the complete parts in the memory of each node. Copies replace missing parts, but only of saves that a slot
    still holds: any other save was published, and the run may have been rewound since. Only the most recent attempt
    matters: it would already have rescued anything that an earlier one left.
    """
    saves = {
        (part.save.attempt, part.save.step, part.save.number)
        for part in itertools.chain(*nodes)
        if part.place == "used" and part.save.run_id == run_id
    }
    newer = [save for save in sorted(saves) if save[1] > newest.step and save[0] >= newest.attempt]
    found = [(save, point) for save in newer if (point := _whole(nodes, run_id, save, ("used", "copy"))) is not None]
    last = max((save[0] for save, _ in found), default=0)
    return sorted({save[1]: point for save, point in found if save[0] == last}.values(), key=lambda point: point.step)


def resume_point(nodes: Sequence[Sequence[Found]], run_id: str, newest: Newest) -> Point | None:
    """Return the snapshot in memory to resume from, or None to resume from the newest checkpoint on the disk.

    It is the newest that is not on the disk yet, else the one that is the newest there, if memory still holds all of
    it. The number of ranks and nodes that saved it does not matter, nor which node holds a part.
    """
    if points := unsaved(nodes, run_id, newest):
        return points[-1]
    parts = [part.save for part in itertools.chain(*nodes) if part.save.step == newest.step]
    saves = sorted({(save.attempt, save.step, save.number) for save in parts})
    points = [_whole(nodes, run_id, save, ("used", "free", "copy")) for save in saves]
    return next((point for point in points if point is not None and _equals(point, newest, run_id)), None)


def _whole(
    nodes: Sequence[Sequence[Found]], run_id: str, save: tuple[int, int, int], places: Sequence[Place]
) -> Point | None:
    """Gather the parts of a save (attempt, step, number), each from the first of `places`; None if one is missing."""
    parts: dict[int, tuple[int, Found]] = {}
    for place, (number, of_node) in itertools.product(places, enumerate(nodes)):
        for part in of_node:
            told = part.save
            if part.place == place and (told.run_id, told.attempt, told.step, told.number) == (run_id, *save):
                parts.setdefault(told.node, (number, part))
    is_whole = bool(parts) and len(parts) == next(iter(parts.values()))[1].save.n_nodes
    return Point(tuple(parts[node] for node in sorted(parts))) if is_whole else None


def _equals(point: Point, newest: Newest, run_id: str) -> bool:
    """Return whether a snapshot equals the published checkpoint: their manifests, with all checksums, are the same."""
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
