import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.config.base import ConfigError
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.model import CrossEntropyArgs
from lingua.data.held_out import ScoredRow
from lingua.distributed.parallelize import parallelize, recomputed
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World
from lingua.eval.scorer import Scorer
from lingua.model.context import Cache
from lingua.model.loss import CrossEntropy
from lingua.train.build import require_counted
from tests import packed_kernels
from tests.packed_kernels import give_varlen_a_cpu, row_documents
from tests.ranks import run_on_ranks

VOCAB, ROWS, SEQ_LEN = 37, 2, 24
SMALL: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "vocab_size": VOCAB,
    "max_seqlen": 32,
    "multiple_of": 8,
}
LOSS = CrossEntropy(CrossEntropyArgs(chunk_tokens=20))
Gradients = dict[str, Tensor]


def build(seed: int = 1, **keys: Any) -> LMTransformer:
    with torch.device("meta"):
        model = LMTransformer(LMTransformerArgs(**(SMALL | keys)))
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, VOCAB, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1], rows[:, 1:]


def loss_and_gradients(model: nn.Module, tokens: Tensor, labels: Tensor, **keys: Any) -> tuple[Tensor, Gradients]:
    model.zero_grad()
    loss_sum, n_tokens = model(tokens, labels=labels, loss=LOSS)
    (loss_sum / n_tokens).backward()
    return loss_sum / n_tokens, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2},
    {"weight_tying": True},
    {"qk_norm": True},
    {"qk_norm": True, "norm": "layer"},
    {"sliding_window": 5},
    {"head_dim": 16, "hidden_dim": 40, "n_kv_heads": 1},
]

# -- shape of the model --------------------------------------------------------------------------------------------


def test_parameter_names_are_linguas() -> None:
    names = {name for name, _ in build().named_parameters() if "layers.1" not in name}
    block = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2"]
    block += ["feed_forward.w3", "attention_norm", "ffn_norm"]
    assert names == {"tok_embeddings.weight", "norm.weight", "output.weight"} | {f"layers.0.{b}.weight" for b in block}
    assert set(build().state_dict()) == {name for name, _ in build().named_parameters()}


@pytest.mark.parametrize("keys", VARIANTS)
def test_parameters_are_as_many_as_the_config_says(keys: dict[str, Any]) -> None:
    model = build(**keys)
    assert sum(p.numel() for p in model.parameters()) == model.args.n_params()


def test_a_model_with_parameters_that_its_args_do_not_count_is_refused() -> None:
    model = build()
    require_counted(model, model.args)
    model.layers[0].gate = nn.Linear(2, 3)
    with pytest.raises(ConfigError, match=r"parameters, but n_params\(\) of apps.main.args.LMTransformerArgs"):
        require_counted(model, model.args)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_first_loss_is_about_that_of_a_guess(norm: str) -> None:
    loss, _ = loss_and_gradients(build(norm=norm), *batch())
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.6)


@pytest.mark.parametrize("keys", [*VARIANTS, {"full": True}])
def test_flops_are_those_that_torch_counts(keys: dict[str, Any]) -> None:
    """Forward, backward and what is computed again, of a model whose attention counts the whole square."""
    keys = dict(keys)
    full = keys.pop("full", False)
    model, (tokens, _) = build(attn_impl="eager", **keys), batch()
    if full:
        parallelize(
            model, DistributedArgs(full_activation_checkpointing=True), World(RankInfo(), torch.device("cpu"), None)
        )
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    blocks, attention = recomputed(DistributedArgs(full_activation_checkpointing=full), "eager")
    args = model.args.model_copy(update={"sliding_window": None})  # eager computes what it then masks
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    counted = args.flops_per_token(SEQ_LEN) - 6 * norms
    again = args.recomputed_flops_per_token(SEQ_LEN, blocks, attention) - (2 * norms if full else 0)
    assert counter.get_total_flops() == (counted + again) * tokens.numel()


