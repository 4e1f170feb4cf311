"""Published files as blocks of jsonl bytes: jsonl as it is, .gz and .zst unpacked, parquet converted.

Lines of jsonl files keep every field, byte for byte. Of parquet only `text` (or `content`) and `id` are read. A file
that is cut off is an error that names it, not a shorter data set. Memory: a few blocks, and for parquet one
column chunk of a row group.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import orjson

from lingua.files import RunError

BLOCK_BYTES = 1 << 20
PLAIN = ".jsonl"
SUFFIXES = (PLAIN, *(f"{kind}.{packed}" for kind in (PLAIN, ".json") for packed in ("gz", "zst", "zstd")), ".parquet")
_ROWS = 256


def is_plain(path: str | Path) -> bool:
    return str(path).endswith(PLAIN)


def find_inputs(folder: Path) -> list[str]:
    """Find the files that can be read, relative to `folder`, in the order that numbers them; no hidden ones."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the file as pieces of jsonl. Raises RunError that names a damaged file."""
    name = path.name
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith(".gz"):
            with gzip.open(path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        elif name.endswith((".zst", ".zstd")):
            yield from _zstd(path)
        else:
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RunError(f"{path} is damaged or cut off ({error}); remove it and start again") from None


def _zstd(path: Path) -> Iterator[bytes]:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    with path.open("rb", buffering=0) as file:
        while packed := file.read(BLOCK_BYTES // 4):
            while packed:
                frame = frame or unpacker.decompressobj()
                try:
                    if block := frame.decompress(packed):
                        yield block
                except zstandard.ZstdError as error:
                    raise RunError(f"{path} is damaged ({error}); remove it and start again") from None
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise RunError(f"{path} is cut off; remove it and start again")


def _parquet(path: Path) -> Iterator[bytes]:
    import pyarrow
    from pyarrow import parquet

    pyarrow.set_cpu_count(1)  # one process per file: more threads would fight over the same cores
    try:
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES)
        names = file.schema_arrow.names
        text = next((name for name in ("text", "content") if name in names), None)
        if text is None:
            raise RunError(
                f"{path} has no column text or content, only {', '.join(names)}; such a data set names its documents "
                "without holding them: fetch the texts, write them as jsonl and use --source"
            )
        for rows in file.iter_batches(_ROWS, columns=[text, *(["id"] if "id" in names else [])], use_threads=False):
            lines = [orjson.dumps(row, default=str) for row in rows.to_pylist()]
            yield b"\n".join([*lines, b""])
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RunError(f"{path} is damaged ({error}); remove it and start again") from None
