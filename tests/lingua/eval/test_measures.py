"""Held-out loss of an evaluation against a plain loop; the same for any batch size and any number of ranks."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from apps.main.args import TrainArgs
from lingua.config.base import ConfigError
from lingua.config.keys.eval import EvalArgs, HarnessArgs, HeldOutArgs
from lingua.config.keys.generate import GeneratorArgs
from lingua.data.held_out import ScoredRow, Wording, windows
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World
from lingua.eval.measures import MeasuredModel, Measures, build_held_out
from lingua.model.generate import Generator
from lingua.model.loss import CrossEntropy
from lingua.tokenizer import ByteTokenizer
from lingua.train.validate import HeldOutLoss
from tests.lingua.data.test_held_out import ids_of_text
from tests.lingua.eval.test_scorer import CONTEXT, plainly, tiny
from tests.ranks import run_on_ranks

WORDING = Wording(ByteTokenizer())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(5)
    texts = ["".join(draw.choice("abc é\n") for _ in range(draw.randrange(1, 70))) for _ in range(6)]
    path = tmp_path_factory.mktemp("held") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "no json\n{}\n")
    return path


def found_in(file: Path, *, max_tokens: int = 500, place: RankInfo | None = None, **keys: Any) -> dict[str, float]:
    model = tiny()
    generator = Generator(model, ByteTokenizer(), GeneratorArgs(dtype="fp32", max_tokens=max_tokens))
    world = World(place or RankInfo(), next(model.parameters()).device, mesh=None)
    args = HeldOutArgs(use_val_from_train_src=False, sources=[str(file)], **keys)
    measure = build_held_out(args, TrainArgs.model_validate({"data": {"seq_len": CONTEXT}}), EvalArgs())
    return dict(measure(MeasuredModel(model, ByteTokenizer(), generator, WORDING, world, lambda: None)))


@pytest.mark.parametrize("context", ["document", "packed"])
def test_the_loss_is_that_of_a_plain_loop(file: Path, context: str) -> None:
    found = found_in(file, context=context, stride=6)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()[:6]]
    rows: list[ScoredRow] = []
    if context == "document":
        for ids in map(ids_of_text, texts):
            assert (ids[0], ids[-1]) == (256, 257)
            rows += [ScoredRow(ids[a:b], first) for a, b, first in windows(len(ids), CONTEXT, 6)]
    else:
        stream = [token for text in texts for token in ids_of_text(text)]
        rows = [ScoredRow(stream[a : a + CONTEXT + 1]) for a in range(0, len(stream) - 1, CONTEXT)]
    nats = sum(plainly(tiny(), row)[0] for row in rows)
    n_bytes, n_tokens = sum(len(text.encode()) for text in texts), sum(len(row.ids) - row.first for row in rows)
    expected = {"nll": nats / n_tokens, "ppl": math.exp(nats / n_tokens), "bpb": nats / math.log(2) / n_bytes}
    expected |= {"n_tokens": n_tokens, "n_bytes": n_bytes, "n_documents": 6, "n_skipped": 2}
    prefix = {"document": "documents", "packed": "validation"}[context]
    assert found == pytest.approx({f"{prefix}/x/{name}": value for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("context", ["document", "packed"])
def test_the_same_number_on_any_batch_size_and_any_number_of_ranks(file: Path, context: str) -> None:
    expected = pytest.approx(found_in(file, context=context, max_tokens=1), rel=1e-6)
    assert found_in(file, context=context, max_tokens=50) == expected
    on_ranks = run_on_ranks(lambda r: found_in(file, context=context, place=RankInfo(r, 3)), 3)
    assert on_ranks == [expected] * 3


def test_each_token_is_scored_once_whatever_the_stride(file: Path) -> None:
    found = [found_in(file, stride=stride) for stride in (1, 12, None, 24, 99)]
    assert len({each["documents/x/n_tokens"] for each in found}) == 1
    assert found[1] == found[2], "half of the context"
    assert found[3] == found[4], "all of it"
    assert found[0] != found[3]


def test_logits_exist_for_scored_positions_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_positions: list[int] = []
    whole = CrossEntropy.__call__

    def counting(self: CrossEntropy, hidden: Tensor, weight: Tensor, labels: Tensor, **more: Any) -> Any:
        n_positions.append(labels.numel())
        return whole(self, hidden, weight, labels, **more)

    monkeypatch.setattr(CrossEntropy, "__call__", counting)
    found = found_in(file, stride=1)
    assert sum(n_positions) == found["documents/x/n_tokens"]


def test_nothing_to_measure_is_an_error(file: Path) -> None:
    with pytest.raises(ValueError, match="validation/x: there is no text to score"):
        HeldOutLoss().metrics("validation/x")
    world = World(RankInfo(), next(tiny().parameters()).device, mesh=None)
    for keys, sentence in [
        ({"validation": None}, "nothing is measured"),
        ({"validation": None, "measures": [HarnessArgs()]}, "names no tasks"),
        ({"measures": [HeldOutArgs(use_val_from_train_src=False, sources=["nowhere"])]}, "nowhere does not exist"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            Measures(TrainArgs(), EvalArgs(**keys), world)


def test_the_step_of_a_checkpoint_says_in_which_phase_it_is_measured(file: Path) -> None:
    def section(n: int) -> EvalArgs:
        own = HeldOutArgs(use_val_from_train_src=False, sources=[str(file)], max_steps=n)
        return EvalArgs(validation=own, generator=GeneratorArgs(dtype="fp32"))

    model = tiny()
    world = World(RankInfo(), next(model.parameters()).device, mesh=None)
    args = TrainArgs.model_validate({"data": {"seq_len": CONTEXT}})
    measures = Measures(args, section(1), world, [(3, section(1)), (6, section(2)), (9, section(1))])

    def n_documents(step: int | None) -> float:
        return measures.measure_model(model, ByteTokenizer(), lambda: None, step)["documents/x/n_documents"]

    assert [n_documents(step) for step in (1, 3, 4, 6, 7, 12, None)] == [1, 1, 2, 2, 1, 1, 1]


def test_what_all_measures_find_is_kept_and_each_name_is_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"a/x": 1, "details": {"a": 1}, "samples": {"t": [1]}}
    finds: list[dict[str, Any]] = []
    monkeypatch.setattr("lingua.eval.measures.build_part", lambda *args: lambda measured: finds.pop(0))
    world = World(RankInfo(), next(tiny().parameters()).device, mesh=None)
    measures = Measures(TrainArgs(), EvalArgs(measures=[HeldOutArgs()]), world)
    finds[:] = [one, {"b/x": 2, "details": {"b": 2}}]
    found = measures.measure_model(tiny(), ByteTokenizer(), lambda: None)
    assert found == {"a/x": 1, "b/x": 2, "details": {"a": 1, "b": 2}, "samples": {"t": [1]}}
    finds[:] = [one, one]
    with pytest.raises(ConfigError, match="two measures give a/x"):
        measures.measure_model(tiny(), ByteTokenizer(), lambda: None)
