import itertools
from typing import Any

import pytest

from lingua.config.base import ConfigError
from lingua.config.keys.optim import OptimArgs
from lingua.optim.schedule import SCHEDULES, lr_at, register_schedule


def factors(steps: list[int], n_steps: int = 100, **keys: Any) -> list[float]:
    args = OptimArgs.model_validate({"lr": 2.0, "warmup": 10, "lr_min_ratio": 0.1, **keys})
    return [lr_at(args, step, n_steps) / 2.0 for step in steps]


@pytest.mark.parametrize("scheduler", ["constant", "linear", "inv_sqrt", "cosine", "wsd"])
def test_every_schedule_warms_up_in_a_line_from_zero(scheduler: str) -> None:
    assert factors([0, 1, 5, 10], scheduler=scheduler) == pytest.approx([0.0, 0.1, 0.5, 1.0])


@pytest.mark.parametrize("scheduler", ["linear", "inv_sqrt", "cosine", "wsd"])
def test_every_decaying_schedule_ends_at_the_minimum_and_stays_there(scheduler: str) -> None:
    assert factors([100, 101, 1000], scheduler=scheduler) == pytest.approx([0.1, 0.1, 0.1])


TABLE = [
    ("constant", {}, {10: 1.0, 99: 1.0, 500: 1.0}),
    ("linear", {}, {10: 1.0, 55: 0.55, 100: 0.1}),
    ("cosine", {}, {55: 0.55, 32.5: 0.1 + 0.9 * 0.853553}),
    ("cosine", {"cosine_theta": 2.0}, {55: 0.1 + 0.9 * 0.853553}),
    ("cosine", {"warmup": 0, "cycle_length": 0.5}, {0: 1.0, 25: 0.55, 50: 1.0, 75: 0.55, 100: 0.1}),
    ("inv_sqrt", {"annealing_step": 0}, {40: 0.5, 90: 1 / 3, 100: 10**-0.5}),
    ("inv_sqrt", {"annealing_step": 60}, {40: 0.5, 70: 0.3, 100: 0.1}),
    ("inv_sqrt", {"annealing_step": 0, "exp_factor": 1.0}, {20: 0.5, 100: 0.1}),
    ("inv_sqrt", {"annealing_step": 1000}, {10: 1.0, 55: 0.55, 100: 0.1}),
    ("wsd", {"decay_fraction": 0.2}, {80: 1.0, 90: 1 / 5.5, 100: 0.1}),
    ("wsd", {"decay_fraction": 0.0}, {99: 1.0}),
    ("wsd", {"decay_fraction": 0.2, "lr_min_ratio": 0.0}, {80: 1.0, 90: 0.5, 100: 0.0}),
    # the decay of a later cycle is a share of all steps up to its end
    ("wsd", {"decay_fraction": 0.2, "cycle_length": 0.5}, {40: 1.0, 45: 1 / 5.5, 50: 1.0, 80: 1.0, 90: 1 / 5.5}),
    # a run that is no whole number of cycles still ends decayed
    ("wsd", {"decay_fraction": 0.1, "cycle_length": 0.4}, {85: 1.0, 95: 1 / 5.5, 100: 0.1}),
]


@pytest.mark.parametrize(("scheduler", "keys", "points"), TABLE)
def test_known_points(scheduler: str, keys: dict[str, Any], points: dict[int, float]) -> None:
    assert factors(list(points), scheduler=scheduler, **keys) == pytest.approx(list(points.values()), abs=1e-6)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "inv_sqrt", "cosine", "wsd"])
@pytest.mark.parametrize(("warmup", "n_steps"), [(0, 1), (0, 7), (5, 5), (2000, 100), (10, 0)])
def test_odd_lengths_give_a_rate_in_range(scheduler: str, warmup: int, n_steps: int) -> None:
    assert all(0 <= factor <= 1 for factor in factors(list(range(12)), n_steps, scheduler=scheduler, warmup=warmup))


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "inv_sqrt"])
def test_one_cycle_never_jumps(scheduler: str) -> None:
    rates = factors(list(range(101)), scheduler=scheduler, annealing_step=20)
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < 0.101  # the steps of the warm-up


def test_unknown_schedule_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"optim.scheduler 'cosin' is unknown; known: .*cosine, inv_sqrt"):
        factors([50], scheduler="cosin")


def test_a_plugin_adds_a_schedule_once() -> None:
    try:

        @register_schedule("halving")
        def halving(args: OptimArgs, step: int, n_steps: int) -> float:
            return 0.5

        assert factors([5, 50], scheduler="halving") == [0.5, 0.5]
        with pytest.raises(ValueError, match="already"):
            register_schedule("halving")(lambda args, step, n_steps: 0.1)
    finally:
        del SCHEDULES["halving"]
