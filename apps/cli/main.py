"""The `lingua` command: thin; every sub-command is one call into a room, imported when it is called.

Cost: `lingua --help` imports typer and nothing of ours that is heavy.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from apps.cli import export as export_commands
from apps.cli import runs as run_commands
from apps.cli.ckpt import app as ckpt_app
from apps.cli.data import app as data_app
from apps.cli.drill import drill
from apps.cli.replay import replay
from apps.cli.sweep import app as sweep_app
from lingua.config.command_line import (
    DEFAULT_APP,
    app_module,
    app_schema,
    choose_app,
    parse_command_line,
    run_main,
    with_ckpt,
)
from lingua.console import AsJson, Debug, show_json

app = typer.Typer(
    name="lingua",
    help="Pretrain language models: check a config, train, generate. Killed anywhere, it goes on where it was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in boxes would take longer to import than everything else
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Errors are one sentence; --debug or LINGUA_DEBUG=1 shows the traceback. "
    "Exit codes: 0 done, 2 config or command wrong, 75 saved and asks to be started again, 76 hung, 130 ended by a "
    "person, 1 other failures.",
)

app.add_typer(ckpt_app, name="ckpt")
app.add_typer(data_app, name="data")
app.add_typer(sweep_app, name="sweep")

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG [+OVERLAY] [KEY=VALUE] ...",
        help="A config (bare or as config=FILE), overlays (+debug, +my.yaml), overrides (optim.lr=1e-4), group picks "
        "(model=llama_7B), app=PACKAGE.",
        show_default=False,
    ),
]
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command()
def check(
    words: Words = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks. Default: those the config speaks of.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that the hours are computed with.")] = 0.4,
    gpu: Annotated[str, typer.Option(help="GPU that memory and hours are computed for.")] = "h200",
    strict_paths: Annotated[bool, typer.Option(help="Missing data and tokenizer files are errors.")] = False,
    accept_change: Annotated[bool, typer.Option(help="Allow changes of a started run that need it.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a config and plan with it.

    Prints what it resolves to, the file each value came from, and derived figures with their formulas.
    """
    line = parse_command_line(words or [])
    line.flags["accept-change"] = accept_change
    from lingua.train.check_report import report

    code = report(line, world_size=world_size, mfu=mfu, gpu=gpu, strict_paths=strict_paths, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def schema(
    reference: Annotated[bool, typer.Option(help="A page of all keys (markdown) instead of the JSON schema.")] = False,
    chosen: Annotated[str, typer.Argument(metavar="[app=PACKAGE]", show_default=False)] = f"app={DEFAULT_APP}",
    debug: Debug = False,
) -> None:
    """Print the schema of configs.

    As JSON, from which editors complete YAML, or as a page of all keys with type, default and meaning.
    """
    import orjson

    from lingua.config.reference import json_schema, reference_page

    args = app_schema(chosen.removeprefix("app="))
    print(reference_page(args) if reference else orjson.dumps(json_schema(args), option=orjson.OPT_INDENT_2).decode())


@app.command()
def fork(
    place: Annotated[str, typer.Argument(metavar="RUN@STEP", help="A published checkpoint; RUN alone: its newest.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Folder of the new run; its last part is the name.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="On top of RUN's config; also overlays.", show_default=False),
    ] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks. Default: those the config speaks of.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a new run that goes on from another one's checkpoint.

    It takes over weights, optimizer, schedule, step and data position, except what checkpoint.reset=[optim, schedule,
    data, step] names, and gets a tracking id of its own. RUN is only read; everything is checked before NEW is made.
    """
    from apps.cli.fork import fork as make_fork

    made = make_fork(place, new, words or [], world_size)
    if as_json:
        show_json({**asdict(made), "config": made.config})
        return
    print(f"{made.folder} goes on from {made.origin}")
    for line in (*made.changes, *(f"warning: {warning}" for warning in made.warnings)):
        print(f"  {line}")
    if made.pinned_until is None:
        print(f"  {place} could not be pinned: its run's retention may delete it before the first start, so start soon")
    print(f"start it with\n  lingua train {shlex.quote(str(made.config))}")


@app.command(context_settings=PASSED_ON)
def train(words: Words = None) -> None:
    """Train, or go on training.

    The same as `python -m apps.main.train`: all words are passed on unchanged.
    """
    _pass_on("train", words or [])


@app.command()
def launch(
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Run the script here, without Slurm.")] = False,
    refreeze: Annotated[bool, typer.Option("--refreeze", help="Take the code of the tree anew.")] = False,
    accept_change: Annotated[bool, typer.Option(help="Allow changes of a started run that need it.")] = False,
    debug: Debug = False,
) -> None:
    """Submit a run to Slurm.

    Checks the config, freezes it and the code in the run folder, writes run.sh there and submits it. The section
    `launcher` says what is asked of Slurm.
    """
    from pathlib import Path

    from lingua.launch.submit import launch

    line = parse_command_line(words or [])
    line.flags |= {name: True for name, on in {"refreeze": refreeze, "accept-change": accept_change}.items() if on}
    raise typer.Exit(launch(line, base_dir=Path.cwd(), dry_run=dry_run, local=local))


@app.command(context_settings=PASSED_ON)
def generate(
    words: Annotated[list[str] | None, typer.Argument(metavar="ckpt=RUN_OR_FOLDER [KEY=VALUE] ...")] = None,
) -> None:
    """Generate text from a run.

    The same as `python -m apps.main.generate`: all words are passed on unchanged.
    """
    _pass_on("generate", words or [])


@app.command("eval", context_settings=PASSED_ON)
def evaluate(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RUN[@STEP]] [KEY=VALUE] ...")] = None,
    follow: Annotated[str | None, typer.Option(metavar="RUN", help="Each checkpoint as it appears.")] = None,
    newest_first: Annotated[bool, typer.Option("--newest-first", help="Of those that wait, the newest first.")] = False,
    once: Annotated[bool, typer.Option("--once", help="With --follow: end as soon as nothing waits.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="With --follow: a Slurm job for each checkpoint.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Evaluate a checkpoint, or with --follow all of a run as they appear.

    The same as `python -m apps.main.eval`, whose --help tells the rest: KEY=VALUE are keys of the section `eval`, and
    config=FILE says what to measure. `lingua eval prefetch CONFIG` fetches the data sets of its tasks, where there is a
    network; jobs then read them from the cache.

    With --slurm this process needs no GPU: each evaluation is a job, which asks for async_eval_gpus and what the
    section slurm of the run's config says.
    """
    if slurm:
        from lingua.eval.slurm_jobs import follow_by_jobs
        from lingua.logger import start_logging

        if follow is None:
            raise typer.BadParameter("--slurm goes with --follow RUN")
        start_logging(own_packages=("lingua",))
        line = parse_command_line([*(words or []), *(["newest_first=true"] if newest_first else [])])
        raise typer.Exit(follow_by_jobs(Path(follow), line, once=once, base_dir=Path.cwd()))
    options = {f"follow={follow}": follow, "newest_first=true": newest_first, "--once": once, "--json": as_json}
    options["--debug"] = debug
    given = [word for word, is_given in options.items() if is_given]
    words = words or []
    _pass_on("eval", [*(words if words[:1] == ["prefetch"] else with_ckpt(words)), *given])


app.command("export")(export_commands.export)
app.command("import")(export_commands.import_)
for command in (*run_commands.COMMANDS, drill, replay):
    app.command()(command)


def _pass_on(room: str, words: list[str]) -> NoReturn:
    """Call the chosen app's `main(words)`."""
    config = [word for word in words if not word.startswith(("-", "+", "prompt=", "prefetch"))]
    raise typer.Exit(app_module(choose_app(parse_command_line(config)), room).main(words))


def main() -> None:
    """Console script `lingua`."""
    sys.exit(run_main(lambda words: app(words, prog_name="lingua"), sys.argv[1:]))


if __name__ == "__main__":
    main()
