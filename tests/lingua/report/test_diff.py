"""Two runs compared: keys and curves."""

from typing import Any

import pytest

from lingua.report.diff import (
    ABSENT,
    common_curves,
    config_differences,
    some_of,
    telling_labels,
)


def test_keys_that_differ():
    left = {"name": "a", "dump_dir": "x", "optim": {"lr": 1e-3, "clip": 1.0}, "data": {"sources": {"web": 1}}, "old": 1}
    right = {"name": "b", "dump_dir": "y", "optim": {"lr": 1e-4, "clip": 1.0}, "data": {"sources": {}}, "new": None}
    assert config_differences(left, right) == {
        "optim.lr": (1e-3, 1e-4),
        "data.sources.web": (1, ABSENT),
        "old": (1, ABSENT),
        "data.sources": (ABSENT, {}),
        "new": (ABSENT, None),
    }
    assert config_differences(left, left) == {}


ADAMW = {"name": "a", "steps": 200, "optim": {"type": "adamw", "lr": 2e-3, "beta1": 0.9}, "logging": {"freq": 1}}
MUON = {"name": "b", "steps": 200, "optim": {"type": "muon", "lr": 4e-3, "momentum": 0.95}, "logging": {"freq": 10}}


@pytest.mark.parametrize(
    ("configs", "labels"),
    [
        ([ADAMW, MUON], ["type=adamw lr=0.002", "type=muon lr=0.004"]),  # what only one has follows from the rest
        ([ADAMW, ADAMW | {"steps": 100}], ["steps=200", "steps=100"]),  # nothing else differs
        ([ADAMW, ADAMW], []),
        ([{"env": {"API_KEY": "a"}}, {"env": {"API_KEY": "b"}}], ["API_KEY=***", "API_KEY=***"]),
        ([{"seed": 1, "note": "x" * 40}, {"seed": 2, "note": "y" * 40}], []),  # too long
        ([ADAMW], []),
        ([], []),
    ],
)
def test_what_tells_runs_apart_in_a_few_words(configs: list[dict[str, Any]], labels: list[str]):
    assert telling_labels(configs) == labels


def test_keys_that_differ_stand_in_the_order_of_the_first_config():
    assert list(config_differences(ADAMW, ADAMW | {"steps": 1}, MUON)) == [
        "steps", "optim.type", "optim.lr", "optim.beta1", "logging.freq", "optim.momentum",
    ]  # fmt: skip


def records(*pairs: tuple[int, float]) -> list[dict[str, float]]:
    return [{"global_step": step, "loss/out": loss} for step, loss in pairs]


def test_curves_are_compared_at_common_steps_and_the_newest_line_counts():
    left = [*records((1, 5.0), (2, 4.0), (3, 9.0)), {"global_step": 4}, *records((3, 3.0))]
    right = records((2, 4.0), (3, 3.5), (4, 2.0), (5, 1.0))
    assert common_curves(left, right) == [(2, 4.0, 4.0), (3, 3.0, 3.5)]


def test_a_long_curve_is_sampled_from_end_to_end():
    assert some_of(3) == [0, 1, 2]
    chosen = some_of(1000)
    assert (len(chosen), chosen[0], chosen[-1]) == (12, 0, 999)
    assert chosen == sorted(set(chosen))
