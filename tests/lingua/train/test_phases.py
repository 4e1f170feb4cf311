"""Phases: what a config resolves to, what is refused, and one order of rows across every switch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from apps.main.args import TrainArgs
from lingua.config.base import ConfigError
from lingua.config.frozen import freeze
from lingua.config.keys.phases import read_until
from lingua.data.audit import audit_parts, part_of_step, rows_of_step
from lingua.data.loader import build_loader, merge_states, rows_ahead
from lingua.optim.schedule import lr_at
from lingua.tokenizer import ByteTokenizer
from lingua.train.check import phases_of, study
from lingua.train.phases import frozen_phases, number_at, parts_in, switch_at
from lingua.train.sizes import Phase
from tests.corpora import documents, two_sources, write_source

G = 12  # shared by 1, 2 and 3 ranks


def args(*phases: dict[str, Any], **changes: Any) -> TrainArgs:
    tree = {
        "steps": 100,
        "model": {"dim": 64, "n_layers": 2, "n_heads": 4},
        "optim": {"warmup": 10},
        "global_batch_size": G,
        "data": {"batch_size": 1, "seq_len": 32, "load_async": False, **changes.pop("data", {})},
    }
    return TrainArgs.model_validate({**tree, **changes, "phases": list(phases)})


# -- until ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("900", (900, "steps", False)),
        ("+2000 steps", (2000, "steps", True)),
        ("2B tokens", (2e9, "tokens", False)),
        ("+1.5M tokens", (1.5e6, "tokens", True)),
        ("90%", (90, "%", False)),
        ("1 step", (1, "steps", False)),
    ],
)
def test_an_end_is_steps_tokens_or_a_share(text: str, until: tuple[float, str, bool]) -> None:
    assert tuple(read_until(text)) == until


def test_phases_follow_each_other_at_exact_steps_rows_and_tokens() -> None:
    phases = phases_of(
        args(
            {"name": "main", "until": "90%"},
            {"name": "anneal", "until": "100%", "optim.scheduler": "linear_to_zero"},
            {"name": "long", "until": "+20 steps", "data.seq_len": 64, "global_batch_tokens": 384},
            {"name": "more", "until": f"{100 * G * 32 + 40 * 384} tokens", "optim": {"lr": 1e-5}, "schedule": "phase"},
        ),
        3,
    )
    assert [(p.first, p.last, p.rows_before, p.tokens_before, p.span) for p in phases] == [
        (0, 90, 0, 0, None),
        (90, 100, 90 * G, 90 * G * 32, (90, 100)),
        (100, 120, 100 * G, 100 * G * 32, None),
        (120, 140, 100 * G + 20 * 6, 100 * G * 32 + 20 * 384, (120, 140)),
    ]
    assert [(p.size.rows_per_step, p.size.seq_len, p.size.max_seqlen, p.size.n_steps) for p in phases] == [
        (12, 32, 1024, 140),
        (12, 32, 1024, 140),
        (6, 64, 1024, 140),
        (12, 32, 1024, 140),
    ]
    assert [p.args.optim.warmup for p in phases] == [10, 0, 10, 0]
    assert lr_at(phases[1].args.optim, 5, 10) == pytest.approx(0.5 * 3e-4)


def test_a_frozen_config_means_the_same_phases_on_other_ranks() -> None:
    own = args(
        {"name": "a", "until": "50%", "data.batch_size": 2},
        {"name": "b", "until": "+70 steps", "data.sources": {"web": 1}, "data.root_dir": "/nowhere", "fresh": True},
        global_batch_size=None,
        data={"root_dir": "/nowhere", "sources": {"old": 1}},
    )
    first = phases_of(own, 6)
    assert [p.size.rows_per_step for p in first] == [12, 6]
    frozen = freeze(own, first[0].size.frozen() | frozen_phases(first))
    again = TrainArgs.model_validate(frozen)
    second = phases_of(again, 3, frozen)
    facts = [(p.name, p.first, p.last, p.size.rows_per_step, p.size.lanes, p.fresh) for p in first]
    assert [(p.name, p.first, p.last, p.size.rows_per_step, p.size.lanes, p.fresh) for p in second] == facts
    assert freeze(again, second[0].size.frozen() | frozen_phases(second)) == frozen
    assert frozen["checkpoint"]["steps"] == [50, 120]


def test_a_run_without_phases_is_one() -> None:
    (phase,) = phases_of(args(), 1)
    assert (phase.first, phase.last, phase.name, phase.span) == (0, 100, "", None)
    assert frozen_phases([phase]) == {}


MAIN = {"name": "main", "until": "90%"}


@pytest.mark.parametrize(
    ("phases", "changes", "refusal"),
    [
        ([{**MAIN, "model.dim": 8}], {}, r"phases\[0\] \(main\): model.dim cannot change within a run; a phase may"),
        ([{**MAIN, "data.seq_length": 8}], {}, "unknown key data.seq_length; did you mean data.seq_len"),
        ([{**MAIN, "optim.lr": -1}], {}, r"phases\[0\] \(main\): optim.lr is -1; it must be more than 0"),
        ([MAIN, {**MAIN, "until": "100%"}], {}, "an earlier phase has this name"),
        ([MAIN, {"name": "b", "until": 80}], {}, "until is 80, that is step 80, but it begins after step 90"),
        ([MAIN], {}, "the last phase ends at step 90, but the run has 100 steps"),
        ([MAIN, {"name": "b", "until": 100, "data.batch_size": 7}], {}, r"\(b\): global_batch_size is 12, no multiple"),
        ([MAIN, {"name": "b", "until": 100, "fresh": ["web"]}], {}, "fresh names web, which is no source"),
        (
            [MAIN, {"name": "b", "until": 100, "data.seq_len": 8}],
            {"data": {"shuffle_window": 3}},
            "shuffle_window is 3",
        ),
        (
            [MAIN, {"name": "b", "until": 100, "data.sources": [{"path": "/b", "name": "x"}]}],
            {"data": {"sources": [{"path": "/a", "name": "x"}]}},
            "source x is not the files that an earlier phase calls so",
        ),
        ([MAIN, {"name": "b", "until": 100, "global_batch_tokens": 33}], {}, "is 33, no multiple of data.seq_len 32"),
        ([{**MAIN, "eval.poll_s": 1}], {"eval": {}}, "eval.poll_s cannot change within a run"),
        ([{**MAIN, "eval.validation": {"max_steps": 1}}], {}, "the config itself has no section eval; write one there"),
        ([{**MAIN, "eval.validation": None}], {"eval": {}}, "phase main: eval: nothing is measured; set eval.valid"),
    ],
)
def test_what_cannot_be_is_refused_by_phase_and_key(
    phases: list[dict[str, Any]], changes: dict[str, Any], refusal: str
) -> None:
    with pytest.raises(ConfigError, match=refusal):
        phases_of(args(*phases, **changes), 1)


ANNEAL = {"name": "anneal", "until": "100%", "optim.scheduler": "linear_to_zero"}
LONG = {"name": "long", "until": "+20 steps"}


@pytest.mark.parametrize(
    ("phases", "jump"),
    [
        ([MAIN, ANNEAL], None),
        ([MAIN, ANNEAL, LONG], "phase long: the learning rate goes from 3e-05 in step 100 to 0.0003; if that is not"),
        ([MAIN, ANNEAL, {**LONG, "schedule": "phase", "optim.warmup": 2}], None),
        ([MAIN, {"name": "low", "until": 100, "optim.lr": 1e-4}], "phase low: the learning rate goes from 0.0003 in"),
        ([MAIN, {"name": "low", "until": 100, "optim.lr": 2e-4}], None),
    ],
)
def test_a_learning_rate_that_jumps_between_phases_is_warned_of(phases: list[dict[str, Any]], jump: str | None) -> None:
    found = study(args(*phases, optim={"warmup": 10, "scheduler": "constant"}), 1)
    assert found.errors == []
    warned = [text for key, text in found.warnings if key == "phases"]
    assert [text[: len(jump or "")] for text in warned] == ([jump] if jump else [])


def test_each_phase_says_what_is_evaluated() -> None:
    more = {"name": "more", "until": "100%", "eval.harness": {"tasks": ["x"]}, "eval.validation.max_steps": 9}
    phases = phases_of(args(MAIN, more, eval={"harness": None, "validation": {"max_steps": 5}}), 1)
    sections = [phase.args.eval for phase in phases]
    assert [each.validation.max_steps for each in sections if each and each.validation] == [5, 9]
    assert [[one.type for one in each.chosen()] for each in sections if each] == [["held_out"], ["held_out", "harness"]]


# -- the order of rows ---------------------------------------------------------------------------------------------

Row = tuple[int, tuple[int, ...]]


def drive(
    phases: list[Phase], begin: int, end: int, state: dict[str, Any] | None, dp: int = 1, **fed: Any
) -> tuple[list[list[Row]], dict[str, Any] | None]:
    """Rows of the updates begin + 1 .. end by step, as `enter_next` and a resume read them; and the merged state."""
    steps: list[list[Row]] = []
    while begin < end:
        phase = phases[number_at(phases, begin)]
        stop, switch = min(end, phase.last), switch_at(phases, begin)
        data = phase.args.data.model_copy(update=fed)
        by_rank, states = [], []
        for rank in range(dp):
            one = {"rows_per_step": phase.size.rows_per_step, "lanes": phase.size.lanes, "switch": switch}
            with build_loader(data, dp_rank=rank, dp_size=dp, state=state, **one) as loader:
                taken = [
                    next(loader) for _ in range((stop - begin) * phase.size.rows_per_step // dp // data.batch_size)
                ]
                states.append(json.loads(json.dumps(loader.state_dict())))
            by_rank.append(
                [
                    (int(n), (*batch.views[0, i].tolist(), int(batch.views[-1, i, -1])))
                    for batch in taken
                    for i, n in enumerate(batch.rows)
                ]
            )
        rows = [row for turn in zip(*by_rank, strict=True) for row in turn]
        size = phase.size.rows_per_step
        steps += [rows[i * size : (i + 1) * size] for i in range(stop - begin)]
        state, begin = merge_states(states), stop
    return steps, state


@pytest.fixture
def three(tmp_path: Path) -> list[Phase]:
    """Three phases: big and small; small and new, with longer rows; big again with other weights, and small anew."""
    two_sources(tmp_path)
    write_source(tmp_path, "new", documents("n", 40), n_files=2)
    own = args(
        {"name": "main", "until": 5},
        {"name": "anneal", "until": 8, "data.sources": {"small": 1, "new": 3}, "data.seq_len": 24},
        {
            "name": "long",
            "until": 12,
            "data.sources": {"big": 1, "small": 2},
            "fresh": ["small"],
            "global_batch_size": 6,
        },
        steps=12,
        data={
            "root_dir": str(tmp_path),
            "sources": {"big": 3, "small": 1},
            "seq_len": 16,
            "lanes": 12,
            "skip_rows": [[30, 31], [58, 63]],  # some of them at the first switch
        },
    )
    return phases_of(own, 1)


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("kills", [[4], [5], [6], [8], [5, 8], [3, 7, 9], list(range(1, 12))])
def test_rows_are_the_undisturbed_ones_however_a_run_is_killed_and_spread(
    three: list[Phase], dp: int, kills: list[int]
) -> None:
    expected, last = drive(three, 0, 12, None)
    assert [len(rows) for rows in expected] == 8 * [12] + 4 * [6]
    table, state, begin = [], None, 0
    for turn, stop in enumerate([*kills, 12]):
        part, state = drive(three, begin, stop, state, (dp + turn) % 3 + 1)
        table, begin = table + part, stop
    assert table == expected
    assert state == last


@pytest.mark.parametrize("begin", [3, 7])
def test_which_rows_come_after_a_switch_is_known_before_it(three: list[Phase], begin: int) -> None:
    """So a rewind from a later phase finds the rows of the step that went wrong from any checkpoint before."""
    expected, _ = drive(three, 0, 12, None)
    _, state = drive(three, 0, begin, None)
    for step in (8, 9, 12):
        phase = three[number_at(three, step - 1)]
        first = phase.row_shift + (step - 1) * phase.size.rows_per_step
        turns = range(first, first + phase.size.rows_per_step)
        assert state is not None
        assert list(rows_ahead(state, phase.args.data.skip_rows, turns)) == [n for n, _ in expected[step - 1]]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_workers_that_read_ahead_of_a_switch_change_nothing(three: list[Phase], workers: int) -> None:
    fed = {"load_async": True, "num_workers": workers, "prefetch_size": 9, "batch_size": 3}
    assert drive(three, 0, 12, None, 2, **fed) == drive(three, 0, 12, None)


def test_before_the_first_switch_the_order_is_that_of_a_run_without_phases(three: list[Phase]) -> None:
    data = three[0].args.data
    alone = phases_of(args(steps=12, data={**data.model_dump(mode="json"), "resting": []}), 1)
    assert drive(three, 0, 5, None) == drive(alone, 0, 5, None)


def test_a_switch_leaves_out_no_token_and_repeats_none(tmp_path: Path) -> None:
    """A lane's tokens across changes of weights and row lengths are whole documents, each once."""
    for name in ("a", "b"):
        write_source(tmp_path, name, documents(name, 300, longest=60))
    own = args(
        {"name": "one", "until": 4},
        {"name": "two", "until": 7, "data.sources": {"b": 1}, "data.seq_len": 40},
        {"name": "three", "until": 12, "data.seq_len": 7},
        steps=12,
        data={"root_dir": str(tmp_path), "sources": {"a": 1, "b": 1}, "seq_len": 16, "lanes": 12},
    )
    steps, _ = drive(phases_of(own, 1), 0, 12, None)
    found: list[str] = []
    for lane in range(12):
        tokens = [token for rows in steps for number, row in rows if number % 12 == lane for token in row[:-1]]
        borders = [i for i, token in enumerate(tokens) if token >= 256]
        found += [bytes(tokens[i + 1 : j]).decode() for i, j in itertools.pairwise(borders) if j > i + 1]
    assert set(found) <= {*documents("a", 300, longest=60), *documents("b", 300, longest=60)}
    assert len(found) == len(set(found)) > 100


