"""Keys of `data:`. Torch-free and numpy-free; `lingua/data/loader.py` promises the order of rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, SerializeAsAny, model_validator

from lingua.config.base import Args, ConfigError, Text, part_of
from lingua.config.keys.sources import SourceArgs, SyntheticArgs

BUNDLED = Path(__file__).parents[2] / "data" / "python_stdlib.tiktoken"
"""1,792 ranks trained on the sample corpus, with `split: gpt2`; `data.tokenizer.path` may name it without a folder."""


def tokenizer_path(path: str) -> Path:
    """Return the file or folder that `data.tokenizer.path` means; it need not exist."""
    place = Path(os.path.expandvars(path)).expanduser()
    return BUNDLED if path == BUNDLED.name and not place.exists() else place


class TokenizerArgs(Args):
    """How text becomes tokens."""

    name: Literal["bytes", "sp", "tiktoken", "hf", "none"] = "bytes"
    """bytes needs no file; sp: SentencePiece model; tiktoken: rank file; hf: tokenizer.json or its folder. none: the
    sources give token ids (text holds ids separated by spaces), and each document is one row."""
    path: Text | None = None
    """File (or folder, for hf) of the tokenizer. python_stdlib.tiktoken, for split gpt2, ships with lingua: 2,048
    tokens for Python source code."""
    split: Literal["auto", "gpt2", "cl100k", "o200k"] = "auto"
    """tiktoken: how text is split before merging, which a rank file does not record. auto: inferred from the number of
    ranks (GPT-2, cl100k, o200k, Llama 3, Llama 4)."""
    end_ids: list[Annotated[int, Field(ge=0)]] = []
    """Ids that end a generated text, besides the tokenizer's end token; Hugging Face models may have several."""
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """With none: number of token ids. Null: as many as data.sources produce."""

    @property
    def needs_file(self) -> bool:
        return self.name not in ("bytes", "none")

    @model_validator(mode="after")
    def _size_fits(self) -> Self:
        if self.vocab_size is not None and self.name != "none":
            raise ValueError(f"vocab_size is for tokenizer.name: none; {self.name} has its own, drop it")
        return self


MIN_LANES = 64
DEFAULT_SEED = 42


