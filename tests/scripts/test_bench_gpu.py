"""The benchmark of one GPU: what was measured is kept whatever ends it; and all its cases at a size of seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import bench_budget as budget
import bench_gpu as bench
import pytest
import torch
from bench_step import show

ROOT = Path(__file__).parents[2]
WHEELS = [
    line.split("==") for line in (ROOT / "scripts" / "bench_wheels.txt").read_text().splitlines() if line[:1] != "#"
]
KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{scripts!r}, {root!r}]
import bench_budget as budget

folder = Path(sys.argv[1])

def hang(here):
    print("hangs", flush=True)
    signal.pause()

plan = [
    budget.Planned("quick", 1.0, [(8, lambda here: {{"tokens_per_s": 1.0}})]),
    budget.Planned("hangs", 1000.0, [(8, hang)]),
    budget.Planned("never", 1.0, [(8, hang)]),
]
show = lambda result: print(sorted(result["cases"]))
ledger = budget.Ledger(folder / "out.json", [one.name for one in plan], show, lambda cases: [])
here = budget.Here(folder, {{}}, ledger.result["cases"])
budget.measure_all(plan, ledger, here, time.monotonic() + 10_000, lambda place: 0, lambda text: None)
"""


def planned(name: str, act: Callable[[budget.Here], Any], seconds: float = 100.0, **more: Any) -> budget.Planned:
    return budget.Planned(name, seconds, [(batch, act) for batch in (24, 16, 8)], **more)


def run(folder: Path, plan: list[budget.Planned], free: int = 1 << 40, left_s: float = 10_000.0) -> dict[str, Any]:
    ledger = budget.Ledger(folder / "out.json", [one.name for one in plan], show, bench.goals)
    here = budget.Here(folder, {}, ledger.result["cases"])
    budget.measure_all(plan, ledger, here, time.monotonic() + left_s, lambda place: free, lambda text: None)
    assert json.loads((folder / "out.json").read_text()) == ledger.result
    assert ledger.result["seconds"].keys() == ledger.result["cases"].keys()
    return ledger.result


def test_killed_in_the_middle_it_leaves_what_was_measured_and_no_process(tmp_path: Path) -> None:
    script = KILLED.format(scripts=str(ROOT / "scripts"), root=str(ROOT))
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"hangs\n"
        started.kill()
        assert started.wait() == -signal.SIGKILL
        assert started.stdout.read() == b""  # ends when the last process that holds it has ended
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["running"], result["left_out"]) == ("hangs", ["hangs", "never"])
    assert result["cases"]["quick"]["tokens_per_s"] == 1.0
    assert (tmp_path / "out.txt").read_text() == "['quick']\n"


def test_what_outlasts_its_budget_is_killed_with_its_children_and_named(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def hang(here: budget.Here) -> None:
        subprocess.run(["sleep", "1000"], pass_fds=[writing], check=False)

    result = run(tmp_path, [planned("hangs", hang, 0.1), planned("next", lambda here: {"mfu": 0.5})])
    assert result["cases"]["hangs"]["error"] == "killed: it took longer than the 0.2 s that it had"
    assert result["cases"]["next"]["mfu"] == 0.5
    os.close(writing)
    assert os.read(reading, 1) == b""  # nobody holds the other end
    os.close(reading)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of 141 GB"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_a_smaller_batch_is_tried_in_a_fresh_process(tmp_path: Path, error: Exception) -> None:
    tried = tmp_path / "tried"

    def measure(here: budget.Here) -> dict[str, Any]:
        with tried.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(tried.read_text().split()) < 3:
            raise error
        return {"mfu": 0.5}

    found = run(tmp_path, [planned("1B", measure)])["cases"]["1B"]
    assert (found["mfu"], found["too_large"]) == (0.5, [24, 16])
    assert len({*tried.read_text().split(), str(os.getpid())}) == 4


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda here: os._exit(7), "the process ended with 7"),
        (lambda here: {"x": 1 / 0}, "ZeroDivisionError: division by zero"),
        (lambda here: {budget.OUT_OF_MEMORY: "x"}, "no batch of [24, 16, 8] fits into the memory"),
    ],
)
def test_a_case_that_fails_is_a_finding(tmp_path: Path, act: Any, error: str) -> None:
    assert run(tmp_path, [planned("1B", act)])["cases"]["1B"]["error"] == error


@pytest.mark.parametrize("name", ["1B bf16 2048", "attention 2048", "loop 1B asynchronous"])
def test_the_table_shows_each_kind_of_case_also_where_it_failed(tmp_path: Path, name: str) -> None:
    run(tmp_path, [planned(name, lambda here: {"error": "too hot"})])
    assert "too hot" in (tmp_path / "out.txt").read_text()
    run(tmp_path, [planned(name, lambda here: {"flex": {"tflops": 7.0}} if "att" in name else {"step_s": 7.0})])
    assert "7" in (tmp_path / "out.txt").read_text()


