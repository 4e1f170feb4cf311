"""What is drawn, as text of pages and pictures."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from lingua.report.charts import n_pieces
from lingua.report.figure import COLORS, SERIES, Line, Picture, counted, line_chart, look, plain, shown_range
from lingua.report.series import thinned


def chart(*names: str, n: int = 1000, yscale: str = "linear") -> Picture:
    x = np.arange(float(n))
    lines = [Line(name, thinned(x, i + 2 + np.sin(x), 50), SERIES[i]) for i, name in enumerate(names)]
    picture = line_chart("k", "t", lines, "loss", yscale=yscale)
    assert picture is not None
    return picture


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (2.5e9, "2.5B"), (1e6, "1M"), (40_000, "40k"), (2e12, "2T"), (0.00025, "0.00025"), (-1500, "-1.5k")],
)
def test_numbers_are_counted_as_people_do(n: float, text: str):
    assert counted(n) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("a", "a"), ("a\n b", "a b"), ("$x^{$", r"\$x^{\$"), ("_a", " _a"), ("/long/way/to/a/run", ".../a/run")],
)
def test_names_from_outside(name: str, text: str):
    assert plain(name, 9) == text


@pytest.mark.parametrize(
    ("spans", "counts"),
    [
        ([(0, 100)], [80]),
        ([(0, 10_000)], [160]),
        ([(0, 10_000), (9_000, 10_000)], [160, 16]),
        ([(0, 2000), (0, 20), (0, 0)], [160, 5, 5]),
        ([(0, 0)], [80]),
    ],
)
def test_pieces_of_all_curves_are_about_as_long(spans: list[tuple[int, int]], counts: list[int]):
    assert n_pieces([np.arange(a, b + (b > a), dtype=float) for a, b in spans]) == counts


def test_the_steep_begin_is_cut_off():
    losses = np.array([10.0] * 5 + [3.0] * 45 + [2.0] * 50)
    assert shown_range([losses, np.array([])]) == (1.95, 3.05)
    assert shown_range([]) is None
    assert shown_range([np.array([1.0, 1.0])]) is None


@pytest.mark.parametrize("yscale", ["linear", "log"])
def test_a_picture_is_drawn_for_light_and_for_dark_pages(yscale: str):
    picture = chart("<b>$x^{$ 数", "b", yscale=yscale)
    assert picture.drawn("png").startswith(b"\x89PNG")
    light, dark = (base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode() for uri in picture.uris())
    for svg, theirs, others in ((light, 0, 1), (dark, 1, 0)):
        assert "&lt;b&gt;$x^{$" in svg
        for name in ("c0", "c1", "ink", "soft", "faint", "grid"):
            assert COLORS[name][theirs] in svg, name
            assert COLORS[name][others] not in svg, name
    assert COLORS["paper"][0] not in light, "the page's own background shows"
    assert COLORS["paper"][0] in picture.drawn("svg").decode()
    assert light.count("<text") == dark.count("<text")


def test_values_are_those_of_the_nearest_points_and_missing_where_a_curve_has_none():
    x = np.arange(0.0, 1001.0, 10.0)
    lines = [Line("a", thinned(x, 2 * x, 500), SERIES[0]), Line("b", thinned(x[:50] + 1, x[:50], 500), SERIES[1])]
    picture = line_chart("k", "t", [*lines, Line("", thinned(x, x, 500), SERIES[0], is_back=True)], "loss")
    assert picture is not None
    heading, *rows = picture.values
    assert heading == ("step", "a", "b")
    assert rows[0] == ("0", "0", "0")
    assert rows[-1] == ("1,000", "2000", "-")
    assert 2 < len(rows) <= 12
    assert line_chart("k", "t", [Line("a", thinned(x[:0], x[:0], 5), SERIES[0])], "loss") is None


@pytest.mark.parametrize(
    "names", [["a", "b"], ["debug_adamw: type=adamw lr=0.002", "b" * 32], [f"{i}:name=12" for i in range(8)]]
)
def test_the_names_of_curves_stay_inside_the_picture(names: list[str]):
    with look():
        figure = chart(*names, n=3).make()
        figure.draw_without_rendering()
        legend = figure.axes[0].get_legend()
        assert legend is not None
        assert legend.get_window_extent().x1 <= figure.bbox.x1
        assert figure.axes[0].get_position().width > 0.8  # the curves keep their room
