"""`lingua data ...`: inspect and prepare data, and prove what a run has read. Torch-free."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingua.config.command_line import parse_command_line
from lingua.console import AsJson, Commands, command_lines, fact_lines, lingua_command, progress_shown, show

if TYPE_CHECKING:
    from lingua.config.keys.data import TokenizerArgs
    from lingua.data.audit import Part, SpanOrigin
    from lingua.data.prepare.pipeline import Job

app = Commands(help="Inspect, index and tokenize data, and prove what a run has read.")

Words = Annotated[
    list[str], typer.Argument(metavar="CONFIG [KEY=VALUE] ...", help="A config with overlays, overrides.")
]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", help="bytes, sp, tiktoken or hf. Default: one trained with the data, else bytes."),
]
TokenizerPath = Annotated[str | None, typer.Option(help="The tokenizer's file.")]
TextKey = Annotated[str | None, typer.Option("--text-key", help="Field with the text. Default: text, else content.")]
LossOn = Annotated[str, typer.Option(help="all, or completion: documents have fields prompt and completion.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes.")]
CORES = len(os.sched_getaffinity(0))
Run = Annotated[Path, typer.Argument(help="Run folder: config.yaml and checkpoints/.")]


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder of texts, or a file.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the new source.", show_default=False)],
    tokenizer_size: Annotated[
        str | None,
        typer.Option("--train-tokenizer", metavar="SIZE", help="Also train a BPE tokenizer, of 16k tokens say."),
    ] = None,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Where NAME is made.")] = Path("data"),
    tmp_dir: Annotated[Path, typer.Option("--tmp-dir", help="Room for the text.")] = Path("/tmp"),
    text_key: TextKey = None,
    max_bad: Annotated[float, typer.Option("--max-bad-fraction", help="End if more lines hold no document.")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Make a source of your own texts: shuffled chunks and a held-out file.

    Reads txt, md, jsonl (each also as gz, zst or in a zip) and parquet files, also in nested folders. A text file is
    one document; files over 64 KiB are cut at empty lines. If it is killed, the same command continues. The tokenizer
    is trained on the first 64 MiB of the shuffled text; data.tokenizer in the printed command uses it.
    """
    from lingua.config.base import ConfigError
    from lingua.config.keys.data import TokenizerArgs
    from lingua.data.prepare import pipeline
    from lingua.data.prepare.convert import chunks_for
    from lingua.data.prepare.counts import Counts
    from lingua.data.prepare.train_tokenizer import bytes_per_token, train_tokenizer
    from lingua.data.prepare.worker_pool import available_bytes
    from lingua.files import plural
    from lingua.tokenizer import build_tokenizer
    from lingua.train.recipe import amount

    such = "8k, 16k or 32000"
    size = None if tokenizer_size is None else int(amount("--train-tokenizer", tokenizer_size, 258, 200_000, such))
    job = pipeline.Job(
        name, available_bytes() * 3 // 4, data_dir, tmp_dir, n_chunks=chunks_for(source), source=source, suffix="",
        text_key=text_key, max_bad_fraction=max_bad,
    )  # fmt: skip
    if job.out.resolve().is_relative_to(source.resolve()):  # the same command would read its own result next time
        raise ConfigError(f"{job.out}, where the result goes, is in {source}; choose another --data-dir")
    facts: dict[str, Any] = {"folder": str(job.out), **pipeline.prepare(job, progress=progress_shown())}
    counts, n_held_out = Counts(**facts["counts"]), facts["held_out"]
    lines = [
        f"{job.out}: {plural(counts.documents, 'document')} of {plural(len(facts['inputs']), 'file')}{counts.left_out}"
    ]
    how = f"{plural(n_held_out, 'document')}, 1 of 100 drawn at random (at least 1), in {name}.val.jsonl"
    lines.append(f"held out for validation: {how if n_held_out else 'none of a single document'}")
    keys = {"data.sources": f"{{{name}: 1}}"} | ({} if data_dir == Path("data") else {"data.root_dir": str(data_dir)})
    if text_key is not None:
        keys = {"data.sources": f"[{{path: {job.out}, text_key: {text_key}}}]"}
    if size is not None:
        with progress_shown() as progress:
            file = train_tokenizer(job.out, size, job.fields, progress)
        tokenizer = build_tokenizer(TokenizerArgs(name="hf", path=str(file)))
        facts["bytes_per_token"] = bytes_per_token(job.out, tokenizer, job.fields)
        shown = f"{facts['bytes_per_token']:.2f} bytes of text per token (data.tokenizer.name=bytes: 1.00)"
        lines.append(f"{file}: {tokenizer.vocab_size:,} tokens; {shown}")
        if tokenizer.vocab_size < size:
            lines.append(f"warning: that is fewer than {size:,}: the texts hold no more; ask for fewer, or add text")
        keys |= {"data.tokenizer.name": "hf", "data.tokenizer.path": str(file)}
    lines += next_lines(job, [f"name={name}", *(f"{key}={value}" for key, value in keys.items())])
    show(facts, as_json, lines)


