"""The shuffle: one order per seed and input, whatever the memory; every good line once."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingua.data.prepare import external_sort
from lingua.data.prepare.external_sort import (
    FIXED_BYTES,
    Counts,
    SortedRun,
    keys_of,
    load_runs,
    map_file,
    n_held_out,
    plan_outputs,
    sort_file,
    write_output,
)
from lingua.files import RunError

GOLDEN_KEYS = ["0xa1d2d4874ed78f0e", "0x7db12ed218181799", "0x15cd98e0c41ddb08"]


def lines_of(n: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [orjson.dumps({"n": n, "text": "x" * rng.choice([1, 30, 400, 5000])}) for n in range(n)]


def sorted_runs(
    inputs: list[bytes], folder: Path, memory_bytes: int, block: int = 777
) -> tuple[list[SortedRun], Counts]:
    folder.mkdir()
    for number, data in enumerate(inputs):
        pieces = (data[at : at + block] for at in range(0, len(data), block))
        sort_file(pieces, f"in{number}", number, folder, seed=7, memory_bytes=memory_bytes)
    return load_runs(folder, len(inputs))


def written(runs: list[SortedRun], folder: Path, memory_bytes: int, n_chunks: int = 3) -> dict[str, bytes]:
    folder.mkdir()
    outputs = plan_outputs(runs, "d", n_chunks=n_chunks, val_per_chunk=5)
    for output in outputs:
        write_output(runs, output, folder / output.name, memory_bytes=memory_bytes)
        data = (folder / output.name).read_bytes()
        assert (len(data), data.count(b"\n")) == (output.n_bytes, output.n_docs)
    return {output.name: (folder / output.name).read_bytes() for output in outputs}


def test_the_keys_are_pinned_and_spread_evenly() -> None:
    """Prepared data sets depend on these numbers: another order needs another ORDER_VERSION."""
    assert [hex(key) for key in keys_of(42, 0, np.arange(3, dtype=np.uint64)).tolist()] == GOLDEN_KEYS
    keys = np.concatenate([keys_of(*where, np.arange(5000, dtype=np.uint64)) for where in ((1, 0), (1, 1), (2, 0))])
    assert len(np.unique(keys)) == 15_000
    counts = np.bincount((keys >> np.uint64(60)).astype(int), minlength=16)
    assert np.abs(counts - 15_000 / 16).max() < 5 * (15_000 / 16) ** 0.5


def test_the_memory_changes_nothing(tmp_path: Path) -> None:
    lines = lines_of(600)
    inputs = [b"\n".join(lines[:200]), b"\n".join(lines[200:]) + b"\n"]
    results = []
    for number, memory_bytes in enumerate([0, FIXED_BYTES + 200_000, FIXED_BYTES + (8 << 20)]):
        runs, counts = sorted_runs(inputs, tmp_path / f"runs{number}", memory_bytes, block=777 + 5000 * number)
        assert counts.documents == 600
        results.append((len(runs), written(runs, tmp_path / f"out{number}", memory_bytes)))
    mapped: list[SortedRun] = []
    for number, data in enumerate(inputs):
        (tmp_path / f"in{number}").write_bytes(data)
        run, _ = map_file(tmp_path / f"in{number}", "in", number, 7)
        assert run
        mapped.append(run)
    results.append((len(mapped), written(mapped, tmp_path / "mapped", 0)))
    assert [n_runs for n_runs, _ in results] == sorted([n for n, _ in results], reverse=True)
    assert results[0][0] > 10
    assert all(files == results[0][1] for _, files in results)
    out = b"".join(results[0][1].values()).splitlines()
    assert Counter(out) == Counter(lines)
    assert out != lines
    sizes = [data.count(b"\n") for name, data in results[0][1].items() if "chunk" in name]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"text":"a"}', "documents"),
        (b'{"content":"a"}', "documents"),
        (b' {"text":"a"} ', "documents"),
        ('{"text":"ä\u2028"}'.encode(), "documents"),
        (b"", "blank"),
        (b" \t", "blank"),
        (b'{"text":"a"}{"text":"b"}', "not_json"),
        (b'{"text":"a', "not_json"),
        (b'{"text":"\xff"}', "not_json"),
        (b'["text"]', "not_json"),
        (b'{"title":"a"}', "no_text"),
        (b'{"text":null,"content":"a"}', "no_text"),
        (b'{"text":["a"]}', "no_text"),
        (b'{"text":""}', "empty"),
    ],
)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
def test_odd_lines(tmp_path: Path, line: bytes, kind: str, ending: bytes) -> None:
    good = b'{"text":"good"}'
    data = b"\xef\xbb\xbf" + good + b"\n" + line + ending
    if ending:
        data += good
    runs, counts = sorted_runs([data], tmp_path / "runs", 0)
    n_good = 1 + bool(ending) + (kind == "documents")
    n_blank = (kind == "blank") and bool(line or ending)
    assert (counts.documents, counts.blank) == (n_good, n_blank)
    if kind not in ("documents", "blank"):
        assert getattr(counts, kind) == 1
        assert counts.examples[0].startswith("in0:2: ")
    out = b"".join(written(runs, tmp_path / "out", 0, n_chunks=1).values()).splitlines()
    assert Counter(out) == Counter([good] * (1 + bool(ending)) + [line] * (kind == "documents"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([b'{"text":"a"}', b'{"text":"bb"}', b"", b"\r", b"{", b"7"])), st.integers(1, 40))
def test_blocks_may_be_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    runs, counts = sorted_runs([b"\n".join(lines)], folder / "runs", 0, block)
    assert counts.documents == sum(len(run.keys) for run in runs) == sum(b"text" in line for line in lines)
    (folder / "in").write_bytes(b"\n".join(lines))
    _, mapped = map_file(folder / "in", "in0", 0, 7)
    assert mapped == counts


def test_a_line_may_be_as_large_as_the_window_and_not_larger(tmp_path: Path) -> None:
    lines = [orjson.dumps({"text": "x" * (65_536 - 30 - n)}) for n in range(4)]
    runs, _ = sorted_runs([b"\n".join(lines)], tmp_path / "runs", 0)
    out = b"".join(written(runs, tmp_path / "out", 0).values()).splitlines()
    assert sorted(out) == sorted(lines)
    with pytest.raises(RunError, match=r"in0: a line of more than .* allow more \(MEMORY\)"):
        sorted_runs([b'{"text":"' + b"x" * 70_000 + b'"}'], tmp_path / "more", 0)


def test_memory_for_parsing_a_long_line_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of n bytes takes 6 n: itself, and what its JSON becomes."""
    monkeypatch.setattr(external_sort, "FREE_LINE_BYTES", 1000)
    monkeypatch.setattr(external_sort, "BATCH_BYTES", 500)
    long, longer = (orjson.dumps({"text": "x" * n}) for n in (9_000, 12_000))
    small = lines_of(600)
    runs, counts = sorted_runs([b"\n".join([*small, long, *small])], tmp_path / "runs", 0)
    assert counts.documents == 1201
    out = b"".join(written(runs, tmp_path / "out", 0).values()).splitlines()
    assert sorted(out) == sorted([*small, long, *small])
    with pytest.raises(RunError, match=r"in0: a line of more than .* allow more \(MEMORY\)") as error:
        sorted_runs([b"\n".join([*small, longer])], tmp_path / "more", 0)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # it may come from another process
    (tmp_path / "plain").write_bytes(longer)
    with pytest.raises(RunError, match=r"in0: a line of more than 9\.8 KiB"):
        map_file(tmp_path / "plain", "in0", 0, 7, spare_bytes=50_000)
    assert map_file(tmp_path / "plain", "in0", 0, 7, spare_bytes=70_000)[1].documents == 1


@pytest.mark.parametrize(
    ("n_docs", "n_chunks", "per_chunk", "expected"),
    [(0, 4, 10, 0), (1, 4, 10, 0), (2, 4, 10, 1), (99, 4, 10, 1), (1000, 4, 10, 10), (10**6, 4, 10, 40)],
)
def test_small_sets_are_not_emptied(n_docs: int, n_chunks: int, per_chunk: int, expected: int) -> None:
    assert n_held_out(n_docs, n_chunks, per_chunk) == expected


def test_no_chunk_is_empty(tmp_path: Path) -> None:
    runs, _ = sorted_runs([b"\n".join(lines_of(4))], tmp_path / "runs", 0)
    files = written(runs, tmp_path / "out", 0, n_chunks=32)
    assert sorted(files) == ["d.chunk.00.jsonl", "d.chunk.01.jsonl", "d.chunk.02.jsonl", "d.val.jsonl"]
    assert all(files.values())
    many = plan_outputs(
        sorted_runs([b"\n".join(lines_of(250))], tmp_path / "many", 0)[0], "d", n_chunks=101, val_per_chunk=1
    )
    assert [output.name for output in many[-2:]] == ["d.chunk.099.jsonl", "d.chunk.100.jsonl"]
