"""Find the checkpoint that RUN, RUN@step or a folder means, and compare it with its manifest. Torch-free.

Only reads, so the run may be a colleague's. Inside a run only steps with a `.done` mark are checkpoints, and the mark
has the manifest's checksum; a folder that was copied elsewhere is compared with its own manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingua.checkpoint import documents, layout, publish
from lingua.checkpoint.publish import DamagedError, Manifest
from lingua.checkpoint.shm.area import area_of
from lingua.config.frozen import CONFIG_FILE, read_frozen
from lingua.files import CommandError, RunError
from lingua.run.find import no_run

log = logging.getLogger(__name__)

EMA_SUFFIX = ":ema"


def every_file(name: str) -> bool:
    return True


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that exists: of a run (all fields are set), or a folder by itself."""

    folder: Path
    root: Path | None = None
    step: int | None = None
    run_dir: Path | None = None

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> Manifest:
        """Read sizes and checksums of its files. Raises DamagedError."""
        if self.root is None or self.step is None:
            return publish.read_manifest(self.folder)
        return publish.read_marked_manifest(self.root, self.step)

    def damage(
        self,
        *,
        needed: Callable[[str], bool] = every_file,
        sizes_only: bool = False,
        advance: Callable[[int], object] = lambda n_bytes: None,
    ) -> list[str]:
        """Compare its `needed` files with the manifest, as `publish.damage` does."""
        try:
            facts = {name: fact for name, fact in self.manifest().items() if needed(name)}
        except DamagedError as error:
            return [str(error)]
        return publish.damage(self.folder, facts, sizes_only=sizes_only, advance=advance)


def without_ema(path: str | Path) -> tuple[str, bool]:
    """Split RUN@STEP:ema into RUN@STEP and whether the average of the weights is meant."""
    text = str(path)
    wants = text.endswith(EMA_SUFFIX) and not Path(text).exists()
    return (text.removesuffix(EMA_SUFFIX), True) if wants else (text, False)


def split(path: str | Path) -> tuple[Path, int | None]:
    """Split RUN@step into (RUN, step), or (path, None) if the whole path exists. Raises CommandError."""
    run, at, number = str(path).rpartition("@")
    place, step = Path(path), None
    if at and number.isdecimal() and not place.exists():
        place, step = Path(run), int(number)
    if not place.exists():
        raise no_run(place)
    return place, step


def root_of(run_dir: Path) -> Path:
    """Return where a run's checkpoints are or would be: `checkpoint.path` of its config, else RUN/checkpoints."""
    return root_in(read_frozen(run_dir) or {}, run_dir)


def root_in(config: Mapping[str, Any], run_dir: Path) -> Path:
    """Return `root_of` a run, given its config."""
    section = config.get("checkpoint")
    elsewhere = section.get("path") if isinstance(section, dict) else None
    return Path(elsewhere) if elsewhere and isinstance(elsewhere, str) else run_dir / layout.CHECKPOINTS


def run_root(run_dir: Path) -> Path:
    """Return `root_of` for commands that need a run. Raises CommandError."""
    if not (root := root_of(run_dir)).is_dir() and not (run_dir / CONFIG_FILE).is_file():
        raise no_run(run_dir)
    return root


def is_resumable(run_dir: Path, *roots: Path, shm: Path) -> bool:
    """Return whether the next attempt of a run would resume from a checkpoint.

    Counts published checkpoints below `roots`, those that lack only their mark, which the next attempt sets, and a
    snapshot in this machine's memory (`shm`). A snapshot of several nodes counts only once it is published, since no
    node knows whether the other parts still exist. The places are checked in the order in which a checkpoint passes
    through them, so that one on its way is not missed.
    """
    if step_in_memory(run_dir, *roots, shm=shm) is not None:
        return True
    return any(_unmarked_but_whole(root) or layout.done_steps(root) for root in roots)


def step_in_memory(run_dir: Path, *roots: Path, shm: Path) -> int | None:
    """Return the newest step of a run that is complete in this machine's memory, or None."""
    ids = {documents.read_run_id(root) for root in roots}
    saves = [found[0] for slot in area_of(run_dir, shm).slots() if (found := slot.complete()) is not None]
    return max((save.step for save in saves if save.n_nodes == 1 and save.run_id in ids), default=None)


