import pytest
import torch
from pydantic import ValidationError

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


def test_a_step_compiles_to_one_graph_with_weight_decay_and_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(
        adamw._move,  # pyright: ignore[reportPrivateUsage]
        dynamic=True,
        fullgraph=True,
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
    )
    (plain, _) = trained("bf16", 3)
    monkeypatch.setattr(adamw, "_move", compiled)
    (model, _) = trained("bf16", 3)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_a_second_moment_that_rounding_would_stop_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"state_dtype bf16 with beta2 0\.999: .*set beta2 to 0\.98 or less"):
        AdamWArgs(state_dtype="bf16", beta2=0.999)
