"""The goodput benchmark: its pure parts by tables, its slow disk, and all ways at a size that takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_goodput as bench
import goodput_runs as runs
import pytest

from lingua.files import RunError

WAYS = {way.name: way for way in runs.WAYS}
CALM = bench.Undisturbed(
    step_s=0.5, wait_s=1.0, unsafe_s=4.0, start_s=6.0, load_s={"kill": 0.1, "node": 2.0}, state_bytes=100_000_000
)
ON_DISK = replace(CALM, load_s={"kill": 2.0})


def kill(up_s: float, kept_steps: int) -> dict[str, Any]:
    return {"kind": "kill", "up_s": up_s, "back_s": 8.5, "load_s": 2.0, "kept_steps": kept_steps}


@pytest.mark.parametrize("n", [1, 2, 5, 2000])
def test_kills_are_the_same_for_all_ways_and_scaled(n: int) -> None:
    gaps = [up_s for up_s, _ in bench.drawn_kills(30, n, seed=1, scale=60)]
    assert gaps == [up_s for up_s, _ in bench.drawn_kills(30.0, n, seed=1, scale=60)]
    assert sum(gaps) / n == pytest.approx(30)
    if n == 2000:  # exponential: the median is ln 2 of the mean
        assert sorted(gaps)[1000] == pytest.approx(30 * 0.693, rel=0.01)
        assert gaps != sorted(gaps)


def test_a_trace_of_real_kills_is_read_and_scaled(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text("# cluster A, May\n600\n\n1200 node  # a node\n4800 term\n")
    assert bench.read_trace(file, 60) == [(10, "kill"), (10, "node"), (60, "term")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("600\n500\n", "trace:2: '500' is no kill; write rising seconds, and kill, node or term"),
        ("10 boom\n", "trace:1: '10 boom' is no kill"),
        ("soon\n", "trace:1: 'soon' is no kill"),
        ("# none\n", "names no kill"),
    ],
)
def test_a_trace_that_cannot_be_read_is_refused_by_line(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(RunError, match=sentence):
        bench.read_trace(tmp_path / "trace", 60)


@pytest.mark.parametrize(
    ("way", "kept_steps", "goodput", "model"),
    [  # every 20 steps = 10 s, up 45 s: sync and memory keep four saves, what must reach the disk three
        ("lingua sync", 81, 40.5 / (45 + 2 + 6 / 60 + 0.5), 40.5 / (45 + 2 + 6 / 60 + 0.5)),
        ("lingua shm", 81, 40.5 / (45 + 2 + 6 / 60 + 0.5), 40.5 / (45 + 0.1 + 6 / 60 + 0.5)),
        ("dcp.async_save", 61, 30.5 / (45 + 2 + 6 / 60 + 0.5), 30.5 / (45 + 2 + 6 / 60 + 0.5)),
    ],
)
def test_a_case_is_judged_by_steps_that_count_over_scaled_time(
    way: str, kept_steps: int, goodput: float, model: float
) -> None:
    kills = [kill(45, kept_steps) for _ in range(2)]
    calm = {"lingua shm": CALM, "lingua sync": replace(ON_DISK, unsafe_s=0.0)}.get(way, ON_DISK)
    found = bench.judged(kills, calm, WAYS[way], 20, scale=60)
    assert found["goodput"] == pytest.approx(goodput)
    assert found["model"] == pytest.approx(model)
    assert found["goodput_unscaled"] == pytest.approx(kept_steps * 0.5 / 53.5)


def test_steps_beside_a_save_are_not_what_a_step_takes() -> None:
    ends_s = {1: 10.0, 2: 11.0, 3: 12.0, 4: 15.0, 5: 17.0, 6: 18.0, 7: 19.0, 8: 22.0}  # saved after 3 and 6
    assert bench.quiet_steps_s(ends_s, every=3, beside_s=4.0) == [1.0]  # step 2; the save after 3 lasts to 16
    assert bench.quiet_steps_s(ends_s, every=3, beside_s=0.5) == [1.0, 2.0, 3.0]
    assert bench.quiet_steps_s(ends_s, every=10, beside_s=4.0) == [1.0, 1.0, 3.0, 2.0, 1.0, 1.0, 3.0]


def test_the_best_interval_waits_for_the_disk_only_where_memory_does_not_survive() -> None:
    found = {
        name: bench.interval(replace(CALM, step_s=0.1, wait_s=0.01, unsafe_s=3.0), way, 10)
        for name, way in WAYS.items()
    }
    assert found["lingua shm"] < 10
    assert {found[name] for name in ("lingua shm, node", "dcp.async_save")} == {30}


def test_the_figures_on_paper_are_those_of_the_page() -> None:
    rows = bench.on_paper(7200)
    assert rows[4] == ["7B", "8", "null", "29", "53", "76.7%", "9.2%", "10.9%", "3.2%"]
    page = (runs.HERE.parent / "lingua/checkpoint/README.md").read_text()
    for model, _, mode, _, every, kept, *_ in rows:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {model} | 8, 24 | `{mode}` |")]
        assert every in line.split("|")[4]
        assert kept in line


@pytest.fixture
def slow(tmp_path: Path) -> runs.Bench:
    if subprocess.run(["sh", "-c", "command -v cc"], capture_output=True).returncode:
        pytest.skip("no C compiler")
    return runs.Bench(tmp_path, runs.TINY, 5e6)


ACCESS = """
import os, time, torch
from pathlib import Path
place, value = Path(os.environ["PLACE"]), torch.zeros(250_000)
for act in (lambda: torch.save(value, place / "a"), lambda: torch.load(place / "a"),
            lambda: (place / "b").write_bytes(bytes(1_000_000)), lambda: (place / "b").read_bytes()):
    start_s = time.perf_counter()
    act()
    print(time.perf_counter() - start_s)
"""


def test_the_slow_disk_lets_no_byte_pass_faster_and_slows_nothing_else(slow: runs.Bench) -> None:
    def seconds(place: Path) -> list[float]:
        env = slow.environment() | {"PLACE": str(place)}
        said = subprocess.run([sys.executable, "-c", ACCESS], env=env, check=True, capture_output=True, text=True)
        return [float(line) for line in said.stdout.split()]

    seconds(slow.folder)
    assert (slow.folder / "clock").read_bytes() == bytes(8)  # nothing was charged
    assert min(seconds(slow.folder / "disk")) >= 0.2  # 1 MB at 5 MB/s
    assert (slow.folder / "clock").read_bytes() != bytes(8)


@pytest.mark.soak
def test_every_way_is_killed_and_goes_on(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace", tmp_path / "found.json"
    trace.write_text("120\n240 term\n")
    words = ["--tiny", "--trace", str(trace), "--disk-mb-per-s", "5", "--folder", str(tmp_path), "--out", str(out)]
    assert bench.main([*words, "--figure", str(tmp_path / "found.svg")]) == 0
    cases = json.loads(out.read_text())["cases"]
    assert [case["way"] for case in cases] == list(WAYS)
    for case in cases:
        assert len(case["kills"]) == 2, case
        assert all(one["back_s"] > 0 <= one["kept_steps"] for one in case["kills"])
        if case["way"].startswith("lingua") and "node" not in case["way"]:
            assert case["kills"][1]["lost_steps"] <= 1, "a stop signal is answered by a save"
    assert (tmp_path / "found.svg").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith("tmp")]