def test_a_vocabulary_of_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size is -1"):
        LMTransformer(LMTransformerArgs(n_heads=4))


@pytest.mark.parametrize("keys", VARIANTS)
def test_no_position_sees_a_later_one(keys: dict[str, Any]) -> None:
    model, (tokens, _) = build(**keys), batch()
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCAB
    difference = (model(changed) - model(tokens)).abs().amax(dim=(0, 2))
    assert difference[:10].max() < 1e-5
    assert difference[10] > 1e-3


def test_a_window_ends_what_is_seen() -> None:
    model, (tokens, _) = build(sliding_window=3), batch()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    difference = (model(changed) - model(tokens)).abs().amax(dim=(0, 2))
    assert difference[8] > 1e-4  # two layers of window 3 reach four positions back
    assert difference[9:].max() < 1e-5


@pytest.mark.parametrize(
    "keys", [{}, {"sliding_window": 5}, {"attn_impl": "eager"}, {"attn_impl": "varlen", "n_kv_heads": 2}]
)
def test_packed_documents_are_as_if_alone(keys: dict[str, Any]) -> None:
    give_varlen_a_cpu()
    model, (tokens, _) = build(**keys), batch()
    packed = model(tokens, documents=row_documents([[0] * 9 + [1] * 15, [0] * 24]))
    torch.testing.assert_close(packed[:1, :9], model(tokens[:1, :9]))
    torch.testing.assert_close(packed[:1, 9:], model(tokens[:1, 9:]))
    torch.testing.assert_close(packed[1:], model(tokens[1:]))


@pytest.mark.parametrize(("checkpointing", "n_calls"), [("full", 4), ("selective", 2)])
def test_selective_checkpointing_keeps_what_varlen_returns(checkpointing: str, n_calls: int) -> None:
    give_varlen_a_cpu()
    model, (tokens, labels) = build(attn_impl="varlen"), batch()
    args = DistributedArgs.model_validate({f"{checkpointing}_activation_checkpointing": True})
    parallelize(model, args, World(RankInfo(), torch.device("cpu"), None))
    packed_kernels.CALLS.clear()
    loss_sum, _ = model(tokens, labels=labels, documents=row_documents([[0] * 9 + [1] * 15, [0] * 24]), loss=LOSS)
    loss_sum.backward()
    assert len(packed_kernels.CALLS) == n_calls  # of two layers
    assert recomputed(args, "varlen") == ((True, True) if checkpointing == "full" else (False, False))


def test_select_gives_the_logits_of_one_position_per_row() -> None:
    model, (tokens, _) = build(), batch()
    logits = model(tokens)
    chosen = model(tokens, select=torch.tensor([3, 20]))
    torch.testing.assert_close(chosen[:, 0], torch.stack([logits[0, 3], logits[1, 20]]))


# -- padded vocabulary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tying", [False, True])
def test_padded_rows_of_the_vocabulary_have_no_part_in_anything(tying: bool) -> None:
    plain, padded = build(weight_tying=tying), build(seed=2, weight_tying=tying, vocab_multiple_of=16)
    head = padded.tok_embeddings.weight if padded.output is None else padded.output.weight
    assert head.shape == (48, 32)
    assert sum(p.numel() for p in padded.parameters()) == padded.args.n_params()
    assert padded.args.flops_per_token(8) == plain.args.flops_per_token(8)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            target = padded.get_parameter(name)
            target[: len(parameter)] = parameter
        head[VOCAB:] = 100.0  # they would win everywhere
    tokens, labels = batch()
    torch.testing.assert_close(padded(tokens), plain(tokens))
    loss, gradients = loss_and_gradients(plain, tokens, labels)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    padded_loss, padded_gradients = loss_and_gradients(padded, tokens, labels)
    torch.testing.assert_close(padded_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name][: len(gradient)], gradient)
        assert not padded_gradients[name][len(gradient) :].any(), name
    row = ScoredRow(tokens[0].tolist(), 1)
    theirs, ours = (Scorer(model, 64).score([row])[0] for model in (plain, padded))
    assert ours.nats == pytest.approx(theirs.nats)
    assert ours.is_greedy == theirs.is_greedy


