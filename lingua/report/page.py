"""`lingua report`: one page about a run, or about several next to each other.

It is made from the run folders alone, without network or torch, also while a run is going. The folders are only read,
but for the page itself. Templates escape whatever comes from a run, and values that may be secrets are masked.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lingua.config.frozen import CONFIG_FILE, ORIGIN_FILE, read_config
from lingua.files import RunError, human_bytes, write_whole
from lingua.masking import public_text
from lingua.report.charts import brief, interrupted_picture, pictures_of, probe_picture, spent_picture, time_line
from lingua.report.diff import ABSENT, config_differences, flatten, keys_that_differ, telling_labels
from lingua.report.figure import COLORS, Picture
from lingua.report.heat_maps import read_probes
from lingua.report.history import LOSS, MFU, SPENT, WPS, Event, History, Scores, keys_of
from lingua.report.status import LIVING, status_of, why
from lingua.run.folder import public_value
from lingua.run.lock import Owner, this_process
from lingua.run.metrics import PROBE_FILE

HTML = "report.html"
HTML_OF_SEVERAL = "lingua-report.html"
MAX_ROWS = 40
MAX_COLUMNS = 8


def write_report(runs: Sequence[History], out: Path | None, png: Path | None) -> tuple[Path, list[Path]]:
    """Write the page and, if `png` is a folder, its pictures into it; return their paths.

    The page goes to `out`, else to report.html in the run's folder or, for several runs, to lingua-report.html in the
    current one. Raises RunError.
    """
    file = out or (runs[0].facts.path / HTML if len(runs) == 1 else Path(HTML_OF_SEVERAL))
    file = file / HTML if file.is_dir() else file
    page, pictures = report_page(runs)
    _write(file, page, "choose another place with --out FILE")
    if png is None:
        return file, []
    for picture in pictures:
        _write(png / f"{picture.key}.png", picture.drawn("png"), "choose another folder with --png DIR")
    return file, [png / f"{picture.key}.png" for picture in pictures]


def write_interrupted(run: History, calm: History, file: Path) -> None:
    """Draw a run that was killed and stopped, and an undisturbed one, into an .svg or .png file. Raises RunError."""
    _write(file, interrupted_picture(run, calm).drawn(file.suffix[1:]), "choose another place with --figure FILE")


def _write(path: Path, content: bytes | str, remedy: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; {remedy}") from None


def as_record(runs: Sequence[History], me: Owner | None = None) -> list[dict[str, Any]]:
    """Return the figures of the page, for scripts."""
    me = me or this_process()
    return [
        {
            **asdict(status_of(run.facts, me)),
            "seconds": run.seconds,
            "starts": [asdict(one) | {"seconds": spent} for one, spent in zip(run.attempts, run.spent, strict=True)],
            "lost_lines": len(run.undone),
            "validations": list(map(_record, run.validations)),
            "evaluations": list(map(_record, run.evaluations)),
            "checkpoints": list(map(_record, run.events)),
        }
        for run in runs
    ]


def _record(one: Event | Scores) -> dict[str, Any]:
    return asdict(one) | {"start": one.attempt}  # its name in earlier versions


def names_of(runs: Sequence[History]) -> list[str]:
    """Return a short name for each run, no two alike."""
    names = [run.facts.name for run in runs]
    for other in (lambda path: path.name, str):
        if len(set(names)) < len(names):
            names = [other(run.facts.path) for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({i + 1})" for i, name in enumerate(names)]


# -- the page ------------------------------------------------------------------------------------------------------


def report_page(runs: Sequence[History], me: Owner | None = None) -> tuple[str, list[Picture]]:
    """Return the HTML and the pictures in it."""
    me, names, is_alone = me or this_process(), names_of(runs), len(runs) == 1
    views = [_view(run, name, me) for run, name in zip(runs, names, strict=True)]
    differing = telling_labels([run.facts.config for run in runs])
    labels = [f"{name}: {values}" for name, values in zip(names, differing, strict=True)] if differing else names
    pictures = pictures_of(runs, labels)
    spent = spent_picture(runs, names)
    pictures += [spent] if spent else []
    layers = [probe_picture(heat) for heat in read_probes(runs[0].facts.path / PROBE_FILE)] if is_alone else []
    time_lines = [time_line(run, "" if is_alone else f"{i + 1}_") for i, run in enumerate(runs)]
    for view, line in zip(views, time_lines, strict=True):
        view |= {"time_line": line, "is_alone": is_alone, "pictures": pictures, "layers": layers}
    page = render(
        "report/templates/report.html",
        title=names[0] if is_alone else f"{len(runs)} runs: {', '.join(names)}",
        made=datetime.fromtimestamp(runs[0].now_s, tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
        names=names,
        views=views,
        pictures=pictures,
        differences=_differences(runs),
    )
    return page, [*pictures, *(line for line in time_lines if line), *layers]


def render(template: str, **values: Any) -> str:
    """Fill in a template of the library; whatever `values` hold is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lingua", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"COLORS": COLORS, "SPENT": SPENT, "MAX_ROWS": MAX_ROWS, "MAX_COLUMNS": MAX_COLUMNS}
    environment.filters |= {
        "bytes": human_bytes,
        "clock": _or_dash(_clock),
        "number": _or_dash(lambda n: f"{n:,.0f}"),
        "duration": _or_dash(brief),
        "score": _or_dash(lambda v: f"{v:,.0f}" if float(v).is_integer() and abs(v) >= 2 else f"{v:.4f}"),
        "keys_of": keys_of,
        "percent": _or_dash(lambda share, digits=0: f"{share:.{digits}%}"),
        "public": public_text,
    }
    return environment.get_template(template).render(values)


