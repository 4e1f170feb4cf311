"""A run that goes back past a bad step is the run that never met its rows, whatever kills it on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

import apps.main.loop
from apps.cli.data import read_run
from lingua.checkpoint.manager import CheckpointManager
from lingua.data.audit import audit_parts
from lingua.run.metrics import read_metrics
from lingua.train.learner import Learner, MicroBatch
from tests.corpora import two_sources
from tests.trainer import TINY, Hook, at_step, fingerprint, kill_self, published, train

SPIKE = ["optim.on_spike.action=rewind", "optim.on_spike.window=3", "optim.on_spike.threshold=50"]
WORDS = [*TINY, *SPIKE, "steps=12", "checkpoint.dump.every=3", "checkpoint.dump.keep=-1"]
BAD_ROW = 15
"""Used by step 8."""


def bad(*rows: int, factor: float = 10.0, then: Hook | None = None) -> Hook:
    """Hook: the loss of these rows is far too large."""

    def hook(rank: int) -> None:
        losses_of = Learner.losses_of

        def spoiled(self: Learner, batch: MicroBatch) -> tuple[object, object]:
            loss, n_labels = losses_of(self, batch)
            return loss * (factor if set(rows) & set(batch.rows.tolist()) else 1.0), n_labels

        setattr(Learner, "losses_of", spoiled)  # noqa: B010
        if then is not None:
            then(rank)

    return hook


def killed_in_rewind(*, loaded: bool) -> Hook:
    """Hook: die in a rewind, before the checkpoint is loaded or right after."""

    def hook(rank: int) -> None:
        rewind = CheckpointManager.rewind

        def dying(self: CheckpointManager, *args: object) -> object:
            if loaded:
                rewind(self, *args)  # pyright: ignore[reportArgumentType]
            kill_self()
            return None

        setattr(CheckpointManager, "rewind", dying)  # noqa: B010

    return hook


def killed_after_rewind(rank: int) -> None:
    """Die right after a rewind."""
    setattr(apps.main.loop, "rewind", lambda run, asked, _real=apps.main.loop.rewind: (_real(run, asked), kill_self()))  # noqa: B010


def state_of(run_dir: Path, step: int) -> dict[str, object]:
    return orjson.loads((run_dir / "checkpoints" / f"{step:010d}" / "train_state.00000.json").read_bytes())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    result = train([*WORDS, f"dump_dir={run_dir}"], hook=bad(BAD_ROW))
    assert result.exit_code == 0, result.output
    assert "Back to step 6; rows [[14, 15]] are passed over" in result.output
    return run_dir


@pytest.mark.soak
@pytest.mark.gate
def test_a_run_that_went_back_is_the_one_that_never_met_the_rows(undisturbed: Path, tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "data.skip_rows=[[14,15]]"]
    assert train(words, hook=bad(BAD_ROW)).exit_code == 0
    there, here = fingerprint(undisturbed, 12), fingerprint(tmp_path, 12)
    assert {n: f for n, f in there.items() if "distcp" in n} == {n: f for n, f in here.items() if "distcp" in n}
    mine, theirs = state_of(undisturbed, 12), state_of(tmp_path, 12)
    assert mine["per_rank"] == theirs["per_rank"]
    assert mine["rng"] == theirs["rng"]
    shared = mine["shared"]
    assert isinstance(shared, dict)
    [passed] = shared["passed_over"]
    assert (passed["step"], passed["rows"]) == (8, [[14, 15]])
    notes = [r for r in read_metrics(undisturbed / "metrics.checkpoint.jsonl") if r["event"] == "rewind"]
    assert [(note["global_step"], note["wrong_step"], note["rows"]) for note in notes] == [(6, 8, [[14, 15]])]
    assert read_metrics(undisturbed / "metrics.jsonl")[-1]["optim/rewinds"] == 1


@pytest.mark.soak
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(at_step(7, kill_self), id="before the spike"),
        pytest.param(killed_in_rewind(loaded=False), id="before the load"),
        pytest.param(killed_in_rewind(loaded=True), id="after the load"),
        pytest.param(killed_after_rewind, id="after the rewind"),
        pytest.param(at_step(10, kill_self), id="after the next checkpoint"),
    ],
)
def test_a_kill_during_a_rewind_changes_nothing(undisturbed: Path, tmp_path: Path, kill: Hook):
    words = [*WORDS, f"dump_dir={tmp_path}"]
    assert train(words, hook=bad(BAD_ROW, then=kill)).exit_codes == [-9]
    result = train(words, hook=bad(BAD_ROW))
    assert result.exit_code == 0, result.output
    assert published(tmp_path) == published(undisturbed)
    for step in published(tmp_path):
        assert fingerprint(tmp_path, step) == fingerprint(undisturbed, step)


@pytest.mark.soak
def test_two_ranks_with_saves_in_memory_go_back_together(undisturbed: Path, tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "data.batch_size=1", f"checkpoint.shm_path={tmp_path}"]
    result = train([*words, "checkpoint.async_save_mode=shm"], n_ranks=2, hook=bad(BAD_ROW))
    assert result.exit_code == 0, result.output
    for step in (9, 12):
        mine, theirs = (state_of(run_dir, step)["shared"] for run_dir in (tmp_path, undisturbed))
        assert isinstance(mine, dict)
        assert isinstance(theirs, dict)
        assert [one["rows"] for one in mine["passed_over"]] == [one["rows"] for one in theirs["passed_over"]]


@pytest.mark.soak
def test_a_run_that_goes_back_too_often_stops_and_tells(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "optim.rewind.limit=1"]
    result = train(words, hook=bad(BAD_ROW, 17))
    assert result.exit_code == 1
    assert "step 9 (rows 16 to 17)" in result.output
    assert "limit is 1 within 1000 steps, and the run went back from step 8 (rows 14 to 15)" in result.output
    assert "Traceback" not in result.output
    stop = orjson.loads((tmp_path / "stop.json").read_bytes())
    assert stop["kind"] == "nan"
    more = [*WORDS, f"dump_dir={tmp_path}", "optim.rewind.steps=2"]
    assert train(more, hook=bad(BAD_ROW, 17)).exit_code == 0
    assert [one["rows"] for one in state_of(tmp_path, 12)["shared"]["passed_over"]] == [[[14, 17]]]  # pyright: ignore


@pytest.mark.soak
def test_a_loss_that_is_no_number_is_gone_back_from(tmp_path: Path):
    words = [*TINY, "steps=8", "checkpoint.dump.every=2", "optim.on_nonfinite=rewind", f"dump_dir={tmp_path}"]
    result = train(words, hook=bad(9, factor=float("nan")))
    assert result.exit_code == 0, result.output
    assert "Back to step 4; rows [[8, 9]] are passed over" in result.output
    assert published(tmp_path) == [6, 8]


PHASES = (
    "[{name: main, until: 4}, {name: anneal, until: 8, data.sources: {big: 1, small: 4}, data.seq_len: 16,"
    " optim.scheduler: linear_to_zero, loss.z_loss: 1e-4}]"
)


def without_checkpoint_4(then: Hook | None = None) -> Hook:
    """Hook: the checkpoint at which the first phase ends could not be saved; row 8, of step 5, is bad."""

    def hook(rank: int) -> None:
        is_due = CheckpointManager.is_due
        setattr(CheckpointManager, "is_due", lambda self, step: step != 4 and is_due(self, step))  # noqa: B010
        bad(8, factor=float("nan"), then=then)(rank)

    return hook


def with_checkpoint_4(then: Hook | None = None) -> Hook:
    return bad(8, factor=float("nan"), then=then)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("begun", "back_to"), [(without_checkpoint_4, "2 (phase main)"), (with_checkpoint_4, "4 (phase anneal)")]
)
def test_a_run_goes_back_to_the_phase_before(tmp_path: Path, begun: Callable[[Hook | None], Hook], back_to: str):
    """The first step of a phase goes wrong: what follows is the run that never met its rows, whatever kills it."""
    corpus = two_sources(tmp_path / "corpus")
    data = [f"data.root_dir={corpus}", "data.sources={big: 1}", f"data.stage_to={tmp_path / 'fast'}"]
    words = [*TINY, *data, "steps=8", "checkpoint.dump.every=2", "checkpoint.dump.keep=-1", f"phases={PHASES}"]
    there, here = tmp_path / "there", tmp_path / "here"
    assert train([*words, "data.skip_rows=[[8,9]]", f"dump_dir={there}"], hook=begun(None)).exit_code == 0
    mine = [*words, "optim.on_nonfinite=rewind", f"dump_dir={here}"]
    for kill in (at_step(5, kill_self), killed_in_rewind(loaded=True), killed_after_rewind, at_step(7, kill_self)):
        assert train(mine, hook=begun(kill)).exit_codes == [-9]
    result = train(mine, hook=begun(None))
    assert result.exit_code == 0, result.output
    assert f"Back to step {back_to}; rows [[8, 9]] are passed over" in (here / "train.log").read_text()
    assert published(here) == published(there)
    for step in (6, 8):
        theirs, ours = fingerprint(there, step), fingerprint(here, step)
        assert {n: f for n, f in theirs.items() if "distcp" in n} == {n: f for n, f in ours.items() if "distcp" in n}
        assert state_of(here, step)["per_rank"] == state_of(there, step)["per_rank"]
        assert state_of(here, step)["rng"] == state_of(there, step)["rng"]
    found = audit_parts(*read_run(here))
    assert (found.problems, found.rows) == ([], 16)


@pytest.mark.soak
def test_a_spike_is_skipped_without_going_back(tmp_path: Path):
    words = [*WORDS, f"dump_dir={tmp_path}", "optim.on_spike.action=skip"]
    kill = at_step(10, kill_self)
    assert train(words, hook=bad(BAD_ROW, then=kill)).exit_codes == [-9]
    result = train(words, hook=bad(BAD_ROW))
    assert result.exit_code == 0, result.output
    assert state_of(tmp_path, 12)["shared"]["skipped_steps"] == 1  # pyright: ignore
