"""Check a config across its sections, and derive the sizes of a run from it. Torch-free.

Train, `lingua check` and every command that starts a run use `load`, so they cannot disagree. All
errors are reported at once, before a process group, a device or a folder is touched. This takes a fraction of a second,
more if a large tokenizer file is read, or the data for `epochs`.

The sizes of a step: B rows per micro step on each of `dp` data-parallel ranks, G = B * grad_acc_steps * dp rows per
step, S tokens per row, K lanes. G and K stay when a run resumes on other GPUs; grad_acc_steps is derived.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lingua.config.base import ConfigError, all_args, dotted_key
from lingua.config.command_line import CommandLine, app_schema, choose_app
from lingua.config.compose import Composed, Examined, examine
from lingua.config.frozen import Difference, compare, freeze
from lingua.config.keys.data import DataArgs
from lingua.config.keys.eval import HeldOutArgs
from lingua.config.keys.model import LlamaArgs
from lingua.config.keys.optim import OptimArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.yaml_layers import COMMAND_LINE, DEFAULT, Origin
from lingua.files import DiskError, human_bytes
from lingua.run.throughput import PEAKS
from lingua.tokenizer import build_tokenizer
from lingua.train.absent import misnamed_sources, missing_paths, missing_sources
from lingua.train.begins import begins_with, nothing_to_begin_with
from lingua.train.earlier import Earlier, read_earlier
from lingua.train.phases import cut, frozen_phases, kept_steps, lr_jumps
from lingua.train.sizes import DEFAULT_STEPS, Finding, Phase, Resolved, Study, sizes, tokenizer_is_there

_GIB = 1 << 30
MAX_LIKELY_LR = 1.0
"""Learning rate above which `check` warns: the largest that optimizers here train with is 0.02 (Muon, `original`)."""
_PATH_KEYS = (
    "data.tokenizer.path", "data.sources", "checkpoint.init_ckpt_path", "eval.validation.root_dir", "eval.measures"
)  # fmt: skip
_SIZE_KEYS = {"data", "distributed", "grad_acc_steps", "global_batch_size"}  # judged together


@dataclass
class Checked:
    """A config without errors: what it will run, and how it differs from the run folder's config."""

    composed: Composed[TrainArgs]
    resolved: Resolved
    warnings: list[str]
    differences: list[Difference]
    """Differences from the config of the run's first attempt; none in a first attempt."""
    waived: list[Difference]
    """Differences that would be refused if the run had a checkpoint; `start.settle_config` checks again."""
    frozen: dict[str, Any]
    """Content of the run folder's `config.yaml`."""
    phases: list[Phase]

    @property
    def args(self) -> TrainArgs:
        return self.composed.args


def load(
    line: CommandLine,
    world_size: int | None = None,
    *,
    strict_paths: bool = False,
    starting: bool = False,
    here: bool = False,
    schema: type[TrainArgs] | None = None,
) -> Checked:
    """Check the config of a command line. Raises ConfigError with everything that is wrong with it.

    `strict_paths`: data and tokenizer must be on this machine. `starting`: the run is starting, so its tokenizer must
    be. `here`: it starts on this machine, so data and initial weights must be too; with phases, each is checked alone.
    `schema`: the app's config class, or None for that of the app that the command line chooses.
    """
    if line.config is None:
        raise ConfigError("no config is named; name one, apps/main/configs/debug.yaml say")
    schema = schema or app_schema(choose_app(line))
    examined = examine(line.config, line.overlays, line.overrides, schema, line.point)
    if examined.composed is None:
        raise ConfigError(examined.complaints)
    composed, args, marks = examined.composed, examined.composed.args, examined.composed.marks
    earlier = read_earlier(Path(args.dump_dir), Path(args.checkpoint.path) if args.checkpoint.path else None)
    kept = earlier.config if earlier.is_bound or earlier.has_begun else None
    followers = [n for n in ("model", "data", "loss") if hasattr(getattr(args, n), "seed") and (n, "seed") not in marks]
    at_start = _PATH_KEYS[: 1 if not here or args.phases else 2 if kept else 3]
    needed = _PATH_KEYS if strict_paths else at_start if starting else ()
    n_ranks = world_size or default_world_size(args)
    judged = _judge(examined, composed, n_ranks, followers, kept, needed)
    barring = _barring(judged, earlier, line)
    if why := earlier.why_not_there:
        raise ConfigError([*judged.complaints, composed.complaint("checkpoint.path", why)])
    if not earlier.is_bound and kept is not None and (judged.complaints or barring):
        # No step is kept, so the sizes that the earlier attempt derived need not be kept either.
        judged = _judge(examined, composed, n_ranks, followers, None, needed)
        barring = _barring(judged, earlier, line)
    if judged.complaints or judged.study.resolved is None:
        raise ConfigError(judged.complaints)
    if earlier.is_bound and barring:
        raise ConfigError([f"{Path(args.dump_dir) / 'config.yaml'}: {difference}" for difference in barring])
    ignored = [Finding(key, f"{key} has no effect; take it out") for key in composed.ignored]
    warnings = [composed.complaint(*finding) for finding in [*judged.study.warnings, *_idle_seed(composed), *ignored]]
    marks |= {(name, "seed"): _origin_of_seed(composed, getattr(args, name).seed) for name in followers}
    marks |= {("model", k): Origin(f"loss.type {args.loss.type}") for k in args.objective.asks_of_model} | marks
    waived = [] if earlier.is_bound else barring
    differences = _differences(judged, earlier) if kept is not None else []
    differences = [replace(d, rule="free") if waived or earlier.allows(d) else d for d in differences]
    phases = judged.study.phases
    if args.phases:
        args.checkpoint = args.checkpoint.model_copy(update={"steps": kept_steps(args, phases)})
    return Checked(composed, judged.study.resolved, warnings, differences, waived, judged.frozen, phases)


