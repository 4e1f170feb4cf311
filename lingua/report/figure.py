"""Draw pictures with matplotlib in the colors of a light or a dark page, and write them as PNG or SVG.

The same facts give the same bytes. matplotlib is imported when a picture is drawn; it needs no display.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lingua.files import RunError
from lingua.report.series import Numbers, Thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL, WIDE = (5.6, 3.3), (11.2, 4.0)  # inches; 9 points are readable at a page's width (small: also on a phone)
LOG_FROM = 8  # ratio of the largest to the smallest value above which an axis is logarithmic
N_VALUES = 12  # rows in the table below a line chart
STYLES = ("-", "--", ":", "-.")

COLORS = {
    "c0": ("#2f6fb3", "#6cacf0"), "c1": ("#d9772b", "#f5a35c"), "c2": ("#3a9b62", "#6fd09a"),
    "c3": ("#8460b5", "#b596e8"), "c4": ("#c7609f", "#f092c9"), "c5": ("#2a9aa5", "#62cfda"),
    "c6": ("#8c6d4f", "#c7a582"), "c7": ("#a3991f", "#d6cb55"),
    "ink": ("#1d1d1e", "#e8e8e9"), "soft": ("#6a6a6b", "#a0a0a1"), "grid": ("#e4e4e5", "#37373a"),
    "paper": ("#fffffe", "#18181a"), "bad": ("#c1121f", "#ff6b6b"), "good": ("#2e8b57", "#5fc98d"),
    "faint": ("#b9b9ba", "#5c5c5f"),
}  # fmt: skip
"""(light, dark) by name. `look` makes one of them matplotlib's color cycle, so C8 is `ink` of the current page."""
SERIES = [f"C{i}" for i in range(8)]
INK, SOFT, GRID, PAPER, BAD, GOOD, FAINT = (f"C{i}" for i in range(8, 15))

_MAX_LEGEND, _LETTERS_PER_INCH = 16, 13  # curves in a legend; letters that fit beside the vertical axis
_METADATA = {"svg": dict.fromkeys(("Creator", "Date", "Format", "Type")), "png": {"Software": None}}


NO_PICTURES = (
    "matplotlib, which draws pictures, is not installed; type `uv sync --extra plots` or `pip install matplotlib`"
)


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def must_draw() -> None:
    """Raise RunError if pictures cannot be drawn."""
    if not can_draw():
        raise RunError(NO_PICTURES)


@dataclass(frozen=True)
class Picture:
    """A figure, drawn for each format and color scheme, with its title and note."""

    key: str  # file name without suffix
    title: str
    note: str
    make: Callable[[], Figure]
    is_wide: bool = False
    values: Sequence[Sequence[str]] = ()  # some points of a line chart as a table, after its heading

    def drawn(self, kind: str) -> bytes:
        """Draw it as `svg` or `png`, in light colors."""
        with look():
            return _written(self.make(), kind)

    def uris(self) -> list[str]:
        """Draw it for light and for dark pages, each as a data URI of the SVG."""
        found, places = [], []
        for dark in (False, True):
            with look(dark=dark):
                figure = self.make()
                if places:  # the layout takes as long as drawing, so reuse it
                    figure.set_layout_engine("none")
                    for axes, place in zip(figure.axes, places, strict=True):
                        axes.set_position(place)
                text = base64.b64encode(_written(figure, "svg", transparent=True)).decode()
                found.append(f"data:image/svg+xml;base64,{text}")
                places = [axes.get_position() for axes in figure.axes]
        return found


def _written(figure: Figure, kind: str, *, transparent: bool = False) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, transparent=transparent, metadata=_METADATA[kind])
    return file.getvalue()


