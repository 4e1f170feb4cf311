"""Draw the pictures of `lingua report`: one run, or several on top of each other; repeated steps are gray.

A curve of any length becomes at most N_PIECES points, each with the range of the values that it represents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lingua.console import duration
from lingua.report import figure as draw
from lingua.report.figure import SERIES, Line, Picture
from lingua.report.history import HEADS, LOSS, MEAN_LOSS, SPENT, TOKENS, TRAINED_S, History, Scores, keys_of
from lingua.report.series import ATTEMPT, STEP, WHEN, HeatMap, Numbers, Thinned, curve, thinned, unbroken
from lingua.report.status import phases_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LR = "optim/lr"
N_PIECES, MIN_PIECES, MIN_PIECES_COMPARED = 160, 80, 25
_MAX_SCORES, _MAX_LABELS = 8, 12
_LOOKS = [(color, style) for style in draw.STYLES for color in SERIES]


class Across(NamedTuple):
    """The horizontal axis of a loss chart."""

    column: str = STEP
    key: str = ""  # suffix of the picture's file name
    title: str = ""
    axis: str = "step"
    unit: float = 1.0  # size of its unit in that of the column
    note: str = ""


STEPS = Across()


def pictures_of(runs: Sequence[History], names: Sequence[str]) -> list[Picture]:
    """Describe the curves of one run, or of several, whose losses are compared over steps, tokens and time."""
    axes = [STEPS]
    if len(runs) > 1:
        size_s, unit = time_unit(max((run.metrics[TRAINED_S][-1] for run in runs if len(run.metrics)), default=0.0))
        is_fork = any(run.attempts and run.attempts[0].first_step for run in runs)
        note = "without start-up, saves, validation" + ("; a fork's time is its own" if is_fork else "")
        axes = [
            Across(title=" over steps"),
            Across(TOKENS, "_tokens", " over tokens", "tokens trained on"),
            Across(TRAINED_S, "_time", " over time", f"{unit} of training", size_s, note),
        ]
    losses = (p for over in axes for p in (_training(runs, names, over), _held_out(runs, names, over)))
    pictures = [one for one in (*losses, *_evaluations(runs, names), *_course(runs, names)) if one is not None]
    marks = [(first, name) for name, first, _ in phases_in(runs[0].facts.config) if first] if len(runs) == 1 else []
    return [_marked(picture, marks) for picture in pictures] if marks else pictures


def _marked(picture: Picture, marks: Sequence[tuple[int, str]]) -> Picture:
    """Add a thin line with the name of each phase where it begins."""

    def make() -> Figure:
        figure = picture.make()
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        for step, name in marks:
            if low <= step <= high:
                axes.axvline(step, color=draw.SOFT, linewidth=0.8, linestyle=":", zorder=2)
                look: dict[str, Any] = {"rotation": 90, "va": "top", "fontsize": 7.5, "color": draw.SOFT}
                axes.text(step, 0.98, f" {draw.plain(name)}", transform=axes.get_xaxis_transform(), **look)
        axes.set_xlim(low, high)
        return figure

    return replace(picture, make=make)


def _training(runs: Sequence[History], names: Sequence[str], over: Across) -> Picture | None:
    several, lines, back = len(runs) > 1, _lines(runs, names, MEAN_LOSS, over), []
    tables = [run.metrics for run in runs]
    thins = any(len(curve(t, MEAN_LOSS)[0]) > len(one.points.x) for t, one in zip(tables, lines, strict=True))
    is_mean = thins or any(np.nan_to_num(t[MEAN_LOSS] - t[LOSS]).any() for t in tables)
    spread = ", and their range" if thins and not several else ""
    notes = [f"mean of neighbouring steps{spread}" if is_mean else "", over.note]
    if not several and len(undone := runs[0].undone):
        notes.append("grey: trained again after a restart or a rewind")
        curves = [curve(undone[undone[ATTEMPT] == number], MEAN_LOSS) for number in np.unique(undone[ATTEMPT])]
        pieces = (piece for points in curves for piece in unbroken(*points))
        back = [Line("", _noisy(*points), draw.FAINT, is_back=True) for points in pieces]
    shown = draw.shown_range([line.points.high for line in (*back, *lines)], [line.points.low for line in lines])
    return draw.line_chart(
        f"loss{over.key}", f"Training loss{over.title}", [*back, *lines], "nats per token",
        "; ".join(filter(None, notes)), xlabel=over.axis, ylim=shown,
    )  # fmt: skip


def _course(runs: Sequence[History], names: Sequence[str]) -> Iterator[Picture | None]:
    """Describe the metrics besides the loss."""
    if len(runs) == 1:
        heads = [_lines(runs, names, key)[0]._replace(name=f"head {i}", color=SERIES[i]) for i, key in enumerate(HEADS)]
        yield draw.line_chart("heads", "Training loss of each head", heads, "nats per token", "their sum is the loss")
    above, note = _lines(runs, names, "loss/above_floor"), "the least loss that any model can have on this data"
    scale = "log" if all((line.points.mean > 0).all() for line in above) else "linear"
    yield draw.line_chart("above_floor", "Loss above the floor", above, "nats per token", note, yscale=scale)
    yield draw.line_chart("lr", "Learning rate", _lines(runs, names, _LR), "learning rate")
    norms = _lines(runs, names, "optim/grad_norm")
    scale = _scale_of(np.concatenate([line.points.mean for line in norms]))
    yield draw.line_chart("grad_norm", "Gradient norm", norms, "norm", "before clipping", yscale=scale)
    wps = _lines(runs, names, "speed/wps")
    yield draw.line_chart("speed", "Throughput", wps, "tokens/s", "per device, pauses left out")
    note, mfu = "of the device's peak; on a CPU, of a matrix product measured there", _lines(runs, names, "speed/mfu")
    hfu = _lines(runs, names, "speed/hfu")[0]
    if len(runs) == 1 and len(hfu.points.x):
        note = "MFU counts the model's FLOPs, HFU also those computed twice; " + note
        mfu = [mfu[0]._replace(name="MFU"), hfu._replace(name="HFU", color=SERIES[1])]
    yield draw.line_chart("mfu", "Model FLOPs utilisation", mfu, "share of the peak", note=note, percent=True)


def _scale_of(values: np.ndarray) -> str:
    is_log = len(values) > 0 and values.min() > 0 and values.max() / values.min() >= draw.LOG_FROM
    return "log" if is_log else "linear"


def _lines(runs: Sequence[History], names: Sequence[str], key: str, over: Across = STEPS) -> list[Line]:
    """Return a curve per run. Several runs show only means, of more steps, since ranges would hide each other."""
    several, lines = len(runs) > 1, []
    curves = [curve(run.metrics, key, over.column) for run in runs]
    at_least = N_PIECES if key == _LR else MIN_PIECES_COMPARED if several else MIN_PIECES
    counts = n_pieces([x for x, _ in curves], at_least)
    for i, ((x, y), name, n) in enumerate(zip(curves, names, counts, strict=True)):
        points = thinned(x / over.unit, y, n)
        points = points._replace(low=points.mean, high=points.mean) if several else points
        lines.append(Line(name if several else "", points, *_LOOKS[i % len(_LOOKS)]))
    return lines


def n_pieces(curves: Sequence[Numbers], at_least: int = MIN_PIECES) -> list[int]:
    """Return the number of pieces for each noisy curve, so that the mean of a piece is less noisy.

    Pieces of all curves have about the same length, so that a short branch is as smooth as the trunk.
    """
    spans = [float(x[-1] - x[0]) if len(x) else 0.0 for x in curves]
    longest = max(spans)
    most = max(min(len(curves[spans.index(longest)]) // 8, N_PIECES), at_least)
    return [max(5, math.ceil(most * span / longest)) if longest else most for span in spans]


def _noisy(x: Numbers, y: Numbers, at_least: int = MIN_PIECES) -> Thinned:
    return thinned(x, y, n_pieces([x], at_least)[0])


def _held_out(runs: Sequence[History], names: Sequence[str], over: Across) -> Picture | None:
    """Compare bits per byte of each source, as measured during training and by the evaluator."""
    several, lines = len(runs) > 1, []
    found = [
        (i, scores, how, style, key, key.removeprefix("validation/").removeprefix("documents/").removesuffix("/bpb"))
        for i, run in enumerate(runs)
        for scores, how, style in ((run.validations, "", "-"), (run.evaluations, "evaluated", "--"))
        for key in keys_of(scores)
        if key.endswith("/bpb")
    ]
    sources = sorted({source for *_, source in found})
    for n, (i, scores, how, style, key, source) in enumerate(found):
        scored = "whole documents" if key.startswith("documents/") else how
        parts = (names[i] if several else "", scored, source if len(sources) > 1 or not several else "")
        points, color = _scored(scores, key, runs[i], over), SERIES[(i if several else n) % len(SERIES)]
        if several and len(sources) > 1:  # colors stand for runs, so sources differ by style
            style = draw.STYLES[sources.index(source) % len(draw.STYLES)]
        lines.append(Line(": ".join(filter(None, parts)), points, color, style, dots=len(scores) <= 40))
    notes = [*(sources if several and len(sources) == 1 else []), *filter(None, [over.note])]
    return draw.line_chart(
        f"held_out{over.key}", f"Held-out loss{over.title}", lines, "bits per byte", "; ".join(notes),
        xlabel=over.axis,
    )  # fmt: skip


def _evaluations(runs: Sequence[History], names: Sequence[str]) -> Iterator[Picture | None]:
    """Describe task scores: in one picture for one run, in a picture per task for several."""
    found = dict.fromkeys(key for run in runs for key in keys_of(run.evaluations))
    keys = [key for key in found if key.startswith(("eval/", "core_eval/"))]  # the rest: held-out losses, error bars
    keys = sorted(keys, key=lambda key: "overall_avg" not in key)[:_MAX_SCORES]
    charts = {key: [(name, run, key) for name, run in zip(names, runs, strict=True)] for key in keys}
    if len(runs) == 1:
        charts = {"Evaluation tasks": [(key, runs[0], key) for key in keys]}
    for n, (title, curves) in enumerate(charts.items()):
        scored = [(name, _scored(run.evaluations, key, run)) for name, run, key in curves]
        lines = [Line(name, points, *_LOOKS[i % len(_LOOKS)], dots=True) for i, (name, points) in enumerate(scored)]
        where, note = ("evaluations", "") if len(runs) == 1 else (f"evaluations_{n}", "evaluated")
        yield draw.line_chart(where, title, lines, "score", note=note)


def _scored(scores: Sequence[Scores], key: str, run: History, over: Across = STEPS) -> Thinned:
    there = [(one.step, one.values[key]) for one in scores if math.isfinite(one.values.get(key, math.nan))]
    x, y = np.array(there, dtype=float).reshape(-1, 2).T
    if over.column != STEP:
        x = run.at(x, over.column) / over.unit
        x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    return thinned(x, y, N_PIECES)


_SPENT_COLORS = draw.GOOD, SERIES[0], SERIES[1], SERIES[3], SERIES[7], draw.BAD, draw.SOFT, draw.FAINT


def spent_picture(runs: Sequence[History], names: Sequence[str]) -> Picture | None:
    """Describe where the time went: a bar per kind, or a stacked one per run."""
    seconds = {kind: np.array([run.seconds[kind] for run in runs]) for kind in SPENT}
    totals, is_alone = sum(seconds.values(), np.zeros(len(runs))), len(runs) == 1
    if not totals.any():
        return None

    def make() -> Figure:
        figure, axes = draw.blank(draw.SMALL if is_alone else (draw.SMALL[0], 1.3 + 0.38 * len(runs)))
        left, bars = np.zeros(len(runs)), None
        for color, (name, _), s in zip(_SPENT_COLORS, SPENT.values(), seconds.values(), strict=True):
            if is_alone and s[0] > 0:
                text = f"{brief(s[0])}  {s[0] / totals[0]:.1%}"
                axes.bar_label(axes.barh(name, s, color=color, height=0.62), [text], padding=4, fontsize=8.5)
            elif s.any():
                shares = s / np.maximum(totals, 1e-9)
                bars = axes.barh(range(len(runs)), shares, left=left, color=color, height=0.62, label=name)
                left += shares
        if not is_alone:
            axes.bar_label(bars, [brief(total) for total in totals], padding=4, fontsize=8.5)
            axes.set_yticks(range(len(runs)), [draw.plain(name) for name in names])
            draw.legend(axes)
        axes.set(xticks=[], xlim=(0, 1.32 * max(s[0] for s in seconds.values()) if is_alone else 1.15))
        axes.invert_yaxis()  # the first bar on top
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False, labelcolor=draw.INK)
        return figure

    return Picture("time", "Where the time went", "wall-clock time from the first attempt on", make)


def brief(seconds: float) -> str:
    """Format a duration, with parts of a second if it is short."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g}s"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return (seconds, name) of a suitable unit for a span."""
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    return next(((size, name) for size, name in units if seconds >= 3 * size), (1.0, "seconds"))


_MARKS: dict[str, tuple[str, str, float, str]] = {
    "staged": ("o", SERIES[1], 5.5, "staged, not known to be published"),
    "published": ("o", draw.GOOD, 5.0, "checkpoint published"),
    "evaluated": ("D", SERIES[3], 5.0, "evaluated"),
    "failed": ("X", draw.BAD, 7.0, "checkpoint failed"),
    "given up": ("X", SERIES[4], 7.0, "evaluation given up"),
}


def time_line(run: History, prefix: str = "") -> Picture | None:
    """Describe steps over time: a band per attempt, with its end, checkpoints and evaluations."""
    if not any(attempt.began_s is not None for attempt in run.attempts):
        return None
    ends = [attempt.ended_s for attempt in run.attempts if attempt.ended_s is not None]
    ends += [event.at_s for event in run.events if event.at_s <= max(ends) + 0.15 * (max(ends) - run.began_s)]
    size_s, unit = time_unit(max(ends) - run.began_s)

    def place(at_s: Any) -> Any:
        return (at_s - run.began_s) / size_s

    def make() -> Figure:
        figure, axes = draw.blank(draw.WIDE)
        draw_over_time(axes, run, STEP, size_s, SERIES[0], 1.8)
        for attempt in run.attempts:
            if attempt.began_s is not None and attempt.ended_s is not None:
                axes.axvspan(place(attempt.began_s), place(attempt.ended_s), color=SERIES[0], alpha=0.1, linewidth=0)
        for attempt in run.attempts[-_MAX_LABELS:]:
            if attempt.ended_s is not None:
                went_wrong = attempt.end == "killed" or attempt.end.startswith("failed")
                at = place(attempt.ended_s), max(attempt.last_step or 0, attempt.first_step or 0)
                style: dict[str, Any] = {"color": draw.BAD if went_wrong else draw.SOFT, "zorder": 6}
                axes.plot(*at, "x" if went_wrong else "|", ms=8, mew=2, **style)
                axes.annotate(
                    draw.plain(attempt.end), at, (-5, 6), textcoords="offset points", ha="right", fontsize=8.5, **style
                )
        published = {(event.step, event.attempt) for event in run.events if event.kind == "published"}
        resumed_from = {one.first_step for one in run.attempts[1:]}  # published, even without a record of it
        for kind, (marker, color, size, name) in _MARKS.items():
            some = [e for e in run.events if e.kind == kind and e.at_s <= max(ends)]
            if kind == "staged":
                some = [e for e in some if (e.step, e.attempt) not in published and e.step not in resumed_from]
            if some:
                xs, ys = [place(event.at_s) for event in some], [event.step for event in some]
                inside = "none" if kind == "staged" else color
                axes.plot(xs, ys, marker, color=color, ms=size, label=name, zorder=5, mfc=inside)
        axes.set_xlim(min(0.0, -0.005 * place(max(ends))), 1.01 * place(max(ends)) or 1.0)
        axes.yaxis.set_major_formatter(draw.counted)
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
        axes.set(xlabel=f"{unit} since the first attempt", ylabel="step")
        draw.legend(axes, draw.WIDE[0])
        return figure

    note = "each attempt is a band; a fall is a restart from an earlier checkpoint"
    return Picture(f"{prefix}time_line", "Time line", note, make, is_wide=True)


def draw_over_time(axes: Axes, run: History, key: str, size_s: float, color: str, width: float) -> None:
    """Draw a column of the metrics, with one curve per attempt; repeated steps are gray."""
    for attempt in run.attempts:
        for tables, shade in (((run.metrics, run.undone), draw.FAINT), ((run.metrics,), color)):
            curves = [curve(table[table[ATTEMPT] == attempt.number], key, WHEN) for table in tables]
            if key == STEP and attempt.begun_s is not None and attempt.first_step is not None:
                curves.insert(0, (np.array([attempt.begun_s]), np.array([float(attempt.first_step)])))
            x, y = map(np.concatenate, zip(*curves, strict=True))
            points = _noisy(x, y, N_PIECES if key == STEP else MIN_PIECES_COMPARED)
            axes.plot((points.x - run.began_s) / size_s, points.mean, color=shade, linewidth=width, zorder=3)


def probe_picture(heat: HeatMap) -> Picture:
    """Describe one statistic of each layer over the steps."""
    quantity, stat, layers, steps, values = heat
    if len(steps) == 1:  # a column needs a width
        steps, values = steps + np.array([-0.5, 0.5]), np.repeat(values, 2, axis=1)
    scale, every = _scale_of(values[np.isfinite(values)]), math.ceil(len(layers) / 24)

    def make() -> Figure:
        figure, axes = draw.blank((draw.SMALL[0], min(9.0, 1.5 + 0.16 * max(12, len(layers)))))
        places = range(len(layers))
        colors = axes.pcolormesh(steps, places, values, shading="nearest", norm=scale, rasterized=True)
        axes.set_yticks(places[::every], [draw.plain(name) for name in layers[::every]], fontsize=7)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(draw.counted)
        axes.set_xlabel("step")
        figure.colorbar(colors, ax=axes, label=stat + (", log scale" if scale == "log" else ""), pad=0.02)
        return figure

    return Picture(f"probe_{quantity}_{stat}", f"{quantity}: {stat}", "of each layer", make)
