"""The exported folder has the config and the tensors that vLLM's loader of Llamas takes; vLLM itself is not needed.

What it takes is from `vllm/model_executor/models/llama.py` (`LlamaDecoderLayer`, `LlamaForCausalLM.load_weights`) at
commit 0035bdf of vllm-project/vllm: q, k and v are put on top of each other, and so are gate and up.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apps.cli.export import Format, make_export
from tests.apps.cli.test_export import SCALING, make_run

STACKED = {
    ".q_proj": ".qkv_proj", ".k_proj": ".qkv_proj", ".v_proj": ".qkv_proj",
    ".gate_proj": ".gate_up_proj", ".up_proj": ".gate_up_proj",
}  # fmt: skip


def parameters(config: dict[str, Any]) -> dict[str, list[int]]:
    """The parameters that vLLM makes for a config, with their shapes."""
    dim, width, n_heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or dim // n_heads
    layer = {
        "self_attn.qkv_proj": [(n_heads + 2 * config["num_key_value_heads"]) * head, dim],
        "self_attn.o_proj": [dim, n_heads * head],
        "mlp.gate_up_proj": [2 * width, dim],
        "mlp.down_proj": [dim, width],
        "input_layernorm": [dim],
        "post_attention_layernorm": [dim],
    }
    layers = {f"model.layers.{i}.{n}": shape for i in range(config["num_hidden_layers"]) for n, shape in layer.items()}
    head_of = {} if config["tie_word_embeddings"] else {"lm_head": [config["vocab_size"], dim]}
    whole = {"model.embed_tokens": [config["vocab_size"], dim], "model.norm": [dim], **layers, **head_of}
    return {f"{name}.weight": shape for name, shape in whole.items()}


@pytest.mark.parametrize(
    "model", [{}, {"weight_tying": True, "n_kv_heads": None}, {"rope_scaling": SCALING, "rope_theta": 500.0}]
)
def test_vllm_s_loader_takes_every_tensor_and_lacks_none(tmp_path: Path, model: dict[str, Any]) -> None:
    make_run(tmp_path / "run", **model)
    make_export(str(tmp_path / "run"), tmp_path / "hf", Format.hf)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_act"], config["attention_bias"], config["mlp_bias"]) == ("silu", False, False)
    assert {"rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings"} <= config.keys()
    rows, columns = Counter[str](), dict[str, list[int]]()
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        part = next((part for part in STACKED if f"{part}." in name), None)
        target = name if part is None else name.replace(part, STACKED[part])
        rows[target] += tensor.shape[0]
        columns[target] = list(tensor.shape[1:])
        assert tensor.dtype == torch.float32
    assert {name: [rows[name], *columns[name]] for name in rows} == parameters(config)
