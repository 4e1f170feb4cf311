"""What a state consists of: names without wrappers, a fresh optimizer started without a trace, scalars as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import orjson
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lingua.checkpoint.state import (
    TrainState,
    clean_name,
    model_tensors,
    restore_scalars,
    scalars_of,
    start_optimizer,
    tensors_of,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "adamw fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.1, foreach=True),
    "adamw tensor lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1)),
    "adam amsgrad": partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for step in range(3):
        net(torch.rand(5, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_starting_an_optimizer_leaves_no_trace(name: str) -> None:
    plain, started = model(), model()
    optimizer = OPTIMIZERS[name](started.parameters())
    before = [parameter.detach().clone() for parameter in started.parameters()]
    start_optimizer(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, started.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in started.parameters())
    expected = train(plain, OPTIMIZERS[name](plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, train(started, optimizer), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scalars_survive_json(name: str) -> None:
    first, second = model(), model()
    state = TrainState(first, OPTIMIZERS[name](first.parameters()), shared={"step": 3}, per_rank={"data": {"0": 1}})
    train(first, state.optimizer)
    state.optimizer.param_groups[0]["lr"] = 0.025
    document = orjson.loads(orjson.dumps(scalars_of(state, 0, 1)))
    other = TrainState(second, OPTIMIZERS[name](second.parameters()))
    start_optimizer(other.optimizer)
    restore_scalars(other, [document], 0, 1)
    assert float(other.optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    assert other.shared == {"step": 3}
    assert other.per_rank == {"data": {"0": 1}}


def test_wrappers_leave_no_trace_in_names() -> None:
    class Compiled(nn.Module):
        """Names as torch.compile(module) gives them."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    net = model()
    names = set(model_tensors(net)[0])
    wrapped = nn.Sequential(checkpoint_wrapper(net[0]), net[1], Compiled(Compiled(net[2])))
    assert set(model_tensors(Compiled(wrapped))[0]) == names
    assert clean_name("layers.0._checkpoint_wrapped_module._orig_mod.w") == "layers.0.w"


def test_tied_weights_have_one_tensor_and_two_names() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    net["b"].weight = net["a"].weight  # pyright: ignore[reportArgumentType]
    found = tensors_of(TrainState(net, torch.optim.SGD(net.parameters())))
    assert list(found.by_name) == ["model.a.weight"]
    assert found.aliases == {"model.b.weight": "model.a.weight"}
    assert found.paths["model.b.weight"] == ("model", "b.weight")


def test_what_cannot_be_saved_is_told() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters())
    optimizer.state[next(net.parameters())]["history"] = [1, 2]
    with pytest.raises(TypeError, match="optimizer state 'history' is a list: only tensors and numbers"):
        scalars_of(TrainState(net, optimizer), 0, 1)


def test_numbers_in_the_optimizer_state_come_back() -> None:
    net, other = model(), model()
    optimizer = torch.optim.SGD(net.parameters())
    optimizer.state[next(net.parameters())]["count"] = 7
    document = scalars_of(TrainState(net, optimizer), 0, 1)
    target = torch.optim.SGD(other.parameters())
    target.state[next(other.parameters())]["count"] = 0
    restore_scalars(TrainState(other, target), [document], 0, 1)
    assert target.state[next(other.parameters())]["count"] == 7


@pytest.fixture(autouse=True)
def _same_rng() -> Iterator[None]:
    """restore_scalars sets the process's generators; other tests need not notice."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)
