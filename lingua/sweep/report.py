"""Draw the report of a sweep: the loss against the swept keys, and all curves, as a picture and as one page.

`report.html` needs no other file and no network; `report.png` holds the same picture. The same facts give the same
bytes. A point that is not finished is marked at the upper edge and listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lingua.files import RunError
from lingua.report.diff import label, short_names, spell
from lingua.report.figure import BAD, FAINT, INK, LOG_FROM, PAPER, SOFT, STYLES, Picture, blank, counted, shown_range
from lingua.report.page import render, write
from lingua.report.series import thinned
from lingua.sweep.status import LOSS_IS, Curve, PointStatus, best_of, ranked_by, state_text
from lingua.sweep.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG, HTML = "report.png", "report.html"
AXIS_TITLES = {"loss": "training loss (nats per token)", "held_out": "held-out loss (bits per byte)"}
_MAX_DOTS = 600
"""Most points of a curve; a page cannot show more."""
_MAX_LEGEND = 24
_MAX_LISTED = 7


# -- axes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The key of the horizontal axis, and the keys that distinguish the lines."""

    x: str
    is_number: bool
    """If not, its values are placed side by side."""
    is_log: bool
    series: tuple[str, ...]
    """Keys that have several values at one place of x. Seeds are dots of one line through their mean."""


def layout_of(keys: Sequence[str], points: Sequence[Mapping[str, Any]]) -> Layout:
    """Choose the axes: x is a learning rate, else the first numeric key, else the first key; a seed only if alone."""
    wanted = sorted(keys, key=lambda key: (_ends(key, "seed"), not _is_numeric(key, points), not _ends(key, "lr")))
    x, values = wanted[0], [point[wanted[0]] for point in points]
    is_number = _is_numeric(x, points)
    is_log = is_number and min(values) > 0 and (_ends(x, "lr") or max(values) / min(values) >= LOG_FROM)
    at_x = [[point for point in points if repr(point[x]) == text] for text in dict.fromkeys(map(repr, values))]
    others = [key for key in keys if key != x and not _ends(key, "seed")]
    return Layout(x, is_number, is_log, tuple(key for key in others if any(_n_values(key, at) > 1 for at in at_x)))


def places_of(layout: Layout, points: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the position of each point on the horizontal axis."""
    values = [point[layout.x] for point in points]
    if layout.is_number:
        return values
    order = list(dict.fromkeys(map(repr, values)))
    return [float(order.index(repr(value))) for value in values]


def _is_numeric(key: str, points: Sequence[Mapping[str, Any]]) -> bool:
    numbers = all(isinstance(point[key], int | float) and not isinstance(point[key], bool) for point in points)
    return numbers and _n_values(key, points) > 1


def _ends(key: str, name: str) -> bool:
    return key.rpartition(".")[2] == name


def _n_values(key: str, points: Sequence[Mapping[str, Any]]) -> int:
    return len({repr(point[key]) for point in points})


def ticks_of(layout: Layout, places: Sequence[float]) -> tuple[list[float], bool]:
    """Return (places that get a tick, whether labels must be rotated); of two close places only the first gets one."""
    ordered = sorted(set(places))
    spots = [math.log(place) for place in ordered] if layout.is_log else ordered
    width, chosen = (spots[-1] - spots[0]) or 1.0, [0]
    chosen += [i for i in range(1, len(spots)) if spots[i] - spots[i - 1] >= 0.045 * width]
    narrow = any(spots[b] - spots[a] < 0.11 * width for a, b in itertools.pairwise(chosen))
    return [ordered[i] for i in chosen], narrow


def mean_line(dots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return (x, mean of y) for each x, in order."""
    at: dict[float, list[float]] = {}
    for x, y in dots:
        at.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(at.items())]


# -- the picture ---------------------------------------------------------------------------------------------------


def draw(sweep: Sweep, read: Sequence[tuple[PointStatus, Curve]], *, titled: bool = True) -> Figure:
    """Draw the losses that rank the finished points, and all curves; `titled`: with a title, for the png."""
    points = [point for point, _ in read]
    layout = layout_of(sweep.keys, sweep.points)
    places = dict(zip(sweep.numbers, places_of(layout, sweep.points), strict=True))
    colors = _colors(places)
    figure, (left, right) = blank((13, 5.2), 2, width_ratios=(1, 1.15))
    _draw_losses(left, layout, points, places, colors)
    _draw_curves(right, layout, read, colors)
    missing = [_shortened(line, 150) for line in _unfinished(points)]
    if len(missing) > _MAX_LISTED:
        missing[_MAX_LISTED - 1 :] = [f"and {len(missing) - _MAX_LISTED + 1} more that are not finished"]
    if titled:
        figure.suptitle(_headline(sweep, points), x=0.008, ha="left", fontsize=12, weight="bold")
    if titled and missing:
        figure.supxlabel("\n".join(missing), x=0.008, ha="left", fontsize=8.5, color=BAD)
    return figure


