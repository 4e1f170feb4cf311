"""One order of rows whatever the machine does: ranks, accumulation, restarts, workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs, TokenizerArgs, default_lanes
from lingua.data.blocked_source import DataError
from lingua.data.loader import Batch, build_loader, merge_states, rows_ahead
from tests.corpora import G, data_args, documents, run_steps, two_sources, write_source

GOLDEN = Path(__file__).parent.parent / "golden" / "order.json"
# -- the order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dp", "batch_size", "changed"),
    [
        (1, 24, {}),
        (2, 3, {}),
        (3, 4, {}),
        (4, 1, {}),
        (8, 3, {}),
        (2, 12, {"load_async": True, "prefetch_size": 1}),
        (1, 4, {"load_async": True, "num_workers": 3, "prefetch_size": 3}),
    ],
)
def test_rows_do_not_depend_on_ranks_accumulation_or_workers(
    tmp_path: Path, dp: int, batch_size: int, changed: dict[str, Any]
) -> None:
    two_sources(tmp_path)
    expected, state = run_steps(data_args(tmp_path), 8)
    args = data_args(tmp_path, batch_size=batch_size, **changed)
    assert run_steps(args, 8, dp) == (expected, state)


@pytest.mark.parametrize("changed", [{}, {"shuffle_window": 3, "skip_rows": [[30, 100], [150, 150], [9999, 9999]]}])
def test_changing_world_size_twice_in_mid_run(tmp_path: Path, changed: dict[str, Any]) -> None:
    two_sources(tmp_path)
    args = data_args(tmp_path, **changed, batch_size=1)
    expected, last = run_steps(args, 12)
    state, table = None, {}
    for dp, n_steps in ((4, 5), (3, 4), (8, 3)):
        part, state = run_steps(args, n_steps, dp, state)
        table |= part
    assert table == expected
    assert state == last


@pytest.mark.parametrize("window", [0, 3])
def test_rows_ahead_are_the_rows_that_the_loader_gives(tmp_path: Path, window: int) -> None:
    two_sources(tmp_path)
    args = data_args(tmp_path, lanes=5, batch_size=2, shuffle_window=window, skip_rows=[[3, 4], [11, 13], [40, 44]])
    with build_loader(args, rows_per_step=2, lanes=5) as loader:
        given = [row for _ in range(3) for row in next(loader).rows.tolist()]
        state = json.loads(json.dumps(loader.state_dict()))
        given += [row for _ in range(20) for row in next(loader).rows.tolist()]
    for begin in (6, 7, 20):
        assert list(rows_ahead(state, args.skip_rows, range(begin, 40))) == given[begin:40]


def test_the_golden_order(tmp_path: Path) -> None:
    """Runs in flight depend on this order: their checkpoints continue in it, to the token.

    When it must change, raise `loader.VERSION`, so that old states are refused, and delete the file to have it written.
    """
    two_sources(tmp_path)
    args = data_args(tmp_path, lanes=4, batch_size=1, shuffle_window=2)
    with build_loader(args, rows_per_step=4) as loader:
        rows = [next(loader).views[0, 0].tolist() for _ in range(20)]
        made = {"rows": rows, "state": loader.state_dict()}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
    assert json.loads(GOLDEN.read_text()) == made


def test_views_are_shifted_and_contiguous(tmp_path: Path) -> None:
    two_sources(tmp_path)
    with build_loader(data_args(tmp_path, n_views=3, doc_mask=True), rows_per_step=2) as loader:
        batch: Batch = next(loader)
    assert batch.views.shape == (3, 2, 16)
    assert batch.views.dtype == np.int32
    assert all(view.flags.c_contiguous for view in batch.views)
    np.testing.assert_array_equal(batch.views[0, :, 1:], batch.views[1, :, :-1])
    np.testing.assert_array_equal(batch.views[1, :, 1:], batch.views[2, :, :-1])
    assert batch.doc_ids is not None
    assert batch.doc_ids.shape == (2, 16)
    assert batch.rows.tolist() == [0, 1]


@pytest.mark.parametrize(("rows_per_step", "lanes"), [(1, 64), (24, 72), (64, 64), (100, 100), (63, 126)])
def test_default_lanes(rows_per_step: int, lanes: int) -> None:
    assert default_lanes(rows_per_step) == lanes


def test_order_of_sources_in_the_config_does_not_matter(tmp_path: Path) -> None:
    two_sources(tmp_path)
    expected = run_steps(data_args(tmp_path), 3)
    turned = data_args(tmp_path, sources={"unused": 0.0, "small": 1.0, "big": 3.0})
    assert run_steps(turned, 3) == expected
    listed = [SourceArgs(path="small"), SourceArgs(path="big", weight=3.0)]
    assert run_steps(data_args(tmp_path, sources=listed), 3) == expected


# -- state ---------------------------------------------------------------------------------------------------------


def test_data_may_move_and_late_states_cost_the_same(tmp_path: Path) -> None:
    two_sources(tmp_path / "here")
    _, state = run_steps(data_args(tmp_path / "here"), 2)
    (tmp_path / "here").rename(tmp_path / "there")
    for lane in state["lanes"].values():  # as if ten million rows had been read
        lane["rows"] += 10_000_000
        lane["tapes"]["big"] = [lane["tapes"]["big"][0] + 10**9 * state["K"], -1]
        lane["source"] = None
    with build_loader(data_args(tmp_path / "there"), rows_per_step=G, state=state) as loader:
        next(loader)
        assert loader.stats()["data/lines"] < 3 * state["K"]


def test_state_is_a_few_hundred_bytes_per_lane(tmp_path: Path) -> None:
    two_sources(tmp_path)
    _, state = run_steps(data_args(tmp_path), 2)
    assert len(json.dumps(state)) / state["K"] < 300


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seq_len": 32}, "seq_len was 16 and is 32 now"),
        ({"seed": 1}, "seed was 42 and is 1 now"),
        ({"lanes": 48}, "number of lanes K was 72 and is 48 now"),
        ({"add_eos": False}, "add_eos was True and is False now"),
        ({"shuffle_window": 2}, "shuffle_window was 0 and is 2 now"),
        (
            {"sources": {"big": 1.0, "small": 1.0}},
            r"big: weight was 3.0 and is 1.0 now\n.*accept_change=[0-9a-f]+",
        ),
        ({"sources": {"big": 3.0}}, "small is gone"),
        ({"sources": {"big": 1.0}, "accept_change": "0123"}, "not those the run began with"),  # a stale acceptance
        ({"sources": {"big": 3.0, "small": 1.0, "new": 2.0}}, "new is new"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    two_sources(tmp_path)
    write_source(tmp_path, "new", documents("n", 5))
    _, state = run_steps(data_args(tmp_path), 1)
    with pytest.raises(ConfigError, match=message):
        build_loader(data_args(tmp_path, **changed), rows_per_step=G, state=state)


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    two_sources(tmp_path)
    _, state = run_steps(data_args(tmp_path), 1)
    (tmp_path / "ranks").write_text("".join(f"{x} {i}\n" for i, x in enumerate(["YQ==", "Yg=="])))
    other = TokenizerArgs(name="tiktoken", path=str(tmp_path / "ranks"))
    with pytest.raises(ConfigError, match=r"tokenizer was 'bytes' and is 'tiktoken:[0-9a-f]{16}' now; give the tok"):
        build_loader(data_args(tmp_path, tokenizer=other), rows_per_step=G, state=state)


def test_incomplete_or_mixed_states_are_refused(tmp_path: Path) -> None:
    two_sources(tmp_path)
    args = data_args(tmp_path, batch_size=1)
    states = []
    for rank in (0, 1):
        with build_loader(args, rows_per_step=G, dp_rank=rank, dp_size=2) as loader:
            for _ in range(6 + 6 * rank):
                next(loader)
            states.append(loader.state_dict())
    with pytest.raises(ConfigError, match="differ in row: 12 and 24"):
        merge_states(states)
    with pytest.raises(ConfigError, match="lane 1 is not in it"):
        build_loader(args, rows_per_step=G, state=states[0])
    assert merge_states([states[0], states[0]]) == states[0]  # two tensor-parallel ranks
    with build_loader(args, rows_per_step=G) as loader:
        next(loader)
        odd = loader.state_dict()
    with pytest.raises(ConfigError, match="1 rows are used, which 8 data-parallel ranks cannot share"):
        build_loader(args, rows_per_step=G, dp_size=8, state=odd)


# -- sources changed on purpose ------------------------------------------------------------------------------------


def accepted(args: DataArgs, state: dict[str, Any]) -> DataArgs:
    """The args with the fingerprint that the refusal prints."""
    with pytest.raises(ConfigError) as refusal:
        build_loader(args, rows_per_step=G, state=state)
    return args.model_copy(update={"accept_change": str(refusal.value).rpartition("=")[2]})


def test_changed_weights_choose_from_here_on(tmp_path: Path) -> None:
    two_sources(tmp_path)
    _, state = run_steps(data_args(tmp_path), 3)
    args = accepted(data_args(tmp_path, sources={"big": 1.0, "small": 0.0001}), state)
    expected, last = run_steps(args, 4, 1, state)
    assert run_steps(args, 4, 3, state) == (expected, last)
    assert last["sources"]["big"]["weight"] == 1.0
    for lane, record in last["lanes"].items():
        assert record["pick"] >= state["lanes"][lane]["pick"]
        assert record["tapes"]["big"] >= state["lanes"][lane]["tapes"]["big"]
    run_steps(data_args(tmp_path, sources={"big": 1.0, "small": 0.0001}), 1, 1, last)  # accepted once is enough


def test_an_added_and_a_removed_source(tmp_path: Path) -> None:
    two_sources(tmp_path)
    write_source(tmp_path, "new", documents("n", 50))
    _, state = run_steps(data_args(tmp_path), 3)
    args = accepted(data_args(tmp_path, sources={"big": 3.0, "new": 3.0}), state)
    table, last = run_steps(args, 4, 1, state)
    assert run_steps(args, 4, 4, state) == (table, last)
    assert set(last["lanes"]["0"]["tapes"]) == {"big", "new"}
    text = "".join(chr(i) for ids in table.values() for i in ids if i < 256)
    assert "n1:" in text
    assert "s1:" not in text


def test_grown_files_begin_with_an_epoch_that_no_lane_has_touched(tmp_path: Path) -> None:
    two_sources(tmp_path)
    args = data_args(tmp_path, sources={"small": 1.0}, lanes=G, batch_size=1, seq_len=64)
    _, state = run_steps(args, 2)
    more = tmp_path / "small" / "small.chunk.00.jsonl"
    grown = more.read_text() + "".join(json.dumps({"text": f"more{i}"}) + "\n" for i in range(40))
    more.write_text(grown)
    args = accepted(args, state)
    expected, last = run_steps(args, 20, 1, state)
    assert run_steps(args, 20, 2, state) == (expected, last)
    text = "".join(chr(i) if i < 256 else "|" for ids in expected.values() for i in ids)
    counts = [text.count(f"|more{i}|") for i in range(40)]
    assert min(counts) > 0
    assert all(lane["tapes"]["small"][0] % G == int(number) for number, lane in last["lanes"].items())


# -- sources that cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ({"nothing": 1.0}, ConfigError, "nothing: no such file or folder"),
        ({"big": 0.0}, ConfigError, "no source has a weight above 0"),
        ([SourceArgs(path="big"), SourceArgs(path="x/big")], ConfigError, "two sources are called 'big'"),
        ({"big": 1.0, "empty": 1.0}, DataError, "source 'empty' are empty"),
        ({"big": 1.0, "blank": 1.0}, DataError, "source 'blank' has no document"),
    ],
)
def test_unreadable_sources_are_refused_before_anything_starts(
    tmp_path: Path, sources: Any, error: type[Exception], message: str
) -> None:
    two_sources(tmp_path)
    write_source(tmp_path, "empty", [])
    (write_source(tmp_path, "blank", []) / "blank.chunk.01.jsonl").write_text("\n\n")
    with pytest.raises(error, match=message):
        build_loader(data_args(tmp_path, sources=sources), rows_per_step=G)


def test_home_and_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_sources(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = run_steps(data_args(tmp_path, sources={"big": 1.0}), 1)
    for path in ("~/big", "$HOME/big"):
        assert run_steps(DataArgs(**_plain(), sources=[SourceArgs(path=path)]), 1) == expected
    assert [source.name for source in DataArgs(sources=[SourceArgs(path="~/big/")]).read_sources()] == ["big"]


def _plain() -> dict[str, Any]:
    return {"seq_len": 16, "batch_size": 2, "load_async": False}


def test_bad_lines_are_counted_for_the_metrics(tmp_path: Path) -> None:
    folder = write_source(tmp_path, "s", documents("d", 50), n_files=1)
    with (folder / "s.chunk.00.jsonl").open("a") as file:
        file.write("\n{\n")
    for asynchronous in (False, True):
        args = data_args(tmp_path, sources={"s": 1.0}, lanes=1, load_async=asynchronous, seq_len=512)
        with build_loader(args, rows_per_step=2) as loader:
            while loader.stats()["data/epoch/s"] < 2:
                next(loader)
            stats = loader.stats()
        assert stats["data/bad_lines"] >= 4
        assert stats["data/bad_lines"] == stats["data/bad_lines/blank"] + stats["data/bad_lines/not_json"]
        assert stats["data/lines"] >= 104


def test_lanes_of_a_source_with_one_block_begin_in_epochs_of_their_own(tmp_path: Path) -> None:
    write_source(tmp_path, "s", ["one"], n_files=1)
    with build_loader(data_args(tmp_path, sources={"s": 1.0}, lanes=3, batch_size=1), rows_per_step=3) as loader:
        assert (loader.stats()["data/epoch/s"], loader.stats()["data/epoch_spread/s"]) == (1, 2)