@dataclass
class _Judged:
    """The findings about a config, given the derived numbers (rows, lanes, seeds) that an earlier attempt fixed."""

    study: Study
    complaints: list[str]
    frozen: dict[str, Any]
    """Content of `config.yaml`; empty if the sizes are wrong."""
    optim: OptimArgs


def _judge(
    examined: Examined[TrainArgs],
    composed: Composed[TrainArgs],
    world_size: int,
    followers: Sequence[str],
    kept: Mapping[str, Any] | None,
    needed: Sequence[str],
) -> _Judged:
    """Study a config. `kept`: the frozen config whose derived numbers stay; `followers`: sections without a seed."""
    args = composed.args
    for name in followers:
        getattr(args, name).seed = (kept or {}).get(name, {}).get("seed", args.seed)
    found = study(args, world_size, kept, needed)
    absent = [] if kept is not None else list(nothing_to_begin_with(_PATH_KEYS[2], args.checkpoint.init_ckpt_path))
    if absent:
        found.warnings = [warning for warning in found.warnings if warning.key != absent[0].key]
        found.errors = [error for error in found.errors if error.key != absent[0].key] + absent
    about = {key.partition(".")[0] for key in examined.bad_keys}
    about |= _SIZE_KEYS if about & _SIZE_KEYS else set()
    # Do not report a finding that may only follow from a wrong value that was dropped.
    written = {dotted_key(key) for key in composed.marks} - set(examined.bad_keys) - _SIZE_KEYS
    errors = [f for f in found.errors if f.key in written or f.key.partition(".")[0] not in about]
    complaints = examined.complaints + [composed.complaint(*finding) for finding in errors]
    derived = found.resolved.frozen() | frozen_phases(found.phases) if found.resolved and found.phases else None
    return _Judged(found, complaints, freeze(args, derived) if derived else {}, args.optim)


def _differences(judged: _Judged, earlier: Earlier) -> list[Difference]:
    found = compare(earlier.config, judged.frozen) if earlier.config is not None else []
    return [earlier.with_rates(difference, judged.optim) for difference in found]


def _barring(judged: _Judged, earlier: Earlier, line: CommandLine) -> list[Difference]:
    """Return the differences that a run with a checkpoint refuses."""
    accepted = accepts(line)
    return [
        difference
        for difference in _differences(judged, earlier)
        if difference.rule == "refuse"
        or (difference.rule == "accept" and not accepted and not earlier.allows(difference))
    ]


def _origin_of_seed(composed: Composed[TrainArgs], value: int) -> Origin:
    """Return the origin of a seed that the config does not set."""
    if value != composed.args.seed:
        return Origin("the run's first attempt")
    return Origin(f"seed, {composed.marks.get(('seed',), DEFAULT)}")


