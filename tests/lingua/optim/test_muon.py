import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lingua.checkpoint.state import TrainState, tensors_of
from lingua.config.keys.optim import AdamWArgs, MuonArgs
from lingua.optim.adamw import build_adamw
from lingua.optim.muon import Muon, build_muon, cost_of, layout_of, newton_schulz, ns_dtype_on, rounds, scale_of
from lingua.optim.update import grad_norm_and_clip_coef, optimizer_step
from tests.ranks import run_on_ranks

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


class Tiny(nn.Module):
    """Matrices of several shapes, more rows than columns and fewer, 5 of which two ranks share unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(7, 4)
        self.layers = nn.ModuleDict({str(i): nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)) for i in range(3)})
        self.norm = nn.LayerNorm(4, bias=False)
        self.output = nn.Linear(4, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = x + layer(x).tanh()
        return self.output(self.norm(x)).logsumexp(-1).sum()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in tensors_of(TrainState(model, optimizer)).by_name.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def args(**changed: Any) -> MuonArgs:
    return MuonArgs(**{"ns_dtype": "fp32", "weight_decay": 0.1} | changed)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int, first: int = 0) -> None:
    for step in range(first, first + n_steps):
        model(torch.tensor([step % 7, 3, 5])).backward()
        _, finite, divisor = grad_norm_and_clip_coef(model.parameters(), 1.0)
        optimizer_step(optimizer, 0.01 * (step + 1), finite, divisor)
        optimizer.zero_grad()


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


# -- a step gone wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisoned", ["layers.1.0.weight", "tok_embeddings.weight"])
@pytest.mark.parametrize("n_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(poisoned: str, n_before: int) -> None:
    model = Tiny()
    optimizer = build_muon(args(), model.named_parameters())
    train(model, optimizer, n_before)
    before = everything(model, optimizer)
    model(torch.tensor([1, 2])).backward()
    grad = model.get_parameter(poisoned).grad
    assert grad is not None
    grad[0, 0] = float("nan")
    _, finite, divisor = grad_norm_and_clip_coef(model.parameters(), 1.0)
    optimizer_step(optimizer, 0.1, finite, divisor)
    optimizer.zero_grad()
    assert same(everything(model, optimizer), before)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    train(model, optimizer, 1, n_before)
    twin = Tiny()
    twin_optimizer = build_muon(args(), twin.named_parameters())
    train(twin, twin_optimizer, n_before + 1)
    assert same(everything(model, optimizer), everything(twin, twin_optimizer))


def test_steps_equal_those_by_gradients_that_torch_has_clipped() -> None:
    ours, theirs = Tiny(), Tiny()
    optimizer, reference = (build_muon(args(), model.named_parameters()) for model in (ours, theirs))
    for at in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.tensor([at, 3])).backward()
        _, finite, divisor = grad_norm_and_clip_coef(ours.parameters(), 0.1)
        optimizer_step(optimizer, 0.1, finite, divisor)
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1) > 0.2
        optimizer_step(reference, 0.1, TRUE, None)
    found, expected = everything(ours, optimizer), everything(theirs, reference)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    model = Tiny()
    optimizer = build_muon(args(), model.named_parameters())
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    twin_optimizer = build_muon(args(), twin.named_parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, 2)
    train(twin, twin_optimizer, 2, 2)
    assert same(everything(model, optimizer), everything(twin, twin_optimizer))


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


def _parallel(shape: tuple[int, ...], names: tuple[str, ...]) -> Callable[[int], tuple[dict[str, Tensor], bool]]:
    """Three steps and a poisoned one; returns the state, and whether the last left no trace."""

    def on_rank(rank: int) -> tuple[dict[str, Tensor], bool]:
        model = Tiny()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = build_muon(args(), model.named_parameters())
        train(model, optimizer, 3)
        before = everything(model, optimizer)
        model(torch.tensor([1, 2])).backward()
        for parameter in model.parameters():
            assert isinstance(parameter.grad, DTensor)
            parameter.grad.to_local().fill_(float("nan"))
        _, finite, divisor = grad_norm_and_clip_coef(model.parameters(), 1.0)
        optimizer_step(optimizer, 0.1, finite, divisor)
        optimizer.zero_grad()
        return before, same(everything(model, optimizer), before)

    return on_rank


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2,), ("dp_shard",)),
        pytest.param((2, 1), ("dp_replicate", "dp_shard"), marks=pytest.mark.soak),
        pytest.param((1, 3), ("dp_replicate", "dp_shard"), marks=pytest.mark.soak),
        ((2, 2), ("dp_replicate", "dp_shard")),
    ],
)
def test_every_layout_moves_as_one_rank(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    alone = Tiny()
    optimizer = build_muon(args(), alone.named_parameters())
    train(alone, optimizer, 3)
    expected = everything(alone, optimizer)
    n_ranks = torch.Size(shape).numel()
    results = run_on_ranks(_parallel(shape, names), n_ranks)
    for state, unmoved in results:
        assert unmoved
        assert same(state, results[0][0])
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


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