def default_lanes(rows_per_step: int) -> int:
    """Return K for a config that does not set it: the smallest multiple of the rows per step that is at least 64."""
    return rows_per_step * -(-MIN_LANES // rows_per_step)


AnySource = Annotated[SerializeAsAny[SourceArgs | SyntheticArgs], part_of("source", SourceArgs)]


class DataArgs(Args):
    """Which rows the run trains on, and how they are loaded."""

    root_dir: Text | None = None
    """Folder of relative source paths. Null: `data` if sources are `name: weight`, otherwise the working folder."""
    sources: dict[str, Annotated[float, Field(ge=0)]] | list[AnySource] = {}
    """`name: weight` under root_dir, or a list of sources. Empty: the embedded corpus."""
    resting: list[AnySource] = []
    """Sources of earlier phases from which no new document is read; set by `phases`."""
    batch_size: Annotated[int, Field(ge=1)] = 2
    """B: rows per micro step on each data-parallel rank."""
    seq_len: Annotated[int, Field(ge=1)] = 2048
    """S: tokens per row."""
    n_views: Annotated[int, Field(ge=1)] = 2
    """Shifted copies of a row: 2 = inputs and next-token labels."""
    seed: int | None = None
    """Seed of the choice and order of documents. Null: the run's `seed`."""
    lanes: Annotated[int, Field(ge=1)] | None = None
    """K, fixed for the life of a run. Null: the smallest multiple of the rows per step that is at least 64."""
    add_bos: bool = True
    """Begin every document with the tokenizer's begin token. Off with tokenizer.name: none."""
    add_eos: bool = True
    """End every document with the tokenizer's end token. Off with tokenizer.name: none."""
    tokenizer: TokenizerArgs = TokenizerArgs()
    """The tokenizer."""
    load_async: bool = True
    """Prepare batches in worker processes while the device computes. false: in the training process."""
    num_workers: Annotated[int, Field(ge=1)] = 1
    """Worker processes per rank."""
    prefetch_size: Annotated[int, Field(ge=1)] = 64
    """Maximum number of micro-step batches prepared ahead (memory: B * S * n_views * 4 bytes each)."""
    doc_mask: bool = False
    """Restart positions and stop attention at document boundaries."""
    loss_on: Literal["all", "completion"] = "all"
    """Which tokens are labels. completion: documents have the fields `prompt` and `completion` instead of text, and
    prompt tokens are not labels."""
    on_bad_line: Literal["skip", "error"] = "skip"
    """What to do with a line that is not a JSON object with text: count and skip it, or stop."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """With skip: the share of bad lines above which the run stops. Each loader process counts the lines since its
    start, and checks from 1000 lines on."""
    shuffle_window: Annotated[int, Field(ge=0)] = 0
    """Rows of each lane shuffled together, for data that is not shuffled yet. 0: none."""
    skip_rows: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = []
    """Rows to skip, as [first, last] row numbers of the run, such as rows that make the loss explode."""
    accept_change: Text | None = None
    """Fingerprint of changed sources, copied from the error, that a resumed run may continue with."""
    stage_to: Text | None = None
    """Copy the sources once per node to this fast folder (such as /dev/shm) and read them there. Null: read them in
    place. The copy must finish within distributed.timeout_s."""

    @property
    def order_seed(self) -> int:
        """The seed in effect. A run's config always states it (`TrainArgs`); the default is for data outside a run."""
        return DEFAULT_SEED if self.seed is None else self.seed

    @property
    def row_tokens(self) -> int:
        """Tokens per row, including the last label."""
        return self.seq_len + self.n_views - 1

    @property
    def row_step(self) -> int:
        """Tokens from the start of a row to the start of the lane's next; rows of token ids do not overlap."""
        return self.row_tokens if self.tokenizer.name == "none" else self.seq_len

    def read_sources(self) -> list[SourceArgs | SyntheticArgs]:
        """Return the sources sorted by name, with full paths: those with a weight above 0, and those of earlier phases
        with weight 0. The order in the config does not matter.

        Raises ConfigError if none has a weight or two have the same name.
        """
        if isinstance(self.sources, dict):
            listed = [SourceArgs(path=name, weight=weight, name=name) for name, weight in self.sources.items()]
        else:
            listed = self.sources
        root = Path(os.path.expandvars(self.root_dir or "")).expanduser()
        found: list[SourceArgs | SyntheticArgs] = []
        unseeded = [s.name or s.type for s in listed if isinstance(s, SyntheticArgs) and s.seed is None]
        for source in listed:
            if isinstance(source, SyntheticArgs):
                seed, name = source.seed, source.name or source.type
                if seed is None and name == min(unseeded):
                    seed = self.order_seed
                elif seed is None:  # so that no two draw the same random numbers
                    digest = hashlib.blake2b(f"{self.order_seed}/{name}".encode(), digest_size=7).digest()
                    seed = int.from_bytes(digest, "little")
                found.append(source.model_copy(update={"name": name, "seed": seed}))
                continue
            path = Path(os.path.expandvars(source.path)).expanduser()
            found.append(source.model_copy(update={"name": source.name or path.name, "path": str(root / path)}))
        names = [str(source.name) for source in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"data.sources: two sources are called {twice[0]!r}; give each its own `name`")
        read = [source for source in found if source.weight > 0]
        if found and not read:
            raise ConfigError("data.sources: no source has a weight above 0; give one a weight")
        names = [str(source.name) for source in read]
        rest = [source.model_copy(update={"weight": 0.0}) for source in self.resting if source.name not in names]
        return sorted([*read, *rest], key=lambda source: str(source.name))

    def read_files(self) -> list[SourceArgs]:
        """Return the sources of `read_sources` that are files."""
        return [source for source in self.read_sources() if isinstance(source, SourceArgs)]

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        listed = self.sources if isinstance(self.sources, list) else []
        made = [source for source in listed if isinstance(source, SyntheticArgs)]
        if self.tokenizer.name != "none":
            if made:
                text = f"sources: {made[0].name or made[0].type} makes token ids, and tokenizer.name is"
                raise ValueError(f"{text} {self.tokenizer.name}; set data.tokenizer.name: none")
            return self
        needed, stated = max((source.n_ids for source in made), default=0), self.tokenizer.vocab_size
        if not needed and stated is None:
            raise ValueError("tokenizer.name is none, and no source says how many ids there are; set its vocab_size")
        if stated is not None and stated < needed:
            raise ValueError(f"tokenizer.vocab_size is {stated}, but sources make {needed} ids; raise it, or drop it")
        if self.loss_on != "all":
            raise ValueError("loss_on: completion needs text, and tokenizer.name is none; set loss_on: all")
        tokenizer = self.tokenizer.model_copy(update={"vocab_size": stated or needed})
        for key, value in {"tokenizer": tokenizer, "add_bos": False, "add_eos": False}.items():
            object.__setattr__(self, key, value)  # an assignment would validate again, endlessly
        return self

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if isinstance(self.sources, dict) and self.sources and self.root_dir is None:
            object.__setattr__(self, "root_dir", "data")  # where `lingua data prepare` puts them
        if (
            self.loss_on != "all"
            and isinstance(self.sources, list)
            and any(isinstance(s, SourceArgs) and s.text_key for s in self.sources)
        ):
            raise ValueError("loss_on: completion reads the fields prompt and completion; drop text_key from sources")
        for first, last in self.skip_rows:
            if not 0 <= first <= last:
                raise ValueError(f"skip_rows [{first}, {last}] is no range of rows; write [first, last]")
        return self


class Switch(NamedTuple):
    """A planned change of the data between two rows; the saved state belongs to the phase before it."""

    before: DataArgs
    fresh: Sequence[str] = ()
    """Names of the sources that restart at their first document."""
