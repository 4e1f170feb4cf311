"""Derive the sizes of a run and of its phases that the config leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lingua.config.keys.data import TokenizerArgs, default_lanes, tokenizer_path
from lingua.config.keys.phases import PhaseArgs
from lingua.config.keys.train import TrainArgs
from lingua.files import DiskError
from lingua.optim.schedule import lr_at
from lingua.tokenizer import assumed_vocab_size, build_tokenizer

DEFAULT_STEPS = 1000


class Finding(NamedTuple):
    """An error or warning about a key (the first one that it concerns)."""

    key: str
    text: str


@dataclass(frozen=True)
class Resolved:
    """The sizes of a run."""

    world_size: int
    dp_replicate: int
    dp_shard: int
    tp_size: int
    batch_size: int
    """B."""
    seq_len: int
    """S."""
    grad_acc_steps: int
    rows_per_step: int
    """G."""
    lanes: int
    """K."""
    n_steps: int
    vocab_size: int
    max_seqlen: int
    how_long: str
    """Origin of n_steps."""
    flops_per_token: float
    n_params: int
    n_params_non_embedding: int
    checkpoint_bytes: int
    """Estimate for fp32 parameters and optimizer state; the few vectors of the blocks count as matrices."""

    @property
    def dp_size(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.seq_len

    @property
    def tokens_per_rank_step(self) -> int:
        """Tokens per step on one data-parallel rank."""
        return self.batch_size * self.grad_acc_steps * self.seq_len

    @property
    def total_tokens(self) -> int:
        return self.n_steps * self.tokens_per_step

    def frozen(self) -> dict[str, Any]:
        """Return the frozen config's values of keys that were left open."""
        return {
            "steps": self.n_steps,
            "epochs": None,
            "total_flops": None,
            "global_batch_size": self.rows_per_step,
            "global_batch_tokens": None,
            "grad_acc_steps": None,  # derived again, so that the run can resume on other GPUs
            "data.lanes": self.lanes,
            "model.vocab_size": self.vocab_size,
            "model.max_seqlen": self.max_seqlen,
        }


@dataclass(frozen=True)
class Phase:
    """A part of a run."""

    args: TrainArgs
    size: Resolved
    first: int
    """Number of updates before it."""
    last: int
    """Its last update."""
    rows_before: int = 0
    """Rows used before it, if the run began with row 0."""
    tokens_before: int = 0
    span: tuple[int, int] | None = None
    """Steps that the learning rate schedule spans. None: those of the run."""
    written: PhaseArgs | None = None
    """Its section of the config. None: the run has no phases."""

    @property
    def name(self) -> str:
        return "" if self.written is None else self.written.name

    @property
    def row_shift(self) -> int:
        """Shift of its rows: update n uses rows row_shift + [(n-1)*G, n*G)."""
        return self.rows_before - self.first * self.size.rows_per_step

    def rows_at(self, step: int) -> int:
        """Return the rows used after `step` updates, if the run began with row 0."""
        return self.rows_before + (step - self.first) * self.size.rows_per_step

    def lr_at(self, step: int, run_begin: int = 0) -> float:
        """Return the learning rate of update step + 1. `run_begin`: step from which the run's schedule counts."""
        begin, end = self.span or (run_begin, self.size.n_steps)
        return lr_at(self.args.optim, step - begin, end - begin)

    def tokens_at(self, step: int) -> int:
        return self.tokens_before + (step - self.first) * self.size.tokens_per_step

    @property
    def fresh(self) -> list[str]:
        """Names of the sources that restart at their first document."""
        named = self.written.fresh if self.written is not None else False
        if isinstance(named, list):
            return list(named)
        return [str(source.name) for source in self.args.data.read_sources() if source.weight > 0] if named else []


@dataclass
class Study:
    """Errors and warnings about a config, and its sizes unless they are wrong."""

    resolved: Resolved | None = None
    phases: list[Phase] = field(default_factory=list)
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)


def sizes(args: TrainArgs, world_size: int, frozen: Mapping[str, Any], found: Study) -> Resolved | None:
    """Return the sizes of a run on `world_size` ranks, or None if they do not fit; `found` gets the errors.

    `frozen`: the config of the run's first attempt, whose rows per step and lanes stay; empty in a first attempt.
    """
    try:
        dp_replicate, dp_shard, tp_size = args.distributed.degrees(world_size)
    except ValueError as error:
        found.errors.append(Finding("distributed", f"distributed: {error}; fix the degrees or the number of ranks"))
        return None
    dp_size, batch_size = dp_replicate * dp_shard, args.data.batch_size
    rows = _rows_per_step(args, dp_size, frozen, found)
    if rows is None:
        return None
    lanes = args.data.lanes or frozen.get("data", {}).get("lanes") or default_lanes(rows)
    vocab_size = model_vocab_size(args, found)
    model = args.model.model_copy(update={"vocab_size": vocab_size})
    flops_per_token = model.flops_per_token(args.data.seq_len)
    n_params = model.n_params()
    n_steps, how_long = _length(args, rows * args.data.seq_len, flops_per_token, found)
    return Resolved(
        world_size=world_size,
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        tp_size=tp_size,
        batch_size=batch_size,
        seq_len=args.data.seq_len,
        grad_acc_steps=rows // (batch_size * dp_size),
        rows_per_step=rows,
        lanes=lanes,
        n_steps=n_steps,
        vocab_size=vocab_size,
        max_seqlen=max(args.model.max_seqlen, args.data.seq_len),
        how_long=how_long,
        flops_per_token=flops_per_token,
        n_params=n_params,
        n_params_non_embedding=model.n_params_non_embedding(),
        checkpoint_bytes=(4 if args.optim.ema is None else 8) * n_params
        + args.optim.state_bytes(n_params, model.n_params_non_embedding()),
    )


