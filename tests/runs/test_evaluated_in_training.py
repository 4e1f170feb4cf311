"""`async_eval_gpus: null`: the ranks evaluate what they hold, training does not notice, and kills lose nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lingua.checkpoint import layout
from lingua.eval import scorer
from lingua.eval.evaluator import Evaluator
from lingua.eval.measures import Measures
from lingua.files import read_json
from tests.evaluated import by_hand, evaluations, make_data, words_of
from tests.trainer import Hook, fingerprint, kill_self, published, train

SHARDED = ["distributed.fsdp_type=full_shard", "checkpoint.async_save_mode=shm"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("evaluated"))


def wrap(owner: Any, name: str, before: Callable[[], None]) -> None:
    """Do `before` at each call."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def stir(rank: int) -> None:
    """Hook: an evaluation that seeds and draws, as harness does."""

    def seed() -> None:
        torch.manual_seed(rank)
        np.random.seed(rank)
        random.seed(rank)
        torch.rand(3)

    wrap(Measures, "measure_model", seed)


@pytest.mark.soak
@pytest.mark.ranks
def test_training_does_not_notice_and_the_numbers_are_those_of_the_checkpoints(
    data: Path, tmp_path: Path, shm: Path
) -> None:
    """On two ranks, sharded, staged in memory: evaluated ahead of the publication, adopted after it."""
    with_it, without = tmp_path / "with", tmp_path / "without"
    more = [*SHARDED, f"checkpoint.shm_path={shm}", "deterministic=true"]
    assert train(words_of(data, with_it, *more), 2, stir).exit_code == 0
    assert train(words_of(data, without, *more, "eval=null"), 2).exit_code == 0
    done = published(with_it)  # on a slow disk step 4 may be overtaken in memory by step 5, in either run
    assert {2, 5} <= set(done) & set(published(without))
    for step in set(done) & set(published(without)):
        assert fingerprint(with_it, step) == fingerprint(without, step)
    found = evaluations(with_it)
    assert sorted(found) == done
    for step, metrics in by_hand(with_it, done).items():
        assert found[step] == pytest.approx(metrics, rel=1e-6)
    assert not (without / "evals").exists()


def once(file: Path, act: Callable[[], None]) -> Callable[[], None]:
    """`act` at the first call of all starts, which `file` notes."""

    def acting() -> None:
        if not file.exists():
            file.touch()
            act()

    return acting


PLACES = {
    "before measuring": (Measures, "measure_model"),
    "before anything is written": (Evaluator, "_must_be_ours"),
    "before the line": (Evaluator, "_record"),
    "before adopting": (Evaluator, "_adopt"),
    "before the claim": (Evaluator, "_claim"),
}


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("mode", "place"), [*(("shm", place) for place in PLACES), *(("direct", place) for place in list(PLACES)[1:3])]
)
def test_killed_in_an_evaluation(data: Path, tmp_path: Path, shm: Path, place: str, mode: str) -> None:
    """Kill -9 of all ranks at each place, at its first and at its second time; then the run is started again."""
    words = words_of(data, tmp_path / "run")
    words += [f"checkpoint.shm_path={shm}", "checkpoint.async_save_mode=shm"] if mode == "shm" else []
    for n in (1, 2):

        def hook(rank: int, n: int = n) -> None:
            calls: list[int] = []

            def die() -> None:
                calls.append(1)
                if len(calls) == n and not (tmp_path / f"killed-{n}").exists():
                    (tmp_path / f"killed-{n}").touch()
                    kill_self()

            owner, name = PLACES[place]
            wrap(owner, name, die)

        train(words, 1, hook)
    assert train(words).exit_code == 0
    found, done = evaluations(tmp_path / "run"), published(tmp_path / "run")
    assert {2, 5} <= set(done)  # in memory, step 4 may be overtaken by step 5
    assert sorted(found) == done
    assert found == by_hand(tmp_path / "run", done)


PHASES = (
    "[{name: a, until: 2}, {name: b, until: 4, eval.validation.max_steps: 2, model.rope_theta: 300},"
    " {name: c, until: 5, from: %s@5}]"
)


