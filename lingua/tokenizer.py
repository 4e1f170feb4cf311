"""Tokenizers with a common interface: bytes, SentencePiece, tiktoken, Hugging Face.

Ids equal those of the original library. Text that spells a special token is ordinary text; begin and end tokens are
added only on request. A tokenizer that fails on a text raises `TokenizerError`, never a Rust panic. `fingerprint` is
the name and a hash of the file; it guards saved positions. Each library is imported only when it is used.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from lingua.config.base import ConfigError
from lingua.config.keys.data import TokenizerArgs, tokenizer_path
from lingua.files import DiskError

if TYPE_CHECKING:
    import numpy as np


class TokenizerError(ValueError):
    """The tokenizer could not encode this text."""


class Tokenizer(ABC):
    """Ids in [0, vocab_size). `bos_id` and `eos_id` are None if the tokenizer has no such token."""

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    end_ids: tuple[int, ...] = ()
    """Tokens that end a generated text, besides `eos_id`."""

    @property
    def needed_size(self) -> int:
        """Vocabulary size that a model needs: special tokens that no text yields, such as padding, need no row."""
        return self.vocab_size

    @abstractmethod
    def encode_text(self, text: str) -> np.ndarray:
        """Return the ids of the text alone, int32 or uint32, possibly read-only. May raise anything."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids. Begin and end tokens of `bytes` and `sp` have no text."""

    errors = "replace"
    """Python's error handler with which `decode` shows bytes that are not characters."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the text of the ids in UTF-8, with the bytes of an incomplete character if tokens are bytes."""
        return self.decode(ids).encode()

    def encode_more(self, text: str, before: str) -> np.ndarray:
        """Return the ids of text that continues after the character `before`. May raise anything."""
        return self.encode_text(text)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False, before: str = "") -> np.ndarray:
        """Return the ids of the text as int32, with begin and end tokens on request.

        `before`: the preceding character, if the text continues a document that was cut.
        """
        try:
            ids = self.encode_more(text, before) if before else self.encode_text(text)
        except BaseException as error:
            # A Rust panic arrives as pyo3_runtime.PanicException, which does not derive from Exception.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise TokenizerError(f"the tokenizer failed: {str(error)[:200]}") from None
            raise
        return self.wrap(ids, add_bos, add_eos)

    def wrap(self, ids: np.ndarray, add_bos: bool, add_eos: bool) -> np.ndarray:
        """Copy ids as int32, with begin and end tokens on request."""
        import numpy as np

        n = len(ids)
        out = np.empty(n + add_bos + add_eos, np.int32)
        out[add_bos : add_bos + n] = ids
        if add_bos:
            assert self.bos_id is not None, "check_special comes first"
            out[0] = self.bos_id
        if add_eos:
            assert self.eos_id is not None, "check_special comes first"
            out[-1] = self.eos_id
        return out

    def check_special(self, add_bos: bool, add_eos: bool) -> None:
        """Raise ConfigError for a begin or end token that the tokenizer does not have."""
        for key, wanted, token in (("add_bos", add_bos, self.bos_id), ("add_eos", add_eos, self.eos_id)):
            if wanted and token is None:
                kind = "begin" if key == "add_bos" else "end"
                raise ConfigError(f"tokenizer {self.name} has no {kind} token; set data.{key}: false")


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; begin is 256, end is 257, as in Meta Lingua."""

    name, vocab_size, bos_id, eos_id = "bytes", 258, 256, 257
    fingerprint, errors = "bytes", "backslashreplace"

    def encode_text(self, text: str) -> np.ndarray:
        import numpy as np

        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors=self.errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if 0 <= i < 256)


class IdTokenizer(Tokenizer):
    """No tokenizer: text is ids separated by spaces."""

    name, bos_id, eos_id = "none", None, None

    def __init__(self, vocab_size: int | None) -> None:
        if vocab_size is None:
            raise ConfigError("data.tokenizer.name is none; say how many ids there are with data.tokenizer.vocab_size")
        self.vocab_size, self.fingerprint = vocab_size, f"none:{vocab_size}"

    def encode_text(self, text: str) -> np.ndarray:
        import numpy as np

        ids = np.array(text.split(), np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids are 0 to {self.vocab_size - 1}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f" {i}" for i in ids)  # so that it can follow a prompt


class _WordTokenizer(Tokenizer):
    """A tokenizer that may put a space before a text. After a cut in a document, a model that does not is used."""

    _model: Any

    def encode_text(self, text: str) -> np.ndarray:
        return self._encode(self._model, text)

    def encode_more(self, text: str, before: str) -> np.ndarray:
        # Some drop spaces at the ends of a text, so that the added space stands for one at the cut: the right model is
        # the one whose pieces around the cut are as long as those of the uncut text.
        head, left = text[:64], self._spelled(self._model, before)
        whole = self._spelled(self._model, before + head)

        def error(model: Any) -> int:
            return abs(len(whole) - len(left) - len(self._spelled(model, head)))

        return self._encode(min(self._bare, self._model, key=error), text)

    @functools.cached_property
    def _bare(self) -> Any:
        return self._without_blank()

    @abstractmethod
    def _without_blank(self) -> Any:
        """Return a copy of the model that puts nothing before a text."""

    @abstractmethod
    def _encode(self, model: Any, text: str) -> np.ndarray: ...

    @abstractmethod
    def _spelled(self, model: Any, text: str) -> str:
        """Return the joined pieces of a text."""


class SentencePieceTokenizer(_WordTokenizer):
    name = "sp"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None

    def _without_blank(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        # In protobuf the last value of a field wins: here normalizer_spec (3), add_dummy_prefix (3), false.
        return SentencePieceProcessor(model_proto=self._model.serialized_model_proto() + b"\x1a\x02\x18\x00")

    def _encode(self, model: Any, text: str) -> np.ndarray:
        import numpy as np

        return np.array(model.encode(text), np.int32)

    def _spelled(self, model: Any, text: str) -> str:
        return "".join(model.encode(text, out_type=str))

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """Return the spelling of a token in the model's file, such as <s>."""
        return self._model.id_to_piece(token)