def test_what_there_is_no_room_or_time_for_is_named(tmp_path: Path) -> None:
    def never(here: budget.Here) -> dict[str, Any]:
        pytest.fail("it does not begin")

    plan = [planned("large", never, needs_bytes={"": 3 << 30}), planned("long", never, 1000.0)]
    result = run(tmp_path, plan, free=1 << 30, left_s=500.0)
    assert result["left_out"] == ["long"]
    assert result["cases"]["large"]["error"] == f"needs 3.0 GiB in {tmp_path}, which has 1.0 GiB free"


def test_the_wheels_that_travel_are_those_that_the_tests_run_with() -> None:
    lock = (ROOT / "uv.lock").read_text()
    for name, version in WHEELS:
        assert f'name = "{name}"\nversion = "{version}"\n' in lock


UNTOUCHED = """
import sys
sys.path[:0] = [{scripts!r}, {root!r}]
import torch

def refuse(*args):
    raise AssertionError("a process that has touched the GPU cannot fork others that use it")

for name in ("_cuda_init", "_cuda_getDeviceCount"):
    setattr(torch._C, name, refuse)
import bench_gpu
import apps.main.loop, lingua.train.build

bench_gpu.gpu_plan(False, 20)
print(*{{name.partition(".")[0] for name in sys.modules}})
"""


def test_the_benchmark_plans_without_the_gpu_and_imports_what_is_there_or_travels() -> None:
    command = [sys.executable, "-c", UNTOUCHED.format(scripts=str(ROOT / "scripts"), root=str(ROOT))]
    modules = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    found = packages_distributions()
    wanted = {normal(each) for module in modules - sys.stdlib_module_names for each in found.get(module, ())}
    optional = {"attrs", "dill", "zstandard"}  # others import them where they are installed
    there = needed_by({"torch", "transformers", "typer"}) | {name for name, _ in WHEELS}
    assert wanted - there - {"lingua"} <= optional
    assert {name for name, _ in WHEELS} <= wanted


def needed_by(names: set[str]) -> set[str]:
    """What is installed with these, themselves included."""
    known: set[str] = set()
    while names:
        name = normal(names.pop())
        if name not in known:
            known.add(name)
            with suppress(PackageNotFoundError):
                lines = [line for line in requires(name) or [] if "extra ==" not in line]
                names |= {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines}
    return known


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_order_is_by_value_and_the_first_five_minutes_hold_what_is_asked_for_first() -> None:
    plan = bench.gpu_plan(False, 20)
    names = [one.name for one in plan]
    assert names[:4] == ["1B bf16 2048", "loop 1B asynchronous", "loop 1B synchronous", "280M bf16 2048"]
    assert sum(one.seconds for one in plan[:5]) < 420
    seconds = {one.name: one.seconds for one in plan}
    assert 70 < seconds["7B bf16 2048"] < 100
    assert [batch for batch, _ in plan[0].attempts] == [24, 16, 8]
    assert dict(plan[1].needs_bytes) == pytest.approx({"": 44.5e9, "/dev/shm": 22.0e9}, rel=0.01)


@pytest.mark.parametrize(
    ("found", "met"),
    [
        ({"1B bf16 2048": {"mfu": 0.56, "share_of_matmul": 0.69}}, [True, False]),
        ({"1B bf16 2048": {"step_s": 1.0}, "1B deterministic 2048": {"step_s": 1.06}}, [False]),
        ({"loop 1B asynchronous": {"save_stall_s": 0.009, "slowdown": 0.02}}, [True, True]),
        ({"1B bf16 2048": {"tokens_per_s": 5.0}, "transformers 1B bf16 2048": {"tokens_per_s": 4.0}}, [False]),
        ({"1B bf16 2048": {"error": "no batch fits"}}, []),
    ],
)
def test_goals_are_judged_where_there_is_a_figure(found: dict[str, Any], met: list[bool]) -> None:
    assert [goal["met"] for goal in bench.goals(found)] == met


@pytest.mark.soak
def test_without_a_gpu_the_benchmark_of_one_ends_at_once_with_one_sentence(tmp_path: Path) -> None:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / "bench_gpu.sh"), str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no GPU is visible here; ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_all_of_it_runs_in_small(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [
        "bash",
        str(ROOT / "scripts" / "bench_gpu.sh"),
        str(out),
        "--tiny",
        "--steps",
        "2",
        "--budget-s",
        "3000",
        "--profile",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads(out.read_text())
    assert (result["left_out"], result["running"]) == ([], None)
    assert out.with_suffix(".txt").read_text() == shown
    assert out.with_suffix(".trace.json.gz").stat().st_size > 0
    assert result["cases"]["1B bf16 2048"]["kernels"][0][2] > 0
    for name, found in result["cases"].items():
        assert name in shown
        if name.startswith("loop"):
            assert found["save"] == name.removeprefix("loop 1B ")
            assert found["start_to_step_1_s"] > 0
            assert found["step_s_beside_save"] > 0
            assert 0 < found["outside_share"] < 1
        elif name.startswith("attention"):
            assert found["sdpa"]["tflops"] > 0
        elif "float8" not in name:  # needs a GPU; here it is an answer in a sentence
            assert found["tokens_per_s"] > 0
    assert "float8" in result["cases"]["1B float8 rowwise 2048"]["error"]
