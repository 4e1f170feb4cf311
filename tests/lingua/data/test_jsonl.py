"""Lines of every kind, blocks of every size, and what is told about bad ones."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lingua.config.base import ConfigError
from lingua.data.blocked_source import BadLines, DataError, TextFields
from lingua.data.jsonl import JsonlSource

BAD = {
    b"": "blank",
    b" \t ": "blank",
    b"\r": "blank",
    b"{": "not_json",
    b'{"text": "a"} {"text": "b"}': "not_json",
    b'{"text": "\xff"}': "not_json",
    b'{"text": "\\ud800"}': "not_json",
    b"[1]": "no_text",
    b"3": "no_text",
    b'{"body": "a"}': "no_text",
    b'{"text": null}': "no_text",
    b'{"text": ["a"]}': "no_text",
    b'{"text": ""}': "empty",
}
GOOD = {
    b'{"text": "a"}': "a",
    b'{"content": "b"}': "b",
    b'{"text": "a", "content": "b"}': "a",
    b'  {"id": 3, "text": "\\u00e9\\n"}  ': "é\n",
    '{"text": "日本語"}'.encode(): "日本語",
    b'{"text": "\\ud83d\\ude00"}': "😀",
    b'{"text": "' + b"long " * 120 + b'"}': "long " * 120,
    b'{"text": "crlf"}\r': "crlf",
}


def write(folder: Path, data: bytes, name: str = "x.chunk.00.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*BAD, *GOOD]), min_size=1, max_size=40),
    st.booleans(),
    st.booleans(),
    st.integers(1, 400),
)
def test_odd_files(tmp_path: Path, lines: list[bytes], bom: bool, last_newline: bool, block: int) -> None:
    data = b"\xef\xbb\xbf" * bom + b"\n".join(lines) + b"\n" * last_newline
    if not data:
        return
    source = JsonlSource("x", write(tmp_path / "x", data), 1, bad=BadLines())
    source.cut_bytes(block)
    assert [document.text for document in source.documents()] == [GOOD[line] for line in lines if line in GOOD]
    expected = [BAD[line] for line in lines if line in BAD]
    if lines[-1] == b"" and not last_newline and not (bom and len(lines) == 1):
        expected.pop()  # nothing behind the last newline is no line
    assert source.bad.kinds.total() == len(expected)
    assert {kind: expected.count(kind) for kind in expected} == dict(source.bad.kinds)
    source.close()


def test_document_tells_where_it_lies(tmp_path: Path) -> None:
    data = b'\n{"text": "a"}\r\n{"text": "b"}'
    source = JsonlSource("x", write(tmp_path / "x", data), 1)
    found = list(source.documents())
    assert [(d.text, d.start, d.end) for d in found] == [("a", 1, 16), ("b", 16, 29)]
    assert all(json.loads(data[d.start : d.end])["text"] == d.text for d in found)


def test_line_far_longer_than_buffers_and_blocks(tmp_path: Path) -> None:
    long = "x" * 30_000_000
    lines = [json.dumps({"text": text}) for text in ("a", long, "b")]
    source = JsonlSource("x", write(tmp_path / "x", "\n".join(lines).encode()), 64)
    assert [len(d.text) for d in source.documents()] == [1, len(long), 1]
    assert source.n_blocks > 500


def test_text_key(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", b'{"text": "a", "body": "b"}\n{"text": "a"}\n')
    source = JsonlSource("x", folder, 1, fields=TextFields("body"))
    assert [d.text for d in source.documents()] == ["b"]
    assert source.bad.kinds == {"no_text": 1}


def test_bad_lines_are_told_once_per_file_with_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "x", b'{"text": "a"}\n{\n{\n', "x.chunk.00.jsonl")
    write(tmp_path / "x", b"[]\n\n", "x.chunk.01.jsonl")
    source = JsonlSource("x", tmp_path / "x", 1)
    with caplog.at_level(logging.WARNING):
        list(source.documents())
    assert len(caplog.messages) == 2
    assert "x.chunk.00.jsonl, byte 14: no JSON" in caplog.messages[0]
    assert "x.chunk.01.jsonl, byte 0: no JSON object with a string in 'text' or 'content'" in caplog.messages[1]
    assert source.bad.counts() == {"lines": 5, "not_json": 2, "no_text": 1, "blank": 1}


def test_on_bad_line_error_stops_with_place_and_remedy(tmp_path: Path) -> None:
    source = JsonlSource("x", write(tmp_path / "x", b'{"text": "a"}\n\n'), 1, bad=BadLines("error"))
    with pytest.raises(DataError, match=r"x\.chunk\.00\.jsonl, byte 14: a blank line; .*on_bad_line: skip"):
        list(source.documents())


def test_too_many_bad_lines_stop_the_run(tmp_path: Path) -> None:
    data = (b'{"text": "a"}\n' * 49 + b"{\n") * 30
    assert list(JsonlSource("x", write(tmp_path / "x", data), 1, bad=BadLines("skip", 0.02)).documents())
    with pytest.raises(DataError, match=r"20 of 1000 lines are bad.*max_bad_fraction = 0.019.*byte \d+"):
        list(JsonlSource("x", tmp_path / "x", 1, bad=BadLines("skip", 0.019)).documents())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["b.chunk.01.jsonl", "b.chunk.00.jsonl", "b.val.jsonl"], ["b.chunk.00.jsonl", "b.chunk.01.jsonl"]),
        (["a.jsonl", "b.jsonl", "b.val.jsonl", "notes.txt"], ["a.jsonl", "b.jsonl"]),
        (["a.chunk.00.jsonl", "a.chunk.00.jsonl.zst"], ["a.chunk.00.jsonl"]),
        (["a.chunk.00.jsonl", "a.chunk.01.jsonl.zst"], "a.chunk.01.jsonl.zst: a compressed file.*`zstd -d "),
        (["a.jsonl.gz"], "`gunzip -k "),
        (["a.val.jsonl", "a.parquet"], "no [*].jsonl file"),
    ],
)
def test_which_files_of_a_folder_are_read(tmp_path: Path, names: list[str], found: list[str] | str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    if isinstance(found, list):
        assert [file.name for file in JsonlSource.find_files(tmp_path)] == found
    else:
        with pytest.raises(ConfigError, match=found):
            JsonlSource.find_files(tmp_path)


def test_a_file_may_be_a_source_and_a_missing_one_is_refused(hostile_dir: Path) -> None:
    write(hostile_dir, b'{"text": "a"}', "any.json")
    assert [d.text for d in JsonlSource("x", hostile_dir / "any.json", 1).documents()] == ["a"]
    with pytest.raises(ConfigError, match="no such file or folder"):
        JsonlSource("x", hostile_dir / "nothing", 1)
    (hostile_dir / "packed.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ConfigError, match="compressed"):
        JsonlSource("x", hostile_dir / "packed.jsonl.gz", 1)


def test_sources_without_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all files of source 'x' are empty"):
        JsonlSource("x", write(tmp_path / "x", b""), 1)
    source = JsonlSource("x", write(tmp_path / "x", b'\n\n{"text": ""}\n'), 1)
    with pytest.raises(DataError, match="source 'x' has no document with 'text' or 'content' in 3 lines"):
        source.check()
    write(tmp_path / "x", b'{"text": "a"}', "x.chunk.01.jsonl")
    source = JsonlSource("x", tmp_path / "x", 1)
    source.check()
    assert source.bad.counts() == {"lines": 0}


def test_files_that_shrink_while_being_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", b'{"text": "a"}\n' * 10)
    source = JsonlSource("x", folder, 1)
    write(folder, b"")
    with pytest.raises(DataError, match="had 140 bytes before; it must not change"):
        list(source.documents())


def test_fingerprint_is_of_names_sizes_and_ends(tmp_path: Path) -> None:
    line = b'{"text": "a"}\n'

    def of(folder: str, data: bytes, name: str = "x.chunk.00.jsonl") -> str:
        return JsonlSource("x", write(tmp_path / folder, data, name), 1).fingerprint

    first = of("a", line * 5)
    assert first == of("b", line * 5)
    other_field = JsonlSource("x", tmp_path / "a", 1, fields=TextFields("body")).fingerprint
    assert other_field != first
    assert len({first, of("c", line * 6), of("d", b" " + line * 5), of("e", line * 5, "y.chunk.00.jsonl")}) == 4


def test_more_files_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.data.jsonl._OPEN_FILES", 3)
    for i in range(8):
        write(tmp_path / "x", json.dumps({"text": str(i)}).encode(), f"x.chunk.{i}.jsonl")
    source = JsonlSource("x", tmp_path / "x", 1)
    for _ in range(2):
        assert [d.text for d in source.documents()] == [str(i) for i in range(8)]
    assert source.n_open == 3
    source.close()
    assert source.n_open == 0