class Ranks(NamedTuple):
    """Facts that a rank file does not contain: the split pattern and the special tokens."""

    pattern: str
    special: dict[str, int]
    bos: str = "<|begin_of_text|>"
    eos: str = "<|end_of_text|>"
    n_special: int = 256
    """Ids reserved after the ranks (256 in Llama 3 and Meta Lingua); some have no name."""


# The split pattern is part of a published tokenizer: another pattern gives other ids for the same ranks.
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
SPLITS = {"gpt2": _GPT2, "cl100k": _CL100K, "o200k": _O200K}
_LLAMA3 = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|finetune_right_pad_id|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
}


def ranks_kind(n_ranks: int, split: str = "auto") -> Ranks | None:
    """Return the facts about a rank file of this length, or None if `split` is auto and no known tokenizer has it.

    In OpenAI's files <|endoftext|> is both begin and end.
    """
    llama3 = {name: n_ranks + i for name, i in _LLAMA3.items()}
    if split != "auto":
        return Ranks(SPLITS[split], llama3)
    end = "<|endoftext|>"
    if n_ranks in (50256, 50280):  # r50k (GPT-2), p50k
        return Ranks(_GPT2, {end: 50256}, end, end)
    if n_ranks == 100256:  # cl100k
        fim = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
        return Ranks(_CL100K, {end: 100257, **fim, "<|endofprompt|>": 100276}, end, end)
    if n_ranks == 199998:  # o200k
        return Ranks(_O200K, {end: 199999, "<|endofprompt|>": 200018}, end, end)
    if n_ranks == 128000:  # Llama 3
        return Ranks(_CL100K, llama3)
    if n_ranks == 200000:  # Llama 4
        return Ranks(_O200K, {"<|begin_of_text|>": 200000, "<|end_of_text|>": 200001}, n_special=2048)
    return None


class TiktokenTokenizer(Tokenizer):
    name = "tiktoken"

    def __init__(self, path: Path, split: str) -> None:
        import tiktoken

        ranks, kind = read_ranks(path, split)
        self.vocab_size = len(ranks) + kind.n_special
        self._model = tiktoken.Encoding(
            path.name, pat_str=kind.pattern, mergeable_ranks=ranks, special_tokens=kind.special
        )
        self.bos_id, self.eos_id = kind.special[kind.bos], kind.special[kind.eos]

    def encode_text(self, text: str) -> np.ndarray:
        # encode_ordinary and an array of its list take 16% longer.
        return self._model.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors=self.errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._model.decode_bytes([int(i) for i in ids])


