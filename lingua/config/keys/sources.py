"""Args of data sources: files of documents, and processes that make documents of token ids. Torch- and numpy-free."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lingua.config.base import Args, Part, PositiveInt, Text, register

ENDLESS = 1 << 32
"""Documents of a synthetic source without a stated number: more than any run reads."""
Vocabulary = Annotated[int, Field(ge=2, le=1 << 24)]
Alpha = Annotated[float, Field(gt=0)]


class SourceArgs(Part):
    """One data source: files."""

    type: Literal["files"] = Field(default="files", exclude=True)  # configs frozen before there was a choice have none
    """files; or copy, gssm, markov, random, which make documents of token ids."""
    path: Text
    """Folder with `*.chunk.*.jsonl` (or `*.jsonl`) files, or those of another format, or one file."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Share of documents, relative to the other sources'. 0: not read."""
    format: Literal["jsonl", "mmap_jsonl", "tokens", "parquet", "arrow", "pbin", "megatron", "npy", "ds"] = "jsonl"
    """jsonl: raw lines, shuffled by blocks; mmap_jsonl: raw lines with an index, shuffled one by one; tokens: files
    made by `lingua data tokenize`, which give the rows of the jsonl they were made from; parquet: rows, shuffled by
    row groups; arrow: what `save_to_disk` of Hugging Face's datasets wrote. Token files of other trainers, shuffled by
    blocks: pbin (Modalities), megatron (.bin with .idx), npy (dolma, OLMo), ds (datatrove, nanotron)."""
    text_key: Text | None = None
    """Field (or column) with the text. Null: `text`, else `content`."""
    name: Text | None = None
    """Name in logs and state. Null: the path's last part."""


class SyntheticArgs(Part):
    """A source that makes documents of token ids, one per row; document r depends on (seed, r) alone."""

    name: Text | None = None
    """Name in logs and state. Null: its type."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Share of documents, relative to the other sources'. 0: not read."""
    seed: int | None = None
    """Seed of its tables and documents. Null: data.seed, or one made of that and the name where an earlier name of the
    alphabet has it, so that no two sources share random numbers."""
    documents: Annotated[int, Field(ge=1, le=ENDLESS)] | None = None
    """Documents of an epoch. Null: more than any run reads, so that none is read twice."""

    @property
    def n_ids(self) -> int:
        """Size of the vocabulary."""
        raise NotImplementedError


@register("source", "random")
class RandomArgs(SyntheticArgs):
    """Tokens that are drawn evenly: nothing can be learned."""

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
    """Each token depends on the `order` tokens before it; those before the row count as 0."""

    builder: ClassVar[str] = "lingua.data.synthetic:Markov"

    type: Literal["markov"] = "markov"  # pyright: ignore[reportIncompatibleVariableOverride]
    order: PositiveInt = 1
    """Tokens that the next one depends on."""
    alpha: Alpha = 1.0
    """Of the Dirichlet distribution that each row of the table is drawn from: small is predictable."""

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
"""States of all hidden nodes together: the floor needs a number for each."""
_MAX_ENTRIES = {"context": 1 << 18}
_MAX_ENTRIES_OF_OTHERS = 1 << 22


class NodeArgs(Args):
    """A node: its next state depends on its own last state (a hidden one's) and on the new states of its parents."""

    name: Text
    """Name, by which others call it their parent."""
    state_dim: Annotated[int, Field(ge=2)]
    """Number of states; the observed node's are the token ids."""
    alpha: Alpha
    """Of the Dirichlet distribution that each row of a table is drawn from: small is predictable."""
    parents: list[Text] = []
    """Nodes it depends on."""
    mode: Literal["default", "slow", "dead", "context"] = "default"
    """slow: staying is likeliest; dead: state 0 is likeliest; context: each document has tables of its own."""
    kernel_type: Literal["product", "fullrank"] = "product"
    """product: one row for each input, multiplied; fullrank: one row for each combination of inputs."""
    observed: bool = False
    """Its states are the tokens. One node is observed."""


@register("source", "gssm")
class GssmArgs(SyntheticArgs):
    """A graph of hidden states that emits tokens (graphical state space model); all states begin at 0."""

    builder: ClassVar[str] = "lingua.data.gssm:Gssm"

    type: Literal["gssm"] = "gssm"
    nodes: Annotated[list[NodeArgs], Field(min_length=1)]
    """The graph, in any order; without cycles."""

    @property
    def observed(self) -> NodeArgs:
        return next(node for node in self.nodes if node.observed)

    @property
    def n_ids(self) -> int:
        return self.observed.state_dim

    def inputs_of(self, node: NodeArgs) -> list[NodeArgs]:
        """Return what a node's next state depends on: itself if it is hidden, then its parents."""
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
