"""The predicted step adds up from its parts, and a part grows with what it depends on."""

from __future__ import annotations

import pytest
import step_budget as budget

from lingua.config.base import ConfigError

ONE_GPU = ["apps/main/configs/llama_1B_8H200.yaml", "grad_acc_steps=1", "distributed.dp_replicate=null"]


@pytest.mark.parametrize(
    ("shape", "seconds"),
    [
        ((128 * 132, 256, 8192), 2 * 128 * 132 * 256 * 8192 / 788e12),  # one full wave of tiles
        ((128 * 133, 256, 8192), 2 * 2 * 128 * 132 * 256 * 8192 / 788e12),  # one tile more needs a second one
        ((1, 256, 8192), 2 * (8192 + 256 * 8192 + 256) / 4.3e12),  # bytes, not arithmetic
    ],
)
def test_a_product_takes_whole_waves_or_its_bytes(shape: tuple[int, int, int], seconds: float) -> None:
    wide = budget.product_s(*shape, rates=budget.Rates(memory=4.3e12))
    assert wide == pytest.approx(seconds, rel=0.01)


def test_a_step_is_its_parts_and_its_gaps() -> None:
    found = budget.predict([*ONE_GPU, "data.batch_size=24"], "h200")
    assert sum(ms for name, ms in found.items() if name.endswith(", ms")) == pytest.approx(1000 * found["step_s"])
    assert 0.4 < found["mfu"] < 788 / 989.5  # a whole step is never faster than its largest products
    small = budget.predict([*ONE_GPU, "data.batch_size=8"], "h200")
    assert small["mfu"] < found["mfu"]
    assert small["clipping and AdamW, ms"] == found["clipping and AdamW, ms"]
    recomputed = budget.predict(
        [*ONE_GPU, "data.batch_size=24", "distributed.full_activation_checkpointing=true"], "h200"
    )
    assert recomputed["mfu"] < found["mfu"]
    assert recomputed["layers' products, ms"] == pytest.approx(4 / 3 * found["layers' products, ms"], rel=0.02)


def test_what_the_budget_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no known peak; write h200"):
        budget.predict(ONE_GPU, "NVIDIA H200 MIG 1g.18gb")
    with pytest.raises(ConfigError, match="the budget knows Llamas only"):
        budget.predict(["apps/mamba/configs/mamba_1B.yaml"], "h200")
