"""The original libraries' ids, special tokens where they belong, and errors that tell what to do."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import sentencepiece
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lingua.config.base import ConfigError
from lingua.config.keys.data import TokenizerArgs
from lingua.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    TokenizerError,
    assumed_vocab_size,
    build_tokenizer,
    ranks_kind,
    tokenizer_fingerprint,
)

TEXTS = [
    "Hello world, it's 12345 o'clock!",
    "  leading, trailing  \n\n\ttabs\r\nlines\n",
    "def f(x: int) -> int:\n    return x**2  # squared\n\n\nprint(f(3))\n",
    "Grüße, façade, naïve: 日本語のテキスト, 한국어, العربية, हिन्दी, עברית",
    "😀👩‍👩‍👧‍👦 e\u0301 \u200b ﬁ ½ ² \x00 \x7f",
    "IT'S WE'LL they've DON'T I'd",
    "<s> </s> <|begin_of_text|> <|end_of_text|> <|endoftext|> <|reserved_special_token_0|>",
    "",
]
CORPUS = [*TEXTS[:-1], "the quick brown fox jumps over the lazy dog and the other dogs"] * 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small tokenizer of each kind, trained on the texts."""
    folder = tmp_path_factory.mktemp("tokenizers")
    bpe = HuggingFace(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    (folder / "hf").mkdir()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(4)
    bpe.save(str(folder / "hf" / "tokenizer.json"))

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sp.model").write_bytes(model.getvalue())

    tokens = [bytes([i]) for i in range(256)]
    tokens += [b" t", b"he", b" the", b"in", b"  ", b"lo", b"hel", b"12", b"123", b"34", b"\n\n", b"It"]
    ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "ranks.tiktoken").write_text(ranks)
    return {"hf": folder / "hf", "sp": folder / "sp.model", "tiktoken": folder / "ranks.tiktoken"}


def args_of(name: str, files: dict[str, Path]) -> TokenizerArgs:
    path = files.get(name)
    split = "cl100k" if name == "tiktoken" else "auto"  # the small rank file is nobody's
    return TokenizerArgs(name=name, path=None if path is None else str(path), split=split)  # pyright: ignore[reportArgumentType]


@pytest.fixture(params=["bytes", "sp", "tiktoken", "hf"])
def tokenizer(request: pytest.FixtureRequest, files: dict[str, Path]) -> Tokenizer:
    return build_tokenizer(args_of(request.param, files))


@pytest.mark.parametrize("text", TEXTS)
def test_begin_and_end_are_added_when_asked_for_and_text_never_spells_them(tokenizer: Tokenizer, text: str) -> None:
    plain = tokenizer.encode(text, False, False)
    assert plain.dtype == np.int32
    assert all(0 <= token < tokenizer.vocab_size for token in plain)
    assert tokenizer.bos_id not in plain
    assert tokenizer.eos_id not in plain
    both = tokenizer.encode(text, True, True).tolist()
    assert both == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode(text, True, False).tolist() == both[:-1]
    assert tokenizer.encode(text, False, True).tolist() == both[1:]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, False, False)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip_any_text(text: str) -> None:
    ids = ByteTokenizer().encode(text, True, True)
    assert ids.tolist() == [256, *text.encode(), 257]
    assert ByteTokenizer().decode(ids) == text


def test_bytes_that_are_no_text_decode_visibly() -> None:
    assert ByteTokenizer().decode([0xC3, 65, 256, -1]) == "\\xc3A"


