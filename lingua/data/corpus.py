"""The sample corpus: real text that every machine has, the source code of Python's standard library.

The same Python gives the same bytes in the same order. They are written once, atomically, into the user's cache folder
(never into `data`, which is often on a shared disk): about one second, 15 MB.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson

from lingua.files import RunError, whole_folder, write_whole

SOURCE_NAME = "python_stdlib"
N_CHUNKS = 4
VALIDATION_SHARE = 50  # one document in this many is held out
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "ensurepip"}


def cache_dir() -> Path:
    """Return the user's cache folder for lingua: $LINGUA_CACHE, $XDG_CACHE_HOME/lingua or ~/.cache/lingua."""
    if own := os.environ.get("LINGUA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lingua"


def embedded_corpus(cache: Path | None = None, library: Path | None = None) -> Path:
    """Return the folder `python_stdlib` with `*.chunk.NN.jsonl` and one `*.val.jsonl`; make it if it is missing.

    Raises OSError that names the folder if the cache cannot be written.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    folder = (cache or cache_dir()) / f"corpus-python-{platform.python_version()}" / SOURCE_NAME
    if folder.is_dir():
        return folder
    chunks = [f"{SOURCE_NAME}.chunk.{n:02d}.jsonl" for n in range(N_CHUNKS)]
    files: dict[str, list[bytes]] = {name: [] for name in [*chunks, f"{SOURCE_NAME}.val.jsonl"]}
    for number, (name, text) in enumerate(_documents(library)):
        is_held_out = number % VALIDATION_SHARE == VALIDATION_SHARE - 1
        file = f"{SOURCE_NAME}.val.jsonl" if is_held_out else chunks[number % N_CHUNKS]
        files[file].append(orjson.dumps({"id": name, "text": text}) + b"\n")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_folder(folder) as unfinished:
            for name, lines in files.items():
                write_whole(unfinished / name, b"".join(lines))
    except (OSError, RunError) as error:
        if folder.is_dir():  # another process was faster; its bytes are the same
            return folder
        reason = getattr(error, "strerror", None) or error
        remedy = "free some space there or point LINGUA_CACHE at another folder"
        text = f"cannot write the sample corpus to {folder}: {reason}; {remedy}"
        failure = OSError(text)
        failure.errno = getattr(error, "errno", None)  # tells a full disk from a transient fault
        raise failure from error
    return folder


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (path in the library, text) of each source file, in an order that mixes the packages."""
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
