"""The predicted step adds up from its parts, and a part grows with what it depends on."""

from __future__ import annotations

import pytest

from lingua.config.command_line import parse_command_line
from lingua.config.keys.model import LlamaArgs
from lingua.train import step_time
from lingua.train.check import load

ONE_B = "apps/main/configs/llama_1B_8H200.yaml"


@pytest.mark.parametrize(
    ("shape", "seconds"),
    [
        ((128 * 132, 256, 8192), 2 * 128 * 132 * 256 * 8192 / 788e12),  # one full wave of tiles
        ((128 * 133, 256, 8192), 2 * 2 * 128 * 132 * 256 * 8192 / 788e12),  # one tile more needs a second one
        ((1, 256, 8192), 2 * (8192 + 256 * 8192 + 256) / 4.3e12),  # bytes, not arithmetic
    ],
)
def test_a_product_takes_whole_waves_or_its_bytes(shape: tuple[int, int, int], seconds: float) -> None:
    wide = step_time.product_s(*shape, rates=step_time.Rates(memory=4.3e12))
    assert wide == pytest.approx(seconds, rel=0.01)


def parts_of(*words: str) -> dict[str, float]:
    checked = load(parse_command_line([ONE_B, "distributed.dp_shard=1", *words]), world_size=1)
    assert isinstance(checked.args.model, LlamaArgs)
    return step_time.step_parts(checked.args.model, checked.args.distributed, checked.resolved)


def test_a_part_grows_with_what_it_depends_on() -> None:
    large, small = parts_of(), parts_of("data.batch_size=8")
    assert small["clipping and AdamW"] == large["clipping and AdamW"]
    assert large["attention"] == pytest.approx(3 * small["attention"])
    assert sum(large.values()) < 3 * sum(small.values())
    recomputed = parts_of("distributed.full_activation_checkpointing=true")
    assert recomputed["layers' products"] == pytest.approx(4 / 3 * large["layers' products"], rel=0.02)
    halved = parts_of("optim.state_dtype=bf16")
    assert halved["clipping and AdamW"] == pytest.approx(24 / 32 * large["clipping and AdamW"])
    assert large["gaps"] == pytest.approx(0.03 * sum(large.values()))
    twice = parts_of("data.batch_size=8", "grad_acc_steps=2")
    assert twice["head's products"] == pytest.approx(2 * small["head's products"])


def test_shards_divide_the_update_alone() -> None:
    def over(n_shards: int) -> dict[str, float]:
        layout = [f"distributed.dp_shard={n_shards}", f"distributed.dp_replicate={8 // n_shards}"]
        checked = load(parse_command_line([ONE_B, *layout]), world_size=8)
        assert isinstance(checked.args.model, LlamaArgs)
        return step_time.step_parts(checked.args.model, checked.args.distributed, checked.resolved)

    one, eight = over(1), over(8)
    assert eight["clipping and AdamW"] == pytest.approx(one["clipping and AdamW"] / 8)
    assert eight["attention"] == one["attention"]


@pytest.mark.parametrize(
    ("state_bytes", "n_ranks", "copy_s", "wait_s"),
    [(11e9, 1, 0.2, 0.0), (110e9, 1, 2.0, 1.2), (110e9, 8, 0.25, 0.0)],
)
def test_the_update_waits_for_what_is_copied_after_the_backward_pass(
    state_bytes: float, n_ranks: int, copy_s: float, wait_s: float
) -> None:
    parts = {"attention": 0.7, "clipping and AdamW": 0.3, "gaps": 0.1}
    assert step_time.staging_s(state_bytes, n_ranks, parts) == pytest.approx((copy_s, wait_s))


@pytest.mark.parametrize(
    ("words", "gpu"),
    [
        (["distributed.model_dtype=fp32"], "h200"),
        (["+muon"], "h200"),
        (["distributed.float8_recipe=rowwise"], "h200"),
        (["distributed.activation_memory_budget=0.5"], "h200"),
        ([], "h100"),
    ],
)
def test_what_was_not_predicted_is_not_guessed(words: list[str], gpu: str) -> None:
    assert step_time.is_known(load(parse_command_line([ONE_B]), world_size=8).args, "h200")
    assert not step_time.is_known(load(parse_command_line([ONE_B, *words]), world_size=8).args, gpu)
