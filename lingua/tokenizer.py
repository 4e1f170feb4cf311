"""Text to tokens and back: bytes, SentencePiece, tiktoken, Hugging Face, behind one small interface."""

from __future__ import annotations

from typing import Literal

from lingua.args import Args


class TokenizerArgs(Args):
    """Which tokenizer."""

    name: Literal["bytes", "sp", "tiktoken", "hf"] = "bytes"
    """bytes needs no file; sp: SentencePiece model; tiktoken: rank file; hf: tokenizer.json or its folder."""
    path: str | None = None
    """File (or folder, for hf) of the tokenizer."""
