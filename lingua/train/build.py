"""Build the parts of a run in order. The training loop is in the app's `loop.py`.

Two builds from the same config and checkpoint are equal bit for bit. Initial weights do not depend on the number of
ranks.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lingua.checkpoint.load_weights import load_weights
from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState, bare, clean_name, forget, restore_rng, rng_state
from lingua.config.base import ConfigError, build_part, show
from lingua.config.keys.data import Switch
from lingua.config.keys.model import CrossEntropyArgs, DecoderArgs, ModelArgs
from lingua.config.keys.train import TrainArgs
from lingua.data.audit import wrong_counts
from lingua.data.blocked_source import Floor
from lingua.data.held_out import HeldOut, Wording, packed, texts_beside_sources
from lingua.data.loader import PASSED, Loader, build_loader, passing_over, saved_state
from lingua.data.local_copy import staged
from lingua.data.sources import loss_floor
from lingua.distributed.compile import keep_compiled_code
from lingua.distributed.parallelize import DTYPES, parallelize, set_matmul_precision
from lingua.distributed.process_group import World, on_every_rank
from lingua.files import RunError
from lingua.model.attention import resolve_attn_impl
from lingua.model.kernels import kernels_in_use
from lingua.model.loss import CrossEntropy, Loss
from lingua.model.transformer import RotaryEmbedding
from lingua.optim.update import LossScale, Updater
from lingua.run.failure import fits
from lingua.run.lock import RunLock
from lingua.run.startup import StartUp
from lingua.tokenizer import Tokenizer, build_tokenizer
from lingua.train.learner import Learner, Run
from lingua.train.phases import number_at, number_of, switch_at
from lingua.train.sizes import Phase, Resolved

log = logging.getLogger(__name__)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Allow deterministic kernels only, for runs that are equal bit for bit. Operators without one raise an error.

    torch would also fill new tensors with a fixed value, so that reads of uninitialized memory are reproducible; a
    program without such reads may turn that off for speed (its documentation, torch.utils.deterministic).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS documentation, "Results reproducibility"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def build_model(args: TrainArgs, size: Resolved, world: World) -> nn.Module:
    """Build the model with its initial weights, distributed over the ranks."""
    sized: dict[str, Any] = {"vocab_size": size.vocab_size, "max_seqlen": size.max_seqlen}
    if (attention := args.model.attention) is not None:
        dtype = DTYPES[args.distributed.model_dtype]
        sized["attn_impl"] = resolve_attn_impl(attention, world.device.type, dtype, args.data.doc_mask)
    model_args = args.model.model_copy(update=sized)
    if isinstance(model_args, DecoderArgs):
        list(kernels_in_use(model_args, world.device.type, args.data.doc_mask))  # raises for a kernel that does not fit
    with torch.device("meta"):
        model: nn.Module = build_part(model_args)
    require_counted(model, model_args)
    model = parallelize(model, args.distributed, world)
    with fits(f"the model of {size.n_params:,} parameters"):
        model.to_empty(device=world.device)
        model.init_weights(model_args.seed)  # pyright: ignore[reportCallIssue] - every model of an app has it
    return model


def require_counted(model: nn.Module, args: ModelArgs) -> None:
    """Raise ConfigError unless the model has as many parameters as its Args count, as `lingua check` assumes."""
    built, counted = sum(parameter.numel() for parameter in model.parameters()), args.n_params()
    if built != counted:
        how = "block_params()" if isinstance(args, DecoderArgs) else "n_params_non_embedding()"
        raise ConfigError(
            f"model: {type(model).__name__} has {built:,} parameters, but n_params() of {type(args).__module__}."
            f"{type(args).__name__} counts {counted:,}; correct {how} there"
        )


def build_loss(args: TrainArgs) -> Loss:
    """Build the training loss; compiled if the model is."""
    loss = build_part(args.loss)
    if args.distributed.compile and isinstance(loss, CrossEntropy):
        loss.compile()
    return loss


def build_updater(args: TrainArgs, state: TrainState, device: torch.device, scale: LossScale | None = None) -> Updater:
    """Build the updater; with fp16 its loss scale is `scale`, or else the checkpoint's."""
    saved = state.shared.pop("loss_scale", None)  # dropped if this run is not fp16
    if scale is None and args.distributed.model_dtype == "fp16":
        scale = LossScale(device, saved)
    frozen = frozen_parameters(state.model, args.optim.frozen)
    return Updater(state.optimizer, state.model.parameters(), args.optim, device, scale, frozen)


