"""Accumulation, number of ranks and sharding change how a step is computed, not what it is."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lingua.checkpoint import dcp
from lingua.model.loss import IGNORE, CrossEntropy
from lingua.run.metrics import read_metrics
from lingua.train.learner import MicroBatch, Run
from tests.layouts import LAYOUTS, Layout
from tests.trainer import TINY, Hook, fingerprint, losses, train

WORDS = [*TINY, "steps=8", "optim.clip=0.1", "data.lanes=12"]  # a clip that bites: it must act on the whole gradient
G = 12  # rows per step


@pytest.fixture(scope="module")
def one_large_batch(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run_dir = tmp_path_factory.mktemp("one")
    result = train([*WORDS, f"dump_dir={run_dir}", f"data.batch_size={G}"])
    assert result.exit_code == 0, result.output
    return losses(run_dir)


@pytest.mark.parametrize(
    ("n_ranks", "words"),
    [
        pytest.param(1, ["data.batch_size=3", "grad_acc_steps=4"], marks=pytest.mark.soak),
        pytest.param(1, ["data.batch_size=4", f"global_batch_size={G}"], marks=pytest.mark.soak),
        pytest.param(2, ["data.batch_size=6"], marks=[pytest.mark.ranks, pytest.mark.soak]),
        pytest.param(2, ["data.batch_size=2", "grad_acc_steps=3"], marks=[pytest.mark.ranks, pytest.mark.soak]),
        pytest.param(
            3, ["data.batch_size=4", "distributed.fsdp_type=full_shard"], marks=[pytest.mark.ranks, pytest.mark.soak]
        ),
        pytest.param(
            4, ["data.batch_size=3", "distributed.fsdp_type=full_shard", "distributed.dp_shard=2"],
            marks=[pytest.mark.ranks, pytest.mark.soak],
        ),
        pytest.param(
            2, ["data.batch_size=4", "grad_acc_steps=3", "distributed.tp_size=2"],
            marks=[pytest.mark.ranks, pytest.mark.soak],
        ),
        pytest.param(
            4, ["data.batch_size=6", "distributed.tp_size=2", "distributed.fsdp_type=full_shard"],
            marks=[pytest.mark.ranks, pytest.mark.soak],
        ),
        (1, [f"data.batch_size={G}", "distributed.selective_activation_checkpointing=true"]),
        pytest.param(
            1, [f"data.batch_size={G}", "distributed.full_activation_checkpointing=true"], marks=pytest.mark.soak
        ),
    ],
)  # fmt: skip
def test_losses_equal_those_of_one_large_batch(
    one_large_batch: dict[int, float], tmp_path: Path, n_ranks: int, words: list[str]
):
    result = train([*WORDS, f"dump_dir={tmp_path}", *words], n_ranks)
    assert result.exit_code == 0, result.output
    assert losses(tmp_path) == pytest.approx(one_large_batch, rel=2e-5)


@pytest.mark.soak
@pytest.mark.ranks
def test_a_run_goes_on_with_the_same_rows_on_other_numbers_of_ranks(one_large_batch: dict[int, float], tmp_path: Path):
    """Twice in mid-run; rows per step stay, so accumulation is derived."""
    words = [*WORDS, f"dump_dir={tmp_path}", "checkpoint.dump.every=2", "distributed.fsdp_type=full_shard"]
    for n_ranks, steps, batch in ((2, 3, 6), (3, 6, 2), (1, 8, 4)):
        result = train([*words, f"steps={steps}", f"data.batch_size={batch}", "optim.scheduler=constant"], n_ranks)
        assert result.exit_code == 0, result.output
    constant = tmp_path / "constant"
    assert train([*WORDS, f"dump_dir={constant}", f"data.batch_size={G}", "optim.scheduler=constant"]).exit_code == 0
    assert losses(tmp_path) == pytest.approx(losses(constant), rel=2e-5)


def mask_labels(run_dir: Path) -> Hook:
    """Hook: rows have between no and all of their labels, by number; ranks note sum of losses and labels of a pass."""

    def hook(rank: int) -> None:
        batches, call = Run.batches, CrossEntropy.__call__

        def masked(run: Run) -> Iterator[MicroBatch]:
            for batch in batches(run):
                n_kept = torch.from_numpy(batch.rows * 11 % 33)  # of 32
                kept = torch.arange(batch.labels.shape[1]) < n_kept[:, None]
                yield replace(batch, labels=batch.labels.where(kept, IGNORE))

        def noted(self: CrossEntropy, *args: Tensor) -> tuple[Tensor, Tensor]:
            loss_sum, n_labels = call(self, *args)
            with (run_dir / f"passes.{rank}").open("a") as file:
                print(loss_sum.item(), n_labels.item(), file=file)
            return loss_sum, n_labels

        setattr(Run, "batches", masked)  # noqa: B010 - a type checker knows what it would be
        setattr(CrossEntropy, "__call__", noted)  # noqa: B010

    return hook


@pytest.mark.soak
@pytest.mark.ranks
def test_the_loss_of_a_step_is_the_mean_over_the_labels_that_count(tmp_path: Path):
    found: list[list[float]] = []
    for n_ranks, batch_size, micro_steps in ((1, G, 1), (1, G // 2, 2), (2, G // 4, 2)):
        run_dir = tmp_path / f"{n_ranks} by {micro_steps}"
        run_dir.mkdir()
        sizes = [f"data.batch_size={batch_size}", f"grad_acc_steps={micro_steps}", f"dump_dir={run_dir}"]
        result = train([*WORDS, "steps=4", *sizes], n_ranks, mask_labels(run_dir))
        assert result.exit_code == 0, result.output
        lines = [(run_dir / f"passes.{rank}").read_text().splitlines() for rank in range(n_ranks)]
        passes = torch.tensor([[float(x) for x in line.split()] for line in chain(*zip(*lines, strict=True))])
        loss_sums, n_labels = passes.unflatten(0, (4, -1)).sum(dim=1).T
        assert list(losses(run_dir).values()) == pytest.approx((loss_sums / n_labels).tolist(), rel=1e-5)
        records = read_metrics(run_dir / "metrics.jsonl")
        found.append([value for record in records for value in (record["loss/out"], record["optim/grad_norm"])])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=2e-5)


# -- every layout, all at once -------------------------------------------------------------------------------------

TWENTY = [
    *TINY, "steps=20", "optim.clip=0.1", "data.lanes=12", "data.doc_mask=true", "loss.z_loss=1e-4",
    "model.weight_tying=true", "model.qk_norm=true", "validation.at_ends=true",
]  # fmt: skip


def note_rows(run_dir: Path) -> Hook:
    """Hook: each rank leaves the numbers of its rows, a micro step per line."""

    def hook(rank: int) -> None:
        batches = Run.batches

        def noted(run: Run) -> Iterator[MicroBatch]:
            with (run_dir / f"rows.{rank}").open("w", buffering=1) as file:
                for batch in batches(run):
                    print(*batch.rows.tolist(), file=file)
                    yield batch

        setattr(Run, "batches", noted)  # noqa: B010 - a type checker knows what it would be

    return hook


def rows_of(run_dir: Path, rank: int) -> list[list[int]]:
    return [[int(row) for row in line.split()] for line in (run_dir / f"rows.{rank}").read_text().splitlines()]


def parameters(run_dir: Path) -> dict[str, Tensor]:
    """Of the last checkpoint, whole."""
    folder = run_dir / "checkpoints" / "0000000020"
    described = {n: facts for n, facts in dcp.tensor_properties(folder).items() if n.startswith("model.")}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described.items()}
    dcp.read_into(folder, tensors)
    return tensors


def validations(run_dir: Path) -> list[dict[str, Any]]:
    records = read_metrics(run_dir / "metrics.validation.jsonl")
    return [{key: value for key, value in record.items() if key.endswith(("/nll", "/bpb"))} for record in records]


def run_twenty(run_dir: Path, layout: Layout, micro_steps: int, *words: str) -> str:
    """What the ranks said."""
    run_dir.mkdir()
    batch = G // micro_steps // layout.dp_size
    sizes = [f"data.batch_size={batch}", f"grad_acc_steps={micro_steps}"]
    result = train([*TWENTY, *layout.words, *sizes, f"dump_dir={run_dir}", *words], layout.n_ranks, note_rows(run_dir))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def twenty_on_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("twenty") / "one"
    run_twenty(run_dir, LAYOUTS["one"], 1)
    return run_dir


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_twenty_steps_of_every_layout_end_where_one_rank_ends(twenty_on_one: Path, tmp_path: Path, name: str):
    layout = LAYOUTS[name]
    for micro_steps in (1, 3):
        run_dir = tmp_path / f"by {micro_steps}"
        run_twenty(run_dir, layout, micro_steps)
        assert losses(run_dir) == pytest.approx(losses(twenty_on_one), rel=1e-5)
        for ours, theirs in zip(validations(run_dir), validations(twenty_on_one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        expected = parameters(twenty_on_one)
        for key, parameter in parameters(run_dir).items():
            # Where a gradient is nearly 0, Adam makes much of how it was rounded; a step moves a value by lr <= 2e-3.
            assert (parameter - expected[key]).abs().max() < 2e-4, key
            assert (parameter - expected[key]).norm() < 1e-4 * expected[key].norm(), key

        by_rank = [rows_of(run_dir, rank) for rank in range(layout.n_ranks)]
        for step in range(20):
            lines = slice(step * micro_steps, (step + 1) * micro_steps)
            of_dp_rank = [list(chain(*by_rank[dp_rank * layout.tp][lines])) for dp_rank in range(layout.dp_size)]
            assert sorted(chain(*of_dp_rank)) == list(range(step * G, (step + 1) * G))
            for dp_rank, rows in enumerate(of_dp_rank):  # row r is of lane r % K, which is rank r % K % dp's
                assert rows == sorted(rows)
                assert {row % 12 % layout.dp_size for row in rows} == {dp_rank}
        for rank, rows in enumerate(by_rank):  # tensor-parallel peers read the same rows
            assert rows[: 20 * micro_steps] == by_rank[rank // layout.tp * layout.tp][: 20 * micro_steps]

    if name in ("hybrid", "tp of shards"):
        run_twenty(tmp_path / "again", layout, 1)
        assert fingerprint(tmp_path / "again", 20) == fingerprint(tmp_path / "by 1", 20)


@pytest.mark.gate
@pytest.mark.soak
@pytest.mark.ranks
def test_a_tensor_parallel_run_speaks_in_the_end(tmp_path: Path):
    assert "a sample:\n    def" in run_twenty(tmp_path / "run", LAYOUTS["tp"], 1, "steps=2", "sample_prompt=def")
