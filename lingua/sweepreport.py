"""The report of a sweep: the loss against what was swept, and the curves, as a picture and as one page.

Promise: `report.html` needs no other file and no network; `report.png` holds the same picture. The same facts make
the same bytes. A point that is not finished has no place among the figures: it is marked at the upper edge and listed.
Cost: matplotlib, a second or two, imported here only; no torch, no display.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingua.files import DISK, RunError, write_whole
from lingua.grid import label, short_names, spell
from lingua.sweep import Sweep
from lingua.sweepstatus import LOSS_IS, Curve, PointStatus, best_of, ranked_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG, HTML = "report.png", "report.html"
AXIS_TITLES = {"loss": "training loss (nats per token)", "held_out": "held-out loss (bits per byte)"}
_DPI = 150
_MAX_DOTS = 600
"""Of a curve: more cannot be told apart on a page."""
_MAX_LEGEND = 24
_LOG_FROM = 8
"""A logarithmic axis where the largest value is so many times the smallest."""
_BAD, _OPEN = "#c1121f", "#7a7a7a"
_STYLES = ("-", "--", ":", "-.")


# -- what is drawn against what: pure ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which key is the horizontal axis, and what tells the lines in the picture apart."""

    x: str | None
    """None: no swept key is a number, so the points stand side by side."""
    is_log: bool
    series: tuple[str, ...]
    """Keys that take several values at one place of x."""


