"""From words and blocks to points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apps.main.args import TrainArgs
from lingua.config.base import ConfigError
from lingua.config.compose import examine
from lingua.config.yaml_layers import read_yaml
from lingua.report.diff import label, spell
from lingua.sweep.grid import plain_overrides, points_of, read_axes


def grid(text: str = "{}", *words: str) -> list[dict[str, Any]]:
    """Values of each point."""
    read = read_yaml(Path("exp.yaml"), text)
    return [
        {key: value for key, (value, _) in point.items()}
        for point in points_of(read_axes(read.tree, read.marks, words))
    ]


PAIRED = """
grid:
  paired:
    - {model.dim: [8, 16], model.n_layers: [1, 2]}
    - {seed: [1, 2], data.seed: [3, 4]}
"""


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("{}", ["optim.lr=1e-3,3e-4"], [{"optim.lr": 1e-3}, {"optim.lr": 3e-4}]),
        ("{}", ["model=llama_1B,llama_7B"], [{"model": "llama_1B"}, {"model": "llama_7B"}]),
        (
            "{}",
            ["optim.lr=1,2", "model.dim=8,16", "seed=7"],
            [
                {"optim.lr": 1, "model.dim": 8},
                {"optim.lr": 1, "model.dim": 16},
                {"optim.lr": 2, "model.dim": 8},
                {"optim.lr": 2, "model.dim": 16},
            ],
        ),
        ("{}", ["plugins=[a,b]", "x='a,b'", "y={a: 1, b: 2}"], [{}]),
        ("{}", ["x=[1,2],[3]"], [{"x": [1, 2]}, {"x": [3]}]),
        ("grid: {optim.lr: [1e-3, 3e-4]}", [], [{"optim.lr": 1e-3}, {"optim.lr": 3e-4}]),
        ("grid: {optim: {lr: [1e-3]}, seed: [1, null]}", [], [{"optim.lr": 1e-3, "seed": s} for s in (1, None)]),
        ("grid: {optim.lr: [1, 2], seed: [5, 6]}", ["optim.lr=3,4", "seed=9"], [{"optim.lr": 3}, {"optim.lr": 4}]),
        (
            "grid: {paired: {model.dim: [8, 16], model: {n_layers: [1, 2]}}}",
            [],
            [{"model.dim": 8, "model.n_layers": 1}, {"model.dim": 16, "model.n_layers": 2}],
        ),
        (
            PAIRED,
            [],
            [
                {"model.dim": d, "model.n_layers": n, "seed": s, "data.seed": t}
                for d, n in ((8, 1), (16, 2))
                for s, t in ((1, 3), (2, 4))
            ],
        ),
        ("{}", [], [{}]),
    ],
)
def test_points(text: str, words: list[str], expected: list[dict[str, Any]]):
    assert grid(text, *words) == expected


@pytest.mark.parametrize(
    ("text", "words", "problems"),
    [
        ("grid: {optim.lr: 1e-3}", [], ["exp.yaml:1: grid.optim.lr is 1e-3; write a list: [1e-3]"]),
        ("grid:\n  model: base", [], ["exp.yaml:2: grid.model is 'base'; write a list: [base]"]),
        ("grid: {a: 1e-3, b: []}", [], ["write a list", "grid.b is an empty list"]),
        ("grid: [1, 2]", [], ["exp.yaml:1: grid is [1, 2]; write keys with lists of values below it"]),
        ("grid: {paired: {a: [1, 2], b: [1]}}", [], ["as many values of each key, but a has 2, b has 1"]),
        ("grid: {paired: [a]}", [], ["grid.paired is 'a'; write keys with lists"]),
        ("grid: {a: [1, 2], paired: {a: [1, 2], b: [1, 2]}}", [], ["grid: a is given twice"]),
        ("grid: {a: [1, 1]}", [], ["exp.yaml:1: a 1 is given twice"]),
        ("grid: {paired: {a: [1, 2], b: [1, 2]}}", ["a=3"], ["a is one of grid.paired (a, b); change it there"]),
        (
            "grid: {launcher: {nodes: [1, 2]}}",
            [],
            ["exp.yaml:1: launcher.nodes cannot be swept: the points are tasks of"],
        ),
        (
            "{}",
            ["launcher.exclude=n1,n2"],
            ["(quote a comma that belongs to the value: launcher.exclude='\"a,b\"')"],
        ),
        ("{}", ["optim.lr=1e-3,0.001"], ["optim.lr 0.001 is given twice"]),
        ("{}", ["name=a,b"], ["name cannot be swept: each point has its own"]),
        ("{}", ["app=apps.a,apps.b"], ["app cannot be swept"]),
    ],
)
def test_what_is_refused_and_where(text: str, words: list[str], problems: list[str]):
    with pytest.raises(ConfigError) as refused:
        grid(text, *words)
    assert len(refused.value.problems) == len(problems), refused.value.problems
    for said, expected in zip(refused.value.problems, problems, strict=True):
        assert expected in said


def test_words_that_are_the_same_for_all_points():
    assert plain_overrides(["a=1", "b=1,2", "c=[1,2]", "d=x: [", "e="]) == ["a=1", "c=[1,2]", "d=x: [", "e="]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (1e-3, "0.001"),
        (3e-5, "3e-05"),
        (0.1 + 0.2, "0.30000000000000004"),
        ("a b", "a b"),
        (True, "true"),
        ([1], "[1]"),
    ],
)
def test_values_as_people_write_them(value: Any, told: str):
    assert spell(value) == told


def test_a_label_is_short_where_it_can_be():
    assert label({"optim.lr": 1e-3, "model.dim": 8}) == "lr=0.001 dim=8"
    assert label({"data.seed": 1, "seed": 2, "optim.lr": 3.0}) == "data.seed=1 seed=2 lr=3"


def test_a_point_keeps_the_spelling_where_the_key_is_text() -> None:
    points = points_of(read_axes({}, {}, ["env.NCCL_DEBUG=08,1.10"]))
    examined = [examine(None, [], [], TrainArgs, point).composed for point in points]
    assert [each and each.args.env.NCCL_DEBUG for each in examined] == ["08", "1.10"]
