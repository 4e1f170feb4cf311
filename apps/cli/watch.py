"""`lingua watch RUN...`: a live view of runs or of a sweep in the terminal."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lingua.report.watch import Losses, Screen

QUEUE_S = 60.0
"""Interval between queries to Slurm."""


def watch(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of sweeps.")],
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 5.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print it once. So it is where the output is no terminal.")
    ] = False,
) -> None:
    """Watch runs in the terminal: loss curve, speed, time left, checkpoints, evaluations, the newest sample.

    Shows several runs side by side, or as a table if there are too many for the screen; a sweep stands for all of its
    points. It reads only run folders, so it works over ssh and on a login node. Ends when all runs are finished, or
    with Ctrl-C.
    """
    from rich.console import Console
    from rich.live import Live

    out = getattr(sys.stdout, "unescaped", sys.stdout)  # texts of runs are escaped, our colors are not
    view = View(runs)
    live = not once and out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    console = Console(file=out, highlight=False)
    screen = view.look()
    try:
        if live:
            with Live(screen, console=console, screen=True, auto_refresh=False) as shown:
                while not view.is_over:
                    time.sleep(every)
                    screen = view.look()
                    shown.update(screen, refresh=True)
    except KeyboardInterrupt:
        pass
    console.print(screen)


class View:
    """The watched runs."""

    def __init__(self, places: list[Path]) -> None:
        self._places, self._losses = places, dict[Path, "Losses"]()
        self._queue, self._asked_s = {}, -QUEUE_S
        self.is_over = False
        """All runs are finished."""

    def look(self) -> Screen:
        """Read the current state of all runs. Raises RunError for a folder without a run."""
        from lingua.report.diff import telling_labels
        from lingua.report.facts import read_run
        from lingua.report.status import status_of
        from lingua.report.watch import Losses, Screen, Watched
        from lingua.run.lock import this_process
        from lingua.scheduler import jobs_in_queue

        title, folders, n_new = self._runs()
        facts = [read_run(folder) for folder in folders]
        if any(one.job_id for one in facts) and time.monotonic() - self._asked_s >= QUEUE_S:
            self._queue, self._asked_s = jobs_in_queue(), time.monotonic()
        facts = [replace(one, job=self._queue.get(one.job_id)) for one in facts]
        differing = telling_labels([one.config for one in facts]) if len(facts) > 1 else []
        watched = []
        for number, one in enumerate(facts):
            losses = self._losses.setdefault(one.path, Losses(one.path))
            losses.read()
            label = " ".join(filter(None, (one.name, differing[number] if differing else "")))
            watched.append(Watched(label, one, status_of(one, this_process()), losses))
        self.is_over = not n_new and all(one.status.state == "finished" for one in watched)
        if title:
            counts = [one.status.state for one in watched] + ["never ran"] * n_new
            title += ": " + ", ".join(f"{counts.count(state)} {state}" for state in dict.fromkeys(counts))
        return Screen(title, watched)

    def _runs(self) -> tuple[str, list[Path], int]:
        """Return (title of sweeps, run folders, number of points without a run folder yet)."""
        from lingua.config.frozen import CONFIG_FILE
        from lingua.run.find import find_run
        from lingua.sweep.sweep import SWEEP_FILE, read_sweep

        titles, folders, n_new = [], [], 0
        for place in self._places:
            if not (place / SWEEP_FILE).is_file():
                folders.append(find_run(place))
                continue
            sweep = read_sweep(place)
            found = [folder for n in sweep.numbers if (folder := sweep.run_dir(n)).joinpath(CONFIG_FILE).is_file()]
            titles.append(f"sweep {sweep.name}")
            folders, n_new = folders + found, n_new + len(sweep.numbers) - len(found)
        return ", ".join(titles), folders, n_new
