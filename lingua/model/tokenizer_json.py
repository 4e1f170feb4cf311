"""Write tokenizers as files that Hugging Face's libraries can open. Torch-free.

`tokenizer.json` gives the same ids as our tokenizer, which is tested on a sample of scripts, digits and spaces before
the file is kept. There, as usual, text that spells a special token becomes that token; here it is ordinary text. The
merges of a tiktoken file with 128,000 ranks are recomputed, which takes some seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingua.config.keys.data import TokenizerArgs
from lingua.files import DISK, Files, RunError, read_json, write_json, write_whole
from lingua.tokenizer import Tokenizer, build_tokenizer, read_ranks, tokenizer_file

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
ANSWER_TEMPLATE = "{{ messages[-1]['content'] }}"
"""For a run with data.loss_on: completion, whose documents are a prompt and its answer with nothing in between."""
HUGGING_FACE_FILES = (
    TOKENIZER_FILE,
    SETTINGS_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE_FILE,
    SENTENCEPIECE_FILE,
)
"""Files of a tokenizer in a Hugging Face folder."""

_SAMPLE = (
    "Ein Satz, a sentence, une phrase: 1234567 + 0.5 = x_1;\n\n\tdef f(x):\r\n        return 'it''s'  \n"
    "  日本語のテキスト, العربية, हिन्दी, Ελληνικά, naïve café, 🙂👩‍👩‍👧 \u200b\x00\x7f end "
)


def write_tokenizer(
    args: TokenizerArgs, folder: Path, *, add_bos: bool, max_seqlen: int, files: Files = DISK
) -> str | None:
    """Write the files of a tokenizer into a folder; return a warning if other libraries may read them differently.

    `add_bos`: whether documents began with the begin token in training. Only then, the exported tokenizer adds it to a
    text; it never adds the end token, since a text to continue has no end. Raises ConfigError if the tokenizer is not
    on this machine, RunError if their format cannot express it; then nothing is written.
    """
    tokenizer = build_tokenizer(args)
    if args.name == "hf":
        copy_tokenizer(tokenizer_file(args).parent, folder, files=files)
        file = json.loads(tokenizer_file(args).read_bytes())
        names = {token["id"]: token["content"] for token in file.get("added_tokens") or []}
        text = _with_begin(tokenizer_file(args).read_text(), tokenizer.bos_id if add_bos else None)
        write_whole(folder / TOKENIZER_FILE, text, files=files)  # the file may have had another name
        there = folder / SETTINGS_FILE
        settings = read_json(there) if there.exists() else _settings(tokenizer, names, max_seqlen)
        write_json(there, settings | _added(tokenizer, add_bos), files=files)
        return None
    if args.name == "sp":
        write_whole(folder / SENTENCEPIECE_FILE, tokenizer_file(args).read_bytes(), files=files)
        names = {i: tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None}  # pyright: ignore[reportAttributeAccessIssue]
        settings = _settings(tokenizer, names, max_seqlen) | {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        write_json(folder / SETTINGS_FILE, settings | _added(tokenizer, add_bos), files=files)
        return (
            f"{SENTENCEPIECE_FILE} is SentencePiece's own file; transformers makes a tokenizer of it by rules of its "
            "own, so compare the ids before you rely on them"
        )
    text, names = _as_bpe(args, tokenizer, add_bos)
    write_whole(folder / TOKENIZER_FILE, text, files=files)
    write_json(folder / SETTINGS_FILE, _settings(tokenizer, names, max_seqlen), files=files)
    return None


def _added(tokenizer: Tokenizer, add_bos: bool) -> dict[str, bool]:
    """Return the settings of those tokenizer classes of transformers that add the begin token themselves."""
    return {"add_bos_token": add_bos and tokenizer.bos_id is not None, "add_eos_token": False}


def _with_begin(text: str, bos_id: int | None) -> str:
    """Return a tokenizer.json that begins each text with `bos_id`, or adds nothing if it is None."""
    from tokenizers import Tokenizer as Model

    model = Model.from_str(text)
    begin = [] if bos_id is None else [bos_id]
    plain = model.encode(_SAMPLE, add_special_tokens=False).ids
    if model.encode(_SAMPLE).ids == [*begin, *plain]:
        return text
    file = json.loads(text) | {"post_processor": None}
    if bos_id is not None:
        token = model.id_to_token(bos_id)
        special = {"SpecialToken": {"id": token, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        file["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [special, first],
            "pair": [special, first, special, second],
            "special_tokens": {token: {"id": token, "ids": [bos_id], "tokens": [token]}},
        }
    return json.dumps(file, ensure_ascii=False)


def copy_tokenizer(source: Path, folder: Path, *, files: Files = DISK) -> list[str]:
    """Copy the tokenizer files of a Hugging Face folder; return their names."""
    names = [name for name in HUGGING_FACE_FILES if (source / name).is_file()]
    for name in names:
        write_whole(folder / name, (source / name).read_bytes(), files=files)
    return names


def _settings(tokenizer: Tokenizer, names: Mapping[int, str], max_seqlen: int) -> dict[str, Any]:
    def name_of(token: int | None) -> str | None:
        return None if token is None else names.get(token)

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name_of(tokenizer.bos_id),
        "eos_token": name_of(tokenizer.eos_id),
        "model_max_length": max_seqlen,
        "clean_up_tokenization_spaces": False,
    }


def _as_bpe(args: TokenizerArgs, tokenizer: Tokenizer, add_bos: bool) -> tuple[str, dict[int, str]]:
    """Return (tokenizer.json, names of the special tokens by id) of the byte tokenizer or a tiktoken tokenizer."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Model

    if args.name == "bytes":
        ranks, pattern = {bytes([byte]): byte for byte in range(256)}, None
        special = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257}
    else:
        ranks, kind = read_ranks(tokenizer_file(args), args.split)
        pattern, special = kind.pattern, kind.special
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    model = Model(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    model.pre_tokenizer = pre_tokenizers.Sequence([*pieces, as_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    names = {token: name for name, token in special.items()}
    if any(model.token_to_id(name) != token for name, token in special.items()):
        raise RunError(f"{args.path}: Hugging Face's format cannot express its special tokens")
    if model.encode(_SAMPLE, add_special_tokens=False).ids != tokenizer.encode(_SAMPLE, False, False).tolist():
        raise RunError(f"{args.path or args.name}: a tokenizer.json made of it gives other ids, so none is written")
    if add_bos and tokenizer.bos_id is not None:
        begin = names[tokenizer.bos_id]
        model.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.bos_id)]
        )
    return model.to_str(), names


def _letters() -> dict[int, str]:
    """Return a printable letter for each byte, as in GPT-2: itself if printable, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pairs of tokens that merge into a token, ordered by its rank."""
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right, token[:cut], token[cut:]))
    return [(left, right) for _, _, _, left, right in sorted(found)]
