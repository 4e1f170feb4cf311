"""Hugging Face's `xlstm`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lingua.model.huggingface import EMBEDDING, HEAD, Translation

_OF_BLOCK = (
    "norm_mlstm.weight", "mlstm_layer.q.weight", "mlstm_layer.k.weight", "mlstm_layer.v.weight",
    "mlstm_layer.ogate_preact.weight", "mlstm_layer.igate_preact.weight", "mlstm_layer.igate_preact.bias",
    "mlstm_layer.fgate_preact.weight", "mlstm_layer.fgate_preact.bias", "mlstm_layer.multihead_norm.weight",
    "mlstm_layer.out_proj.weight", "norm_ffn.weight", "ffn.proj_up_gate.weight", "ffn.proj_up.weight",
    "ffn.proj_down.weight",
)  # fmt: skip
_SAME = ("qk_dim_factor", "v_dim_factor", "gate_soft_cap", "output_logit_soft_cap", "chunk_size", "norm_eps")
_WIDTH = ("ffn_proj_factor", "ffn_round_up_to_multiple_of")


class XLSTM(Translation):
    """mLSTM with separate matrices (`weight_mode: single`)."""

    model_types: ClassVar[tuple[str, ...]] = ("xlstm",)
    layers: ClassVar[str] = "backbone.blocks."
    names: ClassVar[Mapping[str, str]] = {
        "backbone.embeddings.weight": EMBEDDING,
        "backbone.out_norm.weight": "norm.weight",
        "lm_head.weight": HEAD,
        **{name: name for name in _OF_BLOCK},
    }
    keys: ClassVar[Mapping[str, str]] = {"num_heads": "n_heads", **{key: key for key in (*_SAME, *_WIDTH)}}

    def config_json(self, model: Any, *, dtype: str, **more: Any) -> dict[str, Any]:
        return super().config_json(model, dtype=dtype, **more) | {"autocast_kernel_dtype": dtype}

    def own_keys(self, model: Any) -> dict[str, Any]:
        # Their width is rounded down from a float: half a channel more than ours prevents the next lower one.
        width = () if model.hidden_dim is None else ((model.hidden_dim + 0.5) / model.dim, 1)
        return {
            "architectures": ["xLSTMForCausalLM"],
            "model_type": "xlstm",
            "embedding_dim": model.dim,
            "num_blocks": model.n_layers,
            "use_bias": False,
            "add_out_norm": True,
            "weight_mode": "single",
            **dict(zip(_WIDTH, width, strict=False)),
            "pad_token_id": None,
        }

    def own_section(self, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        # Their class never ties weights, whatever its config says.
        return {"type": "mlstm", "n_heads": config["num_heads"], "weight_tying": False}

    def model_section(self, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        older = {"hidden_size": config.get("embedding_dim"), "num_hidden_layers": config.get("num_blocks")}
        named = {key: value for key, value in older.items() if value is not None}
        return super().model_section({**named, **config}, path)

    def not_theirs(self, model: Any) -> Iterator[str]:
        yield from super().not_theirs(model)
        their = "a Hugging Face xlstm"
        if model.weight_tying:
            yield f"model.weight_tying is true, but {their} has a head of its own"
        if model.output_logit_soft_cap is None:
            yield f"model.output_logit_soft_cap is null, but {their} has one"
        for key, width in (("qk_dim_factor", model.qk_width), ("v_dim_factor", model.v_width)):
            if width % 64:
                yield f"model.{key} makes a width of {width}, but the cache of {their} has multiples of 64 only"

    def not_ours(self, config: Mapping[str, Any]) -> Iterator[str]:
        if config.get("use_bias"):
            yield "use_bias is true; our projections have no bias"
        if (mode := config.get("weight_mode", "single")) != "single":
            yield f"weight_mode is {mode!r}; our matrices are separate ('single')"
        if (eps := config.get("eps", 1e-6)) != 1e-6:
            yield f"eps is {eps}; our mLSTM has 1e-6"
