"""Args of the loader. Torch-free and numpy-free; the promise of order is in `lingua/data/loader.py`."""

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
"""1,792 ranks made of the sample corpus, with `split: gpt2`: `data.tokenizer.path` may name it without a folder."""


def tokenizer_path(path: str) -> Path:
    """Return the file or folder that `data.tokenizer.path` means; it need not be there."""
    place = Path(os.path.expandvars(path)).expanduser()
    return BUNDLED if path == BUNDLED.name and not place.exists() else place


class TokenizerArgs(Args):
    """Which tokenizer."""

    name: Literal["bytes", "sp", "tiktoken", "hf", "none"] = "bytes"
    """bytes needs no file; sp: SentencePiece model; tiktoken: rank file; hf: tokenizer.json or its folder. none: the
    sources give token ids (text is ids with blanks between them), and each document is a row of its own."""
    path: Text | None = None
    """File (or folder, for hf) of the tokenizer. python_stdlib.tiktoken, with split gpt2, comes with lingua: 2,048
    tokens for Python's source."""
    split: Literal["auto", "gpt2", "cl100k", "o200k"] = "auto"
    """tiktoken: how text is split before merging, which a rank file does not say. auto: known from the number of ranks
    (GPT-2, cl100k, o200k, Llama 3, Llama 4)."""
    end_ids: list[Annotated[int, Field(ge=0)]] = []
    """Ids that end a generated text, besides the tokenizer's end token: a model of Hugging Face may have several."""
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """With none: number of token ids. Null: as many as data.sources make."""

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
    """K where the config leaves it open: the smallest multiple of the rows per step that is at least 64."""
    return rows_per_step * -(-MIN_LANES // rows_per_step)


AnySource = Annotated[SerializeAsAny[SourceArgs | SyntheticArgs], part_of("source", SourceArgs)]


class DataArgs(Args):
    """Which rows the run sees, and how they are fed."""

    root_dir: Text | None = None
    """Folder that relative source paths are looked up in. Null: `data`, for sources that are given by name."""
    sources: dict[str, Annotated[float, Field(ge=0)]] | list[AnySource] = {}
    """`name: weight` under root_dir, or a list of sources. Empty: the embedded corpus."""
    resting: list[AnySource] = []
    """Sources of earlier phases from which no new document is read; follows from `phases`."""
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
    """Begin every document with the tokenizer's begin token. Off with tokenizer.name: none."""
    add_eos: bool = True
    """End every document with the tokenizer's end token. Off with tokenizer.name: none."""
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

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, the last label included."""
        return self.seq_len + self.n_views - 1

    @property
    def row_step(self) -> int:
        """Tokens from the begin of a row to that of the lane's next: documents of ids share none."""
        return self.row_tokens if self.tokenizer.name == "none" else self.seq_len

    def read_sources(self) -> list[SourceArgs | SyntheticArgs]:
        """Return the sources with a weight above 0, by name (any order in the config will do), with their whole paths;
        and those of earlier phases, with weight 0.

        Raises ConfigError if none has a weight or two have one name.
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
        """Return those of `read_sources` that are files."""
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
            object.__setattr__(self, key, value)  # an assignment would validate again, for ever
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
    """A planned change between two rows: the state is of the phase before."""

    before: DataArgs
    fresh: Sequence[str] = ()
    """Names of the sources that begin anew."""