@contextmanager
def look(*, dark: bool = False) -> Iterator[None]:
    """Set colors and fonts for the figures that are made and written inside."""
    must_draw()
    from cycler import cycler
    from matplotlib import rc_context

    colors, style = cycler(color=[pair[dark] for pair in COLORS.values()]), Path(__file__).with_name("style.mplstyle")
    with rc_context({"axes.prop_cycle": colors}, fname=style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may use any script
        yield


def blank(size: tuple[float, float], n_columns: int = 1, **more: Any) -> tuple[Figure, Any]:
    """Make a figure with axes side by side. Call inside `look()`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(1, n_columns, **more)


class Line(NamedTuple):
    """A curve or a set of dots."""

    name: str
    points: Thinned
    color: str
    style: str = "-"
    dots: bool = False  # few points, each drawn
    is_back: bool = False  # faint, behind the others, and not in the table of values


def line_chart(
    key: str, title: str, lines: Sequence[Line], y_title: str, note: str = "", *, percent: bool = False, **axis: Any
) -> Picture | None:
    """Describe a chart of curves over a common axis; None if no curve has a point. `axis`: arguments of `Axes.set`."""
    lines = [line for line in lines if len(line.points.x)]
    if not lines:
        return None

    def make() -> Figure:
        from matplotlib.ticker import PercentFormatter

        figure, axes = blank(SMALL)
        for name, (x, mean, low, high), color, style, dots, is_back in lines:
            front = 1 if is_back else 3
            if (low < high).any():
                axes.fill_between(x, low, high, color=color, alpha=0.22, linewidth=0, zorder=front)
            marker = {"marker": "o", "markersize": 4.5} if dots or len(x) == 1 else {}
            axes.plot(
                x, mean, style, color=color, linewidth=1.0 if is_back else 1.6, zorder=front + 1,
                label=plain(name, 44) or None, **marker,
            )  # fmt: skip
        axes.set(xlabel=x_title, ylabel=y_title, **axis)
        axes.xaxis.set_major_formatter(counted)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0) if percent else counted)
        legend(axes)
        return figure

    x_title, front = axis.pop("xlabel", "step"), [line for line in lines if not line.is_back]
    return Picture(key, title, note, make, values=_values_of(front, x_title, y_title, ".1%" if percent else ".5g"))


def _values_of(lines: Sequence[Line], x_title: str, y_title: str, form: str) -> list[Sequence[str]]:
    """Tabulate the curves at a few places, with the value of the nearest point, or - if that is far away."""
    if not lines:
        return []
    every = np.unique(np.concatenate([line.points.x for line in lines]))
    places = every[np.linspace(0, len(every) - 1, min(len(every), N_VALUES)).astype(int)]
    reach = max(np.diff(places), default=0.0) / 2
    rows: list[Sequence[str]] = [(x_title, *(line.name or y_title for line in lines))]
    for x in places.tolist():
        nearest = [(line.points, int(np.abs(line.points.x - x).argmin())) for line in lines]
        values = (format(points.mean[i], form) if abs(points.x[i] - x) <= reach else "-" for points, i in nearest)
        rows.append((format(x, ",.0f" if x >= 100 else ".3g"), *values))
    return rows


def plain(name: str, length: int = 28) -> str:
    """Make a name safe for a picture: one short line that keeps its end and is never parsed as a formula."""
    name = " ".join(name.split())
    name = name if len(name) <= length else "..." + name[3 - length :]
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")  # matplotlib would omit "_..."


def legend(axes: Axes, width: float = SMALL[0]) -> None:
    """Add a legend above a picture of `width` inches, if it has several curves, but not too many."""
    named = [name for name in axes.get_legend_handles_labels()[1] if not name.startswith("_")]
    if 1 < len(named) <= _MAX_LEGEND:
        letters = max(map(len, named)) + 6  # and a piece of the curve, and a gap
        n_columns = min(len(named), int(_LETTERS_PER_INCH * width / letters))
        axes.legend(bbox_to_anchor=(0, 1.0), ncols=max(1, n_columns))


def shown_range(curves: Sequence[Numbers], lowest: Sequence[Numbers] = ()) -> tuple[float, float] | None:
    """Return the vertical range for losses, without the first twentieth of each curve, but with all of `lowest`."""
    shown = [curve[len(curve) // 20 :] for curve in curves if len(curve)]
    if not shown:
        return None
    low, high = min(float(curve.min()) for curve in shown), max(float(curve.max()) for curve in shown)
    below = [low - 0.05 * (high - low), *(float(curve.min()) for curve in lowest if len(curve))]
    return (min(below), high + 0.05 * (high - low)) if high > low else None


def counted(n: float, _: float | None = None) -> str:
    """Format 2500000000 as `2.5B`; also usable as a tick formatter of matplotlib."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:.4g}"
