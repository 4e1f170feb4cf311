"""Token files of other trainers: real ones, all widths, files of another tokenizer, damaged ones."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs, TokenizerArgs
from lingua.data import token_formats
from lingua.data.audit import audit, rows_of_step
from lingua.data.blocked_source import DataError, TextFields
from lingua.data.inspect import find_document, inspect_path
from lingua.data.loader import build_loader
from lingua.data.sources import estimate_tokens, source_class
from lingua.data.token_formats import TokenFormat, pickled_pairs
from lingua.tokenizer import ByteTokenizer, build_tokenizer
from lingua.train.check import _unreadable_sources
from tests.corpora import assert_loader_resumes, data_args, run_steps, write_tokens

REAL = Path(__file__).parents[2] / "fixtures" / "token_files"
TEXTS = ["Ein kleiner Anfang.", "two\nlines", "é", "x" * 300, "last one"]
FILES = {
    "modalities.pbin": "pbin",
    "megatron_text_document.bin": "megatron",
    "megatron_text_sentence.bin": "megatron",
    "dolma.npy": "npy",
    "datatrove.ds": "ds",
}
FORMS = ("pbin", "megatron", "npy", "ds")
END = 257


def opened(path: Path, form: str, n_lanes: int = 1) -> TokenFormat:
    source = source_class(form)("s", path, n_lanes, vocabulary=ByteTokenizer())
    assert isinstance(source, TokenFormat)
    return source


def ids_of(source: TokenFormat) -> list[list[int]]:
    return [document.encoded.ids(0).tolist() for document in source.documents() if document.encoded]


def in_words(problem: Callable[[], Any]) -> str:
    with pytest.raises((DataError, ConfigError)) as found:
        problem()
    return str(found.value)


@pytest.mark.parametrize(("name", "form"), FILES.items())
def test_a_file_that_its_own_package_wrote_holds_the_documents(name: str, form: str) -> None:
    source = opened(REAL / name, form)
    assert ids_of(source) == [list(text.encode()) for text in TEXTS]
    assert source.bad.counts() == {"lines": 5}
    args = DataArgs(sources=[SourceArgs.model_validate({"path": str(REAL / name), "format": form})])
    assert estimate_tokens(args) == sum(len(text.encode()) + 2 for text in TEXTS)
    assert not list(_unreadable_sources(args))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [2, 4])
def test_both_widths_all_lanes_and_odd_documents(tmp_path: Path, form: str, width: int) -> None:
    texts = [f"{n} " * (n % 70) for n in range(300)]  # some are empty
    begin = [256] if form == "ds" else []
    path = write_tokens(form, tmp_path / "s", [[*begin, *text.encode(), END] for text in texts], width)
    kept = [list(text.encode()) for text in texts if text]
    for n_lanes in (1, 3):
        source = opened(path, form, n_lanes)
        assert ids_of(source) == kept
        assert source.bad.kinds == {"empty": 5}
    last = opened(path, form, 3)
    reader = last.reader()
    found = [reader.document(block, -1) for block in reversed(range(last.n_blocks))]
    assert found[0] == last.reader().document(last.n_blocks - 1, -1) != found[1]


def test_what_the_end_token_does_not_end_and_a_header_of_numpys(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.array([1, 2, END, 3], np.uint32))
    assert ids_of(opened(tmp_path, "npy")) == [[1, 2], [3]]
    path = write_tokens("megatron", tmp_path / "m", [[1, 2], [], [3], [4], [5]])
    assert ids_of(opened(path, "megatron")) == [[1, 2], [3], [4], [5]]  # no end tokens at all
    ds = write_tokens("ds", tmp_path / "d", [[1, END], [2, END]])
    ds.with_name("d.ds.index").unlink()
    assert ids_of(opened(ds, "ds")) == [[1], [2]]
    ds.with_name("d.ds.loss").write_bytes(bytes(4))
    assert "its .ds.loss files are not read" in (opened(ds, "ds").warning or "")


def test_a_long_document_is_read_in_pieces_that_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_formats, "PIECE_TOKENS", 30)
    monkeypatch.setattr(token_formats, "_WINDOW_TOKENS", 7)
    for form in FORMS:
        texts = ["a" * 29, "b" * 30, "c" * 31, "d" * 200, "e"]
        write_tokens(form, tmp_path / form / "s", [[*text.encode(), END] for text in texts])
        sources = [SourceArgs.model_validate({"path": form, "format": form})]
        args = data_args(tmp_path, sources=sources, lanes=1, seq_len=1, batch_size=1)
        with build_loader(args, rows_per_step=1) as loader:
            stream = [int(next(loader).views[0, 0, 0]) for _ in range(sum(len(text) + 2 for text in texts))]
        assert stream == [i for text in texts for i in (256, *text.encode(), END)]
        if form == "npy":
            assert_loader_resumes(data_args(tmp_path, sources=sources, lanes=4, seq_len=7, doc_mask=True), 6, tail=4)


def test_without_a_tokenizer_the_ids_are_rows(tmp_path: Path) -> None:
    write_tokens("megatron", tmp_path / "m" / "m", [[7, 8, 9]] * 40)
    sources = [SourceArgs.model_validate({"path": "m", "format": "megatron"})]
    none = TokenizerArgs(name="none", vocab_size=10)
    table, _ = run_steps(data_args(tmp_path, sources=sources, lanes=4, seq_len=2, tokenizer=none), 1, n_rows=4)
    assert list(table.values()) == [[7, 8, 9]] * 4
    write_tokens("npy", tmp_path / "n" / "n", [[7, 8, 9]])
    what = in_words(lambda: source_class("npy").check_tokenizer(tmp_path / "n", build_tokenizer(none)))
    assert "and data.tokenizer (none) has none; set data.tokenizer to the one that made the file" in what


@pytest.mark.parametrize("form", FORMS)
def test_another_tokenizer_is_found_at_check_and_at_the_start(tmp_path: Path, form: str) -> None:
    for name, documents, message in (
        ("size", [[1, 300, END]] * 9, "holds token 300, and data.tokenizer (bytes) has 258; set data.tokenizer to"),
        ("end", [[1, 2, n, 99] for n in range(9)], "with token 99, those of data.tokenizer with 257; set data.tok"),
    ):
        write_tokens(form, tmp_path / name / "s", documents)
        if form == "npy" and name == "end":
            message = "data.tokenizer ends documents with token 257, which is not among its first 36; set"
        args = data_args(tmp_path, sources=[SourceArgs.model_validate({"path": name, "format": form})])
        assert message in next(finding.text for finding in _unreadable_sources(args))
        assert message in in_words(lambda args=args: build_loader(args, rows_per_step=24))
    (tmp_path / "good").mkdir()
    write_tokens(form, tmp_path / "good" / "s", [[1, 2, 46], [46, 3, 46], [5, 46], [6, 46]])  # a full stop ends them
    if form != "npy":
        source_class(form).check_tokenizer(tmp_path / "good", ByteTokenizer())


def test_dolmas_facts_beside_a_file_tell_its_end_token(tmp_path: Path) -> None:
    path = write_tokens("npy", tmp_path / "s", [[1, END, 3, 99]])  # 257 is an ordinary token of the other tokenizer
    with gzip.open(path.with_name("s.csv.gz"), "wt") as facts:
        facts.write("0,4,id,src,1\n")
    what = in_words(lambda: source_class("npy").check_tokenizer(tmp_path, ByteTokenizer()))
    assert "its documents end with token 99, those of data.tokenizer with 257" in what


def test_a_token_that_the_tokenizer_does_not_have_ends_the_run_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_formats, "_SAMPLE_TOKENS", 4)
    path = write_tokens("megatron", tmp_path / "s" / "s", [[1] * 50_000 + [END], [2, END]], width=4)
    data = bytearray(path.read_bytes())
    data[20_000:20_004] = (-5).to_bytes(4, "little", signed=True)
    path.write_bytes(data)
    args = data_args(tmp_path, sources=[SourceArgs(path="s", format="megatron")], lanes=1, seq_len=16, batch_size=1)
    with build_loader(args, rows_per_step=1) as loader:
        assert "damaged (an unknown token); set data.tokenizer to the one that made the file, or copy it again" in (
            in_words(lambda: next(loader))
        )


@pytest.mark.parametrize("form", FORMS)
def test_audit_and_rows_know_their_places(tmp_path: Path, form: str) -> None:
    texts = [f"document {n}" for n in range(60)]
    path = write_tokens(form, tmp_path / "s" / "s", [[*text.encode(), END] for text in texts])
    args = data_args(tmp_path, sources=[SourceArgs.model_validate({"path": "s", "format": form})], lanes=4)
    _, first = run_steps(args, 2, n_rows=4)
    _, second = run_steps(args, 2, 2, first, n_rows=4)
    found = audit(args, 4, 4, {2: first, 4: second})
    assert (found.problems, found.tokens_checked, found.rows) == ([], True, 16)
    (number, parts), *_ = rows_of_step(args, 4, 4, {2: first}, 3)
    assert (number, parts[0].unit, parts[0].file) == (8, "token", str(path))
    begins = [sum(len(text) + 1 for text in texts[:n]) for n in range(60)]
    assert all(part.text in texts[begins.index(part.offset)] for part in parts)
    damaged = bytearray(path.read_bytes())
    for at in [at for at in range(len(damaged)) if damaged[at : at + 2] == b"o\0"]:
        damaged[at] = ord("0")
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="no checkpoint has the present sources"):
        audit(args, 4, 4, {4: second})  # its first bytes are others


# -- the pickled index ---------------------------------------------------------------------------------------------

_NUMBERS = st.integers(0, 300) | st.integers(0, 1 << 34) | st.integers(0, 1 << 46)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(_NUMBERS, _NUMBERS), max_size=30), st.integers(2, 5))
def test_a_pickled_list_of_pairs_is_read_without_loading_it(pairs: list[tuple[int, int]], protocol: int) -> None:
    distinct = [(int(str(a)), int(str(b))) for a, b in pairs]
    assert list(pickled_pairs(pickle.dumps(distinct, protocol))) == pairs


@pytest.mark.parametrize("n_short", range(12))
def test_a_long_pickled_list_has_several_marks_and_frames_that_begin_before_any_opcode(n_short: int) -> None:
    pairs = [(n, 5) for n in range(n_short)] + [(70_000 * n, 70_000 if n % 7 else 300) for n in range(1, 5600)]
    assert list(pickled_pairs(pickle.dumps(pairs))) == pairs


class _Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch trapped",)


@pytest.mark.parametrize(
    "index", [_Trap(), [(0, 2), _Trap()], [(0, 2, 3)], [[0, 2]], {"a": 1}, [("0", 2)], [(0, -2)], [(1, 1)], [(0, 4)]]
)
def test_any_other_index_is_refused_and_nothing_in_it_runs(
    tmp_path: Path, index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.pbin").write_bytes(struct.pack("<QIH", 2, 2, 7) + pickle.dumps(index))
    what = in_words(lambda: opened(tmp_path / "s.pbin", "pbin"))
    assert what.endswith("; copy it again, or fix data.sources")
    assert os.listdir() == ["s.pbin"]


# -- damaged -------------------------------------------------------------------------------------------------------


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    for form, file, change, message in (
        ("pbin", "s.pbin", lambda d: d[:11], "not a whole pbin file"),
        ("pbin", "s.pbin", lambda d: d[:8] + b"\3" + d[9:], "not a pbin file"),
        ("pbin", "s.pbin", lambda d: b"\xff" * 7 + b"\0" + d[8:], "not a pbin file|too few for what its header"),
        ("pbin", "s.pbin", lambda d: d[:-1], "its index is not a list of places of documents .byte"),
        ("megatron", "s.bin", lambda d: d[:-2], "has 10 bytes, and s.idx says otherwise"),
        ("megatron", "s.idx", lambda d: b"x" + d[1:], "not an index of Megatron's"),
        ("megatron", "s.idx", lambda d: d[:17] + b"\7" + d[18:], "of version 1 with tokens of type 7"),
        ("megatron", "s.idx", lambda d: d[:-8], "too few for what its header says"),
        ("megatron", "s.idx", lambda d: d[:-16] + b"\xff" * 8 + d[-8:], "its documents do not follow one another"),
        ("npy", "s.npy", lambda d: d[:-1], "has 11 bytes, no multiple of 2"),
        ("npy", "s.npy", lambda d: b"\x93NUMPY" + d, "not a whole array of numpy"),
        ("ds", "s.ds", lambda d: d[:-1], "has 11 bytes, and s.ds.index is of 6 tokens"),
        ("ds", "s.ds.index", lambda d: b"\xff" + d[1:], "and s.ds.index is of 6 tokens"),
    ):
        folder = tmp_path / form
        path = write_tokens(form, folder / "s", [[1, 2, END], [3, 4, END]])
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        with pytest.raises(DataError, match=rf"s\.\S+: .*({message})"):
            opened(path, form)
    (tmp_path / "megatron" / "s.idx").unlink()
    assert "s.idx is not beside it" in in_words(lambda: opened(tmp_path / "megatron" / "s.bin", "megatron"))
    for fields, message in ((TextFields("body"), "drop text_key"), (TextFields(loss_on="completion"), "not mark pro")):
        assert message in in_words(lambda fields=fields: source_class("ds").check_files(tmp_path / "ds", fields))
    (tmp_path / "ds" / "s.ds").write_bytes(b"")
    (tmp_path / "ds" / "s.ds.index").write_bytes(b"")
    assert "are empty" in in_words(lambda: opened(tmp_path / "ds", "ds"))


# -- looking at them -----------------------------------------------------------------------------------------------


def test_inspect_counts_and_decodes(tmp_path: Path) -> None:
    from lingua.console import Progress

    for name, form in FILES.items():
        facts = inspect_path(REAL / name, ByteTokenizer(), Progress(bar=False), TextFields())
        n = sum(len(text.encode()) for text in TEXTS)
        assert (facts["format"], facts["documents"], facts["tokens"]) == (form, 5, n)
        assert facts["empty_documents"] == 0
        assert find_document(REAL / name, 1, TextFields(), ByteTokenizer())["text"] == "two\nlines"
