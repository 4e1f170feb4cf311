"""Write a model as one GGUF file, which llama.cpp and Ollama open, and a Modelfile beside it.

llama.cpp's `llama` rotates adjacent pairs of a head's values, as we do, so rows keep our order. Norms are always fp32.
The tokenizer is taken from its tokenizer.json; llama.cpp knows pre-tokenizers by name, so any other one is refused.

A GGUF file:  | header, keys and values | name, shape, type, offset of each tensor | tensors, at multiples of 32 bytes |
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor

from lingua.checkpoint import dcp, publish
from lingua.checkpoint.export_weights import ExportTensor
from lingua.config.base import ConfigError
from lingua.config.keys.train import TrainArgs
from lingua.files import DISK, Buffer, Files, RunError, write_whole
from lingua.model.huggingface import Translation
from lingua.model.tokenizer_json import TOKENIZER_FILE, write_tokenizer
from lingua.model.transformer import rotary_frequencies
from lingua.tokenizer import SPLITS, build_tokenizer

MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"
_ALIGNMENT = 32
_TYPES = {torch.float32: (0, 0), torch.float16: (1, 1), torch.bfloat16: (30, 32)}  # of a tensor, of a file
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
_SPLIT_NAMES = {"gpt2": "gpt-2", "cl100k": "llama-bpe", "o200k": "gpt-4o"}  # llama.cpp's names for our rules
_NEVER = "Ā Ā"  # a merge of two zero bytes: llama.cpp refuses an empty list of merges
_REMEDY = "use --format hf and llama.cpp's own convert_hf_to_gguf.py"


class Gguf(Translation):
    """llama.cpp's tensor names for a Llama."""

    model_types: ClassVar[tuple[str, ...]] = ("llama",)
    layers: ClassVar[str] = "blk."
    names: ClassVar[Mapping[str, str]] = {
        "token_embd.weight": "tok_embeddings.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "output.weight",
        "attn_norm.weight": "attention_norm.weight",
        "attn_q.weight": "attention.wq.weight",
        "attn_k.weight": "attention.wk.weight",
        "attn_v.weight": "attention.wv.weight",
        "attn_output.weight": "attention.wo.weight",
        "ffn_norm.weight": "ffn_norm.weight",
        "ffn_gate.weight": "feed_forward.w1.weight",
        "ffn_up.weight": "feed_forward.w3.weight",
        "ffn_down.weight": "feed_forward.w2.weight",
    }


def must_be_gguf(args: TrainArgs, their_type: str) -> None:
    """Raise ConfigError for a model that llama.cpp's `llama` cannot run. `their_type`: Hugging Face's model_type."""
    if their_type != "llama" or getattr(args.model, "qk_norm", False) or getattr(args.model, "sliding_window", None):
        raise ConfigError(
            "GGUF is written of a plain llama, and this model has another architecture, qk_norm or a sliding window; "
            f"{_REMEDY} where that knows it"
        )


def write_gguf(
    folder: Path,
    args: TrainArgs,
    items: Sequence[ExportTensor],
    *,
    advance: Callable[[int], object] = lambda n_bytes: None,
    files: Files = DISK,
) -> None:
    """Write model.gguf and the Modelfile. `items`: under the names of `Gguf`, the embedding first."""
    model: Any = args.model
    weights, max_seqlen = items[0].dtype, max(model.max_seqlen, args.data.seq_len)
    items = [replace(item, dtype=torch.float32) if len(item.shape) == 1 else item for item in items]
    if scaling := getattr(model, "rope_scaling", None):
        plain, scaled = (rotary_frequencies(model.head_width, model.rope_theta, each) for each in (None, scaling))
        items.append(ExportTensor("rope_freqs.weight", (len(plain),), torch.float32, lambda: plain / scaled))
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": args.name,
        "general.alignment": _ALIGNMENT,
        "general.file_type": _TYPES[weights][1],
        "llama.context_length": max_seqlen,
        "llama.embedding_length": model.dim,
        "llama.block_count": model.n_layers,
        "llama.feed_forward_length": model.ffn_width,
        "llama.attention.head_count": model.heads,
        "llama.attention.head_count_kv": model.kv_heads,
        "llama.attention.key_length": model.head_width,
        "llama.attention.value_length": model.head_width,
        "llama.attention.layer_norm_rms_epsilon": float(model.norm_eps),
        "llama.rope.freq_base": float(model.rope_theta),
        "llama.rope.dimension_count": model.head_width,
        "llama.vocab_size": items[0].shape[0],
        **tokenizer_keys(args, items[0].shape[0], max_seqlen),
    }
    publish.write_hashed(folder / MODEL_FILE, publish.in_pages(_content(keys, items, advance)), files=files)
    write_whole(folder / MODELFILE, modelfile(args, max_seqlen), files=files)