def layout_of(keys: Sequence[str], points: Sequence[Mapping[str, Any]]) -> Layout:
    """A learning rate is the horizontal axis, else the first key whose values are numbers."""
    numeric = [key for key in keys if all(_is_number(point[key]) for point in points) and _n_values(key, points) > 1]
    x = next((key for key in numeric if _is_rate(key)), numeric[0] if numeric else None)
    if x is None:
        return Layout(None, False, ())
    values = [point[x] for point in points]
    is_log = min(values) > 0 and (_is_rate(x) or max(values) / min(values) >= _LOG_FROM)
    others = [key for key in keys if key != x]
    at_x = [[point for point in points if point[x] == value] for value in dict.fromkeys(values)]
    return Layout(x, is_log, tuple(key for key in others if any(_n_values(key, group) > 1 for group in at_x)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rate(key: str) -> bool:
    return key.rpartition(".")[2] == "lr"


def _n_values(key: str, points: Sequence[Mapping[str, Any]]) -> int:
    return len({repr(point[key]) for point in points})


def thinned(curve: Curve, n_wanted: int = _MAX_DOTS) -> tuple[list[float], list[float]]:
    """(tokens, losses) at no more than so many places, the last one among them."""
    every = max(1, math.ceil(len(curve.steps) / n_wanted))
    chosen = [i for i in range(len(curve.steps)) if (len(curve.steps) - 1 - i) % every == 0]
    return [curve.tokens[i] for i in chosen], [curve.losses[i] for i in chosen]


def highest_shown(curves: Sequence[Curve]) -> float | None:
    """Upper end of the axis of curves: what comes before the first twentieth of a run is cut off."""
    shown = [loss for curve in curves for loss in curve.losses[len(curve.losses) // 20 :]]
    return max(shown, default=None)


# -- the picture ---------------------------------------------------------------------------------------------------


def draw(sweep: Sweep, read: Sequence[tuple[PointStatus, Curve]]) -> Figure:
    """Left: the ranking figure of the finished points. Right: all curves."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = [point for point, _ in read]
    layout = layout_of(sweep.keys, sweep.points)
    colors = _colors(layout, points)
    with rc_context(_LOOK):
        figure = Figure(figsize=(13, 5.2), dpi=_DPI, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_figures(left, layout, points, colors)
        _draw_curves(right, layout, read, colors)
        figure.suptitle(_headline(sweep, points), x=0.008, ha="left", fontsize=12, weight="bold")
        missing = list(_unfinished(points))
        if missing:
            figure.supxlabel("\n".join(missing), x=0.008, ha="left", fontsize=8.5, color=_BAD)
    return figure


_LOOK: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "lingua",
    "svg.fonttype": "path",
}


def _headline(sweep: Sweep, points: Sequence[PointStatus]) -> str:
    best, n_finished = best_of(points), sum(point.state == "finished" for point in points)
    told = f"{sweep.name}: {n_finished} of {len(points)} points finished"
    if best is None:
        return told
    figure = getattr(best, ranked_by(points))
    return f"{told}; best: point {best.point}, {_shortened(label(best.values))}, {figure:.4f}"


def _unfinished(points: Sequence[PointStatus], n_shown: int = 6) -> Iterator[str]:
    """A line per point without a figure."""
    missing = [point for point in points if point.state != "finished"]
    for point in missing[:n_shown]:
        yield _shortened(f"point {point.point} ({label(point.values)}) {_how(point)}", 150)
    if len(missing) > n_shown:
        yield f"and {len(missing) - n_shown} more that are not finished"


def _how(point: PointStatus) -> str:
    """Why a point has no figure."""
    at = f" at step {point.step:,}" if point.step else ""
    if point.cause:
        return f"{point.state}{at}: {point.cause}"
    return {"new": "never ran"}.get(point.state, f"is {point.state}{at}")


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _colors(layout: Layout, points: Sequence[PointStatus]) -> dict[int, Any]:
    """Of each point: dark for the smallest value of x, light for the largest."""
    from matplotlib import colormaps

    places = [point.values[layout.x] if layout.x else point.point for point in points]
    order = sorted(dict.fromkeys(places))
    scale = colormaps["viridis"]
    return {
        point.point: scale(0.88 * order.index(place) / max(1, len(order) - 1))
        for point, place in zip(points, places, strict=True)
    }


def _series(layout: Layout, points: Sequence[PointStatus]) -> dict[str, list[PointStatus]]:
    """Points by what tells their lines apart, in order of x."""
    found: dict[str, list[PointStatus]] = {}
    x = layout.x
    for point in points if x is None else sorted(points, key=lambda point: point.values[x]):
        found.setdefault(label({key: point.values[key] for key in layout.series}), []).append(point)
    return found


def _draw_figures(axes: Axes, layout: Layout, points: Sequence[PointStatus], colors: Mapping[int, Any]) -> None:
    """The figure of each finished point over its place."""
    field, best = ranked_by(points), best_of(points)
    place = {point.point: point.values[layout.x] if layout.x else point.point for point in points}
    finished = [p for p in points if p.state == "finished" and getattr(p, field) is not None]
    series = _series(layout, points)
    for style, (name, line) in zip(_cycled(_STYLES, len(series)), series.items(), strict=True):
        done = [point for point in line if point in finished]
        xs, ys = [place[p.point] for p in done], [getattr(p, field) for p in done]
        if layout.x is not None:
            axes.plot(xs, ys, style, color="#9a9a9a", linewidth=1.2, zorder=2, label=name or None)
        axes.scatter(xs, ys, s=46, c=[colors[p.point] for p in done], zorder=3)
    if best is not None:
        x, y = place[best.point], getattr(best, field)
        axes.scatter([x], [y], s=230, facecolors="none", edgecolors="black", linewidths=1.6, zorder=4)
        text = f"best: {y:.4f}"
        axes.annotate(text, (x, y), (0, 14), textcoords="offset points", ha="center", weight="bold", fontsize=9.5)
    for point in points:
        if point not in finished:
            _mark_missing(axes, point, place[point.point])
    axes.margins(0.12, 0.16)
    _title_places(axes, layout, points, place)
    axes.set_ylabel(AXIS_TITLES[field])
    axes.set_title("after the last step", fontsize=10.5, loc="left", pad=16)
    if layout.series and len(series) <= _MAX_LEGEND:
        axes.legend(fontsize=8.5)


def _mark_missing(axes: Axes, point: PointStatus, x: float) -> None:
    """A sign above the upper edge, at the point's place."""
    open_ = point.busy or point.state == "new"
    above = axes.get_xaxis_transform()
    color = _OPEN if open_ else _BAD
    axes.plot([x], [1.0], marker="o" if open_ else "X", color=color, ms=8, mfc="none" if open_ else color,
              transform=above, clip_on=False, linestyle="none", zorder=5)  # fmt: skip
    axes.annotate(
        f"{point.state} ({point.kind})" if point.kind and not open_ else point.state,
        (x, 1.0), (0, 8), xycoords=above, textcoords="offset points", ha="center", fontsize=8, color=color,
    )  # fmt: skip


def _title_places(axes: Axes, layout: Layout, points: Sequence[PointStatus], place: Mapping[int, float]) -> None:
    """The horizontal axis: a tick at each swept value."""
    if layout.is_log:
        axes.set_xscale("log")
    ticks = sorted(dict.fromkeys(place.values()))
    if layout.x is None:
        names = [f"{point.point}: {_shortened(label(point.values), 30)}" for point in points]
        axes.set_xticks(ticks, names, rotation=25, ha="right", fontsize=8.5)
        axes.set_xlabel("point")
        return
    rotated = {"rotation": 30, "ha": "right"} if len(ticks) > 6 else {}
    axes.set_xticks(ticks, [spell(tick) for tick in ticks], **rotated)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"{_meaning(layout.x)}{', logarithmic' if layout.is_log else ''}")


def _meaning(key: str) -> str:
    return f"peak learning rate ({key})" if key == "optim.lr" else key


def _draw_curves(
    axes: Axes, layout: Layout, read: Sequence[tuple[PointStatus, Curve]], colors: Mapping[int, Any]
) -> None:
    from matplotlib.ticker import EngFormatter

    points = [point for point, _ in read]
    best, series = best_of(points), _series(layout, points)
    styles = dict(zip(series, _cycled(_STYLES, len(series)), strict=True))
    style_of = {point.point: styles[name] for name, line in series.items() for point in line}
    finished = [curve for point, curve in read if point.state == "finished"]
    for point, curve in read:
        if not curve.steps:
            continue
        tokens, losses = thinned(curve)
        is_best = best is not None and point.point == best.point
        how = "" if point.state == "finished" else f" ({point.state})"
        axes.plot(
            tokens, losses, style_of[point.point], color=colors[point.point],
            linewidth=2.6 if is_best else 1.3, zorder=4 if is_best else 3,
            label=_shortened(f"{point.point}: {label(point.values)}{' (best)' if is_best else how}", 48),
        )  # fmt: skip
        if point.state != "finished" and not point.busy:
            axes.plot(tokens[-1:], losses[-1:], "X", color=_BAD, ms=7, zorder=5)
    top = highest_shown(finished or [curve for _, curve in read])
    lowest = min((min(curve.losses) for _, curve in read if curve.losses), default=None)
    if top is not None and lowest is not None and top > lowest:
        axes.set_ylim(lowest - 0.05 * (top - lowest), top + 0.05 * (top - lowest))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel(AXIS_TITLES["loss"])
    axes.set_title("while training (running average)", fontsize=10.5, loc="left", pad=16)
    if 0 < len(axes.get_legend_handles_labels()[0]) <= _MAX_LEGEND:
        axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _cycled(styles: Sequence[str], n: int) -> list[str]:
    return [styles[i % len(styles)] for i in range(n)]


# -- the page ------------------------------------------------------------------------------------------------------


def write_report(sweep: Sweep, read: Sequence[tuple[PointStatus, Curve]], folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.png; returns both paths. Raises RunError while there is nothing to show."""
    if not any(curve.steps for _, curve in read):
        raise RunError(
            f"no point of {sweep.folder} has reported a step yet; `lingua sweep status {sweep.folder}` shows more"
        )
    from matplotlib import rc_context

    figure, png, svg = draw(sweep, read), io.BytesIO(), io.StringIO()
    with rc_context(_LOOK):
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PNG, png.getvalue(), files=DISK)
        write_whole(folder / HTML, page(sweep, read, svg.getvalue()))
    except OSError as error:
        raise RunError(f"cannot write the report into {folder}: {error.strerror}; choose another with --out") from None
    return folder / HTML, folder / PNG


def page(sweep: Sweep, read: Sequence[tuple[PointStatus, Curve]], svg: str) -> str:
    """The HTML page around a picture."""
    points = [point for point, _ in read]
    colors, best = _colors(layout_of(sweep.keys, sweep.points), points), best_of(points)
    names = list(short_names(sweep.keys).values())
    held_out = any(point.held_out is not None for point in points)
    heading = ["point", *names, "state", "step", "loss", "lowest", *(["held-out"] if held_out else []), "run"]
    rows = "\n".join(_row(sweep, point, colors[point.point], held_out, point is best) for point in points)
    missing = "".join(f"<li>{html.escape(line)}</li>" for line in _unfinished(points, len(points)))
    picture = svg[svg.index("<svg") :].replace("<svg ", '<svg role="img" aria-label="loss against what was swept" ', 1)
    return _PAGE.format(
        title=html.escape(sweep.name),
        headline=html.escape(_headline(sweep, points)),
        command=html.escape("lingua sweep " + " ".join(sweep.typed)),
        picture=picture,
        heading="".join(f"<th>{html.escape(name)}</th>" for name in heading),
        rows=rows,
        note=html.escape(f"loss: {LOSS_IS}; lowest: the lowest it ever was, and at which step")
        + ("; held-out: bits per byte, the mean of the sources" if held_out else ""),
        missing=f"<h2>Not finished</h2><ul>{missing}</ul>" if missing else "",
    )


def _row(sweep: Sweep, point: PointStatus, color: Any, held_out: bool, is_best: bool) -> str:
    swatch = "#" + "".join(f"{round(255 * part):02x}" for part in color[:3])
    state = f"{point.state} ({point.kind})" if point.kind else point.state
    at = f" <small>at {point.best_step:,}</small>" if point.best_step is not None else ""
    step = "-" if point.step is None else f"{point.step:,}"
    of = "" if point.n_steps is None else f" <small>of {point.n_steps:,}</small>"
    cells = [
        f'<td class="number"><i style="background:{swatch}"></i>{point.point}</td>',
        *(f'<td class="number">{html.escape(spell(point.values[key]))}</td>' for key in sweep.keys),
        f'<td class="{"bad" if point.state not in ("finished",) and not point.busy else ""}">{html.escape(state)}</td>',
        f'<td class="number">{step}{of}</td>',
        f'<td class="number">{_figure(point.loss)}</td>',
        f'<td class="number">{_figure(point.best)}{at}</td>',
        *([f'<td class="number">{_figure(point.held_out)}</td>'] if held_out else []),
        f"<td><code>{html.escape(point.run)}</code></td>",
    ]
    return f"<tr{' class=best' if is_best else ''}>{''.join(cells)}</tr>"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d1d1d; max-width: 1280px; margin: 2em auto; padding: 0 1.5em }}
h1 {{ font-size: 1.35em; margin-bottom: .2em }} h2 {{ font-size: 1.1em; margin-top: 1.6em }}
svg {{ width: 100%; height: auto; margin: 1em 0 }}
code, pre {{ font: 13px ui-monospace, monospace }} pre {{ white-space: pre-wrap; color: #555; margin: 0 }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3em .9em; text-align: left; border-bottom: 1px solid #e4e4e4 }}
th {{ font-weight: 600 }} .number {{ text-align: right; font-variant-numeric: tabular-nums }}
.best td {{ font-weight: 700; background: #f0f7ee }} .bad {{ color: #c1121f }}
td i {{ display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em }}
small, p.note {{ color: #6a6a6a; font-weight: 400 }}
</style>
<h1>{headline}</h1>
<pre>{command}</pre>
{picture}
<table>
<tr>{heading}</tr>
{rows}
</table>
<p class="note">{note}</p>
{missing}
</html>
"""
