"""The proof of order over formats, windows, rows passed over, long documents and sources changed on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs
from lingua.data.audit import audit, rows_of_step
from lingua.data.loader import build_loader
from lingua.data.manifest import MANIFEST, hash_file
from lingua.data.token_files import token_file, tokenize_file
from lingua.files import write_json
from lingua.tokenizer import ByteTokenizer
from tests.corpora import data_args, run_steps, two_sources, write_source

K = G = 12


def run(args: DataArgs, steps: list[int], states: dict[int, Any] | None = None) -> dict[int, Any]:
    """States at these steps, each reached from the one before on another number of ranks."""
    states = dict(states or {})
    for turn, step in enumerate(steps):
        begin = max(states, default=0)
        _, states[step] = run_steps(args, step - begin, (1, 3, 2)[turn % 3], states.get(begin), n_rows=G, lanes=K)
    return states


@pytest.mark.parametrize("form", ["jsonl", "mmap_jsonl", "tokens"])
@pytest.mark.parametrize(
    "changed", [{}, {"shuffle_window": 3}, {"skip_rows": [[20, 60]]}, {"add_bos": False, "shuffle_window": 4}]
)
def test_an_honest_run_is_confirmed(tmp_path: Path, form: str, changed: dict[str, Any]) -> None:
    two_sources(tmp_path)
    folder = write_source(tmp_path, "small", ["x " * 200_000, "y", "!"], n_files=1)  # two pieces
    (folder / "small.chunk.01.jsonl").write_text('\n[]\n{"text": "z"}\n')
    if form == "tokens":
        for path in [*tmp_path.glob("*/*.jsonl")]:
            tokenize_file(path, token_file(path, tmp_path / "made" / path.parent.name), ByteTokenizer())
    sources = [SourceArgs(path=name, format=form) for name in ("big", "small")]  # pyright: ignore[reportArgumentType]
    root = tmp_path / "made" if form == "tokens" else tmp_path
    args = data_args(root, sources=sources, seq_len=3000, lanes=K, **{"max_bad_fraction": 1.0, **changed})
    states = run(args, [1, 2, 5, 9])
    for count_tokens in (True, False):
        found = audit(args, K, G, states, count_tokens=count_tokens)
        assert found.problems == []
        assert (found.checkpoints, found.begin, found.rows) == ([1, 2, 5, 9], 0, 9 * G)
    states[5]["lanes"]["7"]["token"] += 1
    assert "step 5, lane 7" in audit(args, K, G, states).problems[0]


@pytest.mark.parametrize("form", ["jsonl", "mmap_jsonl"])
def test_text_edited_in_place_is_found(tmp_path: Path, form: str) -> None:
    """The same size, the same first and last 4 KiB: every start takes the file for the one it was."""
    texts = [f"{n:04}" + "x" * 500 for n in range(100)]
    file = write_source(tmp_path, "s", texts, n_files=1) / "s.chunk.00.jsonl"
    sources = [SourceArgs(path="s", format=form)]  # pyright: ignore[reportArgumentType]
    args = data_args(tmp_path, sources=sources, seq_len=100, lanes=K)
    states = run(args, [10, 60])
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"0050x", b"0050y"))
    found = audit(args, K, G, states)
    assert len(found.problems) == 1
    assert "is not the text that was read" in found.problems[0]
    assert audit(args, K, G, states, count_tokens=False).problems == []
    for state in states.values():  # of an older version
        for lane in state["lanes"].values():
            del lane["ids"]
    found = audit(args, K, G, states)
    assert (found.problems, len(found.notes)) == ([], 1)
    assert "older version" in found.notes[0]
    assert "no manifest.json" in audit(args, K, G, states, content=True).notes[0]
    file.write_bytes(whole)
    facts = {"bytes": len(whole), "xxh3_128": hash_file(file)}
    write_json(file.with_name(MANIFEST), {"files": {file.name: facts}})
    assert audit(args, K, G, states, content=True).problems == []
    file.write_bytes(whole.replace(b"0050x", b"0050y"))
    assert audit(args, K, G, states, content=True).problems == [
        f"{file} has another content than its manifest says; copy it again"
    ]


def test_a_run_of_an_older_version_goes_on_without_hashes_of_its_tokens(tmp_path: Path) -> None:
    two_sources(tmp_path)
    args = data_args(tmp_path, lanes=K)
    states = run(args, [2])
    expected = run(args, [5], states)
    for lane in states[2]["lanes"].values():
        del lane["ids"]
    states = run(args, [5], states)
    for number, lane in states[5]["lanes"].items():
        assert "ids" not in lane
        assert {**lane, "ids": expected[5]["lanes"][number]["ids"]} == expected[5]["lanes"][number]


def test_a_change_of_sources_begins_the_proof_anew(tmp_path: Path) -> None:
    two_sources(tmp_path)
    args = data_args(tmp_path, lanes=K)
    states = run(args, [2])
    changed = data_args(tmp_path, lanes=K, sources={"big": 1.0, "small": 1.0})
    with pytest.raises(ConfigError) as refusal:
        run(changed, [3], states)
    changed = changed.model_copy(update={"accept_change": str(refusal.value).rpartition("=")[2]})
    states = run(changed, [4, 6, 8], states)
    found = audit(changed, K, G, states)
    assert (found.problems, found.checkpoints, found.begin) == ([], [4, 6, 8], 4)
    assert "what came before step 4 is not confirmed" in found.notes[0]
    with pytest.raises(ConfigError, match="nothing can be confirmed"):
        audit(data_args(tmp_path, lanes=K, sources={"big": 1.0}), K, G, states)


def test_rows_of_a_step_are_the_same_from_every_checkpoint(tmp_path: Path) -> None:
    two_sources(tmp_path)
    args = data_args(tmp_path, lanes=2 * G, shuffle_window=2, skip_rows=[[30, 40]])
    with build_loader(args, rows_per_step=G) as loader:
        batches = [next(loader) for _ in range(5 * G // 2)]
    numbers = [int(n) for batch in batches for n in batch.rows]
    early = list(rows_of_step(args, 2 * G, G, {}, 5))
    assert [number for number, _ in early] == numbers[4 * G :]
    states: dict[int, Any] = {}
    with build_loader(args, rows_per_step=G) as loader:
        for step in range(1, 6):
            for _ in range(G // 2):
                next(loader)
            states[step] = json.loads(json.dumps(loader.state_dict()))
    assert list(rows_of_step(args, 2 * G, G, states, 5)) == early
    with pytest.raises(ConfigError, match="the first step is 1"):
        list(rows_of_step(args, 2 * G, G, states, 0))
