"""What holds for the model of every family."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from apps.main.args import LMTransformerArgs
from lingua.config.base import ConfigError
from lingua.config.keys.generate import GeneratorArgs
from lingua.config.keys.model import CrossEntropyArgs, DecoderArgs, HybridArgs
from lingua.data.held_out import ScoredRow
from lingua.eval.scorer import Scorer
from lingua.model.attention import RowDocuments, document_bounds
from lingua.model.context import Cache
from lingua.model.decoder import Decoder, build_block
from lingua.model.generate import Generator
from lingua.model.huggingface import translation_of
from lingua.model.loss import CrossEntropy
from lingua.optim.muon import takes_muon
from lingua.tokenizer import ByteTokenizer
from lingua.train.build import require_counted
from lingua.train.learner import MicroBatch, StepSums
from tests.families import FAMILIES, SHARED, VOCAB, build

every_family = pytest.mark.parametrize("args", FAMILIES.values(), ids=FAMILIES.keys())
RECURRENT = {name: args for name, args in FAMILIES.items() if args.attention is None}


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=3e-4)


def some_tokens(n_rows: int = 2, seq_len: int = 24) -> Tensor:
    return torch.randint(0, VOCAB, (n_rows, seq_len), generator=torch.Generator().manual_seed(3))


@every_family
def test_as_many_parameters_are_built_as_counted(args: DecoderArgs) -> None:
    require_counted(build(args), args)


class Unfinished(DecoderArgs):
    block = "tests.families:NoSuchBlock"
    hugging_face = "tests.no_such_module:Theirs"


class Misspelt(LMTransformerArgs):
    residual_outputs = ("attention.wo.weight", "feed_forward.w9.weight")


def test_what_a_family_lacks_is_one_sentence() -> None:
    args = Unfinished(vocab_size=VOCAB)
    for ask, lacks in (
        (args.n_params, r"test_families\.Unfinished has no block_params\(\); add it: the parameters of one block"),
        (lambda: args.flops_per_token(8), r"has no block_params\(\)"),
        (lambda: args.mixing_flops_per_token(8), r"has no mixing_flops_per_token\(\); add it: FLOPs of one block"),
        (lambda: build_block(args, 0), "Unfinished.block is 'tests.families:NoSuchBlock', but module .* has no attrib"),
        (lambda: translation_of(args), "Unfinished.hugging_face is 'tests.no_such_module:Theirs', but No module named"),
        (
            lambda: build_block(Misspelt(vocab_size=VOCAB, n_heads=2), 0),
            "Misspelt.residual_outputs names feed_forward.w9.weight, but the block has only attention.wq.weight, ",
        ),
    ):
        with pytest.raises(ConfigError, match=lacks):
            ask()


@every_family
def test_flops_are_six_per_parameter_and_what_mixes_positions(args: DecoderArgs) -> None:
    n_matmul = args.n_params() - (0 if args.weight_tying else args.vocab_rows * args.dim)  # all but the lookup
    mixing = sum(args.of_layer(layer).mixing_flops_per_token(24) for layer in range(args.n_layers))
    assert args.flops_per_token(24) == 6 * n_matmul + mixing
    assert mixing > 0


@every_family
def test_the_depth_divides_what_every_block_adds_to_the_stream(args: DecoderArgs) -> None:
    plain, deep = (build(args.model_copy(update={"init_std_factor": f})) for f in ("disabled", "global_depth"))
    factor, divided = (2 * (args.n_layers + 1)) ** 0.5, dict(deep.named_parameters())
    shrunk = [n for n, p in plain.named_parameters() if bool(p.any()) and torch.allclose(divided[n] * factor, p)]
    assert {name.split(".")[1] for name in shrunk} == {str(layer) for layer in range(args.n_layers)}


@every_family
@torch.no_grad()
def test_the_first_loss_is_near_that_of_a_guess(args: DecoderArgs) -> None:
    tokens = some_tokens(16, 48)
    loss_sum, n_labels = build(args)(tokens, labels=tokens.roll(-1, 1), loss=CrossEntropy(CrossEntropyArgs()))
    assert float(loss_sum) / float(n_labels) == pytest.approx(
        math.log(VOCAB), abs=1.0
    )  # drawn logits have a spread of 1


@every_family
@torch.no_grad()
def test_a_score_is_that_of_the_logits(args: DecoderArgs) -> None:
    model, ids = build(args), some_tokens(1, 9)[0]
    (score,) = Scorer(model, 100).score([ScoredRow(ids.tolist(), 3)])
    logits = model(ids[None, :-1])[0, 2:].log_softmax(-1)
    assert score.nats == pytest.approx(-logits.gather(1, ids[3:, None]).sum().item(), rel=1e-4)


@every_family
def test_every_parameter_gets_a_gradient(args: DecoderArgs) -> None:
    model, tokens = build(args), some_tokens()
    labels = tokens.expand(args.n_labels, *tokens.shape) if args.n_labels > 1 else tokens
    model(tokens, labels=labels, loss=CrossEntropy(CrossEntropyArgs()))[0].sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert without == []


@torch.no_grad()
def test_each_head_of_mtp_has_a_loss_of_its_own() -> None:
    model, tokens, loss = build(FAMILIES["mtp"]), some_tokens(), CrossEntropy(CrossEntropyArgs())
    labels = torch.stack([tokens.roll(-i, 1) for i in (1, 2, 3)])
    losses, n_labels = model(tokens, labels=labels, loss=loss)
    assert (losses.shape, int(n_labels)) == ((3,), tokens.numel())
    assert losses[0] == model(tokens, labels=labels[0], loss=loss)[0]
    sums = StepSums(torch.device("cpu"))
    for _ in range(2):
        sums.add(MicroBatch(np.arange(2), tokens, labels, None), losses, n_labels)
    torch.testing.assert_close(sums.losses, 2 * losses)
    torch.testing.assert_close(sums.loss, 2 * losses.sum())


@every_family
def test_packed_documents_are_separate_rows(args: DecoderArgs) -> None:
    model, tokens = build(args), some_tokens()
    lengths = [[7, 1, 16], [16, 8]]
    doc_ids = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
    documents = RowDocuments(torch.from_numpy(doc_ids), torch.from_numpy(document_bounds(doc_ids)))
    packed = model(tokens, documents=documents)
    for row, own in enumerate(lengths):
        separate = torch.cat([model(part[None])[0] for part in tokens[row].split(own)])
        assert_near(packed[row], separate)


@every_family
def test_what_comes_later_changes_nothing_before(args: DecoderArgs) -> None:
    model, tokens = build(args), some_tokens()
    other = tokens.clone()
    other[:, 13:] = (other[:, 13:] + 1) % VOCAB
    assert_near(model(tokens)[:, :13], model(other)[:, :13])


def cached_logits(model: Decoder, tokens: Tensor, lengths: Sequence[int], n_more: int) -> list[list[Tensor]]:
    """Logits of each row after its prompt of `lengths` tokens, padded to one width, and after each of n_more tokens."""
    width = max(lengths)
    prompts = torch.stack(
        [torch.cat((row[:n], row.new_full((width - n,), 5))) for row, n in zip(tokens, lengths, strict=True)]
    )
    cache = Cache(n_slots=tokens.shape[1], end=width)
    positions = torch.arange(width).expand(len(tokens), width)
    found = [[row[0]] for row in model(prompts, cache=cache, positions=positions, select=torch.tensor(lengths) - 1)]
    for step in range(n_more):
        at = torch.tensor([[n + step] for n in lengths])
        cache.end = int(at.max()) + 1
        for row, logits in zip(found, model(tokens.gather(1, at), cache=cache, positions=at), strict=True):
            row.append(logits[0])
    return found


@every_family
@torch.no_grad()
def test_cached_is_uncached_for_prompts_of_any_length(args: DecoderArgs) -> None:
    model, tokens, lengths = build(args), some_tokens(3), [10, 5, 1]
    whole = model(tokens)
    for row, found in enumerate(cached_logits(model, tokens, lengths, n_more=9)):
        begin = lengths[row] - 1
        assert_near(torch.stack(found), whole[row, begin : begin + 10])


@pytest.mark.parametrize("args", RECURRENT.values(), ids=RECURRENT.keys())
@torch.no_grad()
def test_a_recurrent_cache_does_not_grow(args: DecoderArgs) -> None:
    model, tokens = build(args), some_tokens(1, 20)
    sizes = []
    cache = Cache(n_slots=20)
    for at in range(20):
        model(tokens[:, at : at + 1], cache=cache, positions=torch.tensor([[at]]))
        sizes.append(sum(each.numel() for kept in cache.layers.values() for each in kept))
    assert len(set(sizes)) == 1


@every_family
def test_a_batch_of_prompts_is_answered_as_one_by_one(args: DecoderArgs) -> None:
    tokenizer = ByteTokenizer()
    model = build(args.model_copy(update={"vocab_size": tokenizer.vocab_size}))
    generator = Generator(model, tokenizer, GeneratorArgs(max_gen_len=6, temperature=0.0))
    prompts = ["import os", "x", "def main("]
    assert generator.generate(prompts) == [generator.generate([prompt])[0] for prompt in prompts]


CHUNKED = {"mamba2": "ssm_chunk_size", "mamba2, every option": "ssm_chunk_size"}
CHUNKED |= {"mlstm": "chunk_size", "mlstm_v0": "chunk_size"}


@pytest.mark.parametrize(("name", "key"), CHUNKED.items())
@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_the_chunk_changes_nothing_but_rounding(name: str, key: str, size: int) -> None:
    tokens, args = some_tokens(), FAMILIES[name]
    chunked = build(args.model_copy(update={key: size}))
    assert_near(chunked(tokens), build(args)(tokens))


@every_family
@torch.no_grad()
def test_in_bf16_it_stays_near_fp32(args: DecoderArgs) -> None:
    model, tokens = build(args), some_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens)
    off = half.float() - model(tokens)
    assert off.square().mean().sqrt() < 0.1  # logits have a spread of 1
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@every_family
def test_muon_takes_weights_of_linear_layers_only(args: DecoderArgs) -> None:
    model = build(args)
    taken = {name for name, parameter in model.named_parameters() if takes_muon(name, parameter)}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n}
    gates = {
        name for name, _ in model.named_parameters() if name.endswith(("igate_preact.weight", "fgate_preact.weight"))
    }
    assert taken == linear | gates


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"layers": ["nope"]}, "layers: unknown kind nope; known: attention, hawk, mamba2, mingru, minlstm, mlstm"),
        ({"layers": ["hybrid"]}, "layers: unknown kind hybrid"),
        ({"layers": ["attention"]}, "blocks.attention: needs n_heads or head_dim"),
        ({"layers": ["mingru"], "blocks": {"mamba2": {}}}, "blocks.mamba2 is used by no layer"),
        ({"layers": ["mamba2"], "blocks": {"mamba2": {"n_heads": 7}}}, "not a multiple of n_heads 7"),
        ({"layers": ["mamba2"], "blocks": {"mamba2": {"state": 7}}}, "blocks.mamba2.state"),
    ],
)
def test_a_hybrid_says_what_is_wrong_with_its_layers(keys: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        HybridArgs.model_validate(SHARED | keys)


def test_a_hybrid_repeats_its_pattern() -> None:
    args = FAMILIES["hybrid"].model_copy(update={"n_layers": 5})
    names = [type(layer).__name__ for layer in build(args).layers]
    assert names == ["TransformerBlock", "MambaBlock", "MLSTMBlock", "TransformerBlock", "MambaBlock"]
