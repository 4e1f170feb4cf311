"""Checkpoints of Meta Lingua's apps mamba, fastRNN and mtp: their names of tensors, their params.json.

Names, shapes and keys are written from its repository (facebookresearch/lingua, apps/).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import apps.fastRNN.args
import apps.main.args
from lingua.checkpoint.load_weights import load_weights
from lingua.config.base import ConfigError, build_part
from lingua.config.keys.model import DecoderArgs
from lingua.train.describe import config_of, described
from tests.cli import Lingua

VOCAB, DIM, WIDTH, LRU, FFN, STATE, HEADS, TAPS = 258, 32, 64, 48, 96, 8, 4, 4
SHARED: dict[str, Any] = {"dim": DIM, "n_layers": 2, "n_heads": HEADS, "multiple_of": 16, "ffn_dim_multiplier": None}
SHARED |= {"norm_eps": 1e-5, "init_base_std": None, "init_std_factor": "disabled", "seed": 42, "vocab_size": VOCAB}
RNN = {**SHARED, "conv_size": TAPS, "weight_tying": False, "loss_reduction": "mean"}
INIT = {"dt_max": 0.1, "dt_min": 0.001, "dt_init_floor": 1e-4, "A_init_min": 1, "A_init_max": 16}
MAMBA = {**RNN, "state_dim": STATE, "n_groups": 1, "dt_bias": False, "D_has_head_dim": False, "init_args": INIT}
MAMBA |= {"learnable_init_states": False, "ssm_chunk_size": 256, "init_use_depth": False}
MTP = {**SHARED, "head_dim": None, "n_kv_heads": None, "rope_theta": 10000.0, "max_seqlen": 64, "n_future_head": 3}
MTP |= {"attn_impl": "sdpa", "mask": "causal", "sliding_window": None}

CONV = WIDTH + 2 * STATE
SWIGLU = {"feed_forward.w1": (FFN, DIM), "feed_forward.w3": (FFN, DIM), "feed_forward.w2": (DIM, FFN)}
# What is particular in params.json; names in a layer, without a last `.weight`, and shapes.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "mamba2": (
        {"model": MAMBA},
        {
            "ssm_norm": (DIM,),
            "ssm.in_proj": (WIDTH + CONV + HEADS, DIM),
            "ssm.conv_weight": (CONV, TAPS),
            "ssm.A_log": (HEADS,),
            "ssm.D": (HEADS,),
            "ssm.ssm_norm": (WIDTH,),
            "ssm.out_proj": (DIM, WIDTH),
        },
    ),
    "mingru": (
        {"model": RNN, "model_type": "minGRU"},
        {
            "gru_norm": (DIM,),
            "gru.conv_weight": (WIDTH, TAPS),
            **{f"gru.{name}": (WIDTH, DIM) for name in ("w", "wz", "wh_tilde")},
            "gru.wo": (DIM, WIDTH),
        },
    ),
    "minlstm": (
        {"model": RNN, "model_type": "minLSTM"},
        {
            "lstm_norm": (DIM,),
            "lstm.conv_weight": (2 * WIDTH, TAPS),
            "lstm.w": (WIDTH, DIM),
            "lstm.wfi": (2 * WIDTH, DIM),
            "lstm.wh_tilde": (WIDTH, DIM),
            "lstm.wo": (DIM, WIDTH),
        },
    ),
    "hawk": (
        {"model": RNN | {"lru_dim_multiplier": None}, "model_type": "hawk"},
        {
            "rlgru_norm": (DIM,),
            "rlgru_block.wx": (LRU, DIM),
            "rlgru_block.wy": (LRU, DIM),
            "rlgru_block.rglru.conv_weight": (LRU, TAPS),
            "rlgru_block.rglru.a": (LRU // HEADS,),
            "rlgru_block.rglru.input_gate": (LRU, LRU),
            "rlgru_block.rglru.a_gate": (LRU, LRU),
            "rlgru_block.wo": (DIM, LRU),
            "ffn_norm": (DIM,),
            **SWIGLU,
        },
    ),
    "mtp": (
        {"model": MTP},
        {
            "attention_norm": (DIM,),
            **{f"attention.{name}": (DIM, DIM) for name in ("wq", "wk", "wv", "wo")},
            "ffn_norm": (DIM,),
            **SWIGLU,
        },
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def meta_checkpoint(folder: Path, family: str) -> dict[str, Tensor]:
    """consolidated.pth and params.json as Meta Lingua leaves them; returns its tensors."""
    sections, block = FAMILIES[family]
    bare = ("conv_weight", ".A_log", ".D", ".a")
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCAB, DIM), "norm.weight": (DIM,)}
    heads = [f"heads.{n}" for n in range(3)] if family == "mtp" else ["output"]
    shapes |= {f"{head}.weight": (VOCAB, DIM) for head in heads}
    for layer in range(2):
        shapes |= {
            f"layers.{layer}.{name}{'' if name.endswith(bare) else '.weight'}": shape for name, shape in block.items()
        }
    generator = torch.Generator().manual_seed(6)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    data = {"root_dir": "data", "sources": {"wiki": 1.0}, "batch_size": 2, "prefetch_size": 64, "seq_len": 64}
    data |= {"n_views": 4 if family == "mtp" else 2, "seed": 42, "add_bos": True, "add_eos": True, "load_async": True}
    data |= {"tokenizer": {"name": "bytes", "path": None}}
    others = {"name": "old", "dump_dir": "old", "seed": 777, "grad_acc_steps": 1, "gc_collect_freq": 1000, "steps": 10}
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps({**others, "data": data, **sections}))
    torch.save({"model": tensors}, folder / "consolidated.pth")
    return tensors


@every_family
@torch.no_grad()
def test_weights_and_params_make_the_model_of_that_family(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "0000000010" / "consolidated"
    tensors = meta_checkpoint(folder, family)
    args = described(config_of(str(folder))).model
    assert args.type == family
    assert isinstance(args, DecoderArgs)
    loaded, wanted = build_part(args), build_part(args)
    loaded.init_buffers()
    wanted.init_buffers()
    assert "tensors" in load_weights(loaded, folder)
    wanted.load_state_dict(tensors)
    tokens = torch.arange(40)[None]
    assert torch.equal(loaded(tokens), wanted(tokens))


@every_family
def test_generate_takes_such_a_folder_and_what_is_exported_of_it(family: str, tmp_path: Path, lingua: Lingua) -> None:
    folder = tmp_path / "consolidated"
    meta_checkpoint(folder, family)
    assert lingua("export", folder, tmp_path / "ours", "--format", "safetensors")[0] == 0
    said = [
        lingua("generate", f"ckpt={place}", "prompt=ab", "max_gen_len=5", "temperature=0", "device=cpu", "dtype=fp32")
        for place in (folder, tmp_path / "ours")
    ]
    assert [code for code, _, _ in said] == [0, 0], said
    assert said[0][1] == said[1][1]


@pytest.mark.parametrize(("given", "chosen"), [("minLSTM", "minlstm"), ("hawk", "hawk"), (None, "mingru")])
def test_every_app_takes_model_type_and_keeps_model_type_alone(given: str | None, chosen: str) -> None:
    for schema in (apps.main.args.TrainArgs, apps.fastRNN.args.TrainArgs):
        tree = {"model": {"type": chosen} if given is None else {"dim": 32}, "model_type": given}
        args = schema.model_validate(tree)
        assert args.model.type == chosen
        assert "model_type" not in args.model_dump()


def test_keys_that_several_families_have_name_none(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps({"model": {"n_heads": 4, "conv_size": 4}}))
    with pytest.raises(
        ConfigError, match=r"params\.json:1: unknown key model\.conv_size for this model\.type; it is a"
    ):
        described(tmp_path / "params.json")
