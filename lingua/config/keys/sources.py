"""Keys of data sources: files of documents, and processes that make documents of token ids. Torch- and numpy-free."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lingua.config.base import Args, Part, PositiveInt, Text, register

ENDLESS = 1 << 32
"""Documents of a synthetic source that sets no number: more than any run reads."""
Vocabulary = Annotated[int, Field(ge=2, le=1 << 24)]
Alpha = Annotated[float, Field(gt=0)]


class SourceArgs(Part):
    """Documents read from files."""

    type: Literal["files"] = Field(default="files", exclude=True)  # configs frozen by older versions have none
    """files; or copy, gssm, markov, random, which make documents of token ids."""
    path: Text
    """Folder with `*.chunk.*.jsonl` or `*.jsonl` files (or files of another format), or one file."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Share of documents, relative to the other sources'. 0: not read."""
    format: Literal["jsonl", "mmap_jsonl", "tokens", "parquet", "arrow", "pbin", "megatron", "npy", "ds"] = "jsonl"
    """jsonl: raw lines, shuffled by blocks; mmap_jsonl: raw lines with an index, shuffled one by one; tokens: files
    made by `lingua data tokenize`, which give the same rows as their jsonl; parquet: rows, shuffled by row groups;
    arrow: what `save_to_disk` of Hugging Face datasets writes. Token files of other trainers, shuffled by blocks: pbin
    (Modalities), megatron (.bin with .idx), npy (dolma, OLMo), ds (datatrove, nanotron)."""
    text_key: Text | None = None
    """Field or column with the text. Null: `text`, else `content`."""
    name: Text | None = None
    """Name in logs and state. Null: the last part of the path."""


class SyntheticArgs(Part):
    """A source that makes documents of token ids, one per row; document r depends on (seed, r) alone."""

    name: Text | None = None
    """Name in logs and state. Null: its type."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Share of documents, relative to the other sources'. 0: not read."""
    seed: int | None = None
    """Seed of its tables and documents. Null: data.seed for the first such source by name, and for the others a seed
    derived from data.seed and the name, so that no two share random numbers."""
    documents: Annotated[int, Field(ge=1, le=ENDLESS)] | None = None
    """Documents per epoch. Null: more than any run reads, so that none is read twice."""

    @property
    def n_ids(self) -> int:
        """Size of the vocabulary."""
        raise NotImplementedError


@register("source", "random")
class RandomArgs(SyntheticArgs):
    """Uniformly random tokens: nothing can be learned."""

    builder: ClassVar[str] = "lingua.data.synthetic:Random"

    type: Literal["random"] = "random"
    vocab_size: Vocabulary
    """Number of token ids."""

    @property
    def n_ids(self) -> int:
        return self.vocab_size


@register("source", "copy")
class CopyArgs(RandomArgs):
    """Random tokens, repeated to the end of the row."""

    builder: ClassVar[str] = "lingua.data.synthetic:Copy"

    type: Literal["copy"] = "copy"  # pyright: ignore[reportIncompatibleVariableOverride]
    period: PositiveInt
    """Tokens before the first repetition."""


@register("source", "markov")
class MarkovArgs(RandomArgs):
    """Each token depends on the `order` tokens before it; tokens before the row count as 0."""

    builder: ClassVar[str] = "lingua.data.synthetic:Markov"

    type: Literal["markov"] = "markov"  # pyright: ignore[reportIncompatibleVariableOverride]
    order: PositiveInt = 1
    """Number of tokens that the next one depends on."""
    alpha: Alpha = 1.0
    """Parameter of the Dirichlet distribution of each row of the table: smaller is more predictable."""

    @model_validator(mode="after")
    def _table_fits(self) -> Self:
        if self.order * math.log2(self.vocab_size) + math.log2(self.vocab_size) > 22:
            raise ValueError(
                f"vocab_size {self.vocab_size} to the power of order + 1 = {self.order + 1} is more than 4,194,304 "
                "entries of a table; lower one"
            )
        return self


# -- graphs of hidden states ---------------------------------------------------------------------------------------

MAX_STATES = 4096
"""Maximum joint states of the hidden nodes: the floor needs a number for each."""
_MAX_ENTRIES = {"context": 1 << 18}
_MAX_ENTRIES_OF_OTHERS = 1 << 22


