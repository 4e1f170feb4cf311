"""What is drawn against what, and the page around it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lingua.files import RunError
from lingua.sweep.report import layout_of, mean_line, places_of, ticks_of, write_report
from lingua.sweep.status import Curve, PointStatus
from lingua.sweep.sweep import Sweep

LR, DIM, SEED, MODEL = "optim.lr", "model.dim", "seed", "model"


def product(**values: list[Any]) -> tuple[list[str], list[dict[str, Any]]]:
    names = {"lr": LR, "dim": DIM, "seed": SEED, "model": MODEL}
    points: list[dict[str, Any]] = [{}]
    for name, each in values.items():
        points = [{**point, names[name]: value} for point in points for value in each]
    return [names[name] for name in values], points


@pytest.mark.parametrize(
    ("swept", "x", "is_number", "is_log", "series"),
    [
        (product(lr=[1e-3, 2e-3]), LR, True, True, ()),
        (product(dim=[512, 1024], lr=[1e-3, 2e-3]), LR, True, True, (DIM,)),
        (product(dim=[512, 1024]), DIM, True, False, ()),
        (product(dim=[64, 1024]), DIM, True, True, ()),
        (product(lr=[0.0, 1e-3]), LR, True, False, ()),
        (product(model=["a", "b"]), MODEL, False, False, ()),
        (product(model=["a", "b"], seed=[1, 2]), MODEL, False, False, ()),
        (product(seed=[1, 2]), SEED, True, False, ()),
        (product(model=["a", "b"], dim=[1, 2], seed=[1, 2]), DIM, True, False, (MODEL,)),
        (([DIM, LR], [{DIM: 512, LR: 1e-3}, {DIM: 1024, LR: 5e-4}]), LR, True, True, ()),  # paired: one line
        (([LR], [{LR: 1e-3}, {LR: "auto"}]), LR, False, False, ()),
    ],
)
def test_what_is_drawn_against_what(swept: Any, x: str, is_number: bool, is_log: bool, series: tuple[str, ...]):
    layout = layout_of(*swept)
    assert (layout.x, layout.is_number, layout.is_log, layout.series) == (x, is_number, is_log, series)


def test_places():
    keys, points = product(model=["b", "a"], seed=[1, 2])
    assert places_of(layout_of(keys, points), points) == [0, 0, 1, 1]
    keys, points = product(lr=[1e-3, 1e-4])
    assert places_of(layout_of(keys, points), points) == [1e-3, 1e-4]


@pytest.mark.parametrize(
    ("values", "ticks", "narrow"),
    [
        ([1e-4, 3e-4, 1e-3], [1e-4, 3e-4, 1e-3], False),
        ([1e-3, 1e-3, 2e-3], [1e-3, 2e-3], False),
        ([1e-4, 3e-4, 3.1e-4, 1e-3, 1e3], [1e-4, 3e-4, 1e-3, 1e3], True),  # 3.1e-4 would cover 3e-4
    ],
)
def test_names_below_the_axis_do_not_cover_each_other(values: list[float], ticks: list[float], narrow: bool):
    assert ticks_of(layout_of([LR], [{LR: value} for value in values]), values) == (ticks, narrow)


def test_lines_go_through_means():
    assert mean_line([(2, 5.0), (1, 1.0), (2, 7.0)]) == [(1, 1.0), (2, 6.0)]
    assert mean_line([]) == []


def test_a_report(tmp_path: Path):
    keys, points = product(lr=[1e-3, 3e-3, 1.0], model=["<a&b>"])
    sweep = Sweep(tmp_path, "rates </title>", ["exp.yaml", "optim.lr=1e-3,3e-3,1"], keys, points)
    curve = Curve([1, 2], [64.0, 128.0], [4.0, 3.0])
    finished = [
        PointStatus(i, points[i - 1], f"out/{i}", "finished", None, "", 2, 2, loss, loss, 2, None, None, "", "", False)
        for i, loss in ((1, 3.25), (2, 3.0))
    ]
    cause = "nan: the loss of step 2 is <nan>"
    failed = PointStatus(3, points[2], "out/3", "failed", "nan", cause, 1, 2, 9.0, 9.0, 1, None, None, "", "", False)
    read = [*((point, curve) for point in finished), (failed, Curve([1], [64.0], [9.0]))]
    page, picture = write_report(sweep, read, tmp_path / "report")
    text = page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        "rates &lt;/title&gt;: 2 of 3 points finished; best: point 2, lr=0.003 model=&lt;a&amp;b&gt;, loss 3.0000"
        in text
    )
    assert "point 3 (lr=1 model=&lt;a&amp;b&gt;) failed at step 1: nan: the loss of step 2 is &lt;nan&gt;" in text
    assert re.findall(r'<tr class="best">\s*.*?</i>(\d)', text) == ["2"]
    assert text.count('class="bad">failed (nan)') == 1
    needed = re.findall(r'(?:src|href|srcset)="([^"]*)"|url\(([^)]*)\)|(@import|<script)', text)
    assert needed, "the picture, for light and for dark pages"
    assert all("".join(each).startswith("data:") for each in needed), "the page needs no other file"
    before = page.read_bytes(), picture.read_bytes()
    write_report(sweep, read, tmp_path / "report")
    assert (page.read_bytes(), picture.read_bytes()) == before
    nothing = [(point, Curve([], [], [])) for point, _ in read]
    with pytest.raises(RunError, match="has reported a step yet"):
        write_report(sweep, nothing, tmp_path)