def next_lines(job: Job, words: list[str]) -> Iterator[str]:
    """Yield the commands to type after a preparation: training with `words`, and a look at the data."""
    from lingua.config.base import ConfigError
    from lingua.data.held_out import held_out_file
    from lingua.data.prepare.first_run import first_steps, first_words
    from lingua.data.prepare.train_tokenizer import bytes_per_token, texts
    from lingua.files import RunError, plural
    from lingua.tokenizer import build_tokenizer
    from lingua.train.check import load

    known = (file for file in ("apps/main/configs/debug.yaml", "config.yaml") if Path(file).is_file())
    text = next(texts(held_out_file(job.out) or job.out, 1, job.fields), "")
    words = [next(known, "CONFIG"), *words, f"sample_prompt={first_words(text) or 'null'}"]
    how_long = ""
    with suppress(ConfigError, RunError):  # a missing config or an existing run, which `lingua train` reports
        checked = load(parse_command_line(words))
        per_token = bytes_per_token(job.out, build_tokenizer(checked.args.data.tokenizer), job.fields)
        n_bytes = sum(file.stat().st_size for file in job.out.glob("*.chunk.*.jsonl"))
        per_pass = max(1, round(n_bytes / per_token / checked.resolved.tokens_per_step))
        words.append(f"steps={first_steps(per_pass)}")
        how_long = f": one pass over it takes about {plural(per_pass, 'step')}"
    yield from ("next:", f"  train on it{how_long}")
    yield command_lines(f"{lingua_command()} train", map(shlex.quote, words))
    yield "  look at it"
    look = (str(job.out), "--page", f"{job.out}.html")
    yield command_lines(f"{lingua_command()} data inspect", map(shlex.quote, look))


