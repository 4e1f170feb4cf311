import pytest

from lingua.console import Progress, duration, metrics_line
from lingua.run.throughput import Meter


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_meter(clock: Clock, n_steps: int = 100) -> Meter:
    return Meter(n_steps=n_steps, tokens_per_step=64, flops_per_token=10, n_devices=2, peak_flops=1000, now=clock)


def test_rates_are_of_the_steps_since_the_last_reading():
    clock = Clock()
    meter = make_meter(clock)
    meter.start(10)
    clock.now_s += 4
    with meter.loading():
        clock.now_s += 1
    metrics = meter.read(15, meter.lap())
    assert metrics["speed/curr_iter_time"] == pytest.approx(1.0)
    assert metrics["speed/data_load_time"] == pytest.approx(0.2)
    assert metrics["speed/wps"] == pytest.approx(5 * 64 / 5 / 2)  # per device
    assert metrics["speed/mfu"] == pytest.approx(32 * 10 / 1000)


@pytest.mark.parametrize(("recomputed", "hfu"), [(None, None), (0, 32 * 10 / 1000), (2.5, 32 * 12.5 / 1000)])
def test_hardware_flops_count_what_is_computed_again(recomputed: float | None, hfu: float | None):
    clock = Clock()
    meter = Meter(
        n_steps=9, tokens_per_step=64, flops_per_token=10, n_devices=2, peak_flops=1000,
        recomputed_flops_per_token=recomputed, now=clock,
    )  # fmt: skip
    meter.start(0)
    clock.now_s += 5
    assert meter.read(5, meter.lap()).get("speed/hfu") == (None if hfu is None else pytest.approx(hfu))
    assert ("hfu = " in meter.formula()) == (hfu is not None)


def test_a_device_without_a_known_peak_has_no_share_of_it():
    clock = Clock()
    meter = Meter(
        n_steps=9, tokens_per_step=64, flops_per_token=10, n_devices=2, peak_flops=None,
        recomputed_flops_per_token=2.5, now=clock,
    )  # fmt: skip
    meter.start(0)
    clock.now_s += 5
    metrics = meter.read(5, meter.lap())
    assert metrics["speed/FLOPS"] == pytest.approx(32 * 10)
    assert not {"speed/mfu", "speed/hfu"} & set(metrics)
    assert "no mfu" in meter.formula()


def test_pauses_do_not_count():
    clock = Clock()
    meter = make_meter(clock)
    meter.start(0)
    with meter.paused():
        clock.now_s += 1000
    clock.now_s += 2
    assert meter.read(2, meter.lap())["speed/curr_iter_time"] == pytest.approx(1.0)


def test_time_left_after_a_resume_comes_from_this_start_alone_and_forgets_the_warm_up():
    clock = Clock()
    meter = make_meter(clock)
    meter.start(50)
    clock.now_s += 60  # compile
    assert meter.read(51, meter.lap())["time/eta_s"] == pytest.approx(60 * 49)
    clock.now_s += 9
    assert meter.read(60, meter.lap())["time/eta_s"] == pytest.approx(40)


def test_a_step_read_late_has_its_own_lap():
    clock = Clock()
    meter = make_meter(clock)
    meter.start(0)
    clock.now_s += 1
    lap = meter.lap()
    clock.now_s += 50
    assert meter.read(1, lap)["speed/curr_iter_time"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m0s"), (75, "1m15s"), (3600, "1h0m"), (90_000, "1d1h"), (-1, "0s")]
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


METRICS = {
    "global_step": 3,
    "loss/out": 2.5,
    "optim/grad_norm": 0.5,
    "optim/lr": 1e-3,
    "speed/wps": 1234.5,
    "time/eta_s": 61,
}


def test_a_log_gets_one_plain_line_per_report(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    with Progress(bar=False) as progress:
        progress.begin("run", 10, "steps")
        progress.advance(3)
        progress.report(METRICS)
    assert [record.message for record in caplog.records] == [metrics_line(METRICS, 10)]
    assert "1,23" in caplog.records[0].message


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture):
    with Progress(shown=False) as progress:
        progress.begin("run", 10, "steps")
        progress.advance(3)
        progress.report(METRICS)
    assert not caplog.records


def test_a_terminal_gets_a_bar_with_the_newest_metrics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(bar=True) as progress:
        progress.begin("myrun", 10, "steps", done=2)
        progress.advance(1)
        progress.report(METRICS)
    shown = capsys.readouterr().err
    assert "myrun" in shown
    assert "3/10" in shown
