"""`lingua ckpt ...`: list, verify, compare, copy and delete checkpoints.

Only `consolidate` and `diff --values` import torch.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingua.console import AsJson, Commands, progress_shown, show, show_json, show_table

if TYPE_CHECKING:
    from lingua.checkpoint.lookup import Checkpoint
    from lingua.checkpoint.tools.gc import Garbage
    from lingua.checkpoint.tools.status import Moving, Survey

app = Commands(help="List, verify, compare, copy and delete checkpoints. Needs no GPU.")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)]
Place = Annotated[
    str,
    typer.Argument(
        metavar="RUN[@STEP]",
        help="A run (its newest checkpoint), RUN@STEP, or a checkpoint folder by its path.",
        show_default=False,
    ),
]


@app.command()
def ls(run: Run, as_json: AsJson = False) -> None:
    """List a run's checkpoints, what is being written, and what was set aside.

    Only reads, so the run may be training or belong to another user. `files` is ok if all files have their full length;
    `lingua ckpt verify` reads them. `took` is the time from the snapshot to the .done mark.
    """
    from lingua.checkpoint.tools.status import survey

    found = survey(run)
    if as_json:
        show_json(asdict(found))
    else:
        _show_survey(found)


def _show_survey(found: Survey) -> None:
    from lingua.console import duration
    from lingua.files import human_bytes

    now_s = time.time()
    size = human_bytes(sum(one.size_bytes for one in found.published))
    owner = f"; {found.trained_by} is training" if found.trained_by else ""
    print(f"{found.root}: {len(found.published)} published, {size}{owner}")
    columns = ("step", "kind", "size", "age", "saved by", "took", "files", "pinned by")
    rows = [
        (
            one.step,
            "+".join(one.kinds) or "-",
            human_bytes(one.size_bytes),
            duration(now_s - one.created_at),
            "-" if one.incarnation is None else f"attempt {one.incarnation}",
            "-" if one.seconds is None else f"{one.seconds:.1f} s",
            "DAMAGED" if one.problems else "ok",
            ", ".join(one.pinned_by) or "-",
        )
        for one in found.published
    ]
    if rows:
        show_table(columns, rows, right=("step", "size", "age", "took"))
    for one in found.published:
        for problem in one.problems:
            print(f"step {one.step}: {problem}")
    what = {"coming": "being written", "trash": "being removed", "unmarked": "on its way to be set aside"}

    def where(one: Moving) -> str:
        return f"{_inside(one.path, found.root)}, {human_bytes(one.size_bytes)}"

    for one in found.moving:
        print(f"{what[one.what]}: {where(one)}, last change {duration(now_s - one.changed_at)} ago")
    for one in found.set_aside:
        print(f"set aside as {one.what}: {where(one)}")
    for step in found.unmarked:
        print(f"no checkpoint, since it has no .done mark: {found.root.name}/{step:010d}")


@app.command()
def verify(
    place: Place,
    every: Annotated[bool, typer.Option("--all", help="All checkpoints of the run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read checkpoints and compare every byte with the checksums taken when they were saved.

    Prints the damaged files; exit code 1 if there are any. Nothing is changed: the run's next attempt sets damaged
    checkpoints aside.
    """
    from lingua.checkpoint import lookup
    from lingua.config.base import ConfigError

    found = lookup.find(place)
    if every and lookup.split(place)[1] is not None:
        raise ConfigError(f"{place} --all: give the run without a step, or the step without --all")
    chosen = sorted(found, key=lambda one: one.step or 0) if every else found[:1]
    results: list[dict[str, Any]] = []
    with progress_shown() as progress:
        for one in chosen:
            n_bytes = _bytes_of(one)
            progress.begin(_name(one), n_bytes)
            problems = one.damage(advance=progress.advance)
            results.append({"step": one.step, "folder": one.folder, "bytes": n_bytes, "problems": problems})
    damaged, lines = any(result["problems"] for result in results), []
    for result in results:
        lines.append(f"{result['folder']}: {'DAMAGED' if result['problems'] else 'intact'}")
        lines += [f"  {problem}" for problem in result["problems"]]
    show({"ok": not damaged, "checkpoints": results}, as_json, lines)
    raise typer.Exit(damaged)


