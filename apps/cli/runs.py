"""`lingua why | status | runs | diff | report | stop | profile | doctor`: how runs are doing, from a login node.

Thin: each command reads run folders, asks Slurm at most once and prints what lingua/report/status.py says. No torch,
except in `doctor`, which tells what torch can do here. `--json` prints one JSON value instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingua.console import AsJson, Debug, show_json

if TYPE_CHECKING:
    from lingua.report.facts import RunFacts

Run = Annotated[Path, typer.Argument(help="A run folder.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]


def why(run: Run, as_json: AsJson = False, debug: Debug = False) -> None:
    """Tell in five lines what ended a run.

    From stop.json, the error files of the ranks, the starts, the metrics, and Slurm where it can be reached.
    """
    from lingua.report.status import why as explain
    from lingua.run.lock import this_process

    (facts,) = _read([run], from_accounts=True)
    told = explain(facts, this_process())
    _print(told, [f"{name:<6} {text}" for name, text in told.items()], as_json)


def status(runs: Runs, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show how runs are doing: step, speed, time left, last checkpoint and evaluation, and the Slurm job."""
    from dataclasses import asdict

    from lingua.report.status import describe, status_of
    from lingua.run.lock import this_process

    found = [status_of(facts, this_process()) for facts in _read(runs)]
    lines = [line for one in found for line in describe(one)]
    _print([asdict(one) for one in found], lines, as_json)


