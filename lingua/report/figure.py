"""Pictures for reports: drawn once by matplotlib, as PNG and as SVG that follows the page's colours.

Promise: the same facts make the same bytes. An SVG stands in the page itself, takes text and colours from it (so it is
dark where the page is), and needs no other file; text in it is text. Long curves come thinned (`series.py`).
Cost: matplotlib, a second or two, imported when something is drawn; no display.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lingua.report.series import Numbers, Thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
SMALL, WIDE = (5.6, 3.3), (11.2, 4.0)
"""Inches; 9 points are readable in both, at the width of a page (small: also of a phone)."""
LOG_FROM = 8
"""A logarithmic axis where the largest value is so many times the smallest."""

# Light, dark. In a picture the light ones stand for themselves; in a page `var(--name)` takes their place.
COLORS = {
    "ink": ("#1d1d1e", "#e8e8e9"),
    "soft": ("#6a6a6b", "#a0a0a1"),
    "grid": ("#e4e4e5", "#37373a"),
    "paper": ("#fffffe", "#18181a"),
    "bad": ("#c1121f", "#ff6b6b"),
    "good": ("#2e8b57", "#5fc98d"),
    "faint": ("#b9b9ba", "#5c5c5f"),
    "c0": ("#2f6fb3", "#6cacf0"),
    "c1": ("#d9772b", "#f5a35c"),
    "c2": ("#3a9b62", "#6fd09a"),
    "c3": ("#8460b5", "#b596e8"),
    "c4": ("#c7609f", "#f092c9"),
    "c5": ("#2a9aa5", "#62cfda"),
    "c6": ("#8c6d4f", "#c7a582"),
    "c7": ("#a3991f", "#d6cb55"),
}
SERIES = [COLORS[f"c{i}"][0] for i in range(8)]
INK, SOFT, GRID, PAPER, BAD, GOOD, FAINT = (
    COLORS[name][0] for name in ("ink", "soft", "grid", "paper", "bad", "good", "faint")
)
_MAX_LEGEND = 16
_LETTERS_PER_INCH = 13
"""Of a legend; beside the axis' own title and numbers."""
STYLES = ("-", "--", ":", "-.")

LOOK: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": FAINT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "lingua",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Line:
    """A curve, or dots."""

    name: str
    points: Thinned
    color: str
    style: str = "-"
    dots: bool = False
    """Few points, each to be seen."""
    is_back: bool = False
    """Faint, behind the others, without a name of its own in the readings."""


@dataclass(frozen=True)
class Chart:
    """One picture: curves over a common axis."""

    key: str
    """Name of its file, without the ending."""
    title: str
    note: str
    x_title: str
    y_title: str
    lines: Sequence[Line]
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    percent: bool = False


def draw(chart: Chart) -> Figure:
    """A line chart."""
    from matplotlib.ticker import PercentFormatter

    figure, axes = blank(SMALL)
    for line in chart.lines:
        _draw_line(axes, line)
    if chart.log_y:
        axes.set_yscale("log")
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    axes.xaxis.set_major_formatter(lambda value, _: counted(value))
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        axes.yaxis.set_major_formatter(lambda value, _: counted(value))
    axes.set_xlabel(chart.x_title)
    axes.set_ylabel(chart.y_title)
    legend(axes)
    return figure


def blank(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure with one pair of axes. Call inside `look()`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    return figure, figure.subplots()


@contextmanager
def look() -> Iterator[None]:
    """Context in which figures are made and written."""
    from matplotlib import rc_context

    with rc_context(LOOK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may be in any script
        yield


def _draw_line(axes: Axes, line: Line) -> None:
    points, front = line.points, 1 if line.is_back else 3
    if not points.is_whole:
        axes.fill_between(points.x, points.low, points.high, color=line.color, alpha=0.22, linewidth=0, zorder=front)
    style: dict[str, Any] = {"color": line.color, "zorder": front + 1, "label": plain(line.name, 44) or None}
    if line.dots or len(points.x) == 1:
        style |= {"marker": "o", "markersize": 4.5}
    axes.plot(points.x, points.mean, line.style, linewidth=1.0 if line.is_back else 1.6, **style)


def plain(name: str, length: int = 28) -> str:
    """A name from outside as text of a picture: on one line, short, its end kept, nothing of it taken for a formula."""
    name = " ".join(name.split())
    name = name if len(name) <= length else "..." + name[3 - length :]
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")  # "_": matplotlib would leave it out


def legend(axes: Axes) -> None:
    """Names above the picture, where there are several curves, and not too many."""
    named = [name for name in axes.get_legend_handles_labels()[1] if not name.startswith("_")]
    if 1 < len(named) <= _MAX_LEGEND:
        figure = axes.get_figure(root=True)
        assert figure is not None
        room = _LETTERS_PER_INCH * figure.get_figwidth()
        n_columns = max(
            1, min(len(named), int(room / (max(map(len, named)) + 6)))
        )  # 6: a piece of the curve, and a gap
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=n_columns, borderaxespad=0.3, handlelength=1.6)


def shown_range(curves: Sequence[Numbers]) -> tuple[float, float] | None:
    """Range of the vertical axis of losses: what comes before the first twentieth of a curve does not stretch it."""
    shown = [curve[len(curve) // 20 :] for curve in curves if len(curve)]
    if not shown:
        return None
    low, high = min(float(curve.min()) for curve in shown), max(float(curve.max()) for curve in shown)
    return (low - 0.05 * (high - low), high + 0.05 * (high - low)) if high > low else None


def counted(n: float) -> str:
    """2500000000 -> `2.5B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:.4g}"


# -- written -------------------------------------------------------------------------------------------------------


def png_of(figure: Figure) -> bytes:
    file = io.BytesIO()
    with look():
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def svg_of(figure: Figure, label: str, prefix: str) -> str:
    """An `<svg>` element for a page of `webpage.py`, described for those who cannot see it.

    `prefix`: of the names of its parts; pictures of one page must not share them, and matplotlib calls a part of each
    `figure_1`, say.
    """
    file = io.StringIO()
    with look():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    names = {light: name for name, (light, _) in COLORS.items()}
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0], svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def readings(figure: Figure, chart: Chart) -> dict[str, Any]:
    """What the page shows where one points at: the place of the axes in the picture, and the points."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    place = axes.get_position()
    return {
        "box": [_short(v) for v in (place.x0, place.x1, 1 - place.y1, 1 - place.y0)],
        "x": [_short(v) for v in axes.get_xlim()],
        "percent": chart.percent,
        "series": [
            {
                "name": line.name or chart.y_title,
                "color": next(name for name, (light, _) in COLORS.items() if light == line.color),
                "x": [_short(v) for v in line.points.x.tolist()],
                "y": [_short(v) for v in line.points.mean.tolist()],
            }
            for line in chart.lines
            if not line.is_back
        ],
    }


def _short(value: float) -> float | None:
    """Six digits are more than a picture tells."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
