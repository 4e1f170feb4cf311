"""Our Mamba-2, mLSTM and RG-LRU compute what `transformers` does, and their folders go out and in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.cli.export import Format, make_export, make_import
from apps.fastRNN.args import HawkArgs
from apps.fastRNN.blocks import RGLRU
from apps.mamba.args import Mamba2Args
from apps.mamba.huggingface import Mamba2
from apps.xlstm.args import MLSTMArgs
from apps.xlstm.huggingface import XLSTM
from lingua.checkpoint.load_weights import load_weights, open_source
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState
from lingua.config.base import ConfigError
from lingua.config.frozen import dump_yaml
from lingua.config.keys.checkpoint import CheckpointArgs
from lingua.config.keys.model import CrossEntropyArgs, DecoderArgs, HybridArgs
from lingua.files import RunError
from lingua.model.context import ForwardContext
from lingua.model.decoder import Decoder
from lingua.model.huggingface import EMBEDDING, HEAD, Translation, read_config, translation_of
from lingua.model.loss import CrossEntropy
from lingua.train.describe import described
from tests.cli import Lingua
from tests.families import SHARED, build

VOCAB = 258  # that of the tokenizer `bytes`
TOKENS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
MAMBA: dict[str, Any] = {**SHARED, "vocab_size": VOCAB, "n_heads": 4, "state_dim": 8, "multiple_of": 32}
MAMBA |= {"conv_size": 4, "conv_bias": True, "dt_bias": True, "ssm_chunk_size": 8}
MLSTM: dict[str, Any] = {**SHARED, "vocab_size": VOCAB, "dim": 128, "n_layers": 2, "chunk_size": 8}


def mamba(**more: Any) -> Mamba2Args:
    return Mamba2Args.model_validate(MAMBA | more)


def mlstm(**more: Any) -> MLSTMArgs:
    return MLSTMArgs.model_validate(MLSTM | more)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Change every parameter, also those that begin as 0 or 1, so that none is without effect."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


# -- the same function and gradients ---------------------------------------------------------------------------------


def their_model(kind: str) -> Any:
    """A small model of transformers', in a state in which it trains."""
    import transformers  # slow to import

    if kind == "mamba2":
        sizes: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
        return transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**sizes, num_hidden_layers=3, vocab_size=VOCAB, chunk_size=8)
        )
    trains: dict[str, Any] = {"mode": "train", "return_last_states": True, "autocast_kernel_dtype": "float32"}
    return transformers.xLSTMForCausalLM(
        transformers.xLSTMConfig(
            hidden_size=128, num_heads=4, num_hidden_layers=2, vocab_size=VOCAB, chunk_size=8, **trains
        )
    )