def runs(
    folder: Annotated[Path, typer.Argument(help="Runs at or below this folder, up to four levels.")] = Path("out"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the runs below a folder, one line each; not those that failed before they trained (`lingua why RUN`)."""
    from dataclasses import asdict

    from lingua.report.facts import find_runs
    from lingua.report.status import has_trained, status_of, table
    from lingua.run.lock import this_process

    every = [(facts, status_of(facts, this_process())) for facts in _read(find_runs(folder))]
    found = [status for facts, status in every if has_trained(facts, status)]
    _print([asdict(one) for one in found], table(found) if found else [f"no runs in {folder}"], as_json)


def diff(
    left: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    right: Annotated[Path, typer.Argument(metavar="RUN", help="Another.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare two runs: keys of their configs that differ, and their losses at common steps."""
    from lingua.report.diff import ABSENT, common_curves, config_differences, describe
    from lingua.run.metrics import METRICS_FILE, VALIDATION_FILE, read_metrics

    both = _read([left, right])

    def records(facts: RunFacts, name: str) -> list[dict[str, Any]]:
        file = facts.path / name
        return read_metrics(file) if file.is_file() else []

    a, b = both
    curves = common_curves(records(a, METRICS_FILE), records(b, METRICS_FILE))
    held_out = records(a, VALIDATION_FILE), records(b, VALIDATION_FILE)
    keys = sorted({key for one in held_out for record in one for key in record if "/" in key})
    validation = {key: common_curves(*held_out, key) for key in keys}
    differences = config_differences(a.config, b.config)
    record = {
        "config": {key: [None if v is ABSENT else v for v in values] for key, values in differences.items()},
        "loss": curves.__dict__ | {"first_difference": curves.first_difference},
        "validation": {key: curve.__dict__ for key, curve in validation.items()},
    }
    names = (str(a.path), str(b.path))
    _print(record, describe(names, differences, curves, validation), as_json)


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
        Path | None, typer.Option(metavar="DIR", help="Also each picture as a PNG file in DIR.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a run, or about several next to each other: curves, time line, where the time went,
    evaluations, config.

    Made from the run folders alone, also while the runs are going; the page needs no other file and no network.
    """
    import time

    from lingua.report.history import read_history
    from lingua.report.page import as_record, write_report
    from lingua.run.lock import this_process

    me, now_s = this_process(), time.time()
    histories = [read_history(facts, me, now_s) for facts in _read(runs)]
    page, pictures = write_report(histories, out, png)
    record = {"html": str(page), "png": [str(path) for path in pictures], "runs": as_record(histories, me)}
    _print(record if as_json else None, [str(page), *([f"{len(pictures)} pictures in {png}"] if png else [])], as_json)


def stop(run: Run, debug: Debug = False) -> None:
    """Ask a running run to end politely: it saves after the step it is at, and is not requeued.

    For any machine that sees the run folder. The run looks every ten seconds, off its hot path; its exit code is then
    130. What waits in Slurm's queue is not running: cancel that job.
    """
    from lingua.files import RunError
    from lingua.report.status import is_alive, state_of
    from lingua.run.lock import BEAT_S, ask_to_stop, this_process

    (facts,) = _read([run])
    if facts.attempt is None or not is_alive(facts, this_process()):
        waiting = facts.job is not None and facts.job.is_waiting
        remedy = f"; to keep job {facts.job_id} from starting it again: scancel {facts.job_id}" if waiting else ""
        raise RunError(f"{facts.path} is not running, it is {state_of(facts, this_process())}{remedy}")
    ask_to_stop(facts.path, facts.attempt.number)
    print(
        f"asked attempt {facts.attempt.number} of {facts.path} on {facts.attempt.owner.host} to stop; it looks every "
        f"{BEAT_S:.0f} s, finishes its step and saves. `lingua status {facts.path}` shows when it has"
    )


def profile(
    run: Run,
    steps: Annotated[int, typer.Option(help="Steps to profile, the next ones.")] = 4,
    heavy: Annotated[bool, typer.Option("--heavy", help="Also a torch trace and, on a GPU, its memory.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until the files are there.")] = False,
    debug: Debug = False,
) -> None:
    """Ask a running run for a profile of its next steps: time and memory of each, with --heavy a trace.

    For any machine that sees the run folder. The run looks every ten seconds; nothing but the profiled steps is slower.
    """
    import time

    from lingua.files import RunError, read_json
    from lingua.profiling.windows import answer_file, ask_to_profile
    from lingua.report.facts import read_run
    from lingua.report.status import is_alive, state_of
    from lingua.run.lock import BEAT_S, this_process

    (facts,) = _read([run])
    if facts.attempt is None or not is_alive(facts, this_process()):
        raise RunError(f"{facts.path} is not running, it is {state_of(facts, this_process())}; start it first")
    start = facts.attempt.number
    folder = facts.path / facts.config.get("profiling", {}).get("trace_folder", "profiling")
    request = ask_to_profile(facts.path, start, steps, heavy)
    print(
        f"asked attempt {start} of {facts.path} for {steps} steps; it looks every {BEAT_S:.0f} s. Files will be in "
        f"{folder}, named by first step and rank: light_*_rank*.jsonl" + (", trace_*.json.gz" if heavy else "")
    )
    answer = answer_file(folder, request.id)
    while wait and not answer.exists():
        time.sleep(1.0)
        facts = read_run(facts.path)  # Slurm need not be asked
        if facts.attempt is None or facts.attempt.number != start or not is_alive(facts, this_process()):
            if answer.exists():
                break
            raise RunError(f"{facts.path} ended before it had profiled: `lingua why {facts.path}` tells the reason")
    if wait:
        for name in read_json(answer)["files"]:
            print(folder / name)


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where runs are to lie.")] = Path("out"),
    node: Annotated[
        bool, typer.Option("--node", help="Only whether this node is fit to train, as jobs check it.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell what this machine can do for training, and what is wrong, with the remedy. Exit code 1: something is wrong.

    With --node, the self-test that a job makes on each of its nodes before it begins; it prints JSON.
    """
    if node:
        from lingua.selfcheck.node_check import main as check_node

        raise typer.Exit(check_node(["--dir", str(folder)]))
    from dataclasses import asdict

    from lingua.selfcheck.doctor import examine, table

    findings = examine(folder)
    _print([asdict(finding) for finding in findings], table(findings), as_json)
    raise typer.Exit(1 if any(finding.level == "wrong" for finding in findings) else 0)


COMMANDS = (why, status, runs, diff, report, stop, profile, doctor)


def _read(paths: list[Path], from_accounts: bool = False) -> list[RunFacts]:
    """Facts of run folders, those of Slurm included where a run knows a job. Raises RunError where there is no run."""
    from dataclasses import replace

    from lingua.report.facts import find_run, read_run
    from lingua.slurm import job_of, jobs_in_queue

    found = [read_run(find_run(path)) for path in paths]
    queue = jobs_in_queue() if any(facts.job_id for facts in found) else {}
    if from_accounts:
        return [replace(facts, job=job_of(facts.job_id, queue)) for facts in found]
    return [replace(facts, job=queue.get(facts.job_id)) for facts in found]


def _print(record: Any, lines: list[str], as_json: bool) -> None:
    if as_json:
        show_json(record)
    else:
        print("\n".join(lines))
