"""`mmap_jsonl` and `tokens`: orders and states, indexes and token files that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from itertools import islice, product
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs, TokenizerArgs
from lingua.data import jsonl_indexed as index_file
from lingua.data import token_files as token_file
from lingua.data.blocked_source import BlockedSource, DataError, TextFields, whole_file
from lingua.data.jsonl_indexed import IndexedSource, find_index, index_paths, map_index, read_header, write_index
from lingua.data.loader import build_loader
from lingua.data.sources import FORMATS, estimate_tokens, source_class
from lingua.data.token_files import TokenSource, check_hash, is_made, read_facts, tokenize_file
from lingua.tokenizer import ByteTokenizer
from tests.corpora import (
    FailingTokenizer,
    G,
    assert_loader_resumes,
    data_args,
    run_steps,
    two_sources,
    write_dataset,
    write_parquet,
    write_source,
    write_tokens,
)

TRAINERS = ("pbin", "megatron", "npy", "ds")
LIKE_PBIN = ("megatron", "npy", "ds", "arrow")  # blocks of tokens or rows as others have them


def in_format(root: Path, form: str, **changed: Any) -> DataArgs:
    """The two sources; in other formats they are made beside the jsonl."""
    folder = root
    if form == "arrow":
        folder = root / "saved"
        for name in ("big", "small"):
            paths = sorted((root / name).glob("*.jsonl"))
            texts = [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]
            write_dataset(folder / name, {"text": texts}, min(2, len(texts)))
    if form in TRAINERS:
        folder = root / "trainer"
        for path in root.glob("*/*.jsonl"):
            texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
            write_tokens(form, folder / path.parent.name / path.stem, [[*text.encode(), 257] for text in texts])
    if form == "parquet":
        folder = root / "rows"
        for path in root.glob("*/*.jsonl"):
            texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
            write_parquet(folder / path.parent.name / f"{path.stem}.parquet", {"text": texts})
    if form == "tokens":
        folder = root / "made"
        for path in [*root.glob("*/*.jsonl")]:
            tokenize_file(path, token_file.token_file(path, folder / path.parent.name), ByteTokenizer())
    sources = [SourceArgs(path=name, weight=w, format=form) for name, w in (("big", 3.0), ("small", 1.0))]  # pyright: ignore[reportArgumentType]
    return data_args(folder, sources=sources, **changed)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.soak if form in LIKE_PBIN else ()) for form in FORMATS]
)
def test_one_order_over_ranks_workers_and_restarts(tmp_path: Path, form: str) -> None:
    two_sources(tmp_path)
    expected, last = run_steps(in_format(tmp_path, form), 8)
    assert run_steps(in_format(tmp_path, form, batch_size=3), 8, 4) == (expected, last)
    parallel = in_format(tmp_path, form, load_async=True, num_workers=3, prefetch_size=2)
    first, state = run_steps(in_format(tmp_path, form, batch_size=1), 3, 8)
    second, state = run_steps(parallel, 5, 1, state)
    assert (first | second, state) == (expected, last)


@pytest.mark.parametrize(
    ("form", "changed", "n"),
    [
        ("jsonl", {"n_views": 3}, 24),
        ("jsonl", {"n_views": 1, "shuffle_window": 5, "skip_rows": [[4, 6], [30, 40]]}, 16),
        ("jsonl", {"load_async": True, "prefetch_size": 1}, 2),
        ("mmap_jsonl", {}, 16),
        ("tokens", {"shuffle_window": 3}, 16),
        ("parquet", {}, 16),
        ("parquet", {"shuffle_window": 3}, 16),
        *((form, {}, 8) for form in ("arrow", *TRAINERS)),
    ],
)
def test_resumes_everywhere(
    tmp_path: Path, form: str, changed: dict[str, Any], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingua.data.parquet._BATCH_ROWS", 2)  # several in a row group
    two_sources(tmp_path)
    assert_loader_resumes(in_format(tmp_path, form, lanes=6, doc_mask=True, **changed), n, tail=6)


def test_every_format_of_the_config_has_a_class() -> None:
    assert list(FORMATS) == list(get_args(SourceArgs.model_fields["format"].annotation))
    assert all(issubclass(source_class(name), BlockedSource) for name in FORMATS)


# -- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("ends", [{}, {"add_bos": False, "add_eos": False}])
def test_tokens_give_rows_and_states_of_their_jsonl(tmp_path: Path, ends: dict[str, bool]) -> None:
    two_sources(tmp_path)
    long = ["é\n" * 300_000, "x" * 600_000]  # of several pieces
    folder = write_source(tmp_path, "big", [*long, "short", "also"] * 2, n_files=1)
    with (folder / "big.chunk.00.jsonl").open("ab") as file:
        file.write(b'\n{"text": ""}\n{"text": "\\ud800"}\n[]\n{"text": "last"}')
    plain = data_args(tmp_path, max_bad_fraction=1.0, seq_len=4096, **ends)
    made = in_format(tmp_path, "tokens", seq_len=4096, **ends)
    expected, last = run_steps(plain, 12)
    assert run_steps(made, 12) == (expected, last)
    first, state = run_steps(plain, 5)  # and a run may change between the two
    second, state = run_steps(made, 4, 3, state)
    third, state = run_steps(plain, 3, 2, state)
    assert (first | second | third, state) == (expected, last)


def test_what_the_tokenizer_fails_on_is_left_out_alike(tmp_path: Path) -> None:
    texts = ["a", "b!", "c", "x\n" * 130_000 + "!" + "y\n" * 130_000]
    write_source(tmp_path, "s", texts, n_files=1)
    path = tmp_path / "s" / "s.chunk.00.jsonl"
    facts = tokenize_file(path, tmp_path / "t" / "s.chunk.00.jsonl.tokens", FailingTokenizer())
    assert facts["bad"] == {"tokenizer": 2}
    found = []
    for source, root in (({"path": "s"}, tmp_path), ({"path": "t", "name": "s", "format": "tokens"}, tmp_path)):
        args = data_args(root, sources=[SourceArgs(**source)], lanes=2, seq_len=1000, max_bad_fraction=1.0)  # pyright: ignore[reportArgumentType]
        with build_loader(args, rows_per_step=2, tokenizer=FailingTokenizer()) as loader:
            found.append([next(loader).views.tolist() for _ in range(1200)])
            found.append(loader.state_dict())
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_a_source_on_which_the_tokenizer_always_fails_ends_the_run(tmp_path: Path) -> None:
    write_source(tmp_path, "s", ["a!", "b!"])
    args = data_args(tmp_path, sources={"s": 1.0}, max_bad_fraction=1.0)
    with (
        build_loader(args, rows_per_step=2, tokenizer=FailingTokenizer()) as loader,
        pytest.raises(DataError, match=r"source 's': 1000 documents in a row, .* give no token"),
    ):
        next(loader)


def test_token_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    two_sources(tmp_path)
    args = in_format(tmp_path, "tokens")
    path = tmp_path / "made" / "big" / "big.chunk.00.jsonl.tokens"
    (tmp_path / "ranks").write_text("YQ== 0\n")
    other = TokenizerArgs(name="tiktoken", path=str(tmp_path / "ranks"), split="cl100k")
    with pytest.raises(ConfigError, match=r"made by tokenizer bytes, and data.tokenizer is tiktoken:[0-9a-f]{16}; set"):
        build_loader(args.model_copy(update={"tokenizer": other}), rows_per_step=G)
    with pytest.raises(ConfigError, match="made from field 'text or content'"):
        TokenSource("big", path.parent, 1, tokenizer="bytes", fields=TextFields("body"))
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], "its header says"),
        (b"x" + whole[1:], "not a token file"),
        (whole.replace(b'"version":1', b'"version":9'), "of version 9"),
        (whole[:100] + b"\0" * 3996, "damaged header"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            build_loader(args, rows_per_step=G)
    path.write_bytes(whole)
    assert check_hash(path, read_facts(path))
    path.write_bytes(whole[:5000] + b"\0" + whole[5001:])
    assert not check_hash(path, read_facts(path))
    with pytest.raises(DataError, match=r"damaged \(other hash\); copy it again or tokenize again"):
        build_loader(args, rows_per_step=G)
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match="make them with `lingua data tokenize`"):
        build_loader(data_args(tmp_path, sources=[SourceArgs(path="big", format="tokens")]), rows_per_step=G)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("dtype", "<u8"),
        ("dtype", "O"),
        ("tokens", -1),
        ("tokens", 1 << 80),
        ("pieces", 1.5),
        ("file", None),
        ("bytes", -1),
    ],
)
def test_a_wild_header_of_a_token_file_is_one_sentence(tmp_path: Path, fact: str, value: Any) -> None:
    path = write_source(tmp_path, "s", ["abc", "d"], n_files=1) / "s.chunk.00.jsonl"
    target = tmp_path / "t" / "s.jsonl.tokens"
    facts = tokenize_file(path, target, ByteTokenizer()) | {fact: value}
    head = json.dumps(facts).encode()
    target.write_bytes((b"LINGUATK" + head).ljust(4096, b"\n") + target.read_bytes()[4096:])
    with pytest.raises(DataError, match=r"s\.jsonl\.tokens: (damaged header|has \d+ bytes, its header says)"):
        TokenSource("s", target.parent, 1)


@pytest.mark.parametrize(
    ("column", "value"),
    [*product((0, 1), (-1, 0, 7, 50_000)), *product(range(4), (1 << 62, -(1 << 63)))],  # others could be right
)
def test_a_wild_table_of_a_large_token_file_ends_with_a_sentence(
    tmp_path: Path, column: int, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingua.data.token_files.HASHED_BYTES", 0)
    path = write_source(tmp_path, "s", ["abc", "x\n" * 200_000, "last"], n_files=1) / "s.chunk.00.jsonl"
    target = tmp_path / "t" / "s.jsonl.tokens"
    n = tokenize_file(path, target, ByteTokenizer())["pieces"]
    assert n == 4
    whole = target.read_bytes()
    for row in range(1, n):
        at = len(whole) - 8 * (4 * n + 1) + 8 * (column * n + row)
        if int.from_bytes(whole[at : at + 8], "little", signed=True) == value:
            continue
        target.write_bytes(whole[:at] + value.to_bytes(8, "little", signed=True) + whole[at + 8 :])
        args = data_args(tmp_path, sources=[SourceArgs(path="t", format="tokens")], lanes=1, seq_len=4096, batch_size=1)
        found = TokenSource("t", target.parent, 1)
        assert len(list(found.wrong_bytes())) == 1
        with pytest.raises(DataError, match=r"s\.jsonl\.tokens: (damaged \(row \d|no piece begins)"):
            list(islice(build_loader(args, rows_per_step=1), 120))  # more than an epoch


def test_ids_that_the_tokenizer_does_not_have_end_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingua.data.token_files.HASHED_BYTES", 0)
    path = write_source(tmp_path, "s", ["abc"], n_files=1) / "s.chunk.00.jsonl"
    target = tmp_path / "t" / "s.jsonl.tokens"
    tokenize_file(path, target, ByteTokenizer())
    target.write_bytes(target.read_bytes().replace(b"a\0b\0", b"a\0\xff\xff"))
    args = data_args(tmp_path, sources=[SourceArgs(path="t", format="tokens")], lanes=2)
    with (
        build_loader(args, rows_per_step=2) as loader,
        pytest.raises(DataError, match=r"s\.jsonl\.tokens: damaged \(an unknown token\); tokenize again"),
    ):
        next(loader)


def test_tokenizing_again_only_what_changed(tmp_path: Path) -> None:
    path = write_source(tmp_path, "s", ["abc", "d"], n_files=1) / "s.chunk.00.jsonl"
    target = tmp_path / "t" / "s.tokens"
    assert not is_made(path, target, ByteTokenizer(), None)
    facts = tokenize_file(path, target, ByteTokenizer())
    assert (facts["documents"], facts["tokens"], facts["dtype"]) == (2, 4, "<u2")
    assert is_made(path, target, ByteTokenizer(), None)
    assert not is_made(path, target, ByteTokenizer(), "body")
    args = DataArgs(sources=[SourceArgs(path=str(target.parent), format="tokens")])
    assert estimate_tokens(args) == 4 + 2 * 2
    path.write_text('{"text": "abd"}\n')
    assert not is_made(path, target, ByteTokenizer(), None)
    assert [file.name for file in target.parent.iterdir()] == ["s.tokens"]


# -- the index -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([b"", b"\r", b"a", b"bc" * 40]), min_size=1, max_size=30), st.booleans(), st.integers(1, 9)
)
def test_an_index_holds_the_begin_of_every_line(tmp_path: Path, lines: list[bytes], newline: bool, scan: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * newline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_file, "_SCAN_BYTES", scan)
        n_lines = write_index(path, tmp_path / "x.jsonl.idx")
    data = path.read_bytes()
    starts = [0, *(at + 1 for at, value in enumerate(data) if value == 10)]
    starts = [at for at in starts if at < len(data)]
    assert n_lines == len(starts)
    if data:
        assert map_index(path).tolist() == [*starts, len(data)]


def test_each_line_once_per_epoch_in_an_order_of_the_seed(tmp_path: Path) -> None:
    texts = [f"({i:02})" for i in range(40)]
    write_source(tmp_path, "s", texts, n_files=3)
    orders = []
    for seed in (1, 2):
        sources = [SourceArgs(path="s", format="mmap_jsonl")]
        args = data_args(tmp_path, sources=sources, lanes=5, batch_size=1, seq_len=6, n_views=1, seed=seed)
        with build_loader(args, rows_per_step=5) as loader:
            orders.append(["".join(map(chr, next(loader).views[0, 0, 1:-1].tolist())) for _ in range(80)])
    for order in orders:
        assert sorted(order[:40]) == sorted(order[40:]) == texts
        assert order[:40] != order[40:]
    assert orders[0] != orders[1]


def test_an_index_that_does_not_belong_to_the_file_is_made_again(tmp_path: Path) -> None:
    path = write_source(tmp_path, "s", ["a", "b", "c"], n_files=1) / "s.chunk.00.jsonl"
    assert find_index(path) == index_paths(path)[0] == path.with_name("s.chunk.00.jsonl.idx")
    index = find_index(path)
    whole = index.read_bytes()
    path.write_text(path.read_text().replace("a", "A"))
    for damaged, why in (
        (whole, "other first or last bytes"),
        (whole[:-8], "has 88 bytes"),
        (b"?" + whole[1:], "no index"),
        (whole[:8] + b"\7" + whole[9:], "version 7"),
        (whole[:10], "no index"),
    ):
        index.write_bytes(damaged)
        assert why in str(read_header(index, path))
        assert map_index(path).tolist() == [0, 14, 28, 42]
        assert not isinstance(read_header(index, path), str)
    path.write_text(path.read_text() + "\n")
    assert "42 bytes, this one has 43" in str(read_header(index, path))
    index.write_bytes(whole[:-8] + bytes(8))
    header = read_header(index, path)
    assert isinstance(header, str)


def test_a_damaged_index_with_a_valid_header_is_made_again_and_a_large_one_is_found_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_source(tmp_path, "s", ["a", "b", "c"], n_files=1) / "s.chunk.00.jsonl"
    index = find_index(path)
    whole = index.read_bytes()
    for value in (3, 13, 28, 29, 41, 42, 1 << 62, -1, -(1 << 63)):
        damaged = whole[:72] + value.to_bytes(8, "little", signed=True) + whole[80:]
        index.write_bytes(damaged)
        assert map_index(path).tolist() == [0, 14, 28, 42]
        index.write_bytes(damaged)
        with monkeypatch.context() as patch:
            patch.setattr(index_file, "HASHED_BYTES", 0)
            source = IndexedSource("s", path.parent, 1)
        assert [problem.partition(": ")[0] for problem in source.wrong_bytes()] == [str(index)]
        with pytest.raises(
            DataError, match=r"no line is at bytes -?\d+ to -?\d+, where .*\.idx says so; the index is dam"
        ):
            list(source.documents())
        source.close()


def test_an_index_goes_into_the_cache_where_the_folder_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINGUA_CACHE", str(tmp_path / "cache"))
    path = write_source(tmp_path, "s", ["a", "b"], n_files=1) / "s.chunk.00.jsonl"
    beside, cached = index_paths(path)
    real = write_index

    def read_only(source: Path, target: Path) -> int:
        if target == beside:  # root may write everywhere, so the folder's mode would not stop it
            raise PermissionError(13, "read-only")
        return real(source, target)

    monkeypatch.setattr(index_file, "write_index", read_only)
    assert find_index(path) == cached
    made = os.stat(cached).st_mtime_ns
    assert find_index(path) == cached
    assert os.stat(cached).st_mtime_ns == made
    moved = tmp_path / "elsewhere"
    shutil.move(path.parent, moved)
    assert find_index(moved / path.name) != cached


def test_a_changed_format_is_another_order(tmp_path: Path) -> None:
    two_sources(tmp_path)
    _, state = run_steps(data_args(tmp_path), 1)
    with pytest.raises(ConfigError, match="big: fingerprint was"):
        build_loader(in_format(tmp_path, "mmap_jsonl"), rows_per_step=G, state=state)


def test_bad_lines_and_long_files_through_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "s.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}\n{\n{"text": "c"}')
    source = IndexedSource("s", folder, 1)
    reader = source.reader()
    found = [reader.document(block, -1) for block in range(source.n_blocks)]
    assert [document.text if document else None for document in found] == ["a", None, "b", None, "c"]
    assert source.bad.kinds == {"blank": 1, "not_json": 1}
    assert reader.document(2, found[2].end) is None  # pyright: ignore[reportOptionalMemberAccess]
    assert reader.document(2, found[2].start) == found[2]  # pyright: ignore[reportOptionalMemberAccess]
    source.close()


def test_a_file_is_made_whole_and_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".new.tmp-{socket.gethostname()}-{dead.pid}").write_bytes(b"half")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "new") as out:
        out.write(bytes(1 // 0))
    assert list(tmp_path.iterdir()) == []
    with whole_file(tmp_path / "new") as out:
        out.write(b"whole")
        assert not (tmp_path / "new").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    assert (tmp_path / "new").read_bytes() == b"whole"
