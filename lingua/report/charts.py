"""The pictures of `lingua report`: what is drawn of one run, or of several on top of each other.

Promise: only what counts is drawn in colour; steps that were trained again are grey. A curve of any length becomes at
most N_PIECES points with the range of what they stand for.
Cost: see `chart.py`: about 0.3 s per picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lingua.console import duration
from lingua.report.figure import (
    BAD,
    FAINT,
    GOOD,
    INK,
    LOG_FROM,
    SERIES,
    SOFT,
    STYLES,
    WIDE,
    Chart,
    Line,
    blank,
    counted,
    draw,
    legend,
    plain,
    shown_range,
)
from lingua.report.heat_maps import HeatMap
from lingua.report.history import (
    GRAD_NORM,
    HFU,
    LOSS,
    LR,
    MFU,
    SPENT,
    TOKENS,
    TRAINED_S,
    WPS,
    History,
    PastAttempt,
    Scores,
    keys_of,
)
from lingua.report.series import ATTEMPT, STEP, WHEN, Numbers, Table, Thinned, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_PIECES = 240
MIN_PIECES, MIN_PIECES_COMPARED = 80, 25
_MAX_SCORES = 8
_MAX_LABELS = 12
SPENT_COLORS = dict(zip(SPENT, (GOOD, SERIES[0], SERIES[1], SERIES[3], SERIES[7], BAD, SOFT, FAINT), strict=True))


@dataclass(frozen=True)
class Picture:
    """A figure to be made, and what to say about it."""

    key: str
    title: str
    note: str
    make: Callable[[], Figure]
    chart: Chart | None = None
    """Of a line chart: its points can be read off in the page."""
    is_wide: bool = False


@dataclass(frozen=True)
class Across:
    """What losses are drawn over."""

    column: str
    key: str
    """Behind the name of a picture's file."""
    title: str
    axis: str
    unit: float = 1.0
    """Of the axis, in the column's."""
    note: str = ""


STEPS = Across(STEP, "", "", "step")


def pictures_of(runs: Sequence[History], names: Sequence[str]) -> list[Picture]:
    """Curves of one run, or of several, whose losses are compared over steps, tokens and time; those without a point
    are left out."""
    losses = [chart for over in _axes(runs) for chart in (*_training(runs, names, over), *_held_out(runs, names, over))]
    charts = [*losses, *_evaluations(runs, names), *_course(runs, names), *_speed(runs, names)]
    return [_picture(chart) for chart in charts if any(len(line.points.x) for line in chart.lines)]


def _axes(runs: Sequence[History]) -> list[Across]:
    if len(runs) == 1:
        return [STEPS]
    size_s, unit = time_unit(max((run.metrics[TRAINED_S][-1] for run in runs if len(run.metrics)), default=0.0))
    return [
        replace(STEPS, title=" over steps"),
        Across(TOKENS, "_tokens", " over tokens", "tokens trained on"),
        Across(TRAINED_S, "_time", " over time", f"{unit} of training", size_s, "without start-up, saves, validation"),
    ]


def _picture(chart: Chart) -> Picture:
    return Picture(chart.key, chart.title, chart.note, lambda: draw(chart), chart)


# -- curves --------------------------------------------------------------------------------------------------------


def _training(runs: Sequence[History], names: Sequence[str], over: Across) -> Iterable[Chart]:
    several = len(runs) > 1
    lengths, at_least = [len(run.metrics) for run in runs], MIN_PIECES_COMPARED if several else MIN_PIECES
    is_thinned = any(length > n_pieces(length, at_least) for length in lengths)
    notes = ["mean of neighbouring steps" + ("" if several else ", and their range")] if is_thinned else []
    notes += [over.note] if over.note else []
    notes += ["grey: trained again after a restart"] if not several and len(runs[0].undone) else []
    lines = _lines(runs, names, LOSS, over)
    back = [] if several else _undone(runs[0], LOSS)
    low_high = shown_range([line.points.mean if several else line.points.high for line in lines])
    if low_high and not several:
        lows = [float(line.points.low.min()) for line in lines if len(line.points.x)]
        low_high = (min([low_high[0], *lows]), low_high[1])
    title, lines = f"Training loss{over.title}", [*back, *lines]
    yield Chart(f"loss{over.key}", title, "; ".join(notes), over.axis, "nats per token", lines, y_range=low_high)


