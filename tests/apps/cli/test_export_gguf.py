"""`lingua export --format gguf`, read by the package `gguf`, by transformers and, where there is one, by llama.cpp."""

from __future__ import annotations

import json
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from apps.cli.export import Dtype, Format, make_export
from lingua.checkpoint.gguf import Gguf, _rule_of
from lingua.config.base import ConfigError
from lingua.config.keys.data import TokenizerArgs
from lingua.config.keys.generate import GeneratorArgs
from lingua.model.generate import Generator
from lingua.model.transformer import rotary_frequencies
from lingua.tokenizer import SPLITS, build_tokenizer
from tests.apps.cli.test_export import SCALING, assert_same_function, make_run, weights


def values_of(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("dtype", [None, Dtype.bf16])
def test_the_package_s_reader_opens_it_and_every_bit_is_ours(tmp_path: Path, dtype: Dtype | None) -> None:
    make_run(tmp_path / "run", rope_scaling=SCALING, rope_theta=500.0)
    made = make_export(str(tmp_path / "run"), tmp_path / "out", Format.gguf, dtype=dtype)
    assert (made.files, made.warnings) == (["Modelfile", "model.gguf"], [])
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    ours = weights(tmp_path / "run")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(ours) + 1
    for name, tensor in ours.items():
        there = found[Gguf().their_name(name)]
        assert list(there.shape) == list(reversed(tensor.shape))
        kept = torch.bfloat16 if dtype and tensor.dim() > 1 else torch.float32  # norms are fp32 there
        assert bytes(there.data.tobytes()) == bytes(tensor.to(kept).contiguous().view(torch.uint8).numpy().tobytes())
    factors = torch.from_numpy(found["rope_freqs.weight"].data.copy())
    stretched = rotary_frequencies(8, 500.0, None) / factors.double()
    from lingua.config.keys.model import RopeScalingArgs

    torch.testing.assert_close(stretched, rotary_frequencies(8, 500.0, RopeScalingArgs.model_validate(SCALING)))
    values = values_of(reader)
    expected = {
        "general.architecture": "llama", "general.name": "r", "general.file_type": 32 if dtype else 0,
        "llama.context_length": 64, "llama.block_count": 2, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 500.0, "llama.vocab_size": 258,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert [tokens[i] for i in (ord("a"), ord(" "), 0, 256)] == ["a", "Ġ", "Ā", "<|begin_of_text|>"]
    assert kinds == [1] * 256 + [3] * 2
    assert 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text()


def test_transformers_computes_the_same_from_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = make_run(tmp_path / "run")
    make_export(str(tmp_path / "run"), tmp_path / "out", Format.gguf)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    assert_same_function(ours, other.eval())


@pytest.mark.filterwarnings("ignore")  # of the package
@pytest.mark.parametrize("model", [{"weight_tying": True}, {"rope_scaling": SCALING, "rope_theta": 500.0}])
def test_llama_cpp_writes_what_we_write(tmp_path: Path, model: dict[str, Any]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    ours, tokenizer, prompt = make_run(tmp_path / "run", **model), build_tokenizer(TokenizerArgs()), "def ü(<|x|>):\n"
    make_export(str(tmp_path / "run"), tmp_path / "out", Format.gguf)
    settings = {"n_ctx": 64, "verbose": False, "logits_all": True}
    settings |= {"type_k": 0, "type_v": 0}  # its cache in fp32; by default it is in fp16
    there = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), **settings)
    ids = tokenizer.encode(prompt, add_bos=True, add_eos=False)
    assert there.tokenize(prompt.encode(), add_bos=True, special=False) == list(ids)
    there.eval(list(ids))
    with torch.no_grad():
        expected = ours(torch.tensor([list(ids)]))[0]
    torch.testing.assert_close(torch.from_numpy(there.scores[: len(ids)].copy()), expected, rtol=1e-4, atol=1e-4)
    (answer,) = Generator(ours, tokenizer, GeneratorArgs(max_gen_len=20, temperature=0.0)).generate([prompt])
    written = takewhile(lambda token: token != tokenizer.eos_id, there.generate(list(ids), temp=0.0))
    assert tokenizer.decode(list(islice(written, 20))) == answer.text


@pytest.mark.parametrize(
    ("model", "tokenizer", "part"),
    [
        ({"qk_norm": True}, None, "qk_norm"),
        ({"sliding_window": 5}, None, "sliding window"),
        ({}, {"name": "none", "vocab_size": 258}, "how this tokenizer splits text"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    tmp_path: Path, model: dict[str, Any], tokenizer: dict[str, Any] | None, part: str
) -> None:
    make_run(tmp_path / "run", tokenizer=tokenizer, **model)
    with pytest.raises(ConfigError, match=part):
        make_export(str(tmp_path / "run"), tmp_path / "out", Format.gguf)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "any_merges", "rule"),
    [
        ({"type": "ByteLevel", "use_regex": False}, False, "gpt-2"),
        ({"type": "ByteLevel", "use_regex": False}, True, None),
        ({"type": "ByteLevel"}, True, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": True}, True, None),
        ({"type": "Metaspace"}, True, None),
        (None, True, None),
        (("cl100k", False), True, "llama-bpe"),
        (("o200k", False), True, "gpt-4o"),
        (("cl100k", True), True, None),
    ],
)
def test_llama_cpp_s_name_of_how_a_text_is_split(section: Any, any_merges: bool, rule: str | None) -> None:
    if isinstance(section, tuple):
        split = {"type": "Split", "pattern": {"Regex": SPLITS[section[0]]}, "behavior": "Isolated"}
        section = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": section[1]}]}
    assert _rule_of(json.loads(json.dumps(section)), any_merges=any_merges) == rule
