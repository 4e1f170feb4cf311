from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lingua.config.keys.optim import AdamWArgs
from lingua.optim import adamw
from lingua.optim.adamw import build_adamw
from lingua.optim.update import optimizer_step
from tests.lingua.optim.tiny import TRUE, Tiny


@pytest.mark.parametrize(
    ("decay_all", "decayed"),
    [(False, {"layers", "output"}), (True, {"layers", "output", "tok_embeddings", "norm"})],
)
def test_norms_and_embeddings_are_decayed_only_when_asked(decay_all: bool, decayed: set[str]) -> None:
    optimizer = build_adamw(AdamWArgs(decay_all=decay_all, weight_decay=0.3), Tiny().named_parameters())
    found = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    matrices = {name: decay for name, decay in found.items() if not name.endswith("bias")}
    assert {name.split(".")[0] for name, decay in matrices.items() if decay == 0.3} == decayed
    assert {decay for name, decay in found.items() if name.endswith("bias")} == {0.3 if decay_all else 0.0}


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


def trained(state_dtype: str, n_steps: int) -> tuple[Tiny, torch.optim.Optimizer]:
    model = Tiny()
    args = AdamWArgs.model_validate({"weight_decay": 0.1, "state_dtype": state_dtype})
    optimizer = build_adamw(args, model.named_parameters())
    for step in range(n_steps):
        model(torch.tensor([step % 7, 3])).backward()
        optimizer_step(optimizer, 0.01, TRUE, torch.tensor(2.0))
        optimizer.zero_grad()
    return model, optimizer


def test_moments_in_bf16_change_a_step_by_their_rounding_only() -> None:
    start = Tiny()
    for n_steps, tolerance in ((1, 1e-5), (20, 0.02)):  # the first step uses no rounded moment
        (exact, _), (rounded, optimizer) = trained("fp32", n_steps), trained("bf16", n_steps)
        for name, parameter in rounded.named_parameters():
            expected = exact.get_parameter(name)
            largest = (expected - start.get_parameter(name)).abs().max()
            assert (parameter - expected).abs().max() <= tolerance * largest, name
        dtypes = {key: slot.dtype for slots in optimizer.state.values() for key, slot in slots.items()}
        assert dtypes == {"step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}


def test_a_step_compiles_to_one_graph_of_tensors_of_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[list[Any]] = []
    torch._dynamo.reset()
    compiled = torch.compile(
        adamw._move,  # pyright: ignore[reportPrivateUsage]
        dynamic=True,
        fullgraph=True,
        backend=lambda graph, inputs: graphs.append(inputs) or graph.forward,
    )
    (plain, _) = trained("bf16", 3)
    monkeypatch.setattr(adamw, "_move", compiled)
    (model, optimizer) = trained("bf16", 3)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    reduced = torch.zeros(sum(parameter.numel() for parameter in parameters))
    begin = 0
    for parameter in parameters:  # as FSDP2 leaves them: views of what one reduction gave
        parameter.grad = reduced.as_strided(parameter.shape, parameter.stride(), begin)
        begin += parameter.numel()
    optimizer_step(optimizer, 0.01, TRUE, None)
    (inputs,) = graphs  # of all shapes, with weight decay and without
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    assert {each.dtype for each in tensors} == {torch.float32, torch.bfloat16, torch.bool}  # fp64: a Python float
    assert all(isinstance(each, int | torch.SymInt) for each in inputs if not isinstance(each, Tensor))
    torch._dynamo.reset()


def test_a_rank_without_a_part_of_a_parameter_compiles_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.zeros(0, 4))
    parameter.grad = torch.zeros(0, 4)
    optimizer = build_adamw(AdamWArgs(state_dtype="bf16"), [("w.weight", parameter)])
    monkeypatch.setattr(adamw, "_move", lambda *tensors: pytest.fail("nothing is there to move"))
    optimizer_step(optimizer, 0.01, TRUE, None)
    assert optimizer.state[parameter]["step"] == 1


def test_a_second_moment_that_rounding_would_stop_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"state_dtype bf16 with beta2 0\.999: .*set beta2 to 0\.98 or less"):
        AdamWArgs(state_dtype="bf16", beta2=0.999)
