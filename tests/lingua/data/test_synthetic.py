"""Sources that make documents of token ids: the same order and state as other sources, and exact floors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lingua.config.base import build_part, parts
from lingua.config.keys.data import DataArgs
from lingua.config.keys.sources import GssmArgs, SyntheticArgs
from lingua.console import Progress
from lingua.data.audit import audit, rows_of_step
from lingua.data.blocked_source import Floor
from lingua.data.generate import generate
from lingua.data.gssm import Gssm
from lingua.data.held_out import Wording, packed, texts_beside_sources
from lingua.data.loader import build_loader
from lingua.data.local_copy import staged
from lingua.data.manifest import check_manifest
from lingua.data.sources import loss_floor
from lingua.data.synthetic import HELD_OUT_FROM, Process
from lingua.tokenizer import build_tokenizer
from tests.corpora import G, assert_loader_resumes, run_steps

NODES: list[dict[str, Any]] = [
    {"name": "X", "state_dim": 3, "alpha": 0.5, "parents": ["A", "B"], "observed": True},
    {"name": "B", "state_dim": 2, "alpha": 1.0, "parents": ["A"], "kernel_type": "fullrank"},
    {"name": "A", "state_dim": 2, "alpha": 0.3, "mode": "slow"},
]
KINDS: dict[str, dict[str, Any]] = {
    "random": {"vocab_size": 5},
    "copy": {"vocab_size": 3, "period": 4},
    "markov": {"vocab_size": 3, "order": 2, "alpha": 0.5},
    "gssm": {"nodes": NODES},
}


def made(*kinds: str, **changed: Any) -> DataArgs:
    """The config of sources of these types, in short rows."""
    sources = [{"type": kind, "documents": 300, **KINDS[kind]} for kind in kinds]
    plain: dict[str, Any] = {"seq_len": 7, "batch_size": 2, "load_async": False, "tokenizer": {"name": "none"}}
    return DataArgs.model_validate({"sources": sources, **plain, **changed})


def process(kind: str, seed: int = 3, **changed: Any) -> Process[Any]:
    return build_part(parts("source")[kind].model_validate({**KINDS[kind], **changed}), seed)


# -- the promises of all sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("gssm",), ("markov", "random"), ("random", "copy", "gssm")], ids="+".join)
def test_one_order_over_ranks_workers_and_restarts(kinds: tuple[str, ...]) -> None:
    expected, last = run_steps(made(*kinds), 4)
    for dp in (2, 3):
        assert run_steps(made(*kinds), 4, dp=dp) == (expected, last)
    parallel = {"load_async": True, "num_workers": 2} if len(kinds) == 3 else {}
    first, state = run_steps(made(*kinds, batch_size=1), 1, dp=8)
    second, state = run_steps(made(*kinds, **parallel), 3, state=state)
    assert (first | second, state) == (expected, last)


@pytest.mark.parametrize("changed", [{"n_views": 3}, {"shuffle_window": 3, "skip_rows": [[4, 6]]}, {"doc_mask": True}])
def test_resumes_everywhere(changed: dict[str, Any]) -> None:
    assert_loader_resumes(made("gssm", "copy", lanes=6, **changed), 8, tail=6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_made_without_those_before_it(kind: str) -> None:
    one, n_ids = process(kind), made(kind).tokenizer.vocab_size
    together = one.documents(90, 40, 12)
    assert [one.documents(90 + i, 1, 12)[0].tolist() for i in range(40)] == together.tolist()
    assert n_ids is not None
    assert set(np.unique(together)) == set(range(n_ids))
    assert not np.array_equal(process(kind, seed=4).documents(90, 40, 12), together)


def test_a_row_is_a_document_to_its_last_label_and_an_epoch_has_each_once() -> None:
    args = made(sources=[{"type": "markov", "documents": 256, **KINDS["markov"]}], lanes=4)
    table, _ = run_steps(args, 32, n_rows=8)
    documents = process("markov", seed=args.order_seed).documents(0, 256, 8)
    assert sorted(table.values()) == sorted(documents.tolist())


def test_sources_without_a_seed_of_their_own_share_no_random_numbers() -> None:
    one, other = {"type": "random", "vocab_size": 5}, {"type": "random", "vocab_size": 5, "name": "zebra"}
    (alone,), (first, second) = made(sources=[one]).read_sources(), made(sources=[other, one]).read_sources()
    assert isinstance(first, SyntheticArgs)
    assert isinstance(second, SyntheticArgs)
    assert first == alone
    assert first.seed == DataArgs().order_seed != second.seed


def test_audit_and_rows_know_where_documents_come_from() -> None:
    args = made("gssm", "copy", lanes=4)
    (_, middle), (_, end) = run_steps(args, 2, n_rows=12), run_steps(args, 5, n_rows=12)
    found = audit(args, 4, 12, {2: middle, 5: end})
    assert (found.problems, found.pieces, found.tokens_checked) == ([], 60, True)
    end["lanes"]["1"]["hash"] = f"{1:016x}"
    assert "lane 1" in audit(args, 4, 12, {2: middle, 5: end}).problems[0]
    row, (origin,) = next(iter(rows_of_step(args, 4, 12, {2: middle}, 4)))
    seeds = {source.name: source.seed for source in args.read_sources() if isinstance(source, SyntheticArgs)}
    document = process(origin.source, seed=seeds[origin.source] or 0).documents(origin.offset, 1, 8)[0]
    assert (row, origin.unit, origin.text.split()) == (36, "document", [str(i) for i in document[:7]])


def test_held_out_documents_are_rows_that_training_never_reads() -> None:
    args = made("copy")
    (text,), without = texts_beside_sources(args)
    tokenizer = build_tokenizer(args.tokenizer)
    found = packed(text, Wording(tokenizer, False, False), max_rows=3, seq_len=7, row_step=args.row_step)
    expected = process("copy", seed=args.order_seed).documents(HELD_OUT_FROM, 3, 8)
    assert ([list(row.ids) for row in found.rows], without) == (expected.tolist(), [])
    assert found.n_bytes == 3 * 7  # so bits per byte are bits per token
    assert tokenizer.encode(tokenizer.decode(expected[0]), False, False).tolist() == expected[0].tolist()


def test_another_graph_or_seed_is_not_the_source_that_a_run_began_with() -> None:
    _, state = run_steps(made("gssm"), 1)
    for other in ({"alpha": 0.4}, {"parents": ["A"]}):
        sources = [{"type": "gssm", "documents": 300, "nodes": [{**NODES[0], **other}, *NODES[1:]]}]
        with pytest.raises(ValueError, match="fingerprint was"):
            build_loader(made(sources=sources), rows_per_step=G, state=state)


# -- floors --------------------------------------------------------------------------------------------------------


def label_entropy(probability: dict[tuple[int, ...], float]) -> float:
    """Entropy of documents given their first tokens, by the definition."""
    assert sum(probability.values()) == pytest.approx(1, abs=1e-12)
    of_first: dict[int, float] = {}
    for document, p in probability.items():
        of_first[document[0]] = of_first.get(document[0], 0) + p
    return -sum(p * math.log(p / of_first[document[0]]) for document, p in probability.items() if p)


def enumerated(kind: str, one: Process[Any], length: int) -> dict[tuple[int, ...], float]:
    """The probability of every document."""
    found: dict[tuple[int, ...], float] = {}
    if kind == "copy":
        for once in itertools.product(range(3), repeat=4):
            document = tuple(once[t % 4] for t in range(length))
            found[document] = found.get(document, 0) + 3.0**-4
        return found
    table = getattr(one, "table", np.full((1, 5), 0.2))
    for document in itertools.product(range(table.shape[-1]), repeat=length):
        past = [0, 0, *document]
        contexts = [past[t] * 3 + past[t + 1] if kind == "markov" else 0 for t in range(length)]
        found[document] = math.prod(table[c, x] for c, x in zip(contexts, document, strict=True))
    return found


@pytest.mark.parametrize(("kind", "n_labels"), [("random", 3), ("copy", 2), ("copy", 5), ("markov", 1), ("markov", 5)])
def test_the_floor_is_the_entropy_of_the_labels(kind: str, n_labels: int) -> None:
    one = process(kind)
    exact = label_entropy(enumerated(kind, one, n_labels + 1)) / n_labels
    assert one.floor(n_labels).nats == pytest.approx(exact, abs=1e-9)
    assert one.floor(n_labels).error == 0


GRAPHS: dict[str, list[dict[str, Any]]] = {
    "two parents": NODES,
    "context": [NODES[0], {**NODES[1], "mode": "context", "kernel_type": "product"}, {**NODES[2], "mode": "dead"}],
    "unseen": [{**NODES[0], "parents": ["A"], "mode": "context"}, {**NODES[1], "parents": ["X"]}, NODES[2]],
    "alone": [{**NODES[0], "parents": []}],
}


def by_paths(one: Gssm, first: int, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every document with the tables of one: summed over all paths of all states."""
    tables = {n.name: t[0] if n.mode == "context" else t for n, t in zip(one.nodes, _in_order(one, first), strict=True)}
    sizes = [range(node.state_dim) for node in one.nodes]
    paths = {(tuple(0 for _ in sizes), (0,)): 1.0}
    for _ in range(1, length):
        after: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for (states, document), p in paths.items():
            for new in itertools.product(*sizes):
                now, q = dict(zip(tables, new, strict=True)), p
                old = dict(zip(tables, states, strict=True))
                for node in one.nodes:
                    own = [] if node.observed else [old[node.name]]
                    q *= tables[node.name][(*own, *(now[name] for name in node.parents), now[node.name])]
                key = (new, (*document, now[one.args.observed.name]))
                after[key] = after.get(key, 0) + q
        paths = after
    found: dict[tuple[int, ...], float] = {}
    for (_, document), p in paths.items():
        found[document] = found.get(document, 0) + p
    return found


