import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lingua.config.keys.optim import AdamWArgs
from lingua.optim.adamw import build_adamw
from lingua.optim.update import (
    GROWTH_INTERVAL_STEPS,
    INITIAL,
    LossScale,
    grad_norm_and_clip_coef,
    is_overflow,
    optimizer_step,
)
from tests.lingua.optim.tiny import (
    FALSE,
    OPTIMIZERS,
    TRUE,
    Tiny,
    assert_near,
    clipped_step,
    everything,
    same,
    train,
)
from tests.ranks import run_on_ranks

GOOD, BAD = TRUE, FALSE
CPU = torch.device("cpu")

# -- the loss scale ------------------------------------------------------------------------------------------------


def test_an_overflow_halves_it_and_many_good_steps_double_it():
    scale = LossScale(CPU)
    for _ in range(GROWTH_INTERVAL_STEPS - 1):
        scale.update(GOOD)
    scale.update(BAD)
    assert scale.factor.item() == INITIAL / 2  # and the good steps count from 0 again
    for _ in range(GROWTH_INTERVAL_STEPS - 1):
        scale.update(GOOD)
    assert scale.factor.item() == INITIAL / 2
    scale.update(GOOD)
    assert scale.factor.item() == INITIAL


def test_it_equals_torchs_own():
    ours, torchs = LossScale(CPU), torch.amp.GradScaler("cpu")
    weight = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in (True, False, False, True, False):
        torchs.scale(weight * (1.0 if finite else float("inf"))).backward()
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(finite))
        assert ours.factor.item() == torchs.get_scale()


def test_it_ends_at_its_minimum():
    scale = LossScale(CPU, {"factor": 2.0, "good_steps": 7})
    assert scale.can_mend(torch.tensor(3.0))
    for _ in range(3):
        scale.update(BAD)
    assert scale.factor.item() == 1
    assert not scale.can_mend(torch.tensor(3.0))


def test_state_goes_on_where_it_was():
    scale = LossScale(CPU)
    for finite in (GOOD, BAD, GOOD, GOOD):
        scale.update(finite)
    assert scale.state() == {"factor": INITIAL / 2, "good_steps": 2}
    assert LossScale(CPU, scale.state()).state() == scale.state()


@pytest.mark.parametrize(
    ("loss", "factor", "overflow"),
    [(3.0, 4.0, True), (3.0, 1.0, False), (float("nan"), 4.0, False), (float("inf"), 4.0, False)],
)
def test_what_a_smaller_factor_can_mend(loss: float, factor: float, overflow: bool):
    assert is_overflow(loss, factor) == overflow
    assert LossScale(CPU, {"factor": factor, "good_steps": 0}).can_mend(torch.tensor(loss)).item() == overflow


# -- any optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("poisoned", ["layers.1.0.weight", "tok_embeddings.weight"])
@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(name: str, n_before: int, poisoned: str, poison: float) -> None:
    model = Tiny()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, n_before)
    before = everything(model, optimizer)
    model(torch.tensor([1, 2])).backward()
    grad = model.get_parameter(poisoned).grad
    assert grad is not None
    grad[0, 0] = poison
    assert not clipped_step(model, optimizer, 0.1).isfinite()
    assert same(everything(model, optimizer), before)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    train(model, optimizer, 1, n_before)  # as if the bad one had never been
    twin = Tiny()
    twin_optimizer = OPTIMIZERS[name](twin)
    train(twin, twin_optimizer, n_before + 1)
    assert same(everything(model, optimizer), everything(twin, twin_optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_goes_on_bit_for_bit(name: str) -> None:
    model = Tiny()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS[name](twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, 2)
    train(twin, twin_optimizer, 2, 2)
    assert same(everything(model, optimizer), everything(twin, twin_optimizer))


def test_an_optimizer_without_fused_kernels_is_held_back_and_clipped_too() -> None:
    ours, theirs = Tiny(), Tiny()
    optimizer, reference = (torch.optim.SGD(model.parameters(), momentum=0.9) for model in (ours, theirs))
    for model in (ours, theirs):
        model(torch.tensor([1, 2])).backward()
    before = [p.detach().clone() for p in ours.parameters()]
    optimizer_step(optimizer, 0.1, FALSE, None)
    assert all(map(torch.equal, ours.parameters(), before))
    clipped_step(ours, optimizer, 0.1, clip=0.1)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    reference.param_groups[0]["lr"] = 0.1
    reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("clip", "divisor"), [(0.5, 10.0), (1e9, 1.0), (0.0, None)])
def test_the_divisor_bounds_the_norm_of_the_whole_gradient(clip: float, divisor: float | None) -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([[-4.0]])  # one has none
    found = grad_norm_and_clip_coef(parameters, clip)
    assert (found.norm.item(), found.finite.item()) == (5.0, True)
    assert (found.divisor is None) == (divisor is None)
    assert found.divisor is None or found.divisor.item() == pytest.approx(divisor, rel=1e-6)
    assert (parameters[0].grad, parameters[1].grad) == (3.0, -4.0)


@pytest.mark.parametrize("clip", [0.1, 1e9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_by_gradients_that_torch_has_clipped(name: str, clip: float) -> None:
    ours, theirs = Tiny(), Tiny()
    optimizer, reference = (OPTIMIZERS[name](model) for model in (ours, theirs))
    for at in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.tensor([at, 3])).backward()
        clipped_step(ours, optimizer, 0.1, clip)
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip) > 0.2
        optimizer_step(reference, 0.1, TRUE, None)
    assert_near(everything(ours, optimizer), everything(theirs, reference))  # moments tell how large gradients are


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_scale_in_the_gradients_leaves_no_trace_in_norm_and_moments(clip: float) -> None:
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for factor in (None, torch.tensor(1024.0)):
        model = Tiny()
        optimizer = build_adamw(AdamWArgs(), model.named_parameters())
        (model(torch.tensor([1, 2])) * (1 if factor is None else factor)).backward()
        norm, finite, divisor = grad_norm_and_clip_coef(model.parameters(), clip, factor)
        optimizer_step(optimizer, 0.01, finite, divisor)
        found.append((norm, everything(model, optimizer)))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert_near(found[1][1], found[0][1])


@pytest.mark.ranks
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "shape",
    [(1, 2), *(pytest.param(shape, marks=pytest.mark.soak) for shape in ((2, 1), (1, 3), (2, 2)))],
)
def test_every_layout_moves_as_one_rank_and_a_bad_gradient_holds_all_back(shape: tuple[int, int], name: str) -> None:
    def on_rank(rank: int) -> tuple[dict[str, Tensor], list[float], bool]:
        model = Tiny()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))
        mesh = mesh if shape[0] > 1 else mesh["dp_shard"]
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = OPTIMIZERS[name](model)
        norms = train(model, optimizer, 3)
        before = everything(model, optimizer)
        model(torch.tensor([1, 2])).backward()
        for parameter in model.parameters():
            assert isinstance(parameter.grad, DTensor)
            if rank % shape[1] == 0:  # one shard of each copy
                parameter.grad.to_local().fill_(float("nan"))
        clipped_step(model, optimizer, 0.1)
        return before, norms, same(everything(model, optimizer), before)

    alone = Tiny()
    optimizer = OPTIMIZERS[name](alone)
    expected_norms = train(alone, optimizer, 3)
    expected = everything(alone, optimizer)
    results = run_on_ranks(on_rank, shape[0] * shape[1])
    for state, norms, unmoved in results:
        assert unmoved
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert same(state, results[0][0])
        assert_near(state, expected)