def test_agreement_with_the_original_libraries(files: dict[str, Path]) -> None:
    model: Any = sentencepiece.SentencePieceProcessor(model_file=str(files["sp"]))
    ours = {name: build_tokenizer(args_of(name, files)) for name in files}
    original = HuggingFace.from_file(str(files["hf"] / "tokenizer.json"))
    original.no_truncation()
    ranks = {base64.b64decode(line.split()[0]): i for i, line in enumerate(files["tiktoken"].read_text().splitlines())}
    kind = ranks_kind(0, "cl100k")
    assert kind is not None
    rust = tiktoken.Encoding("x", pat_str=kind.pattern, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS[:-2]:  # the last but one spells special tokens
        assert ours["sp"].encode(text, False, False).tolist() == model.encode(text)
        assert ours["hf"].encode(text, False, False).tolist() == original.encode(text, add_special_tokens=False).ids
        assert ours["tiktoken"].encode(text, False, False).tolist() == rust.encode_ordinary(text)
    assert (ours["sp"].bos_id, ours["sp"].eos_id) == (model.bos_id(), model.eos_id())
    assert (ours["hf"].bos_id, ours["hf"].eos_id) == (0, 1)
    assert (ours["tiktoken"].bos_id, ours["tiktoken"].eos_id) == (len(ranks), len(ranks) + 1)
    assert ours["tiktoken"].vocab_size == len(ranks) + 256


def test_hf_declares_its_special_tokens_beside_the_file(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((files["hf"] / "tokenizer.json").read_bytes())
    declared = {"bos_token": None, "eos_token": {"content": "<s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    build = build_tokenizer(TokenizerArgs(name="hf", path=str(tmp_path / "tokenizer.json")))
    assert (build.bos_id, build.eos_id) == (None, 0)
    build.check_special(add_bos=False, add_eos=True)
    with pytest.raises(ConfigError, match=r"tokenizer hf has no begin token; set data\.add_bos: false"):
        build.check_special(add_bos=True, add_eos=True)


def test_dropout_in_the_file_does_not_make_training_random(files: dict[str, Path], tmp_path: Path) -> None:
    file = json.loads((files["hf"] / "tokenizer.json").read_text())
    file["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    build = build_tokenizer(TokenizerArgs(name="hf", path=str(tmp_path)))
    plain = build_tokenizer(TokenizerArgs(name="hf", path=str(files["hf"])))
    for text in TEXTS * 3:
        assert build.encode(text, False, False).tolist() == plain.encode(text, False, False).tolist()


def _unigram() -> HuggingFace:
    """Special tokens are pieces of the model itself, and likely ones."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((char, -5.0) for char in "▁ab")]
    model = HuggingFace(models.Unigram(pieces, unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    model.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return model


def _merging_nothing() -> HuggingFace:
    """A word that the vocabulary has is a token, also where it is a special one: as exports of `bytes` are."""
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = HuggingFace(models.BPE(vocab=letters | {"</s>": 256}, merges=[], ignore_merges=True))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["</s>"])
    return model


def _added_as_ordinary(files: dict[str, Path]) -> HuggingFace:
    model = HuggingFace.from_file(str(files["hf"] / "tokenizer.json"))
    model.add_tokens(["<|end|>"])  # special: false
    return model


@pytest.mark.parametrize("kind", ["unigram", "ignore_merges", "added as ordinary"])
def test_text_that_spells_a_special_token_is_text_in_every_kind_of_file(
    files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    made = {
        "unigram": _unigram,
        "ignore_merges": _merging_nothing,
        "added as ordinary": partial(_added_as_ordinary, files),
    }
    model, eos = made[kind](), "<|end|>" if kind == "added as ordinary" else "</s>"
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    build = build_tokenizer(TokenizerArgs(name="hf", path=str(tmp_path)))
    assert build.eos_id == model.token_to_id(eos)
    assert build.vocab_size == model.get_vocab_size()
    for text in (eos, f"a {eos} b", f"{eos}{eos}"):
        assert build.eos_id not in build.encode(text, False, False).tolist()
    assert build.decode(build.encode("ab", False, True)) == f"ab{eos}"
    assert build.encode("ab ba", False, False).tolist() == model.encode("ab ba", add_special_tokens=False).ids


# -- rank files ----------------------------------------------------------------------------------------------------


def _capture(monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, Any]:
    """What tiktoken itself knows about an encoding, without its download."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    return getattr(openai_public, name)()


@pytest.mark.parametrize(
    ("name", "n_ranks"),
    [("r50k_base", 50256), ("gpt2", 50256), ("p50k_base", 50280), ("cl100k_base", 100256), ("o200k_base", 199998)],
)
def test_published_rank_files_get_their_own_pattern_and_tokens(
    monkeypatch: pytest.MonkeyPatch, name: str, n_ranks: int
) -> None:
    theirs, kind = _capture(monkeypatch, name), ranks_kind(n_ranks)
    assert kind is not None
    library = "".join(TEXTS) + Path(subprocess.__file__).read_text() + Path(json.__file__).read_text()
    assert regex.findall(kind.pattern, library) == regex.findall(theirs["pat_str"], library)
    assert kind.special == theirs["special_tokens"]
    assert kind.bos == kind.eos == "<|endoftext|>"


@pytest.mark.parametrize(
    ("n_ranks", "split", "n_special", "like"),
    [(128000, "auto", 256, 100256), (200000, "auto", 2048, 199998), (1000, "o200k", 256, 199998)],
)
def test_llama_3_and_4_and_files_with_a_named_split(n_ranks: int, split: str, n_special: int, like: int) -> None:
    kind, same = ranks_kind(n_ranks, split), ranks_kind(like)
    assert kind is not None
    assert same is not None
    assert (kind.special[kind.bos], kind.special[kind.eos]) == (n_ranks, n_ranks + 1)
    assert (kind.pattern, kind.n_special) == (same.pattern, n_special)


def test_a_rank_file_of_nobody_known_asks_for_its_split(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"no known tokenizer has 268 ranks.*data\.tokenizer\.split to gpt2, cl"):
        build_tokenizer(TokenizerArgs(name="tiktoken", path=str(files["tiktoken"])))


def test_padding_needs_no_row_of_a_model(files: dict[str, Path], tmp_path: Path) -> None:
    """Published Llama 2 folders have 32,000 rows and a padding token behind them."""
    content = json.loads((files["hf"] / "tokenizer.json").read_bytes())
    size = build_tokenizer(args_of("hf", files)).vocab_size
    for n, is_special in enumerate((True, False)):
        token = {"id": size, "content": "<pad>", "special": is_special, "normalized": False}
        token |= {"single_word": False, "lstrip": False, "rstrip": False}
        path = tmp_path / f"{n}.json"
        path.write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], token]}))
        tokenizer = build_tokenizer(TokenizerArgs(name="hf", path=str(path)))
        assert (tokenizer.vocab_size, tokenizer.needed_size) == (size + 1, size + n)


