"""Copy a published checkpoint to another folder and publish it there. Torch-free.

The copy appears atomically: it is hashed while it is written and compared with the manifest, and the mark comes last.
If the copy is killed, the same command removes what is left and begins again. The original is pinned meanwhile if its
run is writable; otherwise the copy fails if retention deletes the original.

The target looks like a run (config.yaml, checkpoints/), so it can be used wherever a run can.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lingua.checkpoint import layout, publish
from lingua.checkpoint.lookup import Checkpoint, root_of
from lingua.checkpoint.pins import pinned
from lingua.checkpoint.publish import DamagedError, Manifest
from lingua.config.frozen import CONFIG_FILE, public_yaml, read_frozen
from lingua.files import DISK, Buffer, Files, RunError, free_bytes, human_bytes, write_whole
from lingua.run.lock import RunLock, run_in, this_process
from lingua.run.place import why_not_ours
from lingua.scheduler import this_job

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20


def copy_checkpoint(
    source: Checkpoint,
    target_dir: Path,
    *,
    advance: Callable[[int], object] = lambda n_bytes: None,
    files: Files = DISK,
) -> Path:
    """Copy a run's checkpoint to `target_dir`; return the folder there, even if it was copied before.

    Raises DamagedError if the source differs from its manifest, RunError and OSError otherwise.
    """
    root, step, run_dir = source.root, source.step, source.run_dir
    if root is None or step is None or run_dir is None:
        raise RunError(f"{source} is not in a run; copy this folder by other means")
    config = travelling_config(run_dir)
    _check_target(target_dir, config)
    facts = source.manifest()
    needed, free = sum(fact.size_bytes for fact in facts.values()), free_bytes(target_dir)
    if free < needed:
        raise RunError(f"{target_dir} has {human_bytes(free)} free, the checkpoint takes {human_bytes(needed)}")
    with RunLock(target_dir, this_process(*this_job(os.environ))) as lock, pinned(root, step, "copy") as renew:
        target_root = target_dir / layout.CHECKPOINTS
        target_root.mkdir(exist_ok=True)
        publish.open_staging_dir(target_root, lock.attempt, files=files)
        if not _is_there(target_root, step, facts):
            began_s = time.monotonic()
            try:
                coming = layout.coming(layout.folder(target_root, step), lock.attempt)
                _copy_files(source, coming, advance, renew, files)
                if config is not None:
                    write_whole(target_dir / CONFIG_FILE, public_yaml(config), files=files)
                lock.check()
                seconds = time.monotonic() - began_s
                publish.publish(target_root, step, lock.attempt, facts, seconds=seconds, files=files)
            except BaseException:
                publish.abandon(target_root, step, lock.attempt, files=files)
                raise
        files.rmdir(layout.staging_dir(target_root, lock.attempt))
    return layout.folder(target_root, step)


def _is_there(root: Path, step: int, facts: Manifest) -> bool:
    if not layout.done_mark(root, step).exists():
        return False
    if publish.read_marked_manifest(root, step) != facts:
        raise RunError(f"{root} has another checkpoint of step {step}; choose another folder")
    return True


def _copy_files(
    source: Checkpoint,
    folder: Path,
    advance: Callable[[int], object],
    renew: Callable[[], None],
    files: Files,
) -> None:
    files.mkdir(folder)
    for name, fact in sorted(source.manifest().items()):
        if publish.write_hashed(folder / name, _chunks(source, name, advance), files=files) != fact:
            raise DamagedError(f"{source.folder / name} does not have the content it was written with")
        renew()


def copy_newest(
    candidates: Sequence[Checkpoint],
    target_dir: Path,
    *,
    begin: Callable[[Checkpoint], object] = lambda checkpoint: None,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> Path:
    """Copy the first candidate that is not damaged; call `begin` before each. Raises as `copy_checkpoint`."""
    for checkpoint in candidates:
        begin(checkpoint)
        try:
            return copy_checkpoint(checkpoint, target_dir, advance=advance)
        except DamagedError as error:
            if checkpoint is candidates[-1]:
                raise
            log.warning("%s is damaged and passed over: %s", checkpoint, error)
    raise RunError("there is no checkpoint to copy")


def travelling_config(run_dir: Path) -> dict[str, Any] | None:
    """Return the frozen config for a copy, without `checkpoint.path`: a copy's checkpoints are in its folder."""
    config = read_frozen(run_dir)
    if config is not None and isinstance(config.get("checkpoint"), dict):
        config["checkpoint"] = {**config["checkpoint"], "path": None}
    return config


def _check_target(target_dir: Path, config: dict[str, Any] | None) -> None:
    if (target_dir / "run.sh").exists():
        raise RunError(f"{target_dir} is a run that was trained in that folder; choose another one to copy to")
    there = read_frozen(target_dir)
    if there is not None and there.get("dump_dir") != (config or {}).get("dump_dir"):
        raise RunError(f"{target_dir} holds copies from another run, {there.get('dump_dir')}; choose another folder")
    if there is not None and root_of(target_dir) != target_dir / layout.CHECKPOINTS:
        raise RunError(f"{target_dir} keeps its checkpoints in {root_of(target_dir)}; choose another folder")
    if why := why_not_ours(target_dir / layout.CHECKPOINTS, run_in(target_dir)):
        raise RunError(why)


def chunks(path: Path, advance: Callable[[int], object]) -> Iterator[Buffer]:
    """Yield the bytes of a file; each piece is valid until the next is taken."""
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while n_read := file.readinto(buffer):
            yield buffer[:n_read]
            advance(n_read)


def _chunks(source: Checkpoint, name: str, advance: Callable[[int], object]) -> Iterator[Buffer]:
    try:
        yield from chunks(source.folder / name, advance)
    except FileNotFoundError:
        raise RunError(
            f"{source.folder / name} is gone: the run's retention has deleted step {source.step} meanwhile; "
            "copy another step"
        ) from None
