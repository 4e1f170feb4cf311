"""Light windows by a clock that stands still; files of windows, planned and asked for."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from lingua.config.keys.profiling import ProfilerArgs
from lingua.profiling.profiler import HostClock, MemoryMeter, Profiler, StepTimes
from lingua.profiling.windows import Request, answer_file

CPU = torch.device("cpu")
PLAN: dict[str, Any] = {"run": True, "light_warmup": 1, "light_steps": 2, "profile_warmup": 2, "profile_steps": 1}


class Device:
    """A device that computes when told to; stamps are numbers that pass as it gets there."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.reached_s = 0.0
        self.waited = 0

    def stamp(self) -> float:
        return self.now_s

    def has_passed(self, stamp: float) -> bool:
        return stamp <= self.reached_s

    def wait_for(self, stamp: float) -> None:
        self.waited += 1
        self.reached_s = max(self.reached_s, stamp)

    def seconds(self, begin: float, end: float) -> float:
        assert self.has_passed(end)
        return end - begin


def a_step(times: StepTimes, device: Device, step: int) -> None:
    for phase, seconds in (("data", 1), ("forward", 2), ("backward", 4), ("data", 1), ("forward", 2), ("optimizer", 8)):
        device.now_s += seconds
        times.mark(phase)
    device.now_s += 16
    times.end_step({"global_step": step})


def test_phases_add_up_to_the_step_and_nobody_waits_for_the_device():
    device = Device()
    times = StepTimes(device)
    for step in (1, 2, 3):
        a_step(times, device, step)
    assert list(times.records()) == []
    device.reached_s = 40.0  # in the midst of the second step
    assert list(times.records()) == [
        {
            "global_step": 1, "time/step_s": 34.0, "time/data_s": 2.0, "time/forward_s": 4.0,
            "time/backward_s": 4.0, "time/optimizer_s": 8.0, "time/rest_s": 16.0,
        }
    ]  # fmt: skip
    assert device.waited == 0
    assert [record["global_step"] for record in times.records(wait=True)] == [2, 3]


def test_the_hosts_clock_has_always_passed():
    readings = iter([1.0, 3.5])
    clock = HostClock(lambda: next(readings))
    begin, end = clock.stamp(), clock.stamp()
    assert clock.has_passed(end)
    assert clock.seconds(begin, end) == 2.5


def train(profiler: Profiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        torch.ones(2).add_(1)
        profiler.mark("forward")
        profiler.step(step)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else []


def steps_in(path: Path) -> list[int]:
    records = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert all(record["memory/rss_gib"] > 0 and record["rank"] == 0 for record in records)
    return [record["global_step"] for record in records]


def test_planned_windows_count_from_this_start_and_are_named_by_step_and_rank(tmp_path: Path):
    with Profiler(ProfilerArgs(**PLAN), tmp_path, CPU, rank=0) as profiler:
        profiler.start(100)
        train(profiler, 101, 104)
    folder = tmp_path / "profiling"
    assert files(folder) == ["light_0000000102_rank0.jsonl", "trace_0000000103_rank0.json.gz"]
    assert steps_in(folder / "light_0000000102_rank0.jsonl") == [102, 103]
    trace = orjson.loads(gzip.decompress((folder / "trace_0000000103_rank0.json.gz").read_bytes()))
    assert any("add" in event.get("name", "") for event in trace["traceEvents"])


def test_other_ranks_have_light_windows_only(tmp_path: Path):
    with Profiler(ProfilerArgs(**PLAN), tmp_path, CPU, rank=1) as profiler:
        profiler.start(0)
        train(profiler, 1, 4)
    assert files(tmp_path / "profiling") == ["light_0000000002_rank1.jsonl"]


def test_nothing_is_left_where_nothing_is_asked_for(tmp_path: Path):
    with Profiler(ProfilerArgs(), tmp_path, CPU, rank=0) as profiler:
        profiler.start(0)
        train(profiler, 1, 300)
    assert files(tmp_path) == []


def test_requests_are_granted_one_after_the_other_and_answered(tmp_path: Path):
    with Profiler(ProfilerArgs(), tmp_path, CPU, rank=0) as profiler:
        profiler.start(10)
        for request in (Request(2, False, "00000001"), Request(1, True, "00000002"), Request(50, False, "00000003")):
            profiler.requests.ask(request)
            profiler.read(profiler.requests.numbers())
        train(profiler, 11, 15)
    folder, names = tmp_path / "profiling", dict[str, list[str]]()
    for name in ("00000001", "00000002", "00000003"):
        names[name] = orjson.loads(answer_file(folder, name).read_bytes())["files"]
    assert names == {
        "00000001": ["light_0000000012_rank0.jsonl"],
        "00000002": ["light_0000000014_rank0.jsonl", "trace_0000000014_rank0.json.gz"],
        "00000003": ["light_0000000015_rank0.jsonl"],  # the run ended before
    }
    assert [steps_in(path) for path in sorted(folder.glob("light_*"))] == [[12, 13], [14], [15]]


def test_a_request_within_a_planned_window_has_files_of_its_own(tmp_path: Path):
    with Profiler(ProfilerArgs.model_validate(PLAN | {"light_steps": 4}), tmp_path, CPU, rank=0) as profiler:
        profiler.start(0)
        train(profiler, 1, 2)
        profiler.requests.ask(Request(1, False, "00000001"))
        profiler.read(profiler.requests.numbers())
        train(profiler, 3, 6)
    light = {int(path.name[6:16]): steps_in(path) for path in (tmp_path / "profiling").glob("light_*")}
    assert light == {2: [2, 3], 4: [4], 5: [5]}


def test_a_disk_that_refuses_the_files_costs_the_files_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "profiling").write_text("in the way")
    with Profiler(ProfilerArgs(**PLAN), tmp_path, CPU, rank=0) as profiler:
        profiler.start(0)
        profiler.requests.ask(Request(1, False, "00000001"))
        profiler.read(profiler.requests.numbers())
        train(profiler, 1, 4)
    said = "\n".join(caplog.messages)
    for part in ("cannot make", "lines lost, cannot write", "cannot write", "cannot answer"):
        assert part in said


def test_peaks_of_steps_do_not_hide_that_of_the_metrics(monkeypatch: pytest.MonkeyPatch):
    gib = 2**30
    peak = {"now": 0}

    def stats(device: torch.device) -> dict[str, int]:
        kinds = {
            f"{kind}_bytes.all.{what}": peak["now"] for kind in ("active", "reserved") for what in ("peak", "current")
        }
        return kinds | {"allocated_bytes.all.current": gib, "num_alloc_retries": 1, "num_ooms": 0}

    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    properties = type("Properties", (), {"total_memory": 8 * gib})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    memory = MemoryMeter(torch.device("cuda"))
    seen = []
    for now in (2, 4, 3):
        peak["now"] = now * gib
        seen.append(memory.step()["memory/max_active_gib"])
    assert seen == [2, 4, 3]
    report = memory.report()
    assert (report["memory/max_active_gib"], report["memory/max_active_pct"]) == (4, 50)
    peak["now"] = gib
    assert memory.report()["memory/max_active_gib"] == 1
