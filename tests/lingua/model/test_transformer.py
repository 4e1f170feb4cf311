import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional

from lingua.config.keys.model import LlamaArgs, RopeScalingArgs
from lingua.model.context import Cache
from lingua.model.decoder import init_modules, init_parameter
from lingua.model.transformer import (
    LayerNorm,
    RMSNorm,
    RotaryEmbedding,
    cached_mask,
    rotary_frequencies,
    rotate,
)
from tests.ranks import run_on_ranks

# -- rotation ------------------------------------------------------------------------------------------------------


def turned(x: Tensor, seq_len: int, positions: Tensor | None = None) -> Tensor:
    rope = RotaryEmbedding(LlamaArgs(dim=8, n_heads=1, max_seqlen=64))
    return rotate(x, *rope(seq_len, positions))


def test_rotation_is_multiplication_of_neighbouring_pairs_by_complex_numbers() -> None:
    x = torch.randn(2, 10, 3, 8, generator=torch.Generator().manual_seed(0))
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    angles = torch.outer(torch.arange(10.0), frequencies)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(10, 4), angles)[:, None]
    torch.testing.assert_close(turned(x, 10), torch.view_as_real(pairs).flatten(-2))


def test_what_the_compiler_sees_of_the_rotation_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 3, 8, generator=generator, requires_grad=True)
    out_grad = torch.randn(2, 3, 10, 8, generator=generator).transpose(1, 2)  # as attention hands it back

    def both_ways() -> list[Tensor]:
        out = turned(x, 10)
        return [out.detach(), *torch.autograd.grad(out, x, out_grad)]

    as_it_runs = both_ways()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for eager, compiled in zip(as_it_runs, both_ways(), strict=True):
        torch.testing.assert_close(eager, compiled)


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    scores = [
        (turned(q, 1, torch.tensor([[at + 5]])) * turned(k, 1, torch.tensor([[at]]))).sum().item() for at in (0, 7, 50)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)


def test_positions_given_equal_positions_counted() -> None:
    x = torch.randn(2, 6, 1, 8)
    assert torch.equal(turned(x, 6), turned(x, 6, torch.arange(6).expand(2, 6)))


def test_rotation_of_bf16_computes_in_fp32() -> None:
    x = torch.randn(1, 64, 1, 8).bfloat16()
    assert torch.equal(turned(x, 64), turned(x.float(), 64).bfloat16())


def test_a_row_longer_than_the_table_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"65 positions, but the model is built for model\.max_seqlen=64"):
        turned(torch.zeros(1, 65, 1, 8), 65)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    scaling = RopeScalingArgs(factor=8.0, original_max_position_embeddings=8192)
    plain, scaled = (rotary_frequencies(128, 500000.0, each) for each in (None, scaling))
    wavelengths = 2 * math.pi / plain
    ratio = plain / scaled
    assert torch.equal(
        ratio[wavelengths < 8192 / 4], torch.ones(int((wavelengths < 8192 / 4).sum()), dtype=ratio.dtype)
    )
    torch.testing.assert_close(ratio[wavelengths > 8192], torch.full_like(ratio[wavelengths > 8192], 8.0))
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert ((between > 1) & (between < 8)).all()
    assert (between.diff() > 0).all()


def test_tables_survive_to_empty_and_stay_out_of_the_state_dict() -> None:
    args = LlamaArgs(dim=8, n_heads=1, max_seqlen=64)
    with torch.device("meta"):
        rope = RotaryEmbedding(args)
    rope = rope.to(torch.bfloat16).to_empty(device="cpu")
    rope.fill()
    assert torch.equal(rope.cos, RotaryEmbedding(args).cos)
    assert rope.cos.dtype == torch.float32
    assert rope.state_dict() == {}


# -- norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_norm_computes_in_fp32_and_returns_the_type_it_got(kind: type[nn.Module], dtype: torch.dtype) -> None:
    norm: Any = kind(32, eps=1e-6)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter)
    x = (100 * torch.randn(4, 32)).to(dtype)
    if kind is RMSNorm:
        expected = functional.rms_norm(x.float(), (32,), norm.weight, 1e-6)
    else:
        expected = functional.layer_norm(x.float(), (32,), norm.weight, norm.bias, 1e-6)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = norm(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected.to(dtype))


# -- cache ---------------------------------------------------------------------------------------------------------


def test_cache_holds_position_p_in_slot_p_and_shows_no_padding() -> None:
    cache = Cache(n_slots=8)
    new = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    cache.end = 3
    keys, _ = cache.update(0, torch.arange(3).expand(2, 3), new, new)  # the second row is one long, padded to 3
    assert torch.equal(keys, new)
    cache.end = 4
    positions = torch.tensor([[3], [1]])
    keys, values = cache.update(0, positions, -torch.ones(2, 1, 2, 2), -torch.ones(2, 1, 2, 2))
    assert torch.equal(keys, values)
    assert torch.equal(keys[1, 1], -torch.ones(2, 2))
    assert cached_mask(positions, cache.end, None)[:, 0, 0].tolist() == [[True] * 4, [True, True, False, False]]
    assert cached_mask(positions, cache.end, 2)[:, 0, 0].tolist() == [
        [False, False, True, True],
        [True, True, False, False],
    ]
    cache.keep_rows(torch.tensor([1]))
    assert torch.equal(cache.layers[0][0][0, 1], -torch.ones(2, 2))


