"""The average of the weights moves with them, and only then."""

from __future__ import annotations

import torch
from torch import nn

from lingua.checkpoint.state import TrainState, start_optimizer, tensors_of
from lingua.config.keys.optim import AdamWArgs
from lingua.optim.adamw import build_adamw
from lingua.optim.ema import EMA, begin_ema
from lingua.optim.update import Updater


def test_the_average_follows_the_weights_and_stays_where_they_stay() -> None:
    layer, args = nn.Linear(2, 2), AdamWArgs(ema=0.9)
    optimizer = build_adamw(args, list(layer.named_parameters()))
    start_optimizer(optimizer)
    begin_ema(optimizer)
    updater = Updater(optimizer, layer.parameters(), args, torch.device("cpu"))
    expected = layer.weight.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (100, 0.9)):
        layer(torch.ones(2)).sum().backward()
        updater.step(0.1, updater.gradient(torch.ones(())), torch.ones(()), step=step)
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        torch.testing.assert_close(optimizer.state[layer.weight][EMA], expected)
    before = optimizer.state[layer.weight][EMA].clone()
    (layer(torch.ones(2)).sum() * float("nan")).backward()
    updater.step(0.1, updater.gradient(torch.ones(())), torch.ones(()), step=101)
    assert torch.equal(optimizer.state[layer.weight][EMA], before)


def test_the_average_is_a_part_of_the_state_and_begins_with_the_weights() -> None:
    layer = nn.Linear(2, 2)
    state = TrainState(layer, build_adamw(AdamWArgs(), list(layer.named_parameters())), has_ema=True)
    tensors = tensors_of(state).by_name
    assert torch.equal(tensors["optim.state.weight.ema"], layer.weight)
    assert tensors["optim.state.weight.ema"].data_ptr() != layer.weight.data_ptr()
