"""Within a step the host never waits for a GPU: shown without one, by tensors that have no content to wait for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lingua.checkpoint.state import TrainState, start_optimizer
from lingua.config.base import build_part
from lingua.config.command_line import parse_command_line
from lingua.config.keys.optim import AdamWArgs, OptimArgs
from lingua.data.loader import Batch
from lingua.distributed.parallelize import parallelize
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import StepReduce, World
from lingua.optim import adamw
from lingua.optim.ema import begin_ema
from lingua.optim.update import LossScale, Updater
from lingua.train.build import build_loss, build_updater, fresh_shared
from lingua.train.check import load
from lingua.train.learner import Learner
from tests.lingua.optim.tiny import OPTIMIZERS, Tiny
from tests.no_waiting import HostWaitError, NoWaiting

META, CUDA = torch.device("meta"), torch.device("cuda", 0)
DOCUMENTS = "data.doc_mask=true"


def learner_of(config: str, words: list[str], folder: Path) -> Learner:
    """A learner as `build_run` makes it, without compile; its rows are zeros."""
    small = ["data.seq_len=32", "data.batch_size=2", "data.lanes=12", "grad_acc_steps=2", "distributed.compile=false"]
    words = [f"apps/{config}", *small, f"dump_dir={folder}", *words]
    phase = load(parse_command_line(words), world_size=1).phases[0]
    args, size, world = phase.args, phase.size, World(RankInfo(), META, mesh=None)
    sized: dict[str, Any] = {"vocab_size": size.vocab_size, "max_seqlen": size.max_seqlen}
    with META:
        model = parallelize(build_part(args.model.model_copy(update=sized)), args.distributed, world)
    optimizer = build_part(args.optim, list(model.named_parameters()))
    state = TrainState(model, optimizer, shared=fresh_shared())
    shape = (args.data.batch_size, args.data.seq_len)
    doc_ids = np.zeros(shape, dtype=np.int32) if args.data.doc_mask else None
    batch: Any = Batch(np.zeros((args.data.n_views, *shape), dtype=np.int32), doc_ids, np.arange(shape[0]))
    loader: Any = iter(lambda: batch, None)
    nothing: Any = None
    return Learner(
        phases=[phase], phase=phase, world=world, tokenizer=nothing, model=model, loss=build_loss(args),
        updater=build_updater(args, state, META), loader=loader, state=state, resources=ExitStack(),
    )  # fmt: skip


LLAMA, XLSTM = "main/configs/bytes.yaml", "xlstm/configs/debug.yaml"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA, []),
        (LLAMA, [DOCUMENTS]),
        (LLAMA, ["model.vocab_multiple_of=64", "loss.z_loss=1e-4", "loss.chunk_tokens=16"]),
        (LLAMA, ["distributed.full_activation_checkpointing=true"]),
        (LLAMA, ["distributed.selective_activation_checkpointing=true"]),
        ("mamba/configs/debug.yaml", [DOCUMENTS]),
        ("fastRNN/configs/mingru_debug.yaml", []),
        ("fastRNN/configs/minlstm_debug.yaml", []),
        ("fastRNN/configs/hawk_debug.yaml", [DOCUMENTS]),
        (XLSTM, [DOCUMENTS]),
        (XLSTM, ["model.type=mlstm_v0"]),
        (XLSTM, ["model.type=slstm", "data.seq_len=4"]),
        ("mtp/configs/debug.yaml", [DOCUMENTS]),
        ("diffusion/configs/debug.yaml", []),
    ],
)
def test_in_forward_and_backward(
    config: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_device(self: Learner, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(META, non_blocking=True)

    monkeypatch.setattr(Learner, "_to_device", to_device)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # nor does it know this device
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: nullcontext())
    learner = learner_of(config, words, tmp_path)
    batches = learner.batches()
    with NoWaiting():
        for _ in range(learner.size.grad_acc_steps):
            learner.backward(learner.forward(next(batches)))
        gradient = learner.gradient()
    assert gradient.norm.device == META


# -- the update ------------------------------------------------------------------------------------------------------


def on_fake_gpu(build: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with gradients, and its optimizer with state. Call within a FakeTensorMode."""
    with CUDA:
        model = Tiny()
    optimizer = build(model)
    start_optimizer(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, optimizer


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_compiled_move", lambda: adamw._move)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("keys", [{}, {"clip": 0.0, "on_nonfinite": "skip"}, {"ema": 0.99}])
@pytest.mark.parametrize("is_fp16", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_the_update(name: str, is_fp16: bool, keys: dict[str, Any], uncompiled: None) -> None:
    with FakeTensorMode():
        model, optimizer = on_fake_gpu(OPTIMIZERS[name])
        args: OptimArgs = AdamWArgs.model_validate(keys)
        if args.ema is not None:
            begin_ema(optimizer)
        updater = Updater(optimizer, model.parameters(), args, CUDA, LossScale(CUDA) if is_fp16 else None)
        loss, share = torch.ones((), device=CUDA), torch.ones((), device=CUDA)
        with NoWaiting():
            report = updater.step(0.1, updater.gradient(share), loss, step=3, limit=2.0)
        assert {number.device for number in report.values()} == {CUDA}


def test_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    event = SimpleNamespace(record=lambda: said.append("record"), synchronize=lambda: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    with FakeTensorMode(), NoWaiting():
        numbers = {"loss/out": torch.ones((), device=CUDA, dtype=torch.float64), "stop": 1.0}
        assert StepReduce(CUDA).submit("step 1", numbers) is None
    assert said == ["record"]


class Kernels(TorchDispatchMode):
    """Counts operators that are no views; one for many tensors counts once."""

    n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += function.namespace == "aten" and not function.is_view
        return function(*args, **(kwargs or {}))


def test_bf16_moments_take_one_kernel_per_parameter_and_few_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []
    monkeypatch.setattr(adamw, "_compiled_move", lambda: lambda parameter, *rest: moved.append(parameter))
    with FakeTensorMode():
        _, optimizer = on_fake_gpu(OPTIMIZERS["adamw with moments in bf16"])
        with Kernels() as of_all:
            optimizer.step()
        n_parameters = len(moved) // 2  # half were moved when the state was made
        for group in optimizer.param_groups:
            for parameter in group["params"][1:]:
                parameter.grad = None
        with Kernels() as of_one_each:
            optimizer.step()
    assert n_parameters > len(optimizer.param_groups) + 5
    assert len(moved) == 2 * n_parameters + len(optimizer.param_groups)
    assert of_all.n == of_one_each.n <= 16 * len(optimizer.param_groups)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.item(),
        lambda x: bool(x),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x.new_ones(3)[x.new_ones(3) > 0],
        lambda x: torch.ones((), device="cpu").to(x.device),
        lambda x: x.copy_(torch.ones((), device="cpu")),
        lambda x: torch.ones((), device="cpu").copy_(x),
    ],
)
@pytest.mark.parametrize("device", [META, CUDA])
def test_waiting_would_be_seen(waits: Callable[[Tensor], object], device: torch.device) -> None:
    errors = (HostWaitError, NotImplementedError, RuntimeError)
    with FakeTensorMode() if device == CUDA else nullcontext(), NoWaiting():
        x = torch.ones((), device=device)
        x.to(device, torch.bfloat16).add_(1)
        if device == CUDA:
            x.to("cpu", non_blocking=True)
        with pytest.raises(errors):
            waits(x)