@app.command()
def inspect(
    place: Place,
    match: Annotated[str, typer.Option(help="Names of the tensors to show; * matches any text.")] = "model.*",
    as_json: AsJson = False,
) -> None:
    """Show the contents of a checkpoint: step, tokens, rates, data position; tensors with shape, type and file.

    Executes nothing in the folder and reads no tensor. --json has all tensors.
    """
    from lingua.checkpoint.lookup import find_one
    from lingua.checkpoint.metadata import read_scalars, read_tensors
    from lingua.files import human_bytes

    one = find_one(place)
    tensors, scalars = read_tensors(one.folder), read_scalars(one.folder)
    if as_json:
        listed = {name: {**asdict(fact), "bytes": fact.size_bytes} for name, fact in tensors.items()}
        show_json({"folder": one.folder, **scalars, "tensors": listed})
        return
    print(one.folder)
    show(scalars, as_json=False)
    shown = {name: fact for name, fact in tensors.items() if fnmatchcase(name, match)}
    rows = [
        (
            name,
            list(fact.shape),
            fact.dtype,
            human_bytes(fact.size_bytes),
            f"= {fact.same_as}" if fact.same_as else _some_files(fact.files),
        )
        for name, fact in shown.items()
    ]
    print()
    show_table(("tensor", "shape", "type", "size", "file"), rows, right=("size",))
    total = human_bytes(sum(fact.size_bytes for fact in shown.values() if fact.same_as is None))
    print(f"{len(shown)} of {len(tensors)} tensors, {total}" + ("" if shown else f"; none is called {match}"))


def _some_files(names: tuple[str, ...]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "-"


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="RUN, RUN@STEP or a checkpoint folder.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    values: Annotated[bool, typer.Option(help="Also read the tensors: largest absolute difference of each.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints: names, shapes and types of tensors, scalars, and with --values the tensors themselves.

    Without --values, files are compared by their checksums. Exit code 1: the checkpoints differ.
    """
    from lingua.checkpoint.lookup import find_one
    from lingua.checkpoint.metadata import read_scalars, read_tensors, scalar_differences, tensor_differences

    left, right = find_one(a), find_one(b)
    tensors = [read_tensors(one.folder) for one in (left, right)]
    shapes = tensor_differences(*tensors)
    scalars = scalar_differences(read_scalars(left.folder), read_scalars(right.folder))
    facts: dict[str, Any] = {"tensors": [asdict(d) for d in shapes], "scalars": [asdict(d) for d in scalars]}
    if values:
        from lingua.checkpoint.tools.diff import largest_differences

        odd = {difference.what for difference in shapes}
        same = {name: fact for name, fact in tensors[0].items() if name not in odd}
        with progress_shown() as progress:
            progress.begin("comparing", sum(fact.size_bytes for fact in same.values()))
            compared = dict(largest_differences(left.folder, right.folder, same, progress.advance))
        facts["values"] = {name: largest for name, largest in compared.items() if largest != 0}
    else:
        of_left, of_right = left.manifest(), right.manifest()
        facts["files"] = sorted(n for n in {*of_left, *of_right} if of_left.get(n) != of_right.get(n))
    differ = any(facts.values())
    if as_json:
        show_json({"equal": not differ, **facts})
        raise typer.Exit(differ)
    for title, found in (("tensor", shapes), ("scalar", scalars)):
        if found:
            rows = [(d.what, *("-" if value is None else value for value in (d.a, d.b))) for d in found]
            show_table((title, "A", "B"), rows)
    if facts.get("values"):
        rows = [(name, f"{largest:.6g}") for name, largest in facts["values"].items()]
        show_table(("tensor", "largest difference"), rows, right=("largest difference",))
    if facts.get("files"):
        print(f"files that differ: {', '.join(facts['files'])}")
    if not differ:
        print("the same")
    raise typer.Exit(differ)


@app.command()
def gc(
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what can be deleted of a run's checkpoints, and delete it with --yes.

    That is: unfinished saves of dead attempts, what was set aside (broken, later, unmarked), checkpoints that the
    config does not keep, expired pins, and the memory that your dead runs hold on this machine. Refused while the run
    is training or its checkpoint service is writing.
    """
    from lingua.checkpoint.tools.gc import remove_garbage, survey_garbage, why_not_now
    from lingua.files import human_bytes
    from lingua.logger import start_logging

    start_logging()
    shown: list[Garbage] = []

    def say(items: list[Garbage]) -> None:
        shown.extend(items)
        if items and not as_json:
            rows = [(item.why, human_bytes(item.size_bytes), _inside(item.path, run)) for item in items]
            show_table(("why", "size", "what"), rows, right=("size",))

    if yes:
        remove_garbage(run, say)
    else:
        say(survey_garbage(run))
    n_bytes = sum(item.size_bytes for item in shown)
    reason = None if yes else why_not_now(run)
    if as_json:
        items = [{"path": item.path, "why": item.why, "bytes": item.size_bytes} for item in shown]
        show_json({"items": items, "bytes": n_bytes, "deleted": yes, "not_now": reason})
    elif not shown:
        print(f"{run}: nothing to delete")
    elif yes:
        print(f"deleted: {human_bytes(n_bytes)}")
    else:
        print(f"{human_bytes(n_bytes)} in all; --yes deletes them" + (f", but not now: {reason}" if reason else ""))


@app.command()
def wait(
    place: Annotated[str, typer.Argument(metavar="RUN@STEP", help="The checkpoint to wait for.", show_default=False)],
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Maximum number of seconds to wait. Default: no limit.")
    ] = None,
) -> None:
    """Wait until a checkpoint is published, and print its folder.

    Exit code 1, with the reason, on a timeout, or if the run has ended or passed the step without saving it.
    """
    from lingua.checkpoint import layout, lookup
    from lingua.checkpoint.retention import frozen_periods, kinds
    from lingua.checkpoint.tools.status import await_done
    from lingua.config.base import ConfigError
    from lingua.files import RunError

    run, step = lookup.split(place)
    if step is None:
        raise ConfigError(f"{place} names no step; write {place}@STEP")
    periods = frozen_periods(run)
    if periods is not None and kinds(step, periods[0]) == ["stop"] and step != periods[1]:
        print(f"step {step} is in no period of {run}: it is saved only if the run stops there", file=sys.stderr)
    if reason := await_done(run, step, timeout):
        raise RunError(f"{place}: {reason}")
    print(layout.folder(lookup.run_root(run), step))


