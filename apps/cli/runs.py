"""`lingua why | status | runs | diff | report | stop | profile | doctor`: look at runs from a login node.

Each command reads run folders and asks Slurm at most once. `--json` prints one JSON value.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingua.console import AsJson, show, show_json, show_table

if TYPE_CHECKING:
    from lingua.report.facts import RunFacts
    from lingua.run.lock import Attempt

Run = Annotated[Path, typer.Argument(help="A run folder.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]


def why(run: Run, as_json: AsJson = False) -> None:
    """Explain why a run ended.

    Reads stop.json, the error files of the ranks, the attempts, the metrics, and asks Slurm if it can be reached.
    """
    from lingua.report.status import why as explain
    from lingua.run.lock import this_process

    (facts,) = _read([run], from_accounts=True)
    found = explain(facts, this_process())
    show(found, as_json, [f"{name:<6} {text}" for name, text in found.items()])


def status(runs: Runs, as_json: AsJson = False) -> None:
    """Show how runs are doing: step, speed, time left, last checkpoint and evaluation, and the Slurm job."""
    from lingua.report.status import describe, status_of
    from lingua.run.lock import this_process

    found = [status_of(facts, this_process()) for facts in _read(runs)]
    show([asdict(one) for one in found], as_json, [line for one in found for line in describe(one)])


def runs(
    folder: Annotated[Path, typer.Argument(help="Runs at or below this folder, up to four levels.")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder, except those that failed before training (`lingua why RUN`)."""
    from lingua.report.status import COLUMNS, has_trained, row, status_of
    from lingua.run.find import find_runs, no_run
    from lingua.run.lock import this_process

    if not folder.is_dir():
        raise no_run(folder)
    every = [(facts, status_of(facts, this_process())) for facts in _read(find_runs(folder))]
    found = [status for facts, status in every if has_trained(facts, status)]
    if as_json or not found:
        show([asdict(one) for one in found], as_json, [f"no runs in {folder}"])
    else:
        show_table(COLUMNS, map(row, found), right=COLUMNS[2:7], spare=("job", "checkpoint", "tokens/s"))


