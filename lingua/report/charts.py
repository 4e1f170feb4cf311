"""The pictures of `lingua report`: one run, or several on top of each other.

Only steps that count are drawn in colour; steps that were trained again are grey. A curve of any length becomes at most
N_PIECES points, each with the range of the values it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    SMALL,
    SOFT,
    STYLES,
    WIDE,
    Line,
    Picture,
    blank,
    counted,
    legend,
    line_chart,
    plain,
    shown_range,
)
from lingua.report.heat_maps import HeatMap
from lingua.report.history import (
    ABOVE_FLOOR,
    GRAD_NORM,
    HEADS,
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
from lingua.report.series import ATTEMPT, STEP, WHEN, Thinned, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_PIECES = 160
MIN_PIECES, MIN_PIECES_COMPARED = 80, 25
_MAX_SCORES = 8
_MAX_LABELS = 12


@dataclass(frozen=True)
class Across:
    """The horizontal axis of losses."""

    column: str = STEP
    key: str = ""
    """Ending of the names of pictures' files."""
    title: str = ""
    axis: str = "step"
    unit: float = 1.0
    """Size of the axis' unit in that of the column."""
    note: str = ""


STEPS = Across()


def pictures_of(runs: Sequence[History], names: Sequence[str]) -> list[Picture]:
    """Describe the curves of one run, or of several, whose losses are compared over steps, tokens and time."""
    losses = (p for over in _axes(runs) for p in (_training(runs, names, over), _held_out(runs, names, over)))
    every = [*losses, *_evaluations(runs, names), *_course(runs, names)]
    return [picture for picture in every if picture is not None]


def _axes(runs: Sequence[History]) -> list[Across]:
    if len(runs) == 1:
        return [STEPS]
    size_s, unit = time_unit(max((run.metrics[TRAINED_S][-1] for run in runs if len(run.metrics)), default=0.0))
    return [
        Across(title=" over steps"),
        Across(TOKENS, "_tokens", " over tokens", "tokens trained on"),
        Across(TRAINED_S, "_time", " over time", f"{unit} of training", size_s, "without start-up, saves, validation"),
    ]


# -- curves --------------------------------------------------------------------------------------------------------


def _training(runs: Sequence[History], names: Sequence[str], over: Across) -> Picture | None:
    several, lines = len(runs) > 1, _lines(runs, names, LOSS, over)
    back = [] if several else _undone(runs[0], LOSS)
    is_thinned = any(
        len(run.metrics.curve(LOSS)[0]) > len(line.points.x) for run, line in zip(runs, lines, strict=True)
    )
    notes = ["mean of neighbouring steps" + ("" if several else ", and their range")] if is_thinned else []
    notes += [over.note] if over.note else []
    notes += ["grey: trained again after a restart"] if back else []
    shown = shown_range([line.points.mean if several else line.points.high for line in lines])
    if shown:
        shown = (min(shown[0], *(float(line.points.low.min()) for line in lines if len(line.points.x))), shown[1])
    return line_chart(
        f"loss{over.key}", f"Training loss{over.title}", [*back, *lines], "nats per token",
        note="; ".join(notes), x_title=over.axis, y_range=shown,
    )  # fmt: skip


