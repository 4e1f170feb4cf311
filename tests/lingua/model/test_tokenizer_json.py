"""Our tokenizers as Hugging Face's files: the same ids, the same special tokens."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lingua.config.keys.data import TokenizerArgs
from lingua.files import RunError
from lingua.model.tokenizer_json import _letters, copy_tokenizer, write_tokenizer
from lingua.tokenizer import build_tokenizer

TEXT = (Path(__file__).parents[3] / "README.md").read_text() + " 日本語 naïve 12345 \t\r\n" * 20


def trained() -> Model:
    """A byte-level BPE of README's words."""
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    return model


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank file in tiktoken's format: bytes first, then README's words by frequency of their pieces."""
    merged: dict[bytes, None] = {bytes([byte]): None for byte in range(256)}
    letters = {letter: byte for byte, letter in _letters().items()}
    for token, _ in sorted(trained().get_vocab().items(), key=lambda item: item[1]):
        merged.setdefault(bytes(letters[letter] for letter in token), None)
    path = tmp_path_factory.mktemp("ranks") / "a.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {n}\n" for n, token in enumerate(merged)))
    return path


def written(args: TokenizerArgs, folder: Path, add_bos: bool = True) -> Model:
    folder.mkdir(exist_ok=True)
    assert write_tokenizer(args, folder, add_bos=add_bos, max_seqlen=64) is None
    return Model.from_file(str(folder / "tokenizer.json"))


def test_bytes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    args = TokenizerArgs(name="bytes")
    model = written(args, tmp_path)
    check(args, model)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(opened), opened.bos_token_id, opened.eos_token_id, opened.model_max_length) == (258, 256, 257, 64)
    assert opened("é")["input_ids"] == [256, *"é".encode()]
    assert opened.decode(opened("é \n x")["input_ids"], skip_special_tokens=True) == "é \n x"
    assert written(args, tmp_path / "plain", add_bos=False).encode("a").ids == [97]


def test_tiktoken(tmp_path: Path, ranks_file: Path) -> None:
    args = TokenizerArgs(name="tiktoken", path=str(ranks_file), split="cl100k")
    model = written(args, tmp_path)
    check(args, model)
    ours = build_tokenizer(args)
    assert model.get_vocab_size() == ours.vocab_size
    assert model.encode("").ids == [ours.bos_id]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")

    @settings_of_search
    @given(st.text(max_size=40) | st.text("ab \n'.1SsE", max_size=40))
    def any_text(text: str) -> None:
        assert model.encode(text, add_special_tokens=False).ids == ours.encode(text, False, False).tolist()

    any_text()


settings_of_search = settings(deadline=None, max_examples=50)


def check(args: TokenizerArgs, model: Model) -> None:
    ours = build_tokenizer(args)
    assert model.encode(TEXT, add_special_tokens=False).ids == ours.encode(TEXT, False, False).tolist()
    assert model.encode(TEXT).ids == ours.encode(TEXT, True, False).tolist()
    assert model.decode(model.encode(TEXT).ids, skip_special_tokens=True) == TEXT


def test_hugging_faces_own_goes_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    model = trained()
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(source / "mine.json"))
    (source / "chat_template.jinja").write_text("{{ x }}")
    args = TokenizerArgs(name="hf", path=str(source / "mine.json"))
    assert written(args, tmp_path / "out", add_bos=False).to_str() == model.to_str()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_bytes())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    again = tmp_path / "again"
    again.mkdir()
    assert copy_tokenizer(tmp_path / "out", again) == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("template", ["<s> $A </s>", "<s> $A", "$A"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_an_exported_tokenizer_adds_what_training_added(tmp_path: Path, template: str, add_bos: bool) -> None:
    from transformers import AutoTokenizer

    model = trained()
    model.add_special_tokens(["<s>", "</s>"])
    ids = [(token, model.token_to_id(token)) for token in ("<s>", "</s>")]
    model.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "source").mkdir()
    model.save(str(tmp_path / "source" / "tokenizer.json"))
    declared = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(declared))
    args = TokenizerArgs(name="hf", path=str(tmp_path / "source"))
    written(args, tmp_path / "out", add_bos=add_bos)
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened("ab c")["input_ids"] == build_tokenizer(args).encode("ab c", add_bos, False).tolist()


def test_sentencepiece_comes_with_settings(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(tmp_path / "sp"),
        normalization_rule_name="identity",
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    args = TokenizerArgs(name="sp", path=str(tmp_path / "sp.model"))
    (tmp_path / "out").mkdir()
    assert write_tokenizer(args, tmp_path / "out", add_bos=True, max_seqlen=64) is not None
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_bytes())
    assert {key: settings[key] for key in ("bos_token", "eos_token", "add_bos_token", "add_eos_token")} == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
    }


def test_one_that_would_give_other_ids_is_not_written(tmp_path: Path, ranks_file: Path) -> None:
    lines = ranks_file.read_text().splitlines()
    without_a_letter = [line for line in lines if not line.endswith(" 69")] + [
        f"{base64.b64encode(b'zzzz').decode()} 69"
    ]
    (tmp_path / "odd.model").write_text("\n".join(without_a_letter))
    with pytest.raises((RunError, ValueError)):
        write_tokenizer(
            TokenizerArgs(name="tiktoken", path=str(tmp_path / "odd.model"), split="cl100k"),
            tmp_path,
            add_bos=True,
            max_seqlen=9,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["odd.model"]
