"""Args of the loader. Torch-free and numpy-free; the promise of order is in `lingua/data/loader.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lingua.config.base import Args, ConfigError, Text


class TokenizerArgs(Args):
    """Which tokenizer."""

    name: Literal["bytes", "sp", "tiktoken", "hf"] = "bytes"
    """bytes needs no file; sp: SentencePiece model; tiktoken: rank file; hf: tokenizer.json or its folder."""
    path: Text | None = None
    """File (or folder, for hf) of the tokenizer."""
    split: Literal["auto", "gpt2", "cl100k", "o200k"] = "auto"
    """tiktoken: how text is split before merging, which a rank file does not say. auto: known from the number of ranks
    (GPT-2, cl100k, o200k, Llama 3, Llama 4)."""
    end_ids: list[Annotated[int, Field(ge=0)]] = []
    """Ids that end a generated text, besides the tokenizer's end token: a model of Hugging Face may have several."""


MIN_LANES = 64
DEFAULT_SEED = 42


def default_lanes(rows_per_step: int) -> int:
    """K where the config leaves it open: the smallest multiple of the rows per step that is at least 64."""
    return rows_per_step * -(-MIN_LANES // rows_per_step)


class SourceArgs(Args):
    """One data source."""

    path: Text
    """Folder with `*.chunk.*.jsonl` (or `*.jsonl`) files, or those of another format, or one file."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Share of documents, relative to the other sources'. 0: not read."""
    format: Literal["jsonl", "mmap_jsonl", "tokens", "parquet"] = "jsonl"
    """jsonl: raw lines, shuffled by blocks; mmap_jsonl: raw lines with an index, shuffled one by one; tokens: files
    made by `lingua data tokenize`, which give the rows of the jsonl they were made from; parquet: rows, shuffled by
    row groups."""
    text_key: Text | None = None
    """Field (or column) with the text. Null: `text`, else `content`."""
    name: Text | None = None
    """Name in logs and state. Null: the path's last part."""


class DataArgs(Args):
    """Which rows the run sees, and how they are fed."""

    root_dir: Text | None = None
    """Folder that relative source paths are looked up in."""
    sources: dict[str, Annotated[float, Field(ge=0)]] | list[SourceArgs] = {}
    """`name: weight` under root_dir, or a list of sources. Empty: the embedded corpus."""
    batch_size: Annotated[int, Field(ge=1)] = 2
    """B: rows of a micro step on each data-parallel rank."""
    seq_len: Annotated[int, Field(ge=1)] = 2048
    """S: tokens of a row."""
    n_views: Annotated[int, Field(ge=1)] = 2
    """Shifted copies of a row: 2 = inputs and next-token labels."""
    seed: int | None = None
    """Seed of source choice and order. Null: the run's `seed`."""
    lanes: Annotated[int, Field(ge=1)] | None = None
    """K, fixed for the life of a run. Null: the smallest multiple of the rows per step that is at least 64."""
    add_bos: bool = True
    """Begin every document with the tokenizer's begin token."""
    add_eos: bool = True
    """End every document with the tokenizer's end token."""
    tokenizer: TokenizerArgs = TokenizerArgs()
    """Text to tokens."""
    load_async: bool = True
    """Prepare batches in worker processes while the device computes. false: in the training process."""
    num_workers: Annotated[int, Field(ge=1)] = 1
    """Worker processes per rank."""
    prefetch_size: Annotated[int, Field(ge=1)] = 64
    """Micro-step batches prepared ahead, at most (memory: B * S * n_views * 4 bytes each)."""
    doc_mask: bool = False
    """Positions restart and attention stops at document borders."""
    loss_on: Literal["all", "completion"] = "all"
    """Which tokens are labels. completion: documents have the fields `prompt` and `completion` in place of the text,
    and tokens of the prompt are not labels."""
    on_bad_line: Literal["skip", "error"] = "skip"
    """A line that is no JSON object with text: count and skip, or stop."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """With skip: the share of bad lines above which the run stops. Each loader process counts its own lines since its
    start, and looks from 1000 on."""
    shuffle_window: Annotated[int, Field(ge=0)] = 0
    """Rows of each lane shuffled together, for data that was not shuffled before. 0: none."""
    skip_rows: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = []
    """[first, last] row numbers of the run that are passed over, such as rows that make the loss explode."""
    accept_change: Text | None = None
    """Fingerprint, as a refusal printed it, of changed sources that a resumed run may go on with."""
    stage_to: Text | None = None
    """Copy the sources once per node to this fast folder (/dev/shm, say) and read them there. Null: read them in place.
    Copying must end within distributed.timeout_s."""

    @property
    def order_seed(self) -> int:
        """The seed in effect. A run's config always states it (`TrainArgs`); the default is for data without a run."""
        return DEFAULT_SEED if self.seed is None else self.seed

    def read_sources(self) -> list[SourceArgs]:
        """Return the sources with a weight above 0, by name (any order in the config will do), with their whole paths.

        Raises ConfigError if none has a weight or two have one name.
        """
        if isinstance(self.sources, dict):
            listed = [SourceArgs(path=name, weight=weight, name=name) for name, weight in self.sources.items()]
        else:
            listed = self.sources
        root, found = Path(os.path.expandvars(self.root_dir or "")).expanduser(), []
        for source in listed:
            path = Path(os.path.expandvars(source.path)).expanduser()
            found.append(source.model_copy(update={"name": source.name or path.name, "path": str(root / path)}))
        names = [str(source.name) for source in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"data.sources: two sources are called {twice[0]!r}; give each its own `name`")
        read = [source for source in found if source.weight > 0]
        if found and not read:
            raise ConfigError("data.sources: no source has a weight above 0; give one a weight")
        return sorted(read, key=lambda source: str(source.name))

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if isinstance(self.sources, dict) and self.sources and self.root_dir is None:
            raise ValueError("sources are given by name, so root_dir is needed; set data.root_dir")
        if self.loss_on != "all" and isinstance(self.sources, list) and any(s.text_key for s in self.sources):
            raise ValueError("loss_on: completion reads the fields prompt and completion; drop text_key from sources")
        for first, last in self.skip_rows:
            if not 0 <= first <= last:
                raise ValueError(f"skip_rows [{first}, {last}] is no range of rows; write [first, last]")
        return self
