import pytest
import torch

from lingua.config.keys.optim import AdamWArgs
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