class NodeArgs(Args):
    """A node: its next state depends on the new states of its parents and, if it is hidden, on its own last state."""

    name: Text
    """Name, which `parents` of other nodes refer to."""
    state_dim: Annotated[int, Field(ge=2)]
    """Number of states; those of the observed node are the token ids."""
    alpha: Alpha
    """Parameter of the Dirichlet distribution of each row of a table: smaller is more predictable."""
    parents: list[Text] = []
    """Nodes that it depends on."""
    mode: Literal["default", "slow", "dead", "context"] = "default"
    """slow: most likely stays in its state; dead: most likely in state 0; context: each document has its own tables."""
    kernel_type: Literal["product", "fullrank"] = "product"
    """product: one row per input, multiplied; fullrank: one row per combination of inputs."""
    observed: bool = False
    """Its states are the tokens. Exactly one node is observed."""


@register("source", "gssm")
class GssmArgs(SyntheticArgs):
    """A graph of hidden states that emits tokens (graphical state space model); all states start at 0."""

    builder: ClassVar[str] = "lingua.data.gssm:Gssm"

    type: Literal["gssm"] = "gssm"
    nodes: Annotated[list[NodeArgs], Field(min_length=1)]
    """The graph, in any order, without cycles."""

    @property
    def observed(self) -> NodeArgs:
        return next(node for node in self.nodes if node.observed)

    @property
    def n_ids(self) -> int:
        return self.observed.state_dim

    def inputs_of(self, node: NodeArgs) -> list[NodeArgs]:
        """Return the nodes that a node's next state depends on: itself if it is hidden, then its parents."""
        by_name = {one.name: one for one in self.nodes}
        return [*([] if node.observed else [node]), *(by_name[name] for name in node.parents)]

    def ordered(self) -> list[NodeArgs]:
        """Return the nodes, parents first. Raises ValueError for a cycle."""
        found: dict[str, NodeArgs] = {}
        while waiting := [node for node in self.nodes if node.name not in found]:
            ready = [node for node in waiting if all(name in found for name in node.parents)]
            if not ready:
                names = ", ".join(node.name for node in waiting)
                raise ValueError(f"nodes: the parents of {names} lead in a circle; leave one of them out of `parents`")
            found |= {node.name: node for node in ready}
        return list(found.values())

    def hidden(self) -> list[NodeArgs]:
        """Return the nodes that tokens depend on, parents first."""
        ordered, needed = self.ordered(), set(self.observed.parents)
        for node in reversed(ordered):
            needed |= set(node.parents) if node.name in needed else set()
        return [node for node in ordered if node.name in needed]

    @model_validator(mode="after")
    def _is_a_graph(self) -> Self:
        names = [node.name for node in self.nodes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"nodes: two nodes are called {twice[0]}; rename one")
        if len(seen := [node.name for node in self.nodes if node.observed]) != 1:
            raise ValueError(f"nodes: one node must have observed: true, and {', '.join(seen) or 'none'} has")
        for node in self.nodes:
            if missing := [name for name in node.parents if name not in names]:
                raise ValueError(
                    f"nodes: parent {missing[0]} of {node.name} is not a node; add it, or correct the name"
                )
            if len(set(node.parents)) < len(node.parents):
                raise ValueError(f"nodes: {node.name} names a parent twice; name each once")
            if node.observed and node.mode in ("slow", "dead"):
                raise ValueError(f"nodes: {node.name} is observed, so its mode cannot be {node.mode}; use default")
            if node.mode == "slow" and node.parents:
                raise ValueError(f"nodes: {node.name} is slow, so it can have no parents; drop them, or its mode")
        for node in self.ordered():
            entries = math.prod(one.state_dim for one in (*self.inputs_of(node), node))
            if entries > (limit := _MAX_ENTRIES.get(node.mode, _MAX_ENTRIES_OF_OTHERS)):
                text = f"nodes: the table of {node.name} has {entries:,} entries, more than {limit:,}"
                raise ValueError(f"{text}; lower state_dim, or give it fewer parents")
        if (states := math.prod(node.state_dim for node in self.hidden())) > MAX_STATES:
            text = f"nodes: the hidden nodes have {states:,} states together, more than {MAX_STATES:,}"
            raise ValueError(f"{text} that a floor can be computed for; lower state_dim")
        return self
