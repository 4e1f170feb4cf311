"""The embedded corpus: real text that every machine has, the sources of Python's own standard library.

Promise: the same Python gives the same bytes in the same order, whoever writes them and however often they are
killed; written once, whole or not at all, into the user's cache folder (never into `data`, often a shared disk).
Cost: about one second once; some 15 MB on disk.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import orjson

SOURCE_NAME = "python_stdlib"
N_CHUNKS = 4
VALIDATION_SHARE = 50  # one document in this many is held out
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "ensurepip"}


def cache_dir() -> Path:
    """The user's cache folder for lingua: $LINGUA_CACHE, $XDG_CACHE_HOME/lingua or ~/.cache/lingua."""
    if own := os.environ.get("LINGUA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lingua"


def embedded_corpus(cache: Path | None = None, library: Path | None = None) -> Path:
    """Folder `python_stdlib` with `*.chunk.NN.jsonl` and one `*.val.jsonl`, made when it is not there.

    Raises OSError with the folder's name when the cache cannot be written.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    root = (cache or cache_dir()) / f"corpus-python-{platform.python_version()}"
    folder = root / SOURCE_NAME
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{SOURCE_NAME}.tmp-", dir=root))
        try:
            _write(unfinished, library)
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if folder.is_dir():  # another process was faster; its bytes are the same
            return folder
        raise OSError(
            f"cannot write the sample corpus to {folder}: {error.strerror or error}; "
            "free some space there or point LINGUA_CACHE at another folder"
        ) from error
    return folder


def _write(folder: Path, library: Path) -> None:
    chunks = [(folder / f"{SOURCE_NAME}.chunk.{n:02d}.jsonl").open("wb") for n in range(N_CHUNKS)]
    held_out = (folder / f"{SOURCE_NAME}.val.jsonl").open("wb")
    files = [*chunks, held_out]
    try:
        for number, (name, text) in enumerate(_documents(library)):
            place = held_out if number % VALIDATION_SHARE == VALIDATION_SHARE - 1 else chunks[number % N_CHUNKS]
            place.write(orjson.dumps({"id": name, "text": text}) + b"\n")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    """(path in the library, text) of each source file, in an order that mixes the packages."""
    names = []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        inside = Path(folder).relative_to(library)
        names += [(inside / name).as_posix() for name in files if name.endswith(".py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            text = (library / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of files test other encodings
            continue
        if text.strip():
            yield name, text
