"""Products in float8 against what they stand for. The kernel of `tensorwise` is torch's own on the CPU too; where it
has none (`rowwise`), it is emulated under the rules that CUDA's has."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.model import CrossEntropyArgs
from lingua.distributed.parallelize import forward_precision, parallelize
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World
from lingua.model import float8
from lingua.model.float8 import RECIPES, Float8Linear, convert, quantize, refusal
from lingua.model.loss import CrossEntropy
from tests.layouts import whole
from tests.ranks import run_on_ranks

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
N_ROWS, WIDTH, OUT_WIDTH = 24, 64, 48  # 24 is no multiple of 16


def emulated(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, **how: Any) -> Tensor:
    """`scaled_product` in fp32, refusing what the CUDA kernels refuse (torch 2.10, `_scaled_mm`)."""
    assert left.is_contiguous()
    assert right.is_contiguous()
    assert left.shape[1] % 16 == 0
    assert right.shape[0] % 16 == 0
    assert right.dtype == E4M3
    assert left_scale.dtype == right_scale.dtype == torch.float32
    if left_scale.numel() > 1:
        assert left_scale.shape == (len(left), 1)
        assert right_scale.shape == (len(right), 1)
        assert how["out_dtype"] == torch.bfloat16
    product = (left.float() * left_scale) @ (right.float() * right_scale).t()
    return product.to(how["out_dtype"])


@pytest.fixture(params=["tensorwise", "rowwise"])
def recipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float8.Recipe:
    monkeypatch.setattr(float8, "scaled_product", emulated)
    return RECIPES[request.param]


def rounded(x: Tensor, dtype: torch.dtype, per_row: bool) -> Tensor:
    """What is left of x after float8 and back."""
    values, scale = quantize(x, dtype, per_row)
    return values.float() * scale


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# -- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("dtype", "bits"), [(E4M3, 3), (E5M2, 2)])
def test_each_value_is_off_by_half_a_unit_in_the_last_place_at_most(dtype: torch.dtype, bits: int, per_row: bool):
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None]
    largest = x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()
    step = largest * 2.0 ** -(15 if dtype == E4M3 else 30)  # below that numbers are subnormal
    assert ((rounded(x, dtype, per_row) - x).abs() <= torch.maximum(x.abs() * 2.0 ** -(bits + 1), step)).all()


def test_the_scale_uses_the_whole_range():
    x = torch.tensor([[3.0, -7.0], [0.25, 0.5]])
    values, scale = quantize(x, E4M3, per_row=False)
    assert values.float().abs().max() == 448
    assert scale.item() == pytest.approx(7 / 448)
    values, scale = quantize(x, E4M3, per_row=True)
    assert scale.flatten().tolist() == [2.0**-6, 2.0**-9]  # 448 / 7 = 64; 448 / 0.5 = 896, so 512
    assert torch.equal(values.float() * scale, x)  # powers of two: these values come back exactly


@pytest.mark.parametrize("per_row", [False, True])
def test_zeros_stay_zeros_and_tiny_rows_keep_their_digits(per_row: bool):
    assert torch.equal(rounded(torch.zeros(2, 16), E5M2, per_row), torch.zeros(2, 16))
    tiny = torch.tensor([[1e-20, 3e-21], [0.0, 0.0]])
    assert relative(rounded(tiny, E5M2, per_row), tiny) < 0.1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(recipe: float8.Recipe, bad: float):
    x = torch.ones(2, 16)
    x[1, 3] = bad
    out = float8.product(x, torch.ones(16, 16), E4M3, recipe, True, torch.bfloat16)
    assert not out[1].isfinite().any()


# -- the layer -------------------------------------------------------------------------------------------------------


def forward_and_backward(layer: nn.Linear, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(grad)
    assert x.grad is not None
    assert layer.weight.grad is not None
    gradient, layer.weight.grad = layer.weight.grad, None
    return out.detach(), x.grad, gradient


def material() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        nn.Linear(WIDTH, OUT_WIDTH, bias=False),
        torch.randn(2, N_ROWS // 2, WIDTH),
        torch.randn(2, N_ROWS // 2, OUT_WIDTH) * 1e-6,
    )


def test_forward_and_both_gradients_are_products_of_rounded_operands(recipe: float8.Recipe):
    layer, x, grad = material()
    out, of_x, of_weight = forward_and_backward(Float8Linear(layer, recipe), x, grad)
    rows, grads, weight, per_row = x.flatten(0, 1), grad.flatten(0, 1), layer.weight.detach(), recipe.per_row
    wanted_out = rounded(rows, E4M3, per_row) @ rounded(weight, E4M3, per_row).t()
    wanted_x = rounded(grads, recipe.gradient, per_row) @ rounded(weight.t(), E4M3, per_row).t()
    wanted_weight = rounded(grads.t(), recipe.gradient, per_row) @ rounded(rows.t(), E4M3, per_row).t()
    tolerance: Any = {"rtol": 2**-8, "atol": 1e-4} if per_row else {"rtol": 1e-4, "atol": 1e-5}  # rowwise is bf16
    torch.testing.assert_close(out, wanted_out.view_as(out), **tolerance)
    torch.testing.assert_close(of_x * 1e6, wanted_x.view_as(of_x) * 1e6, **tolerance)
    torch.testing.assert_close(of_weight * 1e6, wanted_weight * 1e6, **tolerance)


def test_it_is_as_near_to_the_exact_layer_as_three_bits_allow(recipe: float8.Recipe):
    layer, x, grad = material()
    exact = forward_and_backward(layer, x, grad)
    found = forward_and_backward(Float8Linear(layer, recipe), x, grad)
    # Uniform rounding errors of 2**-4 (2**-3 in e5m2) at most are 2**-4 / sqrt(3) = 3.6 % of each operand, some more.
    assert [relative(*pair) < 0.08 for pair in zip(found, exact, strict=True)] == [True] * 3


def test_torchs_kernel_agrees_with_the_emulation(monkeypatch: pytest.MonkeyPatch):
    layer, x, grad = material()
    torchs = forward_and_backward(Float8Linear(layer, RECIPES["tensorwise"]), x, grad)
    monkeypatch.setattr(float8, "scaled_product", emulated)
    own = forward_and_backward(Float8Linear(layer, RECIPES["tensorwise"]), x, grad)
    for found, expected in zip(torchs, own, strict=True):
        assert relative(found, expected) < 1e-5


def test_under_autocast_it_computes_in_the_types_of_an_ordinary_layer(recipe: float8.Recipe):
    layer, x, grad = material()
    for each in (layer, Float8Linear(layer, recipe)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, of_x, of_weight = forward_and_backward(each, x, grad.bfloat16())
        assert (out.dtype, of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_a_bias_is_added_in_full(recipe: float8.Recipe):
    layer = nn.Linear(WIDTH, OUT_WIDTH)
    found = Float8Linear(layer, recipe)(torch.zeros(3, WIDTH))
    assert torch.equal(found, layer.bias.expand(3, OUT_WIDTH))


# -- the model -------------------------------------------------------------------------------------------------------


def build(**keys: Any) -> LMTransformer:
    sizes: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 40, "multiple_of": 16}
    with torch.device("meta"):
        return LMTransformer(LMTransformerArgs(**(sizes | keys)))


def ready(model: LMTransformer) -> LMTransformer:
    model.to_empty(device="cpu")
    model.init_weights(1)
    return model


def test_parameters_keep_names_and_identity():
    model = build()
    before = dict(model.named_parameters())
    converted = convert(model, "rowwise", DistributedArgs().float8_filter)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert len(converted.float8) == 14
    assert not isinstance(model.output, Float8Linear)
    assert converted.unfit == []


def test_the_filter_chooses():
    model = build(n_kv_heads=1, head_dim=8)  # wk and wv are 8 wide
    converted = convert(model, "tensorwise", r"layers\.1\.attention")
    assert converted.float8 == ["layers.1.attention.wq", "layers.1.attention.wo"]
    assert converted.unfit == ["layers.1.attention.wk", "layers.1.attention.wv"]
    assert "2 stay as they are" in str(converted)
    assert isinstance(model.layers[1].attention.wq, Float8Linear)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_filter_that_matches_nothing_and_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=re.escape("matches no linear layer of the blocks, such as layers.0.att")):
        convert(build(), "rowwise", "output")
    with pytest.raises(ValueError, match="no layer has widths that are multiples of 16"):
        convert(build(dim=24, multiple_of=8), "rowwise", "attention")


@pytest.mark.parametrize(
    ("device", "capability", "said"),
    [
        ("cpu", (0, 0), "need a CUDA device"),
        ("cuda", (8, 0), "this GPU has 8.0"),
        ("cuda", (8, 9), None),
        ("cuda", (9, 0), None),
        ("cuda", (10, 0), None),
    ],
)
def test_where_it_can_run(device: str, capability: tuple[int, int], said: str | None):
    reason = refusal(device, capability)
    assert reason is None if said is None else said in (reason or "")


def test_a_model_on_a_cpu_is_refused():
    args = DistributedArgs(float8_recipe="tensorwise")
    with pytest.raises(ValueError, match="float8_recipe tensorwise: float8 products need a CUDA device"):
        parallelize(build(), args, World(RankInfo(), torch.device("cpu"), mesh=None))


def gradients(model: nn.Module, args: DistributedArgs, rows: slice) -> dict[str, Tensor]:
    tokens = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(0))[rows]
    with forward_precision(model, args, torch.device("cpu")):
        loss, _ = model(tokens[:, :-1], labels=tokens[:, 1:], loss=CrossEntropy(CrossEntropyArgs()))
    loss.backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["selective_activation_checkpointing", "full_activation_checkpointing"])
def test_recomputed_blocks_give_the_same_gradients(checkpointing: str, recipe: float8.Recipe, monkeypatch: Any):
    monkeypatch.setattr(float8, "refusal", lambda *_: None)
    name: Any = "rowwise" if recipe.per_row else "tensorwise"
    world = World(RankInfo(), torch.device("cpu"), mesh=None)
    found = []
    for chosen in (False, True):
        args = DistributedArgs.model_validate({"float8_recipe": name, checkpointing: chosen})
        found.append(gradients(ready(parallelize(build(), args, world)), args, slice(None)))  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.ranks
def test_sharded_ranks_average_what_each_would_find_alone(monkeypatch: pytest.MonkeyPatch):
    """FSDP2 gathers the weight; each rank casts it, and scales activations by its own rows."""
    monkeypatch.setattr(float8, "refusal", lambda *_: None)
    args = DistributedArgs(float8_recipe="tensorwise", model_dtype="fp32", fsdp_type="full_shard")

    def on_rank(rank: int) -> dict[str, Tensor]:
        mesh = torch.distributed.init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        world = World(RankInfo(rank, 2), torch.device("cpu"), mesh, rank, 2)
        model: Any = parallelize(build(), args, world)
        return gradients(ready(model), args, slice(rank, rank + 1))

    world = World(RankInfo(), torch.device("cpu"), mesh=None)
    alone: list[Any] = [ready(parallelize(build(), args, world)) for _ in range(2)]  # pyright: ignore[reportArgumentType]
    each = [gradients(model, args, slice(rank, rank + 1)) for rank, model in enumerate(alone)]
    for found in run_on_ranks(on_rank, 2):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, (each[0][name] + each[1][name]) / 2, rtol=1e-4, atol=1e-7)
