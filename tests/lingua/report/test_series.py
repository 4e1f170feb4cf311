"""Metrics files as columns, curves thinned, and probe.jsonl as tables of layers and steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from lingua.report.series import MAX_PROBES, WHEN, curve, read_probes, read_table, records_in, thinned, unbroken


def test_what_is_no_record_is_passed_over(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    lines = [
        '{"global_step": 1, "incarnation": 1, "loss": 2.5, "created_at": "1970-01-01T00:01:00+00:00"}',
        "\x00\x00{",
        "[1, 2]",
        '{"loss": 9.0}',
        '{"global_step": "2"}',
        '{"global_step": 3, "loss": null, "created_at": "yesterday"}',
        '{"global_step": 4, "loss": true, "created_at": 5}',
        '{"global_step": 5, "lo',
    ]
    file.write_text("\n".join(lines))
    table = read_table(file, ["loss"])
    assert table["global_step"].tolist() == [1, 3, 4]
    assert np.array_equal(table["loss"], [2.5, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(table[WHEN], [60.0, np.nan, np.nan], equal_nan=True)
    assert [column.tolist() for column in curve(table, "loss")] == [[1], [2.5]]
    assert len(read_table(tmp_path / "nothing", ["loss"])) == 0
    assert list(records_in(tmp_path)) == []  # a folder


@pytest.mark.parametrize(("n", "n_pieces"), [(0, 10), (1, 10), (10, 10), (11, 10), (1000, 7), (12345, 240)])
def test_a_thinned_curve_keeps_extremes_and_ends(n: int, n_pieces: int):
    x = np.arange(n, dtype=float)
    y = np.random.default_rng(n).normal(size=n)
    thin = thinned(x, y, n_pieces)
    assert len(thin.x) == min(n, n_pieces)
    assert (thin.low == thin.high).all() == (n <= n_pieces)
    if n:
        assert (thin.low.min(), thin.high.max()) == (y.min(), y.max())
        assert (thin.x[0], thin.x[-1]) == (x[0], x[-1])
        assert (thin.low <= thin.mean).all()
        assert (thin.mean <= thin.high).all()
        assert (np.diff(thin.x) > 0).all()


def test_a_piece_is_the_mean_of_its_points():
    thin = thinned(np.arange(6.0), np.array([1.0, 3.0, 5.0, 7.0, 2.0, 4.0]), 3)
    assert thin.mean.tolist() == [2, 6, 3]
    assert (thin.low.tolist(), thin.high.tolist()) == ([1, 5, 2], [3, 7, 4])


def write(path: Path, records: list[dict[str, object]], torn: str = "") -> Path:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records) + torn.encode())
    return path


def test_a_table_per_quantity(tmp_path: Path):
    def record(step: int, start: int, value: float) -> dict[str, object]:
        figures = {f"probe/layers.{i}.attention/activation/{s}": value + i for i in (0, 1) for s in ("mean", "rms")}
        return {"global_step": step, "incarnation": start, **figures, "probe/norm/grad/max": value, "probe/odd": 1.0}

    late = {"global_step": 20, "probe/late/grad/max": 7.0}
    records = [record(10, 1, 1.0), record(20, 1, 9.0), record(20, 2, 2.0) | late]  # step 20 was trained again
    activation, grad = read_probes(write(tmp_path / "probe.jsonl", records, '{"global_step": 30, "pro'))
    assert (activation.quantity, activation.stat) == ("activation", "rms")
    assert activation.layers == ["layers.0.attention", "layers.1.attention"]
    assert activation.steps.tolist() == [10, 20]
    assert activation.values.tolist() == [[1, 2], [2, 3]]
    assert (grad.quantity, grad.stat, grad.layers) == ("grad", "max", ["norm", "late"])
    assert np.array_equal(grad.values, [[1, 2], [np.nan, 7]], equal_nan=True), "a gap where nothing was probed"


def test_many_steps_are_thinned_evenly(tmp_path: Path):
    n = 5 * MAX_PROBES
    records = [{"global_step": step, "probe/a/weight/rms": float(step)} for step in range(1, n + 1)]
    (found,) = read_probes(write(tmp_path / "probe.jsonl", records))
    assert MAX_PROBES // 2 < len(found.steps) <= MAX_PROBES
    assert len(set(np.diff(found.steps))) == 1
    assert found.values.tolist() == [found.steps.tolist()]


def test_a_run_without_probes_has_none(tmp_path: Path):
    assert read_probes(tmp_path / "probe.jsonl") == []
    assert read_probes(write(tmp_path / "probe.jsonl", [{"global_step": 1}])) == []


@pytest.mark.parametrize(
    ("x", "pieces"),
    [
        ([], [[]]),
        ([4], [[4]]),
        ([2, 4, 6, 4, 6, 8], [[2, 4, 6], [4, 6, 8]]),  # gone back twice to the same step
        ([2, 4, 6, 30, 32], [[2, 4, 6], [30, 32]]),  # what lies between counts
    ],
)
def test_a_curve_is_cut_where_a_run_went_back(x: list[float], pieces: list[list[float]]):
    steps = np.array(x, float)
    found = unbroken(steps, -steps)
    assert [one.tolist() for one, _ in found] == pieces
    assert [(-y).tolist() for _, y in found] == pieces
