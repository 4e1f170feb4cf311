"""The pure parts of the benchmark of one device, and all its cases at a size that takes seconds."""

from __future__ import annotations

from typing import Any

import bench_cases
import bench_step as bench
import pytest


def test_every_case_is_a_config_that_may_start() -> None:
    sizes = {}
    for case in (*bench_cases.GPU_CASES, *bench_cases.CPU_CASES, *bench_cases.TINY_CASES):
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


def test_a_loop_is_judged_before_and_beside_its_save() -> None:
    def record(step: int) -> dict[str, Any]:
        save = {"checkpoint/stall_s": 0.25, "checkpoint/drain_gb_per_s": 1.5} if step > 20 else {}
        time_s = {1: 9.0, 21: 2.5}.get(step, 2.2 if step > 20 else 2.0)
        speed = {"speed/curr_iter_time": time_s, "speed/wps": 100.0}
        return {"global_step": step, "created_at": f"1970-01-01T00:01:{step:02d}+00:00", **speed, **save}

    phases = [{"time/data_s": 0.1, "time/rest_s": 0.3, "time/step_s": 2.0}]
    found = bench.loop_figures([record(step) for step in range(1, 41)], phases, started_s=50.0)
    assert found["start_to_step_1_s"] == 11.0
    assert (found["step_s"], found["step_s_beside_save"], found["tokens_per_s"]) == (2.0, 2.2, 100.0)
    assert (found["slowdown"], found["outside_share"]) == pytest.approx((0.1, 0.2))
    assert found["step_s_of_copy"] == 2.5  # the step after the save is measured, not dropped
    assert (found["save_stall_s"], found["drain_gb_per_s"], found["mfu"]) == (0.25, 1.5, None)


@pytest.mark.parametrize(
    ("mode", "log", "label"),
    [
        ("shm", "checkpoint 20: 1 GB staged in 8 ms\n", "asynchronous"),
        ("shm", "2 slots do not fit; saves are synchronous\n", "synchronous, not as asked for: 2 slots do not fit"),
        ("shm", "", "synchronous, not as asked for: the log does not say why"),
        ("null", "", "synchronous"),
    ],
)
def test_a_save_that_became_synchronous_is_labelled_so_with_the_reason(mode: str, log: str, label: str) -> None:
    assert bench.kind_of_save(mode, log).startswith(label)


@pytest.mark.parametrize(("step_s", "steps"), [(0.1, 20), (1.0, 15), (2.0, 8), (60.0, 8)])
def test_long_steps_are_timed_less_often(step_s: float, steps: int) -> None:
    assert bench.n_timed(step_s, 20) == steps


def test_only_a_device_with_a_data_sheet_has_an_mfu() -> None:
    cpu = bench.torch.device("cpu")
    facts = bench.device_facts(cpu)
    assert facts["peaks"] == {}
    trainer = bench.Trainer(bench_cases.TINY_CASES[0], 2, cpu)
    found = bench.rates(bench_cases.TINY_CASES[0], 2, [1.0, 1.0], trainer, facts["peaks"])
    assert found["tokens_per_s"] == 2 * 32
    assert not {"mfu", "mfu_causal_halved", "share_of_matmul"} & set(found)
    sheet = bench.rates(bench_cases.TINY_CASES[0], 2, [1.0, 1.0], trainer, {"sheet": 2e12, "matmul": 1e12})
    assert sheet["share_of_matmul"] == pytest.approx(2 * sheet["mfu"])


def test_an_unknown_case_is_answered_with_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "31M"])
    assert "no case '31M'; there are: debug, 30M" in capsys.readouterr().err
