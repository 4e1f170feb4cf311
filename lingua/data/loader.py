"""Make batches of rows: assign rows to lanes and ranks, and keep the state for checkpoints.

Row q = 0, 1, 2, ... of a run is the next row of lane q % K; step n uses rows [(n-1)*G, n*G). Their content depends only
on (seed, sources and weights, tokenizer, seq_len, K), not on world size, accumulation, workers, prefetch or restarts.
Row q goes to data-parallel rank q % dp, so rank d owns the lanes l with l % dp = d. With K = 4 lanes, dp = 2, B = 1
and G = 4:

    row    0  1  2  3 | 4  5  6  7 | ...          | ends a step
    lane   0  1  2  3 | 0  1  2  3
    rank   0  1  0  1 | 0  1  0  1                micro steps of rank 0: row 0, row 2, row 4, ...

The k-th row of lane l has number l + K*k. `data.skip_rows` leaves rows out of their lanes by these numbers: the lane's
next row takes the turn, so rows keep their numbers and later ones move up within their lane.

A state that does not match the config is refused with both values. Sources may change on purpose
(`data.accept_change`):

    weights changed      documents are chosen by the new weights from here on
    source added         it begins with its first epoch
    source removed       a document that a lane has begun is cut there
    files changed        the source begins with an epoch that no lane has touched, in the order of its new size; the
                         rest of the old epochs is not read, and a document that a lane has begun is cut there

When a phase of the run begins (`Switch`), sources, weights and seq_len change as planned, at an exact row. A lane's
tokens continue where the last row of the previous phase ended: the next token is the first of a row of the new length.
A document that a lane has begun is read to its end, whatever its source's new weight, and the next is chosen by the new
weights. So no token is left out or read twice. Sources in `fresh` are the exception: they begin with their first
document, and a document that a lane has begun is cut.

Cost: 150-400 bytes of state per lane; memory for `prefetch_size` batches; in this process one copy per row.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import xxhash
from pydantic import Field

from lingua.config.base import ConfigError, Count, Document, judged
from lingua.config.keys.data import DataArgs, Switch, default_lanes
from lingua.data.blocked_source import BlockedSource
from lingua.data.pack import IGNORED, IntArray, LanePosition, contains, ids_of, merged
from lingua.data.sources import check_manifests, open_data
from lingua.data.workers import InProcess, Workers
from lingua.files import RunError
from lingua.tokenizer import Tokenizer, build_tokenizer, tokenizer_fingerprint

log = logging.getLogger(__name__)

VERSION = 1
PASSED = "passed_over"
"""Key of a run's state: the rows that the run decided to pass over: step, rows as [first, last], why."""


class Batch(NamedTuple):
    """Rows of one micro step on this rank. B rows, S positions."""

    views: IntArray  # (n_views, B, S): views[0] inputs, views[1] labels, IGNORED where data.loss_on leaves them out
    doc_ids: IntArray | None  # (B, S), with data.doc_mask: document of each input, counted from the row's begin
    rows: np.ndarray  # (B,) int64: numbers of the rows in the run


# -- state ---------------------------------------------------------------------------------------------------------


def order_of(args: DataArgs, n_lanes: int) -> dict[str, Any]:
    """Return all that the order of rows depends on besides the sources; a state fits only if all of it is equal."""
    return {
        "version": VERSION,
        "K": n_lanes,
        "seq_len": args.seq_len,
        "seed": args.order_seed,
        "tokenizer": tokenizer_fingerprint(args.tokenizer),
        "add_bos": args.add_bos,
        "add_eos": args.add_eos,
        "shuffle_window": args.shuffle_window,
    }


def sources_of(sources: Sequence[BlockedSource]) -> dict[str, dict[str, Any]]:
    """Return weight and fingerprint of each source, as in a state."""
    return {source.name: {"weight": source.weight, "fingerprint": source.fingerprint} for source in sources}


def fingerprint_of(described: dict[str, dict[str, Any]]) -> str:
    """Return a short hash of all sources and their weights, as `data.accept_change` takes it."""
    text = repr([(name, float(d["weight"]), d["fingerprint"]) for name, d in sorted(described.items())])
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogateescape"))


_REMEDY = {
    "version": "continue with the version of lingua that wrote it",
    "K": "set data.lanes to the first value, or begin a new run",
    "tokenizer": "give the tokenizer file that the run began with, or begin a new run",
}