def _course(runs: Sequence[History], names: Sequence[str]) -> Iterator[Picture | None]:
    """Describe what is logged beside the loss."""
    if len(runs) == 1:
        each = [(i, *_lines(runs, names, key)) for i, key in enumerate(HEADS)]
        heads = [replace(line, name=f"head {i}", color=SERIES[i]) for i, line in each]
        yield line_chart("heads", "Training loss of each head", heads, "nats per token", note="their sum is the loss")
    above = _lines(runs, names, ABOVE_FLOOR)
    some = [line.points.mean for line in above if len(line.points.x)]
    note, is_log = "the least loss that any model can have on this data", bool(some and min(map(min, some)) > 0)
    yield line_chart("above_floor", "Loss above the floor", above, "nats per token", note=note, log_y=is_log)
    yield line_chart("lr", "Learning rate", _lines(runs, names, LR), "learning rate")
    norms = _lines(runs, names, GRAD_NORM)
    values = np.concatenate([line.points.mean for line in norms])
    is_log = bool(len(values) and values.min() > 0 and values.max() / values.min() >= LOG_FROM)
    yield line_chart("grad_norm", "Gradient norm", norms, "norm", note="before clipping", log_y=is_log)
    wps = _lines(runs, names, WPS)
    yield line_chart("speed", "Throughput", wps, "tokens/s", note="per device, pauses left out")
    note, mfu = "of the device's peak; on a CPU, of a matrix product measured there", _lines(runs, names, MFU)
    hfu = _lines(runs, names, HFU)[0]
    if len(runs) == 1 and len(hfu.points.x):
        note = "MFU counts the model's FLOPs, HFU also those computed twice; " + note
        mfu = [replace(mfu[0], name="MFU"), replace(hfu, name="HFU", color=SERIES[1])]
    yield line_chart("mfu", "Model FLOPs utilisation", mfu, "share of the peak", note=note, percent=True)


def _lines(runs: Sequence[History], names: Sequence[str], key: str, over: Across = STEPS) -> list[Line]:
    """Make a curve per run; the ranges of several would hide each other, so these show means of more steps only."""
    lines = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        x, y = run.metrics.curve(key, over.column)
        at_least = MIN_PIECES if len(runs) == 1 else MIN_PIECES_COMPARED
        points = thinned(x / over.unit, y, N_PIECES if key == LR else n_pieces(len(x), at_least))
        if len(runs) > 1:
            points = replace(points, low=points.mean, high=points.mean)
        lines.append(Line(name if len(runs) > 1 else "", points, *_look_of(i)))
    return lines


