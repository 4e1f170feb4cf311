"""The pure parts of the benchmark of one device, and all its cases at a size that takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import bench_cases
import bench_step as bench
import pytest

ROOT = Path(__file__).parents[2]


def test_every_case_is_a_config_that_may_start() -> None:
    sizes = {}
    for case in (*bench.GPU_CASES, *bench.CPU_CASES, *bench.TINY_CASES):
        size = bench.checked(case, case.batches[0]).resolved
        assert (size.seq_len, size.rows_per_step, size.world_size) == (case.seq_len, case.batches[0], 1)
        sizes.setdefault(case.name, size.n_params)
    found = [sizes[f"{name} bf16 2048"] for name in ("1B", "7B", "280M")]
    assert found == pytest.approx([1.81e9, 7.53e9, 494e6], rel=5e-3)


def test_families_are_compared_at_equal_size_and_with_transformers_where_it_has_them() -> None:
    cases = bench.family_cases()
    sizes = {case.name: bench.checked(case, 4).resolved.n_params for case in cases}
    for name, n_params in sizes.items():
        assert n_params == pytest.approx(sizes[f"llama {name.split()[1]}"], rel=0.15)
    rivals = {case.name: [rival.name for rival in case.rivals] for case in cases}
    assert rivals["hawk 1M"] == ["llama 1M"]
    assert rivals["mamba2 5M"] == ["transformers mamba2 5M", "llama 5M"]


@pytest.mark.soak
@pytest.mark.parametrize("case", bench.family_cases(tiny=True)[: len(bench_cases.FAMILIES)], ids=lambda case: case.name)
def test_every_family_is_measured_beside_its_rivals(case: Any) -> None:
    found = bench.cpu_suite([case], 1, 2, lambda what: None, positions=(10, 20))["cases"]
    for rival in case.rivals:
        assert found[case.name][f"over_{rival.name.split()[0]}"] > 0
    assert found[case.name]["generated_at_20"] > 0


@pytest.mark.parametrize(
    ("found", "met"),
    [
        ({"1B bf16 2048": {"mfu": 0.56, "share_of_matmul": 0.69}}, [True, False]),
        ({"1B bf16 2048": {"step_s": 1.0}, "1B deterministic 2048": {"step_s": 1.06}}, [False]),
        ({"loop 1B asynchronous": {"save_stall_s": 0.009, "slowdown": 0.02}}, [True, True]),
        ({"1B bf16 2048": {"tokens_per_s": 3.0}, "transformers 1B bf16 2048": {"tokens_per_s": 4.0}}, [False]),
        ({"1B bf16 2048": {"error": "no batch fits"}}, []),
    ],
)
def test_goals_are_judged_where_there_is_a_figure(found: dict[str, Any], met: list[bool]) -> None:
    assert [goal["met"] for goal in bench.goals(found)] == met


def test_a_loop_is_judged_before_and_beside_its_save() -> None:
    def record(step: int) -> dict[str, Any]:
        save = {"checkpoint/stall_s": 0.25, "checkpoint/drain_gb_per_s": 1.5} if step > 20 else {}
        time_s = 9.0 if step == 1 else 2.2 if step > 20 else 2.0
        speed = {"speed/curr_iter_time": time_s, "speed/wps": 100.0}
        return {"global_step": step, "created_at": f"1970-01-01T00:01:{step:02d}+00:00", **speed, **save}

    phases = [{"time/data_s": 0.1, "time/rest_s": 0.3, "time/step_s": 2.0}]
    found = bench.loop_figures([record(step) for step in range(1, 41)], phases, started_s=50.0)
    assert found["start_to_step_1_s"] == 11.0
    assert (found["step_s"], found["step_s_beside_save"], found["tokens_per_s"]) == (2.0, 2.2, 100.0)
    assert (found["slowdown"], found["outside_share"]) == pytest.approx((0.1, 0.2))
    assert (found["save_stall_s"], found["drain_gb_per_s"], found["mfu"]) == (0.25, 1.5, None)


def test_only_a_device_with_a_data_sheet_has_an_mfu() -> None:
    cpu = bench.torch.device("cpu")
    facts = bench.device_facts(cpu)
    assert facts["peaks"] == {}
    trainer = bench.Trainer(bench.TINY_CASES[0], 2, cpu)
    found = bench.rates(bench.TINY_CASES[0], 2, [1.0, 1.0], trainer, facts["peaks"])
    assert found["tokens_per_s"] == 2 * 32
    assert not {"mfu", "mfu_causal_halved", "share_of_matmul"} & set(found)
    sheet = bench.rates(bench.TINY_CASES[0], 2, [1.0, 1.0], trainer, {"sheet": 2e12, "matmul": 1e12})
    assert sheet["share_of_matmul"] == pytest.approx(2 * sheet["mfu"])


def test_what_the_time_does_not_suffice_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(act: Any, *args: Any) -> dict[str, Any]:
        return {"machine": {"cuda": "12"}, "peaks": {}} if act is bench.device_facts else {"tokens_per_s": 1.0}

    monkeypatch.setattr(bench, "apart", apart)
    monkeypatch.setattr(bench, "measure_loop", lambda *args: pytest.fail("a loop takes longer than there is"))
    result = bench.gpu_suite([], False, 46.0, 2, lambda what: None)
    names = [planned.name for planned in bench.gpu_plan(False, 2)]
    assert result["left_out"] == [name for name in names if name.startswith("loop")]
    assert list(result["cases"]) == [name for name in names if not name.startswith("loop")]


def test_an_unknown_case_is_answered_with_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "31M"])
    assert "no case '31M'; there are: debug, 30M" in capsys.readouterr().err


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
    command = ["bash", str(ROOT / "scripts" / "bench_gpu.sh"), str(out), "--tiny", "--steps", "2"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads(out.read_text())
    assert result["left_out"] == []
    for name, found in result["cases"].items():
        assert name in shown
        if name.startswith("loop"):
            assert found["start_to_step_1_s"] > 0
            assert found["step_s_beside_save"] > 0
            assert 0 < found["outside_share"] < 1
        elif name.startswith("attention"):
            assert found["sdpa"]["tflops"] > 0
        elif "float8" not in name:  # needs a GPU; here it is an answer in a sentence
            assert found["tokens_per_s"] > 0
    assert "float8" in result["cases"]["1B float8 rowwise 2048"]["error"]
