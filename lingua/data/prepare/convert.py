"""Read files as blocks of jsonl bytes: jsonl as it is, .gz, .zst and .zip unpacked, parquet and plain text converted.

Lines of jsonl files keep every field, byte for byte. From parquet only the text and `id` are read. A file of plain text
is one document; a long one is cut at empty lines. A truncated file is an error that names it, not a shorter data set.
Memory: a few blocks, whatever a file unpacks to, and `unpacking_bytes`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from lingua.data.blocked_source import PLAIN_TEXT, DataError, TextFields
from lingua.data.prepare.counts import refuse
from lingua.files import RunError, human_bytes

BLOCK_BYTES = 1 << 20
PLAIN = ".jsonl"
_PACKED = ("gz", "zst", "zstd")
_TEXT = tuple(f"{kind}{packed}" for kind in (".txt", ".md") for packed in ("", *(f".{one}" for one in _PACKED)))
SUFFIXES = (PLAIN, *(f"{kind}.{one}" for kind in (PLAIN, ".json") for one in _PACKED), *_TEXT, ".parquet", ".zip")
READ = "txt, md, jsonl (also as gz, zst or in a zip) and parquet"
UNIT_BYTES = 64 << 20
"""Bytes of plain-text files that are read as one input: there may be many small ones, and each input costs files."""
DOCUMENT_CHARS = 64 << 10
"""Characters of plain text after which a document ends at the next empty line."""
_ZSTD = (".zst", ".zstd")
_PARQUET_BYTES = 96 << 20  # its library and a row group
_ZSTD_WINDOW_BYTES = 8 << 20  # what every decoder must allow
_ZSTD_HEAD_BYTES = 18  # longest header of a frame


def is_plain(path: str | Path) -> bool:
    return str(path).endswith(PLAIN)


def is_text(path: str | Path) -> bool:
    """Return whether a file is plain text, packed or not."""
    return str(path).lower().endswith(_TEXT)


def find_inputs(source: Path) -> list[str]:
    """Find the readable files, relative to the folder `source`, in the order of their numbers; hidden ones are skipped.

    `source` may be such a file.
    """
    return sorted(name for name in _names(source) if name.lower().endswith(SUFFIXES))


def input_sizes(source: Path) -> list[list[Any]]:
    """Return [name, bytes] of each file that `find_inputs` finds."""
    folder = source if source.is_dir() else source.parent
    names = find_inputs(source)
    closed = [folder / name for name in names if not os.access(folder / name, os.R_OK)]
    refuse([f"{file} cannot be opened; mend the link or its permissions, or remove it" for file in closed])
    return [[name, (folder / name).stat().st_size] for name in names]


def chunks_for(source: Path) -> int:
    """Return a suitable number of chunks for a source, by its size."""
    return min(max(sum(size for _, size in input_sizes(source)) >> 26, 1), 32)


def left_aside(source: Path) -> str:
    """Count the files that cannot be read, by suffix; "" if there are none."""
    others = Counter(Path(name).suffix or "other" for name in _names(source) if not name.lower().endswith(SUFFIXES))
    return ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5))


def _names(source: Path) -> list[str]:
    if source.is_file():
        return [source.name]
    found = [
        path.relative_to(source) for path in source.rglob("*") if not path.is_dir()
    ]  # dead links are reported later
    return [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]


def as_units(names: Sequence[str], sizes: Sequence[int]) -> tuple[list[list[str]], list[int]]:
    """Return the inputs, each of one file or several consecutive plain texts, and their sizes."""
    units: list[list[str]] = []
    unit_sizes: list[int] = []
    for name, size in zip(names, sizes, strict=True):
        if units and is_text(name) and is_text(units[-1][-1]) and unit_sizes[-1] < UNIT_BYTES:
            units[-1].append(name)
            unit_sizes[-1] += size
        else:
            units.append([name])
            unit_sizes.append(size)
    return units, unit_sizes


def unpacking_bytes(path: Path) -> int:
    """Return the memory that unpacking a file takes, in addition to its blocks."""
    if path.name.lower().endswith(".parquet"):
        return _PARQUET_BYTES
    if not path.name.lower().endswith(_ZSTD):
        return 0
    with path.open("rb", buffering=0) as file:
        return _zstd_window(file.read(_ZSTD_HEAD_BYTES))


def _zstd_window(head: bytes) -> int:
    """Return the memory for the window of a frame with this head; a skippable or damaged one gets the minimum."""
    import zstandard

    try:
        return max(_ZSTD_WINDOW_BYTES, zstandard.get_frame_parameters(head).window_size)
    except zstandard.ZstdError:
        return _ZSTD_WINDOW_BYTES


def blocks(path: Path, fields: TextFields = PLAIN_TEXT) -> Iterator[bytes]:
    """Yield the file as pieces of jsonl. Raises RunError that names a damaged file."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path, fields)
        elif name.endswith(".zip"):
            yield from _zip(path, fields)
        elif name.endswith(_TEXT):
            yield from _documents(_unpacked(path), fields, path.name, str(path))
        else:
            yield from _unpacked(path)
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path} is damaged or cut off ({error}); remove it and start again") from None


