"""What is drawn, as text of pages and pictures."""

from __future__ import annotations

import numpy as np
import pytest

from lingua.report.figure import SERIES, Chart, Line, counted, draw, look, plain, png_of, readings, shown_range, svg_of
from lingua.report.series import thinned


@pytest.mark.parametrize(
    ("n", "told"),
    [(0, "0"), (2.5e9, "2.5B"), (1e6, "1M"), (40_000, "40k"), (2e12, "2T"), (0.00025, "0.00025"), (-1500, "-1.5k")],
)
def test_numbers_are_counted_as_people_do(n: float, told: str):
    assert counted(n) == told


@pytest.mark.parametrize(
    ("name", "told"),
    [("a", "a"), ("a\n b", "a b"), ("$x^{$", r"\$x^{\$"), ("_a", " _a"), ("/long/way/to/a/run", ".../a/run")],
)
def test_names_from_outside(name: str, told: str):
    assert plain(name, 9) == told


def test_the_steep_begin_is_cut_off():
    losses = np.array([10.0] * 5 + [3.0] * 45 + [2.0] * 50)
    assert shown_range([losses, np.array([])]) == (1.95, 3.05)
    assert shown_range([]) is None
    assert shown_range([np.array([1.0, 1.0])]) is None


@pytest.mark.parametrize("log_y", [False, True])
def test_a_picture_in_a_page(log_y: bool):
    x = np.arange(1000.0)
    lines = [Line("<b>$x^{$ 数", thinned(x, 2 + np.sin(x), 50), SERIES[0]), Line("b", thinned(x, x + 1, 50), SERIES[1])]
    chart = Chart("k", "t", "", "step", "loss", lines, log_y=log_y)
    with look():
        figure = draw(chart)
        told = readings(figure, chart)
        svg = svg_of(figure, 'a "label"', "p7")
        assert png_of(figure).startswith(b"\x89PNG")
    assert svg.startswith('<svg role="img" aria-label="a &quot;label&quot;"')
    assert "&lt;b&gt;$x^{$" in svg
    assert "var(--c0)" in svg
    assert SERIES[0] not in svg
    assert 'id="figure' not in svg
    left, right, top, bottom = told["box"]
    assert 0 < left < right < 1
    assert 0 < top < bottom < 1
    assert [(one["name"], one["color"], len(one["x"])) for one in told["series"]] == [
        ("<b>$x^{$ 数", "c0", 50),
        ("b", "c1", 50),
    ]


@pytest.mark.parametrize(
    "names", [["a", "b"], ["debug_adamw: type=adamw lr=0.002", "b" * 32], [f"{i}:name=12" for i in range(9)]]
)
def test_the_names_of_curves_stay_inside_the_picture(names: list[str]):
    x = np.arange(3.0)
    lines = [Line(name, thinned(x, x, 5), SERIES[0]) for name in names]
    with look():
        figure = draw(Chart("k", "t", "", "step", "loss", lines))
        figure.draw_without_rendering()
        legend = figure.axes[0].get_legend()
        assert legend is not None
        assert legend.get_window_extent().x1 <= figure.bbox.x1
        assert figure.axes[0].get_position().width > 0.8  # the curves keep their room
