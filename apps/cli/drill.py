"""`lingua drill`: the product proves itself on the user's own partition, or on this machine."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lingua.console import AsJson, Debug, show

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[+OVERLAY] [KEY=VALUE] ...",
        help="What the runs ask of Slurm, and other keys: launcher.partition=preemptible launcher.gpus=8.",
        show_default=False,
    ),
]


def drill(
    words: Overrides = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the run is struck, from its first step on.")] = 10,
    local: Annotated[bool, typer.Option("--local", help="Here, without Slurm.")] = False,
    patience: Annotated[float, typer.Option(min=0.1, help="Minutes in the queue, and for a start, at most.")] = 30,
    folder: Annotated[Path | None, typer.Option(help="A new folder. Default: out/drill-DATE-TIME.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is done when.")] = 1,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prove the promises on this cluster: a small run is signalled, killed and requeued at random, then judged.

    Asks for one GPU, unless told otherwise, and does only what a user may do to a job of his own. Tells how many
    checkpoints were published and lost, whether the run ended bitwise equal to an undisturbed one, how long a signal
    takes until all is safe, and what this cluster does not grant. Exit code 1: a promise was broken.
    """
    from lingua.selfcheck.drill import Drill, Here, OnSlurm
    from lingua.selfcheck.drill_plan import judge, report

    place = folder or Path("out", f"drill-{datetime.now():%Y%m%d-%H%M%S}")
    path = place.absolute()
    work = Drill(
        path, words or [], Here(path / "said.txt") if local else OnSlurm(),
        minutes=minutes, patience_s=60 * patience, base_dir=Path.cwd(), say=partial(typer.echo, err=True),
    )  # fmt: skip
    facts = work.run(seed)
    verdict = judge(facts)
    show(report(facts, verdict) | {"folder": str(path)}, as_json)
    raise typer.Exit(0 if verdict.kept else 1)
