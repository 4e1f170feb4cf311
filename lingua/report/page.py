"""`lingua report`: one page about a run, or about several next to each other.

It is made only from the run folders, without network or torch, also while a run is training. Templates escape all text
from a run, and values that may be secrets are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from lingua.config.frozen import CONFIG_FILE, ORIGIN_FILE
from lingua.config.yaml_layers import read_leniently
from lingua.console import figure
from lingua.files import RunError, human_bytes, plural, write_whole
from lingua.logger import printable
from lingua.masking import public_text
from lingua.report.charts import brief, pictures_of, probe_picture, spent_picture, time_line
from lingua.report.diff import config_differences, flatten, shown, telling_labels
from lingua.report.figure import COLORS, NO_PICTURES, Picture, can_draw, must_draw
from lingua.report.history import MEAN_LOSS, SPENT, History, keys_of
from lingua.report.series import curve, read_probes
from lingua.report.status import LIVING, phases_in, state_text, status_of, why
from lingua.run.folder import kept_configs
from lingua.run.lock import this_process
from lingua.run.metrics import PROBE_FILE
from lingua.run.startup import in_words


def write_report(runs: Sequence[History], out: Path | None, png: Path | None) -> tuple[Path, list[Path]]:
    """Write the page and, if given, its pictures to the folder `png`; return their paths. Raises RunError."""
    if png is not None:
        must_draw()
    file = out or (runs[0].facts.path / "report.html" if len(runs) == 1 else Path("lingua-report.html"))
    file = file / "report.html" if file.is_dir() else file
    page, pictures = report_page(runs)
    write(file, page, "choose another place with --out FILE")
    files = {png / f"{picture.key}.png": picture for picture in pictures} if png is not None else {}
    for path, picture in files.items():
        write(path, picture.drawn("png"), "choose another folder with --png DIR")
    return file, list(files)


def write(path: Path, content: bytes | str, remedy: str) -> None:
    """Write a page or a picture. Raises RunError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; {remedy}") from None


def as_record(runs: Sequence[History]) -> list[dict[str, Any]]:
    """Return the figures of the page, for scripts. `start` is the name of `attempt` in earlier versions."""
    return [
        {
            **asdict(status_of(run.facts, this_process())),
            "seconds": run.seconds,
            "starts": [asdict(one) | {"seconds": spent} for one, spent in zip(run.attempts, run.spent, strict=True)],
            "lost_lines": len(run.undone),
            "validations": [asdict(one) | {"start": one.attempt} for one in run.validations],
            "evaluations": [asdict(one) | {"start": one.attempt} for one in run.evaluations],
            "samples": [asdict(one) | {"start": one.attempt} for one in run.samples],
            "checkpoints": [asdict(one) | {"start": one.attempt} for one in run.events],
        }
        for run in runs
    ]