def tokenizer_of(name: str | None, path: str | None, data: Path) -> TokenizerArgs:
    """Return the tokenizer that the options name, else the one trained with the data, else bytes."""
    from lingua.config.base import ConfigError
    from lingua.config.keys.data import TokenizerArgs
    from lingua.data.prepare.train_tokenizer import trained_tokenizer

    if name is None and path is not None:
        raise ConfigError(f"--tokenizer-path {path}: say what it is with --tokenizer sp, tiktoken or hf")
    if name is None and (file := trained_tokenizer(data)) is not None:
        name, path = "hf", str(file)
    return TokenizerArgs.model_validate({"name": name or "bytes", "path": path})


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A file of a format that lingua reads, or a folder of them.")],
    doc: Annotated[int | None, typer.Option(min=0, help="Print this document, counted from 0 over all files.")] = None,
    tokenizer: TokenizerName = None,
    tokenizer_path: TokenizerPath = None,
    text_key: TextKey = None,
    loss_on: LossOn = "all",
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write a page for a browser.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count documents, bytes and bad lines by kind, estimate tokens, and summarize the quality of the text.

    Tokens are estimated from 1 MiB of text per source; scripts, odd characters and lines shared by many documents are
    counted in the first 32 MiB. In token files tokens are counted. Reads everything once, except lingua's own token
    files; those of other trainers need the --tokenizer that made them.
    """
    from lingua.config.base import ConfigError
    from lingua.data.blocked_source import TextFields
    from lingua.data.inspect import find_document, inspect_path
    from lingua.report.data_page import quality_lines, write_data_page
    from lingua.tokenizer import build_tokenizer

    fields = TextFields(text_key, loss_on)
    encoder = build_tokenizer(chosen := tokenizer_of(tokenizer, tokenizer_path, path))
    if doc is not None:
        found = find_document(path, doc, fields, encoder)
        place = {key: value for key, value in found.items() if key != "text"}
        show(found, as_json, [*fact_lines(place), "", found["text"]])
        return
    with progress_shown() as progress:
        facts = inspect_path(path, encoder, progress, fields)
    if chosen.path is not None and facts["tokenizer"] == encoder.fingerprint:
        facts["tokenizer"] += f" ({chosen.path})"
    if page is not None:
        if not facts.get("quality"):
            raise ConfigError(f"--page: {path} holds no text to show; give a source of text")
        write_data_page(facts, page)
    shown = {key: value for key, value in facts.items() if key != "quality"}
    shown |= quality_lines(facts) if facts.get("quality") else {}
    show(facts, as_json, fact_lines(shown | ({} if page is None else {"page": str(page)})))
    raise typer.Exit(1 if facts.get("damaged_files") else 0)


@app.command()
def preview(
    words: Words,
    steps: Annotated[int, typer.Option(min=1, help="Steps to read.")] = 1,
    rows: Annotated[int, typer.Option(min=0, help="First rows to show.")] = 2,
    phase: Annotated[str | None, typer.Option(help="Of a run with phases: which. Default: the first.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the mixture as it will be read: documents and tokens per source, epochs, first rows decoded.

    Reads and tokenizes the rows of these steps as training would, those of a later phase as if it came first. Epochs at
    the end of the run, or phase, are estimated from 1 MiB of text per source.
    """
    from lingua.config.base import ConfigError
    from lingua.data.inspect import preview_mixture
    from lingua.data.sources import with_default_sources
    from lingua.train.check import load

    line = parse_command_line(words)
    phases = load(line).phases
    one = phases[0] if phase is None else next((each for each in phases if each.name == phase), None)
    if one is None:
        raise ConfigError(f"--phase {phase}: the phases are {', '.join(p.name for p in phases if p.written) or 'none'}")
    with progress_shown() as progress:
        facts = preview_mixture(
            with_default_sources(one.args.data.model_copy(update={"resting": []})),
            one.size.lanes,
            one.size.rows_per_step,
            n_steps=steps,
            n_steps_of_run=one.last - one.first,
            n_rows_shown=rows,
            progress=progress,
        )
    of_phase = {"phase": one.name, "first_step": one.first + 1, "last_step": one.last} if one.written else {}
    show(of_phase | facts, as_json)


