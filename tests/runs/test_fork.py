"""A new run goes on from another one's checkpoint: with all of its state, or without the parts that are begun anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from apps.cli.main import app
from lingua.checkpoint import dcp, layout
from lingua.config.command_line import run_main
from lingua.run.metrics import read_metrics
from tests.checkpoints import names_under
from tests.trainer import TINY, at_step, fingerprint, kill_self, losses, published, train

# A rate that moves at every step, so that a schedule at the wrong place is seen.
WORDS = [*TINY, "steps=6", "optim.warmup=2", "optim.scheduler=linear", "checkpoint.dump={every: 3, keep: 0}"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("origin") / "run"
    result = train([*WORDS, f"dump_dir={run_dir}"])
    assert result.exit_code == 0, result.output
    return run_dir


def lingua(*words: object) -> int:
    return run_main(lambda given: app(given, prog_name="lingua", standalone_mode=False), list(map(str, words)))


def fork(*words: object) -> int:
    return lingua("fork", *words)


def start(folder: Path, **hook: Any) -> None:
    """What the fork says to type; with a hook that kills it, twice."""
    config = str(folder / "config.yaml")
    if hook:
        assert train([config], **hook).exit_codes == [-9]
    result = train([config])
    assert result.exit_code == 0, result.output


def metric(run_dir: Path, name: str) -> dict[int, float]:
    return {record["global_step"]: record[name] for record in read_metrics(run_dir / "metrics.jsonl")}


def shared(run_dir: Path, step: int) -> dict[str, Any]:
    document = orjson.loads((run_dir / f"checkpoints/{step:010d}/train_state.00000.json").read_bytes())
    return document["shared"]


def tensors(run_dir: Path, step: int) -> dict[str, Any]:
    return {name: fact for name, fact in fingerprint(run_dir, step).items() if name.endswith(".distcp")}


@pytest.mark.soak
def test_a_fork_goes_on_as_the_run_did(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names_under(origin)
    assert fork(f"{origin}@3", tmp_path / "new") == 0
    assert capsys.readouterr().out.endswith(f"start it with\n  lingua train {tmp_path}/new/config.yaml\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]
    start(tmp_path / "new")
    assert losses(tmp_path / "new") == {step: loss for step, loss in losses(origin).items() if step > 3}
    assert tensors(tmp_path / "new", 6) == tensors(origin, 6)
    changed = names_under(origin) ^ before
    assert all("pins" in name for name in changed), changed  # and that lease is all that the other run sees of it


@pytest.mark.soak
def test_a_fork_of_a_fork_on_two_ranks_with_a_change(origin: Path, tmp_path: Path) -> None:
    assert fork(f"{origin}@3", tmp_path / "a", "steps=4") == 0
    start(tmp_path / "a")
    assert fork(tmp_path / "a", tmp_path / "b", "steps=6", "data.batch_size=1", "checkpoint.keep_every=5") == 0
    result = train([str(tmp_path / "b" / "config.yaml")], n_ranks=2)
    assert result.exit_code == 0, result.output
    assert sorted(losses(tmp_path / "b")) == [5, 6]
    assert published(tmp_path / "b") == [5, 6]
    assert shared(tmp_path / "b", 6)["total_tokens"] == shared(origin, 6)["total_tokens"]


def optimizer_steps(run_dir: Path, step: int) -> float:
    """Updates that the optimizer has counted."""
    count = torch.zeros(())
    dcp.read_into(layout.folder(run_dir / layout.CHECKPOINTS, step), {"optim.state.norm.weight.step": count})
    return count.item()


@pytest.mark.soak
def test_what_begins_anew_does_so_once(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        words = ["checkpoint.reset=[optim, schedule, data]", "steps=9", "checkpoint.dump.every=1", "data.seed=7"]
        assert fork(f"{origin}@3", folder, *words) == 0
    start(calm)
    start(killed, hook=at_step(7, kill_self))
    assert tensors(killed, 9) == tensors(calm, 9)
    assert losses(killed) == losses(calm)
    for run_dir in (calm, killed):
        assert metric(run_dir, "optim/lr") == {step + 3: lr for step, lr in metric(origin, "optim/lr").items()}
        assert [optimizer_steps(run_dir, step) for step in (4, 9)] == [1, 6]
        assert (shared(run_dir, 9)["step"], shared(run_dir, 9)["first_row"]) == (9, -6)
        assert lingua("data", "audit", run_dir) == 0, capsys.readouterr()
    assert optimizer_steps(origin, 6) == 6
    capsys.readouterr()
    assert lingua("data", "rows", killed, "--step", 4, "--json") == 0
    assert [row["row"] for row in orjson.loads(capsys.readouterr().out)["rows"]] == [0, 1]


def test_steps_are_counted_from_0(origin: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert fork(f"{origin}@6", new, "checkpoint.reset=[step, optim]", "steps=3") == 0
    start(new)
    assert sorted(losses(new)) == [1, 2, 3]
    assert metric(new, "optim/total_tokens") == {step: 64.0 * step for step in (1, 2, 3)}
    assert {**shared(new, 3), "tracking_id": None} == {
        "step": 3, "total_tokens": 192, "skipped_steps": 0, "tracking_id": None, "schedule_begin": 0, "first_row": 12,
    }  # fmt: skip
    assert losses(new)[1] not in losses(origin).values()  # the rows go on behind the other run's last one
