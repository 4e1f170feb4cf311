"""`lingua report`: one page about a run, or about several next to each other.

Promise: made from the run folders alone, without network and torch, also while a run is going; they are only read,
except for the page itself. Nothing of a run becomes markup, and values that may be secrets are not shown.
Cost: reading (see `series.py`), and matplotlib: about 4 s for a run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from lingua.config.frozen import CONFIG_FILE, ORIGIN_FILE, read_config
from lingua.console import duration
from lingua.files import RunError, human_bytes, write_whole
from lingua.report.charts import Picture, brief, pictures_of, probe_picture, spent_picture, time_line
from lingua.report.diff import ABSENT, config_differences, flatten, keys_that_differ, telling_labels
from lingua.report.figure import look, png_of, readings, svg_of
from lingua.report.heat_maps import read_probes
from lingua.report.history import LOSS, MFU, SPENT, WPS, Event, History, PastAttempt, Scores, keys_of
from lingua.report.html import data, folded, page, table, text
from lingua.report.status import LIVING, Status, status_of, why
from lingua.run.folder import public_text, public_value
from lingua.run.lock import Owner, this_process
from lingua.run.metrics import PROBE_FILE

HTML = "report.html"
HTML_OF_SEVERAL = "lingua-report.html"
_MAX_ROWS = 40
_MAX_COLUMNS = 8


def write_report(runs: Sequence[History], out: Path | None, png: Path | None) -> tuple[Path, list[Path]]:
    """Write the page and, where `png` is a folder, its pictures; returns their paths.

    `out` None: report.html in the run's folder, of several runs lingua-report.html in the current one. Raises RunError.
    """
    file = out or (runs[0].facts.path / HTML if len(runs) == 1 else Path(HTML_OF_SEVERAL))
    file = file / HTML if file.is_dir() else file
    pictures: dict[str, bytes] = {}
    _write(file, report_page(runs, None if png is None else pictures), "choose another place with --out FILE")
    if png is None:
        return file, []
    paths = {png / f"{name}.png": content for name, content in pictures.items()}
    for path, content in paths.items():
        _write(path, content, "choose another folder with --png DIR")
    return file, list(paths)


def _write(path: Path, content: bytes | str, remedy: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; {remedy}") from None


def as_record(runs: Sequence[History], me: Owner | None = None) -> list[dict[str, Any]]:
    """The figures of the page, for scripts."""
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
    """A short name for each, no two alike."""
    names = [run.facts.name for run in runs]
    for other in (lambda path: path.name, str):
        if len(set(names)) < len(names):
            names = [other(run.facts.path) for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({i + 1})" for i, name in enumerate(names)]


def labels_of(runs: Sequence[History], names: Sequence[str]) -> list[str]:
    """Names of curves: with what differs between the configs, where a few words tell it."""
    told = telling_labels([run.facts.config for run in runs])
    return [f"{name}: {words}" for name, words in zip(names, told, strict=True)] if told else list(names)


# -- the page ------------------------------------------------------------------------------------------------------


def report_page(runs: Sequence[History], pngs: dict[str, bytes] | None = None, me: Owner | None = None) -> str:
    """The HTML; `pngs` is filled with the pictures by name."""
    me = me or this_process()
    names, statuses = names_of(runs), [status_of(run.facts, me) for run in runs]
    artist = _Artist(pngs)
    if len(runs) == 1:
        title, parts = names[0], _page_of_one(runs[0], statuses[0], me, artist)
    else:
        title, parts = f"{len(runs)} runs: {', '.join(names)}", _page_of_several(runs, names, statuses, me, artist)
    made = datetime.fromtimestamp(runs[0].now_s, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = "\n".join([*parts, f'<p class="note">made {made} by lingua report</p>'])
    return page(title, body)


class _Artist:
    """Draws pictures into the page, and keeps them as PNG where that is wanted."""

    def __init__(self, pngs: dict[str, bytes] | None) -> None:
        self._pngs = pngs
        self._n_drawn = 0

    def show(self, picture: Picture, prefix: str = "") -> str:
        with look():
            figure = picture.make()
            values = f' data-readings="{data(readings(figure, picture.chart))}"' if picture.chart is not None else ""
            self._n_drawn += 1
            svg = svg_of(figure, picture.title, f"p{self._n_drawn}")
            if self._pngs is not None:
                self._pngs[prefix + picture.key] = png_of(figure)
        note = f"<small>{text(picture.note)}</small>" if picture.note else ""
        kind = "plot wide" if picture.is_wide else "plot"
        return (
            f"<figure><figcaption><b>{text(picture.title)}</b>{note}</figcaption>"
            f'<div class="{kind}"{values}>{svg}</div></figure>'
        )

    def show_all(self, pictures: Sequence[Picture]) -> str:
        return f'<div class="charts">\n{"".join(map(self.show, pictures))}\n</div>' if pictures else ""


def _page_of_one(run: History, status: Status, me: Owner, artist: _Artist) -> Iterator[str]:
    yield f"<h1>{text(run.facts.name)}</h1>\n<p class=note>{text(run.facts.path)}</p>"
    yield from _summary(run, status, me)
    pictures = pictures_of([run], [run.facts.name])
    if any(s > 0 for s in run.seconds.values()):
        pictures.append(spent_picture([run], [run.facts.name]))
    yield artist.show_all(pictures) or "<p>No step has been reported yet.</p>"
    yield from _story(run, artist)
    yield from _evaluations(run)
    probes = read_probes(run.facts.path / PROBE_FILE)
    if probes:
        yield "<h2>Layers</h2>" + artist.show_all([probe_picture(heat) for heat in probes])
    yield from _config(run)


def _summary(run: History, status: Status, me: Owner) -> Iterator[str]:
    """What counts, in large letters; and what ended it, unless that is plain."""
    seconds = run.seconds
    all_s = sum(seconds.values())
    _, losses = run.metrics.curve(LOSS)
    _, speeds = run.metrics.curve(WPS)
    _, shares = run.metrics.curve(MFU)
    scores = run.validations[-1].values if run.validations else {}
    bpb = [value for key, value in scores.items() if key.endswith("/bpb")]
    recent = slice(-max(1, len(speeds) // 20), None)
    of = f" of {status.n_steps:,}" if status.n_steps else ""
    cards = [
        ("state", f"{status.state} ({status.kind})" if status.kind else status.state),
        (f"step{of}", None if status.step is None else f"{status.step:,}"),
        ("training loss, last", f"{losses[-1]:.4f}" if len(losses) else None),
        ("held-out bits per byte", f"{sum(bpb) / len(bpb):.4f}" if bpb else None),
        ("tokens/s per device, of late", f"{speeds[recent].mean():,.0f}" if len(speeds) else None),
        ("MFU, of late", f"{shares[recent].mean():.1%}" if len(shares) else None),
        ("left", duration(status.left_s) if status.left_s and status.state in LIVING else None),
        ("since the first attempt", duration(all_s) if all_s else None),
        ("of it training that counts", f"{seconds['training'] / all_s:.0%}" if all_s else None),
        ("attempts", f"{len(run.attempts):,}" if run.attempts else None),
        ("newest checkpoint", None if status.checkpoint is None else f"{status.checkpoint:,}"),
    ]
    shown = "".join(f"<div><b>{text(value)}</b><small>{text(name)}</small></div>" for name, value in cards if value)
    yield f'<div class="cards">{shown}</div>'
    if status.state not in ("finished", "running", "new"):
        told = why(run.facts, me)
        lines = ((name, public_text(told[name])) for name in ("ended", "cause", "saved", "next"))
        yield f"<p>{'<br>'.join(f'<small>{text(name)}</small> {text(line)}' for name, line in lines)}</p>"


def _story(run: History, artist: _Artist, prefix: str = "") -> Iterator[str]:
    """The time line, the attempts, the checkpoints."""
    picture = time_line(run)
    if picture is None:
        return
    yield "<h2>Starts and checkpoints</h2>"
    yield artist.show(picture, prefix)
    heading = ["attempt", "began", "ran for", "steps", "ended", "training", "start-up", "lost", "host", "Slurm job"]
    rows = [_attempt_row(attempt, spent) for attempt, spent in zip(run.attempts, run.spent, strict=True)]
    hidden = f'<p class="note">the newest {_MAX_ROWS} of {len(rows)}</p>' if len(rows) > _MAX_ROWS else ""
    yield table(heading, rows[-_MAX_ROWS:], numbers=(0, 2, 3, 5, 6, 7)) + hidden
    seconds = [(SPENT[kind], brief(s), f"{s / sum(run.seconds.values()):.1%}") for kind, s in run.seconds.items() if s]
    if seconds:
        yield folded("where the time went, in figures", table(["", "time", "share"], seconds, numbers=(1, 2)))
    events = [event for event in run.events if event.kind != "staged" or event.seconds is not None]
    if events:
        rows = [
            (
                f"{event.step:,}",
                event.kind,
                _clock(event.at_s),
                str(event.attempt or "-"),
                "-" if event.seconds is None else f"{event.seconds:.3g} s",
                "-" if event.size_bytes is None else human_bytes(event.size_bytes),
                public_text(event.why),
            )
            for event in events[-5 * _MAX_ROWS :]
        ]
        note = '<p class="note">staged: training stood still for so long; published: it is safe on the disk</p>'
        told = table(["step", "what", "when", "attempt", "took", "size", ""], rows, numbers=(0, 3, 4, 5))
        yield folded(f"checkpoints and evaluations ({len(events):,})", told + note)


def _attempt_row(attempt: PastAttempt, spent: Mapping[str, float]) -> tuple[str, ...]:
    known = attempt.began_s is not None and attempt.ended_s is not None
    last = attempt.last_step if attempt.last_step is not None else attempt.first_step
    return (
        str(attempt.number),
        "-" if attempt.began_s is None else _clock(attempt.began_s),
        brief((attempt.ended_s or 0) - (attempt.began_s or 0)) if known else "-",
        "-" if attempt.first_step is None else f"{attempt.first_step:,} to {last:,}",
        attempt.end,
        brief(spent["training"] + spent["loading"]),
        brief(spent["starting"]),
        brief(spent["lost"]) if spent["lost"] else "-",
        attempt.owner.host or "-",
        attempt.owner.slurm_job_id or "-",
    )


def _evaluations(run: History) -> Iterator[str]:
    """Figures of each step, a row per figure; of many steps the newest."""
    for title, scores in (("Evaluations", run.evaluations), ("Validation while training", run.validations)):
        if not scores:
            continue
        shown = scores[-_MAX_COLUMNS:]
        rows = [(key, *(_figure(one.values.get(key)) for one in shown)) for key in keys_of(shown)]
        heading = ["at step", *(f"{one.step:,}" for one in shown)]
        more = f'<p class="note">the newest {len(shown)} of {len(scores)}</p>' if len(scores) > len(shown) else ""
        told = table(heading, rows, numbers=range(1, len(heading))) + more
        yield f"<h2>{title}</h2>{told}" if scores is run.evaluations else folded(title, told)


def _config(run: History) -> Iterator[str]:
    """Every key with the place its value came from; what no file sets is folded away."""
    if not run.facts.config:
        return
    origins = _origins(run.facts.path / ORIGIN_FILE)
    rows = []
    for key, value in flatten(run.facts.config).items():
        inside = (place for leaf, place in origins.items() if leaf == key or leaf.startswith(f"{key}."))
        nowhere = "default" if origins and value in ([], {}) else "-"  # a list's items have places, an empty one none
        rows.append((key, public_value(key, value), str(next(inside, nowhere))))
    given = [row for row in rows if row[2] != "default"]
    yield "<h2>Config</h2>" + table(["key", "value", "from"], given)
    rest = [row[:2] for row in rows if row[2] == "default"]
    if rest:
        yield folded(f"keys at their defaults ({len(rest)})", table(["key", "value"], rest))
    changes = list(config_changes(run.facts.path))
    if changes:
        yield "<h3>Changed between attempts</h3>" + table(
            ["after attempt", "key", "was", "became"], changes, numbers=(0,)
        )


def config_changes(run_dir: Path) -> Iterator[tuple[str, str, str, str]]:
    """(attempt, key, value before, value after) of each key that a later attempt changed."""
    numbered = [path for path in run_dir.glob("config.*.yaml") if re.fullmatch(r"config\.\d+\.yaml", path.name)]
    files = [*sorted(numbered, key=lambda path: int(path.name.split(".")[1])), run_dir / CONFIG_FILE]
    trees = [(path, _tree(path)) for path in files]
    for (path, before), (_, after) in itertools.pairwise(trees):
        for key, values in config_differences(before, after).items():
            was, became = (_spelled(key, value) for value in values)
            yield str(int(path.name.split(".")[1])), key, was, became


def _spelled(key: str, value: Any) -> str:
    return "-" if value is ABSENT else public_value(key, value)


def _tree(path: Path) -> dict[str, Any]:
    try:
        return read_config(path)
    except (OSError, ValueError):
        return {}


def _origins(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


# -- several runs --------------------------------------------------------------------------------------------------


def _page_of_several(
    runs: Sequence[History], names: Sequence[str], statuses: Sequence[Status], me: Owner, artist: _Artist
) -> Iterator[str]:
    yield f"<h1>{len(runs)} runs</h1>"
    rows = [_run_row(*each) for each in zip(names, runs, statuses, strict=True)]
    figures = ["step", "loss", "held-out", "tokens/s", "MFU", "training that counts", "attempts"]
    heading = ["run", "state", *figures, "folder"]
    yield table(heading, rows, numbers=range(2, 9))
    pictures = pictures_of(runs, labels_of(runs, names))
    if any(s > 0 for run in runs for s in run.seconds.values()):
        pictures.append(spent_picture(runs, names))
    yield artist.show_all(pictures) or "<p>No step has been reported yet.</p>"
    yield "<h2>Config differences</h2>" + _differences(runs, names)
    for i, (run, name, status) in enumerate(zip(runs, names, statuses, strict=True)):
        parts = [*_summary(run, status, me), *_story(run, artist, f"{i + 1}_"), *_evaluations(run), *_config(run)]
        yield folded(name, "\n".join(parts))


def _run_row(name: str, run: History, status: Status) -> tuple[str, ...]:
    values = {key: run.metrics.curve(key)[1] for key in (LOSS, WPS, MFU)}
    recent = {key: v[-max(1, len(v) // 20) :].mean() if len(v) else None for key, v in values.items()}
    scores = run.validations[-1].values if run.validations else {}
    bpb = [value for key, value in scores.items() if key.endswith("/bpb")]
    all_s = sum(run.seconds.values())
    return (
        name,
        f"{status.state} ({status.kind})" if status.kind else status.state,
        "-" if status.step is None else f"{status.step:,}",
        _figure(recent[LOSS]),
        _figure(sum(bpb) / len(bpb) if bpb else None),
        "-" if recent[WPS] is None else f"{recent[WPS]:,.0f}",
        "-" if recent[MFU] is None else f"{recent[MFU]:.1%}",
        f"{run.seconds['training'] / all_s:.0%}" if all_s else "-",
        str(len(run.attempts)),
        str(run.facts.path),
    )


def _differences(runs: Sequence[History], names: Sequence[str]) -> str:
    """A row per key that is not the same in all runs."""
    flat = [flatten(run.facts.config) for run in runs]
    keys = keys_that_differ([run.facts.config for run in runs])
    if not keys:
        return "<p>The configs are equal.</p>"
    rows = [(key, *(_spelled(key, tree.get(key, ABSENT)) for tree in flat)) for key in keys]
    return table(["key", *names], rows)


# -- figures -------------------------------------------------------------------------------------------------------


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 2 else f"{value:.4f}"


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, tz=UTC).strftime("%m-%d %H:%M:%S")