def _look_of(i: int) -> tuple[str, str]:
    """Return (color, style) of curve i."""
    return SERIES[i % len(SERIES)], STYLES[i // len(SERIES) % len(STYLES)]


def n_pieces(n_points: int, at_least: int = MIN_PIECES) -> int:
    """Choose the number of pieces of a noisy curve, each with enough points that their mean is less noisy."""
    return max(min(n_points // 8, N_PIECES), at_least)


def _undone(run: History, key: str) -> list[Line]:
    """Make a grey curve per attempt that was set back."""
    curves = [run.undone.where(run.undone[ATTEMPT] == number).curve(key) for number in np.unique(run.undone[ATTEMPT])]
    return [Line("", thinned(x, y, n_pieces(len(x))), FAINT, is_back=True) for x, y in curves if len(x)]


# -- held-out losses and evaluations -------------------------------------------------------------------------------


def _held_out(runs: Sequence[History], names: Sequence[str], over: Across) -> Picture | None:
    """Compare bits per byte of each source, as measured while training and by the evaluator."""
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
        lines.append(Line(": ".join(filter(None, parts)), points, color, style, dots=len(scores) <= 40))
    shown = shown_range([line.points.mean[len(line.points.mean) > 3 :] for line in lines])  # the first is far above
    notes = sources if several and len(sources) == 1 else []
    notes += [over.note] if over.note else []
    return line_chart(
        f"held_out{over.key}", f"Held-out loss{over.title}", lines, "bits per byte",
        note="; ".join(notes), x_title=over.axis, y_range=shown,
    )  # fmt: skip


def _evaluations(runs: Sequence[History], names: Sequence[str]) -> Iterator[Picture | None]:
    """Describe scores of tasks: of one run in one picture, of several in a picture per task."""
    keys = [key for key in dict.fromkeys(k for run in runs for k in keys_of(run.evaluations)) if is_task(key)]
    keys = sorted(keys, key=lambda key: "overall_avg" not in key)[:_MAX_SCORES]

    def lines(curves: Iterable[tuple[str, History, str]]) -> list[Line]:
        return [
            Line(name, _scored(run.evaluations, key, run), *_look_of(i), dots=True)
            for i, (name, run, key) in enumerate(curves)
        ]

    if len(runs) == 1:
        yield line_chart("evaluations", "Evaluation tasks", lines((key, runs[0], key) for key in keys), "score")
        return
    for i, key in enumerate(keys):
        compared = lines((name, run, key) for name, run in zip(names, runs, strict=True))
        yield line_chart(f"evaluations_{i}", key, compared, "score", note="evaluated")


def is_task(key: str) -> bool:
    """Tell scores of tasks from held-out losses and error bars."""
    return key.startswith(("eval/", "core_eval/"))


def _scored(scores: Sequence[Scores], key: str, run: History, over: Across = STEPS) -> Thinned:
    there = [(one.step, one.values[key]) for one in scores if math.isfinite(one.values.get(key, math.nan))]
    x, y = np.array(there, dtype=float).reshape(-1, 2).T
    if over.column != STEP:
        x = run.at(x, over.column) / over.unit
        x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    return thinned(x, y, N_PIECES)


# -- time ----------------------------------------------------------------------------------------------------------

_KINDS = {
    "training": ("training", GOOD),
    "loading": ("waiting for data", SERIES[0]),
    "saving": ("checkpoints", SERIES[1]),
    "validating": ("validation", SERIES[3]),
    "starting": ("start-up", SERIES[7]),
    "lost": ("lost, trained again", BAD),
    "other": ("ending, unreported", SOFT),
    "idle": ("not running", FAINT),
}
assert _KINDS.keys() == SPENT.keys()


def spent_picture(runs: Sequence[History], names: Sequence[str]) -> Picture | None:
    """Describe where the time went: a bar per kind, or a divided one per run."""
    if not any(s > 0 for run in runs for s in run.seconds.values()):
        return None
    note = "wall-clock time from the first attempt on"
    make = (lambda: _spent_of_one(runs[0])) if len(runs) == 1 else lambda: _spent_of_several(runs, names)
    return Picture("time", "Where the time went", note, make)


def _spent_of_one(run: History) -> Figure:
    seconds = {kind: s for kind, s in run.seconds.items() if s > 0}
    labels, colors = zip(*(_KINDS[kind] for kind in seconds), strict=True)
    figure, axes = blank(SMALL)
    bars = axes.barh(labels, list(seconds.values()), color=colors, height=0.62)
    texts = [f"{brief(s)}  {s / sum(seconds.values()):.1%}" for s in seconds.values()]
    axes.bar_label(bars, texts, padding=4, fontsize=8.5)
    axes.set_xlim(0, 1.32 * max(seconds.values()))
    _bare(axes)
    return figure


def _spent_of_several(runs: Sequence[History], names: Sequence[str]) -> Figure:
    figure, axes = blank((SMALL[0], 1.3 + 0.38 * len(runs)))
    places, left, bars = np.arange(len(runs)), np.zeros(len(runs)), None
    totals = np.array([max(sum(run.seconds.values()), 1e-9) for run in runs])
    for kind, (name, color) in _KINDS.items():
        shares = np.array([run.seconds[kind] for run in runs]) / totals
        if shares.any():
            bars = axes.barh(places, shares, left=left, color=color, height=0.62, label=name)
            left += shares
    axes.bar_label(bars, [brief(total) for total in totals], padding=4, fontsize=8.5)
    axes.set_yticks(places, [plain(name) for name in names])
    axes.set_xlim(0, 1.15)
    legend(axes)
    _bare(axes)
    return figure


def _bare(axes: Axes) -> None:
    """Leave only the bars and their names, the first one on top."""
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, labelcolor=INK)


def brief(seconds: float) -> str:
    """Format a duration, with parts of a second if it is short."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g}s"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return (seconds, name) of the unit that suits a span."""
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    return next(((size, name) for size, name in units if seconds >= 3 * size), (1.0, "seconds"))


_MARKS: dict[str, tuple[str, str, float, str]] = {
    "staged": ("o", SERIES[1], 5.5, "staged, not known to be published"),
    "published": ("o", GOOD, 5.0, "checkpoint published"),
    "evaluated": ("D", SERIES[3], 5.0, "evaluated"),
    "failed": ("X", BAD, 7.0, "checkpoint failed"),
    "given up": ("X", SERIES[4], 7.0, "evaluation given up"),
}


def time_line(run: History, prefix: str = "") -> Picture | None:
    """Describe steps over time: a band per attempt, with its end, checkpoints and evaluations."""
    if not any(attempt.began_s is not None for attempt in run.attempts):
        return None
    note = "each attempt is a band; a fall is a restart from an earlier checkpoint"
    return Picture(f"{prefix}time_line", "Time line", note, lambda: _draw_time_line(run), is_wide=True)


def _draw_time_line(run: History) -> Figure:
    began_s = _began_s(run)
    ends = [attempt.ended_s for attempt in run.attempts if attempt.ended_s is not None]
    ends += [event.at_s for event in run.events if event.at_s <= max(ends) + 0.15 * (max(ends) - began_s)]
    size_s, unit = time_unit(max(ends) - began_s)

    def place(at_s: Any) -> Any:
        return (at_s - began_s) / size_s

    figure, axes = blank(WIDE)
    for attempt in run.attempts:
        if attempt.began_s is not None and attempt.ended_s is not None:
            axes.axvspan(place(attempt.began_s), place(attempt.ended_s), color=SERIES[0], alpha=0.1, linewidth=0)
    _draw_over_time(axes, run, STEP, place, SERIES[0], 1.8)
    _draw_events(axes, run, place, max(ends))
    for attempt in run.attempts[-_MAX_LABELS:]:
        if attempt.ended_s is not None:
            _draw_end(axes, attempt, place(attempt.ended_s), max(attempt.last_step or 0, attempt.first_step or 0))
    axes.set_xlim(min(0.0, -0.005 * place(max(ends))), 1.01 * place(max(ends)) or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: counted(value))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.set(xlabel=f"{unit} since the first attempt", ylabel="step")
    legend(axes)
    return figure


def _began_s(run: History) -> float:
    return min(attempt.began_s for attempt in run.attempts if attempt.began_s is not None)


def _draw_over_time(axes: Axes, run: History, key: str, place: Callable[[Any], Any], color: str, width: float) -> None:
    """Draw a column of the metrics, a curve per attempt; in grey what was trained again."""
    for attempt in run.attempts:
        for tables, shade in (((run.metrics, run.undone), FAINT), ((run.metrics,), color)):
            curves = [table.where(table[ATTEMPT] == attempt.number).curve(key, WHEN) for table in tables]
            if key == STEP and attempt.begun_s is not None and attempt.first_step is not None:
                curves.insert(0, (np.array([attempt.begun_s]), np.array([float(attempt.first_step)])))
            x, y = map(np.concatenate, zip(*curves, strict=True))
            points = thinned(x, y, N_PIECES if key == STEP else n_pieces(len(x), MIN_PIECES_COMPARED))
            axes.plot(place(points.x), points.mean, color=shade, linewidth=width, zorder=3)


def _draw_events(axes: Axes, run: History, place: Callable[[Any], Any], last_s: float) -> None:
    published = {(event.step, event.attempt) for event in run.events if event.kind == "published"}
    resumed_from = {attempt.first_step for attempt in run.attempts[1:]}  # these were published, even if nobody noted it
    for kind, (marker, color, size, name) in _MARKS.items():
        some = [e for e in run.events if e.kind == kind and e.at_s <= last_s]
        if kind == "staged":
            some = [e for e in some if (e.step, e.attempt) not in published and e.step not in resumed_from]
        if some:
            xs, ys = [place(event.at_s) for event in some], [event.step for event in some]
            inside = "none" if kind == "staged" else color
            axes.plot(xs, ys, marker, color=color, ms=size, label=name, zorder=5, mfc=inside)


def _draw_end(axes: Axes, attempt: PastAttempt, x: float, y: float) -> None:
    """Mark the end of an attempt, in red if it was killed or failed."""
    went_wrong = attempt.end == "killed" or attempt.end.startswith("failed")
    color = BAD if went_wrong else SOFT
    axes.plot([x], [y], "x" if went_wrong else "|", color=color, ms=8, mew=2, zorder=6)
    axes.annotate(
        plain(attempt.end), (x, y), (-5, 6), textcoords="offset points", ha="right", fontsize=8.5, color=color, zorder=6
    )


def interrupted_picture(run: History, calm: History) -> Picture:
    """Describe the loss of a run that was killed and stopped, on top of an undisturbed one."""
    return Picture("interrupted", "Training loss", "", lambda: _draw_interrupted(run, calm), is_wide=True)


def _draw_interrupted(run: History, calm: History) -> Figure:
    figure, (over_time, over_steps) = blank(WIDE, 2)
    size_s, unit = time_unit(run.metrics[WHEN][-1] - _began_s(run))
    for one, name, color, width in ((calm, "undisturbed", SERIES[1], 4.5), (run, "interrupted", SERIES[0], 1.6)):
        began_s, points = _began_s(one), thinned(*one.metrics.curve(LOSS), N_PIECES)
        _draw_over_time(over_time, one, LOSS, lambda at_s, began_s=began_s: (at_s - began_s) / size_s, color, width)
        over_steps.plot(points.x, points.mean, color=color, linewidth=width)
        over_time.plot([], [], color=color, linewidth=width, label=name)
    ends = [(a.ended_s, a.last_step) for a in run.attempts[:-1] if a.ended_s is not None and a.last_step is not None]
    ended_s, steps = np.array(ends, dtype=float).reshape(-1, 2).T
    for axes, x in ((over_time, (ended_s - _began_s(run)) / size_s), (over_steps, steps)):
        losses = np.interp(steps, *run.metrics.curve(LOSS))
        axes.plot(x, losses, "X", color=BAD, ms=6, zorder=5, label="killed or stopped")
    theirs = dict(zip(*calm.metrics.curve(LOSS), strict=True))
    equal = [theirs[step] == loss for step, loss in zip(*run.metrics.curve(LOSS), strict=True) if step in theirs]
    over_steps.set_title(f"equal bit for bit at {sum(equal)} of {len(equal)} steps", fontsize=9, loc="right")
    over_time.set(xlabel=f"{unit} since the run began", ylabel="training loss, nats per token")
    over_steps.set(xlabel="step")
    legend(over_time)
    return figure


# -- probes --------------------------------------------------------------------------------------------------------


def probe_picture(heat: HeatMap) -> Picture:
    """Describe one statistic of each layer over the steps."""
    key = f"probe_{heat.quantity}_{heat.stat}"
    return Picture(key, f"{heat.quantity}: {heat.stat}", "of each layer", lambda: _draw_heat(heat))


def _draw_heat(heat: HeatMap) -> Figure:
    figure, axes = blank((SMALL[0], min(9.0, 1.5 + 0.16 * max(12, len(heat.layers)))))
    steps, values = heat.steps, heat.values
    if len(steps) == 1:  # a column needs a width
        steps, values = steps + np.array([-0.5, 0.5]), np.repeat(values, 2, axis=1)
    finite = values[np.isfinite(values)]
    is_log = len(finite) > 0 and finite.min() > 0 and finite.max() / finite.min() >= LOG_FROM
    colors = axes.pcolormesh(
        steps, range(len(heat.layers)), values, shading="nearest", norm="log" if is_log else "linear", rasterized=True
    )
    every = math.ceil(len(heat.layers) / 24)
    axes.set_yticks(range(0, len(heat.layers), every), [plain(name) for name in heat.layers[::every]], fontsize=7)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: counted(value))
    axes.set_xlabel("step")
    figure.colorbar(colors, ax=axes, label=heat.stat + (", log scale" if is_log else ""), pad=0.02)
    return figure