def _idle_seed(composed: Composed[TrainArgs]) -> Iterator[Finding]:
    """Warn of a typed seed that has no effect because the config sets model.seed and data.seed."""
    typed, stated = composed.marks.get(("seed",)), [composed.marks.get((name, "seed")) for name in ("model", "data")]
    seeds = (composed.args.model.seed, composed.args.data.seed)
    if typed == COMMAND_LINE and None not in stated and COMMAND_LINE not in stated and composed.args.seed not in seeds:
        text = (
            f"seed is {composed.args.seed}, but model.seed is {seeds[0]} ({stated[0]}) and data.seed {seeds[1]} "
            f"({stated[1]}): weights and rows stay as they are; set both to null, and they follow seed"
        )
        yield Finding("seed", text)


def accepts(line: CommandLine) -> bool:
    return str(line.flags.get("accept-change", False)).lower() not in ("false", "no", "0", "")


def default_world_size(args: TrainArgs) -> int:
    """Return the number of ranks that the config describes: of `launcher`, else of `distributed`."""
    if args.launcher.gpus is not None:
        return args.launcher.nodes * max(1, args.launcher.gpus)
    layout = args.distributed
    return (layout.dp_replicate or 1) * (layout.dp_shard or 1) * layout.tp_size


def problems(args: TrainArgs, world_size: int) -> tuple[list[Finding], list[Finding]]:
    """Return (errors, warnings) of a config whose keys are valid by themselves."""
    found = study(args, world_size)
    return found.errors, found.warnings


def phases_of(args: TrainArgs, world_size: int, frozen: Mapping[str, Any] | None = None) -> list[Phase]:
    """Return the phases of a run on `world_size` ranks. Raises ConfigError if their sizes do not fit."""
    found = study(args, world_size, frozen)
    if found.errors or not found.phases:
        raise ConfigError([finding.text for finding in found.errors])
    return found.phases


def resolve(args: TrainArgs, world_size: int, frozen: Mapping[str, Any] | None = None) -> Resolved:
    """Return the initial sizes of a run on `world_size` ranks. Raises ConfigError if they do not fit."""
    return phases_of(args, world_size, frozen)[0].size


def study(
    args: TrainArgs, world_size: int, frozen: Mapping[str, Any] | None = None, needed: Sequence[str] = ()
) -> Study:
    """Return all findings about a valid config.

    `frozen`: the config of the run's first attempt; `needed`: keys whose files must be on this machine.
    """
    found = Study()
    for finding in missing_paths(args):
        if finding.key in needed:
            text = finding.text.partition("; assumed")[0]
            found.errors.append(Finding(finding.key, f"{text}; correct the path, or copy it here"))
        else:
            found.warnings.append(finding)
    found.errors += misnamed_sources(args.data)
    found.errors += [*_conflicts(args), *_unreadable_sources(args.data), *_nothing_to_measure(args)]
    found.errors += _impossible_folders(args)
    found.resolved = sizes(args, world_size, frozen or {}, found)
    if found.resolved is not None:
        found.phases = cut(args, found.resolved, world_size, frozen or {}, found)
        if found.phases:
            size = found.phases[-1].size
            found.resolved = replace(found.resolved, n_steps=size.n_steps, max_seqlen=size.max_seqlen)
        found.errors += _misfits(args, found.resolved)
        found.errors += _of_phases(found.phases, needed, {finding.text for finding in found.errors})
        later = [Finding("data.sources", text) for one in found.phases for text, _ in missing_sources(one.args.data)]
        known = {*found.warnings, *found.errors}
        found.warnings += [f for f in dict.fromkeys(later) if f not in known and f.key not in needed]
        found.errors += _nothing_to_do(args, found.resolved) if frozen is None else ()
        found.warnings += [*_oddities(args, found.resolved), *(() if found.errors else lr_jumps(found.phases))]
    return found


def _of_phases(phases: Sequence[Phase], needed: Sequence[str], known: set[str]) -> Iterator[Finding]:
    """Yield the errors of single phases, each once. `known`: errors reported already."""
    for phase in phases:
        if phase.written is None:
            continue
        wrong = [*_conflicts(phase.args), *_unreadable_sources(phase.args.data), *_misfits(phase.args, phase.size)]
        wrong += [*_nothing_to_measure(phase.args), *nothing_to_begin_with("from", phase.written.from_run)]
        if "data.sources" in needed:
            wrong += [Finding("data.sources", text) for text, _ in missing_sources(phase.args.data)]
        yield from (Finding("phases", f"phase {phase.name}: {f.text}") for f in wrong if f.text not in known)
        known |= {finding.text for finding in wrong}


