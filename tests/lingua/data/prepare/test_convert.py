"""Folders as people have them: plain text, packed files, zips, and what cannot be read."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import zstandard

from lingua.config.base import ConfigError
from lingua.data.blocked_source import find_files
from lingua.data.manifest import check_manifest
from lingua.data.prepare import convert
from lingua.data.prepare.convert import DOCUMENT_CHARS, as_units, blocks, find_inputs, left_aside
from lingua.data.prepare.pipeline import Job, prepare
from lingua.files import RunError


def texts_of(path: Path) -> list[str]:
    return [orjson.loads(line)["text"] for line in b"".join(blocks(path)).splitlines() if line]


def job_of(source: Path, folder: Path) -> Job:
    return Job("mine", 12 << 30, folder / "data", folder / "tmp", n_chunks=1, source=source, suffix="")


def a_folder(folder: Path) -> Path:
    """One document of each kind, each text naming its file."""
    (folder / "sub" / ".hidden").mkdir(parents=True)
    (folder / "sub" / ".hidden" / "x.txt").write_text("hidden")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n\xc3\xa9\n")
    (folder / "B.TXT").write_text("b")
    (folder / "sub" / "c.md").write_text("# c\n")
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"d"))
    (folder / "e.md.zst").write_bytes(zstandard.compress(b"e"))
    (folder / "f.jsonl").write_text('{"text": "f"}')
    (folder / "empty.txt").touch()
    (folder / "paper.pdf").touch()
    with zipfile.ZipFile(folder / "z.zip", "w") as packed:
        packed.writestr("in/g.txt", "g")
        packed.writestr("h.jsonl", '{"text": "h"}')
        packed.writestr("i.jsonl", '{"text": "i"}')
        packed.writestr("__MACOSX/._g.txt", "junk")
        packed.writestr("j.pdf", "junk")
    return folder


def test_every_kind_becomes_documents(tmp_path: Path) -> None:
    source = a_folder(tmp_path / "my texts")
    assert left_aside(source) == "1 .pdf"
    manifest = prepare(job := job_of(source, tmp_path))
    lines = [line for file in sorted(job.out.glob("*.jsonl")) for line in file.read_bytes().splitlines()]
    found = sorted(orjson.loads(line)["text"] for line in lines)
    assert found == ["# c\n", "a\né\n", "b", "d", "e", "f", "g", "h", "i"]
    assert manifest["counts"]["blank"] == 1  # the empty file
    assert check_manifest(job.out, hashes=True) == []
    assert prepare(job) == manifest
    assert prepare(job_of(source / "a.txt", tmp_path / "one"))["documents"] == 1


@pytest.mark.parametrize("paragraph", ["x" * 99 + "\n\n", "é" * 99 + "\n", "y" * 100])
def test_a_long_text_is_cut_where_paragraphs_end_and_nothing_is_lost(tmp_path: Path, paragraph: str) -> None:
    (tmp_path / "long.txt").write_text(whole := paragraph * (8 * DOCUMENT_CHARS // 100))
    pieces = texts_of(tmp_path / "long.txt")
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert all(len(piece) <= 4 * DOCUMENT_CHARS for piece in pieces)
    assert all(piece.endswith(paragraph[-2:]) for piece in pieces)


def test_a_text_is_the_same_however_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(("é\r\n" * 90_000).encode())
    whole = texts_of(tmp_path / "a.txt")
    monkeypatch.setattr(convert, "BLOCK_BYTES", 977)
    assert texts_of(tmp_path / "a.txt") == whole


def test_small_texts_are_one_input_and_other_files_stay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "UNIT_BYTES", 10)
    names = ["a.txt", "b.md", "c.txt.gz", "d.jsonl", "e.jsonl", "f.txt"]
    assert as_units(names, [6, 6, 6, 1, 1, 1]) == (
        [["a.txt", "b.md"], ["c.txt.gz"], ["d.jsonl"], ["e.jsonl"], ["f.txt"]], [12, 6, 1, 1, 1],
    )  # fmt: skip


def encrypted(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("a.txt", "a")
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


def without_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("a.pdf", "a")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.txt", b"caf\xe9", r"a.txt is not text in UTF-8 .*; convert it with iconv, or remove it"),
        ("a.txt", b"cut \xc3", "not text in UTF-8"),
        ("a.txt.gz", b"", r"a.txt.gz is damaged or cut off \(it has 0 bytes\)"),
        ("a.zip", b"PK", "a.zip is damaged or cut off"),
        ("a.zip", encrypted, "a.zip: a.txt is encrypted"),
        ("a.zip", without_text, "a.zip holds no txt, md or jsonl files"),
        ("a.txt", b"", "no document in .*: 0 documents; left out: 1 blank line or empty file; add text"),
        (os.fsdecode(b"caf\xe9.txt"), b"a", "the name of the file .* is not UTF-8; rename it"),
        ("a.pdf", b"", r"holds no file that can be read \(only 1 .pdf\); lingua reads txt, md"),
    ],
)
def test_what_cannot_be_read_is_a_sentence_and_may_be_mended(
    tmp_path: Path, name: str, make: bytes | Callable[[Path], None], message: str
) -> None:
    (source := tmp_path / "source").mkdir()
    if isinstance(make, bytes):
        (source / name).write_bytes(make)
    else:
        make(source / name)
    job = job_of(source, tmp_path)
    with pytest.raises((RunError, ValueError), match=message):
        prepare(job)
    (source / name).unlink()
    (source / "b.txt").write_text("b")
    assert prepare(job)["documents"] == 1


def test_all_files_that_cannot_be_read_are_named_at_once(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (source / "good.txt").write_text("a")
    (source / "good.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    for n in range(9):
        (source / f"b{n}.txt").write_bytes(b"\xff")
    for name in ("c.gz", "c.jsonl.gz", "c.zip"):
        (source / name).write_bytes(b"no")  # c.gz is of no kind that is read
    for n_workers in (1, 2):
        with pytest.raises(RunError) as refused:
            prepare(replace(job_of(source, tmp_path), n_workers=n_workers))
        first, *named, last = str(refused.value).split("\n  ")
        assert (first, len(named), last) == ("11 files cannot be read:", 10, "and 1 more")
        assert [Path(line.split(" ")[0]).name for line in named] == [f"b{n}.txt" for n in range(9)] + ["c.jsonl.gz"]
    for name in ("x.txt", "y.md"):
        (source / name).symlink_to("nowhere")
    with pytest.raises(RunError, match=r"2 files cannot be read:\n  .*x.txt cannot be opened; .*\n  .*y.md cannot be"):
        prepare(job_of(source, tmp_path))


def test_a_run_told_to_read_plain_text_names_the_command_that_prepares_it(tmp_path: Path) -> None:
    (folder := tmp_path / "my texts").mkdir()
    (folder / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"`lingua data prepare '.*my texts' NAME` makes documents of its .txt files"):
        find_files(folder)


def test_a_zip_reads_as_its_files_do(tmp_path: Path) -> None:
    source = a_folder(tmp_path / "t")
    assert json.loads(b"".join(blocks(source / "z.zip")).splitlines()[-1]) == {"id": "in/g.txt", "text": "g"}
    assert find_inputs(source / "z.zip") == ["z.zip"]
