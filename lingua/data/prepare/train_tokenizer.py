"""Train a byte-level BPE tokenizer on prepared text, and measure how well it compresses held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from lingua.console import Progress
from lingua.data.blocked_source import BadLines, TextFields
from lingua.data.held_out import held_out_file
from lingua.data.jsonl import JsonlSource
from lingua.files import write_whole
from lingua.tokenizer import SPLITS, Tokenizer

TRAINED_ON_BYTES = 64 << 20
"""Bytes of text to train on: the trainer holds its words in memory. The begin of shuffled chunks is a sample."""
_MEASURED_BYTES, _ENOUGH_BYTES = 4 << 20, 64 << 10
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def train_tokenizer(folder: Path, size: int, fields: TextFields, progress: Progress) -> Path:
    """Train a tokenizer of `size` tokens in a prepared folder, and return its file. An existing one is kept."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    file = folder / f"tokenizer-{size}.json"
    if file.is_file():
        return file
    model = Model(models.BPE())
    pieces = pre_tokenizers.Split(Regex(SPLITS["cl100k"]), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts(folder, TRAINED_ON_BYTES, fields, progress), trainer)
    write_whole(file, model.to_str())
    return file


def trained_tokenizer(path: Path) -> Path | None:
    """Return the newest tokenizer that was trained for a source (a folder, or a file in it), or None."""
    folder = path if path.is_dir() else path.parent
    return max(folder.glob("tokenizer-*.json"), key=lambda file: file.stat().st_mtime, default=None)


def texts(path: Path, n_bytes: int, fields: TextFields, progress: Progress | None = None) -> Iterator[str]:
    """Yield documents until they have `n_bytes` bytes."""
    with closing(JsonlSource(path.name, path, 1, fields=fields, bad=BadLines())) as source:
        if progress:
            progress.begin("tokenizer", min(n_bytes, source.n_bytes))
        for document in source.documents():
            yield document.text
            n_bytes -= (size := len(document.text.encode()))
            if progress:
                progress.advance(size)
            if n_bytes <= 0:
                return


def bytes_per_token(folder: Path, tokenizer: Tokenizer, fields: TextFields) -> float:
    """Return the bytes of text per token: of held-out text, if there is enough of it."""
    file, n_bytes, n_tokens = held_out_file(folder), 0, 0
    enough = file is not None and file.stat().st_size >= _ENOUGH_BYTES
    for text in texts(file if file and enough else folder, _MEASURED_BYTES, fields):
        n_bytes, n_tokens = n_bytes + len(text.encode()), n_tokens + len(tokenizer.encode(text, False, False))
    return n_bytes / max(n_tokens, 1)