def read_ranks(path: Path, split: str) -> tuple[dict[bytes, int], Ranks]:
    """Return (tokens of a rank file, facts about it); every id beyond the tokens has a special token."""
    ranks = _read_ranks(path)
    kind = ranks_kind(len(ranks), split)
    if kind is None:
        raise ConfigError(
            f"{path}: no known tokenizer has {len(ranks)} ranks, and the file does not say how text is split; "
            f"set data.tokenizer.split to {', '.join(SPLITS)}, whichever its makers used"
        )
    free = sorted(set(range(len(ranks) + kind.n_special)) - set(ranks.values()) - set(kind.special.values()))
    reserved = {f"<|reserved_special_token_{n}|>": token for n, token in enumerate(free)}
    return ranks, kind._replace(special=kind.special | reserved)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read lines of `<base64> <rank>`. tiktoken's own reader would copy the file into a cache folder."""
    import base64
    import binascii

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"{path}, line {number}: not a tiktoken rank file (`<base64> <rank>` per line); "
                "set data.tokenizer.name to sp (SentencePiece model) or hf (tokenizer.json) if it is one of those"
            ) from None
    if not ranks:
        raise ConfigError(f"{path}: empty tiktoken rank file; download it again")
    return ranks


class HuggingFaceTokenizer(_WordTokenizer):
    name = "hf"

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Model

        config = path.with_name("tokenizer_config.json")
        declared = orjson.loads(config.read_bytes()) if config.is_file() else {}
        text, self._hidden = _for_training(path.read_bytes(), declared)
        self._model = Model.from_str(text)
        self._model.encode_special_tokens = True
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id = self._special(declared)

    @property
    def needed_size(self) -> int:
        added = self._model.get_added_tokens_decoder()
        ids = {i for i in self._model.get_vocab(with_added_tokens=True).values() if i not in added}
        ids |= {i for i, token in added.items() if not token.special} | {self.bos_id, self.eos_id} - {None}
        return max(ids) + 1

    def _special(self, declared: dict[str, Any]) -> tuple[int | None, int | None]:
        """Return the begin and end ids that tokenizer_config.json declares, else those with the usual names."""
        usual_bos = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]", "<|endoftext|>")
        usual_eos = ("<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|endoftext|>")
        return self._first(declared, "bos_token", usual_bos), self._first(declared, "eos_token", usual_eos)

    def _first(self, declared: dict[str, Any], key: str, usual: Sequence[str]) -> int | None:
        if key in declared:  # null means none
            token = declared[key]["content"] if isinstance(declared[key], dict) else declared[key]
            return None if token is None else self._id(token)
        return next((i for i in map(self._id, usual) if i is not None), None)

    def _id(self, token: str) -> int | None:
        spelled = {hidden: spelled for spelled, hidden in self._hidden.items()}
        return self._model.token_to_id(spelled.get(token, token))

    def _without_blank(self) -> Any:
        from tokenizers import Tokenizer as Model

        file = orjson.loads(self._model.to_str())
        parts = {name: [file[name]] for name in ("normalizer", "pre_tokenizer") if file.get(name)}
        without = {name: _without_blank(part) for name, part in parts.items()}
        if without == parts:
            return self._model
        bare = Model.from_str(orjson.dumps(file | {name: next(iter(p), None) for name, p in without.items()}).decode())
        bare.encode_special_tokens = True
        return bare

    def _encode(self, model: Any, text: str) -> np.ndarray:
        import numpy as np

        return np.array(model.encode(text, add_special_tokens=False).ids, np.int32)

    def _spelled(self, model: Any, text: str) -> str:
        return "".join(model.encode(text, add_special_tokens=False).tokens)

    def decode(self, ids: Iterable[int]) -> str:
        text = self._model.decode([int(i) for i in ids], skip_special_tokens=False)
        for hidden, token in self._hidden.items():
            text = text.replace(hidden, token)
        return text


def _without_blank(part: Any) -> Any:
    """Return a copy of a part of a tokenizer.json that puts nothing before a text."""
    if isinstance(part, list):
        return [_without_blank(one) for one in part if not (isinstance(one, dict) and one.get("type") == "Prepend")]
    if isinstance(part, dict):
        off = {"prepend_scheme": "never", "add_prefix_space": False}
        return {key: off.get(key, _without_blank(value)) for key, value in part.items()}
    return part