@app.command()
def copy(
    place: Annotated[str, typer.Argument(metavar="RUN[@STEP]", help="A run's newest, or that step's checkpoint.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder that can be used like a run afterwards.")],
    as_json: AsJson = False,
) -> None:
    """Copy and verify a checkpoint, and publish it in DEST with the run's config beside it.

    Without @STEP, copies the newest checkpoint that verifies. DEST can then be used like a run: in init_ckpt_path,
    generate, `lingua ckpt`, `lingua fork`. If it is killed, no partial checkpoint is left; run the command again.
    """
    from lingua.checkpoint.lookup import find
    from lingua.checkpoint.tools.copy import copy_newest

    with progress_shown() as progress:
        begin = lambda one: progress.begin(_name(one), _bytes_of(one))  # noqa: E731
        copied = copy_newest(find(place), dest, begin=begin, advance=progress.advance)
    show({"folder": copied}, as_json, [str(copied)])


@app.command()
def consolidate(
    place: Place,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for consolidated.pth, or a file *.pth.")],
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's model weights to one torch file: `torch.load(FILE, weights_only=True)["model"]`.

    The weights are verified first. Needs little memory: the file is memory-mapped. A folder OUT also gets the run's
    config, so that it works with `lingua generate OUT` and init_ckpt_path.
    """
    from lingua.checkpoint import lookup
    from lingua.checkpoint.load_weights import is_weights
    from lingua.checkpoint.metadata import read_tensors
    from lingua.checkpoint.tools.copy import travelling_config
    from lingua.checkpoint.tools.diff import CONSOLIDATED, consolidate
    from lingua.config.frozen import CONFIG_FILE, public_yaml
    from lingua.files import human_bytes, write_whole

    one = lookup.intact(place, needed=is_weights)
    target = out if out.suffix in (".pth", ".pt") else out / CONSOLIDATED
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = read_tensors(one.folder)
    with progress_shown() as progress:
        progress.begin(_name(one), sum(fact.size_bytes for name, fact in tensors.items() if name.startswith("model.")))
        n_bytes = consolidate(one.folder, tensors, target, progress.advance)
    config = travelling_config(one.run_dir) if one.run_dir is not None else None
    if config is not None and target.parent == out:
        write_whole(out / CONFIG_FILE, public_yaml(config))
    show({"file": target, "bytes": n_bytes, "folder": one.folder}, as_json, [f"{target} ({human_bytes(n_bytes)})"])


@app.command()
def average(
    places: Annotated[
        list[str],
        typer.Argument(metavar="RUN@STEP...", help="Two or more checkpoints, or weights, of one model. :ema as ever."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder; it must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Write the mean of the weights of several checkpoints as safetensors, with the config of the first.

    DIR then works in generate, eval, export and checkpoint.init_ckpt_path. The runs are only read.
    """
    from apps.cli.export import make_average, show_made

    show_made(make_average(places, out), as_json)


def _inside(path: Path, folder: Path) -> Path:
    """Return the path relative to the folder, if it is inside."""
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _name(one: Checkpoint) -> str:
    return one.folder.name if one.step is None else f"step {one.step}"


def _bytes_of(one: Checkpoint) -> int:
    """Return the size of all files; 0 if the manifest is damaged, which verifying reports."""
    from lingua.checkpoint.publish import DamagedError

    try:
        return sum(fact.size_bytes for fact in one.manifest().values())
    except DamagedError:
        return 0
