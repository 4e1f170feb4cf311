"""A tiny model with an optimizer, trained from step numbers alone: equal steps give equal bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lingua.checkpoint.state import TrainState

VOCAB, DIM = 7, 4  # 7 is divisible by neither 2 nor 3


class TinyLM(nn.Module):
    def __init__(self, tied: bool, dim: int = DIM) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleDict({"0": nn.Linear(dim, dim), "1": nn.Linear(dim, dim)})
        self.output = nn.Linear(dim, VOCAB, bias=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            hidden = torch.tanh(layer(hidden))
        return self.output(hidden)


def make(tied: bool = False, shard: bool = False, dim: int = DIM, **shared: object) -> TrainState:
    torch.manual_seed(1)
    model = TinyLM(tied, dim)
    if shard:
        for layer in model.layers.values():
            fully_shard(layer)
        fully_shard(model)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return TrainState(model, torch.optim.AdamW(groups, lr=0.0, fused=True), shared=dict(shared))


def train(state: TrainState, first: int, last: int) -> None:
    """Steps first..last; the learning rate of a step is set after the one before, as schedulers do."""
    for step in range(first, last + 1):
        tokens = torch.randint(VOCAB, (3, 5), generator=torch.Generator().manual_seed(step))
        state.model(tokens).float().logsumexp(-1).sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        for group in state.optimizer.param_groups:
            group["lr"] = 0.01 * step
    state.shared["step"] = last


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def snapshot(state: TrainState) -> dict[str, Tensor]:
    weights = {name: whole(tensor) for name, tensor in state.model.state_dict().items()}
    names = {id(p): name for name, p in state.model.named_parameters()}
    for parameter, slots in state.optimizer.state.items():
        weights |= {f"{names[id(parameter)]}.{key}": whole(value) for key, value in slots.items()}
    return weights


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
