"""`lingua replay RUN --step N`: recompute a step of a run on one device, from the checkpoint before it.

The run folder is only read (no lock, no pin, no file), so you can replay a colleague's run. The config is that of the
attempt that trained the step; rows per step stay, so accumulation is derived for one device. A deterministic run of one
process in fp32 gives the reported loss and gradient norm to the last bit; other layouts, devices and types round
differently. The step's own update is not applied.

Replay loads the checkpoint, trains the steps between it and N, and computes step N once whole and once row by row
(also backward with `gradients`, or if only the gradient is not finite).

Letters: B rows of a micro step, S positions, G rows of a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lingua.checkpoint import layout, lookup, retention
from lingua.checkpoint.lookup import Checkpoint
from lingua.checkpoint.restore import Restorer
from lingua.checkpoint.state import TrainState
from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine, app_schema, choose_app
from lingua.config.compose import compose
from lingua.config.frozen import read_config, rule_of
from lingua.config.keys.train import TrainArgs
from lingua.config.trust import found
from lingua.console import Progress
from lingua.data.audit import SpanOrigin, rows_of_step
from lingua.data.loader import saved_state
from lingua.data.sources import with_default_sources
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import Ranks, World, pick_device, set_environment
from lingua.files import DISK, RunError
from lingua.optim.update import grad_norm_and_clip_coef
from lingua.profiling.first_nonfinite import Watch, first_nonfinite, grad_norms, nonfinite_names
from lingua.report.diff import config_differences
from lingua.run.metrics import is_number
from lingua.tokenizer import build_tokenizer
from lingua.train.build import begin, build_state, enter_next, parts_of, pass_over, take_over
from lingua.train.check import phases_of
from lingua.train.learner import Learner, MicroBatch
from lingua.train.past import Past, check_step, nothing_before, read_past
from lingua.train.phases import number_at, switch_at
from lingua.train.sizes import Phase, Resolved

log = logging.getLogger(__name__)

# Replay has one process, and reads rows in place when it needs them.
_ALONE = {
    "distributed.dp_replicate": "null",
    "distributed.dp_shard": "null",
    "distributed.tp_size": "1",
    "distributed.fsdp_type": "no_shard",
    "distributed.detect_anomaly": "false",  # would end at the NaN that replay looks for
    "data.load_async": "false",
    "data.stage_to": "null",
    "data.max_bad_fraction": "1.0",  # the run has judged bad lines already
}


@dataclass(frozen=True)
class Numbers:
    """What a run reports of a step; None if it was not finite or not reported."""

    loss: float | None
    grad_norm: float | None
    lr: float | None


@dataclass(frozen=True)
class Way:
    """The steps between the checkpoint and step N, compared with what the run reported."""

    n_steps: int
    n_compared: int = 0
    n_equal: int = 0
    """Steps whose loss is equal to the last bit."""
    largest_difference: float = 0.0
    """Largest relative difference of a loss."""
    at_step: int | None = None


@dataclass(frozen=True)
class ReplayedRow:
    """One row of the step, computed alone."""

    row: int
    micro_step: int
    loss: float
    """Mean over its labels."""
    grad_norm: float | None
    first_nonfinite: str | None
    documents: list[SpanOrigin]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and (self.grad_norm is None or math.isfinite(self.grad_norm))


@dataclass(frozen=True)
class Replayed:
    """A step as computed here and as reported."""

    run: str
    step: int
    start: int
    config: str
    changes: list[str]
    """Overrides of the config."""
    checkpoint: int | None
    """None: the start of the run."""
    device: str
    rows_per_step: int
    micro_steps: int
    way: Way
    here: Numbers
    reported: Numbers | None
    finite: bool
    first_bad_micro_step: int | None
    """Counted from 0. None: all are finite."""
    bad_parameters: list[str]
    """Parameters that were not finite even before the step."""
    groups: dict[str, float]
    """Gradient norm by layer, before clipping."""
    rows: list[ReplayedRow]
    """The worst first."""
    last_words: str

    @property
    def is_same(self) -> bool | None:
        """Whether loss and gradient norm equal the reported ones to the last bit; None if nothing was reported."""
        if self.reported is None:
            return None
        return (self.here.loss, self.here.grad_norm) == (self.reported.loss, self.reported.grad_norm)


# -- the replay ----------------------------------------------------------------------------------------------------


def replay(
    run: Path,
    step: int,
    *,
    start: int | None = None,
    origin: int | None = None,
    words: Sequence[str] = (),
    gradients: bool = False,
) -> Replayed:
    """Recompute step N (`global_step` of the metrics, from 1). Raises ConfigError or RunError.

    `start`: the attempt whose step is meant; `origin`: the checkpoint to begin with, 0 for the start of the run;
    `words`: overrides of the run's config; `gradients`: compute each row's gradient norm too.
    """
    past = read_past(run)
    start = past.attempt_of(step) if start is None else start
    if start > past.newest_attempt:
        raise ConfigError(f"--attempt {start}: {past.run_dir} has {past.newest_attempt} attempts")
    config = found(past.config_of(start))
    schema = app_schema(choose_app(CommandLine(config=str(config))))
    args = compose(str(config), [], [*(f"{key}={value}" for key, value in _ALONE.items()), *words], schema).args
    args.data = with_default_sources(args.data)
    phases = phases_of(args, 1, read_config(config))
    check_step(past, step, phases[-1].last)
    checkpoint = find_checkpoint(past, args, step, start, origin)
    tell_other_starts(past, step, start, checkpoint)

    device = pick_device(args.device, RankInfo())
    set_environment(args.env, RankInfo(), on_gpu=device.type == "cuda", unset=args.launcher.env.unset)
    with ExitStack() as stack:
        restorer = Restorer(past.run_dir, past.root, Ranks(), DISK, args.checkpoint)
        learner = load(args, phases, World(RankInfo(), device, mesh=None), checkpoint, restorer, stack)
        if learner.step >= step:
            raise ConfigError(f"--step {step}: the run began after step {learner.step}; choose a later one")
        way = go(learner, past, start, step - 1, restorer)
        state_before = learner.loader.state_dict()
        bad_parameters = nonfinite_names(learner.model.named_parameters())
        lr = learner.lr
        taken, loss, grad_norm, first_bad = take_apart(learner)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        scale = learner.updater.scale(learner.label_share()).item()
        groups = {name: norm / scale for name, norm in grad_norms(learner.model).items()}
        learner.model.zero_grad()
        only_backward = not finite and math.isfinite(loss)
        losses = list(row_by_row(learner, taken, watched=not finite, backward=gradients or only_backward))
    size, first_row = learner.size, learner.shared.get("first_row", 0) + learner.phase.row_shift
    documents = origins_of(learner.args, size, first_row, step, state_before)
    rows = [ReplayedRow(documents=documents[number], row=number, **facts) for number, facts in losses]
    record = past.reported(step, start)
    return Replayed(
        run=str(run),
        step=step,
        start=start,
        config=str(config),
        changes=list(words),
        checkpoint=None if checkpoint is None else checkpoint.step,
        device=str(device),
        rows_per_step=size.rows_per_step,
        micro_steps=size.grad_acc_steps,
        way=way,
        here=Numbers(_finite(loss), _finite(grad_norm), lr),
        reported=None if record is None else _numbers(record),
        finite=finite,
        first_bad_micro_step=first_bad,
        bad_parameters=bad_parameters,
        groups=groups,
        rows=sorted(rows, key=_badness),
        last_words=past.last_words if start == past.newest_attempt and not finite else "",
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(record: Mapping[str, Any]) -> Numbers:
    found = [record.get(key) for key in ("loss/out", "optim/grad_norm", "optim/lr")]
    return Numbers(*(value if is_number(value) else None for value in found))


def _badness(row: ReplayedRow) -> tuple[bool, float]:
    """Return a sort key: rows that are not finite first, then by falling loss."""
    return row.is_finite, -row.loss if math.isfinite(row.loss) else -math.inf


def find_checkpoint(past: Past, args: TrainArgs, step: int, start: int, origin: int | None) -> Checkpoint | None:
    """Return the last valid checkpoint before `step`, None for the start of the run. Raises ConfigError or RunError."""
    there = past.before(step, start)
    if origin is not None and origin not in (0, *there):
        raise ConfigError(f"--from {origin}: no checkpoint to come to step {step} from; there are 0 and {there}")
    if origin == 0 or (not there and origin is None and _none_was_due(args, step)):
        return None
    sizes_only = args.checkpoint.verify_on_load == "sizes"
    for candidate in there if origin is None else [origin]:
        found = Checkpoint(layout.folder(past.root, candidate), past.root, candidate, past.run_dir)
        problems = found.damage(sizes_only=sizes_only)
        if not problems:
            return found
        log.warning("checkpoint %d does not verify and is passed over: %s", candidate, "; ".join(problems))
    raise nothing_before(past, step, start)


def _none_was_due(args: TrainArgs, step: int) -> bool:
    """Return whether the config asks for no checkpoint between the start of the run and `step`."""
    wants = args.checkpoint
    first = 0
    if wants.init_ckpt_path and wants.continue_training_from_init and "step" not in wants.reset:
        first = lookup.find_one(wants.init_ckpt_path).step or 0
    return not any(retention.is_due(s, wants) for s in range(first + 1, step))


def tell_other_starts(past: Past, step: int, start: int, checkpoint: Checkpoint | None) -> None:
    """Warn if steps on the way were trained with another config than step N."""
    begin_at = 0 if checkpoint is None else checkpoint.step or 0
    own = read_config(past.config_of(start))
    for other in sorted({past.attempt_of(s) for s in range(begin_at + 1, step)} - {start}):
        theirs = read_config(past.config_of(other))
        differ = [key for key in config_differences(own, theirs) if rule_of(key) != "free"]
        if differ:
            log.warning(
                "some steps on the way were trained by attempt %d, whose config differs from that of attempt %d in %s",
                other, start, ", ".join(differ),
            )  # fmt: skip


def load(
    args: TrainArgs,
    phases: Sequence[Phase],
    world: World,
    checkpoint: Checkpoint | None,
    restorer: Restorer,
    stack: ExitStack,
) -> Learner:
    """Build the learner as it was after the checkpoint, or at the start of the run."""
    tokenizer = build_tokenizer(args.data.tokenizer)
    state: TrainState = build_state(args, phases[0].size, world)
    if checkpoint is None:
        data_state = begin(state, restorer, args, phases)
    else:
        restorer.load_folder(checkpoint.folder, state)
        data_state = saved_state(state.per_rank_all)
        pass_over(phases, state.shared)
    step = state.shared["step"]
    phase, switch = phases[number_at(phases, step)], switch_at(phases, step)
    take_over(phase, state, restorer)
    try:
        parts = parts_of(phase, switch, state, world, tokenizer, data_state, stack)
    except ConfigError as error:
        raise ConfigError([*error.problems, "replay needs the very data that the run has read"]) from None
    state.model.train()
    return Learner(
        phases=phases,
        phase=phase,
        world=world,
        tokenizer=tokenizer,
        model=state.model,
        state=state,
        resources=stack,
        **parts,
    )


def go(learner: Learner, past: Past, start: int, last: int, restorer: Restorer) -> Way:
    """Train as the run did, up to and including step `last`."""
    first = learner.step
    if last > first:
        log.info("training %d steps to get to step %d", last - first, last + 1)
    found: list[tuple[int, float, float]] = []
    batches = learner.batches()
    with Progress(shown=last > first) as progress:
        progress.begin("replay", last, "steps", done=first)
        while learner.step < last:
            for _ in range(learner.size.grad_acc_steps):
                learner.backward(learner.forward(next(batches)))
            done = learner.update(learner.gradient())
            if learner.updater.halted:
                raise RunError(
                    f"step {done.step}, on the way, is not finite here: look at that one with --step {done.step}"
                )
            progress.advance(1)
            if learner.step == learner.phase.last < learner.size.n_steps:
                enter_next(learner, restorer)
                batches = learner.batches()
            record = past.on_the_way(done.step, start)
            there = None if record is None else _numbers(record).loss
            if there is not None:
                found.append((done.step, done.numbers["loss/out"].item(), there))
    return compare(last - first, found)


def compare(n_steps: int, found: Sequence[tuple[int, float, float]]) -> Way:
    """Summarize the comparison of steps. `found`: (step, loss here, loss reported)."""
    if not found:
        return Way(n_steps)
    apart = {step: relative_difference(here, there) for step, here, there in found}
    worst = max(apart, key=lambda step: apart[step])
    return Way(n_steps, len(found), sum(here == there for _, here, there in found), apart[worst], worst)


def relative_difference(value: float, other: float) -> float:
    """Return the difference as a fraction of `other`."""
    return 0.0 if value == other else abs(value - other) / max(abs(other), 1e-30)


def take_apart(learner: Learner) -> tuple[list[MicroBatch], float, float, int | None]:
    """Compute the step without its update; return (micro batches, loss, gradient norm, first bad micro step)."""
    taken, first_bad, batches = [], None, learner.batches()
    for number in range(learner.size.grad_acc_steps):
        taken.append(next(batches))
        learner.backward(learner.forward(taken[-1]))
        finite = grad_norm_and_clip_coef(learner.model.parameters(), 0.0).finite & learner.sums.loss.isfinite()
        if first_bad is None and not finite:
            first_bad = number
    loss = learner.sums.loss / learner.label_share()
    return taken, loss.item(), learner.gradient().norm.item(), first_bad


def row_by_row(
    learner: Learner,
    taken: Sequence[MicroBatch],
    *,
    watched: bool,
    backward: bool,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, facts) for each row of the step, each in a pass of its own."""
    compiled = learner.args.distributed.compile  # single rows would compile again, and hide the modules
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager") if compiled else nullcontext())
        watch = stack.enter_context(first_nonfinite(learner.model)) if watched else Watch()
        for micro_step, batch in enumerate(taken):
            for i, number in enumerate(batch.rows.tolist()):
                watch.clear()
                with learner.precision, torch.set_grad_enabled(backward):
                    loss_sum, n_labels = learner.losses_of(batch.row(i))
                    loss = loss_sum.sum() / n_labels.clamp(min=1)
                grad_norm = _grad_norm(learner, loss) if backward else None
                yield (
                    number,
                    {
                        "micro_step": micro_step,
                        "loss": loss.item(),
                        "grad_norm": grad_norm,
                        "first_nonfinite": _named(watch, loss.item(), grad_norm),
                    },
                )


def _grad_norm(learner: Learner, loss: torch.Tensor) -> float:
    loss.backward()
    norm = grad_norm_and_clip_coef(learner.model.parameters(), 0.0).norm
    learner.model.zero_grad()
    return norm.item()


def _named(watch: Watch, loss: float, grad_norm: float | None) -> str | None:
    if watch.forward is not None:
        return watch.forward
    if not math.isfinite(loss):
        return "the loss: all modules' outputs are finite"
    if grad_norm is not None and not math.isfinite(grad_norm):
        return watch.backward or "the gradient of a parameter: those of all outputs are finite"
    return None


def origins_of(
    args: TrainArgs, size: Resolved, first_row: int, step: int, state_before: dict[str, Any]
) -> dict[int, list[SpanOrigin]]:
    """Return the origin of each row of the step; `state_before`: the loader's state after step N - 1."""
    states = {step - 1: state_before} if step > 1 else {}
    return dict(rows_of_step(args.data, size.lanes, size.rows_per_step, states, step, first_row=first_row))
