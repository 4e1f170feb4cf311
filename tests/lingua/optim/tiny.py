"""A model small enough to follow by hand, and steps of any optimizer on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lingua.checkpoint.state import TrainState, tensors_of
from lingua.config.keys.optim import AdamWArgs, MuonArgs
from lingua.optim.adamw import build_adamw
from lingua.optim.muon import build_muon
from lingua.optim.update import grad_norm_and_clip_coef, optimizer_step
from tests.tiny import whole

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: build_adamw(AdamWArgs(weight_decay=0.1), model.named_parameters()),
    "adamw with moments in bf16": lambda model: build_adamw(
        AdamWArgs(weight_decay=0.1, state_dtype="bf16"), model.named_parameters()
    ),
    "muon": lambda model: build_muon(MuonArgs(ns_dtype="fp32", weight_decay=0.1), model.named_parameters()),
}


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


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, moments and counters, whole."""
    return {name: whole(tensor) for name, tensor in tensors_of(TrainState(model, optimizer)).by_name.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-4, atol=1e-6, msg=name)


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> Tensor:
    """One update by the gradients that are there; returns their norm."""
    norm, finite, divisor = grad_norm_and_clip_coef(model.parameters(), clip)
    optimizer_step(optimizer, lr, finite, divisor)
    optimizer.zero_grad()
    return norm


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int, first: int = 0) -> list[float]:
    """Returns the norms of the gradients."""
    norms = []
    for step in range(first, first + n_steps):
        model(torch.tensor([step % 7, 3, 5])).backward()
        norms.append(clipped_step(model, optimizer, 0.01 * (step + 1)).item())
    return norms