def _in_order(one: Gssm, first: int) -> list[np.ndarray]:
    return [one.tables([first])[node.name] for node in one.nodes]


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_likelihood_of_a_graph_is_the_sum_over_all_paths(graph: str) -> None:
    one = process("gssm", nodes=GRAPHS[graph])
    assert isinstance(one, Gssm)
    exact, expected = by_paths(one, 11, 4), 0.0
    for document, p in exact.items():
        nll, entropies = one.likelihood([11], np.array([document]))
        assert math.exp(-nll.sum()) == pytest.approx(p, abs=1e-12)
        expected += p * float(entropies.sum())
    assert expected == pytest.approx(label_entropy(exact), abs=1e-9)


def test_the_floor_of_a_graph_is_a_mean_with_an_honest_error() -> None:
    one = process("gssm")
    assert isinstance(one, Gssm)
    exact, floor = label_entropy(by_paths(one, 0, 5)) / 4, one.floor(4)
    assert 0 < floor.error < 0.02
    assert abs(floor.nats - exact) < 4 * floor.error


@pytest.mark.soak
def test_the_floor_of_a_context_lies_between_two_bounds() -> None:
    one = process("gssm", nodes=GRAPHS["context"])
    assert isinstance(one, Gssm)
    numbers = range(1000)  # whose tables stand for all
    documents = [(0, *labels) for labels in itertools.product(range(3), repeat=3)]
    p = [float(np.exp(-one.likelihood(numbers, np.array([d] * 1000))[0].sum(-1)).mean()) for d in documents]
    exact, floor = label_entropy(dict(zip(documents, p, strict=True))) / 3, one.floor(3)
    assert floor.most is not None
    assert floor.nats - 3 * floor.error < exact < floor.most + 3 * floor.error
    assert 0 < floor.most - floor.nats < 0.1
    assert Floor._make(floor) == floor
    assert str(floor).endswith(f" (at most {floor.most:.4f})")


