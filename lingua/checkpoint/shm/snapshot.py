"""Read a complete save from memory to resume from it, while the services write it to the disk. Torch-free.

Nobody changes its slots meanwhile: a rank fills a slot only after all ranks of its attempt have loaded, a service only
changes the mark, and it does not remove the area while a rank uses it. If a newer attempt removes or renames files, the
mapped content stays.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from lingua.checkpoint import layout
from lingua.checkpoint.documents import MANIFEST_VERSION, ListedFile, ManifestDocument
from lingua.checkpoint.shm.area import ShmArea
from lingua.checkpoint.shm.decisions import Point
from lingua.checkpoint.shm.drain import mapped
from lingua.checkpoint.shm.part_server import PartReader, RemoteFile
from lingua.files import RunError


class Snapshot:
    """The files of a save: mapped if this node holds them, else read from the node that does."""

    def __init__(self, point: Point, node: int, area: ShmArea, readers: Mapping[int, PartReader], share: slice) -> None:
        """`node`: ours; `readers`: by node; `share`: which files of our node this rank verifies.

        Raises OSError, and DamagedError for a file that is not there as it was staged.
        """
        self.facts, self._point = point.facts, point
        self._contents: dict[str, mmap.mmap | bytes | RemoteFile] = {}
        here: list[str] = []
        for holder, part in point.parts:
            if holder == node:
                folder = area.find(part.save.key)[0].folder
                self._contents |= {name: mapped(folder / name, fact) for name, fact in part.facts.items()}
                here += part.facts
            else:
                reader, key = readers[holder], part.save.key
                sizes = {name: fact.size_bytes for name, fact in part.facts.items()}
                self._contents |= {name: RemoteFile(reader, key, name, size) for name, size in sizes.items()}
        self.to_verify = sorted(here)[share]

    @property
    def folder(self) -> Path:
        """Its name in messages."""
        return Path("memory") / layout.step_name(self._point.step)

    def content(self, name: str) -> memoryview | RemoteFile:
        """Return the content of a file of the checkpoint. Raises KeyError."""
        found = self._contents[name]
        return found if isinstance(found, RemoteFile) else memoryview(found)

    def json(self, path: Path) -> Any:
        """Parse a JSON file. Raises RunError."""
        try:
            return orjson.loads(self.content(path.name)[:])
        except (KeyError, orjson.JSONDecodeError) as error:
            raise RunError(f"{path} is not valid JSON ({error})") from None

    def manifest(self) -> ManifestDocument:
        """Return the manifest that the checkpoint will have."""
        listed = {name: ListedFile(bytes=fact.size_bytes, xxh3_128=fact.xxh3_128) for name, fact in self.facts.items()}
        save = self._point.parts[0][1].save
        return ManifestDocument(
            version=MANIFEST_VERSION, step=save.step, incarnation=save.attempt, run_id=save.run_id, files=listed
        )