def check_order(state: dict[str, Any], order: dict[str, Any]) -> None:
    """Raise ConfigError for a state of another order."""
    problems = []
    for key, value in order.items():
        if state.get(key) != value:
            name = {"K": "number of lanes K", "tokenizer": "tokenizer"}.get(key, key)
            remedy = _REMEDY.get(key, f"set data.{key} to the first value, or begin a new run")
            problems.append(f"data state: {name} was {state.get(key)!r} and is {value!r} now; {remedy}")
    if problems:
        raise ConfigError(problems)


def adapt(
    state: dict[str, Any], sources: Sequence[BlockedSource], accept: str | None, switch: Switch | None = None
) -> dict[int, dict[str, Any]]:
    """Return the lane states for these sources. Raises ConfigError for a change that was not accepted or planned."""
    lanes = {int(lane): {**record, "tapes": dict(record["tapes"])} for lane, record in state["lanes"].items()}
    old, new = state["sources"], sources_of(sources)
    if switch is not None:  # new weights and new sources are planned, other files are not
        weights = {name: {**described, "weight": new[name]["weight"]} for name, described in old.items() if name in new}
        old = {**new, **old, **weights}
    if fingerprint_of(old) == fingerprint_of(new):
        return lanes if switch is None else _entered(lanes, new, switch.fresh)
    changes = [change for name in sorted({*old, *new}) if (change := _change(name, old.get(name), new.get(name)))]
    if accept != fingerprint_of(new):
        raise ConfigError(
            [
                *changes,
                f"data.sources are not those the run began with (were {fingerprint_of(old)}, are {fingerprint_of(new)}"
                f"); restore them, or continue with them on purpose: data.accept_change={fingerprint_of(new)}",
            ]
        )
    n_lanes = state["K"]
    for source in sources:
        if source.name in old and old[source.name]["fingerprint"] != new[source.name]["fingerprint"]:
            _begin_again(source, lanes, n_lanes, state["epochs"][source.name])
    return _entered(lanes, new, () if switch is None else switch.fresh)


def _entered(
    lanes: dict[int, dict[str, Any]], names: Collection[str], fresh: Collection[str]
) -> dict[int, dict[str, Any]]:
    """Give each lane a position in each source: the first one in `fresh` and new sources."""
    for lane, record in lanes.items():
        at = {name: [lane, -1] if name in fresh else record["tapes"].get(name, [lane, -1]) for name in names}
        record["tapes"] = at
        if record["source"] not in names or record["source"] in fresh:
            record |= {"source": None, "char": 0, "token": 0}
    return lanes


def turned(state: dict[str, Any], args: DataArgs, sources: Sequence[BlockedSource], switch: Switch) -> dict[str, Any]:
    """Return the state that a phase begins with, from the state at the end of the previous one. Raises ConfigError."""
    check_order(state, order_of(switch.before, state["K"]))
    lanes = {str(lane): record for lane, record in adapt(state, sources, args.accept_change, switch).items()}
    return {**state, **order_of(args, state["K"]), "sources": sources_of(sources), "lanes": lanes}


def _change(name: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> str | None:
    if old is None:
        return f"data.sources: {name} is new"
    if new is None:
        return f"data.sources: {name} is gone"
    what = [f"{key} was {old[key]} and is {new[key]} now" for key in new if old[key] != new[key]]
    return f"data.sources: {name}: {', '.join(what)}" if what else None


def _begin_again(source: BlockedSource, lanes: dict[int, dict[str, Any]], n_lanes: int, epochs: int) -> None:
    """Move all lanes to the first epoch that none of them has touched."""
    begin = epochs * source.n_blocks
    for lane, record in lanes.items():
        record["tapes"][source.name] = [begin + (lane - begin) % n_lanes, -1]
        if record["source"] == source.name:
            record["source"] = None


class _SavedSource(Document):
    weight: float
    fingerprint: str


class _SavedLane(Document):
    rows: Count
    pick: Count
    source: str | None
    tapes: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]]
    char: Count
    token: Count
    hash: Annotated[str, Field(pattern="^[0-9a-f]{1,16}$")]


class _SavedState(Document):
    K: Annotated[int, Field(ge=1)]
    row: Count
    epochs: dict[str, Count]
    sources: dict[str, _SavedSource]
    lanes: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], _SavedLane]


