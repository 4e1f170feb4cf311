"""Which loss is a spike, by tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lingua.config.keys.optim import AdamWArgs, SpikeArgs
from lingua.optim.adamw import build_adamw
from lingua.optim.spikes import RECENT, Recent, limit_to_skip, remember, spike_limit
from lingua.optim.update import Updater

ARGS = SpikeArgs(threshold=2, window=2, action="skip")


@pytest.mark.parametrize(
    ("recent", "step", "limit"),
    [
        ([], 1, math.inf),
        ([[1, 4.0]], 3, math.inf),
        ([[1, 4.0], [2, 2.0]], 3, math.inf),  # the loss of step 2 is not known yet when step 3 updates
        ([[1, 4.0], [2, 2.0]], 4, 5.0),  # mean 3, deviation 1
        ([[1, 4.0], [2, 2.0], [3, 9.0]], 4, 5.0),  # although it is known here, since a save waited for it
        ([[1, 9.0], [3, 4.0], [4, 2.0]], 6, 5.0),  # the newest ones; step 2 was skipped
    ],
)
def test_the_limit_depends_on_the_losses_up_to_the_last_but_one(recent: Recent, step: int, limit: float) -> None:
    assert spike_limit(recent, step, ARGS) == limit
    assert limit_to_skip({RECENT: recent}, step, ARGS) == limit
    assert limit_to_skip({RECENT: recent}, step, ARGS.model_copy(update={"action": "warn"})) == math.inf


def test_the_losses_of_an_earlier_phase_do_not_count() -> None:
    recent = [[1, 4.0], [2, 2.0], [3, 9.0], [4, 7.0], [5, 1.0]]
    assert [spike_limit(recent, 6, ARGS, begin) for begin in (1, 2, 3)] == [10.0, 10.0, math.inf]
    assert limit_to_skip({RECENT: recent}, 6, ARGS, 3) == math.inf


def test_what_is_remembered_suffices_for_every_later_limit() -> None:
    everything: Recent = []
    kept: Recent = []
    for step in range(1, 9):
        assert spike_limit(kept, step, ARGS) == spike_limit(everything, step, ARGS)
        everything, kept = [*everything, [step, step**0.5]], remember(kept, step, step**0.5, ARGS)
    assert len(kept) == 3


@pytest.mark.parametrize(("loss", "moves"), [(1.0, True), (1.5, True), (2.0, False)])
def test_a_loss_above_the_limit_moves_nothing(loss: float, moves: bool) -> None:
    layer, args = nn.Linear(2, 2), AdamWArgs()
    updater = Updater(build_adamw(args, list(layer.named_parameters())), layer.parameters(), args, torch.device("cpu"))
    before = layer.weight.detach().clone()
    layer(torch.ones(2)).sum().backward()
    report = updater.step(0.1, updater.gradient(torch.ones(())), torch.tensor(loss), limit=1.5)
    assert bool(report["unmoved"]) is bool(report["spiked"]) is not moves
    assert torch.equal(layer.weight, before) is not moves
