"""Check prepared chunks against their manifest: their inputs, and the size and hash of each file.

`check_manifest` finds files that are missing, cut off or (with `hashes`) changed, and files that do not belong there,
with one `stat` per file; with `hashes` it reads everything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xxhash

from lingua.files import RunError, read_json

MANIFEST = "manifest.json"
_READ_BYTES = 4 << 20


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if it has none. Raises RunError if the file is not a manifest."""
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise RunError(f"{folder / MANIFEST} is not a manifest of prepared data; remove it or prepare the data again")
    return manifest


def check_manifest(folder: Path, suffix: str = ".jsonl", *, hashes: bool = False) -> list[str]:
    """Return the problems of a prepared folder, one sentence each; none if it has no manifest."""
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        return [str(error)]
    if manifest is None:
        return []
    problems = [
        f"{folder / name} is not named in {folder / MANIFEST}; another preparation left it there, remove it"
        for name in stray_files(folder, set(manifest["files"]), suffix)
    ]
    for name, facts in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing; copy it again or prepare the data again")
        elif (size := path.stat().st_size) != facts["bytes"]:
            problems.append(f"{path} has {size} bytes, its manifest says {facts['bytes']}; copy it again")
        elif hashes and hash_file(path) != facts["xxh3_128"]:
            problems.append(f"{path} has another content than its manifest says; copy it again")
    return problems


def stray_files(folder: Path, names: set[str], suffix: str = ".jsonl") -> list[str]:
    """Return the files that are not in `names` but that a loader would read as data."""
    found = [path.name for path in folder.glob(f"*{suffix}") if not path.name.startswith(".")]
    return sorted(name for name in found if name not in names)


def hash_file(path: Path, *, past_cache: bool = False) -> str:
    """Return the XXH3-128 of a file; `past_cache`: drop it from the page cache first, to hash the disk's content."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        if past_cache:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while n_read := file.readinto(buffer):
            digest.update(view[:n_read])
    return digest.hexdigest()
