"""`data.loss_on: completion`: a prompt's tokens are inputs and no labels, through loader, loss and held-out rows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs
from lingua.config.keys.model import CrossEntropyArgs
from lingua.data.audit import audit, rows_of_step
from lingua.data.blocked_source import DataError, TextFields
from lingua.data.held_out import HeldOutText, Wording, by_document, packed, padded
from lingua.data.loader import build_loader, merge_states
from lingua.data.pack import IGNORED, PIECE_CHARS
from lingua.model.loss import CrossEntropy
from lingua.tokenizer import ByteTokenizer
from tests.corpora import assert_loader_resumes, data_args, write_parquet, write_source

K = 4
PAIRS = [(f"ask {n}: " + "why? " * (n % 4), f"because {n}" * (n % 3 + 1)) for n in range(60)] + [("", "no prompt")]


def write_pairs(path: Path, pairs: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [pair if isinstance(pair, dict) else {"prompt": pair[0], "completion": pair[1]} for pair in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def asked(root: Path, form: str = "mmap_jsonl", **changed: Any) -> DataArgs:
    sources = [SourceArgs.model_validate({"path": form, "name": "s", "format": form})]
    return data_args(root, **{"sources": sources, "loss_on": "completion", "lanes": K, "seq_len": 24, **changed})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The same documents in each format."""
    for form in ("jsonl", "mmap_jsonl"):
        write_pairs(tmp_path / form / "s.jsonl", PAIRS)
    prompts, completions = zip(*PAIRS, strict=True)
    write_parquet(tmp_path / "parquet" / "s.parquet", {"prompt": prompts, "completion": completions})
    return tmp_path


