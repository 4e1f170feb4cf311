"""Hugging Face's `mamba2`. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lingua.model.huggingface import EMBEDDING, HEAD, Translation

_ENDLESS = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}])
"""Spellings of a time_step_limit without a limit (transformers 4 and 5)."""


class Mamba2(Translation):
    """Mamba-2 with a convolution and dt_bias, and one group, since transformers normalizes each group by itself."""

    model_types: ClassVar[tuple[str, ...]] = ("mamba2",)
    layers: ClassVar[str] = "backbone.layers."
    names: ClassVar[Mapping[str, str]] = {
        "backbone.embeddings.weight": EMBEDDING,
        "backbone.norm_f.weight": "norm.weight",
        "lm_head.weight": HEAD,
        "norm.weight": "ssm_norm.weight",
        "mixer.in_proj.weight": "ssm.in_proj.weight",
        "mixer.conv1d.weight": "ssm.conv_weight",
        "mixer.conv1d.bias": "ssm.conv_bias",
        "mixer.dt_bias": "ssm.dt_bias",
        "mixer.A_log": "ssm.A_log",
        "mixer.D": "ssm.D",
        "mixer.norm.weight": "ssm.ssm_norm.weight",
        "mixer.out_proj.weight": "ssm.out_proj.weight",
    }

    keys: ClassVar[Mapping[str, str]] = {
        "num_heads": "n_heads",
        "state_size": "state_dim",
        "n_groups": "n_groups",
        "conv_kernel": "conv_size",
        "use_conv_bias": "conv_bias",
        "layer_norm_epsilon": "norm_eps",
        "chunk_size": "ssm_chunk_size",
    }

    def our_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], *shape[2:]) if name.endswith("ssm.conv_weight") else shape  # (C, 1, K) there

    def their_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], 1, *shape[1:]) if name.endswith("ssm.conv_weight") else shape

    def own_keys(self, model: Any) -> dict[str, Any]:
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "head_dim": model.width // model.n_heads,
            "expand": model.width // model.dim,
            "use_bias": False,
            "hidden_act": "silu",
            "pad_token_id": None,
        }

    def own_section(self, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        width = config["num_heads"] * config["head_dim"]
        return {"type": "mamba2", "hidden_dim": width, "conv_size": 4, "conv_bias": True, "dt_bias": True}

    def not_theirs(self, model: Any) -> Iterator[str]:
        yield from super().not_theirs(model)
        their = "a Hugging Face mamba2"
        if model.conv_size is None:
            yield f"model.conv_size is null, but {their} has a convolution"
        if not model.dt_bias:
            yield f"model.dt_bias is false, but {their} has this bias"
        if model.D_has_head_dim:
            yield f"model.D_has_head_dim is true, but {their} has one D per head"
        if model.learnable_init_states:
            yield f"model.learnable_init_states is true, but {their} begins with 0"
        if model.n_groups > 1:
            yield f"model.n_groups is {model.n_groups}, but {their} norms each group by itself, not all heads together"
        if model.width % model.dim:
            yield f"the hidden width is {model.width}, but {their} has a multiple of dim {model.dim}"

    def not_ours(self, config: Mapping[str, Any]) -> Iterator[str]:
        yield from super().not_ours(config)
        if config.get("use_bias"):
            yield "use_bias is true; our projections have no bias"
        if config.get("n_groups", 8) != 1:
            yield f"n_groups is {config.get('n_groups', 8)}; there each group is normed by itself, here all heads are"
        if (taps := config.get("conv_kernel", 4)) not in (2, 3, 4):
            yield f"conv_kernel is {taps}; our convolution has 2 to 4 taps"
        if (limit := config.get("time_step_limit") or _ENDLESS[0]) not in _ENDLESS:
            yield f"time_step_limit is {limit}; our step sizes have no limit"
