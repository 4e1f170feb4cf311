"""A run on files of other trainers: killed and resumed, it reads the very rows that it reads from jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lingua.data.token_files import tokenize_file
from lingua.tokenizer import ByteTokenizer
from tests.cli import Lingua
from tests.corpora import write_dataset, write_source, write_tokens
from tests.trainer import TINY, at_step, kill_self, losses, train

TEXTS = {name: f"{name}: " + f"{name}{name.upper()} é\n" * n for n, name in enumerate("abcdefg", 1)}
WORDS = [*TINY, "steps=6", "global_batch_size=12", "checkpoint.dump={every: 3, keep: -1}", "data.lanes=4"]


def words_of(root: Path, form: str) -> list[str]:
    """One document per source, so that the order of documents is the mixture's, whatever blocks a format cuts."""
    for name, text in TEXTS.items():
        if form == "arrow":
            write_dataset(root / name, {"text": [text]}, 1)
        elif form == "jsonl":
            write_source(root, name, [text], 1)
        elif form == "tokens":
            (lines,) = write_source(root / "jsonl", name, [text], 1).iterdir()
            tokenize_file(lines, root / name / f"{lines.name}.tokens", ByteTokenizer())
        else:
            write_tokens(form, root / name / name, [[*text.encode(), 257]])
    sources = ", ".join(f"{{path: {name}, format: {form}, weight: {n}}}" for n, name in enumerate(TEXTS, 1))
    return [*WORDS, f"data.root_dir={root}", f"data.sources=[{sources}]", f"dump_dir={root / 'run'}"]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jsonl")
    result = train(words_of(root, "jsonl"))
    assert result.exit_code == 0, result.output
    return root / "run"


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["tokens", "pbin", "megatron", "npy", "ds", "arrow"])
def test_a_killed_run_on_a_format_reads_the_rows_of_the_run_on_jsonl(
    jsonl: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, run, lingua = words_of(tmp_path, form), tmp_path / "run", Lingua(capsys)

    def texts(rows: list[dict[str, Any]]) -> list[list[str]]:
        return [[part["text"] for part in row["documents"]] for row in rows]

    assert lingua("check", *words)[0] == 0
    first = texts(lingua.record("data", "preview", *words, "--rows", 4)["first_rows"])
    assert train(words, hook=at_step(5, kill_self)).exit_codes == [-9]
    result = train(words, n_ranks=2)
    assert result.exit_code == 0, result.output
    assert losses(run, rel=1e-6) == pytest.approx(losses(jsonl), rel=1e-6)
    for step in (1, 4, 6):
        shown, expected = (texts(lingua.record("data", "rows", r, "--step", step)["rows"]) for r in (run, jsonl))
        assert shown == expected
        assert step > 1 or shown[:4] == first
    found = lingua.record("data", "audit", run)
    assert (found["ok"], found["begin"], found["rows"]) == (True, 0, 72)
