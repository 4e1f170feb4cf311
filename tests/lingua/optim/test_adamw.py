import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lingua.config.keys.optim import AdamWArgs
from lingua.optim.adamw import build_adamw
from lingua.optim.update import Gradient, grad_norm_and_clip_coef, optimizer_step
from tests.ranks import run_on_ranks

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(5, 4)
        self.w = nn.Linear(4, 3, bias=False)
        self.norm = nn.LayerNorm(4, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.w(self.norm(self.tok_embeddings(tokens))).square().sum()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, moments and counters."""
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq", "step")]
    return [whole(tensor) for tensor in [*model.parameters(), *moments]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def take_step(optimizer: torch.optim.Optimizer, gradient: Gradient, lr: float = 0.01) -> None:
    optimizer_step(optimizer, lr, gradient.finite, gradient.divisor)


@pytest.mark.parametrize(
    ("decay_all", "decayed"), [(False, {"w.weight"}), (True, {"w.weight", "tok_embeddings.weight", "norm.weight"})]
)
def test_norms_and_embeddings_are_decayed_only_when_asked(decay_all: bool, decayed: set[str]) -> None:
    optimizer = build_adamw(AdamWArgs(decay_all=decay_all, weight_decay=0.3), Tiny().named_parameters())
    found = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {name for name, decay in found.items() if decay == 0.3} == decayed
    assert {name for name, decay in found.items() if decay == 0.0} == found.keys() - decayed


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        build_adamw(AdamWArgs(), [])


def test_steps_equal_a_plain_adamw() -> None:
    ours, theirs = Tiny(), Tiny()
    optimizer = build_adamw(AdamWArgs(weight_decay=0.1, decay_all=True), ours.named_parameters())
    reference = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(5):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.tensor([step % 5, 3])).backward()
        optimizer_step(optimizer, 0.01 * step, TRUE, None)
        reference.param_groups[0]["lr"] = 0.01 * step
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(poison: float, first: bool) -> None:
    model = Tiny()
    optimizer = build_adamw(AdamWArgs(), model.named_parameters())
    if not first:
        model(torch.tensor([1, 2])).backward()
        optimizer_step(optimizer, 0.01, TRUE, None)
    before = everything(model, optimizer)
    model(torch.tensor([1, 2])).backward()
    assert model.w.weight.grad is not None
    model.w.weight.grad[0, 0] = poison
    norm, finite, divisor = grad_norm_and_clip_coef(model.parameters(), 1.0)
    assert not finite
    assert not norm.isfinite()
    optimizer_step(optimizer, 0.01, finite, divisor)
    optimizer.zero_grad()
    after = everything(model, optimizer)
    assert same(after[:3], before[:3])
    assert all(not moment.any() for moment in after[3:]) if first else same(after, before)

    # and the next good step is as if the bad one had never been
    twin = copy.deepcopy(model)
    twin_optimizer = build_adamw(AdamWArgs(), twin.named_parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()) if not first else twin_optimizer.state_dict())
    for each, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        each(torch.tensor([1, 2])).backward()
        take_step(its_optimizer, grad_norm_and_clip_coef(each.parameters(), 1.0))
    assert same(everything(model, optimizer), everything(twin, twin_optimizer))
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")


def test_an_optimizer_without_fused_kernels_is_held_back_too() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.tensor([1, 2])).backward()
    before = [whole(p) for p in model.parameters()]
    optimizer_step(optimizer, 0.1, FALSE, None)
    assert same([whole(p) for p in model.parameters()], before)
    optimizer_step(optimizer, 0.1, TRUE, None)
    assert not same([whole(p) for p in model.parameters()], before)


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
@pytest.mark.parametrize("fused", [True, False])
def test_steps_equal_those_by_gradients_that_torch_has_clipped(clip: float, fused: bool) -> None:
    ours, theirs = Tiny(), Tiny()

    def build(model: nn.Module) -> torch.optim.Optimizer:
        adamw = build_adamw(AdamWArgs(), model.named_parameters())
        return adamw if fused else torch.optim.SGD(model.parameters(), momentum=0.9)

    optimizer, reference = build(ours), build(theirs)
    for at in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.tensor([at, 3])).backward()
        take_step(optimizer, grad_norm_and_clip_coef(ours.parameters(), clip))
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        for group in reference.param_groups:
            group["lr"] = 0.01
        reference.step()
    # AdamW's updates hardly tell how large gradients are; its moments do.
    moments = "momentum_buffer" if not fused else "exp_avg_sq"
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(optimizer.state[mine][moments], reference.state[other][moments], atol=0, rtol=1e-5)


def _train(layout: str, steps: int = 3) -> tuple[list[Tensor], list[float], bool]:
    """A few steps of Tiny and then a poisoned one; returns the state, the norms, and whether the last left a trace."""
    model = Tiny()
    if layout == "sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if layout == "hybrid":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
        fully_shard(model, mesh=mesh)
    optimizer, norms = build_adamw(AdamWArgs(), model.named_parameters()), []
    before: list[Tensor] = []
    for step in range(steps + 1):
        before = everything(model, optimizer)
        model(torch.tensor([step, 4])).backward()
        if step == steps and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            gradient = model.tok_embeddings.weight.grad
            assert gradient is not None
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0, 0] = float("nan")
        gradient = grad_norm_and_clip_coef(model.parameters(), 0.1)
        norms.append(gradient.norm.item())
        take_step(optimizer, gradient)
        optimizer.zero_grad()
    return before, norms[:steps], same(everything(model, optimizer), before)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["sharded", "hybrid"])
def test_sharded_steps_equal_whole_ones_and_a_bad_gradient_on_one_rank_stops_all(layout: str) -> None:
    expected, expected_norms, unmoved = _train("whole")
    assert unmoved
    for state, norms, rank_unmoved in run_on_ranks(lambda rank: _train(layout), 2):
        # In the hybrid layout only rank 0's copy is poisoned after the reduction, so only that rank is held back.
        assert rank_unmoved or layout == "hybrid"
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        for ours, theirs in zip(state, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_loss_scale_leaves_no_trace_in_norm_and_moments(clip: float) -> None:
    found: list[tuple[Tensor, list[Tensor]]] = []
    for factor in (None, torch.tensor(1024.0)):
        model = Tiny()
        optimizer = build_adamw(AdamWArgs(), model.named_parameters())
        (model(torch.tensor([1, 2])) * (1 if factor is None else factor)).backward()
        gradient = grad_norm_and_clip_coef(model.parameters(), clip, factor)
        assert gradient.finite
        take_step(optimizer, gradient)
        found.append((gradient.norm, everything(model, optimizer)))
    (norm, state), (scaled_norm, scaled_state) = found
    torch.testing.assert_close(scaled_norm, norm)
    for mine, other in zip(scaled_state, state, strict=True):
        torch.testing.assert_close(mine, other, atol=0, rtol=1e-5)
