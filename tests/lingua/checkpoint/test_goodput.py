"""The goodput model: by tables, against drawn kills, and against its own optimum."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from lingua.checkpoint.goodput import Kill, Setting, advice, best_every_s, costs, kept_s, outlook

HOUR_S = 3600.0


@pytest.mark.parametrize(
    ("up_s", "unsafe_s", "kept"),
    [(9.9, 0, 0), (11, 0, 10), (11, 0.5, 0), (11.5, 0.5, 10), (32.9, 0, 20), (33, 0, 30), (3, 50, 0)],
)
def test_a_kill_costs_the_steps_since_the_newest_save_that_outlives_it(
    up_s: float, unsafe_s: float, kept: float
) -> None:
    assert kept_s(up_s, every_s=10, wait_s=1, unsafe_s=unsafe_s) == kept


@pytest.mark.parametrize(("every_s", "wait_s", "unsafe_s"), [(10, 1, 0), (40, 0.1, 0), (10, 0.1, 30), (200, 20, 0)])
def test_the_outlook_is_the_mean_of_drawn_kills(every_s: float, wait_s: float, unsafe_s: float) -> None:
    draw, mean_s = random.Random(1), 100.0
    kept = statistics.mean(kept_s(draw.expovariate(1 / mean_s), every_s, wait_s, unsafe_s) for _ in range(200_000))
    found = outlook(every_s, wait_s, mean_s, [Kill(restart_s=25, unsafe_s=unsafe_s)])
    assert found.kept == pytest.approx(kept / 125, rel=0.02)
    assert found.restarting == pytest.approx(0.2)
    assert found.kept + found.saving + found.repeated + found.restarting == pytest.approx(1)
    assert found.saving == pytest.approx(found.kept * wait_s / every_s)


def test_kills_of_two_kinds_cost_what_their_shares_say() -> None:
    soft, hard = Kill(5, share=0.75), Kill(20, unsafe_s=30, share=0.25)
    both = outlook(10, 1, 100, [soft, hard])
    alone = [outlook(10, 1, 100, [Kill(kill.restart_s, kill.unsafe_s)]) for kill in (soft, hard)]
    assert both.kept * 108.75 == pytest.approx(0.75 * alone[0].kept * 105 + 0.25 * alone[1].kept * 120)


@pytest.mark.parametrize(("wait_s", "between_s"), [(1, 100), (0.01, 3600), (170, 7200), (60, 60)])
def test_no_other_interval_keeps_more(wait_s: float, between_s: float) -> None:
    best_s = best_every_s(wait_s, between_s)
    kept = [outlook(best_s * share, wait_s, between_s, [Kill(10)]).kept for share in (0.5, 0.9, 1, 1.1, 2)]
    assert max(kept) == kept[2]


def test_rare_kills_are_youngs_rule() -> None:
    assert best_every_s(2, 1e6) == pytest.approx((2 * 2 * 1e6) ** 0.5, rel=1e-2)


def test_a_save_that_is_still_being_written_holds_the_next_one_up() -> None:
    assert best_every_s(0.1, 100, at_least_s=30) == 30
    assert best_every_s(10, 100, at_least_s=30) == best_every_s(10, 100)


@pytest.mark.parametrize(
    ("asynchronous", "expected"),
    [(False, (170, 0, Kill(230))), (True, (2.65625, 170, Kill(230, unsafe_s=170)))],
)
def test_costs_of_7b_on_8_ranks_and_half_a_gigabyte_per_second(
    asynchronous: bool, expected: tuple[float, float, Kill]
) -> None:
    assert costs(Setting(85e9, 5, 8, 0.5e9, asynchronous)) == expected


@pytest.mark.parametrize(("asynchronous", "every"), list(itertools.product((False, True), (1, 10, 400))))
def test_no_configured_period_keeps_more_than_the_advised_one(asynchronous: bool, every: int) -> None:
    run = Setting(85e9, 5, 8, 0.5e9, asynchronous)
    now, best, then = advice(run, every, 2 * HOUR_S)
    assert now is not None
    assert now.kept <= then.kept
    assert advice(run, best, 2 * HOUR_S)[0] == then


def test_advice_is_at_least_one_step_and_without_saves_nothing_is_kept() -> None:
    assert advice(Setting(1, 1000, 1, 1e9, True), 10, HOUR_S)[1] == 1
    assert advice(Setting(85e9, 5, 8, 0.5e9, True), 0, HOUR_S)[0] is None