@app.command()
def index(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="jsonl files, or folders of them.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the indexes. Default: beside each file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Index jsonl files for `format: mmap_jsonl`.

    A run looks for FILE.idx beside its file, then in the user's cache, and builds the index if there is none. This
    command builds it ahead of time. After --out, move the index beside the data.
    """
    from lingua.data.inspect import index_files

    with progress_shown() as progress:
        show(index_files(files, out, progress), as_json)


@app.command("create_mmap_index")
def create_mmap_index(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A jsonl file.")],
    index_path: Annotated[
        Path | None, typer.Option("--index-path", help="The index. Default: FILE.idx, where runs look.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Index one jsonl file, like LLMgym's command of this name; `lingua data index` takes several."""
    from lingua.data.inspect import index_files

    with progress_shown() as progress:
        show(index_files([file], None, progress, index_path), as_json)


@app.command()
def tokenize(
    words: Annotated[
        list[str], typer.Argument(metavar="CONFIG [KEY=VALUE] ... | PATH...", help="A config, or sources.")
    ],
    out: Annotated[Path, typer.Option(help="Output folder, with a subfolder for each source.")],
    tokenizer: TokenizerName = None,
    tokenizer_path: TokenizerPath = None,
    text_key: TextKey = None,
    workers: Workers = CORES,
    as_json: AsJson = False,
) -> None:
    """Tokenize sources for `format: tokens`, which gives the same rows as the jsonl files.

    With a config (.yaml), uses its sources and tokenizer; with paths, those of the options. Finished files are kept, so
    run the command again if it was interrupted.
    """
    from lingua.config.frozen import dump_yaml
    from lingua.config.keys.data import DataArgs
    from lingua.data.inspect import tokenize_sources
    from lingua.data.sources import with_default_sources
    from lingua.train.check import load

    if any(word.endswith((".yaml", ".yml")) for word in words):
        line = parse_command_line(words)
        args = with_default_sources(load(line).args.data)
    else:
        sources = [{"path": str(Path(word).absolute()), "text_key": text_key} for word in words]
        encoder = tokenizer_of(tokenizer, tokenizer_path, Path(words[0]))
        args = DataArgs.model_validate({"sources": sources, "tokenizer": encoder})
    with progress_shown() as progress:
        facts = tokenize_sources(args, out, workers, progress)
    show(facts if as_json else {key: value for key, value in facts.items() if key != "data.sources"}, as_json)
    if not as_json:
        tokens_of = {"name": args.tokenizer.name} | args.tokenizer.model_dump(exclude_defaults=True)
        section = {"tokenizer": tokens_of, "sources": facts["data.sources"]}
        print(f"\nin a config:\n\ndata:\n{indent(dump_yaml(section), '  ')}")


@app.command()
def generate(
    words: Words,
    out: Annotated[Path, typer.Option(help="Output folder, with a subfolder for each source.")],
    documents: Annotated[
        int | None, typer.Option(min=1, help="Documents of each source. Default: its key `documents`.")
    ] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Also as jsonl, of ids with blanks between them.")] = False,
    workers: Workers = CORES,
    as_json: AsJson = False,
) -> None:
    """Write the documents of sources of type gssm, markov, copy or random as token files.

    They give the same rows as a source with `documents: N` during training, so a run may switch between the two at any
    restart. Prints the floor of the loss and the `data.sources` to use. Finished files are kept, so run the command
    again if it was interrupted.
    """
    from lingua.data.generate import generate as write
    from lingua.train.check import load

    args = load(parse_command_line(words)).args.data
    with progress_shown() as progress:
        show(write(args, out, documents, workers, progress, jsonl=jsonl), as_json)


@app.command()
def audit(
    run: Run,
    tokens: Annotated[
        bool | None,
        typer.Option("--tokens/--no-tokens", help="Also check tokens. Default: only if that needs no tokenizer."),
    ] = None,
    content: Annotated[
        bool, typer.Option("--content", help="Also --tokens, and compare all bytes with the hashes beside the data.")
    ] = False,
    workers: Workers = CORES,
    as_json: AsJson = False,
) -> None:
    """Prove from the checkpoints that no row was skipped or repeated, across all restarts.

    Reads the sources again in the config's order and compares each lane at each checkpoint: its position, the hash over
    (source, file, offset, piece) of all text before it, and its number of rows. This proves which text made the rows.
    Where a row ends depends on its tokens: --tokens checks this too, and a hash over all tokens, which detects text
    edited in place; it tokenizes everything that was read (not needed for token files and bytes). --content also
    compares all bytes of the sources with the manifest of prepared data, and token files and indexes with their own
    hashes. It cannot show what the trainer did with the rows, or anything before an accepted change of sources. Exit
    code 1: the order was not kept.
    """
    from dataclasses import asdict

    from lingua.data.audit import audit_parts

    parts, n_lanes, states = read_run(run)
    with progress_shown() as progress:
        found = audit_parts(
            parts,
            n_lanes,
            states,
            count_tokens=tokens,
            content=content,
            n_workers=workers,
            progress=progress,
        )
    if skipped := parts[0].args.skip_rows:
        found.notes.append(f"rows {skipped} are passed over: by data.skip_rows, or since a step went wrong there")
    show({"ok": not found.problems, **asdict(found)}, as_json)
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def rows(
    run: Run,
    step: Annotated[int, typer.Option(min=1, help="The update, as `global_step` in metrics.jsonl counts: from 1.")],
    chars: Annotated[int, typer.Option(min=0, help="Characters shown of each document's part.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Show the rows of a step, decoded, with source, file and position of each document in them.

    Reads the data again from the nearest checkpoint before the step.
    """
    from lingua.config.base import ConfigError
    from lingua.config.frozen import read_frozen
    from lingua.data.audit import part_of_step, rows_of_step

    n_steps = (read_frozen(run) or {}).get("steps")
    if isinstance(n_steps, int) and step > n_steps:
        raise ConfigError(f"--step {step}: {run} ends at step {n_steps}; name a step up to that")
    parts, n_lanes, states = read_run(run)
    part = part_of_step(parts, step)
    how: dict[str, Any] = {"first_row": part.first_row, "border": part.first, "switch": part.switch}
    table = list(rows_of_step(part.args, n_lanes, part.rows_per_step, part.states(states), step, **how))
    in_phase = {"phase": part.name} if part.name else {}
    record = {
        "step": step,
        **in_phase,
        "rows": [{"row": n, "documents": [o._asdict() for o in parts]} for n, parts in table],
    }
    lines = [line for n, parts in table for line in (f"row {n}", *document_lines(parts, chars))]
    lines = [f"phase {part.name}", *lines] if part.name else lines
    show(record, as_json, lines)


def document_lines(documents: Iterable[SpanOrigin], chars: int) -> Iterator[str]:
    """Yield the origin of each document of a row and the beginning of its text."""
    for one in documents:
        where = f"{one.unit} {one.offset}, from token {one.token}{'' if one.is_label else ', a prompt'}"
        yield f"  {one.source}  {one.file}  {where}: {one.n_tokens} tokens"
        yield f"    {one.text[:chars]!r}{' ...' if len(one.text) > chars else ''}"


def read_run(run: Path) -> tuple[list[Part], int, dict[int, dict[str, Any]]]:
    """Return (parts of a run, number of lanes, the loader's state by published checkpoint)."""
    from lingua.checkpoint import layout
    from lingua.checkpoint.documents import read_states
    from lingua.checkpoint.lookup import root_of
    from lingua.config.base import ConfigError
    from lingua.config.frozen import CONFIG_FILE, read_config
    from lingua.config.keys.data import DataArgs
    from lingua.data.audit import Part
    from lingua.data.loader import passing_over, saved_state
    from lingua.data.sources import with_default_sources
    from lingua.run.find import find_run

    config = find_run(run) / CONFIG_FILE
    tree, root = read_config(config), root_of(run)
    states: dict[int, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for step in layout.done_steps(root):
        documents = read_states(layout.folder(root, step))
        states[step] = saved_state([document["per_rank"] for document in documents])
        shared = documents[0]["shared"]
    if not states:
        raise ConfigError(f"{run} has no checkpoint yet, so the rows that it read are not known")
    n_lanes, first_row = int(tree["data"]["lanes"]), shared.get("first_row", 0)
    if tree.get("phases"):
        from lingua.train.describe import described
        from lingua.train.phases import parts_in

        parts = parts_in(described(config), tree, first_row)
    else:
        args = with_default_sources(DataArgs.model_validate(tree["data"]))
        parts = [Part(args, int(tree["global_batch_size"]), first_row)]
    return [part._replace(args=passing_over(part.args, shared)) for part in parts], n_lanes, states