def _course(runs: Sequence[History], names: Sequence[str]) -> Iterable[Chart]:
    """What goes with the loss."""
    yield Chart("lr", "Learning rate", "", "step", "learning rate", _lines(runs, names, LR))
    norms = _lines(runs, names, GRAD_NORM)
    is_log = _wants_log(line.points for line in norms)
    yield Chart("grad_norm", "Gradient norm", "before clipping", "step", "norm", norms, log_y=is_log)


def _speed(runs: Sequence[History], names: Sequence[str]) -> Iterable[Chart]:
    wps = _lines(runs, names, WPS)
    yield Chart("speed", "Throughput", "per device, pauses left out", "step", "tokens/s", wps)
    if len(runs) > 1:
        mfu = _lines(runs, names, MFU)
    else:
        both = ((MFU, "MFU", SERIES[0]), (HFU, "HFU", SERIES[1]))
        mfu = [Line(name, _points(runs[0], key), color) for key, name, color in both]
        mfu = [line for line in mfu if len(line.points.x)]
    note = "of the device's peak; on a CPU, of a matrix product measured there"
    if len(mfu) > 1 and len(runs) == 1:
        note = "MFU counts the model's FLOPs, HFU also those computed twice; " + note
    yield Chart("mfu", "Model FLOPs utilisation", note, "step", "share of the peak", mfu, percent=True)


