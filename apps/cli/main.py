"""The `lingua` command. Each subcommand imports its code when it is called, so that `--help` is fast."""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from apps.cli import chat as chat_command
from apps.cli import export as export_commands
from apps.cli import runs as run_commands
from apps.cli.ckpt import app as ckpt_app
from apps.cli.data import app as data_app
from apps.cli.drill import drill
from apps.cli.init import init
from apps.cli.push import push
from apps.cli.replay import replay
from apps.cli.sweep import app as sweep_app
from apps.cli.watch import watch
from lingua.config.command_line import (
    DEFAULT_APP,
    app_module,
    app_schema,
    choose_app,
    parse_command_line,
    run_main,
    split_prompts,
    with_ckpt,
)
from lingua.console import AsJson, Commands, show

app = Commands(
    name="lingua",
    help="Pretrain language models: check a config, train, generate. Runs resume exactly where they were killed.",
    epilog="Errors are one sentence; --debug or LINGUA_DEBUG=1 shows the traceback. "
    "Exit codes: 0 done, 2 config or command wrong, 75 saved and asks to be started again, 76 hung, 130 ended by a "
    "person, 1 other failures.",
)

app.add_typer(ckpt_app, name="ckpt")
app.add_typer(data_app, name="data")
app.add_typer(sweep_app, name="sweep")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        print(metadata.version("lingua"))
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


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
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks. Default: as the config says.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that the estimate of hours assumes.")] = 0.4,
    gpu: Annotated[
        str | None, typer.Option(help="GPU to estimate memory and hours for. Default: the one of this machine.")
    ] = None,
    strict_paths: Annotated[bool, typer.Option(help="Missing data and tokenizer files are errors.")] = False,
    kill_every: Annotated[
        str | None, typer.Option(metavar="2h", help="Say what one kill per so long costs, and the best dump.every.")
    ] = None,
    disk_gb_per_s: Annotated[float, typer.Option(help="Rate of the disk that --kill-every assumes.")] = 1.0,
    accept_change: Annotated[bool, typer.Option(help="Allow changes to a started run that need this flag.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every key with its origin, every figure with its formula.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a config and show what it means.

    Prints the figures to plan a run with, and the keys that the config or the command line sets. With --all: the
    resolved config, the file that each value came from, and all derived figures with their formulas.
    """
    line = parse_command_line(words or [])
    line.flags["accept-change"] = accept_change
    from lingua.train.check_report import report

    code = report(
        line,
        world_size=world_size,
        mfu=mfu,
        gpu=gpu,
        strict_paths=strict_paths,
        as_json=as_json,
        everything=everything,
        kill_every=kill_every,
        disk_gb_per_s=disk_gb_per_s,
    )
    raise typer.Exit(code)


@app.command()
def recipe(
    params: Annotated[str, typer.Option(help="Parameters with embeddings: 300M, 1B.", show_default=False)],
    words: Words = None,
    tokens: Annotated[str, typer.Option(help="Tokens of the run: 20B, or 20x for so many per parameter.")] = "20x",
    gpus: Annotated[str, typer.Option(help="Where it trains: 8xH200, or cpu.")] = "h200",
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that hours assume.")] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Print a complete config for a number of parameters, with the rule behind each value.

    CONFIG provides what the rules do not: data, tokenizer, evaluation; the default is the embedded corpus. KEY=VALUE
    overrides the rules.
    """
    from lingua.train.recipe import report

    line = parse_command_line(words or [])
    if line.config is None:
        sample = Path(__file__).parents[1] / "main" / "configs" / "bytes.yaml"
        line.config = str(sample.relative_to(Path.cwd()) if sample.is_relative_to(Path.cwd()) else sample)
    report(line, params, tokens, gpus, mfu, as_json)


@app.command()
def schema(
    reference: Annotated[bool, typer.Option(help="A page of all keys (markdown) instead of the JSON schema.")] = False,
    chosen: Annotated[str, typer.Argument(metavar="[app=PACKAGE]", show_default=False)] = f"app={DEFAULT_APP}",
) -> None:
    """Print the schema of configs: as JSON, for editors, or as a page of all keys with type, default and meaning."""
    import orjson

    from lingua.config.reference import json_schema, reference_page

    args = app_schema(chosen.removeprefix("app="))
    print(reference_page(args) if reference else orjson.dumps(json_schema(args), option=orjson.OPT_INDENT_2).decode())


@app.command()
def components(
    kind: Annotated[str | None, typer.Argument(help="model, optim, loss, source or measure. Default: all.")] = None,
    plugin: Annotated[list[str] | None, typer.Option(help="Also what this module of your own registers.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the registered types of model, optimizer and other parts, with their keys."""
    import importlib

    from lingua.config.compose import see_working_folder
    from lingua.config.reference import components as registered
    from lingua.config.trust import SHIPPED_APPS

    schema, *_ = [app_schema(name) for name in SHIPPED_APPS]
    see_working_folder()
    for name in plugin or []:
        importlib.import_module(name)
    found, lines = registered(schema, kind), []
    for section, parts in found.items():
        for name, part in parts.items():
            keys = [f"{key}: {text}" for key, text in part["keys"].items()] if kind else [", ".join(part["keys"])]
            lines += [f"{section}  type: {name}  {part['about']}", *(f"    {text}" for text in keys)]
    show(found, as_json, lines)


@app.command()
def fork(
    place: Annotated[str, typer.Argument(metavar="RUN@STEP", help="A published checkpoint; RUN alone: its newest.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Folder of the new run; its last part is the name.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to RUN's config; also overlays.", show_default=False),
    ] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks. Default: as the config says.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a new run that resumes from a checkpoint of another run.

    It keeps weights, optimizer, schedule, step and data position, except what checkpoint.reset=[optim, schedule, data,
    step] names, and gets its own tracking id. RUN is only read; everything is checked before NEW is made.
    """
    from apps.cli.fork import fork as make_fork

    made = make_fork(place, new, words or [], world_size)
    lines = [f"{made.folder} resumes from {made.origin}"]
    lines += [f"  {line}" for line in (*made.changes, *(f"warning: {warning}" for warning in made.warnings))]
    if made.pinned_until is None:
        lines.append(f"  {place} could not be pinned: its run may delete it before this one has started, so start soon")
    lines += ["start it with", f"  lingua train {shlex.quote(str(made.config))}"]
    show({**asdict(made), "config": made.config}, as_json, lines)


@app.command(context_settings=PASSED_ON)
def train(words: Words = None) -> None:
    """Train, or resume training.

    The same as `python -m apps.main.train`: all arguments are passed on unchanged.
    """
    _pass_on("train", words or [])


@app.command()
def launch(
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Run the script here, without Slurm.")] = False,
    refreeze: Annotated[bool, typer.Option("--refreeze", help="Freeze the code of the tree again.")] = False,
    accept_change: Annotated[bool, typer.Option(help="Allow changes to a started run that need this flag.")] = False,
) -> None:
    """Submit a run to Slurm.

    Checks the config, freezes it and the code in the run folder, writes run.sh there and submits it. The section
    `launcher` has the Slurm options.
    """
    from lingua.launch.submit import launch

    line = parse_command_line(words or [])
    line.flags |= {name: True for name, on in {"refreeze": refreeze, "accept-change": accept_change}.items() if on}
    raise typer.Exit(launch(line, base_dir=Path.cwd(), dry_run=dry_run, local=local))


class _WithKeys(TyperCommand):
    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from apps.main.generate import key_rows

        with formatter.section("Keys, with their defaults"):
            formatter.write_dl(key_rows())


@app.command(cls=_WithKeys, context_settings=PASSED_ON)
def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN[@STEP] [TEXT] ... [KEY=VALUE] ...",
            help="A run (its newest checkpoint) or a step of it, an export, or weights; prompts; keys.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Generate text from a run, or continue prompts.

    Several texts make one batch; write prompt=TEXT for one that looks like a key. Without one, prompts are read line by
    line. config=FILE names the config of weights that have none near them.
    """
    _pass_on("generate", words or [])


@app.command("eval", context_settings=PASSED_ON)
def evaluate(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RUN[@STEP]] [KEY=VALUE] ...")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Evaluate each checkpoint of the run as it appears.")
    ] = False,
    newest_first: Annotated[
        bool, typer.Option("--newest-first", help="Evaluate the newest waiting checkpoint first.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="With --follow: stop when none is waiting.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="With --follow: a Slurm job for each checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint, or with --follow all of a run as they appear.

    The same as `python -m apps.main.eval`; see its --help. KEY=VALUE are keys of the section `eval`, and config=FILE
    says what to measure. `lingua eval prefetch CONFIG` downloads the data sets of its tasks on a machine with a
    network; jobs then read them from the cache.

    With --slurm this process needs no GPU: each evaluation is a job with async_eval_gpus GPUs and the Slurm options of
    the run's config.
    """
    options = {"newest_first=true": newest_first, "--once": once, "--json": as_json, "--slurm": slurm}
    words = (words or []) if (words or [])[:1] == ["prefetch"] else with_ckpt(words or [])
    words = [re.sub("^ckpt=", "follow=", word) if follow else word for word in words]
    _pass_on("eval", [*words, *(word for word, is_given in options.items() if is_given)])


app.command("export")(export_commands.export)
app.command("import")(export_commands.import_)
app.command(context_settings=PASSED_ON)(chat_command.chat)
for command in (*run_commands.COMMANDS, watch, push, drill, replay, init):
    app.command()(command)


def _pass_on(module: str, words: list[str]) -> NoReturn:
    """Call the chosen app's `main(words)`."""
    typed = split_prompts(words)[0] if module == "generate" else words
    config = [word for word in typed if not word.startswith(("-", "+", "prefetch"))]
    raise typer.Exit(app_module(choose_app(parse_command_line(config)), module).main(words))


def main() -> None:
    """Run the console script `lingua`."""
    sys.exit(run_main(lambda words: app(words, prog_name="lingua"), sys.argv[1:]))


if __name__ == "__main__":
    main()