@pytest.mark.soak
@pytest.mark.ranks
def test_each_phase_is_evaluated_by_its_own_keys_also_after_a_kill_at_its_end(data: Path, tmp_path: Path) -> None:
    """The checkpoint at a phase's end is made up for with its own weights and positions; averages where asked for."""
    assert train(words_of(data, tmp_path / "first", "eval=null")).exit_code == 0
    run_dir, more = tmp_path / "run", ["optim.ema=0.5", "eval.ema=true", f"phases={PHASES % (tmp_path / 'first')}"]
    words = words_of(data, run_dir, *more)
    for turn in (0, 1):  # killed in the evaluation of step 2, and in that of step 4
        calls = iter([*[lambda: None] * turn, kill_self])
        kill = partial(wrap, Measures, "measure_model", lambda calls=calls: next(calls)())
        assert train(words, 1, lambda rank, kill=kill: kill()).exit_codes == [-9]
    assert train(words).exit_code == 0
    found = evaluations(run_dir)
    assert {step: one["documents/mine/n_documents"] for step, one in found.items()} == {2: 3, 4: 2, 5: 3}
    assert found == by_hand(run_dir, [2, 4, 5])


@pytest.mark.soak
@pytest.mark.ranks
def test_a_stop_of_one_rank_ends_the_evaluation_on_all(data: Path, tmp_path: Path) -> None:
    """Rank 1 alone is told to stop, in its share; rank 0 leaves its own, and the next start makes it up."""
    run_dir = tmp_path / "run"

    def hook(rank: int) -> None:
        def first_batch() -> None:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        wrap(Measures, "measure_model", once(tmp_path / f"asked-{rank}", first_batch))
        original = scorer.sum_of_losses

        def score_for_long(model: Any, loss: Any, batches: Any, device: Any, before_batch: Callable[[], None]) -> Any:
            if rank == 0:
                for _ in range(9000):
                    threading.Event().wait(0.1)
                    before_batch()
            return original(model, loss, batches, device, before_batch)

        setattr(scorer, "sum_of_losses", score_for_long)  # noqa: B010

    words = words_of(data, run_dir)
    assert train(words, 2, hook).exit_code == 75
    assert evaluations(run_dir) == {}
    assert published(run_dir) == [2]
    assert read_json(layout.evaluation(run_dir, 2) / "try-0001.json")["end"] == "stopped"
    assert train(words, 2).exit_code == 0
    assert sorted(evaluations(run_dir)) == [2, 4, 5]


@pytest.mark.soak
@pytest.mark.ranks
def test_what_fails_is_given_up_and_training_goes_on(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def hook(rank: int) -> None:
        def fail() -> None:
            raise ValueError("out of luck")

        if rank == 1:
            wrap(scorer, "sum_of_losses", once(tmp_path / "failed", fail))

    result = train(words_of(data, run_dir), 2, hook)
    assert result.exit_code == 0, result.output
    assert "out of luck" in read_json(layout.evaluation(run_dir, 2) / layout.FAILED)["reason"]
    assert sorted(evaluations(run_dir)) == [4, 5]


@pytest.mark.soak
def test_an_evaluation_that_kills_is_given_up(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def hook(rank: int) -> None:
        wrap(Measures, "measure_model", kill_self)

    deadly: Hook = hook
    words = words_of(data, run_dir)
    for _ in range(3):
        assert train(words, 1, deadly).exit_codes == [-signal.SIGKILL]
        assert published(run_dir) == [2]
    assert train(words).exit_code == 0
    assert "were killed while they evaluated it" in read_json(layout.evaluation(run_dir, 2) / layout.FAILED)["reason"]
    assert sorted(evaluations(run_dir)) == [4, 5]


@pytest.mark.soak
def test_a_start_makes_up_for_what_others_left(data: Path, tmp_path: Path) -> None:
    """A run that evaluated nothing is given more steps and evaluates: older checkpoints from their folders."""
    run_dir = tmp_path / "run"
    assert train(words_of(data, run_dir, "eval.automatic=false")).exit_code == 0
    assert evaluations(run_dir) == {}
    assert train(words_of(data, run_dir, "steps=6", "--accept-change")).exit_code == 0
    found = evaluations(run_dir)
    assert sorted(found) == [2, 4, 6]
    assert found == by_hand(run_dir, [2, 4, 6])
