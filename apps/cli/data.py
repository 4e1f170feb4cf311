"""`lingua data ...`: look at data, prepare it for faster reading, and prove what a run has read.

Thin: each command is a call into lingua/data and a few lines of output; `--json` prints one JSON object instead.
Cost: no torch; numpy from the first command on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingua.config.command_line import parse_command_line
from lingua.console import AsJson, Debug, progress_shown, show
from lingua.train.check import load

if TYPE_CHECKING:
    from lingua.config.keys.data import DataArgs

app = typer.Typer(
    help="Look at data, index or tokenize it, and prove what a run has read. No torch.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Words = Annotated[
    list[str], typer.Argument(metavar="CONFIG [KEY=VALUE] ...", help="A config with overlays, overrides.")
]
TokenizerName = Annotated[str, typer.Option("--tokenizer", help="bytes, sp, tiktoken or hf.")]
TokenizerPath = Annotated[str | None, typer.Option(help="File of the tokenizer.")]
TextKey = Annotated[str | None, typer.Option(help="Field with the text. Default: text, else content.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes.")]
CORES = len(os.sched_getaffinity(0))
Run = Annotated[Path, typer.Argument(help="Run folder: config.yaml and checkpoints/.")]


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A jsonl or token file, or a folder of them.")],
    doc: Annotated[int | None, typer.Option(min=0, help="Print this document, counted from 0 over all files.")] = None,
    tokenizer: TokenizerName = "bytes",
    tokenizer_path: TokenizerPath = None,
    text_key: TextKey = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Count documents, bytes and bad lines by kind, and estimate tokens.

    Tokens are estimated from a sample of 1 MiB of text per source, those of token files are counted. Reads everything
    once, token files excepted.
    """
    from lingua.config.keys.data import TokenizerArgs
    from lingua.data.inspect import find_document, inspect_path
    from lingua.tokenizer import build_tokenizer

    if doc is not None:
        show(find_document(path, doc, text_key), as_json)
        return
    encoder = build_tokenizer(TokenizerArgs.model_validate({"name": tokenizer, "path": tokenizer_path}))
    with progress_shown() as progress:
        facts = inspect_path(path, encoder, text_key, progress)
    show(facts, as_json)