def frozen_parameters(model: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters that match `optim.frozen`. Raises ConfigError for a pattern that matches none."""
    named = {clean_name(name): parameter for name, parameter in bare(model).named_parameters()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ConfigError(
                f"optim.frozen: {pattern} is no parameter's name; the first is called {next(iter(named))}"
            )
    found = [p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(found) == len(named):
        raise ConfigError("optim.frozen holds all parameters, which leaves nothing to train; remove a pattern")
    return found


def build_state(args: TrainArgs, size: Resolved, world: World) -> TrainState:
    """Apply the process-wide settings, then build the model with its initial weights and a new optimizer."""
    if args.distributed.compile:
        on_every_rank(lambda: keep_compiled_code(args.distributed.compile_cache))
    if args.deterministic:
        make_deterministic()
    set_matmul_precision(args.distributed)
    torch.autograd.set_detect_anomaly(args.distributed.detect_anomaly)
    seed_everything(args.seed + world.dp_rank)  # tensor-parallel ranks draw alike what they hold in common
    model = on_every_rank(lambda: build_model(args, size, world))
    optimizer = build_part(args.optim, list(model.named_parameters()))
    return TrainState(model, optimizer, shared=fresh_shared(), seed=args.seed, has_ema=args.optim.ema is not None)


def build_rows(
    args: TrainArgs,
    size: Resolved,
    world: World,
    tokenizer: Tokenizer,
    data_state: dict[str, Any] | None,
    switch: Switch | None = None,
) -> Loader:
    """Build the loader of this rank's rows. It continues at `data_state` (of all lanes), or starts at the first row.

    `switch`: given if that state belongs to the previous phase.
    """
    return on_every_rank(
        lambda: build_loader(
            args.data,
            tokenizer=tokenizer,
            rows_per_step=size.rows_per_step,
            lanes=size.lanes,
            dp_rank=world.dp_rank,
            dp_size=world.dp_size,
            state=data_state,
            switch=switch,
        )
    )


def build_run(
    args: TrainArgs,
    phases: Sequence[Phase],
    run_dir: Path,
    world: World,
    lock: RunLock | None,
    stack: ExitStack,
    startup: StartUp,
) -> Run:
    """Build a run, resumed from the newest checkpoint that verifies if there is one; `stack` closes it.

    `args`: the run's; shapes are the same in all phases.
    """
    size = phases[0].size
    tokenizer = on_every_rank(lambda: build_tokenizer(args.data.tokenizer))
    state = build_state(args, size, world)
    startup.reached("model")
    manager = CheckpointManager(args.checkpoint, run_dir, device=world.device, lock=lock)
    stack.callback(manager.close)
    data_state = resume(state, manager, args, phases)
    phase = phases[number_at(phases, state.shared["step"])]
    on_every_rank(lambda: [frozen_parameters(state.model, each.args.optim.frozen) for each in phases])
    if state.shared["step"] < size.n_steps:
        manager.prepare(state, size.n_steps)
    else:
        manager.await_rescue()  # a run is finished only if its checkpoint is on disk
    take_over(phase, state, manager)
    startup.reached("weights")
    stage(phase, stack)
    parts = parts_of(phase, switch_at(phases, state.shared["step"]), state, world, tokenizer, data_state, stack)
    run = Run(
        phases=phases,
        phase=phase,
        run_dir=run_dir,
        world=world,
        tokenizer=tokenizer,
        model=state.model,
        validation_loss=CrossEntropy(CrossEntropyArgs()),
        manager=manager,
        held_out=on_every_rank(lambda: held_out_rows(phase.args, tokenizer)),
        state=state,
        resources=stack,
        floor=on_every_rank(lambda: known_floor(phase.args, world)),
        **parts,
    )
    startup.reached("data")
    return run


def stage(phase: Phase, resources: ExitStack) -> None:
    """Copy the sources of a phase to the fast folder, if the config names one. Collective."""
    data = phase.args.data
    phase.args.data = on_every_rank(lambda: resources.enter_context(staged(data)))


def parts_of(
    phase: Phase,
    switch: Switch | None,
    state: TrainState,
    world: World,
    tokenizer: Tokenizer,
    data_state: dict[str, Any] | None,
    resources: ExitStack,
    scale: LossScale | None = None,
) -> dict[str, Any]:
    """Build the parts of a Learner that change between phases, and set the phase's rotary base. Collective.

    `scale`: the loss scale so far; `resources` closes the parts.
    """
    args = phase.args
    for module in state.model.modules():
        if isinstance(module, RotaryEmbedding) and args.model.attention is not None:
            module.turn_by(args.model.attention.rope_theta)
    rows = build_rows(args, phase.size, world, tokenizer, data_state, switch)
    return {
        "updater": build_updater(args, state, world.device, scale),
        "loss": build_loss(args),
        "loader": resources.enter_context(rows),
    }


def enter_next(run: Learner, loads: LoadsFrom) -> None:
    """Change to the phase of the next step. Collective: all ranks call this after the same step."""
    enter(run, run.loader.state_dict(), loads, run.updater.loss_scale)
    if run.world.is_main:
        log.info("phase %s: steps %d to %d", run.phase.name, run.phase.first + 1, run.phase.last)


def enter(run: Learner, data_state: dict[str, Any], loads: LoadsFrom, scale: LossScale | None = None) -> None:
    """Rebuild the parts for the phase of the next step; rows continue at `data_state`. Collective.

    `scale`: the loss scale so far, or None for that of the restored state.
    """
    phase, switch = run.phases[number_at(run.phases, run.step)], switch_at(run.phases, run.step)
    run.loader.close()
    if phase is not run.phase:
        stage(phase, run.resources)
    take_over(phase, run.state, loads)
    parts = parts_of(phase, switch, run.state, run.world, run.tokenizer, data_state, run.resources, scale)
    for name, part in parts.items():
        setattr(run, name, part)
    if isinstance(run, Run) and phase is not run.phase:
        run.held_out = on_every_rank(lambda: held_out_rows(phase.args, run.tokenizer))
        run.floor = on_every_rank(lambda: known_floor(phase.args, run.world))
    run.phase = phase
    run.begin_phase()


def take_over(phase: Phase, state: TrainState, loads: LoadsFrom) -> None:
    """Load the weights that a phase names, if it begins now; step and rows stay the run's own."""
    start = None if phase.written is None else phase.written.from_run
    if phase.written is None or start is None or state.shared["step"] != phase.first:
        return
    if phase.written.take == "state":
        kept = state.shared, state.per_rank, state.per_rank_all, rng_state()
        loads.load_from(start, state)
        state.shared, state.per_rank, state.per_rank_all = kept[:3]
        restore_rng(kept[3])
        return
    sizes_only = phase.args.checkpoint.verify_on_load == "sizes"
    log.info("%s", on_every_rank(lambda: load_weights(state.model, start, None, sizes_only=sizes_only)))
    forget(state.optimizer)


def known_floor(args: TrainArgs, world: World) -> Floor | None:
    """Return the least possible loss, on rank 0; None for a model with several labels, whose losses are summed."""
    return loss_floor(args.data) if world.is_main and args.model.n_labels == 1 else None


def fresh_shared() -> dict[str, Any]:
    """Return the shared state before the first step."""
    return {
        "step": 0,
        "total_tokens": 0,
        "skipped_steps": 0,
        "tracking_id": None,
        "schedule_begin": 0,  # step that the learning rate schedule counts from
        "first_row": 0,  # step n uses the rows first_row + [(n-1)*G, n*G)
    }


class LoadsFrom(Protocol):
    """Restores the full state of another run: CheckpointManager, Restorer."""

    def load_from(self, path: str | Path, state: TrainState, *, optimizer: bool = True) -> Path: ...


def resume(
    state: TrainState, manager: CheckpointManager, args: TrainArgs, phases: Sequence[Phase]
) -> dict[str, Any] | None:
    """Load the newest checkpoint, or else init_ckpt_path; return the loader's state, or None to begin at row 0."""
    newest = manager.resume(state)
    if newest is not None:
        data = saved_state(state.per_rank_all)
        pass_over(phases, state.shared)
        require_progress(state.shared, data, args, phases, newest)
        state.shared = fresh_shared() | state.shared
        return data
    return begin(state, manager, args, phases)


def pass_over(phases: Sequence[Phase], shared: Mapping[str, Any]) -> None:
    """Skip the rows that rewinds skipped, in all phases."""
    for phase in phases:
        phase.args.data = passing_over(phase.args.data, shared)


def require_progress(
    shared: Mapping[str, Any], data: Mapping[str, Any], args: TrainArgs, phases: Sequence[Phase], step: int
) -> None:
    """Raise RunError unless the rows and tokens of the state agree with its steps."""
    n_steps, n_tokens = shared.get("step"), shared.get("total_tokens")
    phase = phases[number_of(phases, step)]
    size, first_row = phase.size, shared.get("first_row", 0) + phase.row_shift
    wrong = wrong_counts(phase.args.data, size.lanes, size.rows_per_step, first_row, step, data)
    problem = next(wrong, None)
    if n_steps != step:
        problem = f"it counts {n_steps} steps"
    elif n_tokens is None or (args.checkpoint.init_ckpt_path is None and n_tokens != phase.tokens_at(step)):
        problem = f"it counts {n_tokens} tokens, but {step} steps are {phase.tokens_at(step)}"
    if problem:
        raise RunError(f"the state of checkpoint {step} contradicts itself: {problem}; take another checkpoint")


def begin(state: TrainState, loads: LoadsFrom, args: TrainArgs, phases: Sequence[Phase]) -> dict[str, Any] | None:
    """Begin a new run; return the loader's state, or None to begin at row 0."""
    start = args.checkpoint.init_ckpt_path
    if start is not None and args.checkpoint.continue_training_from_init:
        data = _continue_other(state, loads, start, args.checkpoint.reset, phases)
        pass_over(phases, state.shared)
        return data
    if start is not None:
        key, sizes_only = args.checkpoint.init_ckpt_model_key, args.checkpoint.verify_on_load == "sizes"
        asked = args.objective.asks_of_model
        more = {"sizes_only": sizes_only, "more_rows": "mask_token" in asked}
        weights = on_every_rank(lambda: load_weights(state.model, start, key, **more))
        log.info("%s", weights)
        if asked:
            changes = ", ".join(f"model.{name} {show(value)}" for name, value in asked.items())
            log.info("whatever they were trained with, loss.type %s goes on with %s", args.loss.type, changes)
    return None


def _continue_other(
    state: TrainState, loads: LoadsFrom, start: str, reset: Sequence[str], phases: Sequence[Phase]
) -> dict[str, Any] | None:
    """Load another run's full state, except for what is `reset`; return the loader's state."""
    loads.load_from(start, state, optimizer="optim" not in reset)
    data = None if "data" in reset else saved_state(state.per_rank_all)
    passed = state.shared.pop(PASSED, [])
    if "step" in reset:
        state.shared = fresh_shared()
    elif "schedule" in reset:
        state.shared["schedule_begin"] = state.shared["step"]
    if passed and data is not None:
        state.shared[PASSED] = passed
    if reset:
        log.info("reset, not taken over: %s", ", ".join(reset))
    state.shared["tracking_id"] = None  # another run, so another line in the plots
    step = state.shared["step"]
    state.shared["first_row"] = (data["row"] if data else 0) - phases[number_of(phases, step)].rows_at(step)
    return data


def held_out_rows(args: TrainArgs, tokenizer: Tokenizer) -> list[HeldOut]:
    """Read the held-out rows of each source that has a `*.val.jsonl`; none if validation is off."""
    if not (args.validation.every or args.validation.at_ends):
        return []
    texts, without = texts_beside_sources(args.data)
    if without:
        log.warning("no *.val.jsonl beside the sources %s, so they are not validated", ", ".join(without))
    wording = Wording(tokenizer, args.data.add_bos, args.data.add_eos)
    found = [packed(text, wording, **args.held_out_sizes()) for text in texts]
    for text, one in zip(texts, found, strict=True):
        if one.n_skipped:
            log.warning(
                "%s: %d lines or pieces of text are skipped, %d documents are used",
                text.file,
                one.n_skipped,
                one.n_documents,
            )
    return found