def test_audit_follows_switches_and_rows_are_found_again(three: list[Phase]) -> None:
    expected, _ = drive(three, 0, 12, None)
    states: dict[int, Any] = {}
    for begin, step in itertools.pairwise((0, 3, 5, 6, 8, 10, 12)):
        _, states[step] = drive(three, begin, step, states.get(begin), 3)
    own = three[0].args.model_copy(update={"phases": [phase.written for phase in three]})
    own.data = own.data.model_copy(update={"resting": []})
    parts = parts_in(own, {"data": {"lanes": 12}, "global_batch_size": 12}, 0)
    found = audit_parts(parts, 12, states)
    assert (found.problems, found.notes, found.checkpoints) == ([], [], [3, 5, 6, 8, 10, 12])
    for step in (3, 6, 7, 9, 12):
        part = part_of_step(parts, step)
        how: dict[str, Any] = {"first_row": part.first_row, "border": part.first, "switch": part.switch}
        again = rows_of_step(part.args, 12, part.rows_per_step, part.states(states), step, **how)
        texts = {n: "".join(origin.text for origin in origins) for n, origins in again}
        assert texts == {n: ByteTokenizer().decode(list(row[:-1])) for n, row in expected[step - 1]}
    states[9] = states[10] | {
        "lanes": {k: {**lane, "pick": lane["pick"] + 1} for k, lane in states[10]["lanes"].items()}
    }
    assert audit_parts(parts, 12, states).problems[0].startswith("phase long: step 9: 108 rows were used, 9 steps of 6")
    del states[9], states[8]
    assert audit_parts(parts, 12, states).notes == [
        "phase long: checkpoint 8, where it begins, is gone; what came before step 10 is not confirmed"
    ]
