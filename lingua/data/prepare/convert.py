"""Published files as blocks of jsonl bytes: jsonl as it is, .gz and .zst unpacked, parquet converted.

Lines of jsonl files keep every field, byte for byte. Of parquet only the text and `id` are read. A file that is cut off
is an error that names it, not a shorter data set. Memory: a few blocks, whatever a file unpacks to, and
`unpacking_bytes`.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import orjson

from lingua.data.blocked_source import PLAIN_TEXT, DataError, TextFields
from lingua.files import RunError, human_bytes

BLOCK_BYTES = 1 << 20
PLAIN = ".jsonl"
SUFFIXES = (PLAIN, *(f"{kind}.{packed}" for kind in (PLAIN, ".json") for packed in ("gz", "zst", "zstd")), ".parquet")
_ZSTD = (".zst", ".zstd")
_PARQUET_BYTES = 96 << 20  # its library and a row group
_ZSTD_WINDOW_BYTES = 8 << 20  # what every decoder must allow
_ZSTD_HEAD_BYTES = 18  # of a frame, at most


def is_plain(path: str | Path) -> bool:
    return str(path).endswith(PLAIN)


def find_inputs(folder: Path) -> list[str]:
    """Find the files that can be read, relative to `folder`, in the order that numbers them; no hidden ones."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.name.endswith(SUFFIXES))
    found = (path for path in found if not (folder / path).is_dir())  # a link that leads nowhere is an error later
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def unpacking_bytes(path: Path) -> int:
    """Memory that unpacking a file takes beside its blocks."""
    if path.name.endswith(".parquet"):
        return _PARQUET_BYTES
    if not path.name.endswith(_ZSTD):
        return 0
    with path.open("rb", buffering=0) as file:
        return _zstd_window(file.read(_ZSTD_HEAD_BYTES))


def _zstd_window(head: bytes) -> int:
    """Memory for the window of a frame that begins so; a skippable or a damaged one needs none."""
    import zstandard

    try:
        return max(_ZSTD_WINDOW_BYTES, zstandard.get_frame_parameters(head).window_size)
    except zstandard.ZstdError:
        return _ZSTD_WINDOW_BYTES


def blocks(path: Path, fields: TextFields = PLAIN_TEXT) -> Iterator[bytes]:
    """Yield the file as pieces of jsonl. Raises RunError that names a damaged file."""
    name = path.name
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path, fields)
        elif not is_plain(path) and path.stat().st_size == 0:
            raise EOFError("it has 0 bytes")
        elif name.endswith(".gz"):
            with gzip.open(path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        elif name.endswith(_ZSTD):
            yield from _zstd(path)
        else:
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RunError(f"{path} is damaged or cut off ({error}); remove it and start again") from None


def _zstd(path: Path) -> Iterator[bytes]:
    """Unpack block by block (RFC 8878), because a few input bytes can become any number of output bytes."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    allowed_bytes = unpacking_bytes(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size

        def take(n_bytes: int) -> bytes:
            data = file.read(n_bytes)
            if len(data) < n_bytes:
                raise RunError(f"{path} is cut off; remove it and start again")
            return data

        try:
            while file.tell() < size:
                begin = take(5)
                if begin[0] & 0xF0 == 0x50 and begin[1:4] == b"\x2a\x4d\x18":  # skippable
                    n_bytes = int.from_bytes(begin[4:] + take(3), "little")
                    if file.seek(n_bytes, os.SEEK_CUR) > size:
                        take(1)
                    continue
                head = begin + take(zstandard.frame_header_size(begin) - len(begin))
                if (window := _zstd_window(head)) > allowed_bytes:
                    raise RunError(
                        f"{path}: a frame takes {human_bytes(window)} to unpack, its first one less; unpack it before"
                    )
                frame = unpacker.decompressobj()
                frame.decompress(head)
                is_last = False
                while not is_last:
                    block_head = take(3)
                    facts = int.from_bytes(block_head, "little")
                    is_last, is_repeated = bool(facts & 1), facts >> 1 & 3 == 1
                    yield frame.decompress(block_head + take(1 if is_repeated else facts >> 3))
                if zstandard.get_frame_parameters(head).has_checksum:
                    yield frame.decompress(take(4))
        except zstandard.ZstdError as error:
            raise RunError(f"{path} is damaged ({error}); remove it and start again") from None


def _parquet(path: Path, fields: TextFields) -> Iterator[bytes]:
    import pyarrow

    from lingua.data.parquet import as_bytes, open_parquet, rows_per_batch, text_columns

    pyarrow.set_cpu_count(1)  # one process per file: more threads would fight over the same cores
    try:
        file = open_parquet(path)
        names = file.schema_arrow.names
        if not any(key in names for key in fields.keys):
            raise RunError(
                f"{path} has no column {fields}, only {', '.join(names)}; name the right one with --text_key, or, "
                "where documents are named and not held, fetch the texts, write them as jsonl and use --source"
            )
        text = text_columns(path, file.schema_arrow, fields)[0]
        kept = [text, "id"] if names.count("id") == 1 and text != "id" else [text]
        for group in range(file.num_row_groups):
            n_rows = rows_per_batch(file.metadata.row_group(group), kept)
            for batch in file.iter_batches(n_rows, row_groups=[group], columns=kept, use_threads=False):
                rows = batch.select(kept[1:]).to_pylist()  # by whole names: `columns` also finds parts of structs
                texts = as_bytes(batch.column(batch.schema.get_field_index(text)))
                yield b"".join(_line(text, value, row) for value, row in zip(texts, rows, strict=True))
    except (pyarrow.ArrowException, OSError, DataError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RunError(f"{path} is damaged ({error}); remove it and start again") from None


def _line(key: str, value: bytes | None, row: dict[str, object]) -> bytes:
    """Return the row as a line; text that is no UTF-8 is left as it is, so the line counts as bad."""
    try:
        return orjson.dumps({key: value if value is None else value.decode(), **row}, default=str) + b"\n"
    except UnicodeDecodeError:
        return b'{"' + key.encode() + b'": not UTF-8}\n'