def test_every_id_has_a_text(files: dict[str, Path]) -> None:
    tokenizer = build_tokenizer(args_of("tiktoken", files))
    for token in range(256, tokenizer.vocab_size):
        assert tokenizer.decode([token])
    assert tokenizer.decode([tokenizer.vocab_size - 256]) == "<|begin_of_text|>"
    assert tokenizer.decode([tokenizer.vocab_size - 1]).startswith("<|reserved_special_token_")


SP_RULES = {"llama": ("identity", False), "t5": ("nmt_nfkc", True)}


@pytest.mark.parametrize("rule", SP_RULES.values(), ids=SP_RULES.keys())
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("cut", [("the fox\n", "jumps over"), ("the fox", " jumps over"), ("the f", "ox jumps over")])
def test_sentencepiece_puts_no_blank_where_a_document_was_cut(
    tmp_path: Path, rule: tuple[str, bool], kind: str, cut: tuple[str, str]
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "m"), vocab_size=400, model_type=kind,
        normalization_rule_name=rule[0], remove_extra_whitespaces=rule[1], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    check_cut(build_tokenizer(TokenizerArgs(name="sp", path=str(tmp_path / "m.model"))), *cut)


def check_cut(tokenizer: Any, first: str, second: str) -> None:
    whole, left = tokenizer.encode(first + second, False, False), tokenizer.encode(first, False, False)
    right = tokenizer.encode(second, False, False, before=first[-1])
    spell = getattr(tokenizer._model, "id_to_token", None) or tokenizer._model.id_to_piece
    assert "".join(map(spell, [*left.tolist(), *right.tolist()])) == "".join(map(spell, whole.tolist()))


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        (None, pre_tokenizers.Metaspace()),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])),
    ],
    ids=["llama 2", "mistral", "metaspace", "roberta", "gpt2", "xlm"],
)
def test_hf_puts_no_blank_where_a_document_was_cut(tmp_path: Path, normalizer: Any, pre_tokenizer: Any) -> None:
    model: Any = HuggingFace(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        model.normalizer = normalizer
    if pre_tokenizer is not None:
        model.pre_tokenizer = pre_tokenizer
    trainer: Any = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(TokenizerArgs(name="hf", path=str(tmp_path)))
    check_cut(tokenizer, "the fox\n", "jumps over the dog")
    check_cut(tokenizer, "the fox", " jumps over the dog")
    if not isinstance(pre_tokenizer, pre_tokenizers.Sequence):  # which begins each word with a blank, halves too
        check_cut(tokenizer, "the f", "ox jumps over the dog")


def test_text_that_makes_the_tokenizer_panic(files: dict[str, Path]) -> None:
    tokenizer = build_tokenizer(args_of("tiktoken", files))
    with pytest.raises(TokenizerError, match="failed: "):
        tokenizer.encode(" " * 1_000_000, True, True)
    with pytest.raises(TokenizerError, match="failed: "):
        ByteTokenizer().encode("\ud800", True, True)
    assert tokenizer.encode("still there", False, False).size > 0


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sp", "tiktoken", "hf"])
def test_files_that_are_missing_or_of_another_kind(files: dict[str, Path], tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs a file; set data.tokenizer.path"):
        build_tokenizer(TokenizerArgs(name=name))
    with pytest.raises(ConfigError, match=r"no file .*nothing; download it with .*download_tokenizer.py"):
        build_tokenizer(TokenizerArgs(name=name, path=str(tmp_path / "nothing")))
    for content in (b"", b"some text\n", b"\xff\x00" * 100):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ConfigError, match="other"):
            build_tokenizer(TokenizerArgs(name=name, path=str(tmp_path / "other")))


def test_fingerprint_is_name_and_content(files: dict[str, Path], tmp_path: Path) -> None:
    assert tokenizer_fingerprint(TokenizerArgs()) == ByteTokenizer().fingerprint == "bytes"
    args = args_of("tiktoken", files)
    moved = tmp_path / "elsewhere"
    moved.write_bytes(files["tiktoken"].read_bytes())
    fingerprint = tokenizer_fingerprint(args)
    assert fingerprint.startswith("tiktoken:")
    assert build_tokenizer(args).fingerprint == fingerprint
    assert tokenizer_fingerprint(TokenizerArgs(name="tiktoken", path=str(moved))) == fingerprint
    moved.write_bytes(files["tiktoken"].read_bytes() + b"Zm9vYmFy 268\n")
    assert tokenizer_fingerprint(TokenizerArgs(name="tiktoken", path=str(moved))) != fingerprint


def test_split_is_no_part_of_the_fingerprint_of_a_tokenizer_that_has_its_own(files: dict[str, Path]) -> None:
    # A config that names another tokenizer on top of debug.yaml keeps its `split`.
    for name in ("hf", "sp"):
        args = args_of(name, files)
        other = args.model_copy(update={"split": "gpt2"})
        assert tokenizer_fingerprint(args) == tokenizer_fingerprint(other) == build_tokenizer(other).fingerprint


@pytest.mark.parametrize(
    ("name", "path", "vocab_size"),
    [
        ("bytes", None, 258),
        ("tiktoken", "/x/llama3/tokenizer.model", 128256),
        ("tiktoken", "/x/r50k_base.tiktoken", 50512),
        ("tiktoken", "cl100k_base.tiktoken", 100512),
        ("tiktoken", "/x/Llama-4-Scout/tokenizer.model", 202048),
        ("sp", "tokenizer.model", 32000),
        ("hf", "somewhere", 128256),
    ],
)
def test_assumed_vocabulary(name: Any, path: str | None, vocab_size: int) -> None:
    assert assumed_vocab_size(TokenizerArgs(name=name, path=path)) == vocab_size


def test_importing_it_is_cheap() -> None:
    heavy = "{'torch', 'numpy', 'tiktoken', 'sentencepiece', 'tokenizers'}"
    code = f"import sys, lingua.tokenizer; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"
