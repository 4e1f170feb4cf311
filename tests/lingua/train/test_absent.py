"""Data that is not there: a wrong name is an error, another machine's disk is not, unless the run starts here."""

import re
from pathlib import Path
from typing import Any

import pytest

from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line
from lingua.config.frozen import dump_yaml
from lingua.train.check import load

SMALL: dict[str, Any] = {
    "steps": 100,
    "model": {"dim": 64, "n_layers": 2, "n_heads": 4},
    "optim": {"warmup": 10},
    "data": {"batch_size": 4, "seq_len": 32},
}
ELSEWHERE = "is not on this machine"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data/mine/mine.chunk.00.jsonl", "data/wiki/wiki.chunk.00.jsonl", "corpora/web/web.chunk.00.jsonl"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text('{"text": "one"}\n')
    for name in ("data/.hidden", "data/mine.html"):  # the latter: `lingua data inspect mine --page`
        Path(name).touch()
    Path("empty").mkdir()
    Path("x.yaml").write_text(dump_yaml(SMALL))
    return tmp_path


def loaded(*words: str, starting: bool = False, here: bool = False) -> Any:
    return load(parse_command_line(["x.yaml", *words]), 1, starting=starting, here=here)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.sources={mien: 1}"], "data has no mien, it has mine, wiki; did you mean mine?"),
        (["data.sources={mine/part: 1}"], "data has no mine/part, it has mine, wiki; did you mean mine?"),
        (
            ["data.sources={data/mine: 1}"],
            "data has no data/mine: names are looked up in data.root_dir, which is data; write mine",
        ),
        (["data.sources={corpora/web: 1}"], "which is data; to name corpora/web, set data.root_dir=."),
        (["data.sources=[{path: corpora/wbe}]"], "corpora has no wbe, it has web; did you mean web?"),
    ],
)
def test_a_name_that_is_missing_from_a_folder_that_is_there(words: list[str], sentence: str) -> None:
    for how in ({}, {"starting": True}, {"starting": True, "here": True}):
        with pytest.raises(ConfigError) as caught:
            loaded(*words, **how)
        assert len(caught.value.problems) == 1
        assert sentence in caught.value.problems[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.sources={mine: 1, xyz: 1}"], "data has no xyz, it has mine, wiki; correct the name, or prepare"),
        (["data.root_dir=empty", "data.sources={mine: 1}"], "empty has no mine, it is empty; correct the name"),
        (["data.sources=[{path: corpora/web/1.jsonl}]"], "corpora/web has no 1.jsonl, it has web.chunk.00.jsonl"),
    ],
)
def test_a_name_like_no_other_may_be_prepared_later_unless_the_run_starts_here(words: list[str], sentence: str) -> None:
    for how in ({}, {"starting": True}):
        assert [warning for warning in loaded(*words, **how).warnings if sentence in warning]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        loaded(*words, starting=True, here=True)


@pytest.mark.parametrize(
    "words",
    [
        ["data.root_dir=/nowhere", "data.sources={mine: 1}"],
        ["data.sources=[{path: nowhere/web}]"],
        ["checkpoint.init_ckpt_path=/nowhere/run@3"],
    ],
)
def test_without_its_folder_it_may_be_on_another_machine_unless_the_run_starts_here(words: list[str]) -> None:
    for how in ({}, {"starting": True}):
        assert [warning for warning in loaded(*words, **how).warnings if ELSEWHERE in warning]
    with pytest.raises(ConfigError, match=f"{ELSEWHERE}; correct the path, or copy it here"):
        loaded(*words, starting=True, here=True)


def test_what_is_there_is_no_fault() -> None:
    words = ["data.sources={mine: 1, wiki: 2}"]
    assert not [warning for warning in loaded(*words, starting=True, here=True).warnings if "data" in warning]


def test_a_later_phase_may_wait_for_its_data() -> None:
    phases = [{"name": "web", "until": "50 steps"}, {"name": "end", "until": "100%", "data.sources": {"later": 1.0}}]
    Path("x.yaml").write_text(dump_yaml({**SMALL, "phases": phases}))
    (warning,) = [w for w in loaded("data.sources={mine: 1}", starting=True, here=True).warnings if "later" in w]
    assert "data has no later, it has mine, wiki" in warning