def _lines(runs: Sequence[History], names: Sequence[str], key: str, over: Across = STEPS) -> list[Line]:
    several = len(runs) > 1
    return [
        Line(name if several else "", _points(run, key, over, is_alone=not several), *_look_of(i))
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def _look_of(i: int) -> tuple[str, str]:
    """(color, style) of a curve."""
    return SERIES[i % len(SERIES)], STYLES[i // len(SERIES) % len(STYLES)]


def _points(run: History, key: str, over: Across = STEPS, *, is_alone: bool = True) -> Thinned:
    """Of a run that is compared with others only the means, of more steps: their ranges would hide each other."""
    xs, ys = run.metrics.curve(key, over.column)
    xs = xs / over.unit
    if key == LR:
        return thinned(xs, ys, N_PIECES)
    if is_alone:
        return thinned(xs, ys, n_pieces(len(xs)))
    points = thinned(xs, ys, n_pieces(len(xs), MIN_PIECES_COMPARED))
    return replace(points, low=points.mean, high=points.mean)


def n_pieces(n_points: int, at_least: int = MIN_PIECES) -> int:
    """Pieces of a noisy curve: enough points in each that their mean tells more than they do."""
    return max(min(n_points // 8, N_PIECES), at_least)


def _undone(run: History, key: str) -> list[Line]:
    """A grey curve per attempt that was set back."""
    lines = []
    for number in np.unique(run.undone[ATTEMPT]):
        x, y = run.undone.where(run.undone[ATTEMPT] == number).curve(key)
        lines.append(Line("", thinned(x, y, n_pieces(len(x))), FAINT, is_back=True))
    return [line for line in lines if len(line.points.x)]


def _wants_log(curves: Iterable[Thinned]) -> bool:
    found = [curve.mean for curve in curves if len(curve.mean)]
    if not found:
        return False
    values = np.concatenate(found)
    return bool(values.min() > 0 and values.max() / values.min() >= LOG_FROM)


# -- held-out losses and evaluations -------------------------------------------------------------------------------


def _held_out(runs: Sequence[History], names: Sequence[str], over: Across) -> Iterable[Chart]:
    """Bits per byte while training and by the evaluator, each source."""
    several, lines, n = len(runs) > 1, [], 0
    both = [(run.validations, run.evaluations) for run in runs]
    sources = {_source_of(key) for pair in both for scores in pair for key in _bpb_keys(scores)}
    for i, (run, name, pair) in enumerate(zip(runs, names, both, strict=True)):
        for scores, how, style in zip(pair, ("", "evaluated"), ("-", "--"), strict=True):
            for key in _bpb_keys(scores):
                who = name if several else ""
                source = _source_of(key) if len(sources) > 1 or not several else ""
                color = SERIES[(i if several else n) % len(SERIES)]
                points = _scored(scores, key, run, over)
                scored = "whole documents" if key.startswith("documents/") else how
                told = ": ".join(part for part in (who, scored, source) if part)
                lines.append(Line(told, points, color, style, dots=len(scores) <= 40))
                n += 1
    curves = [line.points.mean for line in lines]
    flat = sorted(float(v) for curve in curves for v in (curve[1:] if len(curve) > 3 else curve))
    margin = 0.05 * (flat[-1] - flat[0]) if flat else 0.0
    top = (flat[0] - margin, flat[-1] + margin) if margin else None
    notes = sorted(sources) if several and len(sources) == 1 else []
    notes += [over.note] if over.note else []
    title, note = f"Held-out loss{over.title}", "; ".join(notes)
    yield Chart(f"held_out{over.key}", title, note, over.axis, "bits per byte", lines, y_range=top)


def _bpb_keys(scores: Sequence[Scores]) -> list[str]:
    return [key for key in keys_of(scores) if key.endswith("/bpb")]


def _source_of(key: str) -> str:
    return key.removeprefix("validation/").removeprefix("documents/").removesuffix("/bpb")


def _evaluations(runs: Sequence[History], names: Sequence[str]) -> Iterable[Chart]:
    keys = [key for key in dict.fromkeys(k for run in runs for k in keys_of(run.evaluations)) if is_task(key)]
    keys = sorted(keys, key=lambda key: "overall_avg" not in key)[:_MAX_SCORES]
    if len(runs) == 1:
        lines = [
            Line(key, _scored(runs[0].evaluations, key, runs[0]), *_look_of(i), dots=True) for i, key in enumerate(keys)
        ]
        yield Chart("evaluations", "Evaluation tasks", "", "step", "score", lines)
        return
    for key in keys:
        lines = [
            Line(name, _scored(run.evaluations, key, run), *_look_of(i), dots=True)
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        yield Chart(f"evaluations_{keys.index(key)}", key, "evaluated", "step", "score", lines)


def is_task(key: str) -> bool:
    """A figure of a task, not of held-out text nor an error bar."""
    return key.startswith(("eval/", "core_eval/"))


def _scored(scores: Sequence[Scores], key: str, run: History, over: Across = STEPS) -> Thinned:
    there = [(one.step, one.values[key]) for one in scores if math.isfinite(one.values.get(key, math.nan))]
    x, y = np.array(there, dtype=float).reshape(-1, 2).T
    if over.column != STEP:
        x = run.at(x, over.column) / over.unit
        x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    return thinned(x, y, N_PIECES)


# -- time ----------------------------------------------------------------------------------------------------------


def spent_picture(runs: Sequence[History], names: Sequence[str]) -> Picture:
    """Where the time went: a bar per kind, or per run."""
    make = _spent_of_one if len(runs) == 1 else _spent_of_several
    note = "wall-clock time from the first attempt on"
    return Picture("time", "Where the time went", note, lambda: make(runs, names))


def _spent_of_one(runs: Sequence[History], _: Sequence[str]) -> Figure:
    seconds = {kind: s for kind, s in runs[0].seconds.items() if s > 0}
    all_s = sum(seconds.values())
    figure, axes = blank((5.6, 3.3))
    places = range(len(seconds) - 1, -1, -1)
    axes.barh(list(places), list(seconds.values()), color=[SPENT_COLORS[kind] for kind in seconds], height=0.62)
    for place, value in zip(places, seconds.values(), strict=True):
        told = f"{brief(value)}  {value / all_s:.1%}"
        _tell_bar(axes, told, value, place)
    axes.set_yticks(list(places), [_SHORT[kind] for kind in seconds])
    axes.set_xlim(0, 1.32 * max(seconds.values(), default=1.0))
    _bare(axes)
    return figure


def _spent_of_several(runs: Sequence[History], names: Sequence[str]) -> Figure:
    figure, axes = blank((5.6, 1.3 + 0.38 * len(runs)))
    places = list(range(len(runs) - 1, -1, -1))
    left = np.zeros(len(runs))
    totals = np.array([max(sum(run.seconds.values()), 1e-9) for run in runs])
    for kind in SPENT:
        shares = np.array([run.seconds[kind] for run in runs]) / totals
        if shares.any():
            axes.barh(places, shares, left=left, color=SPENT_COLORS[kind], height=0.62, label=_SHORT[kind])
            left += shares
    for place, total in zip(places, totals, strict=True):
        _tell_bar(axes, brief(total), 1.0, place)
    axes.set_yticks(places, [plain(name) for name in names])
    axes.set_xlim(0, 1.15)
    legend(axes)
    _bare(axes)
    return figure


def _tell_bar(axes: Axes, told: str, x: float, y: float) -> None:
    """A figure at the end of a bar."""
    axes.annotate(told, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)


_SHORT = {
    "training": "training",
    "loading": "waiting for data",
    "saving": "checkpoints",
    "validating": "validation",
    "starting": "start-up",
    "lost": "lost, trained again",
    "other": "ending, unreported",
    "idle": "not running",
}


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, labelcolor=INK)


def brief(seconds: float) -> str:
    """`duration`, and parts of a second too where there is little else."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g}s"


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds of it, name) of the unit that a span is told in."""
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    return next(((size, name) for size, name in units if seconds >= 3 * size), (1.0, "seconds"))


def time_line(run: History) -> Picture | None:
    """Steps over time, each attempt a band; checkpoints, evaluations and ends where they happened."""
    if not any(attempt.began_s is not None for attempt in run.attempts):
        return None
    note = "each attempt is a band; a fall is a restart from an earlier checkpoint"
    return Picture("time_line", "Time line", note, lambda: _draw_time_line(run), is_wide=True)


def _draw_time_line(run: History) -> Figure:
    began_s = min(attempt.began_s for attempt in run.attempts if attempt.began_s is not None)
    ends = [attempt.ended_s for attempt in run.attempts if attempt.ended_s is not None]
    ends += [event.at_s for event in run.events if event.at_s <= max(ends) + 0.15 * (max(ends) - began_s)]
    size_s, unit = time_unit(max(ends) - began_s)

    def place(at_s: Any) -> Any:
        return (at_s - began_s) / size_s

    figure, axes = blank(WIDE)
    for attempt in run.attempts:
        if attempt.began_s is not None and attempt.ended_s is not None:
            axes.axvspan(place(attempt.began_s), place(attempt.ended_s), color=SERIES[0], alpha=0.1, linewidth=0)
        for tables, color in (((run.metrics, run.undone), FAINT), ((run.metrics,), SERIES[0])):
            points = _progress(attempt, tables)
            axes.plot(place(points.x), points.mean, color=color, linewidth=1.8, zorder=3)
    _draw_events(axes, run, place, max(ends))
    _draw_ends(axes, run, place)
    axes.set_xlim(min(0.0, -0.005 * place(max(ends))), 1.01 * place(max(ends)) or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: counted(value))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("step")
    axes.set_xlabel(f"{unit} since the first attempt")
    legend(axes)
    return figure


def _progress(attempt: PastAttempt, tables: Iterable[Table]) -> Thinned:
    """Steps of an attempt over time."""
    there = attempt.begun_s is not None and attempt.first_step is not None
    x, y = np.array([attempt.begun_s] * there, dtype=float), np.array([attempt.first_step] * there, dtype=float)
    for table in tables:
        more_x, more_y = table.where(table[ATTEMPT] == attempt.number).curve(STEP, WHEN)
        x, y = np.append(x, more_x), np.append(y, more_y)
    return thinned(x, y, N_PIECES)


_MARKS: dict[str, tuple[str, str, float, str]] = {
    "staged": ("o", SERIES[1], 5.5, "staged, not known to be published"),
    "published": ("o", GOOD, 5.0, "checkpoint published"),
    "evaluated": ("D", SERIES[3], 5.0, "evaluated"),
    "failed": ("X", BAD, 7.0, "checkpoint failed"),
    "given up": ("X", SERIES[4], 7.0, "evaluation given up"),
}


def _draw_events(axes: Axes, run: History, place: Callable[[Any], Any], last_s: float) -> None:
    published = {(event.step, event.attempt) for event in run.events if event.kind == "published"}
    gone_on_from = {attempt.first_step for attempt in run.attempts[1:]}  # so these were, whatever was told
    for kind, (marker, color, size, name) in _MARKS.items():
        some = [e for e in run.events if e.kind == kind and e.at_s <= last_s]
        if kind == "staged":
            some = [e for e in some if (e.step, e.attempt) not in published and e.step not in gone_on_from]
        xs, ys = [place(event.at_s) for event in some], [event.step for event in some]
        if xs:
            inside = "none" if kind == "staged" else color
            axes.plot(xs, ys, marker, color=color, ms=size, label=name, zorder=5, mfc=inside)


def _draw_ends(axes: Axes, run: History, place: Callable[[Any], Any]) -> None:
    """How each attempt ended, at its last step; of many attempts only the last ones are told."""
    for attempt in run.attempts[-_MAX_LABELS:]:
        if attempt.ended_s is None:
            continue
        step = max(attempt.last_step or 0, attempt.first_step or 0)
        went_wrong = attempt.end == "killed" or attempt.end.startswith("failed")
        color = BAD if went_wrong else SOFT
        axes.plot([place(attempt.ended_s)], [step], "x" if went_wrong else "|", color=color, ms=8, mew=2, zorder=6)
        axes.annotate(
            plain(attempt.end), (place(attempt.ended_s), step), (-5, 6), textcoords="offset points",
            ha="right", fontsize=8.5, color=color, zorder=6,
        )  # fmt: skip


# -- probes --------------------------------------------------------------------------------------------------------


def probe_picture(heat: HeatMap) -> Picture:
    """A quantity of each layer over the steps."""
    key = f"probe_{heat.quantity}_{heat.stat}"
    return Picture(key, f"{heat.quantity}: {heat.stat}", "of each layer", lambda: _draw_heat(heat))


def _draw_heat(heat: HeatMap) -> Figure:
    from matplotlib.colors import LogNorm, Normalize

    figure, axes = blank((5.6, min(9.0, 1.5 + 0.16 * max(12, len(heat.layers)))))
    finite = heat.values[np.isfinite(heat.values)]
    is_log = len(finite) > 0 and finite.min() > 0 and finite.max() / finite.min() >= LOG_FROM
    edges = _edges(heat.steps)
    colors = axes.imshow(
        _resampled(heat.values, heat.steps), aspect="auto", interpolation="nearest", cmap="viridis",
        norm=LogNorm() if is_log else Normalize(), extent=(edges[0], edges[-1], len(heat.layers) - 0.5, -0.5),
    )  # fmt: skip
    every = max(1, math.ceil(len(heat.layers) / 24))
    axes.set_yticks(range(0, len(heat.layers), every), [plain(name) for name in heat.layers[::every]], fontsize=7)
    axes.grid(visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: counted(value))
    axes.set_xlabel("step")
    figure.colorbar(colors, ax=axes, label=heat.stat + (", log scale" if is_log else ""), pad=0.02)
    return figure


def _edges(steps: Numbers) -> Numbers:
    """Where the columns of steps begin and end."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate(([2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]))


def _resampled(values: np.ndarray, steps: Numbers) -> np.ndarray:
    """Columns of equal width, so that steps that are not evenly spread stand where they belong."""
    edges = _edges(steps)
    middles = np.linspace(edges[0], edges[-1], 2 * min(400, 4 * len(steps)) + 1)[1::2]
    return values[:, np.clip(np.searchsorted(edges, middles) - 1, 0, len(steps) - 1)]
