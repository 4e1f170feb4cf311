"""`lingua export` and `lingua import`: convert models to and from other formats.

The output folder appears whole or not at all. Weights of a checkpoint are verified against its manifest before they are
read, and pinned meanwhile. Needs no GPU, executes no code in a file, reads the weights twice (verify, convert) and
takes memory for about three times the largest tensor. Commands import torch when they run.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.made import Made
from lingua.console import AsJson, progress_shown, show_json

if TYPE_CHECKING:
    from lingua.checkpoint.export_weights import ExportTensor
    from lingua.checkpoint.lookup import Checkpoint
    from lingua.config.keys.train import TrainArgs
    from lingua.console import Progress
    from lingua.files import Files
    from lingua.model.huggingface import Translation

GIGA = 10**9
_CONFIG_HEAD = (
    "# Weights of {origin!r}. Continued pretraining: lingua train {config!r} data.root_dir=... data.sources=...\n"
)


class Format(StrEnum):
    """Format of an exported model."""

    hf = "hf"
    safetensors = "safetensors"
    torch = "torch"
    gguf = "gguf"


class Dtype(StrEnum):
    """Type of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    place: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]",
            help="A run (its newest checkpoint), RUN@STEP, a checkpoint folder, or a file or folder of weights. :ema "
            "behind a checkpoint takes the average of its weights (optim.ema).",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder; it must not exist.")],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="hf: what AutoModelForCausalLM opens, with the tokenizer; safetensors: our names and config.yaml; "
            "torch: consolidated.pth and config.yaml; gguf: model.gguf and a Modelfile, for llama.cpp and Ollama.",
        ),
    ] = Format.hf,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: as they are stored.")] = None,
    shard_gb: Annotated[float, typer.Option(min=1e-6, help="Maximum size of a safetensors file (10^9 bytes).")] = 5.0,
    trim_vocab: Annotated[
        bool,
        typer.Option("--trim-vocab", help="hf: drop rows of embedding and head beyond the tokenizer's vocabulary."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for other programs: a Hugging Face folder, safetensors, one torch file, or GGUF.

    Without @STEP, exports the newest checkpoint that verifies. The run is only read, so it may be training or belong to
    another user.
    """
    made = make_export(place, out, form, dtype=dtype, shard_bytes=shard_gb * GIGA, trim_vocab=trim_vocab)
    show_made(made, as_json)
    if form is Format.hf and not as_json:
        print(f'open it with\n  AutoModelForCausalLM.from_pretrained("{made.folder}")')
    if form is Format.gguf and not as_json:
        print(f"open it with\n  llama-cli -m {shlex.quote(str(made.folder / 'model.gguf'))} -p PROMPT")


def import_(
    place: Annotated[str, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder; with --run, a run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; it must not exist.")],
    run: Annotated[
        bool, typer.Option("--run", help="Import a run of Meta Lingua: weights, optimizer, step and config.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="With --run: config to use instead of the old run's config.yaml.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Import a model: weights with lingua's names, a config.yaml that describes it, its tokenizer.

    Use OUT in checkpoint.init_ckpt_path, generate and export; its config.yaml starts continued pretraining. With
    --run, OUT is a run folder that resumes at the old run's step.
    """
    if config is not None and not run:
        from lingua.config.base import ConfigError

        raise ConfigError("--config goes with --run; a Hugging Face folder has its own config.json")
    if run:
        from apps.cli.takeover import take_over

        with progress_shown() as progress:
            made = take_over(Path(place), out, progress, config=config)
    else:
        made = make_import(Path(place), out)
    show_made(made, as_json)
    if not as_json:
        more = "" if run else " data.root_dir=... data.sources=..."
        print(f"train it with\n  lingua train {shlex.quote(str(made.folder / 'config.yaml'))}{more}")


def show_made(made: Made, as_json: bool) -> None:
    from lingua.files import human_bytes

    if as_json:
        show_json(asdict(made))
        return
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{made.folder}: {human_bytes(made.bytes)} from {made.origin}")


# -- export ----------------------------------------------------------------------------------------------------------


def make_export(
    place: str,
    out: Path,
    form: Format,
    *,
    dtype: Dtype | None = None,
    shard_bytes: float = 5 * GIGA,
    trim_vocab: bool = False,
    files: Files | None = None,
) -> Made:
    """Run `lingua export`. On ConfigError, RunError or OSError no folder is left."""
    from lingua.checkpoint.export_weights import as_ours, as_theirs, write_safetensors
    from lingua.checkpoint.load_weights import open_source
    from lingua.checkpoint.lookup import EMA_SUFFIX, without_ema
    from lingua.config.base import ConfigError
    from lingua.config.frozen import CONFIG_FILE, public_yaml
    from lingua.distributed.parallelize import DTYPES
    from lingua.files import DISK, whole_folder, write_whole
    from lingua.train.describe import config_of

    files = files or DISK
    if dtype is not None and form is Format.torch:
        raise ConfigError("--dtype goes with --format hf, safetensors and gguf; a torch file has the stored type")
    if form is Format.torch and without_ema(place)[1]:
        raise ConfigError(f"--format torch does not take {EMA_SUFFIX}; use --format safetensors")
    if trim_vocab and form not in (Format.hf, Format.gguf):
        raise ConfigError("--trim-vocab goes with --format hf and gguf; our own programs know the tokenizer")
    config = config_of(place)
    # First, since verifying the weights takes long.
    translated = _translated(config, place) if form in (Format.hf, Format.gguf) else None
    if translated is not None and form is Format.gguf:
        from lingua.checkpoint.gguf import Gguf, must_be_gguf

        must_be_gguf(translated[0], translated[1].model_types[0])
        translated = translated[0], Gguf(), translated[2]
    made = Made(out, place)
    with (
        whole_folder(out, files=files) as folder,
        progress_shown() as progress,
        _verified(place, progress) as checkpoint,
    ):
        if form is Format.torch:
            _write_torch(folder, checkpoint, place, progress)
        else:
            suffix = EMA_SUFFIX if without_ema(place)[1] else ""
            source = open_source(f"{checkpoint.folder}{suffix}" if checkpoint else place, sizes_only=True)
            made.origin, torch_type = source.what, None if dtype is None else DTYPES[dtype]
            if translated is not None:
                args, translation, made.warnings = translated
                items = as_theirs(source, args.model, translation, _rows_to_keep(args, trim_vocab), torch_type)
                if form is Format.hf:
                    made.warnings += _describe(folder, args, translation, items[0], checkpoint, files)
            else:
                items = as_ours(source, torch_type)
            progress.begin("writing", sum(item.size_bytes for item in items))
            if translated is not None and form is Format.gguf:
                from lingua.checkpoint.gguf import write_gguf

                _same_tokenizer(translated[0], checkpoint)
                write_gguf(folder, translated[0], items, advance=progress.advance, files=files)
            else:
                write_safetensors(folder, items, shard_bytes, advance=progress.advance, files=files)
        if form in (Format.safetensors, Format.torch):
            write_whole(folder / CONFIG_FILE, public_yaml(_travelling(config)), files=files)
        _count(made, folder)
    return made


def make_average(places: Sequence[str], out: Path) -> Made:
    """Run `lingua ckpt average`. On ConfigError, RunError or OSError no folder is left."""
    from lingua.checkpoint.export_weights import as_average, write_safetensors
    from lingua.checkpoint.load_weights import open_source
    from lingua.config.base import ConfigError
    from lingua.config.frozen import CONFIG_FILE, public_yaml
    from lingua.files import whole_folder, write_whole
    from lingua.train.describe import config_of

    if len(places) < 2:
        raise ConfigError("command line: an average needs two checkpoints or more; write RUN@900 RUN@950 --out DIR")
    config = config_of(places[0])
    made = Made(out, f"the mean of {', '.join(places)}")
    with whole_folder(out) as folder, progress_shown() as progress, ExitStack() as stack:
        for place in places:
            stack.enter_context(_verified(place, progress))
        items = as_average([open_source(place, sizes_only=True) for place in places])
        progress.begin("writing", sum(item.size_bytes for item in items))
        write_safetensors(folder, items, 5 * GIGA, advance=progress.advance)
        write_whole(folder / CONFIG_FILE, public_yaml(_travelling(config)))
        _count(made, folder)
    return made


def _count(made: Made, folder: Path) -> None:
    made.files = sorted(path.name for path in folder.iterdir())
    made.bytes = sum(path.stat().st_size for path in folder.iterdir())


@contextmanager
def _verified(place: str, progress: Progress) -> Iterator[Checkpoint | None]:
    """Verify the weights of a checkpoint and pin it; yield None for a file or folder of weights without a manifest."""
    from lingua.checkpoint import lookup
    from lingua.checkpoint.load_weights import is_weights
    from lingua.checkpoint.tools.copy import pinned

    place, is_average = lookup.without_ema(place)
    needed = lookup.every_file if is_average else is_weights
    if not lookup.is_checkpoint(place):
        yield None
        return
    newest = lookup.find_one(place)
    progress.begin(f"verifying {newest}", sum(f.size_bytes for n, f in newest.manifest().items() if needed(n)))
    checkpoint = lookup.intact(place, needed=needed, advance=progress.advance)
    if checkpoint.root is None or checkpoint.step is None:
        yield checkpoint
        return
    with pinned(checkpoint.root, checkpoint.step, "export"):
        yield checkpoint


def _rows_to_keep(args: TrainArgs, trim_vocab: bool) -> int | None:
    """Return how many rows of embedding and head to export, or None for all."""
    from lingua.config.keys.model import DecoderArgs
    from lingua.tokenizer import build_tokenizer

    model = args.model
    if trim_vocab:
        return build_tokenizer(args.data.tokenizer).vocab_size
    if not isinstance(model, DecoderArgs) or model.vocab_multiple_of == 1:
        return None
    # Other programs would treat the padded rows as tokens and give them probability.
    return model.vocab_size if model.vocab_size > 0 else build_tokenizer(args.data.tokenizer).vocab_size


def _translated(config: Path, place: str) -> tuple[TrainArgs, Translation, list[str]]:
    """Return (args, translation of the model, warnings). Raises ConfigError if Hugging Face has no such model."""
    from lingua.config.base import ConfigError, parts
    from lingua.config.command_line import DEFAULT_APP, CommandLine, choose_app
    from lingua.model.huggingface import translation_of
    from lingua.train.describe import described, of_checkpoint

    app = choose_app(CommandLine(config=str(config)))
    args = of_checkpoint(described(config), place)
    translation = translation_of(args.model)
    if translation is None:
        raise ConfigError(
            f"{config}: model.type is {args.model.type!r}, which Hugging Face's libraries do not have; "
            "use --format safetensors"
        )
    if problems := [f"{config}: {problem}; use --format safetensors" for problem in translation.not_theirs(args.model)]:
        raise ConfigError(problems)
    if app == DEFAULT_APP or type(args.model) is parts("model").get(args.model.type):
        return args, translation, []
    kind = translation.model_types[0]
    warning = f"the app {app} has its own model; its tensors fit a {kind}, but compare for yourself whether it computes"
    return args, translation, [f"{config}: {warning} the same"]


def _describe(
    folder: Path,
    args: TrainArgs,
    translation: Translation,
    embedding: ExportTensor,
    checkpoint: Checkpoint | None,
    files: Files,
) -> list[str]:
    """Write config.json, generation_config.json and the tokenizer; return warnings."""
    from lingua.config.base import ConfigError
    from lingua.files import RunError, write_json, write_whole
    from lingua.model import huggingface
    from lingua.model.tokenizer_json import ANSWER_TEMPLATE, CHAT_TEMPLATE_FILE, write_tokenizer
    from lingua.tokenizer import build_tokenizer

    max_seqlen = max(args.model.max_seqlen, args.data.seq_len)
    warnings, ids = [], (None, None)
    try:
        if args.data.tokenizer.name == "none":
            raise ConfigError("data.tokenizer.name is none, so the model takes token ids")
        _same_tokenizer(args, checkpoint)
        tokenizer = build_tokenizer(args.data.tokenizer)
        if embedding.shape[0] < tokenizer.needed_size:
            raise ConfigError(
                f"the vocabulary of the model is {embedding.shape[0]}, but the tokenizer has {tokenizer.vocab_size} "
                "tokens; set data.tokenizer to the one that the model was trained with"
            )
        ids = tokenizer.bos_id, tokenizer.eos_id
        settings = {"add_bos": args.data.add_bos, "max_seqlen": max_seqlen}
        warning = write_tokenizer(args.data.tokenizer, folder, **settings, files=files)
        if args.data.loss_on == "completion" and not (folder / CHAT_TEMPLATE_FILE).exists():
            write_whole(folder / CHAT_TEMPLATE_FILE, ANSWER_TEMPLATE, files=files)
        warnings = [warning] if warning else []
    except (ConfigError, RunError) as error:
        warnings = [f"no tokenizer was exported: {error}"]
    special = huggingface.special_ids(*ids, args.data.tokenizer.end_ids)
    document = translation.config_json(
        args.model,
        vocab_size=embedding.shape[0],
        max_seqlen=max_seqlen,
        dtype=str(embedding.dtype).removeprefix("torch."),
        special=special,
    )
    write_json(folder / huggingface.CONFIG_FILE, document, files=files)
    write_json(folder / huggingface.GENERATION_FILE, {"_from_model_config": True, **special}, files=files)
    return warnings


def _same_tokenizer(args: TrainArgs, checkpoint: Checkpoint | None) -> None:
    """Raise ConfigError if the checkpoint records another tokenizer than the config's."""
    from lingua.checkpoint.metadata import read_tokenizer
    from lingua.config.base import ConfigError
    from lingua.tokenizer import tokenizer_fingerprint

    trained = read_tokenizer(checkpoint.folder) if checkpoint else None
    if trained is not None and trained != (now := tokenizer_fingerprint(args.data.tokenizer)):
        raise ConfigError(f"the model was trained with {trained}, and data.tokenizer.path is {now} now")


def _write_torch(folder: Path, checkpoint: Checkpoint | None, place: str, progress: Progress) -> None:
    from lingua.checkpoint.metadata import read_tensors
    from lingua.checkpoint.tools.diff import CONSOLIDATED, consolidate
    from lingua.config.base import ConfigError

    if checkpoint is None:
        raise ConfigError(f"{place}: --format torch needs a checkpoint; use --format safetensors")
    tensors = read_tensors(checkpoint.folder)
    n_bytes = sum(fact.size_bytes for name, fact in tensors.items() if name.startswith("model."))
    progress.begin("writing", n_bytes)
    consolidate(checkpoint.folder, tensors, folder / CONSOLIDATED, progress.advance)


def _travelling(config: Path) -> dict[str, Any]:
    """Return the config to write beside exported weights."""
    from lingua.checkpoint.tools.copy import travelling_config
    from lingua.config.frozen import CONFIG_FILE
    from lingua.train.describe import described

    found = travelling_config(config.parent) if config.name == CONFIG_FILE else None
    return found if found is not None else described(config).model_dump(mode="json")


# -- import ----------------------------------------------------------------------------------------------------------


def make_import(place: Path, out: Path, *, shard_bytes: float = 5 * GIGA, files: Files | None = None) -> Made:
    """Import a Hugging Face folder. On ConfigError, RunError or OSError no folder is left."""
    from apps.main.args import TrainArgs
    from lingua.checkpoint.export_weights import as_ours, must_fit, write_safetensors
    from lingua.checkpoint.load_weights import open_source
    from lingua.config.frozen import CONFIG_FILE, dump_yaml
    from lingua.files import DISK, whole_folder, write_whole
    from lingua.model.tokenizer_json import copy_tokenizer
    from lingua.train.describe import hugging_face_tree

    files, here = files or DISK, out.absolute()
    tree = hugging_face_tree(place, here)
    with whole_folder(out, files=files) as folder, progress_shown() as progress:
        source = open_source(place)
        own = must_fit(source, TrainArgs.model_validate(tree).model)
        made = Made(out, source.what)
        items = [item for item in as_ours(source) if item.name in own]  # without a tied head
        progress.begin("writing", sum(item.size_bytes for item in items))
        write_safetensors(folder, items, shard_bytes, advance=progress.advance, files=files)
        if not copy_tokenizer(place, folder, files=files):
            made.warnings.append(f"{place} has no tokenizer; copy its tokenizer.json into {out}")
        start = {"name": f"{out.name}_continued", **tree, "checkpoint": {"init_ckpt_path": str(here)}}
        text = _CONFIG_HEAD.format(origin=str(place), config=str(out / CONFIG_FILE)) + dump_yaml(start)
        write_whole(folder / CONFIG_FILE, text, files=files)
        _count(made, folder)
    return made
