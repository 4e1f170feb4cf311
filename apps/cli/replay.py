"""`lingua replay`: recompute a step of a run with `lingua/train/replay.py` and show the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.cli.data import document_lines
from lingua.config.command_line import choose_app, parse_command_line
from lingua.console import AsJson, show_json, show_table

if TYPE_CHECKING:
    from lingua.train.replay import Replayed, ReplayedRow, Way


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; it is only read.")],
    step: Annotated[int, typer.Option(min=1, help="The update, as `global_step` in metrics.jsonl counts: from 1.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE] ...", help="Changes to the run's config.", show_default=False),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. Default: as the config says.")] = None,
    start: Annotated[
        int | None,
        typer.Option(
            "--attempt", "--start", min=1, help="Attempt to replay. Default: the newest that trained the step."
        ),
    ] = None,
    origin: Annotated[
        int | None, typer.Option("--from", min=0, help="Checkpoint to start from; 0: the start of the run.")
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Also compute each row's gradient norm.")] = False,
    rows: Annotated[int, typer.Option(min=0, help="Number of worst rows to show. 0: all.")] = 8,
    chars: Annotated[int, typer.Option(min=0, help="Characters of text to show per document. 0: no text.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Recompute a step on one device and show where its loss came from, to find the cause of spikes and NaN.

    Starts at the nearest checkpoint before the step, with the config of the attempt that trained it and the same rows.
    Compares loss and gradient norm with the reported ones, and shows gradient norms by layer, the rows with the largest
    losses and, if something is not finite, the module where it first appeared. Also works for a step that ended the
    run.
    """
    from dataclasses import asdict

    from lingua.logger import start_logging

    line = parse_command_line([f"ckpt={run}", *(words or [])])
    given = [word for word in words or [] if not word.startswith("app=")] + ([f"device={device}"] if device else [])
    start_logging(own_packages=("lingua", "apps", choose_app(line)))
    from lingua.train.replay import replay as compute_again

    found = compute_again(run, step, start=start, origin=origin, words=given, gradients=gradients)
    if as_json:
        parts = [asdict(row) | {"documents": [part._asdict() for part in row.documents]} for row in found.rows]
        show_json(asdict(found) | {"is_same": found.is_same, "rows": parts})
    else:
        show(found, rows, chars)


COLUMNS = ("row", "micro step", "loss", "gradient norm", "source", "byte", "file")


def show(found: Replayed, n_rows: int, n_chars: int) -> None:
    """Print summary, layers and rows."""
    for line in summary(found):
        print(line)
    print()
    show_table(("layer", "gradient norm"), [(k, f"{v:.4g}") for k, v in found.groups.items()], ("gradient norm",))
    print()
    shown = found.rows[: n_rows or None]
    show_table(COLUMNS, map(_cells, shown), COLUMNS[:4] + COLUMNS[5:6])
    if len(shown) < len(found.rows):
        print(f"... and {len(found.rows) - len(shown)} rows with smaller losses; --rows 0 shows all")
    for row in shown if n_chars else []:
        print(f"\nrow {row.row}" + (f": first not finite in {row.first_nonfinite}" if row.first_nonfinite else ""))
        print("\n".join(document_lines(row.documents, n_chars)))


def _cells(row: ReplayedRow) -> Sequence[object]:
    first, grad_norm = row.documents[0], "-" if row.grad_norm is None else f"{row.grad_norm:.4g}"
    return row.row, row.micro_step, f"{row.loss:.5f}", grad_norm, first.source, first.offset, first.file


def summary(found: Replayed) -> Iterator[str]:
    """Summarize a replay in a few lines."""
    origin = "where the run began" if found.checkpoint is None else f"checkpoint {found.checkpoint}"
    changes = f", with {' '.join(found.changes)}" if found.changes else ""
    yield f"step {found.step} of {found.run}, as attempt {found.start} trained it: {found.config}{changes}"
    yield f"{found.rows_per_step} rows in {found.micro_steps} micro steps on {found.device}, from {origin}"
    yield from _way_line(found.way)
    here, there = found.here, found.reported
    yield f"learning rate {_spell(here.lr)}"
    for what, mine, theirs in (
        ("loss", here.loss, None if there is None else there.loss),
        ("gradient norm", here.grad_norm, None if there is None else there.grad_norm),
    ):
        yield f"{what} {_spell(mine)} here; {_compared(mine, theirs, reported=there is not None)}"
    if found.bad_parameters:
        names = ", ".join(found.bad_parameters[:4]) + (", ..." if len(found.bad_parameters) > 4 else "")
        yield f"parameters that were not finite before this step already: {names}"
    if found.first_bad_micro_step is not None:
        yield f"first not finite in micro step {found.first_bad_micro_step}; rows alone: {_bad_modules(found.rows)}"
    if found.last_words:
        yield f"the run's own words: {found.last_words}"


def _way_line(way: Way) -> Iterator[str]:
    if way.n_steps == 0:
        return
    text = f"{way.n_steps} step{'s' if way.n_steps > 1 else ''} on the way, {way.n_compared or 'none'} reported"
    if way.n_equal < way.n_compared:
        yield (
            f"{text}: {way.n_equal} of the losses equal to the last bit, the largest difference "
            f"{way.largest_difference:.2g} of the loss, at step {way.at_step}"
        )
    else:
        yield f"{text}{': losses equal to the last bit' if way.n_compared else ''}"


def _compared(here: float | None, there: float | None, *, reported: bool) -> str:
    from lingua.train.replay import relative_difference

    if not reported:
        return "the run reported nothing of this step"
    if here == there:
        return "as the run reported, to the last bit" if here is not None else "nor was it in the run"
    if here is None or there is None:
        return f"the run reported {_spell(there)}"
    return f"the run reported {_spell(there)}, a difference of {relative_difference(here, there):.2g} of it"


def _spell(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _bad_modules(rows: Sequence[ReplayedRow]) -> str:
    """Name the modules in which rows were first not finite, with the number of rows."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.first_nonfinite is not None:
            counts[row.first_nonfinite] = counts.get(row.first_nonfinite, 0) + 1
    shares = [f"{name} ({n} of {len(rows)} rows)" for name, n in sorted(counts.items(), key=lambda item: -item[1])]
    return "; ".join(shares) or "all finite, so only their sum is not"