def _for_training(content: bytes, declared: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return a tokenizer.json for deterministic training, and its hidden spellings of special tokens.

    BPE dropout, truncation and padding are off. A special token in the model's own vocabulary could result from
    ordinary text (Unigram, or BPE with ignore_merges), so it gets a spelling that no text has. Tokens that
    tokenizer_config.json declares as bos_token, eos_token and the like are special, whatever the file says.
    """
    file = orjson.loads(content)
    model, vocab = file["model"], file["model"]["vocab"]
    file |= {"truncation": None, "padding": None, "post_processor": None}
    if model.get("dropout") is not None:
        model["dropout"] = None
    tokens = [token for key, token in declared.items() if key.endswith("_token")]
    named = {token.get("content") if isinstance(token, dict) else token for token in tokens}
    added = file.get("added_tokens") or []
    for token in added:
        token["special"] |= token["content"] in named
    pieces = set(vocab) if isinstance(vocab, dict) else {piece for piece, *_ in vocab}
    special = {token["content"] for token in added if token["special"]} & pieces
    spell = {token: f"\ufffe{token}\ufffe" for token in special}  # U+FFFE is not a character (Unicode 16, section 23.7)
    file["added_tokens"] = [token for token in added if token["content"] not in special]
    if isinstance(vocab, dict):
        model["vocab"] = {spell.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[spell.get(piece, piece), *score] for piece, *score in vocab]
    if model.get("unk_token") in special:
        model["unk_token"] = spell[model["unk_token"]]
    return orjson.dumps(file).decode(), {spelled: token for token, spelled in spell.items()}


# -- construction --------------------------------------------------------------------------------------------------


def tokenizer_file(args: TokenizerArgs) -> Path:
    """Return the tokenizer's file. Raises ConfigError if it does not exist."""
    if not args.path:
        raise ConfigError(f"data.tokenizer.name is {args.name}, which needs a file; set data.tokenizer.path")
    path = tokenizer_path(args.path)
    if path.is_dir() and args.name == "hf":
        path = path / "tokenizer.json"
    elif path.is_dir():
        raise ConfigError(f"data.tokenizer.path: {path} is a folder; name the tokenizer's file in it")
    if not path.is_file():
        raise ConfigError(
            f"data.tokenizer.path: no file {path}; download it with `python setup/download_tokenizer.py NAME DIR`"
        )
    return path


def tokenizer_fingerprint(args: TokenizerArgs) -> str:
    """Return the fingerprint (name and hash of the file) without building the tokenizer."""
    if not args.needs_file:
        return build_tokenizer(args).fingerprint
    return _fingerprint(args.name, tokenizer_file(args), args.split)


def _fingerprint(name: str, path: Path, split: str) -> str:
    import xxhash

    splits = name == "tiktoken" and split not in ("auto", "cl100k")  # older fingerprints mean cl100k
    other_split = f":{split}" if splits else ""
    return f"{name}:{xxhash.xxh3_64_hexdigest(path.read_bytes())}{other_split}"


def build_tokenizer(args: TokenizerArgs) -> Tokenizer:
    """Build the tokenizer that the config names."""
    if args.name == "none":
        tokenizer: Tokenizer = IdTokenizer(args.vocab_size)
    else:
        tokenizer = ByteTokenizer() if args.name == "bytes" else _build(args.name, tokenizer_file(args), args.split)
    if args.end_ids:
        tokenizer = copy.copy(tokenizer)
        tokenizer.end_ids = tuple(args.end_ids)
    return tokenizer


@functools.lru_cache(maxsize=4)  # 0.5 s for a large file, so loader, validation and generation share it
def _build(name: str, path: Path, split: str) -> Tokenizer:
    kinds = {"sp": SentencePieceTokenizer, "hf": HuggingFaceTokenizer}
    try:
        tokenizer = TiktokenTokenizer(path, split) if name == "tiktoken" else kinds[name](path)
    except Exception as error:
        may_pass = isinstance(error, OSError) and DiskError.of(error).may_pass  # not the config's fault
        if may_pass or isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not readable as data.tokenizer.name: {name} ({str(error)[:200]})") from error
    tokenizer.fingerprint = _fingerprint(name, path, split)
    return tokenizer


def assumed_vocab_size(args: TokenizerArgs) -> int:
    """Guess the vocabulary size from the file's name, for when the file is not on this machine."""
    if args.name == "bytes":
        return ByteTokenizer.vocab_size
    known = {"r50k": 50512, "gpt2": 50512, "p50k": 50536, "cl100k": 100512, "o200k": 200254, "llama4": 202048}
    path = (args.path or "").lower().replace("llama-4", "llama4")
    by_name = next((n for word, n in known.items() if word in path), None)
    return by_name or (32000 if args.name == "sp" else 128256)
