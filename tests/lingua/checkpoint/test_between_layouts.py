"""A checkpoint of any layout goes on in any other, bit for bit what was saved, and opens in stock torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from torch import Tensor

from lingua.checkpoint import layout
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState
from lingua.config.keys.checkpoint import CheckpointArgs, SaveEvery
from lingua.config.keys.model import CrossEntropyArgs
from lingua.config.keys.optim import AdamWArgs
from lingua.model.loss import CrossEntropy
from lingua.optim.adamw import build_adamw
from tests.layouts import LAYOUTS, build, whole
from tests.ranks import run_on_ranks
from tests.services import Services

STEP, SEQ_LEN = 2, 12
LOSS = CrossEntropy(CrossEntropyArgs())


class Training:
    """Four rows per step, whatever the layout."""

    def __init__(self, name: str, tied: bool) -> None:
        self.world = LAYOUTS[name].world()
        model = build(self.world, LAYOUTS[name].args, weight_tying=tied, n_layers=1)
        self.state = TrainState(model, build_adamw(AdamWArgs(), list(model.named_parameters())), shared={"step": 0})

    def step(self) -> None:
        state, dp_size = self.state, self.world.dp_size
        state.shared["step"] += 1
        generator = torch.Generator().manual_seed(state.shared["step"])
        rows = torch.randint(0, 257, (4, SEQ_LEN + 1), generator=generator)[self.world.dp_rank :: dp_size]
        loss, n_tokens = state.model(rows[:, :-1], labels=rows[:, 1:], loss=LOSS)
        (loss / n_tokens).backward()
        for group in state.optimizer.param_groups:
            group["lr"] = 0.01
        state.optimizer.step()
        state.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimizer state by name, whole. Collective."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.state.model.named_parameters():
            found[name] = whole(parameter)
            found |= {f"{name}.{key}": whole(value) for key, value in self.state.optimizer.state[parameter].items()}
        return found


def args(shm: Path | None = None) -> CheckpointArgs:
    where: dict[str, Any] = {} if shm is None else {"async_save_mode": "shm", "shm_path": str(shm), "linger_s": 0.0}
    return CheckpointArgs(dump=SaveEvery(every=1), eval=SaveEvery(every=0), **where)


def assert_moves(folder: Path, shm: Path, savers: Sequence[str], loaders: Sequence[str]) -> None:
    """Tied models through memory, others straight to the disk; each loader takes one of the two from each saver."""

    def save(name: str) -> dict[bool, dict[str, Tensor]]:
        saved = {}
        for tied in (True, False):
            training = Training(name, tied)
            start: dict[str, Any] = {"start_service": services.start} if tied else {}
            manager = CheckpointManager(args(shm if tied else None), folder / f"{name}-{tied}", **start)
            manager.prepare(training.state)
            for _ in range(STEP):
                training.step()
            assert manager.save(STEP, training.state, final=True).published
            saved[tied] = training.tensors()
            manager.close()
        return saved

    def load(name: str) -> dict[tuple[str, bool], dict[str, Tensor]]:
        """What comes after one more step; on the way, what is loaded must be what was saved."""
        after = {}
        for number, saver in enumerate(savers):
            tied = (number + loaders.index(name)) % 2 == 0
            training = Training(name, tied)
            manager = CheckpointManager(args(), folder / f"{saver}-{tied}")
            assert manager.latest() == STEP
            manager.load(STEP, training.state)
            loaded, expected = training.tensors(), saved[saver][tied]
            assert loaded.keys() == expected.keys()
            assert [n for n in loaded if not torch.equal(loaded[n], expected[n])] == []
            training.step()
            after[saver, tied] = training.tensors()
        return after

    with Services() as services:
        saved = {name: run_on_ranks(lambda rank, n=name: save(n), LAYOUTS[name].n_ranks)[0] for name in savers}
        assert services.wait() == 0
    for saver in savers:
        for tied in (True, False):
            assert_stock_torch_opens(folder / f"{saver}-{tied}", tied, saved[saver][tied])
    went_on: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for name in loaders:
        for case, tensors in run_on_ranks(lambda rank, n=name: load(n), LAYOUTS[name].n_ranks)[0].items():
            for key, tensor in went_on.setdefault(case, tensors).items():
                torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-5, msg=f"{name} of {case}: {key}")


def assert_stock_torch_opens(run_dir: Path, tied: bool, saved: dict[str, Tensor]) -> None:
    model = Training("one", tied).state.model
    loaded = {"model": model.state_dict()}
    stock.load(loaded, checkpoint_id=layout.folder(run_dir / layout.CHECKPOINTS, STEP), no_dist=True)
    assert [name for name, tensor in loaded["model"].items() if not torch.equal(tensor, saved[name])] == []


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore")  # stock torch's own
def test_from_tensor_parallel_ranks_to_shards_and_back(tmp_path: Path, shm: Path) -> None:
    assert_moves(tmp_path, shm, ["tp", "shards"], ["shards", "tp"])


@pytest.mark.ranks
@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_from_every_layout_to_every_layout(tmp_path: Path, shm: Path) -> None:
    assert_moves(tmp_path, shm, list(LAYOUTS), list(LAYOUTS))