@app.command()
def preview(
    words: Words,
    steps: Annotated[int, typer.Option(min=1, help="Steps to read.")] = 1,
    rows: Annotated[int, typer.Option(min=0, help="First rows to show.")] = 2,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the mixture as it will be read: documents and tokens per source, epochs, first rows decoded.

    Reads and tokenizes the rows of these steps, as training would. Epochs at the end of the run are estimated from a
    sample of 1 MiB of text per source.
    """
    from lingua.data.inspect import preview_mixture
    from lingua.data.sources import filled

    line = parse_command_line(words)
    checked = load(line)
    size = checked.resolved
    with progress_shown() as progress:
        facts = preview_mixture(
            filled(checked.args.data),
            size.lanes,
            size.rows_per_step,
            n_steps=steps,
            n_steps_of_run=size.n_steps,
            n_rows_shown=rows,
            progress=progress,
        )
    show(facts, as_json)


@app.command()
def index(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="jsonl files, or folders of them.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the indexes. Default: beside each file.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Index jsonl files for `format: mmap_jsonl`.

    A run looks for the index FILE.idx beside its file, then in the user's cache, and makes it where there is none; made
    here, a run need not. From --out, put it beside the data.
    """
    from lingua.data.inspect import index_files

    with progress_shown() as progress:
        show(index_files(files, out, progress), as_json)


@app.command()
def tokenize(
    words: Annotated[
        list[str], typer.Argument(metavar="CONFIG [KEY=VALUE] ... | PATH...", help="A config, or sources.")
    ],
    out: Annotated[Path, typer.Option(help="Folder; each source gets one of its name there.")],
    tokenizer: TokenizerName = "bytes",
    tokenizer_path: TokenizerPath = None,
    text_key: TextKey = None,
    workers: Workers = CORES,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tokenize sources for `format: tokens`, which gives the rows of the jsonl they were made from.

    With a config (.yaml), its sources and its tokenizer; with paths, those of the options. What is made already, of the
    same file by the same tokenizer, stays: give the command again after an interruption.
    """
    from lingua.config.keys.data import DataArgs, TokenizerArgs
    from lingua.data.inspect import tokenize_sources
    from lingua.data.sources import filled

    if any(word.endswith((".yaml", ".yml")) for word in words):
        line = parse_command_line(words)
        args = filled(load(line).args.data)
    else:
        sources = [{"path": str(Path(word).absolute()), "text_key": text_key} for word in words]
        encoder = TokenizerArgs.model_validate({"name": tokenizer, "path": tokenizer_path})
        args = DataArgs.model_validate({"sources": sources, "tokenizer": encoder})
    with progress_shown() as progress:
        show(tokenize_sources(args, out, workers, progress), as_json)


@app.command()
def audit(
    run: Run,
    tokens: Annotated[
        bool | None,
        typer.Option("--tokens/--no-tokens", help="Also count tokens. Default: where no tokenizer is needed for it."),
    ] = None,
    workers: Workers = CORES,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prove from the checkpoints that no row was skipped or repeated, over all restarts.

    Reads the sources again, in the order of the config, and compares each lane at each checkpoint: its position, the
    hash over (source, file, offset, piece) of all text before it, and the number of rows it gave. That shows which text
    made the rows. Where in that text a row ends depends on its tokens: that is confirmed with --tokens, which takes the
    tokenizer's time for all that was read (nothing for token files and bytes). It cannot show what the trainer did with
    the rows, nor anything from before a change of sources that was accepted. Exit code 1: the order was not kept.
    """
    from dataclasses import asdict

    from lingua.data.audit import audit as confirm

    args, n_lanes, rows_per_step, first_row, states = read_run(run)
    with progress_shown() as progress:
        found = confirm(
            args,
            n_lanes,
            rows_per_step,
            states,
            first_row=first_row,
            count_tokens=tokens,
            n_workers=workers,
            progress=progress,
        )
    show({"ok": not found.problems, **asdict(found)}, as_json)
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def rows(
    run: Run,
    step: Annotated[int, typer.Option(min=1, help="The update, as `global_step` in metrics.jsonl counts: from 1.")],
    chars: Annotated[int, typer.Option(min=0, help="Characters shown of each document's part.")] = 200,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the very rows of a step, decoded, with source, file and byte offset of each document in them.

    Made again from the nearest checkpoint before the step, so its cost is that of reading from there on.
    """
    from lingua.data.audit import rows_of_step

    args, n_lanes, rows_per_step, first_row, states = read_run(run)
    table = rows_of_step(args, n_lanes, rows_per_step, states, step, first_row=first_row)
    if as_json:
        show(
            {"step": step, "rows": [{"row": n, "documents": [o._asdict() for o in parts]} for n, parts in table]}, True
        )
        return
    for number, parts in table:
        print(f"row {number}")
        for part in parts:
            where = f"{part.unit} {part.offset}, from token {part.token}"
            print(f"  {part.source}  {part.file}  {where}: {part.n_tokens} tokens")
            print(f"    {part.text[:chars]!r}{' ...' if len(part.text) > chars else ''}")


def read_run(run: Path) -> tuple[DataArgs, int, int, int, dict[int, dict[str, Any]]]:
    """Data section, K, G, first row and the loader's state of each published checkpoint, of all lanes."""
    from lingua.checkpoint import layout
    from lingua.checkpoint.lookup import root_of
    from lingua.config.base import ConfigError
    from lingua.config.frozen import CONFIG_FILE, read_config
    from lingua.config.keys.data import DataArgs
    from lingua.data.loader import merge_states
    from lingua.data.sources import filled
    from lingua.files import read_json

    config = run / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{run}: no run folder, it has no {CONFIG_FILE}")
    tree, root = read_config(config), root_of(run)
    first_row, states = 0, {}
    for step in layout.done_steps(root):
        documents = [read_json(file) for file in sorted(layout.folder(root, step).glob("train_state.*.json"))]
        states[step] = merge_states([document["per_rank"]["data"] for document in documents])
        first_row = documents[0]["shared"].get("first_row", 0)
    if not states:
        raise ConfigError(f"{run}: no checkpoint yet, so there is nothing to go by")
    args = filled(DataArgs.model_validate(tree["data"]))
    return args, int(tree["data"]["lanes"]), int(tree["global_batch_size"]), first_row, states