def test_a_mixture_has_the_floor_of_a_model_that_knows_the_source() -> None:
    args = made("random", "copy")
    floor = loss_floor(args)
    assert floor is not None
    assert floor.nats == pytest.approx((math.log(5) + 3 * math.log(3) / 7) / 2)
    assert loss_floor(DataArgs()) is None


# -- graphs and configs --------------------------------------------------------------------------------------------


def test_slow_nodes_stay_and_dead_ones_fall_to_state_0() -> None:
    nodes = [{"name": "X", "state_dim": 4, "alpha": 0.1, "parents": ["S", "D"], "observed": True}]
    nodes += [{"name": "S", "state_dim": 4, "alpha": 0.1, "mode": "slow"}]
    nodes += [{"name": "D", "state_dim": 4, "alpha": 0.1, "parents": ["S"], "mode": "dead"}]
    one = process("gssm", nodes=nodes)
    assert isinstance(one, Gssm)
    tables = one.tables([0])
    assert tables["S"].argmax(-1).tolist() == [0, 1, 2, 3]
    assert not tables["D"].argmax(-1).any()
    assert np.allclose(tables["X"].sum(-1), 1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ([{"parents": ["A", "C"]}], "parent C of X is not a node"),
        ([{}, {"name": "A"}], "two nodes are called A"),
        ([{"observed": False}], "one node must have observed: true, and none has"),
        ([{}, {"observed": True}], "and X, B has"),
        ([{}, {}, {"mode": "default", "parents": ["B"]}], "the parents of X, B, A lead in a circle"),
        ([{"mode": "slow"}], "X is observed, so its mode cannot be slow"),
        ([{"mode": "dead"}], "X is observed, so its mode cannot be dead"),
        ([{}, {"mode": "slow"}], "B is slow, so it can have no parents"),
        ([{"parents": ["A", "A"]}], "X names a parent twice"),
        ([{}, {"state_dim": 5000}], "the table of B has"),
        ([{}, {"state_dim": 600}, {"state_dim": 10}], "more than 4,096"),
    ],
)
def test_a_graph_is_refused_with_one_sentence(changes: list[dict[str, Any]], complaint: str) -> None:
    nodes = [{**node, **change} for node, change in itertools.zip_longest(NODES, changes, fillvalue={})]
    with pytest.raises(ValidationError, match=complaint) as caught:
        GssmArgs.model_validate({"nodes": nodes})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"tokenizer": {"name": "bytes"}}, "copy makes token ids, and tokenizer.name is bytes"),
        ({"tokenizer": {"name": "none", "vocab_size": 2}}, "vocab_size is 2, but sources make 3 ids"),
        ({"sources": []}, "no source says how many ids there are"),
        ({"tokenizer": {"name": "bytes", "vocab_size": 300}}, "bytes has its own, drop it"),
        ({"loss_on": "completion"}, "loss_on: completion needs text"),
        ({"sources": [{"type": "markov", "vocab_size": 300, "order": 2}]}, "more than 4,194,304 entries"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        made("copy", **changed)


def test_every_kind_is_registered_and_tested() -> None:
    assert {name: issubclass(part, SyntheticArgs) for name, part in parts("source").items()} == dict.fromkeys(
        KINDS, True
    )


def test_what_is_made_needs_no_copy(tmp_path: Path) -> None:
    args = made("copy", stage_to=str(tmp_path))
    with staged(args) as there:
        assert there.read_sources() == args.read_sources()


# -- files ---------------------------------------------------------------------------------------------------------


def generated(args: DataArgs, out: Path, **more: Any) -> dict[str, Any]:
    return generate(args, out, None, 1, Progress(bar=False), **more)


@pytest.mark.parametrize("kinds", [("gssm",), ("markov", "copy")], ids="+".join)
def test_generated_files_give_the_rows_and_states_of_their_source(
    tmp_path: Path, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingua.data.synthetic.FILE_DOCUMENTS", 128)
    monkeypatch.setattr("lingua.data.gssm._AVERAGED_TOKENS", 64)
    args = made(*kinds)
    facts = generated(args, tmp_path)
    files = made(sources=facts["data.sources"], tokenizer=facts["data.tokenizer"])
    expected, last = run_steps(args, 12)
    assert run_steps(files, 12, dp=3) == (expected, last)
    first, state = run_steps(files, 5)  # and a run may change between the two
    second, state = run_steps(args, 7, state=state)
    assert (first | second, state) == (expected, last)
    assert loss_floor(files) == loss_floor(args)
    with pytest.raises(ValueError, match=r"set data\.seq_len: 7"):
        loss_floor(made(sources=facts["data.sources"], tokenizer=facts["data.tokenizer"], seq_len=6))


def test_generating_goes_on_after_a_kill_and_writes_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.data.synthetic.FILE_DOCUMENTS", 128)
    args, folder = made("copy"), tmp_path / "copy"
    generated(args, tmp_path)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [name for name in sorted(whole) if name != "manifest.json"] == [
        f"copy.chunk.000{i}.tokens" for i in range(3)
    ]
    (folder / "copy.chunk.0001.tokens").unlink()
    assert generated(args, tmp_path)["files_there_already"] == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert generated(args, tmp_path, jsonl=True)["files_made"] == 3
    assert check_manifest(folder, hashes=True) == []
    lines = made(sources=[{"path": str(folder)}], tokenizer={"name": "none", "vocab_size": 3}, lanes=4)
    table, _ = run_steps(lines, 4, n_rows=8)
    documents = process("copy", seed=args.order_seed).documents(0, 300, 8).tolist()
    assert all(row in documents for row in table.values())
    other = made("copy", seed=5)
    assert generated(other, tmp_path)["files_made"] == 3
    assert not list(folder.glob("*.jsonl"))
    with pytest.raises(ValueError, match="belongs to no file of source copy"):
        generate(args, tmp_path, 100, 1, Progress(bar=False))
    with pytest.raises(ValueError, match="has no end; say --documents N"):
        generated(made(sources=[{"type": "random", "vocab_size": 3}]), tmp_path)