# -- weight tying --------------------------------------------------------------------------------------------------


def test_tied_weights_stay_tied_through_building_loading_and_training() -> None:
    model, (tokens, labels) = build(weight_tying=True), batch()
    assert "output.weight" not in model.state_dict()
    _, gradients = loss_and_gradients(model, tokens, labels)
    assert gradients["tok_embeddings.weight"].abs().sum(1).count_nonzero() == VOCAB  # also of tokens never put in
    twin = build(seed=2, weight_tying=True)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin.tok_embeddings.weight.mul_(2)
    assert twin.output is None
    assert not torch.equal(twin(tokens), model(tokens))


# -- initial weights and precision -----------------------------------------------------------------------------------


def test_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(0)
    first = build().state_dict()
    torch.manual_seed(9)
    second, other = build(n_layers=1).state_dict(), build(seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert not torch.equal(first["output.weight"], other["output.weight"])
    assert not torch.equal(first["layers.0.attention.wq.weight"], first["layers.1.attention.wq.weight"])


def test_autocast_runs_the_stream_in_bf16_and_stays_near_fp32() -> None:
    model, (tokens, labels) = build(qk_norm=True), batch()
    loss, gradients = loss_and_gradients(model, tokens, labels)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    types: list[torch.dtype] = []
    model.layers[1].register_forward_hook(lambda _module, _args, out: types.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_gradients = loss_and_gradients(model, tokens, labels)
    assert types == [torch.bfloat16]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(loss.item(), rel=0.02)
    for name, gradient in gradients.items():
        assert rough_gradients[name].dtype == torch.float32
        assert (rough_gradients[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model, (tokens, labels) = build(), batch()
    _, expected = loss_and_gradients(model, tokens, labels)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    for block in model.layers:
        plain = block.forward
        block.forward = lambda x, around, plain=plain: checkpoint(plain, x, around, use_reentrant=False)
    _, found = loss_and_gradients(model, tokens, labels)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_block_compiles_without_a_graph_break() -> None:
    model, (tokens, labels) = build(n_kv_heads=2, qk_norm=True), batch()
    loss, _ = loss_and_gradients(model, tokens, labels)
    for block in model.layers:
        block.compile(fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it traces
        compiled, _ = loss_and_gradients(model, tokens, labels)
    torch.testing.assert_close(compiled, loss)


# -- sharded -------------------------------------------------------------------------------------------------------


def sharded_run(mesh_shape: tuple[int, int], tying: bool, dtype: torch.dtype | None) -> tuple[Tensor, Gradients]:
    """Loss and gradients of one batch, a row per rank."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    with torch.device("meta"):
        model = LMTransformer(LMTransformerArgs(**SMALL, weight_tying=tying, n_kv_heads=2))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device="cpu")
    model.init_weights(1)
    rank = torch.distributed.get_rank()
    tokens, labels = batch()
    loss, gradients = loss_and_gradients(model, tokens[rank : rank + 1], labels[rank : rank + 1])
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    found = {name: gradient.full_tensor() for name, gradient in gradients.items() if isinstance(gradient, DTensor)}
    weights = {f"weight of {name}": p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return loss / 2, found | weights


@pytest.mark.ranks
@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("mesh_shape", [(1, 2), (2, 1)])
def test_sharded_and_replicated_models_equal_the_whole_one(mesh_shape: tuple[int, int], tying: bool) -> None:
    model, (tokens, labels) = build(weight_tying=tying, n_kv_heads=2), batch()
    loss, gradients = loss_and_gradients(model, tokens, labels)
    for found_loss, found in run_on_ranks(lambda rank: sharded_run(mesh_shape, tying, None), 2):
        torch.testing.assert_close(found_loss, loss.detach())
        assert found.keys() == gradients.keys() | {f"weight of {name}" for name in gradients}
        for name, parameter in model.named_parameters():
            assert torch.equal(found[f"weight of {name}"], parameter)  # initial weights: bit for bit
            torch.testing.assert_close(found[name], gradients[name])


@pytest.mark.ranks
def test_sharded_bf16_is_as_near_to_fp32_as_autocast() -> None:
    model, (tokens, labels) = build(n_kv_heads=2), batch()
    loss, gradients = loss_and_gradients(model, tokens, labels)
    for found_loss, found in run_on_ranks(lambda rank: sharded_run((1, 2), False, torch.bfloat16), 2):
        assert found_loss.item() == pytest.approx(loss.item(), rel=0.02)
        for name, gradient in gradients.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - gradient).norm() < 0.1 * gradient.norm(), name


# -- cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", VARIANTS)
def test_cached_logits_equal_uncached_ones(keys: dict[str, Any]) -> None:
    """Two rows of 9 and 5 tokens in one padded pass, then token by token."""
    model, (tokens, _) = build(**keys), batch()
    lengths, width = [9, 5], 9
    cache = Cache(n_slots=SEQ_LEN)
    with torch.no_grad():
        expected = model(tokens)
        padded = tokens[:, :width].clone()
        padded[1, 5:] = 0
        cache.end = width
        logits = model(padded, cache=cache, positions=torch.arange(width).expand(ROWS, width))
        torch.testing.assert_close(logits[0], expected[0, :9])
        torch.testing.assert_close(logits[1, :5], expected[1, :5])
        for step in range(10):
            positions = torch.tensor([[length + step] for length in lengths])
            cache.end = max(lengths) + step + 1
            logits = model(tokens.gather(1, positions), cache=cache, positions=positions)
            torch.testing.assert_close(logits[:, 0], expected[[0, 1], positions[:, 0]])


# -- the reference -------------------------------------------------------------------------------------------------


def halves(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of wq or wk in the order of a rotation of (first half, second half) instead of neighbouring pairs."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def in_reference_names(tensors: dict[str, Tensor], args: LMTransformerArgs) -> dict[str, Tensor]:
    named = {}
    for name, tensor in tensors.items():
        tensor = halves(tensor, args.heads) if "wq" in name else tensor
        tensor = halves(tensor, args.kv_heads) if "wk" in name else tensor
        for theirs, ours in NAMES.items():
            if name.startswith(f"{ours}.") or f".{ours}." in name:
                name = name.replace(f"{ours}.", f"{theirs}.", 1)
        named[name] = tensor
    return named


SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"n_kv_heads": 2, "rope_theta": 500000.0, "norm_eps": 1e-6},
        {"n_kv_heads": 1, "rope_scaling": SCALING, "weight_tying": True},
        {"rope_scaling": SCALING, "head_dim": 16},
    ],
)
def test_transformers_llama_gives_the_same_logits_loss_and_gradients(keys: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, (tokens, labels) = build(**keys), batch()
    args = model.args
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling is not None:
        rope = {"rope_type": "llama3", "rope_theta": args.rope_theta, **SCALING}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=args.dim,
        intermediate_size=args.ffn_width,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_width,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=args.max_seqlen,
        tie_word_embeddings=args.weight_tying,
    )
    reference = LlamaForCausalLM(config)
    missing = reference.load_state_dict(in_reference_names(model.state_dict(), args), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["lm_head.weight"] if args.weight_tying else [])

    theirs = reference(input_ids=tokens).logits
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-4, atol=1e-4)
    their_loss = nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten())
    their_loss.backward()
    loss, gradients = loss_and_gradients(model, tokens, labels)
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in in_reference_names(gradients, args).items():
        torch.testing.assert_close(gradient, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-4, msg=name)


def test_this_file_knows_no_other_app() -> None:
    """`cp -r apps/main apps/mine` must give an app that does not import the one it was copied from."""
    import apps.main.transformer as module

    assert module.__file__ is not None
    assert "apps.main" not in Path(module.__file__).read_text()
