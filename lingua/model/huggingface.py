"""Translate our models to Hugging Face's config.json and tensor names, and back. Torch-free.

A translated config describes the same function; a key without a counterpart is refused by name. Each architecture has
a `Translation`, which a family's Args name in `hugging_face`. That of our own decoder is here: `llama`, with qk_norm
`qwen3`, with only a sliding window `mistral`.

Rotary embeddings: Hugging Face pairs the two halves of a head, we (like Meta) adjacent rows. So the rows of wq and wk
are reordered.

    head of width 8, their rows:  0 1 2 3 | 4 5 6 7      pairs (0,4) (1,5) (2,6) (3,7)
                     our rows:    0 4 1 5 2 6 3 7        the same pairs, side by side
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lingua.config.base import ConfigError, named, parts
from lingua.config.keys.model import LlamaArgs, ModelArgs
from lingua.files import CommandError, RunError, read_bytes, read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"


class Translation:
    """A Hugging Face architecture that computes the same function as one of our families."""

    model_types: ClassVar[tuple[str, ...]]
    """`model_type` in config.json."""
    layers: ClassVar[str]
    """Prefix of a layer's number in their tensor names."""
    names: ClassVar[Mapping[str, str]]
    """Their tensor names -> ours; within a layer, without `layers` and its number."""
    keys: ClassVar[Mapping[str, str]] = {}
    """Their keys -> ours, if the values are the same."""

    # -- names and values

    def our_name(self, name: str) -> str:
        """Return our name of a tensor; an unknown name is returned unchanged."""
        layer = re.match(re.escape(self.layers) + r"(\d+\.)", name)
        own = name if layer is None else name[layer.end() :]
        if own not in self.names:
            return name
        return f"{'' if layer is None else f'layers.{layer[1]}'}{self.names[own]}"

    def their_name(self, name: str) -> str:
        """Return their name of a tensor. Raises KeyError for one that their model does not have."""
        theirs = {ours: their for their, ours in self.names.items()}
        layer = re.match(r"layers\.(\d+\.)", name)
        return theirs[name] if layer is None else f"{self.layers}{layer[1]}{theirs[name[layer.end() :]]}"

    @property
    def embedding(self) -> str:
        """Their name of the embedding."""
        return self.their_name(EMBEDDING)

    def our_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return our shape of one of their tensors, given our name."""
        return shape

    def their_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Undo `our_shape`."""
        return shape

    def into_ours(self, config: Mapping[str, Any], path: Path) -> Callable[[str, Tensor], Tensor]:
        """Return a function of (our name, their tensor) that returns our tensor. `path`: the config's, for errors."""
        return lambda name, tensor: tensor.reshape(self.our_shape(name, tuple(tensor.shape)))

    def into_theirs(self, model: Any) -> Callable[[str, Tensor], Tensor]:
        """Return a function of (our name, our tensor) that returns their tensor."""
        return lambda name, tensor: tensor.reshape(self.their_shape(name, tuple(tensor.shape)))

    # -- configs

    def config_json(
        self, model: Any, *, vocab_size: int, max_seqlen: int, dtype: str, special: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the config.json of our model. `dtype`: torch's name of the type of the written tensors."""
        return {
            **{theirs: getattr(model, ours) for theirs, ours in self.keys.items()},
            **self.own_keys(model),
            "vocab_size": vocab_size,
            "hidden_size": model.dim,
            "num_hidden_layers": model.n_layers,
            "max_position_embeddings": max_seqlen,
            "tie_word_embeddings": model.weight_tying,
            **special,
            "torch_dtype": dtype,
            "use_cache": True,
        }

    def model_section(self, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return our `model:` section for a config.json, read from `path`.

        Raises ConfigError with everything that has no counterpart here.
        """
        if problems := [f"{path}: {problem}" for problem in self.not_ours(config)]:
            raise ConfigError(problems)
        try:
            return {
                "dim": config["hidden_size"],
                "n_layers": config["num_hidden_layers"],
                "vocab_size": config["vocab_size"],
                "max_seqlen": config.get("max_position_embeddings", 2048),
                "weight_tying": bool(config.get("tie_word_embeddings", False)),
                **self.own_section(config, path),
                **{ours: config[theirs] for theirs, ours in self.keys.items() if theirs in config},
            }
        except KeyError as error:
            raise ConfigError(f"{path} lacks {error.args[0]}, which gives the size of the model") from None

    def not_theirs(self, model: Any) -> Iterator[str]:
        """Yield what our model does that theirs cannot: "model.<key> is ..., but ..."."""
        if model.norm != "rms":
            yield f"model.norm is {model.norm}, but a Hugging Face {self.model_types[0]} has RMSNorm only"
        if not getattr(model, "causal", True):
            yield f"model.causal is false, but a Hugging Face {self.model_types[0]} looks back only"

    def not_ours(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Yield what a config.json asks for that our model cannot do."""
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            yield f"hidden_act is {act!r}; our blocks have silu only"

    def own_keys(self, model: Any) -> dict[str, Any]:
        """Return the keys of config.json beyond `keys` and those of every model."""
        raise NotImplementedError

    def own_section(self, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return the keys of our section beyond those of every model; `keys` of config.json override them.

        Raises KeyError.
        """
        raise NotImplementedError


# -- which one -------------------------------------------------------------------------------------------------------


def translation_of(model: ModelArgs) -> Translation | None:
    """Return the translation of a family, or None if Hugging Face has no such model."""
    return named(model, "hugging_face")() if model.hugging_face else None


def translations() -> list[Translation]:
    """Return the translations of all registered families, our own decoder's first."""
    families = [part for part in parts("model").values() if issubclass(part, ModelArgs) and part.hugging_face]
    by_place = {family.hugging_face: family for family in (LlamaArgs, *families)}
    return [named(family, "hugging_face")() for family in by_place.values()]


def described_by(config: Mapping[str, Any], path: Path, among: Sequence[Translation]) -> Translation:
    """Return the translation for the model_type of a config.json. Raises ConfigError if there is none."""
    kind = config.get("model_type")
    for translation in among:
        if kind in translation.model_types:
            return translation
    known = ", ".join(sorted(name for translation in among for name in translation.model_types))
    raise ConfigError(f"{path}: model_type is {kind!r}; these can be taken over: {known}")


# -- files -----------------------------------------------------------------------------------------------------------


def special_ids(bos_id: int | None, eos_id: int | None, end_ids: Sequence[int]) -> dict[str, Any]:
    """Return the keys for begin and end tokens of both config.json and generation_config.json."""
    ends = [*end_ids, *([eos_id] if eos_id is not None and eos_id not in end_ids else [])]
    return {"bos_token_id": bos_id, "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}


def read_config(folder: Path) -> dict[str, Any]:
    """Return a Hugging Face folder's config.json. Raises CommandError if there is none, RunError if it is damaged."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(read_bytes(path))  # not orjson: older Mamba-2 folders hold a bare Infinity
    except FileNotFoundError:
        raise CommandError(f"{path} is missing; Hugging Face weights need it") from None
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); it is damaged or was edited") from None
    if not isinstance(config, dict):
        raise RunError(f"{path} is not a JSON object")
    return config


def end_ids(config: Mapping[str, Any], folder: Path) -> list[int]:
    """Return the ids that end a generated text, from generation_config.json or else config.json."""
    path = folder / GENERATION_FILE
    generation = read_json(path) if path.is_file() else {}
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int) and i >= 0]


# -- our own decoder ---------------------------------------------------------------------------------------------------


_LLAMA = {
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
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}
_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Llama(Translation):
    """Embedding, blocks of attention and SwiGLU, norm and head."""

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen3")
    layers: ClassVar[str] = "model.layers."
    names: ClassVar[Mapping[str, str]] = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _LLAMA.items()}

    def into_ours(self, config: Mapping[str, Any], path: Path) -> Callable[[str, Tensor], Tensor]:
        width = head_width(config, path)
        return lambda name, tensor: pair_neighbours(tensor, width) if _is_rotated(name) else tensor

    def into_theirs(self, model: Any) -> Callable[[str, Tensor], Tensor]:
        return lambda name, tensor: pair_halves(tensor, model.head_width) if _is_rotated(name) else tensor

    def own_keys(self, model: Any) -> dict[str, Any]:
        scaling = model.rope_scaling
        rope = None if scaling is None else {"rope_type": "llama3", **{k: getattr(scaling, k) for k in _LLAMA3_ROPE}}
        return {
            **_architecture(model),
            "intermediate_size": model.ffn_width,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_width,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.rope_theta,
            "rope_scaling": rope,
            "attention_bias": False,
            "attention_dropout": 0.0,
        }

    def own_section(self, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        rope = _rope(config)
        scaling = {key: rope[key] for key in _LLAMA3_ROPE if key in rope}
        section = {
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "head_dim": head_width(config, path),
            "hidden_dim": config["intermediate_size"],
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_theta": float(rope.get("rope_theta") or 10000.0),
            "qk_norm": config["model_type"] == "qwen3",
            "sliding_window": _window(config),
        }
        return {**section, "rope_scaling": scaling} if scaling else section

    def not_ours(self, config: Mapping[str, Any]) -> Iterator[str]:
        yield from super().not_ours(config)
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
        mixed = config["model_type"] == "qwen3" and not config.get("layer_types") and config.get("max_window_layers")
        if mixed and _window(config):
            yield "max_window_layers is not 0; our layers all have the same window"


def _architecture(model: LlamaArgs) -> dict[str, Any]:
    """Return the keys that name the architecture of our model."""
    if model.qk_norm:
        window = model.sliding_window
        layer_type = "full_attention" if window is None else "sliding_attention"
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window is not None else model.n_layers,
            "layer_types": [layer_type] * model.n_layers,
        }
    if model.sliding_window is not None:
        own = {"model_type": "mistral", "sliding_window": model.sliding_window}
        return {"architectures": ["MistralForCausalLM"], **own}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}


def head_width(config: Mapping[str, Any], path: Path) -> int:
    """Return E, the width of a head."""
    try:
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    except (KeyError, TypeError, ZeroDivisionError):
        raise RunError(f"{path} lacks hidden_size and num_attention_heads (or head_dim)") from None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and its scaling, from either generation of config.json (transformers 5: rope_parameters)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta"), **rope}


def _window(config: Mapping[str, Any]) -> int | None:
    uses = config["model_type"] == "mistral" or config.get("use_sliding_window", False)
    return config.get("sliding_window") if uses else None


def _is_rotated(name: str) -> bool:
    """Return whether Hugging Face has the rows of this tensor (our name) in another order."""
    return any(part in name for part in ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm"))


def pair_neighbours(tensor: Tensor, head_width: int) -> Tensor:
    """Reorder the rows of each head from halves (i, i + head_width/2) to adjacent pairs (2i, 2i + 1)."""
    heads = tensor.unflatten(0, (-1, 2, head_width // 2))  # (H, half, pair, ...)
    return heads.transpose(1, 2).reshape(tensor.shape)


def pair_halves(tensor: Tensor, head_width: int) -> Tensor:
    """Undo `pair_neighbours`."""
    heads = tensor.unflatten(0, (-1, head_width // 2, 2))  # (H, pair, half, ...)
    return heads.transpose(1, 2).reshape(tensor.shape)
