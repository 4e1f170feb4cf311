"""Prove the order of the data: read it again as the run did, and compare with the states in its checkpoints.

`audit` confirms for each lane and each checkpoint that the pieces of text up to the saved position are those that the
order prescribes, one after another: none left out, none read twice, over all restarts. It compares:

    without tokenizing   each lane's running hash over (source, file, offset, first character) of every piece, and the
                         number of rows that each lane has given
    with tokenizing      also the place where the tokens of these pieces, cut every seq_len, end, and a running hash of
                         the tokens, so text that was edited in place is found. Free for token files and bytes;
                         otherwise it takes the tokenizer's time for all that was read
    with `content`       also all bytes with the hashes in the manifests of prepared data, in token files and indexes;
                         this finds edits of data that the run has not read yet

It cannot see whether the trainer used the rows that the loader gave it, nor anything before an accepted change of
sources: then the proof begins at the first checkpoint with the current sources.
Cost: everything that the run has read is read and parsed again.

`rows_of_step` rebuilds the rows of a step, from the nearest checkpoint before it and only for the lanes it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lingua.config.base import ConfigError
from lingua.config.keys.data import DataArgs, SourceArgs, Switch
from lingua.console import Progress
from lingua.data.blocked_source import BlockedSource, OpenedData
from lingua.data.loader import adapt, check_order, fingerprint_of, order_of, sources_of, turned
from lingua.data.manifest import MANIFEST, check_manifest, read_manifest
from lingua.data.mix import block_at
from lingua.data.pack import Lane, PackedRow, Packer, contains, ids_of, merged
from lingua.data.prepare.worker_pool import each
from lingua.data.sources import open_data
from lingua.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer

State = dict[str, Any]


class _Uncounted(ByteTokenizer):
    """Returns one token per piece, for an audit that does not count tokens."""

    _ONE = np.zeros(1, np.int32)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False, before: str = "") -> np.ndarray:
        return self._ONE

    def wrap(self, ids: np.ndarray, add_bos: bool, add_eos: bool) -> np.ndarray:
        return self._ONE


class Part(NamedTuple):
    """A part of a run with one order of rows: a phase, or the whole run."""

    args: DataArgs
    rows_per_step: int
    first_row: int = 0
    """Step n uses the rows first_row + [(n-1)*G, n*G)."""
    name: str = ""
    first: int = 0
    """Step after which it begins."""
    last: int = 1 << 62
    switch: Switch | None = None
    """The change after step `first`, or None."""

    def states(self, states: Mapping[int, State]) -> dict[int, State]:
        """Return the states that this part saved, and the one that it began with."""
        return {step: state for step, state in states.items() if self.first <= step <= self.last}


def part_of_step(parts: Sequence[Part], step: int) -> Part:
    """Return the part that does update `step`."""
    return next((part for part in parts if step <= part.last), parts[-1])


def audit_parts(parts: Sequence[Part], n_lanes: int, states: Mapping[int, State], **options: Any) -> AuditResult:
    """Run `audit` on each part that has a checkpoint; a switch is followed from the checkpoint at it."""
    found: list[tuple[str, AuditResult]] = []
    for part in parts:
        own = part.states(states)
        if any(step > part.first for step in own):
            how = {"first_row": part.first_row, "border": part.first, "switch": part.switch, **options}
            found.append((part.name, audit(part.args, n_lanes, part.rows_per_step, own, **how)))
    if len(found) == 1:
        return found[0][1]
    return AuditResult(
        checkpoints=[step for _, one in found for step in one.checkpoints],
        begin=found[0][1].begin,
        rows=found[-1][1].rows,
        pieces=sum(one.pieces for _, one in found),
        tokens_checked=all(one.tokens_checked for _, one in found),
        notes=[f"phase {name}: {note}" for name, one in found for note in one.notes],
        problems=[f"phase {name}: {problem}" for name, one in found for problem in one.problems],
    )


# -- audit ---------------------------------------------------------------------------------------------------------


@dataclass
class AuditResult:
    """The result of an audit; the order is confirmed if there are no problems."""

    checkpoints: list[int]
    """Steps whose states were checked."""
    begin: int
    """The step from which everything was read again; 0 for the first row."""
    rows: int
    pieces: int = 0
    tokens_checked: bool = False
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def audit(
    args: DataArgs,
    n_lanes: int,
    rows_per_step: int,
    states: Mapping[int, State],
    *,
    first_row: int = 0,
    border: int = 0,
    switch: Switch | None = None,
    count_tokens: bool | None = None,
    content: bool = False,
    n_workers: int = 1,
    progress: Progress | None = None,
) -> AuditResult:
    """Read again all that led to the states (of all lanes, by step) and compare.

    `count_tokens`: None for yes, if that needs no tokenizer. `content`: also compare all bytes of the sources with
    their recorded hashes. Step n uses the rows first_row + [(n-1)*G, n*G); `first_row` is not 0 for a run that began
    with another run's state. `switch`: of a phase that began after step `border`, whose state is the previous phase's.
    """
    data = open_data(args.model_copy(update={"max_bad_fraction": 1.0}), n_lanes)
    states, origin = dict(states), None
    if switch is not None and (before := states.pop(border, None)) is not None:
        origin = turned(before, args, data.sources, switch)
    now = fingerprint_of(sources_of(data.sources))
    fits = sorted(step for step, state in states.items() if fingerprint_of(state["sources"]) == now)
    if not fits:
        raise ConfigError(
            "no checkpoint has the present sources, so nothing can be confirmed; restore the sources of the run"
        )
    for step in fits:
        check_order(states[step], order_of(args, n_lanes))
    cheap = args.tokenizer.name == "bytes" or all(source.holds_tokens for source in data.sources)
    count_tokens = content or cheap if count_tokens is None else count_tokens
    found = AuditResult(fits, 0, states[fits[-1]]["row"], tokens_checked=count_tokens)
    if switch is not None and origin is None:
        found.begin = fits[0]
        found.notes.append(
            f"checkpoint {border}, where it begins, is gone; what came before step {fits[0]} is not confirmed"
        )
    elif len(fits) < len(states) or args.accept_change:
        found.begin = fits[0]
        found.notes.append(f"the sources were changed during the run; what came before step {fits[0]} is not confirmed")
    for step in fits:
        found.problems += wrong_counts(args, n_lanes, rows_per_step, first_row, step, states[step])
    if content:
        _compare_bytes(args, data, found)
    if count_tokens and any("ids" not in lane for step in fits for lane in states[step]["lanes"].values()):
        found.notes.append("the run began with an older version, which did not record hashes of its tokens")
    tokenizer = build_tokenizer(args.tokenizer) if count_tokens else _Uncounted()

    def lane_task(lane: int) -> tuple[int, list[str]]:
        stops = [(step, states[step]["lanes"][str(lane)]) for step in fits]
        begun = states[found.begin] if found.begin else origin
        start = None if begun is None else begun["lanes"][str(lane)]
        return _walk(data, tokenizer, lane, start, stops, count_tokens=count_tokens)

    total = _bytes_read(data.sources, states[fits[-1]])
    progress = progress or Progress(bar=False)
    progress.begin("audit", total)
    for _, (n_pieces, problems) in each(list(range(n_lanes)), lane_task, n_workers):
        found.pieces += n_pieces
        found.problems += problems
        progress.advance(total // n_lanes)
    data.close()
    return found


def _compare_bytes(args: DataArgs, data: OpenedData, found: AuditResult) -> None:
    """Compare all bytes of the sources with their recorded hashes."""
    for source, section in zip(data.sources, args.read_sources(), strict=True):
        found.problems += source.wrong_bytes()
        if not isinstance(section, SourceArgs):
            continue  # a synthetic source has no files
        path = Path(section.path)
        folder = path if path.is_dir() else path.parent
        if source.holds_tokens and not source.needs_tokenizer:
            continue  # these files contain their hashes
        if read_manifest(folder) is None:
            found.notes.append(f"{folder} has no {MANIFEST}, so only the tokens that the run has read are compared")
        else:
            found.problems += check_manifest(folder, source.suffix, hashes=True)


def _bytes_read(sources: Sequence[BlockedSource], state: State) -> int:
    """Estimate the bytes that the lanes have read so far."""
    lanes = state["lanes"].values()
    epochs = [sum(lane["tapes"][s.name][0] for lane in lanes) / len(lanes) / s.n_blocks for s in sources]
    return sum(int(source.n_bytes * epoch) for source, epoch in zip(sources, epochs, strict=True))


def wrong_counts(
    args: DataArgs, n_lanes: int, rows_per_step: int, first_row: int, step: int, state: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a sentence per lane whose number of rows does not match the step; arithmetic only."""
    row, skipped_rows = state["row"], merged(args.skip_rows)
    if row != (due := first_row + step * rows_per_step):
        yield f"step {step}: {row} rows were used, {step} steps of {rows_per_step} from row {first_row} on are {due}"
    for lane in range(n_lanes):
        if str(lane) not in state["lanes"]:
            yield f"step {step}: lane {lane} is not in its state"
            continue
        made = state["lanes"][str(lane)]["rows"]
        given = len(range(lane, row, n_lanes))
        skipped = sum(contains(skipped_rows, lane + n_lanes * k) for k in range(made)) if skipped_rows else 0
        # Rows that a restart added to skip_rows may have been given before it.
        if not made - skipped <= given <= made:
            yield f"step {step}, lane {lane}: gave {made - skipped} rows, its share of {row} rows is {given}"


