"""A run in phases: killed before, at and after a switch, on 1, 2 and 3 ranks, it ends as the undisturbed one."""

from pathlib import Path
from typing import Any

import pytest

from apps.cli.data import read_run
from lingua.data.audit import audit_parts
from lingua.report.facts import read_run as facts_of
from lingua.report.status import describe, status_of
from lingua.run.lock import this_process
from lingua.run.metrics import read_metrics
from lingua.train.load_model import load_described
from tests.corpora import two_sources
from tests.trainer import TINY, at_step, fingerprint, kill_self, losses, published, train

PHASES = (
    "[{name: main, until: 3},"
    "{name: anneal, until: 100%, data.sources: {big: 1, small: 4}, optim.scheduler: linear_to_zero,"
    " optim.frozen: [tok_embeddings.*]},"
    "{name: long, until: +3 steps, data.seq_len: 64, data.batch_size: 1, model.rope_theta: 500000,"
    " global_batch_size: 6, loss.z_loss: 1e-4}]"
)
WORDS = [*TINY, "steps=6", "global_batch_size=12", "checkpoint.dump.every=-1", f"phases={PHASES}"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    corpus = two_sources(tmp_path_factory.mktemp("corpus"))
    return [*WORDS, f"data.root_dir={corpus}", "data.sources={big: 3}"]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    result = train([*words, f"dump_dir={run_dir}"])
    assert result.exit_code == 0, result.output
    return run_dir


def rows_of(run_dir: Path) -> dict[str, Any]:
    """Where each lane stands at the end."""
    _, _, states = read_run(run_dir)
    return states[9]


@pytest.mark.soak
@pytest.mark.gate
def test_killed_before_at_and_after_a_switch_a_run_ends_as_the_undisturbed_one(
    words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    assert published(undisturbed) == [3, 6, 9]  # each phase ends with a checkpoint, although none is asked for
    rates = {r["global_step"]: r["optim/lr"] for r in read_metrics(undisturbed / "metrics.jsonl")}
    assert [rates[step] for step in (4, 5, 6)] == pytest.approx([rates[4], rates[4] * 2 / 3, rates[4] / 3])
    mine = [*words, f"dump_dir={tmp_path}"]
    for step in (2, 3, 4, 6, 7):
        assert train(mine, hook=at_step(step, kill_self)).exit_codes == [-9]
    result = train(mine)
    assert result.exit_code == 0, result.output
    assert losses(tmp_path) == losses(undisturbed)
    for step in (3, 6, 9):
        assert fingerprint(tmp_path, step) == fingerprint(undisturbed, step)
    parts, n_lanes, states = read_run(tmp_path)
    found = audit_parts(parts, n_lanes, states, count_tokens=True)
    assert (found.problems, found.rows) == ([], 6 * 12 + 3 * 6)
    facts = facts_of(tmp_path)
    assert "step        9 of 9" in "\n".join(describe(status_of(facts, this_process())))
    tables = [load_described(f"{tmp_path}@{n}", "cpu", None, trust=True).model for n in (6, 9)]
    assert [table.rope_embeddings.args.rope_theta for table in tables] == [10000.0, 500000.0]  # pyright: ignore


@pytest.mark.soak
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("kill_at", [2, 3, 4, 6])
@pytest.mark.parametrize("load_async", ["true", "false"])
def test_the_rows_are_the_same_on_other_ranks_after_a_kill(
    words: list[str], undisturbed: Path, tmp_path: Path, n_ranks: int, kill_at: int, load_async: str
) -> None:
    mine = [*words, f"dump_dir={tmp_path}", f"data.load_async={load_async}"]
    assert set(train(mine, n_ranks, at_step(kill_at, kill_self)).exit_codes) == {-9}
    result = train(mine, n_ranks % 3 + 1)
    assert result.exit_code == 0, result.output
    assert rows_of(tmp_path) == rows_of(undisturbed)
    assert losses(tmp_path, rel=1e-4) == pytest.approx(losses(undisturbed), rel=1e-4)


@pytest.mark.soak
def test_three_stages_are_one_file_or_three(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Weights of another run at the begin of a phase: the optimizer begins anew, step and rows go on."""
    one = "[{name: a, until: 3}, {name: b, until: 6, from: %s@9, take: %s, data.seq_len: 16}]"
    for take in ("weights", "state"):
        run_dir = tmp_path / take
        mine = [*words, f"dump_dir={run_dir}", f"phases={one % (undisturbed, take)}"]
        assert train(mine, hook=at_step(4, kill_self)).exit_codes == [-9]
        result = train(mine)
        assert result.exit_code == 0, result.output
        assert published(run_dir) == [3, 6]
        again = losses(run_dir)
        assert again[3] == losses(undisturbed)[3]
        assert again[4] < again[3]  # those weights have learned more
