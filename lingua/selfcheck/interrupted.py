"""Draw the losses of a run that was killed and stopped on top of those of an undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lingua.report import figure as draw
from lingua.report.charts import N_PIECES, draw_over_time, time_unit
from lingua.report.figure import SERIES, Picture
from lingua.report.history import LOSS, History
from lingua.report.page import write
from lingua.report.series import WHEN, curve, thinned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_interrupted(run: History, calm: History, file: Path) -> None:
    """Draw a run that was killed and stopped and an undisturbed one to an .svg or .png file. Raises RunError."""
    picture = Picture("interrupted", "Training loss", "", lambda: _draw(run, calm), is_wide=True)
    write(file, picture.drawn(file.suffix[1:]), "choose another place with --figure FILE")


def _draw(run: History, calm: History) -> Figure:
    figure, (over_time, over_steps) = draw.blank(draw.WIDE, 2)
    size_s, unit = time_unit(run.metrics[WHEN][-1] - run.began_s)
    for one, name, color, width in ((calm, "undisturbed", SERIES[1], 4.5), (run, "interrupted", SERIES[0], 1.6)):
        points = thinned(*curve(one.metrics, LOSS), N_PIECES)
        draw_over_time(over_time, one, LOSS, size_s, color, width)
        over_steps.plot(points.x, points.mean, color=color, linewidth=width)
        over_time.plot([], [], color=color, linewidth=width, label=name)
    ends = [(a.ended_s, a.last_step) for a in run.attempts[:-1] if a.ended_s is not None and a.last_step is not None]
    ended_s, steps = np.array(ends, dtype=float).reshape(-1, 2).T
    for axes, x in ((over_time, (ended_s - run.began_s) / size_s), (over_steps, steps)):
        losses = np.interp(steps, *curve(run.metrics, LOSS))
        axes.plot(x, losses, "X", color=draw.BAD, ms=6, zorder=5, label="killed or stopped")
    theirs = dict(zip(*curve(calm.metrics, LOSS), strict=True))
    equal = [theirs[step] == loss for step, loss in zip(*curve(run.metrics, LOSS), strict=True) if step in theirs]
    over_steps.set_title(f"equal bit for bit at {sum(equal)} of {len(equal)} steps", fontsize=9, loc="right")
    over_time.set(xlabel=f"{unit} since the run began", ylabel="training loss, nats per token")
    over_steps.set(xlabel="step")
    draw.legend(over_time, draw.WIDE[0])
    return figure