# -- initial weights -----------------------------------------------------------------------------------------------

ARGS: dict[str, Any] = {"dim": 16, "n_heads": 2, "n_layers": 3, "hidden_dim": 64}


@pytest.mark.parametrize(
    ("name", "shape", "mode", "std"),
    [
        ("tok_embeddings.weight", (100, 16), "disabled", 16**-0.5),
        ("output.weight", (100, 16), "global_depth", 16**-0.5),
        ("layers.1.attention.wq.weight", (16, 16), "global_depth", 16**-0.5),
        ("layers.1.attention.wo.weight", (16, 16), "disabled", 16**-0.5),
        ("layers.1.attention.wo.weight", (16, 16), "global_depth", 16**-0.5 / 8**0.5),
        ("layers.1.attention.wo.weight", (16, 16), "current_depth", 16**-0.5 / 4**0.5),
        ("layers.2.feed_forward.w2.weight", (16, 64), "current_depth", 64**-0.5 / 6**0.5),
        ("layers.2.feed_forward.w2.weight", (16, 64), "dim_ratio", 64**-0.5 * 256),
        ("layers.2.feed_forward.w1.weight", (64, 16), "dim_ratio", 16**-0.5),
    ],
)
def test_initial_std_by_mode(name: str, shape: tuple[int, ...], mode: str, std: float) -> None:
    args = LlamaArgs(init_std_factor=cast(Any, mode), **ARGS)
    assert args.initial_std(name, torch.Size(shape)) == pytest.approx(std)


def test_a_base_std_replaces_the_fan_in() -> None:
    args = LlamaArgs(init_base_std=0.02, init_std_factor="current_depth", **ARGS)
    assert args.initial_std("layers.0.feed_forward.w2.weight", torch.Size((16, 64))) == 0.02 / 2**0.5
    assert args.initial_std("output.weight", torch.Size((9, 16))) == 0.02


def test_initial_values_are_a_truncated_normal_of_seed_and_name() -> None:
    def drawn(seed: int, name: str) -> Tensor:
        values = torch.empty(100, 200)
        init_parameter(values, 0.5, seed, name)
        return values

    values = drawn(1, "a")
    assert values.abs().max() <= 1.5
    assert values.mean().abs() < 0.02
    # a normal cut at three deviations has 0.9867 of its standard deviation
    assert values.std().item() == pytest.approx(0.5 * 0.9867, rel=0.02)
    torch.manual_seed(5)
    assert torch.equal(values, drawn(1, "a"))
    assert not torch.equal(values, drawn(2, "a"))
    assert not torch.equal(values, drawn(1, "b"))
    reduced = torch.empty(100, 200, dtype=torch.bfloat16)
    init_parameter(reduced, 0.5, 1, "a")
    assert torch.equal(reduced, values.bfloat16())


@pytest.mark.ranks
def test_initial_values_do_not_depend_on_the_layout() -> None:
    whole = torch.empty(7, 6)
    init_parameter(whole, 1.0, 3, "w")

    def on_rank(rank: int) -> list[Tensor]:
        line = init_device_mesh("cpu", (2,))
        wide = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
        high = init_device_mesh("cpu", (2, 1), mesh_dim_names=("c", "d"))
        found = []
        for mesh, placements in (
            (line, [Shard(0)]),
            (line, [Replicate()]),
            (wide, [Replicate(), Shard(0)]),
            (high, [Shard(1), Shard(0)]),
        ):
            sharded = distribute_tensor(torch.zeros(7, 6), mesh, placements)
            init_parameter(sharded, 1.0, 3, "w")
            assert isinstance(sharded, DTensor)
            found.append(sharded.full_tensor())
        return found

    for found in run_on_ranks(on_rank, 2):
        assert all(torch.equal(each, whole) for each in found)


class Ours(nn.Module):
    """What an app may add: layers with biases, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.conv = nn.Conv1d(5, 5, 3)
        self.scale = LayerNorm(5, 1e-5)


@pytest.mark.ranks
def test_every_module_is_initialised_by_its_own_rule_on_any_layout() -> None:
    def build(sharded: bool) -> dict[str, Tensor]:
        with torch.device("meta"):
            model = Ours()
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model.to_empty(device="cpu")
        torch.manual_seed(torch.distributed.get_rank() if sharded else 5)
        before = torch.get_rng_state()
        init_modules(model, LlamaArgs(**ARGS), seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}

    whole = build(sharded=False)
    assert not whole["linear.bias"].any()
    assert whole["linear.weight"].std() > 0.1
    for norm in ("norm", "scale"):
        assert torch.equal(whole[f"{norm}.weight"], torch.ones(5))
        assert torch.equal(whole[f"{norm}.bias"], torch.zeros(5))
    assert 0 < whole["conv.weight"].abs().max() <= 15**-0.5  # torch's own rule: fan_in ** -0.5
    for found in run_on_ranks(lambda rank: build(sharded=True), 2):
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_module_with_parameters_and_no_rule_is_refused() -> None:
    model = nn.ModuleDict({"gate": nn.ParameterList([nn.Parameter(torch.ones(2))])})
    with pytest.raises(ValueError, match=r"gate \(ParameterList\) has parameters but no reset_parameters\(\)"):
        init_modules(model, LlamaArgs(**ARGS), seed=3)
