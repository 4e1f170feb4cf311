"""Rows made in the trainer's own process, without loader workers."""

from __future__ import annotations

from typing import Any, Protocol

from lingua.config.keys.data import DataArgs
from lingua.data.jsonl import BadLines, Tape
from lingua.data.pack import Lane, Packing, Row
from lingua.data.sources import open_sources
from lingua.tokenizer import Tokenizer, build_tokenizer


class Producer(Protocol):
    """Makes the rows of this rank's lanes, in this process or in others."""

    def next(self, lane: int) -> tuple[Row, dict[str, Any]]:
        """The lane's next row and its state behind it."""
        ...

    def counts(self) -> dict[str, int]:
        """Lines read, and bad ones by kind."""
        ...

    def close(self) -> None: ...


class InProcess:
    """Rows made in this process, when they are asked for."""

    def __init__(
        self,
        args: DataArgs,
        n_lanes: int,
        states: dict[int, dict[str, Any]],
        sources: list[Tape],
        bad: BadLines,
        tokenizer: Tokenizer,
    ) -> None:
        self._sources, self._bad = sources, bad
        packing = packing_of(args)
        self._lanes = {
            lane: Lane(
                lane,
                n_lanes,
                sources,
                tokenizer,
                packing,
                seed=args.order_seed,
                window=args.shuffle_window,
                skip_rows=args.skip_rows,
                state=state,
            )
            for lane, state in states.items()
        }

    def next(self, lane: int) -> tuple[Row, dict[str, Any]]:
        made = self._lanes[lane]
        return made.next(), made.state()

    def counts(self) -> dict[str, int]:
        return self._bad.counts()

    def close(self) -> None:
        for source in self._sources:
            source.close()


def in_process(args: DataArgs, n_lanes: int, states: dict[int, dict[str, Any]]) -> InProcess:
    """A producer of its own: what a worker runs."""
    sources, bad = open_sources(args, n_lanes)
    return InProcess(args, n_lanes, states, sources, bad, build_tokenizer(args.tokenizer))


def packing_of(args: DataArgs) -> Packing:
    return Packing(args.seq_len, args.n_views, args.add_bos, args.add_eos, args.doc_mask)