def _walk(
    data: OpenedData,
    tokenizer: Tokenizer,
    lane: int,
    start: State | None,
    stops: Sequence[tuple[int, State]],
    *,
    count_tokens: bool,
) -> tuple[int, list[str]]:
    """Return (pieces read, problems) of one lane, from `start` (None: the first row) through its saved positions."""
    args, sources, packer = data.args, data.sources, Packer(lane, data, tokenizer, start)
    before = _tokens_given(args, start) - start["token"] if start else 0
    n_pieces, piece, tokens = 0, None, before  # `tokens`: of all pieces before the current one
    for step, state in stops:
        if state["source"] is None:  # nothing read yet
            continue
        target = _order_of_piece(state)
        while piece is None or _order_of_piece(piece.position.state(sources)) < target:
            tokens += len(piece.ids) if piece is not None else 0
            piece = packer.piece()
            n_pieces += 1
        where = f"step {step}, lane {lane}"
        here = piece.position.state(sources)
        if {key: state[key] for key in here} != here:
            return n_pieces, [f"{where}: is at {_described(state)}, but the order leads to {_described(here)}"]
        if state["hash"] != f"{piece.position.hash:016x}":
            return n_pieces, [f"{where}: is at {_described(state)}, but came there by other documents (other hash)"]
        ids_hash = piece.position.ids_hash
        if count_tokens and "ids" in state and ids_hash is not None and state["ids"] != f"{ids_hash:016x}":
            return n_pieces, [
                f"{where}: the text up to {_described(state)} is not the text that was read (other tokens)"
            ]
        if count_tokens and (given := _tokens_given(args, state)) != tokens + state["token"]:
            return n_pieces, [
                f"{where}: {given} tokens were given, up to its position there are {tokens} + {state['token']}"
            ]
    return n_pieces, []