def names_of(runs: Sequence[History]) -> list[str]:
    """Return a short, unique name for each run."""
    names = [run.facts.name for run in runs]
    for other in (lambda path: path.name, str):
        if len(set(names)) < len(names):
            names = [other(run.facts.path) for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({i + 1})" for i, name in enumerate(names)]


def report_page(runs: Sequence[History]) -> tuple[str, list[Picture]]:
    """Return the HTML and its pictures."""
    names, is_alone, configs = names_of(runs), len(runs) == 1, [run.facts.config for run in runs]
    differing = telling_labels(configs)
    labels = [f"{name}: {values}" for name, values in zip(names, differing, strict=True)] if differing else names
    pictures = [*pictures_of(runs, labels), *filter(None, [spent_picture(runs, names)])]
    layers = [probe_picture(heat) for heat in read_probes(runs[0].facts.path / PROBE_FILE)] if is_alone else []
    time_lines = [time_line(run, "" if is_alone else f"{i + 1}_") for i, run in enumerate(runs)]
    if not can_draw():
        pictures, layers, time_lines = [], [], [None] * len(runs)
    page = render(
        "report/templates/report.html",
        title=names[0] if is_alone else f"{len(runs)} runs: {', '.join(names)}",
        made=datetime.fromtimestamp(runs[0].facts.now_s, tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
        names=names,
        views=[_view(*each) for each in zip(runs, names, time_lines, strict=True)],
        pictures=pictures,
        layers=layers,
        differences=[(key, *(shown(key, v) for v in values)) for key, values in config_differences(*configs).items()],
    )
    return page, [*pictures, *filter(None, time_lines), *layers]


def render(template: str, **values: Any) -> str:
    """Fill in a template of the library; `values` are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    look: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("lingua", ""), autoescape=True, undefined=StrictUndefined, **look)
    environment.globals |= {
        "COLORS": COLORS,
        "SPENT": SPENT,
        "LIVING": LIVING,
        "zip": zip,
        "NO_PICTURES": "" if can_draw() else NO_PICTURES,
    }
    environment.filters |= {
        "bytes": human_bytes,
        "clock": _or_dash(_clock),
        "startup": in_words,
        "number": _or_dash(lambda n: f"{n:,.0f}"),
        "plural": plural,
        "duration": _or_dash(brief),
        "score": figure,
        "keys_of": keys_of,
        "state": state_text,
        "percent": _or_dash(lambda share, digits=0: f"{share:.{digits}%}"),
        "printable": printable,
        "public": public_text,
    }
    return environment.get_template(template).render(values)


def _clock(at_s: float) -> str:
    try:
        return datetime.fromtimestamp(at_s, tz=UTC).strftime("%m-%d %H:%M:%S")
    except (OSError, OverflowError, ValueError):  # outside of the years that datetime supports
        return "-"


def _or_dash(spelled: Callable[..., str]) -> Callable[..., str]:
    return lambda value, *more: "-" if value is None else spelled(value, *more)


def _view(run: History, name: str, line: Picture | None) -> dict[str, Any]:
    """Collect the values that templates show of one run."""
    status = status_of(run.facts, this_process())
    values = {key: curve(run.metrics, key)[1] for key in (MEAN_LOSS, "speed/wps", "speed/mfu")}
    bpb = [value for one in run.validations[-1:] for key, value in one.values.items() if key.endswith("/bpb")]
    return {
        "run": run,
        "name": name,
        "status": status,
        "last_loss": values[MEAN_LOSS][-1] if len(values[MEAN_LOSS]) else None,
        "recent": {key: v[-max(1, len(v) // 20) :].mean() if len(v) else None for key, v in values.items()},
        "held_out": sum(bpb) / len(bpb) if bpb else None,
        "why": why(run.facts, this_process()) if status.state not in ("finished", "running", "new") else {},
        "phases": [f"{name} {first + 1:,}-{last:,}" for name, first, last in phases_in(run.facts.config)],
        "time_line": line,
        "events": [event for event in run.events if event.kind != "staged" or event.seconds is not None],
        "config": list(_config(run)),
        "changes": list(config_changes(run.facts.path)),
    }


def _config(run: History) -> Iterator[tuple[str, str, str]]:
    """Yield (key, value, origin) of every key."""
    origins = read_leniently(run.facts.path / ORIGIN_FILE)
    for key, value in flatten(run.facts.config).items():
        inside = (place for leaf, place in origins.items() if leaf == key or leaf.startswith(f"{key}."))
        nowhere = "default" if origins and value in ([], {}) else "-"  # only items of a list have origins
        yield key, shown(key, value), str(next(inside, nowhere))


def config_changes(run_dir: Path) -> Iterator[tuple[str, ...]]:
    """Yield (attempt, key, old value, new value) of each key that a later attempt changed."""
    kept = kept_configs(run_dir)
    trees = [read_leniently(path) for path in (*kept.values(), run_dir / CONFIG_FILE)]
    for number, (before, after) in zip(kept, pairwise(trees), strict=True):
        for key, values in config_differences(before, after).items():
            yield str(number), key, *(shown(key, value) for value in values)
