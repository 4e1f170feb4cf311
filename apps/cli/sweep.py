"""`lingua sweep ...`: start many runs from one config as one array job, show how they are doing, compare them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lingua.console import AsJson, Commands, show, show_json, show_table

if TYPE_CHECKING:
    from lingua.scheduler import QueuedJob
    from lingua.sweep.sweep import Plan, Sweep

START = "start"


class _Group(TyperGroup):
    """`lingua sweep CONFIG ...` is `lingua sweep start CONFIG ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [START, *args]
        return super().parse_args(ctx, args)


app = Commands(
    cls=_Group,
    help="Start many runs from one config as one array job, see how they are doing, compare them.\n\n"
    "`lingua sweep CONFIG KEY=V1,V2 ...` is short for `lingua sweep start CONFIG KEY=V1,V2 ...`.",
)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG [KEY=V1,V2,...] [KEY=VALUE] ...",
        help="A config, lists of values to sweep (optim.lr=1e-3,3e-4), and other arguments of `lingua launch`.",
        show_default=False,
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="SWEEP", help="Folder of a sweep.")]
Local = Annotated[bool, typer.Option("--local", help="Run the points here, without Slurm, and wait for them.")]
AtOnce = Annotated[
    int | None,
    typer.Option(
        "--at-once", min=1, help="Points to run at the same time. Default: all under Slurm, one with --local."
    ),
]


@app.command(START)
def start(
    words: Words = None,
    at_once: AtOnce = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the points and the script; write and submit nothing.")
    ] = False,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Check every point, freeze code and configs, and submit one array job.

    Give the values to sweep on the command line or in the config's block `grid:` (lists by key; keys below `paired:`
    are combined value by value; the command line replaces a list of the same key). The folder of the sweep is dump_dir,
    by default <dump_base>/<name>; each point has its run folder in it. All points share the Slurm options of
    `launcher`.
    """
    from lingua.config.command_line import parse_command_line
    from lingua.scheduler import must_be_there
    from lingua.sweep.sweep import make_sweep, plan_sweep

    plan = plan_sweep(parse_command_line(words or []), Path.cwd(), at_once)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if dry_run:
        _show_plan(plan, as_json)
        return
    if not local:
        must_be_there()  # before anything is written
    sweep = make_sweep(plan, Path.cwd())
    if not as_json:
        _show_points(plan)
    _start(sweep, list(sweep.numbers), local, as_json)


@app.command()
def status(sweep: Folder, as_json: AsJson = False) -> None:
    """Show each point: its values, state, step, loss and lowest loss; and the best finished point."""
    from lingua.sweep.status import as_record, notes, read_points, table
    from lingua.sweep.sweep import read_sweep

    found = read_sweep(sweep)
    points = [point for point, _ in read_points(found, _queue(found))]
    if not as_json:
        show_table(*table(found, points))
    show(as_record(found, points), as_json, ["", *notes(points)])


@app.command()
def rerun(
    sweep: Folder,
    points: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="[POINT]...", help="Only these points, even if a person stopped them.", show_default=False
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Skip points that failed with this kind (oom, nan, ...); may be given several times."),
    ] = None,
    refreeze: Annotated[
        bool, typer.Option("--refreeze", help="Freeze the code of the tree again, for all points.")
    ] = False,
    at_once: AtOnce = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the points that would be started.")] = False,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Start points again that failed, were killed or never ran; each resumes from its last checkpoint.

    Points that are queued, running, finished or stopped by a person are left alone. The frozen configs are used; to
    ask Slurm for more time or memory, edit the #SBATCH lines of SWEEP/run.sh.
    """
    from dataclasses import replace

    from lingua.files import CommandError
    from lingua.launch.submit import must_be_checkout
    from lingua.report.diff import label
    from lingua.run.code_snapshot import freeze_code
    from lingua.run.failure import KINDS
    from lingua.sweep.status import read_points, state_text, to_rerun
    from lingua.sweep.sweep import read_sweep

    unknown = [kind for kind in skip or [] if kind not in KINDS]
    if unknown:
        raise CommandError(f"--skip {unknown[0]}: unknown kind of failure; choose from {', '.join(KINDS)}")
    found = read_sweep(sweep)
    now = [point for point, _ in read_points(found, _queue(found, must_answer=not local))]
    chosen = to_rerun(now, points or [], skip or [])
    if not as_json:
        for number in chosen:
            print(f"point {number} ({label(found.values(number))}): {state_text(now[number - 1])}")
    if dry_run:
        if as_json:
            show_json({"points": chosen})
        return
    if refreeze:
        must_be_checkout(Path.cwd())
        freeze_code(Path.cwd(), found.folder, again=True)
    _start(replace(found, at_once=at_once or found.at_once), chosen, local, as_json)


@app.command()
def report(
    sweep: Folder,
    out: Annotated[
        Path | None, typer.Option(help="Folder of report.html and report.png. Default: SWEEP.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html and report.png: the loss against the swept values, the curves and the table of points.

    The page needs no other file. Unfinished points are marked and listed.
    """
    from lingua.sweep.report import write_report
    from lingua.sweep.status import as_record, notes, read_points, table
    from lingua.sweep.sweep import read_sweep

    found = read_sweep(sweep)
    read = read_points(found, _queue(found))
    points = [point for point, _ in read]
    page, picture = write_report(found, read, out or sweep)
    if not as_json:
        show_table(*table(found, points))
    record = {**as_record(found, points), "html": page, "png": picture}
    show(record, as_json, ["", *notes(points), str(page), str(picture)])


# -- shared --------------------------------------------------------------------------------------------------------


def _start(sweep: Sweep, numbers: list[int], local: bool, as_json: bool) -> None:
    """Submit points, or run them here and exit with their code."""
    from lingua.files import RunError
    from lingua.sweep.sweep import gpus_here, run_points, submit_points

    again = f"`lingua sweep rerun {sweep.folder}` tries it again"
    if local:
        stream = sys.stderr if as_json else sys.stdout
        code = run_points(sweep, numbers, gpus=gpus_here(), report=lambda text: print(text, file=stream, flush=True))
        if as_json:
            show_json({"sweep": str(sweep.folder), "points": numbers, "exit_code": code})
        raise typer.Exit(code)
    try:
        known = submit_points(sweep, numbers)
    except RunError as error:
        raise RunError(f"{error}; {sweep.folder} was created, {again}") from None
    record = {"sweep": str(sweep.folder), "job": known.jobs[-1].job, "points": numbers}
    show(record, as_json, [f"job {record['job']}: {len(numbers)} points of {sweep.folder}"])


def _queue(sweep: Sweep, must_answer: bool = False) -> dict[str, QueuedJob]:
    """Return Slurm's jobs; empty if the sweep has none, or if Slurm does not answer and need not."""
    from lingua.scheduler import ask_scheduler, jobs_in_queue, run_command

    if not sweep.jobs:
        return {}
    return jobs_in_queue(run_command if must_answer else ask_scheduler)


def _show_points(plan: Plan) -> None:
    from lingua.report.diff import short_names, spell

    sweep, names = plan.sweep, list(short_names(plan.sweep.keys).values())
    columns = ("point", *names, "parameters", "steps", "tokens", "run folder")
    rows = []
    for number, checked in zip(sweep.numbers, plan.checked, strict=True):
        size = checked.resolved
        values = (spell(sweep.values(number)[key]) for key in sweep.keys)
        figures = (f"{n:,}" for n in (size.n_params, size.n_steps, size.total_tokens))
        rows.append((number, *values, *figures, sweep.run_dir(number)))
    show_table(columns, rows, right=columns[:-1])


def _show_plan(plan: Plan, as_json: bool) -> None:
    sweep = plan.sweep
    if as_json:
        points = [{"point": i, "values": sweep.values(i), "run": sweep.run_dir(i)} for i in sweep.numbers]
        show_json({"sweep": sweep.folder, "points": points, "script": plan.script})
        return
    _show_points(plan)
    print(f"\n{sweep.script}, submitted once for all points:\n\n{plan.script}", end="")