@pytest.mark.parametrize("translation", [Mamba2(), XLSTM()], ids=["mamba2", "xlstm"])
def test_logits_loss_and_gradients_are_theirs(translation: Translation, tmp_path: Path) -> None:
    theirs = their_model(translation.model_types[0])
    draw(theirs)
    theirs.save_pretrained(tmp_path)
    args = described(tmp_path / "config.json").model
    assert isinstance(args, DecoderArgs)
    ours = build(args)
    load_weights(ours, tmp_path)

    found = theirs(TOKENS, labels=TOKENS, use_cache=False)
    found.loss.backward()
    assert_near(ours(TOKENS), found.logits)
    labels = functional.pad(TOKENS[:, 1:], (0, 1), value=-100)
    loss_sum, n_labels = ours(TOKENS, labels=labels, loss=CrossEntropy(CrossEntropyArgs()))
    loss = loss_sum / n_labels
    loss.backward()
    assert_near(loss, found.loss)

    own = dict(ours.named_parameters())
    make = translation.into_ours({}, tmp_path)
    gradients = {translation.our_name(name): parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == own.keys()
    for name, gradient in gradients.items():
        grad = own[name].grad
        assert grad is not None
        assert_near(grad, make(name, gradient))
        assert float(grad.abs().max()) > 0, name


def test_the_recurrence_of_hawk_is_that_of_recurrent_gemma() -> None:
    """Their gates are block-diagonal, with a bias; their rates are per channel. With equal blocks both are ours."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    args = HawkArgs(**SHARED, multiple_of=16, n_heads=4)
    ours, width = RGLRU(args, 0), args.width
    theirs = RecurrentGemmaRglru(RecurrentGemmaConfig(lru_width=width, num_attention_heads=args.n_heads))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.0 if "bias" in name else 0.5))
        ours.a.copy_(torch.randn(len(ours.a), generator=generator))
        theirs.recurrent_param.copy_(ours.a.repeat(args.n_heads))
        for gate, blocks in ((ours.a_gate, theirs.recurrent_gate_weight), (ours.input_gate, theirs.input_gate_weight)):
            gate.weight.copy_(torch.block_diag(*blocks.transpose(1, 2)))

    x = torch.randn(2, 50, width, generator=generator)
    weight = torch.randn(x.shape, generator=generator)
    x_here, x_there = x.clone().requires_grad_(), x.clone().requires_grad_()
    here = ours(x_here, ForwardContext())
    # no position is 0: at the begin of a row they leave sqrt(1 - a^2) out, Meta Lingua and we do not
    there = theirs(x_there, torch.arange(1, 51).expand(2, 50))
    assert_near(here, there)
    (here * weight).sum().backward()
    (there * weight).sum().backward()

    def grad(tensor: Tensor) -> Tensor:
        assert tensor.grad is not None
        return tensor.grad

    assert_near(grad(x_here), grad(x_there))
    assert_near(grad(ours.a), grad(theirs.recurrent_param).view(args.n_heads, -1).sum(0))
    for gate, blocks in ((ours.a_gate, theirs.recurrent_gate_weight), (ours.input_gate, theirs.input_gate_weight)):
        dense = grad(gate.weight).unflatten(0, (args.n_heads, -1)).unflatten(2, (args.n_heads, -1))
        diagonal = torch.stack([dense[head, :, head].T for head in range(args.n_heads)])
        assert_near(diagonal, grad(blocks))


# -- out and in ------------------------------------------------------------------------------------------------------

OUT_AND_IN: dict[str, DecoderArgs] = {
    "mamba2": mamba(),
    "mamba2, tied, without bias of the convolution": mamba(
        conv_bias=False, conv_size=3, norm_eps=1e-3, weight_tying=True, vocab_multiple_of=64
    ),
    "mlstm": mlstm(n_heads=2),
    "mlstm, other widths and caps": mlstm(
        hidden_dim=101, qk_dim_factor=1.0, gate_soft_cap=5.0, output_logit_soft_cap=2.0
    ),
}


def make_run(run_dir: Path, args: DecoderArgs) -> Decoder:
    """A run with one checkpoint, at step 1."""
    model = build(args)
    draw(model)
    run_dir.mkdir(parents=True)
    tree = {"name": "r", "dump_dir": str(run_dir), "data": {"seq_len": 64, "tokenizer": {"name": "bytes"}}}
    section = {"type": args.type, **args.model_dump(mode="json", exclude_unset=True)}
    (run_dir / "config.yaml").write_text(dump_yaml(tree | {"model": section}))
    manager = CheckpointManager(CheckpointArgs(), run_dir)
    manager.save(1, TrainState(model, torch.optim.AdamW(model.parameters())))
    manager.close()
    return model


def logits_at(folder: Path, config: Path) -> Tensor:
    """Logits of the weights in a folder in the model that a config describes."""
    args = described(config).model
    assert isinstance(args, DecoderArgs)
    model = build(args)
    load_weights(model, folder)
    return model(TOKENS)


@pytest.mark.parametrize("args", OUT_AND_IN.values(), ids=OUT_AND_IN.keys())
@torch.no_grad()
def test_transformers_computes_the_same_and_the_way_back_is_bitwise(args: DecoderArgs, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM  # slow to import

    run, hf, back = tmp_path / "run", tmp_path / "hf", tmp_path / "back"
    wanted = make_run(run, args)(TOKENS)
    assert make_export(str(run), hf, Format.hf).warnings == []
    opened: Any = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    theirs, loading = opened
    assert not any(loading.values()), loading  # nothing is missing, nothing left over
    assert_near(theirs.eval()(TOKENS).logits, wanted)

    assert torch.equal(logits_at(hf, hf / "config.json"), wanted)
    make_import(hf, back)
    assert torch.equal(logits_at(back, back / "config.yaml"), wanted)
    source, origin = open_source(back), open_source(run)
    assert source.shapes.keys() == origin.shapes.keys()
    for name in source.shapes:
        is_padded = name in (EMBEDDING, HEAD)
        assert torch.equal(source.read(name), origin.read(name)[: VOCAB if is_padded else None]), name


@pytest.mark.parametrize("args", [OUT_AND_IN["mamba2"], OUT_AND_IN["mlstm"]], ids=["mamba2", "mlstm"])
def test_generate_says_the_same_from_every_form(args: DecoderArgs, tmp_path: Path, lingua: Lingua) -> None:
    run = tmp_path / "run"
    make_run(run, args)
    make_export(str(run), tmp_path / "hf", Format.hf)
    make_import(tmp_path / "hf", tmp_path / "back")
    said = [
        lingua("generate", f"ckpt={place}", "prompt=ab", "max_gen_len=5", "temperature=0", "device=cpu", "dtype=fp32")
        for place in (run, tmp_path / "hf", tmp_path / "back")
    ]
    assert {code for code, _, _ in said} == {0}, said
    # of bytes that are no text, the tokenizer `bytes` shows the number, and a tokenizer.json nothing
    assert len({re.sub(r"\\x[89a-f][0-9a-f]", "\ufffd", out) for _, out, _ in said}) == 1


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (mamba(conv_size=None), "model.conv_size is null, but a Hugging Face mamba2 has a"),
        (mamba(dt_bias=False), "model.dt_bias is false, but a Hugging Face mamba2 has this"),
        (mamba(D_has_head_dim=True), "model.D_has_head_dim is true, but a Hugging Face mamba2 has one D"),
        (mamba(learnable_init_states=True), "model.learnable_init_states is true, but a Hugging Face"),
        (mamba(n_groups=2), "model.n_groups is 2, but a Hugging Face mamba2 norms each group by itself"),
        (mamba(hidden_dim=48), "the hidden width is 48, but a Hugging Face mamba2 has a multiple of"),
        (mamba(norm="layer"), "model.norm is layer, but a Hugging Face mamba2 has RMSNorm only"),
        (mlstm(norm="layer"), "model.norm is layer, but a Hugging Face xlstm has RMSNorm only"),
        (mlstm(weight_tying=True), "model.weight_tying is true, but a Hugging Face xlstm has a head of"),
        (mlstm(output_logit_soft_cap=None), "model.output_logit_soft_cap is null, but a Hugging Face"),
        (mlstm(qk_dim_factor=0.25), "model.qk_dim_factor makes a width of 32, but the cache of a"),
        (HybridArgs(**SHARED, layers=["mlstm"]), "model.type is 'hybrid'"),
    ],
)
def test_what_their_class_cannot_do_is_refused(args: DecoderArgs, sentence: str, tmp_path: Path) -> None:
    tree = {"model": {"type": args.type, **args.model_dump(mode="json", exclude_unset=True)}, "dump_dir": "run"}
    (tmp_path / "config.yaml").write_text(dump_yaml(tree))
    with pytest.raises(ConfigError) as refused:
        make_export(str(tmp_path), tmp_path / "hf", Format.hf)
    (problem,) = refused.value.problems
    assert sentence in problem
    assert problem.endswith("use --format safetensors")


@pytest.mark.parametrize(
    ("kind", "key", "value", "sentence"),
    [
        ("mamba2", "n_groups", 8, "n_groups is 8; there each group is normed by itself, here all heads are"),
        ("mamba2", "conv_kernel", 5, "conv_kernel is 5; our convolution has 2 to 4 taps"),
        ("mamba2", "use_bias", True, "use_bias is true; our projections have no bias"),
        ("mamba2", "hidden_act", "gelu", "hidden_act is 'gelu'; our blocks have silu only"),
        ("mamba2", "time_step_limit", [0.0, 1.0], "time_step_limit is [0.0, 1.0]; our step sizes have no limit"),
        ("mamba2", "model_type", "mamba", "these can be taken over: llama, mamba2, mistral, qwen3, xlstm"),
        ("xlstm", "weight_mode", "fused", "weight_mode is 'fused'; our matrices are separate"),
        ("xlstm", "use_bias", True, "use_bias is true; our projections have no bias"),
        ("xlstm", "eps", 1e-3, "eps is 0.001; our mLSTM has 1e-6"),
    ],
)
def test_what_ours_cannot_do_is_refused(kind: str, key: str, value: object, sentence: str, tmp_path: Path) -> None:
    args = OUT_AND_IN["mamba2" if kind == "mamba2" else "mlstm"]
    translation = translation_of(args)
    assert translation is not None
    config = translation.config_json(args, vocab_size=VOCAB, max_seqlen=64, dtype="float32", special={})
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConfigError) as refused:
        described(tmp_path / "config.json")
    (problem,) = refused.value.problems
    assert problem.startswith(f"{tmp_path / 'config.json'}: ")
    assert sentence in problem


def test_older_folders_say_infinity_as_no_json_does(tmp_path: Path) -> None:
    args = OUT_AND_IN["mamba2"]
    config = Mamba2().config_json(args, vocab_size=VOCAB, max_seqlen=64, dtype="float32", special={})
    text = json.dumps(config | {"time_step_limit": [0.0, float("inf")]})
    assert "Infinity]" in text
    (tmp_path / "config.json").write_text(text)
    assert described(tmp_path / "config.json").model.type == "mamba2"
    (tmp_path / "config.json").write_text(text[:-1])
    with pytest.raises(RunError, match=r"config\.json is not valid JSON \(.*\); it is damaged or was edited"):
        read_config(tmp_path)