def _rows_per_step(args: TrainArgs, dp_size: int, frozen: Mapping[str, Any], found: Study) -> int | None:
    """Return G: as set, as frozen, or B * grad_acc_steps * dp; None, with an error, if B * dp does not divide it."""
    batch_size, micro_steps, stated = args.data.batch_size, args.grad_acc_steps, args.global_batch_size
    if (tokens := args.global_batch_tokens) is not None:
        problem = "global_batch_size is set, too; keep one" if stated else None
        if tokens % args.data.seq_len:
            near = tokens // args.data.seq_len * args.data.seq_len or args.data.seq_len
            problem = f"no multiple of data.seq_len {args.data.seq_len}; set it to {near}"
        if problem:
            found.errors.append(Finding("global_batch_tokens", f"global_batch_tokens is {tokens}, {problem}"))
            return None
        stated = tokens // args.data.seq_len
    per_micro_step = batch_size * dp_size
    own = per_micro_step * (micro_steps or 1)
    kept = frozen.get("global_batch_size")
    rows = stated or kept or own
    what = f"{batch_size} rows * {dp_size} data-parallel ranks = {per_micro_step}"
    if rows % per_micro_step:
        why = f"this run's rows per step stay {rows}" if rows == kept else f"global_batch_size is {rows}"
        fits = " or ".join(str(b) for b in _divisors(rows, dp_size, near=batch_size))
        remedy = f"set data.batch_size to {fits}" if fits else f"start on a number of ranks that divides {rows}"
        if rows != kept:
            low = rows // per_micro_step * per_micro_step
            near = " or ".join(str(n) for n in (low, low + per_micro_step) if n)
            remedy = f"set it to {near}"
        key = "data.batch_size" if rows == kept else "global_batch_size"
        found.errors.append(Finding(key, f"{why}, no multiple of {what}; {remedy}"))
        return None
    if micro_steps is not None and rows != own:
        if stated:
            text = f"global_batch_size is {rows}, but {what} * grad_acc_steps {micro_steps} is {own}; drop one of them"
            found.errors.append(Finding("global_batch_size", text))
            return None
        text = f"grad_acc_steps is {rows // per_micro_step} and not {micro_steps}, so that a step keeps its {rows} rows"
        found.warnings.append(Finding("grad_acc_steps", text))
    return rows


def _divisors(rows: int, dp_size: int, near: int) -> list[int]:
    """Return the batch sizes closest to `near`, one on each side, that divide G on this many ranks."""
    if rows % dp_size:
        return []
    fits = [b for b in range(1, rows // dp_size + 1) if rows // dp_size % b == 0]
    return [*([b for b in fits if b < near][-1:]), *([b for b in fits if b > near][:1])]


def model_vocab_size(args: TrainArgs, found: Study) -> int:
    """Return V: the model's, else the tokenizer's, else the one assumed from the tokenizer's name."""
    vocab_size, needed = _tokenizer_vocab_size(args.data.tokenizer)
    stated = args.model.vocab_size
    if 0 < stated < needed:
        text = f"model.vocab_size is {stated}, but the tokenizer has {vocab_size} tokens; set it to that or to -1"
        found.errors.append(Finding("model.vocab_size", text))
    if stated == 0:
        found.errors.append(Finding("model.vocab_size", f"model.vocab_size is 0; set it to {vocab_size} or to -1"))
    return stated if stated > 0 else vocab_size


def _tokenizer_vocab_size(args: TokenizerArgs) -> tuple[int, int]:
    """Return (vocabulary size, the size that the model needs at least; 0 if the file is not on this machine)."""
    if args.needs_file and not tokenizer_is_there(args):
        return assumed_vocab_size(args), 0
    tokenizer = build_tokenizer(args)
    return tokenizer.vocab_size, tokenizer.needed_size


def tokenizer_is_there(args: TokenizerArgs) -> bool:
    path = tokenizer_path(args.path or "")
    return bool(args.path) and ((path / "tokenizer.json").is_file() or path.is_file())


def _length(args: TrainArgs, tokens_per_step: int, flops_per_token: float, found: Study) -> tuple[int, str]:
    if args.steps is not None:
        return args.steps, "steps"
    if args.total_flops is not None:
        formula = (
            f"total_flops {args.total_flops:.4g} / ({flops_per_token:.4g} per token * {tokens_per_step:,} per step)"
        )
        flops_per_step = flops_per_token * tokens_per_step
        n_steps = int(args.total_flops / flops_per_step)
        if n_steps < 1:
            text = f"total_flops {args.total_flops:.4g} is less than one step; one takes {flops_per_step:.4g}"
            found.errors.append(Finding("total_flops", text))
        return n_steps, formula
    if args.epochs is not None:
        try:
            from lingua.data.sources import estimate_tokens  # numpy

            tokens = estimate_tokens(args.data)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and DiskError.of(error).may_pass:  # a transient error: try again
                raise
            text = f"epochs needs the data to be counted, and {error}; assumed {DEFAULT_STEPS} steps"
            found.warnings.append(Finding("epochs", text))
            return DEFAULT_STEPS, "assumed"
        read = tokens_per_step // args.data.seq_len * args.data.row_step
        n_steps = max(1, int(args.epochs * tokens / read))
        return n_steps, f"epochs {args.epochs:g} * {tokens:,} tokens (estimated from a sample) / {read:,}"
    return DEFAULT_STEPS, "default"
