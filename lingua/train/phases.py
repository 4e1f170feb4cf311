"""Resolve the phases of a run before anything is built: which config and sizes hold for which steps. Torch-free.

Every rank computes the same list from the config alone, so all switch at the same step, and a checkpoint's step
determines its phase. A run without `phases` is one phase.

    updates done    0 ........ 900 ..... 1000 ............. 3000
    phase           main       anneal    long
    first, last     0, 900     900, 1000 1000, 3000          update n belongs to the phase with first < n <= last
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lingua.config.base import ConfigError, all_keys, unknown_key
from lingua.config.compose import sentences
from lingua.config.keys.data import AnySource, Switch
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.phases import MAY_CHANGE, PhaseArgs, may_change, read_until
from lingua.config.keys.train import TrainArgs
from lingua.train.sizes import Finding, Phase, Resolved, Study, sizes

if TYPE_CHECKING:
    from lingua.data.audit import Part


def number_at(phases: Sequence[Phase], step: int) -> int:
    """Return the index of the phase of update step + 1; after the last step, that of the last phase."""
    return next((i for i, phase in enumerate(phases) if step < phase.last), len(phases) - 1)


def number_of(phases: Sequence[Phase], step: int) -> int:
    """Return the index of the phase of update `step`; for step 0, that of the first phase."""
    return next((i for i, phase in enumerate(phases) if step <= phase.last), len(phases) - 1)


def switch_at(phases: Sequence[Phase], step: int) -> Switch | None:
    """Return the change of the data between update `step` and the next, or None within a phase."""
    number = number_at(phases, step)
    return Switch(phases[number - 1].args.data, phases[number].fresh) if number > number_of(phases, step) else None


def parts_in(args: TrainArgs, frozen: Mapping[str, Any], first_row: int) -> list[Part]:
    """Return the parts of a run with a frozen config, to read its rows again. Raises ConfigError."""
    from lingua.data.audit import Part  # numpy
    from lingua.data.sources import with_default_sources

    alone, found = args.model_copy(update={"distributed": DistributedArgs()}), Study()
    base = sizes(alone, 1, frozen, found)
    phases = [] if base is None else cut(alone, base, 1, frozen, found)
    if found.errors:
        raise ConfigError([finding.text for finding in found.errors])
    return [
        Part(
            with_default_sources(phase.args.data),
            phase.size.rows_per_step,
            first_row + phase.row_shift,
            phase.name,
            phase.first,
            phase.last,
            switch_at(phases, phase.first) if phase.first else None,
        )
        for phase in phases
    ]


def frozen_phases(phases: Sequence[Phase]) -> dict[str, Any]:
    """Return the frozen config's keys about phases, with exact steps and rows per step."""
    if phases[0].written is None:
        return {}
    listed = []
    for phase in phases:
        assert phase.written is not None
        extra = set(phase.written.model_extra or ())
        given = phase.written.model_dump(mode="json", exclude=extra, exclude_defaults=True) | phase.written.changes
        own = {"until": phase.last, "global_batch_size": phase.size.rows_per_step}
        listed.append({k: v for k, v in (given | own).items() if k not in ("global_batch_tokens", "grad_acc_steps")})
    return {"phases": listed, "checkpoint.steps": kept_steps(phases[0].args, phases)}


def kept_steps(args: TrainArgs, phases: Sequence[Phase]) -> list[int]:
    """Return checkpoint.steps plus the steps at which phases end."""
    given, end = args.checkpoint.steps, phases[-1].last
    chosen = [1 << n for n in range(end.bit_length())] if given == "log2" else given
    return sorted({*chosen, *(phase.last for phase in phases)})


def cut(args: TrainArgs, base: Resolved, world_size: int, frozen: Mapping[str, Any], found: Study) -> list[Phase]:
    """Return the phases of a run; errors go to `found`. `base`: sizes of the config without phases.

    `frozen`: the config of the run's first attempt, whose rows per step are kept.
    """
    if not args.phases:
        return [Phase(args, base, 0, base.n_steps)]
    phases: list[Phase] = []
    seen: dict[str, Any] = {}
    listed = frozen.get("phases")
    kept: list[Any] = listed if isinstance(listed, list) else []
    for number, written in enumerate(args.phases):
        where = f"phases[{number}] ({written.name})"
        before = phases[-1] if phases else None
        try:
            own = _with_changes(args, written, base)
            _check(own, args, written, [phase.name for phase in phases])
            own.data = own.data.model_copy(update={"resting": _resting(own, seen)})
        except ConfigError as error:
            found.errors += [Finding("phases", f"{where}: {problem}") for problem in error.problems]
            return []
        was = kept[number] if number < len(kept) and isinstance(kept[number], dict) else {}
        rows = was.get("global_batch_size") if was.get("name") == written.name else None
        fixed = {"global_batch_size": rows, "data": {"lanes": base.lanes}}
        n_before = len(found.errors)
        size = sizes(own, world_size, fixed, found)
        found.errors[n_before:] = [Finding("phases", f"{where}: {error.text}") for error in found.errors[n_before:]]
        if size is None:
            return []
        first = before.last if before else 0
        rows_before = before.rows_at(first) if before else 0
        tokens_before = before.tokens_at(first) if before else 0
        last = _end(written, first, tokens_before, size.tokens_per_step, base.n_steps)
        if last <= first:
            text = f"until is {written.until}, that is step {last}, but it begins after step {first}; raise it"
            found.errors.append(Finding("phases", f"{where}: {text}"))
            return []
        span = (first, last) if _has_own_schedule(written) else None
        phases.append(Phase(own, size, first, last, rows_before, tokens_before, span, written))
    end = phases[-1].last
    if end < base.n_steps:
        text = f"the last phase ends at step {end}, but the run has {base.n_steps} steps; let it end at 100%"
        found.errors.append(Finding("phases", f"phases: {text}, or set steps: {end}"))
    longest = max(base.max_seqlen, *(phase.size.max_seqlen for phase in phases))
    return [replace(each, size=replace(each.size, n_steps=end, max_seqlen=longest)) for each in phases]


