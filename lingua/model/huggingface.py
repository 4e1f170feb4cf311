"""Translate our models to Hugging Face's config.json and tensor names, and back. Torch-free.

A translated config describes the same function; a key without a counterpart is refused by name. Our decoder is their
`llama`; with qk_norm it is `qwen3`, with only a sliding window `mistral`.

They rotate the two halves of a head against each other, we (like Meta) rotate neighbours: `checkpoint/load_weights.py`
and `checkpoint/export_weights.py` reorder the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lingua.config.base import ConfigError
from lingua.config.keys.model import LlamaArgs
from lingua.files import RunError, read_json

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"

_OURS = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_ROTATED = ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm")


# -- names -----------------------------------------------------------------------------------------------------------


def our_name(name: str) -> str:
    """Hugging Face's name of a tensor -> ours; an unknown one stays as it is."""
    prefix, module, kind = _split(name.removeprefix("model.") if name.startswith("model.layers.") else name)
    return f"{prefix}{_OURS[module]}.{kind}" if module in _OURS else name


def their_name(name: str) -> str:
    """Our name of a tensor -> Hugging Face's. Raises KeyError for a name that a Llama does not have."""
    prefix, module, kind = _split(name)
    return f"{'model.' if prefix else ''}{prefix}{_THEIRS[module]}.{kind}"


def _split(name: str) -> tuple[str, str, str]:
    """("layers.0." or "", module, "weight")."""
    layer = re.match(r"layers\.\d+\.", name)
    prefix = layer[0] if layer else ""
    module, _, kind = name[len(prefix) :].rpartition(".")
    return prefix, module, kind


def is_rotated(name: str) -> bool:
    """Whether rows of this tensor (our name) lie in another order at Hugging Face's."""
    return any(part in name for part in _ROTATED)


def tensor_shapes(model: LlamaArgs, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Our name and shape of every tensor that this model has."""
    queries, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    block: dict[str, tuple[int, ...]] = {
        "attention.wq": (queries, model.dim),
        "attention.wk": (keys, model.dim),
        "attention.wv": (keys, model.dim),
        "attention.wo": (model.dim, queries),
        **({"attention.q_norm": (model.head_width,), "attention.k_norm": (model.head_width,)} if model.qk_norm else {}),
        "feed_forward.w1": (model.ffn_width, model.dim),
        "feed_forward.w3": (model.ffn_width, model.dim),
        "feed_forward.w2": (model.dim, model.ffn_width),
        "attention_norm": (model.dim,),
        "ffn_norm": (model.dim,),
    }
    layers = {
        f"layers.{layer}.{name}.weight": shape for layer in range(model.n_layers) for name, shape in block.items()
    }
    head = {} if model.weight_tying else {HEAD: (vocab_size, model.dim)}
    return {EMBEDDING: (vocab_size, model.dim), **layers, "norm.weight": (model.dim,), **head}


# -- our model in their format ---------------------------------------------------------------------------------------


def special_ids(bos_id: int | None, eos_id: int | None, end_ids: Sequence[int]) -> dict[str, Any]:
    """What both config.json and generation_config.json say of the tokens at begin and end."""
    ends = [*end_ids, *([eos_id] if eos_id is not None and eos_id not in end_ids else [])]
    return {"bos_token_id": bos_id, "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}


def config_json(
    model: LlamaArgs, *, vocab_size: int, max_seqlen: int, dtype: str, special: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of our model. `dtype`: torch's name of the type that its tensors are written in."""
    architecture, own = _architecture(model)
    rope: dict[str, Any] | None = None
    if (scaling := model.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return {
        "architectures": [architecture],
        **own,
        "vocab_size": vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": max_seqlen,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": model.weight_tying,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **special,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _architecture(model: LlamaArgs) -> tuple[str, dict[str, Any]]:
    """(class, what its config has besides) of the architecture that computes what ours does."""
    if model.qk_norm:
        window = model.sliding_window
        layer_type = "full_attention" if window is None else "sliding_attention"
        own = {
            "model_type": "qwen3",
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window is not None else model.n_layers,
            "layer_types": [layer_type] * model.n_layers,
        }
        return "Qwen3ForCausalLM", own
    if model.sliding_window is not None:
        return "MistralForCausalLM", {"model_type": "mistral", "sliding_window": model.sliding_window}
    return "LlamaForCausalLM", {"model_type": "llama", "mlp_bias": False}


# -- their model in our format -----------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises RunError when there is none."""
    path = folder / CONFIG_FILE
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise RunError(f"{path} is missing; Hugging Face weights need it") from None
    if not isinstance(config, dict):
        raise RunError(f"{path} is not a JSON object")
    return config


def end_ids(config: Mapping[str, Any], folder: Path) -> list[int]:
    """The ids that end a generated text, by generation_config.json or else config.json."""
    path = folder / GENERATION_FILE
    generation = read_json(path) if path.is_file() else {}
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int) and i >= 0]


def head_width(config: Mapping[str, Any], path: Path) -> int:
    """E, which says where the halves of a head are."""
    try:
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    except (KeyError, TypeError, ZeroDivisionError):
        raise RunError(f"{path} lacks hidden_size and num_attention_heads (or head_dim)") from None


def model_section(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Our `model:` section for a config.json. Raises ConfigError with all that we have no counterpart of.

    `path` is where it was read from, for the error.
    """
    if problems := [f"{path}: {problem}" for problem in _not_ours(config)]:
        raise ConfigError(problems)
    rope = _rope(config)
    scaling = {key: rope[key] for key in _LLAMA3_ROPE if key in rope}
    try:
        section = {
            "dim": config["hidden_size"],
            "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "head_dim": head_width(config, path),
            "hidden_dim": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_theta": float(rope.get("rope_theta") or 10000.0),
            "max_seqlen": config.get("max_position_embeddings", 2048),
            "weight_tying": bool(config.get("tie_word_embeddings", False)),
            "qk_norm": config["model_type"] == "qwen3",
            "sliding_window": _window(config),
        }
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error.args[0]}, which gives the size of the model") from None
    return {**section, "rope_scaling": scaling} if scaling else section


_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and what scales it, from either generation of config.json (transformers 5: rope_parameters)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta"), **rope}


def _window(config: Mapping[str, Any]) -> int | None:
    uses = config["model_type"] == "mistral" or config.get("use_sliding_window", False)
    return config.get("sliding_window") if uses else None


def _not_ours(config: Mapping[str, Any]) -> Iterator[str]:
    """What a config.json asks for that our model cannot do."""
    kind = config.get("model_type")
    if kind not in ("llama", "mistral", "qwen3"):
        yield f"model_type is {kind!r}; llama, mistral and qwen3 can be taken over"
        return
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        yield f"hidden_act is {act!r}; our feed-forward layer has silu only"
    yield from (
        f"{key} is true; our projections have no bias" for key in ("attention_bias", "mlp_bias") if config.get(key)
    )
    rope = _rope(config)
    if (rule := rope.get("rope_type") or rope.get("type") or "default") not in ("default", "llama3"):
        yield f"rope_type is {rule!r}; only llama3's scaling of rotary frequencies is known"
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial_rotary_factor is not 1; our heads are turned whole"
    if _window(config) and len({*(config.get("layer_types") or ["sliding_attention"])}) > 1:
        yield "layer_types has several kinds; our layers all have the same window"
    elif kind == "qwen3" and _window(config) and not config.get("layer_types") and config.get("max_window_layers"):
        yield "max_window_layers is not 0; our layers all have the same window"