def lanes_of(args: DataArgs, n_steps: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each lane, its rows one after another."""
    lanes: list[tuple[list[int], list[int]]] = [([], []) for _ in range(K)]
    with build_loader(args, rows_per_step=K) as loader:
        for _ in range(n_steps * K // args.batch_size):
            batch = next(loader)
            for i, number in enumerate(batch.rows):
                for of_lane, view in zip(lanes[number % K], batch.views, strict=True):
                    of_lane.extend(view[i].tolist())
    return lanes


@pytest.mark.parametrize("form", ["jsonl", "mmap_jsonl", "parquet"])
def test_exactly_the_completions_are_labels(root: Path, form: str) -> None:
    known = {prompt + completion: len(prompt) for prompt, completion in PAIRS}
    n_labels = n_documents = 0
    for inputs, labels in lanes_of(asked(root, form), 30):
        stream = [*inputs, labels[-1]]
        begins = [at for at, token in enumerate(stream) if token == ByteTokenizer.bos_id]
        for begin, end in itertools.pairwise(begins):
            prompt = known[bytes(stream[begin + 1 : end - 1]).decode()]
            before = 1 + prompt if prompt else 0  # the begin token belongs to the prompt
            expected = [IGNORED] * before + stream[begin + before : end]
            assert labels[max(0, begin - 1) : end - 1] == expected[begin == 0 :]
            n_labels, n_documents = n_labels + end - begin - before, n_documents + 1
    assert n_documents > 60
    assert n_labels > 500


def test_all_formats_and_workers_give_the_same_rows(root: Path) -> None:
    expected = lanes_of(asked(root), 12)
    assert lanes_of(asked(root, "parquet"), 12) == expected  # a row is a block in both
    assert lanes_of(asked(root, load_async=True, num_workers=2, prefetch_size=2), 12) == expected


def test_inputs_are_those_of_the_whole_text(root: Path) -> None:
    write_source(root, "whole", [prompt + completion for prompt, completion in PAIRS], n_files=1)
    sources = [SourceArgs.model_validate({"path": "whole", "name": "s", "format": "mmap_jsonl"})]
    whole = lanes_of(asked(root, sources=sources, loss_on="all"), 12)
    masked = lanes_of(asked(root), 12)
    assert [inputs for inputs, _ in whole] == [inputs for inputs, _ in masked]
    for (_, every), (_, counted) in zip(whole, masked, strict=True):
        assert all(label in (token, IGNORED) for token, label in zip(every, counted, strict=True))


def test_prompts_give_no_gradient(root: Path) -> None:
    """Loss and gradients are those of the positions with a label alone, as if the others had been dropped."""
    with build_loader(asked(root, batch_size=4), rows_per_step=K) as loader:
        labels = torch.from_numpy(next(loader).views[1]).long()
    torch.manual_seed(0)
    hidden, weight = torch.randn(*labels.shape, 8, requires_grad=True), torch.randn(258, 8, requires_grad=True)
    loss, n_labels = CrossEntropy(CrossEntropyArgs(chunk_tokens=7))(hidden, weight, labels)
    loss.backward()
    keep = labels != IGNORED
    assert 0 < int(keep.sum()) < keep.numel()
    kept, head = hidden.detach()[keep].requires_grad_(), weight.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(kept @ head.t(), labels[keep], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert int(n_labels) == int(keep.sum())
    assert hidden.grad is not None
    assert not hidden.grad[~keep].any()
    torch.testing.assert_close(hidden.grad[keep], kept.grad)
    torch.testing.assert_close(weight.grad, head.grad)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_resume_everywhere(root: Path, form: str) -> None:
    assert_loader_resumes(asked(root, form, shuffle_window=3, doc_mask=True), 12, tail=4)


def test_audit_and_rows_know_prompts(tmp_path: Path) -> None:
    long = "x" * (PIECE_CHARS + 10)  # prompt and completion of several pieces
    write_pairs(tmp_path / "s.jsonl", [(long, long), ("a", "b")])
    args = data_args(tmp_path, sources={"s.jsonl": 1.0}, loss_on="completion", lanes=1, batch_size=1, seq_len=50_000)
    with build_loader(args, rows_per_step=1) as loader:
        labels = np.concatenate([next(loader).views[1, 0] for _ in range(22)])
        state = merge_states([loader.state_dict()])
    assert abs(int((labels != IGNORED).sum()) - len(labels) // 2) < 60_000
    assert audit(args, 1, 1, {22: state}).problems == []
    rows = [parts for step in range(1, 23) for _, parts in rows_of_step(args, 1, 1, {}, step)]
    assert {one.is_label for parts in rows for one in parts if one.n_tokens == 50_000} == {True, False}
    assert sum(one.n_tokens for parts in rows for one in parts if one.is_label) > 400_000


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"text": "a"}, {"prompt": "a"}, {"prompt": 1, "completion": "b"}],
            "has no document with 'prompt' and 'completion' in 3 lines .*write both, or set data.loss_on: all",
        ),
        ([{"prompt": "a", "completion": ""}], "in 1 lines .*'empty': 1"),
    ],
)
def test_sources_without_the_fields_are_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    write_pairs(tmp_path / "s.jsonl", lines)
    args = data_args(tmp_path, sources={"s.jsonl": 1.0}, loss_on="completion")
    with pytest.raises(DataError, match=message):
        build_loader(args, rows_per_step=2)


def test_lines_without_the_fields_are_bad_and_what_cannot_be_asked_is_refused(root: Path) -> None:
    write_pairs(root / "mixed" / "s.jsonl", [*PAIRS[:3], {"text": "plain"}])
    args = data_args(root, sources={"mixed": 1.0}, loss_on="completion", lanes=1, max_bad_fraction=1.0)
    with build_loader(args, rows_per_step=2) as loader:
        while loader.stats()["data/epoch/mixed"] < 2:
            next(loader)
        assert loader.stats()["data/bad_lines/no_text"] >= 2
    write_parquet(root / "rows" / "s.parquet", {"prompt": ["a"]})
    with pytest.raises(ConfigError, match="no column 'prompt' and 'completion', only prompt; write both"):
        build_loader(asked(root, sources=[SourceArgs(path="rows", format="parquet")]), rows_per_step=2)
    (root / "made").mkdir()
    (root / "made" / "s.tokens").write_bytes(b"")
    with pytest.raises(ConfigError, match="token files do not mark prompts"):
        build_loader(asked(root, sources=[SourceArgs(path="made", format="tokens")]), rows_per_step=2)
    with pytest.raises(ValidationError, match="drop text_key"):
        asked(root, sources=[SourceArgs(path="jsonl", text_key="body")])


def test_another_choice_of_labels_is_another_order(root: Path) -> None:
    write_pairs(root / "both" / "s.jsonl", [{"text": "a", "prompt": "b", "completion": "c"}])
    args = data_args(root, sources={"both": 1.0}, lanes=1, batch_size=1)
    with build_loader(args, rows_per_step=1) as loader:
        state = loader.state_dict()
    with pytest.raises(ConfigError, match="both: fingerprint was"):
        build_loader(args.model_copy(update={"loss_on": "completion"}), rows_per_step=1, state=state)


def test_held_out_rows_score_completions_only(tmp_path: Path) -> None:
    write_pairs(tmp_path / "s.val.jsonl", [("abc", "de"), ("", "fg"), ("p" * 30, "x")])
    text = HeldOutText("s", tmp_path / "s.val.jsonl", TextFields(loss_on="completion"))
    whole = packed(text, Wording(ByteTokenizer()), max_rows=2, seq_len=6)
    tokens, labels = padded(whole.rows, 2, 6)
    assert tokens.ravel().tolist() == [256, *b"abcde", 257, 256, *b"fg", 0, 0]
    assert labels.ravel().tolist() == [*[IGNORED] * 3, *b"de", 257, 256, *b"fg", 257, IGNORED, IGNORED]
    assert whole.n_bytes == 4
    (each,) = by_document(text, Wording(ByteTokenizer()), context=8, stride=4)
    scored = [label for row in each.rows for label in padded([row], 1, 8)[1].ravel().tolist() if label != IGNORED]
    assert scored == [*b"de", 257, *b"fg", 257, *b"x", 257]
    assert (each.n_bytes, each.n_documents, len(each.rows)) == (5, 3, 3)  # windows of a prompt alone are left out
    write_pairs(tmp_path / "s.val.jsonl", [("p" * 100, "t" * 100)])
    cut = packed(text, Wording(ByteTokenizer()), max_rows=4, seq_len=12)
    assert 0 < cut.n_bytes == int((padded(cut.rows, len(cut.rows), 12)[1] != IGNORED).sum()) < 48
