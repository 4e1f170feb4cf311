"""Order of blocks and choice of sources: pure functions, each document once, restored anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingua.config.keys.data import DataArgs
from lingua.data.blocked_source import OpenedData, block_bytes
from lingua.data.jsonl import JsonlSource
from lingua.data.mix import DocumentStream, SourceChoice, draw, permuted
from tests.corpora import documents, write_source


def opened(sources: list[JsonlSource], seed: int, n_lanes: int = 1) -> OpenedData:
    return OpenedData(DataArgs(seed=seed), n_lanes, sources, sources[0].bad)


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_holds_each_index_once(n: int, key: int) -> None:
    assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))


def test_permutations_of_small_sources_move_every_block_to_every_place() -> None:
    for n in (2, 3, 5):
        places = Counter((i, permuted(i, n, draw(key))) for key in range(600) for i in range(n))
        assert len(places) == n * n
        assert all(abs(count - 600 / n) < 120 for count in places.values()), places


def test_draws_do_not_depend_on_machine_or_version() -> None:
    # Runs in flight depend on these numbers.
    assert [draw(1, 2, 3), draw(0), draw(-1)] == [
        draw(1, 2, 3 + 2**64),
        0xC77B3ABB6F87ACD9,
        draw(2**64 - 1),
    ]
    assert [permuted(i, 5, 7) for i in range(5)] == [1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("source_bytes", "lanes", "expected"),
    [(0, 64, 256), (1 << 20, 64, 1024), (1 << 30, 64, 1 << 20), (1 << 40, 64, 4 << 20), (1 << 20, 1, 1 << 16)],
)
def test_block_size_follows_source_size_and_lanes(source_bytes: int, lanes: int, expected: int) -> None:
    assert block_bytes(source_bytes, lanes) == expected


def test_sources_are_chosen_by_weight() -> None:
    choice = SourceChoice([1.0, 3.0, 0.0, 4.0], seed=1)
    counts = Counter(choice.pick(lane, i) for lane in range(4) for i in range(2000))
    assert counts[2] == 0
    assert [round(counts[i] / 8000, 1) for i in (0, 1, 3)] == [0.1, 0.4, 0.5]


@pytest.mark.parametrize("n_lanes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("n_documents", [1, 3, 60])
def test_each_document_once_per_epoch_on_one_lane(tmp_path: Path, n_lanes: int, n_documents: int) -> None:
    write_source(tmp_path, "s", documents("d", n_documents), n_files=2)
    source = JsonlSource("s", tmp_path / "s", n_lanes)
    epochs = max(3, n_lanes // source.n_blocks)
    read: list[Counter[str]] = [Counter() for _ in range(epochs)]
    for lane in range(n_lanes):
        stream = DocumentStream(lane, opened([source], 5, n_lanes))
        while (text := stream.next().text) and (epoch := stream.positions[0][0] // source.n_blocks) < epochs:
            read[epoch][text] += 1
    expected = Counter(documents("d", n_documents))
    assert all(epoch == expected for epoch in read)


def test_epochs_have_different_orders(tmp_path: Path) -> None:
    write_source(tmp_path, "s", documents("d", 60), n_files=2)
    stream = DocumentStream(0, opened([JsonlSource("s", tmp_path / "s", 1)], 5))
    first, second = ([stream.next().text for _ in range(60)] for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second)
