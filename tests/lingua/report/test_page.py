"""The page of a run, of several, of hostile ones, and of one that has hardly begun."""

from __future__ import annotations

import errno
import itertools
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from apps.cli.drill import drill
from lingua.files import RunError
from lingua.report.charts import pictures_of
from lingua.report.figure import look
from lingua.report.history import History
from lingua.report.page import as_record, config_changes, names_of, report_page, write_report
from lingua.report.status import why
from lingua.run.lock import this_process
from lingua.selfcheck.interrupted import write_interrupted
from tests.checkout import ROOT
from tests.lingua.report.test_history import history_of, make_run

EVIL = "_$x^{$ <script>alert(1)</script>\"'&{x}</title>"


class Tags(HTMLParser):
    """Every tag of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> History:
    return history_of(make_run(tmp_path))


def test_a_page_tells_it_all_and_needs_no_other_file(tmp_path: Path, run: History):
    origins = {"steps": "command line", "model.dim": "a.yaml:3", "seed": "default"}
    config = {"name": "x", "steps": 10, "seed": 7, "model": {"dim": 8}, "env": {"WANDB_API_KEY": "hush"}}
    (tmp_path / "config.origin.yaml").write_text(yaml.safe_dump(origins))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "config.0001.yaml").write_text(yaml.safe_dump(config | {"steps": 8}))
    (tmp_path / "probe.jsonl").write_text('{"global_step": 5, "probe/layers.0/weight/rms": 1.0}\n')
    run = history_of(tmp_path)
    file, pngs = write_report([run], None, tmp_path / "pictures")
    page = file.read_text()
    assert file == tmp_path / "report.html"
    read = Tags(page)
    for part in (
        "Training loss", "Held-out loss", "Where the time went", "Time line", "Evaluation tasks",
        "def sample <b>1</b>\\x1b[2J of 4", "def sample <b>2</b>\\x1b[2J of 6", "weight: rms",
        "killed", "finished", "0 to 8", "4 to 10", "the disk is full", "a.yaml:3", "command line",
    ):  # fmt: skip
        assert part in read.text, part
    assert "Learning rate" not in read.text  # it logs none, so there is no picture
    assert list(config_changes(tmp_path)) == [("1", "steps", "8", "10")]
    assert "hush" not in page
    assert "sample <b>1</b>\\x1b[2J of 6" not in read.text  # the second attempt trained that step again
    needed = re.findall(r'(?:src|href|srcset)="([^"]*)"|url\(([^)]*)\)|(@import)', page)
    assert needed
    assert all("".join(each).startswith("data:") for each in needed)
    pictures = re.findall(r'srcset="data:image/svg.xml;base64,[^"]+"><img alt="([^"]+)" src="data:image/svg.xml;', page)
    assert len(pictures) == len(pngs)
    assert "prefers-color-scheme: dark" in page
    assert {path.stem for path in pngs} == {"loss", "held_out", "evaluations", "time", "time_line", "probe_weight_rms"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs)
    assert report_page([run])[0] == page  # the same facts, the same bytes


@pytest.mark.soak
def test_nothing_of_a_run_becomes_markup(tmp_path: Path):
    make_run(tmp_path)
    honest = Tags(report_page([history_of(tmp_path)])[0])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": EVIL, "steps": 10, EVIL: EVIL}))
    text = (tmp_path / "metrics.validation.jsonl").read_text()
    (tmp_path / "metrics.validation.jsonl").write_text(text.replace("web/", "<img onerror=x>/"))
    text = (tmp_path / "metrics.checkpoint.jsonl").read_text()
    (tmp_path / "metrics.checkpoint.jsonl").write_text(text.replace("the disk is full", "<b>https://me:pw@host"))
    page, _ = report_page([history_of(tmp_path)])
    read = Tags(page)
    report_page([history_of(tmp_path)] * 2)  # names in the pictures too
    assert EVIL in read.text
    assert "<img" in read.text
    assert "me:pw" not in page
    assert {*read.tags} <= {*honest.tags}
    assert "script" not in read.tags


@pytest.mark.parametrize("config", ["", "name: x\n", "[broken"])
def test_a_run_that_has_hardly_begun(tmp_path: Path, config: str):
    (tmp_path / "config.yaml").write_text(config)
    assert "No step has been reported yet" in report_page([history_of(tmp_path)])[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param(
            "incarnations/0000000001.json",
            '{"host": "n1", "began_at": "noon", "released": false}',
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "incarnations/0000000002.json",
            '{"host": "n2", "began_at": 1e300, "released": true, "released_at": [1]}',
            marks=pytest.mark.soak,
        ),
        pytest.param("stop.json", '{"reason": "finished", "exit_code": 0, "step": "ten"}', marks=pytest.mark.soak),
        pytest.param("config.yaml", "name: x\nsteps: [10]\ncheckpoint: none\n", marks=pytest.mark.soak),
        ("config.yaml", "name: x\nsteps: ten\ncheckpoint: {path: 3}\n"),
        pytest.param(
            "checkpoints/checkpoint_0000000010.done",
            '{"step": 10, "incarnation": 2, "created_at": -1e18}',
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_value_of_the_wrong_kind_counts_as_none(tmp_path: Path, name: str, content: str):
    run_dir = make_run(tmp_path)
    (run_dir / name).write_text(content)
    run = history_of(run_dir)
    page, _ = report_page([run])
    as_record([run])
    assert "Training loss" in page
    assert why(run.facts, this_process())["ended"].startswith("finished")


@pytest.mark.soak
def test_several_runs_next_to_each_other(tmp_path: Path):
    for name, dim in (("a", 8), ("b", 16)):
        (tmp_path / name).mkdir()
        make_run(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text(f"name: {name}\nsteps: 10\nmodel: {{dim: {dim}}}\n")
    runs = [history_of(tmp_path / name) for name in ("a", "b")]
    text = Tags(report_page(runs)[0]).text
    for what, over in itertools.product(("Training", "Held-out"), ("steps", "tokens", "time")):
        assert f"{what} loss over {over}" in text
    assert "seconds of training" in text
    assert text.count("a: dim=8") == text.count("b: dim=16") >= 6  # the names of the curves
    differences = text.partition("Config differences")[2]
    assert re.findall(r"model\.dim\s*8\s*16", differences)
    assert names_of(runs) == ["a", "b"]
    assert names_of([runs[0], runs[0]]) == [f"{tmp_path / 'a'} (1)", f"{tmp_path / 'a'} (2)"]
    records = as_record(runs)
    assert [(one["name"], one["state"], len(one["starts"])) for one in records] == [
        ("a", "finished", 2),
        ("b", "finished", 2),
    ]


def test_where_the_page_goes(tmp_path: Path, run: History, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, content: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("lingua.report.page.report_page", lambda *_: ("page", []))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert write_report([run, run], None, None)[0] == Path("lingua-report.html")
    assert write_report([run], tmp_path / "here", None)[0] == tmp_path / "here" / "report.html"
    assert write_report([run], tmp_path / "new" / "x.html", None)[0].read_text() == "page"
    with pytest.raises(RunError, match=r"cannot write .*; choose another place with --out FILE"):
        write_report([run], tmp_path / "new" / "x.html" / "y.html", None)
    monkeypatch.setattr("lingua.report.page.write_whole", refuse)
    with pytest.raises(RunError, match=rf"{tmp_path}/report.html: Permission denied; .* --out FILE"):
        write_report([run], None, None)


def test_an_interrupted_run_on_top_of_an_undisturbed_one(tmp_path: Path, run: History):
    write_interrupted(run, run, tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text()
    for part in ("equal bit for bit at 5 of 5 steps", "undisturbed", "interrupted", "killed or stopped"):
        assert part in svg, part


def test_without_matplotlib_a_page_has_all_but_pictures(tmp_path: Path, run: History, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lingua.report.figure.find_spec", lambda name: None)
    page = Tags(write_report([run], None, None)[0].read_text())
    assert "img" not in page.tags
    assert "matplotlib, which draws pictures, is not installed; type `uv sync --extra plots`" in page.text
    assert "matplotlib" in Tags(report_page([run, run])[0]).text
    for impossible in (
        lambda: write_report([run], None, tmp_path),
        lambda: write_interrupted(run, run, tmp_path / "x.svg"),
        lambda: drill(figure=tmp_path / "x.svg"),
    ):
        with pytest.raises(RunError, match="matplotlib, which draws pictures, is not installed"):
            impossible()


def test_a_figure_of_another_kind_is_refused_before_the_drill_begins():
    with pytest.raises(RunError, match=r"--figure x\.pdf: the name of the file must end in \.svg or \.png"):
        drill(figure=Path("x.pdf"))


def test_an_installed_package_has_the_templates():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["lingua"]
    found = {path for pattern in patterns for path in (ROOT / "lingua").glob(pattern)}
    wanted = {path for path in (ROOT / "lingua").rglob("*.*") if path.suffix not in (".py", ".pyc", ".md", ".svg")}
    assert wanted
    assert wanted <= found


def test_a_phase_is_marked_in_the_curves_where_it_begins(tmp_path: Path):
    make_run(tmp_path)
    phases = [{"name": "main", "until": 4}, {"name": "anneal", "until": 10}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "x", "steps": 10, "phases": phases}))
    with look():
        axes = pictures_of([history_of(tmp_path)], ["x"])[0].make().axes[0]
    assert [(text.get_text().strip(), text.get_position()[0]) for text in axes.texts] == [("anneal", 4)]
