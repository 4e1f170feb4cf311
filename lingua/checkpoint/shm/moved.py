"""Find snapshots that a run left in memory before its folder was renamed or moved. Torch-free.

An area is named after the run's folder, so the next attempt under another name would miss the newer steps in it and
train them again.
"""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from lingua.checkpoint import publish
from lingua.checkpoint.shm.area import SERVICE_LOCK, TRAINER_LOCK, Save, ServedRun, ShmArea, Slot, base
from lingua.checkpoint.shm.found import adopt_slot
from lingua.files import DISK, Files, RunError, entries

log = logging.getLogger(__name__)


def left_behind(area: ShmArea, run: ServedRun, newest_done: int) -> list[tuple[Slot, Save]]:
    """Return this run's snapshots in another area that are newer than the disk, if the run's folder was moved.

    If the folder that the area served still holds the run, our folder is a copy and the snapshots are not ours.
    """
    try:
        served = area.session.read()
        run_id, root = served["run_id"], Path(served["root"])
    except (OSError, TypeError, KeyError):
        return []
    if run_id != run.run_id:
        return []
    with suppress(OSError, RunError):
        if root != run.root and publish.read_run_id(root) == run_id:
            return []
    found = [(slot, complete[0]) for slot in area.slots() if (complete := slot.complete())]
    return [(slot, save) for slot, save in found if save.run_id == run.run_id and save.step > newest_done]


def adopt(area: ShmArea, run: ServedRun, newest_done: int, *, files: Files = DISK) -> None:
    """Move this run's snapshots here from areas under former names of its folder.

    Raises RunError while a process uses them. A kill between any two lines loses none.
    """
    for folder in entries(base(Path(run.args.shm_path))):
        other = ShmArea(folder)
        if folder == area.folder or folder.is_symlink() or not (found := left_behind(other, run, newest_done)):
            continue
        what = f"steps {sorted(save.step for _, save in found)} of this run, from when its folder had another name"
        with ExitStack() as stack:
            for name in (TRAINER_LOCK, SERVICE_LOCK):
                lock = other.lock(name)
                stack.callback(lock.close)
                if not lock.take():
                    raise RunError(
                        f"the memory of {socket.gethostname()} holds {what}, and process {lock.holder()} still uses "
                        "it: end that one with kill -9, which loses nothing, then the same command saves them first"
                    )
            log.info("%s has %s", folder, what)
            for slot, _ in found:
                adopt_slot(slot, area, files=files)
            other.remove(files=files)