# -- errors --------------------------------------------------------------------------------------------------------


def _impossible_folders(args: TrainArgs) -> Iterator[Finding]:
    """Yield folders of the run that nobody can create: below a file, or in a kernel file system (/proc)."""
    for key, path in (("dump_dir", args.dump_dir), ("checkpoint.path", args.checkpoint.path)):
        place = Path(path or ".").absolute()
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        if not there.is_dir():
            yield Finding(key, f"{key} is {path}, but {there} is a file; choose another folder")
        elif os.statvfs(there).f_blocks == 0 and there != place:
            yield Finding(key, f"{key} is {path}, but {there} cannot hold files; choose another folder")


def _unreadable_sources(args: DataArgs) -> Iterator[Finding]:
    """Yield sources that exist but cannot be used."""
    try:
        sources = args.read_files()
    except ConfigError as error:
        yield Finding("data.sources", str(error))
        return
    for source in sources:
        if Path(source.path).exists():
            from lingua.data.blocked_source import TextFields
            from lingua.data.sources import source_class

            kind, path = source_class(source.format), Path(source.path)
            try:
                kind.check_files(path, TextFields(source.text_key, args.loss_on))
                if kind.holds_tokens and (not args.tokenizer.needs_file or tokenizer_is_there(args.tokenizer)):
                    kind.check_tokenizer(path, build_tokenizer(args.tokenizer))
            except OSError as error:
                if DiskError.of(error).may_pass:  # not the config's fault
                    raise
                yield Finding("data.sources", str(error))
            except ValueError as error:
                yield Finding("data.sources", str(error))


def _nothing_to_measure(args: TrainArgs) -> Iterator[Finding]:
    """Yield evaluations that would fail at each checkpoint, as far as the data is on this machine."""
    if args.eval is None or not args.eval.automatic:
        return
    chosen = args.eval.chosen()
    if not chosen:
        text = "eval: nothing is measured; set eval.validation, eval.harness.tasks or eval.measures, or eval=null"
        yield Finding("eval", text)
    elif args.data.sources and not any(missing_paths(args)) and not misnamed_sources(args.data):
        from lingua.data.held_out import held_out_texts

        for measure in chosen:
            try:
                if isinstance(measure, HeldOutArgs):
                    held_out_texts(args.data, measure)
            except ValueError as error:
                yield Finding("eval.validation" if measure is args.eval.validation else "eval.measures", str(error))


def _conflicts(args: TrainArgs) -> Iterator[Finding]:
    """Yield keys that contradict each other, whatever the sizes."""
    from lingua.optim.schedule import SCHEDULES

    lengths = [key for key in ("steps", "epochs", "total_flops") if getattr(args, key) is not None]
    if len(lengths) > 1:
        text = f"{' and '.join(lengths)} both say how long the run is; keep one, set {lengths[-1]}=null say"
        yield Finding(lengths[-1], text)
    if args.optim.scheduler not in SCHEDULES:
        text = f"optim.scheduler is {args.optim.scheduler!r}; known are {', '.join(SCHEDULES)} (own ones by `plugins`)"
        yield Finding("optim.scheduler", text)
    if args.data.n_views < 2:
        yield Finding("data.n_views", "data.n_views is 1, which leaves no labels; training needs 2")
    tokenizer = args.data.tokenizer
    if tokenizer.needs_file and not tokenizer.path:
        text = f"data.tokenizer.name is {tokenizer.name}, which needs a file; set data.tokenizer.path"
        yield Finding("data.tokenizer", text)
    if args.async_eval_gpus is not None and args.eval is None:
        text = f"async_eval_gpus is {args.async_eval_gpus}, but nothing is evaluated; add a section `eval` or drop it"
        yield Finding("async_eval_gpus", text)
    if args.checkpoint.continue_training_from_init and not args.checkpoint.init_ckpt_path:
        text = "checkpoint.continue_training_from_init needs checkpoint.init_ckpt_path; set it"
        yield Finding("checkpoint.continue_training_from_init", text)
    if args.checkpoint.reset and not args.checkpoint.continue_training_from_init:
        text = (
            f"checkpoint.reset is {args.checkpoint.reset}, but no state is taken over that it could be left out of; "
            "set checkpoint.continue_training_from_init and init_ckpt_path, or drop it"
        )
        yield Finding("checkpoint.reset", text)
    for section in all_args(args):
        yield from (Finding(*conflict) for conflict in section.conflicts(args))