def _clock(at_s: float) -> str:
    try:
        return datetime.fromtimestamp(at_s, tz=UTC).strftime("%m-%d %H:%M:%S")
    except (OSError, OverflowError, ValueError):  # of no year that there is
        return "-"


def _or_dash(spelled: Callable[..., str]) -> Callable[..., str]:
    return lambda value, *more: "-" if value is None else spelled(value, *more)


def _view(run: History, name: str, me: Owner) -> dict[str, Any]:
    """Collect what the templates show of one run."""
    status = status_of(run.facts, me)
    values = {key: run.metrics.curve(key)[1] for key in (LOSS, WPS, MFU)}
    recent = {key: v[-max(1, len(v) // 20) :].mean() if len(v) else None for key, v in values.items()}
    scores = run.validations[-1].values if run.validations else {}
    bpb = [value for key, value in scores.items() if key.endswith("/bpb")]
    all_s = sum(run.seconds.values())
    reasons = why(run.facts, me) if status.state not in ("finished", "running", "new") else {}
    return {
        "run": run,
        "name": name,
        "status": status,
        "state": f"{status.state} ({status.kind})" if status.kind else status.state,
        "last_loss": values[LOSS][-1] if len(values[LOSS]) else None,
        "loss": recent[LOSS],
        "wps": recent[WPS],
        "mfu": recent[MFU],
        "held_out": sum(bpb) / len(bpb) if bpb else None,
        "left_s": status.left_s if status.left_s and status.state in LIVING else None,
        "all_s": all_s or None,
        "counting": run.seconds["training"] / all_s if all_s else None,
        "why": {key: reasons[key] for key in ("ended", "cause", "saved", "next") if reasons},
        "attempts": list(zip(run.attempts, run.spent, strict=True)),
        "events": [event for event in run.events if event.kind != "staged" or event.seconds is not None],
        "config": list(_config(run)),
        "changes": list(config_changes(run.facts.path)),
    }


def _config(run: History) -> Iterator[tuple[str, str, str]]:
    """Yield (key, value, where it came from) of every key."""
    origins = _tree(run.facts.path / ORIGIN_FILE)
    for key, value in flatten(run.facts.config).items():
        inside = (place for leaf, place in origins.items() if leaf == key or leaf.startswith(f"{key}."))
        nowhere = "default" if origins and value in ([], {}) else "-"  # a list's items have places, an empty one none
        yield key, public_value(key, value), str(next(inside, nowhere))


def config_changes(run_dir: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (attempt, key, value before, value after) of each key that a later attempt changed."""
    numbered = [path for path in run_dir.glob("config.*.yaml") if re.fullmatch(r"config\.\d+\.yaml", path.name)]
    files = [*sorted(numbered, key=lambda path: int(path.name.split(".")[1])), run_dir / CONFIG_FILE]
    for (path, before), (_, after) in itertools.pairwise((path, _tree(path)) for path in files):
        for key, values in config_differences(before, after).items():
            was, became = (_spelled(key, value) for value in values)
            yield str(int(path.name.split(".")[1])), key, was, became


def _differences(runs: Sequence[History]) -> list[tuple[str, ...]]:
    """List each key that is not the same in all runs, with its values."""
    flat = [flatten(run.facts.config) for run in runs]
    keys = keys_that_differ([run.facts.config for run in runs])
    return [(key, *(_spelled(key, tree.get(key, ABSENT)) for tree in flat)) for key in keys]


def _spelled(key: str, value: Any) -> str:
    return "-" if value is ABSENT else public_value(key, value)


def _tree(path: Path) -> dict[str, Any]:
    """Read a YAML file; nothing if it is missing or broken."""
    try:
        return read_config(path)
    except (OSError, ValueError):
        return {}
