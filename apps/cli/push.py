"""`lingua push RUN[@STEP] USER/NAME`: publish a checkpoint on the Hugging Face hub, with a card filled from its run."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from apps.cli.export import Dtype, Format, make_export
from lingua.console import AsJson, show

if TYPE_CHECKING:
    from apps.cli.made import Made
    from lingua.report.card import Pushed


def push(
    place: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP][:ema]",
            help="A run (its newest checkpoint, to main) or one of its steps; :ema: the average of its weights.",
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Model on the hub; it is made if there is none.")],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch. Default: stepN for RUN@N (stepN-ema of :ema), main for RUN.", show_default=False),
    ] = None,
    form: Annotated[
        Format,
        typer.Option("--format", help="hf, or safetensors for models that Hugging Face's libraries do not have."),
    ] = Format.hf,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: as they are stored.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new model private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder only; ask no hub.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --dry-run: the folder. Default: NAME-stepN beside RUN.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Publish a checkpoint on the Hugging Face hub: the exported folder, and a card filled from the run.

    The card has data, tokens, curves, evaluations, config and commit, but no secrets or folders. Each step gets its own
    branch, so you can publish a model's whole training. The account is that of `hf auth login` or HF_TOKEN.
    """
    from lingua.config.base import ConfigError

    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) is None:
        raise ConfigError(f"{repo} is no name of a model on the hub; write USER/NAME")
    if form not in (Format.hf, Format.safetensors):
        raise ConfigError(f"--format {form} is not for the hub; use hf or safetensors")
    if out is not None and not dry_run:
        raise ConfigError("--out goes with --dry-run; what is pushed is written to a temporary folder")
    name = repo.rpartition("/")[2]
    if dry_run:
        pushed, made = make_pushed(place, repo, out or name, form, dtype=dtype, revision=revision)
        lines = [f"{made.folder} is what would become {pushed.repo} at {pushed.revision}"]
    else:
        from lingua.data.prepare.hub import asking_the_hub, must_reach_hub

        with asking_the_hub(f"pushing {repo}"):
            must_reach_hub()  # before the weights are converted
        with TemporaryDirectory(prefix=f".{name}-", dir=".") as folder:
            target = Path(folder, name)
            pushed, made = make_pushed(place, repo, target, form, dtype=dtype, revision=revision)
            with asking_the_hub(f"pushing {repo} at {pushed.revision}"):
                address = upload(pushed, target, private=private)
        lines = [f"{address} has step {pushed.step:,}"]
    lines += [f"warning: {warning}" for warning in made.warnings]
    show({**asdict(pushed), "folder": made.folder if dry_run else None, "warnings": made.warnings}, as_json, lines)


def make_pushed(
    place: str, repo: str, out: Path | str, form: Format, *, dtype: Dtype | None = None, revision: str | None = None
) -> tuple[Pushed, Made]:
    """Export a checkpoint with its card. `out`: a folder, or as text the prefix of a folder beside the run."""
    from lingua.checkpoint import lookup
    from lingua.checkpoint.load_weights import is_weights, open_source
    from lingua.config.base import ConfigError
    from lingua.files import write_whole
    from lingua.report.card import CARD_FILE, PICTURES, Pushed, model_card
    from lingua.report.facts import read_run
    from lingua.report.history import read_history
    from lingua.run.lock import this_process

    place, is_average = lookup.without_ema(place)
    checkpoint = lookup.intact(place, needed=is_weights, sizes_only=True) if lookup.is_checkpoint(place) else None
    if checkpoint is None or checkpoint.step is None or checkpoint.run_dir is None:
        raise ConfigError(f"{place} is no checkpoint of a run, which the card is filled from; name RUN or RUN@STEP")
    step = checkpoint.step
    suffix, branch = (lookup.EMA_SUFFIX, f"step{step}-ema") if is_average else ("", f"step{step}")
    folder = checkpoint.run_dir.parent / f"{out}-{branch}" if isinstance(out, str) else out
    made = make_export(f"{checkpoint.run_dir}@{step}{suffix}", folder, form, dtype=dtype)
    shapes = open_source(folder, sizes_only=True).shapes
    n_params = sum(math.prod(shape) for shape in shapes.values())
    named = lookup.split(place)[1] is not None
    chosen = revision or (branch if named else "main")
    pushed = Pushed(repo, chosen, step, n_params, form is Format.hf, is_average)
    card, pictures = model_card(read_history(read_run(checkpoint.run_dir), this_process()), pushed)
    (folder / PICTURES).mkdir()
    for picture in pictures:
        write_whole(folder / PICTURES / f"{picture.key}.png", picture.drawn("png"))
    write_whole(folder / CARD_FILE, card)
    return pushed, made


def upload(pushed: Pushed, folder: Path, *, private: bool) -> str:
    """Upload the folder as the content of the revision, in one commit, and return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(pushed.repo, private=private, exist_ok=True)
    if pushed.revision != "main":
        api.create_branch(pushed.repo, branch=pushed.revision, exist_ok=True)
    api.upload_folder(
        repo_id=pushed.repo,
        folder_path=folder,
        revision=pushed.revision,
        commit_message=f"Step {pushed.step}",
        delete_patterns="*",  # files that the branch inherited from another model
    )
    return f"{api.endpoint}/{pushed.repo}/tree/{pushed.revision}"
