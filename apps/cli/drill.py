"""`lingua drill`: test lingua's guarantees on the user's own partition, or on this machine."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lingua.console import AsJson, show

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[+OVERLAY] [KEY=VALUE] ...",
        help="Slurm options of the runs and other keys: launcher.partition=preemptible launcher.gpus=8.",
        show_default=False,
    ),
]


def drill(
    words: Overrides = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long to inject faults, from the first step on.")] = 10,
    local: Annotated[bool, typer.Option("--local", help="Run here, without Slurm.")] = False,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Maximum minutes to wait in the queue, and for an attempt to begin.")
    ] = 30,
    folder: Annotated[Path | None, typer.Option(help="A new folder. Default: out/drill-DATE-TIME.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 1,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the losses of both runs, as .svg or .png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test lingua's guarantees on this cluster: signal, kill and requeue a small run at random, then check it.

    Uses one GPU by default and does only what users may do to their own jobs. Reports how many checkpoints were
    published and lost, whether the run ended bitwise equal to an undisturbed one, how long it takes from a signal until
    everything is saved, and what this cluster does not allow. Exit code 1: a guarantee was broken.
    """
    from lingua.files import CommandError
    from lingua.report.facts import read_run
    from lingua.report.figure import must_draw
    from lingua.report.history import read_history
    from lingua.run.lock import this_process
    from lingua.selfcheck.drill import Drill, OnSlurm, OnThisMachine
    from lingua.selfcheck.drill_plan import report
    from lingua.selfcheck.interrupted import write_interrupted

    if figure is not None and figure.suffix not in (".svg", ".png"):
        raise CommandError(f"--figure {figure}: the name of the file must end in .svg or .png")
    if figure is not None:
        must_draw()
    path = (folder or Path("out", f"drill-{datetime.now():%Y%m%d-%H%M%S}")).absolute()
    site = OnThisMachine(path / "said.txt") if local else OnSlurm()
    work = Drill(
        path, words or [], site, minutes=minutes, patience_s=60 * patience, base_dir=Path.cwd(),
        report=partial(typer.echo, err=True),
    )  # fmt: skip
    found = report(work.run(seed))
    show(found | {"folder": str(path)}, as_json)
    if figure is not None and found["bitwise_equal"] is not None:  # the undisturbed run trained as far
        taken, calm = (read_history(read_run(path / name), this_process()) for name in ("taken", "calm"))
        write_interrupted(taken, calm, figure)
    raise typer.Exit(0 if found["kept"] else 1)
