import pytest
import torch
from torch import Tensor, nn

from lingua.profiling.first_nonfinite import first_nonfinite, grad_norms, group_of, nonfinite_names


class Broken(nn.Module):
    """Spoils what goes through it, forward or backward."""

    def __init__(self, forward: bool, backward: bool) -> None:
        super().__init__()
        self.spoils_forward, self.spoils_backward = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        if self.spoils_backward:
            x = (x - x).sqrt() + x  # the derivative of a root at 0 is infinite
        return x / 0 if self.spoils_forward else x


class Block(nn.Module):
    def __init__(self, inner: nn.Module, spoil: bool = False) -> None:
        super().__init__()
        self.w1, self.inner, self.w2, self.spoil = nn.Linear(3, 3), inner, nn.Linear(3, 3), spoil

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.w1(x))
        return self.w2(x * float("inf") if self.spoil else x)


def model(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.Sequential(*blocks), "norm": nn.LayerNorm(3)})


def run(net: nn.Module) -> Tensor:
    return net.get_submodule("norm")(net.get_submodule("layers")(torch.ones(2, 3, requires_grad=True))).sum()


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ([Block(nn.Identity()), Block(nn.Identity())], None),
        ([Block(nn.Identity()), Block(Broken(True, False))], "layers.1.inner (Broken): its output"),
        # between two modules, in no module of its own
        ([Block(nn.Identity(), spoil=True), Block(nn.Identity())], "layers.0.w2 (Linear): its input"),
    ],
)
def test_the_innermost_module_that_was_first_is_named(blocks: list[nn.Module], found: str | None) -> None:
    net = model(*blocks)
    with first_nonfinite(net) as watch:
        run(net)
        assert watch.forward == found
        watch.clear()
        assert watch.forward is None


def test_a_gradient_that_is_lost_on_its_way_back_is_found() -> None:
    net = model(Block(nn.Identity()), Block(Broken(False, True)))
    with first_nonfinite(net) as watch:
        run(net).backward()
    assert watch.forward is None
    assert watch.backward == "layers.1.w1 (Linear): the gradient of its output"


def test_the_watch_leaves_nothing_behind() -> None:
    net = model(Block(Broken(True, False)))
    with first_nonfinite(net) as watch:
        pass
    run(net)
    assert watch.forward is None
    assert not any(module._forward_hooks for module in net.modules())


def test_norms_are_by_layer_in_the_models_order() -> None:
    net = model(Block(nn.Identity()), Block(nn.Identity()))
    run(net).backward()
    norms = grad_norms(net)
    assert list(norms) == ["layers.0", "layers.1", "norm"]
    squares = sum(p.grad.square().sum() for p in net.get_submodule("layers.1").parameters() if p.grad is not None)
    assert norms["layers.1"] == pytest.approx(float(squares) ** 0.5)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("layers.12.attention.wq.weight", "layers.12"),
        ("tok_embeddings.weight", "tok_embeddings"),
        ("output.weight", "output"),
    ],
)
def test_the_layer_of_a_parameter(name: str, group: str) -> None:
    assert group_of(name) == group


def test_names_of_what_is_not_finite() -> None:
    bad = torch.tensor([1.0, float("nan")])
    assert nonfinite_names([("a", torch.ones(2)), ("b", bad), ("c", torch.ones(2, dtype=torch.int64))]) == ["b"]