def readable_blocks(paths: Sequence[Path], fields: TextFields, problems: list[str]) -> Iterator[bytes]:
    """Yield the blocks of the files, and append their problems to `problems`. Raises RunError at the end if any."""
    for path in paths:
        try:
            yield from blocks(path, fields)
        except RunError as error:
            problems.append(str(error))
    refuse(problems)


def _unpacked(path: Path) -> Iterator[bytes]:
    name = path.name.lower()
    if name.endswith((".gz", *_ZSTD)) and path.stat().st_size == 0:
        raise EOFError("it has 0 bytes")
    if name.endswith(_ZSTD):
        yield from _zstd(path)
        return
    with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _zip(path: Path, fields: TextFields) -> Iterator[bytes]:
    with zipfile.ZipFile(path) as packed:
        names = sorted(one for one in packed.namelist() if one.lower().endswith((PLAIN, ".txt", ".md")))
        names = [one for one in names if not any(part.startswith((".", "__MACOSX")) for part in one.split("/"))]
        if not names:
            raise RunError(f"{path} holds no txt, md or jsonl files; unpack it, or remove it, and start again")
        for name in names:
            if packed.getinfo(name).flag_bits & 1:
                raise RunError(f"{path}: {name} is encrypted; unpack it, or remove it, and start again")
            last = b"\n"
            with packed.open(name) as file:
                content = iter(lambda file=file: file.read(BLOCK_BYTES), b"")
                where = f"{path}: {name}"
                for block in content if name.lower().endswith(PLAIN) else _documents(content, fields, name, where):
                    yield block
                    last = block[-1:]
            if last != b"\n":
                yield b"\n"


def _documents(content: Iterable[bytes], fields: TextFields, name: str, where: str) -> Iterator[bytes]:
    """Convert plain text to lines of jsonl. Raises RunError if it is not UTF-8."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    held, n = "", 0
    try:
        for block in chain(content, (None,)):
            is_last = block is None
            held += decoder.decode(block or b"", final=is_last)  # pyright: ignore[reportArgumentType] - any bytes
            while len(held) > 4 * DOCUMENT_CHARS or (is_last and held.strip()):
                end, n = _end(held), n + 1
                yield orjson.dumps({"id": name if n == 1 else f"{name}#{n}", fields.keys[0]: held[:end]}) + b"\n"
                held = held[end:]
    except UnicodeDecodeError as error:
        raise RunError(f"{where} is not text in UTF-8 ({error.reason}); convert it with iconv, or remove it") from None
    if not n:
        yield b"\n"  # counted as blank


def _end(text: str) -> int:
    """Return where a document ends: after an empty line, else after a line, else anywhere."""
    if len(text) <= DOCUMENT_CHARS:
        return len(text)
    ends = (text.find(mark, DOCUMENT_CHARS, 4 * DOCUMENT_CHARS) + len(mark) for mark in ("\n\n", "\n"))
    return next((end for end in ends if end > DOCUMENT_CHARS), min(len(text), 4 * DOCUMENT_CHARS))


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
                f"{path} has no column {fields}, only {', '.join(names)}; name the right one with --text-key, or, "
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
    """Return the row as a line; if the text is not UTF-8, a line that counts as bad."""
    try:
        return orjson.dumps({key: value if value is None else value.decode(), **row}, default=str) + b"\n"
    except UnicodeDecodeError:
        return b'{"' + key.encode() + b'": not UTF-8}\n'