def _too_large(args: TrainArgs, size: Resolved) -> Iterator[Finding]:
    """Yield a micro step that no device can hold, even if only the inputs of the blocks are kept for backward."""
    if not isinstance(args.model, LlamaArgs):
        return
    width = 4 if args.distributed.model_dtype == "fp32" else 2
    least = size.batch_size * size.seq_len * args.model.dim * args.model.n_layers * width // size.tp_size
    limit, what = max(peak.memory_gib for peak in PEAKS.values()) * _GIB, "no GPU known here has more than"
    if args.device == "cpu":
        limit, what = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine has"
    if least > limit:
        text = f"a micro step of {size.batch_size} rows of data.seq_len {size.seq_len:,} takes {human_bytes(least)}"
        remedy = "lower data.seq_len or data.batch_size"
        yield Finding("data.seq_len", f"{text} at least, and {what} {human_bytes(limit)}; {remedy}")


def _misfits(args: TrainArgs, size: Resolved) -> Iterator[Finding]:
    """Yield sizes that do not divide each other."""
    yield from _too_large(args, size)
    if size.lanes % size.dp_size:
        low = size.lanes // size.dp_size * size.dp_size
        near = " or ".join(str(n) for n in (low, low + size.dp_size) if n)
        text = f"data.lanes is {size.lanes}, no multiple of {size.dp_size} data-parallel ranks; set it to {near}"
        yield Finding("data.lanes", text)
    if args.distributed.compile and args.distributed.compile_scope == "model" and size.world_size > 1:
        text = f"distributed.compile_scope is model, which needs one process, but there are {size.world_size}"
        yield Finding("distributed.compile_scope", f"{text}; use block")
    n_ranks, text = size.tp_size, f"distributed.tp_size is {size.tp_size}"
    if size.seq_len % n_ranks:
        remedy = f"set data.seq_len to {size.seq_len - size.seq_len % n_ranks or n_ranks}"
        yield Finding("distributed.tp_size", f"{text}, which does not divide data.seq_len {size.seq_len}; {remedy}")
    if -(-size.vocab_size // n_ranks) * (n_ranks - 1) >= size.vocab_size:  # torch's split would leave a rank nothing
        yield Finding("distributed.tp_size", f"{text}, too many for a vocabulary of {size.vocab_size}; use fewer")
    if n_ranks > 1 and not getattr(args.loss, "vocab_parallel", False):
        remedy = "use cross_entropy, or let it, and say vocab_parallel = True in its Args"
        yield Finding("loss.type", f"{text}, but the loss {args.loss.type} takes no head that is split; {remedy}")


def _nothing_to_do(args: TrainArgs, size: Resolved) -> Iterator[Finding]:
    """Yield an error if a first attempt begins with a state whose steps are all done."""
    if size.n_steps <= (step := begins_with(args)[0]) > 0:
        text = (
            f"steps is {size.n_steps}, but {args.checkpoint.init_ckpt_path} is already at step {step}; raise steps, or "
            f"count from 0 with checkpoint.reset=[{','.join([*args.checkpoint.reset, 'step'])}]"
        )
        yield Finding("steps", text)


# -- warnings ------------------------------------------------------------------------------------------------------


def _oddities(args: TrainArgs, size: Resolved) -> Iterator[Finding]:
    """Yield what works but is probably a mistake."""
    if args.steps is None and size.how_long == "default":
        yield Finding("steps", f"no length is given; {DEFAULT_STEPS} steps are assumed")
    if args.optim.lr > MAX_LIKELY_LR:
        yield Finding("optim.lr", f"optim.lr is {args.optim.lr:g}; a rate above {MAX_LIKELY_LR:g} hardly ever trains")
    if args.optim.warmup >= size.n_steps > 0:
        text = f"optim.warmup is {args.optim.warmup} steps, but the run has {size.n_steps}; its peak is never reached"
        yield Finding("optim.warmup", text)
    if "max_seqlen" in args.model.model_fields_set and args.model.max_seqlen < size.seq_len:
        text = f"model.max_seqlen is {args.model.max_seqlen}; it is raised to data.seq_len {size.seq_len}"
        yield Finding("model.max_seqlen", text)
    if args.distributed.dp_replicate not in (None, size.dp_replicate):
        text = f"distributed.dp_replicate is {args.distributed.dp_replicate}, but on {size.world_size} ranks it is"
        yield Finding("distributed.dp_replicate", f"{text} {size.dp_replicate}")
    if args.data.n_views > 2 and args.model.n_labels == 1:
        yield Finding("data.n_views", f"data.n_views is {args.data.n_views}; this model learns from the first 2 only")
    if args.distributed.model_dtype == "fp16":
        text = (
            "distributed.model_dtype is fp16, whose loss scale costs skipped steps; bf16 needs none where a GPU has it"
        )
        yield Finding("distributed.model_dtype", text)
    if args.distributed.float8_recipe is not None and not args.distributed.compile:
        text = "distributed.float8_recipe without distributed.compile is slower than bf16: scaling is not fused"
        yield Finding("distributed.float8_recipe", f"{text}; set distributed.compile=true")
    lanes_per_rank = size.lanes // size.dp_size
    if args.data.num_workers > lanes_per_rank:
        text = f"data.num_workers is {args.data.num_workers}, but a rank has {lanes_per_rank} lanes; the rest idles"
        yield Finding("data.num_workers", text)
    if args.data.num_workers > 1 and not args.data.load_async:
        yield Finding("data.num_workers", "data.num_workers is ignored, since data.load_async is false")
    ahead = args.data.prefetch_size * size.batch_size * size.seq_len * args.data.n_views * 4
    if args.data.load_async and ahead > 4 * _GIB:
        text = f"data.prefetch_size {args.data.prefetch_size} holds {human_bytes(ahead)} per rank; lower it"
        yield Finding("data.prefetch_size", text)
    if (signal := args.profiling.signal) is not None and signal not in args.signals_that("profile"):
        action = getattr(args.signals, signal)
        other = f"signals.{signal} is {action}" if action else "it is in stop_signals too"
        text = f"profiling.signal is {signal}, but {other}, which counts; leave out one of them"
        yield Finding("profiling.signal", text)
    for signal, when in (("SIGTERM", "preemption"), ("SIGUSR2", "the time limit")):
        if signal not in args.signals_that("stop") and (signal == "SIGTERM" or args.launcher.signal_s):
            text = (
                f"{signal} does not stop the run, but Slurm sends it before {when}: steps since the last save are lost"
            )
            yield Finding(f"signals.{signal}", f"{text}; set signals.{signal}=stop")
    if args.checkpoint.init_ckpt_model_key and not args.checkpoint.init_ckpt_path:
        yield Finding("checkpoint.init_ckpt_model_key", "checkpoint.init_ckpt_model_key is ignored: no init_ckpt_path")
    yield from (Finding(*oddity) for oddity in args.model.oddities(args))
    yield from _odd_checkpoints(args, size)


def _odd_checkpoints(args: TrainArgs, size: Resolved) -> Iterator[Finding]:
    each = size.checkpoint_bytes
    kept_for_good = {
        f"{key}.keep": size.n_steps // period.every
        for key, period in (("dump", args.checkpoint.dump), ("eval", args.checkpoint.eval))
        if period.keep <= 0 < period.every
    }
    milestones = args.checkpoint.milestones(size.n_steps)
    for key, kept in {**kept_for_good, "keep_every": len(milestones)}.items():
        if kept * each > 500 * _GIB:
            text = f"checkpoint.{key} keeps all {kept} checkpoints of {human_bytes(each)}"
            yield Finding(f"checkpoint.{key}", f"{text}, {human_bytes(kept * each)}; keep fewer")
    if args.eval is not None and args.eval.automatic and args.checkpoint.eval.every <= 0:
        text = f"checkpoint.eval.every is {args.checkpoint.eval.every}: only the last checkpoint is evaluated; set it"
        yield Finding("checkpoint.eval.every", text)
    periods = (args.checkpoint.dump.every, args.checkpoint.eval.every, *milestones)
    if not any(0 < every < size.n_steps for every in periods) and size.n_steps > 2000:
        text = f"no checkpoint before the last of {size.n_steps} steps; if the run is killed, all progress is lost"
        yield Finding("checkpoint.dump.every", text)
