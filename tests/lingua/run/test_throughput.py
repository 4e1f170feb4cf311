from typing import Any

import pytest

from lingua.run.throughput import PEAKS, Meter, find_peak
from tests.fakes import Clock


def make_meter(clock: Clock, step: int = 0, **more: Any) -> Meter:
    given = {"n_steps": 100, "tokens_per_step": 64, "flops_per_token": 10, "n_devices": 2, "peak_flops": 1000}
    meter = Meter(**given | more, now=clock.now)
    meter.start(step)
    return meter


def test_rates_are_of_the_steps_since_the_last_reading():
    clock = Clock()
    meter = make_meter(clock, 10)
    clock.sleep(4)
    with meter.loading():
        clock.sleep(1)
    metrics = meter.read(15, meter.lap())
    assert metrics["speed/curr_iter_time"] == pytest.approx(1.0)
    assert metrics["speed/data_load_time"] == pytest.approx(0.2)
    assert metrics["speed/wps"] == pytest.approx(5 * 64 / 5 / 2)  # per device


@pytest.mark.parametrize(
    ("peak", "recomputed", "mfu", "hfu"),
    [
        (1000, None, 0.32, None),
        (1000, 0, 0.32, 0.32),
        (1000, 2.5, 0.32, 32 * 12.5 / 1000),  # what is computed again counts
        (None, 2.5, None, None),  # a device without a known peak has no share of it
    ],
)
def test_shares_of_the_peak(peak: float | None, recomputed: float | None, mfu: float | None, hfu: float | None):
    clock = Clock()
    meter = make_meter(clock, peak_flops=peak, recomputed_flops_per_token=recomputed)
    clock.sleep(5)
    metrics = meter.read(5, meter.lap())
    assert metrics["speed/FLOPS"] == pytest.approx(32 * 10)
    for key, value in (("speed/mfu", mfu), ("speed/hfu", hfu)):
        assert metrics.get(key) == (None if value is None else pytest.approx(value))
    formula = meter.formula()
    assert (formula is None, "hfu = " in (formula or "")) == (mfu is None, hfu is not None)


def test_pauses_do_not_count():
    clock = Clock()
    meter = make_meter(clock)
    with meter.paused():
        clock.sleep(1000)
    clock.sleep(2)
    assert meter.read(2, meter.lap())["speed/curr_iter_time"] == pytest.approx(1.0)


def test_time_left_after_a_resume_comes_from_this_attempt_alone_and_forgets_the_warm_up():
    clock = Clock()
    meter = make_meter(clock, 50)
    clock.sleep(60)  # compile
    assert meter.read(51, meter.lap())["time/eta_s"] == pytest.approx(60 * 49)
    clock.sleep(9)
    assert meter.read(60, meter.lap())["time/eta_s"] == pytest.approx(40)


def test_a_step_read_late_has_its_own_lap():
    clock = Clock()
    meter = make_meter(clock)
    clock.sleep(1)
    lap = meter.lap()
    clock.sleep(50)
    assert meter.read(1, lap)["speed/curr_iter_time"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("h200", "h200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA H100 NVL", "h100 nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA RTX A6000", "rtx a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx 6000 ada"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA H200 NVL", "h200 nvl"),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA H100 80GB HBM2e", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-PCIE-32GB", None),
        ("NVIDIA GeForce GTX 750", None),
    ],
)
def test_a_device_finds_its_row(name: str, row: str | None) -> None:
    assert find_peak(name) == (None if row is None else PEAKS[row])
    assert all("data sheet" in peak.sheet for peak in PEAKS.values())