def modelfile(args: TrainArgs, max_seqlen: int) -> str:
    """Return the Modelfile for `ollama create NAME -f Modelfile`; prompts reach the model unchanged, as in training."""
    return (
        f'FROM ./{MODEL_FILE}\nTEMPLATE """{{{{ .Prompt }}}}"""\nPARAMETER temperature 0.8\n'
        f"PARAMETER num_ctx {max_seqlen}\n"
    )


def tokenizer_keys(args: TrainArgs, vocab_size: int, max_seqlen: int) -> dict[str, Any]:
    """Return the tokenizer as GGUF keys. Raises ConfigError for one that llama.cpp does not know."""
    tokenizer, name = build_tokenizer(args.data.tokenizer), args.data.tokenizer.name
    file: dict[str, Any] = {}
    if name not in ("none", "sp"):
        with TemporaryDirectory() as folder:
            write_tokenizer(args.data.tokenizer, Path(folder), add_bos=args.data.add_bos, max_seqlen=max_seqlen)
            file = json.loads(Path(folder, TOKENIZER_FILE).read_bytes())
    vocab, added = dict(file.get("model", {}).get("vocab", {})), {t["id"]: t for t in file.get("added_tokens") or []}
    rule = _rule_of(file.get("pre_tokenizer"), any_merges=bool(file.get("model", {}).get("merges")))
    if file.get("model", {}).get("type") != "BPE" or rule is None or file.get("normalizer"):
        raise ConfigError(f"data.tokenizer {name}: GGUF has no name for how this tokenizer splits text; {_REMEDY}")
    tokens, kinds = [f"[unused {i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    for token, number in (vocab | {each["content"]: i for i, each in added.items()}).items():
        if number >= vocab_size:
            raise RunError(f"the tokenizer has token {number}, and the model {vocab_size} tokens; set data.tokenizer")
        kind = _NORMAL if number not in added else _CONTROL if added[number].get("special") else _USER
        tokens[number], kinds[number] = token, kind
    merges = [each if isinstance(each, str) else " ".join(each) for each in file["model"]["merges"]]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges or [_NEVER],
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None},
        "tokenizer.ggml.add_bos_token": args.data.add_bos and tokenizer.bos_id is not None,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _rule_of(section: Mapping[str, Any] | None, *, any_merges: bool) -> str | None:
    """Return llama.cpp's name for the `pre_tokenizer` of a tokenizer.json, or None."""
    parts = (section or {}).get("pretokenizers") or [section or {}]
    splits = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if len(levels) != 1 or len(splits) + 1 != len(parts) or levels[0].get("add_prefix_space"):
        return None
    if levels[0].get("use_regex", True):
        return None if splits else "gpt-2"
    if not any_merges:  # bytes are tokens, however the text is split
        return "gpt-2"
    return next((_SPLIT_NAMES[name] for name, pattern in SPLITS.items() if splits == [pattern]), None)


# -- the file --------------------------------------------------------------------------------------------------------


def _content(
    keys: Mapping[str, Any], items: Sequence[ExportTensor], advance: Callable[[int], object]
) -> Iterator[Buffer]:
    """Yield the bytes of a GGUF file, tensor by tensor."""
    head, offset = b"GGUF" + struct.pack("<IQQ", 3, len(items), len(keys)), 0
    head += b"".join(_text(key) + _value(value) for key, value in keys.items())
    for item in items:
        shape = struct.pack(f"<{len(item.shape)}Q", *reversed(item.shape))
        head += _text(item.name) + struct.pack("<I", len(item.shape)) + shape
        head += struct.pack("<IQ", _TYPES[item.dtype][0], offset)
        offset += item.size_bytes + -item.size_bytes % _ALIGNMENT
    yield head + bytes(-len(head) % _ALIGNMENT)
    for item in items:
        tensor: Tensor = item.read()
        assert tuple(tensor.shape) == item.shape, item.name
        yield dcp.host_bytes(tensor.to(item.dtype))
        yield bytes(-item.size_bytes % _ALIGNMENT)
        advance(item.size_bytes)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Encode a value with its type: bool, number, string, or a list of strings or numbers."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
        case _:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
