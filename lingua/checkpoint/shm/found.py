"""Take over what earlier attempts left in the memory of a node; for the node's leader. Torch-free.

A copy is claimed before it is read, so that the service does not overwrite it. A copy that is needed becomes a slot,
which the service then drains like any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lingua.checkpoint.shm.area import SERVICE_LOCK, ShmArea, Slot
from lingua.checkpoint.shm.decisions import Found
from lingua.files import DISK, Files, entries


def survey(area: ShmArea, *, files: Files = DISK) -> list[Found]:
    """Return the complete parts in an area, after recovering slots that a dead process was changing."""
    lock = area.lock(SERVICE_LOCK)
    try:
        if lock.take():  # no service lives, and none starts before we are done
            area.recover(files=files)
    finally:
        lock.close()
    for slot in area.slots():
        slot.change("claimed", "staged", files=files)
    for slot in area.copies.slots():
        slot.change("staged", "claimed", files=files)
    slots = [(slot, slot.state()) for slot in area.slots()]
    own = [(slot.complete(even_free=True), state) for slot, state in slots]
    found = [Found(*each, "free" if state == "free" else "used") for each, state in own if each]
    return found + [Found(*each, "copy") for slot in area.copies.slots() if (each := slot.complete())]


def keep(area: ShmArea, wanted: Sequence[Found], *, files: Files = DISK) -> list[int]:
    """Leave only these parts for the service to save; return the numbers of their slots."""
    keys = {part.save.key for part in wanted}
    for key in keys:
        source, _ = area.find(key)
        if source.folder.parent != area.folder:
            adopt_slot(source, area, files=files)
    kept = [slot.number for slot in area.slots() if (found := slot.complete()) and found[0].key in keys]
    for slot in area.slots():
        if slot.number not in kept:
            slot.change("staged", "free", files=files)
    return kept


def adopt_slot(source: Slot, area: ShmArea, *, files: Files = DISK) -> None:
    """Move a slot with a save from another area to the first free number here. A kill loses nothing."""
    taken = {each.number for each in area.slots()}
    target = next(t for n in itertools.count() if n not in taken and not (t := area.slot(n)).state())
    state = source.state()
    assert state is not None
    files.link(source.mark(state), target.mark("staged"))  # first: a slot without a mark holds nothing
    files.rename(source.folder, target.folder)
    files.remove(source.mark(state))


def release(area: ShmArea, n_copies: int, *, files: Files = DISK) -> None:
    """Let the service overwrite `n_copies` copies, and free the others. Call after all ranks have loaded."""
    for slot in area.copies.slots():
        slot.change("claimed", "free", files=files)
        if slot.number >= n_copies:
            files.remove_tree(slot.folder)
    for path in entries(area.copies.folder):
        if path.suffix and not path.with_suffix("").is_dir():  # a mark without a slot
            files.remove(path)