def _unmarked_but_whole(root: Path) -> bool:
    """Return whether an attempt died between giving a checkpoint its name and giving it its mark."""
    unmarked = layout.unmarked_folders(root)
    found = (each for _, folder in layout.staging_dirs(root) for each in layout.temporaries(folder))
    return any(each.is_mark and each.kind == "coming" and each.step in unmarked for each in found)


def find(path: str | Path) -> list[Checkpoint]:
    """Return all checkpoints that a path may mean, the newest first. Raises RunError if there is none."""
    place, step = split(path)
    if (root := root_of(place)).is_dir():
        return _of_run(place, root, step)
    if step is not None or not (place / layout.METADATA).exists():
        if (place / CONFIG_FILE).is_file():
            return _of_run(place, root, step)
        raise no_run(place)
    number = layout.parse_folder(place.name)
    if number is not None and layout.done_mark(place.parent, number).exists():
        return [Checkpoint(place, place.parent, number, place.parent.parent)]
    return [Checkpoint(place)]


def of_meta_lingua(path: str | Path) -> Path | None:
    """Return the checkpoint folder that RUN or RUN@step means if it is a run of Meta Lingua, whose folders have neither
    marks nor manifests: torch writes `.metadata` last. Raises RunError if RUN does not exist."""
    place, step = split(path)
    root = next((folder for folder in (root_of(place), place / layout.CHECKPOINTS) if folder.is_dir()), None)
    if root is None or layout.done_steps(root):  # its config may name a folder of before it was moved
        return None
    folders = [layout.folder(root, n) for n in sorted(layout.unmarked_folders(root)) if step in (None, n)]
    whole = [f for f in folders if (f / layout.METADATA).exists() and not (f / layout.MANIFEST).exists()]
    return whole[-1] if whole else None


def _of_run(run_dir: Path, root: Path, step: int | None) -> list[Checkpoint]:
    there = layout.done_steps(root)
    if not there and of_meta_lingua(run_dir) is not None:
        remedy = f"`lingua import --run {run_dir} NEW` makes it one of ours"
        raise RunError(f"{run_dir} is a run of Meta Lingua; {remedy} (its weights alone: checkpoint.init_ckpt_path)")
    if step is not None and step not in there:
        raise CommandError(f"{root} has no published checkpoint of step {step}; it has {some_steps(there)}")
    if not there:
        raise RunError(f"{root} has no published checkpoint yet; `lingua status {run_dir}` says where the run stands")
    steps = reversed(there) if step is None else [step]
    return [Checkpoint(layout.folder(root, found), root, found, run_dir) for found in steps]


def some_steps(steps: list[int], limit: int = 8) -> str:
    """Format the newest few of many steps, in ascending order."""
    shown = ", ".join(map(str, steps[-limit:])) or "none"
    return shown if len(steps) <= limit else f"{shown} and {len(steps) - limit} before them"


def is_checkpoint(path: str | Path) -> bool:
    """Return whether the path points to checkpoints with a manifest. Raises RunError if it does not exist."""
    place, step = split(path)
    return step is not None or root_of(place).is_dir() or (place / layout.MANIFEST).exists()


def find_one(path: str | Path) -> Checkpoint:
    """Return the checkpoint that a path means, without verifying it. Raises RunError."""
    return find(path)[0]


def intact(
    path: str | Path,
    *,
    needed: Callable[[str], bool] = every_file,
    sizes_only: bool = False,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> Checkpoint:
    """Return the checkpoint that a path means; of a run without a step the newest that verifies. Raises RunError."""
    return first_intact(find(path), lambda found: found.damage(needed=needed, sizes_only=sizes_only, advance=advance))


def first_intact(candidates: Sequence[Checkpoint], damage: Callable[[Checkpoint], list[str]]) -> Checkpoint:
    """Return the first of which `damage` says nothing. Raises RunError."""
    for checkpoint in candidates:
        problems = damage(checkpoint)
        if not problems:
            return checkpoint
        if len(candidates) == 1:
            raise RunError(f"{checkpoint} does not verify: {'; '.join(problems)}; take another checkpoint")
        log.warning("%s does not verify and is passed over: %s", checkpoint, "; ".join(problems))
    raise RunError(f"{candidates[0].folder.parent} has no published checkpoint that verifies")