def saved_state(per_rank: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of all lanes from what the ranks saved. Raises RunError if that was edited or damaged."""
    for rank, saved in enumerate(per_rank):
        try:
            judged(_SavedState, saved.get("data"))
        except ValueError as error:
            what = f"rank {rank}'s position in the data is damaged: {error}"
            raise RunError(f"{what}; take another checkpoint, or a new run with checkpoint.reset=[data]") from None
    return merge_states([saved["data"] for saved in per_rank])


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks, in any order; they must be of the same step."""
    first, *others = states
    whole = {**first, "lanes": dict(first["lanes"]), "epochs": dict(first["epochs"])}
    for state in others:
        for key in first:
            if key not in ("lanes", "epochs") and state.get(key) != first[key]:
                raise ConfigError(f"data states of two ranks differ in {key}: {first[key]!r} and {state.get(key)!r}")
        for lane, record in state["lanes"].items():  # ranks of one data-parallel rank hold the same lanes
            if whole["lanes"].setdefault(lane, record) != record:
                raise ConfigError(
                    f"data states of two ranks differ in lane {lane}: {whole['lanes'][lane]} and {record}"
                )
        for name, epochs in state["epochs"].items():
            whole["epochs"][name] = max(epochs, whole["epochs"].get(name, 0))
    return whole


# -- rows that are passed over -------------------------------------------------------------------------------------


def passing_over(args: DataArgs, shared: Mapping[str, Any]) -> DataArgs:
    """Return `args` with the rows that a run has passed over added to `skip_rows`. `shared`: from the run's state."""
    passed = [span for one in shared.get(PASSED, ()) for span in one["rows"] if span not in args.skip_rows]
    return args.model_copy(update={"skip_rows": [*args.skip_rows, *passed]}) if passed else args


def rows_ahead(state: Mapping[str, Any], skip_rows: Sequence[Sequence[int]], turns: range) -> Iterator[int]:
    """Yield the numbers of the rows that will be given in these turns, given a state of all lanes.

    The rows of the run have turns 0, 1, 2, ...; without skipped rows, turn and number are the same.
    """
    n_lanes, skip = state["K"], merged(skip_rows)
    made = {int(lane): record["rows"] for lane, record in state["lanes"].items()}
    for turn in range(state["row"], turns.stop):
        lane = turn % n_lanes
        while contains(skip, lane + n_lanes * made[lane]):
            made[lane] += 1
        if turn in turns:
            yield lane + n_lanes * made[lane]
        made[lane] += 1


# -- the loader ----------------------------------------------------------------------------------------------------


class Loader:
    """Iterates over one rank's batches; a context manager."""

    def __init__(
        self,
        producer: InProcess | Workers,
        args: DataArgs,
        *,
        lanes: Sequence[int],
        states: dict[int, dict[str, Any]],
        header: dict[str, Any],
        n_blocks: dict[str, int],
        row: int,
        dp_size: int,
    ) -> None:
        self.producer, self._args = producer, args
        self._lanes, self._header, self._n_blocks = lanes, header, n_blocks
        self._positions: dict[int, LanePosition | dict[str, Any]] = dict(states)  # workers send states
        self._row, self._dp_size = row, dp_size  # rows of the run used so far, by all ranks
        self._turn = row // dp_size  # rows of this rank used so far
        self._open = True

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        n_rows, seq_len, n_views = self._args.batch_size, self._args.seq_len, self._args.n_views
        views = np.empty((n_views, n_rows, seq_len), np.int32)
        doc_ids = np.empty((n_rows, seq_len), np.int32) if self._args.doc_mask else None
        numbers = np.empty(n_rows, np.int64)
        positions: dict[int, LanePosition | dict[str, Any]] = {}
        for i in range(n_rows):
            lane = self._lanes[(self._turn + i) % len(self._lanes)]
            row, positions[lane] = self.producer.next(lane)
            for view in range(n_views):
                views[view, i] = row.tokens[view : view + seq_len]
            if doc_ids is not None and row.doc_ids is not None:
                doc_ids[i] = row.doc_ids
            numbers[i] = row.number
        if self._args.loss_on != "all":
            views[1:][views[1:] < 0] = IGNORED
            views[0] = ids_of(views[0])
        self._positions |= positions
        self._turn += n_rows
        self._row += n_rows * self._dp_size
        return Batch(views, doc_ids, numbers)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this rank's lanes after the last batch, JSON-able; see `merge_states`."""
        states = self._states()
        # By source, the first epoch that none of this rank's lanes has touched.
        epochs = {n: max(s["tapes"][n][0] for s in states.values()) // b + 1 for n, b in self._n_blocks.items()}
        lanes = {str(lane): states[lane] for lane in self._lanes}
        return {**self._header, "row": self._row, "epochs": epochs, "lanes": lanes}

    def _states(self) -> dict[int, dict[str, Any]]:
        return {lane: at.state() if isinstance(at, LanePosition) else at for lane, at in self._positions.items()}

    def stats(self) -> dict[str, float]:
        """Return counters for the metrics: lines, bad lines by kind, and the epoch of this rank's lanes by source."""
        counts = dict(self.producer.counts())
        lines = counts.pop("lines", 0)
        out: dict[str, float] = {"data/lines": lines, "data/bad_lines": sum(counts.values())}
        out |= {f"data/bad_lines/{kind}": n for kind, n in sorted(counts.items())}
        states = self._states().values()
        for name, n_blocks in self._n_blocks.items():
            epochs = [state["tapes"][name][0] / n_blocks for state in states]
            out[f"data/epoch/{name}"] = sum(epochs) / len(epochs)
            out[f"data/epoch_spread/{name}"] = max(epochs) - min(epochs)
        return out

    def close(self) -> None:
        """Release files and processes, and log the bad lines; may be called twice."""
        if self._open and (kinds := dict(self.producer.counts())):
            lines = kinds.pop("lines", 0)
            if bad := sum(kinds.values()):
                log.warning("this rank left out %d of %d lines of its data as bad: %s", bad, lines, kinds)
        self._open = False
        self.producer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def build_loader(
    args: DataArgs,
    *,
    rows_per_step: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    state: dict[str, Any] | None = None,
    switch: Switch | None = None,
    lanes: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Loader:
    """Build the loader of one data-parallel rank. `rows_per_step`: G; `state`: of all lanes, or None.

    `switch`: set if the state is from the end of the previous phase; then this rank's lanes suffice. `lanes`: K, if the
    caller has decided it; `tokenizer`: that of `args.tokenizer`, if it is built already. Raises ConfigError or
    DataError before anything is started.
    """
    n_lanes = lanes or args.lanes or default_lanes(rows_per_step)
    _check_sizes(n_lanes, rows_per_step, dp_size, args.batch_size)
    header = order_of(args, n_lanes)
    if state is not None and switch is None:
        check_order(state, header)
    tokenizer = tokenizer or build_tokenizer(args.tokenizer)
    tokenizer.check_special(args.add_bos, args.add_eos)
    check_manifests(args)
    own_lanes = list(range(dp_rank, n_lanes, dp_size))
    with contextlib.ExitStack() as opened:
        data = open_data(args, n_lanes)
        opened.callback(data.close)
        sources = data.sources
        for source in sources:
            source.check()
            if dp_rank == 0 and source.warning:
                log.warning("%s", source.warning)
        row, states = 0, {lane: _start(lane, sources) for lane in own_lanes}
        if state is not None and switch is not None:
            state = turned(state, args, sources, switch)
        if state is not None:
            row, states = state["row"], _own_states(adapt(state, sources, args.accept_change), own_lanes)
        if row % dp_size:
            raise ConfigError(f"data state: {row} rows are used, which {dp_size} data-parallel ranks cannot share")
        if args.load_async:
            producer: InProcess | Workers = Workers(args, n_lanes, own_lanes, row // dp_size % len(own_lanes), states)
        else:
            producer = InProcess(data, tokenizer, states)
            opened.pop_all()  # the producer closes them
    return Loader(
        producer,
        args,
        lanes=own_lanes,
        states=states,
        header={**header, "sources": sources_of(sources)},
        n_blocks={source.name: source.n_blocks for source in sources},
        row=row,
        dp_size=dp_size,
    )


def _own_states(states: dict[int, dict[str, Any]], lanes: Sequence[int]) -> dict[int, dict[str, Any]]:
    missing = [lane for lane in lanes if lane not in states]
    if missing:
        raise ConfigError(f"data state: lane {missing[0]} is not in it; the states of some ranks are missing")
    return {lane: states[lane] for lane in lanes}


def _start(lane: int, sources: Sequence[BlockedSource]) -> dict[str, Any]:
    """Return the state of a lane before its first row."""
    tapes = {source.name: [lane, -1] for source in sources}
    return {
        "rows": 0,
        "pick": 0,
        "source": None,
        "tapes": tapes,
        "char": 0,
        "token": 0,
        "hash": f"{0:016x}",
        "ids": f"{0:016x}",
    }


def _check_sizes(n_lanes: int, rows_per_step: int, dp_size: int, batch_size: int) -> None:
    if n_lanes % dp_size:
        raise ConfigError(f"data.lanes: {n_lanes} lanes cannot be shared by {dp_size} data-parallel ranks")
    if rows_per_step % (dp_size * batch_size):
        raise ConfigError(
            f"{rows_per_step} rows per step are not a multiple of {dp_size} ranks x data.batch_size {batch_size}"
        )