def _headline(sweep: Sweep, points: Sequence[PointStatus]) -> str:
    best, n_finished = best_of(points), sum(point.state == "finished" for point in points)
    text = f"{sweep.name}: {n_finished} of {len(points)} points finished"
    if best is None:
        return text
    field = ranked_by(points)
    loss = f"{field.replace('_', '-')} {getattr(best, field):.4f}"
    return f"{text}; best: point {best.point}, {_shortened(label(best.values))}, {loss}"


def _unfinished(points: Sequence[PointStatus]) -> list[str]:
    """Return one line per point that is not finished, with the reason."""
    missing = [point for point in points if point.state != "finished"]
    return [f"point {point.point} ({label(point.values)}) {_how(point)}" for point in missing]


def _how(point: PointStatus) -> str:
    at = f" at step {point.step:,}" if point.step else ""
    if point.cause:
        return f"{point.state}{at}: {point.cause}"
    return state_text(point) if point.state == "new" else f"is {point.state}{at}"


def _went_wrong(point: PointStatus) -> bool:
    return not point.busy and point.state not in ("finished", "new")


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _colors(places: Mapping[int, float]) -> dict[int, str]:
    """Color the points from dark for the smallest place to light for the largest, visible on light and dark pages."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    order, scale = sorted(set(places.values())), colormaps["viridis"]
    shares = {number: order.index(place) / max(1, len(order) - 1) for number, place in places.items()}
    return {number: to_hex(scale(0.3 + 0.56 * share)) for number, share in shares.items()}


def _series(layout: Layout, points: Sequence[PointStatus]) -> dict[str, list[PointStatus]]:
    found: dict[str, list[PointStatus]] = {}
    for point in points:
        found.setdefault(label({key: point.values[key] for key in layout.series}), []).append(point)
    return found


def _draw_losses(
    axes: Axes, layout: Layout, points: Sequence[PointStatus], places: Mapping[int, float], colors: Mapping[int, str]
) -> None:
    field, best = ranked_by(points), best_of(points)
    finished = [p for p in points if p.state == "finished" and getattr(p, field) is not None]
    series = _series(layout, points)
    for style, (name, line) in zip(itertools.cycle(STYLES), series.items(), strict=False):
        dots = [(places[p.point], getattr(p, field)) for p in line if p in finished]
        if layout.is_number or layout.series:
            xs, ys = zip(*mean_line(dots), strict=True) if dots else ((), ())
            axes.plot(xs, ys, style, color=FAINT, linewidth=1.2, zorder=2, label=name or None)
    for point in finished:
        axes.scatter(places[point.point], getattr(point, field), s=46, color=colors[point.point], zorder=3)
    if best is not None:
        x, y = places[best.point], getattr(best, field)
        axes.scatter([x], [y], s=230, facecolors="none", edgecolors=INK, linewidths=1.6, zorder=4)
        axes.annotate(
            f"best: {y:.4f}", (x, y), (0, -12), textcoords="offset points",
            ha="center", va="top", weight="bold", fontsize=9.5,
        )  # fmt: skip
    for place in dict.fromkeys(places.values()):
        missing = [point for point in points if point not in finished and places[point.point] == place]
        if missing:
            _mark_missing(axes, missing, place)
    axes.margins(0.12, 0.18)
    _title_places(axes, layout, points, places)
    axes.set_ylabel(AXIS_TITLES[field])
    axes.set_title("after the last step", fontsize=10.5, loc="left", pad=18)
    if layout.series and len(series) <= _MAX_LEGEND:
        axes.legend(fontsize=8.5, loc="best")


def _mark_missing(axes: Axes, points: Sequence[PointStatus], x: float) -> None:
    """Mark points without a loss at the upper edge."""
    failed = any(_went_wrong(point) for point in points)
    color, above = BAD if failed else SOFT, axes.get_xaxis_transform()
    axes.plot([x], [1.0], marker="X" if failed else "o", color=color, ms=8, mfc=color if failed else PAPER,
              transform=above, clip_on=False, linestyle="none", zorder=5)  # fmt: skip
    states = dict.fromkeys(map(state_text, points))
    axes.annotate(
        ",\n".join(states), (x, 1.0), (0, 8), xycoords=above, textcoords="offset points",
        ha="center", fontsize=8, color=color,
    )  # fmt: skip


def _title_places(axes: Axes, layout: Layout, points: Sequence[PointStatus], places: Mapping[int, float]) -> None:
    if layout.is_log:
        axes.set_xscale("log")
    names = {places[point.point]: _shortened(spell(point.values[layout.x]), 30) for point in points}
    ticks, narrow = ticks_of(layout, list(names))
    turned = {"rotation": 30, "ha": "right"} if narrow or sum(map(len, names.values())) > 50 else {}
    axes.set_xticks(ticks, [names[tick] for tick in ticks], **turned)
    axes.set_xticks([], minor=True)
    meaning = f"peak learning rate ({layout.x})" if layout.x == "optim.lr" else layout.x
    axes.set_xlabel(f"{meaning}, log scale" if layout.is_log else meaning)


def _draw_curves(
    axes: Axes, layout: Layout, read: Sequence[tuple[PointStatus, Curve]], colors: Mapping[int, str]
) -> None:
    points = [point for point, _ in read]
    best, series = best_of(points), _series(layout, points)
    styles = dict(zip(series, itertools.cycle(STYLES), strict=False))
    style_of = {point.point: styles[name] for name, line in series.items() for point in line}
    finished = [curve for point, curve in read if point.state == "finished"]
    for point, curve in read:
        if not curve.steps:
            continue
        few = thinned(np.array(curve.tokens), np.array(curve.losses), _MAX_DOTS)
        tokens, losses = few.x, few.mean
        is_best = best is not None and point.point == best.point
        how = "" if point.state == "finished" else f" ({point.state})"
        axes.plot(
            tokens, losses, style_of[point.point], color=colors[point.point],
            linewidth=2.6 if is_best else 1.3, zorder=4 if is_best else 3,
            label=_shortened(f"{point.point}: {label(point.values)}{' (best)' if is_best else how}", 48),
        )  # fmt: skip
        if _went_wrong(point):
            axes.plot(tokens[-1:], losses[-1:], "X", color=BAD, ms=7, zorder=5)
    every = [np.array(curve.losses) for _, curve in read]
    shown = shown_range([np.array(curve.losses) for curve in finished] or every, every)
    if shown is not None:
        axes.set_ylim(*shown)
    axes.xaxis.set_major_formatter(counted)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel(AXIS_TITLES["loss"])
    axes.set_title("while training (running average)", fontsize=10.5, loc="left", pad=16)
    if 0 < len(axes.get_legend_handles_labels()[0]) <= _MAX_LEGEND:
        axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


# -- the page ------------------------------------------------------------------------------------------------------


def write_report(sweep: Sweep, read: Sequence[tuple[PointStatus, Curve]], folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.png; return their paths. Raises RunError if there is nothing to show yet."""
    if not any(curve.steps for _, curve in read):
        raise RunError(
            f"no point of {sweep.folder} has reported a step yet; `lingua sweep status {sweep.folder}` shows more"
        )
    write(folder / PNG, _picture(sweep, read, titled=True).drawn("png"), "choose another folder with --out")
    write(folder / HTML, page(sweep, read), "choose another folder with --out")
    return folder / HTML, folder / PNG


def _picture(sweep: Sweep, read: Sequence[tuple[PointStatus, Curve]], *, titled: bool) -> Picture:
    return Picture("report", "Loss against what was swept", "", lambda: draw(sweep, read, titled=titled), is_wide=True)


def page(sweep: Sweep, read: Sequence[tuple[PointStatus, Curve]]) -> str:
    points = [point for point, _ in read]
    places = places_of(layout_of(sweep.keys, sweep.points), sweep.points)
    colors = _colors(dict(zip(sweep.numbers, places, strict=True)))
    return render(
        "sweep/report.html",
        title=sweep.name,
        headline=_headline(sweep, points),
        sweep=sweep,
        picture=_picture(sweep, read, titled=False),
        names=list(short_names(sweep.keys).values()),
        points=[(point, colors[point.point], state_text(point), _went_wrong(point)) for point in points],
        best=best_of(points),
        spell=spell,
        loss_is=LOSS_IS,
        held_out=any(point.held_out is not None for point in points),
        missing=_unfinished(points),
    )