def lr_jumps(phases: Sequence[Phase]) -> Iterator[Finding]:
    """Yield changes of the learning rate by more than a factor of 2 between phases, except for warmup."""
    for before, phase in pairwise(phases):
        was, now = before.lr_at(phase.first - 1), phase.lr_at(phase.first)
        warms_up = phase.first - (phase.span or (0, 0))[0] < phase.args.optim.warmup
        if not warms_up and not 0.5 * was <= now <= 2 * was:
            text = f"phase {phase.name}: the learning rate goes from {was:.3g} in step {phase.first} to {now:.3g}"
            yield Finding("phases", f"{text}; if that is not meant, set optim.lr there, or schedule and optim.warmup")


def _end(written: PhaseArgs, first: int, tokens_before: int, tokens_per_step: int, n_steps: int) -> int:
    until = read_until(written.until)
    if until.unit == "tokens":
        more = until.value - (0 if until.is_more else tokens_before)
        return first + math.ceil(more / tokens_per_step)
    steps = round(until.value if until.unit == "steps" else until.value * n_steps / 100)
    return first + steps if until.is_more else steps


def _has_own_schedule(written: PhaseArgs) -> bool:
    return written.schedule == "phase" or (written.schedule is None and "optim.scheduler" in written.changes)


def _with_changes(args: TrainArgs, written: PhaseArgs, base: Resolved) -> TrainArgs:
    """Return the config of a phase. Raises ConfigError."""
    schema, changes = type(args), written.changes
    known, problems = set(all_keys(schema)), []
    for key in changes:
        if key not in known:
            problems.append(unknown_key(tuple(key.split(".")), schema))
        elif not may_change(key):
            problems.append(f"{key} cannot change within a run; a phase may change {', '.join(MAY_CHANGE)}")
    if problems:
        raise ConfigError(problems)
    tree = args.model_dump(mode="json") | {"phases": [], "steps": base.n_steps, "epochs": None, "total_flops": None}
    if (kind := changes.get("loss.type", args.loss.type)) != args.loss.type:
        tree["loss"] = {"type": kind}
    for other, key in (("global_batch_size", "global_batch_tokens"), ("global_batch_tokens", "global_batch_size")):
        if key in changes:
            tree[other] = None
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node[section] = node.get(section) or {}  # eval.harness may be null
            node = node[section]
        node[name] = value
    try:
        own = schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([text for _, text in sentences(error, tree, schema)]) from None
    if _has_own_schedule(written) and "optim.warmup" not in changes:
        own.optim = own.optim.model_copy(update={"warmup": 0})
    return own


def _check(own: TrainArgs, args: TrainArgs, written: PhaseArgs, names: Sequence[str]) -> None:
    """Raise ConfigError for errors that only a phase can have."""
    problems, changes = [], written.changes
    if written.name in names:
        problems.append("an earlier phase has this name; choose another")
    if "data.sources" in changes and not args.data.sources:
        problems.append("data.sources changes, but the config itself names none; name those of the first phase there")
    if args.eval is None and own.eval is not None:
        text = "what is evaluated changes, but the config itself has no section eval; write one there"
        problems.append(f"{text}, `eval: {{}}` for held-out losses")
    if own.objective.asks_of_model != args.objective.asks_of_model:
        problems.append(
            f"loss.type {own.loss.type} needs another model than {args.loss.type}; train it in a run of its own"
        )
    if own.data.shuffle_window and any(key in changes for key in ("data.sources", "data.root_dir", "data.seq_len")):
        text = f"data.shuffle_window is {own.data.shuffle_window}, whose rows are drawn before the switch"
        problems.append(f"{text}; sources and data.seq_len can change without it, so set it to 0")
    if own.data.seq_len != args.data.seq_len and own.data.tokenizer.name == "none":
        problems.append("data.seq_len cannot change where documents of token ids are a row each; keep it")
    try:
        there = {str(source.name) for source in own.data.read_sources()}
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if isinstance(written.fresh, list) and (missing := sorted(set(written.fresh) - there)):
        problems.append(
            f"fresh names {missing[0]}, which is no source of this phase; it has {', '.join(sorted(there))}"
        )
    if problems:
        raise ConfigError(problems)


def _resting(own: TrainArgs, seen: dict[str, Any]) -> list[AnySource]:
    """Return the sources of earlier phases that this one does not read; adds its own to `seen`. Raises ConfigError."""
    read = {str(source.name): source.model_copy(update={"weight": 0.0}) for source in own.data.read_sources()}
    if others := sorted(name for name, source in read.items() if seen.get(name, source) != source):
        text = f"source {others[0]} is not the files that an earlier phase calls so; give it a `name` of its own"
        raise ConfigError(text)
    rest = [source for name, source in seen.items() if name not in read]
    seen |= read
    return rest