def _tokens_given(args: DataArgs, state: State) -> int:
    """Return the number of tokens before the position of a state, or before its shuffle window."""
    window = max(1, args.shuffle_window)
    return state["rows"] // window * window * args.row_step


def _order_of_piece(position: Mapping[str, Any]) -> tuple[int, int]:
    return position["pick"], position["char"]


def _described(position: Mapping[str, Any]) -> str:
    where = position["tapes"].get(position["source"])
    return f"document {position['pick']} of the lane ({position['source']}, tape position and offset {where})"


# -- the rows of a step --------------------------------------------------------------------------------------------


class SpanOrigin(NamedTuple):
    """Tokens of a row and the document that they come from."""

    source: str
    file: str
    unit: str
    """Unit of `offset`: byte, row, token or document."""
    offset: int
    """Where the document begins in the file."""
    char: int
    """First character of the piece that the tokens are from."""
    token: int
    """First token used, counted from that piece's begin."""
    n_tokens: int
    is_label: bool
    """Whether the loss counts these tokens."""
    text: str


def rows_of_step(
    args: DataArgs,
    n_lanes: int,
    rows_per_step: int,
    states: Mapping[int, State],
    step: int,
    *,
    first_row: int = 0,
    border: int = 0,
    switch: Switch | None = None,
) -> Iterator[tuple[int, list[SpanOrigin]]]:
    """Yield (row number, where its S tokens come from) for each row of the update with `global_step` = step.

    `first_row`, `border`, `switch`: as in `audit`.
    """
    first = first_row + (step - 1) * rows_per_step
    if step < 1 or first < 0:
        raise ConfigError(f"--step {step}: the first step is {1 + max(0, -first_row) // rows_per_step}")
    begin = max((saved for saved in states if saved < step), default=0)
    if border and not begin:
        raise ConfigError(f"--step {step}: checkpoint {border}, where its phase begins, is gone, and none is nearer")
    data = open_data(args.model_copy(update={"max_bad_fraction": 1.0}), n_lanes)
    tokenizer = build_tokenizer(args.tokenizer)
    saved: dict[int, State] = {}
    if begin:
        state = states[begin]
        if switch is not None and begin == border:
            state = turned(state, args, data.sources, switch)
        check_order(state, order_of(args, n_lanes))
        saved = adapt(state, data.sources, args.accept_change)
    lanes: dict[int, Lane] = {}
    for turn in range(first, first + rows_per_step):
        number = turn % n_lanes
        if number not in lanes:
            lanes[number] = Lane(number, data, tokenizer, saved.get(number))
            for _ in range(_turns(number, n_lanes, states[begin]["row"] if begin else 0, first)):
                lanes[number].next()
        row = lanes[number].next()
        yield row.number, list(origins(data, tokenizer, row))
    data.close()


def _turns(lane: int, n_lanes: int, begin: int, end: int) -> int:
    """Count the lane's rows among the run's rows [begin, end)."""
    return len(range(lane, end, n_lanes)) - len(range(lane, begin, n_lanes))


def origins(data: OpenedData, tokenizer: Tokenizer, row: PackedRow) -> Iterator[SpanOrigin]:
    """Yield where the first S tokens of a row come from."""
    at, args = 0, data.args
    for position, token, n_tokens in row.spans:
        n = min(n_tokens, args.seq_len - at)
        if n > 0:
            assert position.source is not None
            source = data.sources[position.source]
            tape_position, offset = position.positions[position.source]
            file, _ = source.locate(block_at(source, args.order_seed, tape_position))
            path, tokens = str(source.files[file].path), row.tokens[at : at + n]
            text, is_label = tokenizer.decode(ids_of(tokens).tolist()), bool(tokens[0] >= 0)
            yield SpanOrigin(source.name, path, source.unit, offset, position.char, token, n, is_label, text)
        at += n
