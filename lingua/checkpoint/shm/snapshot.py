"""A complete slot as a start reads it, while the service writes it to the disk. Torch-free.

Nobody changes the slot meanwhile: a rank fills a slot only after all ranks of its attempt have loaded, a service only
changes the mark, and it does not give the area back while a rank is in it. What a newer attempt does to the names does
not reach what is mapped.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import orjson

from lingua.checkpoint.documents import MANIFEST_VERSION, ListedFile, ManifestDocument
from lingua.checkpoint.publish import FileFacts, Manifest
from lingua.checkpoint.shm.area import Save
from lingua.checkpoint.shm.drain import mapped
from lingua.files import RunError


class Snapshot:
    """The files of a slot, mapped."""

    def __init__(self, folder: Path, save: Save, facts: Manifest) -> None:
        """Raises OSError, and DamagedError for a file that is not there as it was staged."""
        self.folder, self.save, self.facts = folder, save, facts
        self._maps: dict[str, mmap.mmap | bytes] = {name: mapped(folder / name, fact) for name, fact in facts.items()}

    def content(self, name: str) -> memoryview:
        """Return what a file of the checkpoint holds. Raises KeyError."""
        return memoryview(self._maps[name])

    def json(self, path: Path) -> Any:
        """Return what a JSON file holds. Raises RunError."""
        try:
            return orjson.loads(self.content(path.name))
        except (KeyError, orjson.JSONDecodeError) as error:
            raise RunError(f"{path} is not valid JSON ({error})") from None

    def damage(self, name: str) -> str | None:
        """Return what is wrong with a file, or None; reads every byte of it."""
        is_whole = FileFacts.of(self.content(name)) == self.facts[name]
        return None if is_whole else f"{name} was changed after it was staged"

    def manifest(self) -> ManifestDocument:
        """Return the manifest that the checkpoint will have."""
        listed = {name: ListedFile(bytes=fact.size_bytes, xxh3_128=fact.xxh3_128) for name, fact in self.facts.items()}
        step, attempt, run_id = self.save.step, self.save.attempt, self.save.run_id
        return ManifestDocument(version=MANIFEST_VERSION, step=step, incarnation=attempt, run_id=run_id, files=listed)
