"""probe.jsonl as tables of layers and steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson

from lingua.report.heat_maps import MAX_STEPS, read_probes


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
    n = 5 * MAX_STEPS
    records = [{"global_step": step, "probe/a/weight/rms": float(step)} for step in range(1, n + 1)]
    (found,) = read_probes(write(tmp_path / "probe.jsonl", records))
    assert MAX_STEPS // 2 < len(found.steps) <= MAX_STEPS
    assert len(set(np.diff(found.steps))) == 1
    assert found.values.tolist() == [found.steps.tolist()]


def test_a_run_without_probes_has_none(tmp_path: Path):
    assert read_probes(tmp_path / "probe.jsonl") == []
    assert read_probes(write(tmp_path / "probe.jsonl", [{"global_step": 1}])) == []