def diff(
    left: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    right: Annotated[Path, typer.Argument(metavar="RUN", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Compare two runs: keys of their configs that differ, and their losses at common steps."""
    from lingua.report.diff import ABSENT, common_curves, config_differences, shown, some_of
    from lingua.run.metrics import METRICS_FILE, VALIDATION_FILE, read_metrics

    both = _read([left, right])
    names = [str(facts.path) for facts in both]
    training, held_out = ([read_metrics(facts.path / f) for facts in both] for f in (METRICS_FILE, VALIDATION_FILE))
    losses = common_curves(training[0], training[1])
    keys = sorted({key for one in held_out for record in one for key in record if "/" in key})
    validation = {key: common_curves(held_out[0], held_out[1], key) for key in keys}
    differences = config_differences(both[0].config, both[1].config)
    n, first = len(losses), next((step for step, a, b in losses if a != b), None)
    if as_json:

        def columns_of(curve: list[tuple[int, float, float]]) -> dict[str, Any]:
            return {name: [point[i] for point in curve] for i, name in enumerate(("steps", "left", "right"))}

        record = {
            "config": {key: [None if v is ABSENT else v for v in values] for key, values in differences.items()},
            "loss": columns_of(losses) | {"first_difference": first},
            "validation": {key: columns_of(curve) for key, curve in validation.items()},
        }
        show(record, as_json)
        return
    if differences:
        show_table(("key", *names), [(key, *(shown(key, v) for v in values)) for key, values in differences.items()])
    print("" if differences else "the configs are equal\n")
    if not losses:
        print("no step was reported by both runs")
        return
    where = f"{n} common steps, {losses[0][0]} to {losses[-1][0]}; different from step {first} on"
    print(f"loss: equal at all {n} common steps" if first is None else f"loss: {where}")
    chosen = [losses[i] for i in some_of(n)]
    columns = ("step", *names, "difference")
    show_table(columns, [(f"{s:,}", f"{a:.5f}", f"{b:.5f}", f"{b - a:+.5f}") for s, a, b in chosen], right=columns)
    for key, curve in validation.items():
        for step, a, b in curve[-1:]:
            print(f"{key} at step {step:,}: {a:.5f}, {b:.5f} ({b - a:+.5f})")


def report(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="The page. Default: RUN/report.html; of several runs lingua-report.html in the current folder.",
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also each figure as a PNG file in DIR.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about one or several runs: curves, time line, where the time went, evaluations, config.

    Reads only the run folders, also while runs are training; the page needs no other file and no network.
    """
    from lingua.report.history import read_history
    from lingua.report.page import as_record, write_report
    from lingua.run.lock import this_process

    histories = [read_history(facts, this_process()) for facts in _read(runs)]
    page, pictures = write_report(histories, out, png)
    lines = [str(page), *([f"{len(pictures)} figures in {png}"] if png else [])]
    made = {"html": str(page), "png": [str(path) for path in pictures]}
    show(made | {"runs": as_record(histories)} if as_json else made, as_json, lines)


def stop(run: Run) -> None:
    """Ask a running run to stop: it saves after the current step, and is not requeued.

    Works from any machine that sees the run folder, which the run checks every ten seconds; its exit code is then 130.
    A job that waits in Slurm's queue is not running: cancel that job.
    """
    from lingua.run.lock import BEAT_S, ask_to_stop

    facts, attempt = _running(run, "")
    ask_to_stop(facts.path, attempt.number)
    print(
        f"asked attempt {attempt.number} of {facts.path} on {attempt.owner.host} to stop; it checks every "
        f"{BEAT_S:.0f} s, finishes its step and saves. `lingua status {facts.path}` shows when it has"
    )


def profile(
    run: Run,
    steps: Annotated[int, typer.Option(help="Number of steps to profile.")] = 4,
    heavy: Annotated[bool, typer.Option("--heavy", help="Also a torch trace and, on a GPU, its memory.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the files are there.")] = False,
) -> None:
    """Ask a running run to profile its next steps: time and memory of each, with --heavy a trace.

    Works from any machine that sees the run folder, which the run checks every ten seconds; only the profiled steps
    are slower.
    """
    import orjson

    from lingua.files import RunError, read_json
    from lingua.profiling.windows import answer_file, ask_to_profile
    from lingua.report.facts import read_run
    from lingua.report.status import is_alive
    from lingua.run.lock import BEAT_S, this_process

    facts, attempt = _running(run, "; start it first")
    folder = facts.path / facts.config.get("profiling", {}).get("trace_folder", "profiling")
    request = ask_to_profile(facts.path, attempt.number, steps, heavy)
    print(
        f"asked attempt {attempt.number} of {facts.path} for {steps} steps; it checks every {BEAT_S:.0f} s. Files will "
        f"be in {folder}, named by first step and rank: light_*_rank*.jsonl" + (", trace_*.json.gz" if heavy else "")
    )
    answer = answer_file(folder, request.id)
    while wait and not answer.exists():
        time.sleep(1.0)
        facts = read_run(facts.path)  # without asking Slurm
        if facts.attempt is None or facts.attempt.number != attempt.number or not is_alive(facts, this_process()):
            if answer.exists():
                break
            raise RunError(f"{facts.path} ended before it was profiled: see `lingua why {facts.path}`")
    if wait:
        files = [folder / name for name in read_json(answer)["files"]]
        for file in files:
            print(file)
        lines = [line for file in files if file.name.startswith("light_") for line in file.read_bytes().splitlines()]
        show_table(("part of a step", "ms", "share"), parts_of_steps(map(orjson.loads, lines)), right=("ms", "share"))


def parts_of_steps(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return (part, milliseconds per step, share of the step) of profiled steps, over all ranks."""
    steps = list(records)
    parts = {key: sum(step[key] for step in steps) for step in steps[:1] for key in step if key.startswith("time/")}
    whole = parts.pop("time/step_s", 0.0) or sum(parts.values()) or 1.0
    return [
        (key.removeprefix("time/").removesuffix("_s"), f"{1e3 * spent / len(steps):,.1f}", f"{spent / whole:.0%}")
        for key, spent in sorted(parts.items(), key=lambda part: -part[1])
    ]


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where run folders will be.")] = Path("out"),
    node: Annotated[bool, typer.Option("--node", help="Only test this node, as jobs do before they train.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check whether this machine is fit for training, with remedies for problems. Exit code 1: something is wrong.

    With --node, the self-test that a job runs on each of its nodes before it trains; it prints JSON.
    """
    if node:
        from lingua.selfcheck.node_check import main as check_node

        raise typer.Exit(check_node(["--dir", str(folder)]))
    from lingua.selfcheck.doctor import examine

    rows = [asdict(row) for row in examine(folder)]
    if as_json:
        show_json(rows)
    else:
        show_table(("level", "part", "finding", "remedy"), [list(row.values()) for row in rows])
    raise typer.Exit(1 if any(row["level"] == "wrong" for row in rows) else 0)


COMMANDS = (why, status, runs, diff, report, stop, profile, doctor)


def _read(paths: list[Path], from_accounts: bool = False) -> list[RunFacts]:
    """Read run folders, and Slurm's queue if a run has a job. Raises CommandError for a folder without a run."""
    from lingua.report.facts import read_run
    from lingua.run.find import find_run
    from lingua.scheduler import job_of, jobs_in_queue

    found = [read_run(find_run(path)) for path in paths]
    queue = jobs_in_queue() if any(facts.job_id for facts in found) else {}
    if from_accounts:
        return [replace(facts, job=job_of(facts.job_id, queue)) for facts in found]
    return [replace(facts, job=queue.get(facts.job_id)) for facts in found]


def _running(run: Path, remedy: str) -> tuple[RunFacts, Attempt]:
    """Read a run that must be running. Raises RunError."""
    from lingua.files import RunError
    from lingua.report.status import is_alive, state_of
    from lingua.run.lock import this_process
    from lingua.scheduler import CANCEL

    (facts,) = _read([run])
    if facts.attempt is not None and is_alive(facts, this_process()):
        if not facts.attempt.looks_in(facts.path, this_process()):
            old = facts.attempt.folder
            raise RunError(
                f"{facts.path} was {old} when {facts.attempt} began, which looks there: rename it back first"
            )
        return facts, facts.attempt
    if facts.attempt is not None and (other := facts.attempt.copied_from):
        raise RunError(
            f"{facts.path} is a copy of {other} and is not running itself; name {other} if you mean that one"
        )
    if facts.job is not None and facts.job.is_waiting and not remedy:
        remedy = f"; to keep job {facts.job_id} from starting it again: {CANCEL} {facts.job_id}"
    raise RunError(f"{facts.path} is not running, it is {state_of(facts, this_process())}{remedy}")
