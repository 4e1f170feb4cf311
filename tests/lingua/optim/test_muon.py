from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lingua.config.keys.optim import AdamWArgs, MuonArgs
from lingua.optim.adamw import build_adamw
from lingua.optim.muon import Muon, build_muon, cost_of, layout_of, newton_schulz, ns_dtype_on, rounds, scale_of
from lingua.optim.update import optimizer_step
from tests.lingua.optim.tiny import TRUE, Tiny, everything, train
from tests.ranks import run_on_ranks


def args(**changed: Any) -> MuonArgs:
    return MuonArgs(**{"ns_dtype": "fp32", "weight_decay": 0.1} | changed)


# -- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3)])
def test_the_iteration_keeps_singular_vectors_and_evens_out_the_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ newton_schulz(matrix, 5, torch.float32) @ v.T
    assert (values.diagonal() > 0.6).all()
    assert (values.diagonal() < 1.25).all()
    torch.testing.assert_close(values, values.diagonal().diag(), atol=1e-5, rtol=0)
    assert not newton_schulz(torch.zeros(shape), 5, torch.float32).any()


@pytest.mark.parametrize(
    ("device", "wanted", "dtype"),
    [
        ("cpu", "auto", torch.float32),
        ("cuda", "auto", torch.bfloat16),
        ("cpu", "bf16", torch.bfloat16),
        ("cuda", "fp32", torch.float32),
    ],
)
def test_the_type_of_the_iteration(device: str, wanted: Any, dtype: torch.dtype) -> None:
    assert ns_dtype_on(torch.device(device), wanted) == dtype


@pytest.mark.parametrize(
    ("shape", "rule", "scale"),
    [
        ((16, 4), "original", 2.0),
        ((4, 16), "original", 1.0),
        ((16, 4), "match_rms_adamw", 0.8),
        ((4, 16), "match_rms_adamw", 0.8),
    ],
)
def test_the_scale_of_an_update(shape: tuple[int, int], rule: Any, scale: float) -> None:
    assert scale_of(shape, rule) == pytest.approx(scale)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_move_as_by_torchs_muon_and_the_rest_as_by_adamw(scale: Any, nesterov: bool) -> None:
    ours, theirs = Tiny(), Tiny()
    optimizer = build_muon(args(scale=scale, nesterov=nesterov, ns_dtype="bf16"), ours.named_parameters())
    matrices = [p for p in theirs.layers.parameters() if p.ndim == 2]
    rest = [(n, p) for n, p in theirs.named_parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(matrices, momentum=0.95, nesterov=nesterov, weight_decay=0.1, adjust_lr_fn=scale)
    adamw = build_adamw(AdamWArgs(weight_decay=0.1), rest)
    for step in range(4):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.tensor([step, 3])).backward()
        optimizer_step(optimizer, 0.01 * step, TRUE, None)
        muon.param_groups[0]["lr"] = 0.01 * step
        muon.step()
        optimizer_step(adamw, 0.01 * step, TRUE, None)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)


def test_adamws_part_can_learn_at_a_rate_of_its_own() -> None:
    ours, theirs = Tiny(), Tiny()
    optimizer = build_muon(args(adamw_lr_ratio=0.5), ours.named_parameters())
    train(ours, optimizer, 2)
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}  # as the loop has set it
    embedding = list(theirs.tok_embeddings.named_parameters("tok_embeddings"))
    adamw = build_adamw(AdamWArgs(), embedding)
    ours = Tiny()
    optimizer = build_muon(args(adamw_lr_ratio=0.5), ours.named_parameters())
    for model, its, lr in ((ours, optimizer, 0.02), (theirs, adamw, 0.01)):
        model(torch.tensor([1, 3])).backward()
        optimizer_step(its, lr, TRUE, None)
    torch.testing.assert_close(ours.tok_embeddings.weight, theirs.tok_embeddings.weight)


def test_state_is_one_momentum_for_matrices_and_two_moments_for_the_rest() -> None:
    model = Tiny()
    found = everything(model, build_muon(args(), model.named_parameters()))
    assert "optim.state.layers.0.0.weight.momentum" in found
    assert "optim.state.output.weight.exp_avg_sq" in found
    n_matrices = 3 * 2 * 20
    n_all = sum(p.numel() for p in model.parameters())
    n_bytes = sum(t.numel() * 4 for name, t in found.items() if name.startswith("optim.") and t.ndim)
    assert n_bytes == args().state_bytes(n_all, n_matrices) == 4 * n_matrices + 8 * (n_all - n_matrices)


def test_a_model_without_matrices_in_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of the model is a matrix of its layers"):
        build_muon(args(), nn.Linear(3, 3).named_parameters())


# -- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "n", "expected"),
    [
        ([], 2, []),
        ([1, 1, 1, 1], 2, [[0, 1], [2, 3]]),
        ([1, 1, 4, 2, 2], 2, [[2, 3], [4, 0], [1]]),
        ([3], 3, [[0]]),
        ([1, 2, 3], 1, [[2], [1], [0]]),
    ],
)
def test_a_round_has_one_matrix_per_rank_of_about_the_same_cost(
    costs: list[float], n: int, expected: list[list[int]]
) -> None:
    assert rounds(costs, n) == expected


def test_cost_is_that_of_the_short_side_twice() -> None:
    assert cost_of((2, 8)) == cost_of((8, 2)) == 32


@pytest.mark.ranks
def test_each_matrix_is_orthogonalised_by_one_rank_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(matrix: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(matrix.shape))
        return newton_schulz(matrix, *rest)

    monkeypatch.setattr("lingua.optim.muon.newton_schulz", counted)

    def on_rank(rank: int) -> list[tuple[int, ...]]:
        model = Tiny()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        fully_shard(model, mesh=mesh)
        train(model, build_muon(args(), model.named_parameters()), 1)
        return calls

    shapes = [shape for found in run_on_ranks(on_rank, 4) for shape in found]
    assert sorted(shapes) == sorted([(5, 4), (4, 5)] * 3)


@pytest.mark.ranks
def test_columns_that_are_cut_are_refused() -> None:
    def on_rank(rank: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        by_column = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
        by_row = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        assert layout_of([("layers.0.a", by_row)]).shards.size == 2
        with pytest.raises(ValueError, match=r"layers\.0\.b is spread over ranks in another way than layers\.0\.a"):
            layout_of([("layers.0.a", by_row), ("layers.0.b", by_column)])
        try:
            Muon(args(), [("layers.0.b", by_column)], torch.optim.AdamW([nn.Parameter(torch.ones(1))]))
        except ValueError as error:
            return str(error)
        return ""

    for said in run_on_ranks(on_rank, 2):
        assert "layers.0.b is cut as" in said
        assert "use distributed.tp_size=1, or optim.type=adamw" in said
