"""`lingua check`: figures to plan a run with, and the keys that the config sets (--all: every key). Torch-free.

Every figure comes with its formula. Nothing is built or written.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from lingua.checkpoint import goodput
from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine
from lingua.config.frozen import dump_yaml
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.model import LlamaArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.yaml_layers import DEFAULT
from lingua.console import show_table
from lingua.files import human_bytes
from lingua.masking import public_tree
from lingua.run.throughput import PEAKS, find_peak
from lingua.train.begins import begins_with
from lingua.train.check import Checked, load
from lingua.train.sizes import Phase, Resolved
from lingua.train.step_time import RATES, is_known, staging_s, step_parts

_MAIN_FACTS = {
    "parameters", "tokens_per_step", "steps", "total_tokens", "tokens_per_parameter", "checkpoint_bytes",
    "memory_bytes", "total_flops", "hours", "lost_to_kills", "best_dump_every",
}  # fmt: skip
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


_OF_GPU = {"memory_bytes", "hours", "predicted_step_s", "predicted_mfu"}
EXAMPLE_GPU = "h200"


class Fact(NamedTuple):
    """A derived figure."""

    name: str
    value: float
    shown: str
    how: str


def report(
    line: CommandLine,
    *,
    world_size: int | None = None,
    mfu: float = 0.4,
    gpu: str | None = None,
    strict_paths: bool = False,
    as_json: bool = False,
    everything: bool = False,
    kill_every: str | None = None,
    disk_gb_per_s: float = 1.0,
) -> int:
    """Print what a config means; return the exit code. Raises ConfigError with everything that is wrong with it."""
    is_known = (gpu := gpu or gpu_here()) is not None
    gpu = gpu or EXAMPLE_GPU
    if find_peak(gpu) is None:
        raise ConfigError(f"command line: --gpu {gpu} is not in the table; known are {', '.join(PEAKS)}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"command line: --mfu {mfu} is no share of the peak; write one between 0 and 1")
    checked = load(line, world_size, strict_paths=strict_paths)
    figures = list(facts(checked.args, checked.resolved, mfu, gpu, checked.phases))
    checked.warnings += too_large(figures, gpu) if is_known else []
    if kill_every is not None:
        hours = next(fact.value for fact in figures if fact.name == "hours")
        figures += facts_of_kills(checked.args, checked.resolved, hours, kill_every, disk_gb_per_s)
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(as_record(checked, figures), option=orjson.OPT_INDENT_2) + b"\n")
    else:
        _print(checked, [fact for fact in figures if is_known or everything or fact.name not in _OF_GPU], everything)
        if not is_known and not everything:
            print(f"\nThis machine has no GPU that is in the table; --gpu {EXAMPLE_GPU} estimates memory and hours.")
    return 0


def gpu_here() -> str | None:
    """Return the driver's name of this machine's GPU, without torch; None if there is none in the table."""
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        model = re.search(r"Model:\s*(.+)", file.read_text(errors="replace"))
        if model and find_peak(model[1]):
            return model[1].strip()
    return None


def too_large(figures: list[Fact], gpu: str) -> list[str]:
    peak, memory = find_peak(gpu), next(fact for fact in figures if fact.name == "memory_bytes")
    if peak is None or memory.value <= peak.memory_gib * 2**30:
        return []
    return [f"about {memory.shown} per GPU are more than a {gpu} has; shard over more ranks or lower data.batch_size"]


def as_record(checked: Checked, figures: list[Fact]) -> dict[str, Any]:
    return {
        "config": public_tree(checked.args.model_dump(mode="json")),
        "origins": checked.composed.origins(),
        "facts": {fact.name: fact.value for fact in figures},
        "formulas": {fact.name: fact.how for fact in figures},
        "warnings": checked.warnings,
        "differences": [str(difference) for difference in checked.differences],
    }


def facts(args: TrainArgs, size: Resolved, mfu: float, gpu: str, phases: Sequence[Phase] = ()) -> Iterator[Fact]:
    """Yield derived figures in the order in which they are shown."""
    peak = find_peak(gpu)
    assert peak is not None
    n, state = size.n_params, size.checkpoint_bytes
    yield Fact("parameters", n, f"{n:,}", "all")
    n_blocks = size.n_params_non_embedding
    yield Fact("parameters_non_embedding", n_blocks, f"{n_blocks:,}", "without input embedding and output head")
    yield Fact("vocabulary", size.vocab_size, f"{size.vocab_size:,}", "of the model, else of the tokenizer")
    yield Fact("ranks", size.world_size, f"{size.world_size:,}", _layout(size))
    micro = f"B {size.batch_size} * grad_acc_steps {size.grad_acc_steps} * {size.dp_size} data-parallel ranks"
    yield Fact("rows_per_step", size.rows_per_step, f"{size.rows_per_step:,}", f"G = {micro}")
    yield Fact("lanes", size.lanes, f"{size.lanes:,}", "K, fixed for the life of the run")
    per_step = size.tokens_per_step
    yield Fact("tokens_per_step", per_step, f"{per_step:,}", f"G * S {size.seq_len}")
    yield Fact("steps", size.n_steps, f"{size.n_steps:,}", size.how_long)
    done_steps, done_tokens = begins_with(args)
    n_steps = size.n_steps - done_steps
    parts = phases or [Phase(args, size, 0, size.n_steps)]
    each_tokens = [max(0, one.last - max(one.first, done_steps)) * one.size.tokens_per_step for one in parts]
    to_train = sum(each_tokens)
    n_tokens = (done_tokens or done_steps * per_step) + to_train
    how = f"{n_tokens - to_train:,} of the first {done_steps:,} steps + {n_steps:,} steps" if done_steps else "steps"
    yield Fact("total_tokens", n_tokens, f"{n_tokens:,}", f"{how} * tokens per step")
    yield Fact("tokens_per_parameter", n_tokens / n, f"{n_tokens / n:.3g}", "of all parameters")
    how = f"{state / n:.4g} bytes per parameter: fp32 weights and the state of {args.optim.type}"
    yield Fact("checkpoint_bytes", state, human_bytes(state), f"{how}; {_save_cost(args, state)}")
    yield _memory(args, size, peak.memory_gib, gpu)
    per_token, formula = float(size.flops_per_token), type(args.model).flops_per_token.__doc__ or ""
    yield Fact("flops_per_token", per_token, f"{per_token:.4g}", formula.partition("\n")[0])
    total = float(sum(n * one.size.flops_per_token for n, one in zip(each_tokens, parts, strict=True)))
    how = f"FLOPs per token * {to_train:,} tokens" if done_steps else "FLOPs per token * total tokens"
    if len(parts) > 1:
        how = f"{how}, phase by phase"
    yield Fact("total_flops", total, f"{total:.4g}", how)
    hours = total / (mfu * peak.flops_per_s * size.world_size) / 3600
    how = f"at MFU {mfu:g} on {size.world_size} x {gpu}: of {peak.flops_per_s / 1e12:g} TFLOPS each ({peak.sheet})"
    yield Fact("hours", hours, f"{hours:,.2f}", how)
    yield from _predicted(args, size, gpu, peak.flops_per_s)

    for phase in parts:
        if phase.written is not None:
            yield _of_phase(phase)


def _predicted(args: TrainArgs, size: Resolved, gpu: str, peak: float) -> Iterator[Fact]:
    if not is_known(args, gpu) or not isinstance(args.model, LlamaArgs):
        return
    parts = step_parts(args.model, args.distributed, size)
    step_s = sum(parts.values())
    mfu = size.tokens_per_step * size.flops_per_token / (step_s * peak * size.world_size)
    shares = ", ".join(f"{name} {seconds / step_s:.0%}" for name, seconds in parts.items())
    yield Fact("predicted_step_s", step_s, f"{step_s:.3g} s", f"on {gpu}, without what ranks send each other: {shares}")
    yield Fact("predicted_mfu", mfu, f"{mfu:.0%}", "upper bound, not measured: see lingua/train/step_time.py")
    if args.checkpoint.async_save_mode is not None:
        copy_s, wait_s = staging_s(size.checkpoint_bytes, size.world_size, parts)
        how = f"for which the update after a save waits; a copy at {RATES.to_host / 1e9:g} GB/s takes {copy_s:.2g} s"
        yield Fact("predicted_staging_wait_s", wait_s, f"{wait_s:.2g} s", f"{how} and begins with the step")


def facts_of_kills(
    args: TrainArgs, size: Resolved, hours: float, kill_every: str, disk_gb_per_s: float
) -> Iterator[Fact]:
    """Yield the cost of kills as configured, and the period of saves that loses least. `hours`: of the whole run."""
    number, unit = kill_every[:-1], kill_every[-1:]
    if not re.fullmatch(r"\d*\.?\d+", number) or unit not in _UNITS_S or not float(number):
        raise ConfigError(f"command line: --kill-every {kill_every} is no duration; write 90s, 30m, 2h or 1d")
    if disk_gb_per_s <= 0:
        raise ConfigError(f"command line: --disk-gb-per-s {disk_gb_per_s:g} is no rate; write one above 0")
    step_s = hours * 3600 / max(1, size.n_steps - begins_with(args)[0])
    asynchronous = args.checkpoint.async_save_mode is not None
    run = goodput.Setting(size.checkpoint_bytes, step_s, size.world_size, disk_gb_per_s * 1e9, asynchronous)
    every = args.checkpoint.dump.every
    now, best, then = goodput.advice(run, every, float(number) * _UNITS_S[unit])
    lost = 1.0 if now is None else 1 - now.kept
    how = f"of the time, at one kill per {kill_every} with checkpoint.dump.every {every}"
    yield Fact("lost_to_kills", lost, f"{lost:.1%}", f"{how}: {_spent(now)}" if now else f"{how}: nothing is kept")
    best = min(best, size.n_steps)
    assumed = f"{step_s:.2g} s per step, disk {disk_gb_per_s:g} GB/s, {goodput.START_UP_S:g} s to start, nodes lost"
    how = f"steps, the checkpoint.dump.every that loses least, {1 - then.kept:.1%}"
    yield Fact("best_dump_every", best, f"{best:,}", f"{how}: {_spent(then)}; with {assumed}")


def _spent(seen: goodput.Outlook) -> str:
    return f"saves {seen.saving:.1%} + repeated steps {seen.repeated:.1%} + restarts {seen.restarting:.1%}"


def _of_phase(phase: Phase) -> Fact:
    """Return the steps, rows, learning rates and sources of a phase."""
    size, rates = phase.size, [phase.lr_at(step) for step in (phase.first, phase.last - 1)]
    sources = ", ".join(f"{s.name} {s.weight:g}" for s in phase.args.data.read_sources() if s.weight)
    what = f"{size.rows_per_step} rows of {size.seq_len}, optim.lr {rates[0]:.3g} to {rates[1]:.3g}, {sources}"
    steps = f"{phase.first + 1:,}-{phase.last:,}"
    return Fact(f"phase_{phase.name}", phase.last, steps, what.removesuffix(", "))


def _save_cost(args: TrainArgs, state: int) -> str:
    """Describe what training waits for at each save, for an example disk of 1 GB/s."""
    drain = f"{state / 1e9:.2g} s at 1 GB/s"
    if args.checkpoint.async_save_mode is None:
        return f"training waits until each is on the disk ({drain}); checkpoint.async_save_mode=shm writes meanwhile"
    room = human_bytes(args.checkpoint.slots * (1 + args.checkpoint.replicate) * state)
    return f"training goes on while each is written ({drain}), from {room} of the nodes' /dev/shm"


def _layout(size: Resolved) -> str:
    return f"dp_replicate {size.dp_replicate} * dp_shard {size.dp_shard} * tp_size {size.tp_size}"


def _memory(args: TrainArgs, size: Resolved, gpu_gib: int, gpu: str) -> Fact:
    """Estimate the bytes on one GPU: states, activations of a micro step, and the largest chunk of logits."""
    states = (4 * size.n_params + size.checkpoint_bytes) / (size.dp_shard * size.tp_size)
    parts = {"parameters, gradients, optimizer": states}
    if args.distributed.fsdp_type == "full_shard":
        whole = size.n_params / size.tp_size
        if args.distributed.keep_gathered:
            parts["gathered parameters"] = whole * (4 if args.distributed.model_dtype == "fp32" else 2)
        if size.grad_acc_steps > 1 and not args.distributed.accumulate_sharded:
            parts["accumulated gradients"] = whole * 4
    if isinstance(args.model, LlamaArgs):
        parts["activations"] = _activation_bytes(args.model, args.distributed, size)
    positions = size.batch_size * size.seq_len
    chunk = min(positions, getattr(args.loss, "chunk_tokens", 0) or positions)
    parts["logits"] = 8 * chunk * size.vocab_size / size.tp_size  # fp32 values and gradients
    total = sum(parts.values())
    shares = " + ".join(f"{what} {human_bytes(n)}" for what, n in parts.items())
    return Fact("memory_bytes", total, human_bytes(total), f"roughly, of {gpu_gib} GiB of a {gpu}: {shares}")


def _activation_bytes(model: LlamaArgs, layout: DistributedArgs, size: Resolved) -> float:
    """Return the bytes that a micro step keeps for backward; attention scores are never stored.

    Per position and layer: six vectors of width D (inputs and outputs of two norms, queries, attention output), keys
    and values, four of the feed-forward width (both products, the gate's output, their product). Tensor-parallel ranks
    share all of them but the outputs of the norms, which are kept gathered.
    """
    width = 2 if layout.model_dtype != "fp32" else 4
    shared = 4 * model.dim + 2 * model.kv_heads * model.head_width + 4 * model.ffn_width
    whole = width * (2 * model.dim + shared / size.tp_size)
    positions = size.batch_size * size.seq_len
    if layout.full_activation_checkpointing:  # every block's input, and one block in full
        return positions * (width * model.dim * model.n_layers / size.tp_size + whole)
    share = 0.5 if layout.selective_activation_checkpointing else 1.0
    if layout.activation_memory_budget is not None:
        share = layout.activation_memory_budget
    return positions * whole * model.n_layers * share


# -- printing ------------------------------------------------------------------------------------------------------


def _print(checked: Checked, figures: list[Fact], everything: bool) -> None:
    tree, origins = public_tree(checked.args.model_dump(mode="json")), checked.composed.origins()
    if everything:
        print("\n".join([*annotated(tree, origins), ""]))
        rows = [(fact.name.replace("_", " "), fact.shown, fact.how) for fact in figures]
    else:
        chosen = [fact for fact in figures if fact.name in _MAIN_FACTS or fact.name.startswith("phase_")]
        rows = [(fact.name.replace("_", " "), fact.shown, fact.how.partition(":")[0]) for fact in chosen]
    show_table(("", "value", "how"), rows, right=("value",))
    if not everything:
        print("\nWhat is set (--all: every key and its origin, every figure and its formula)")
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
        for section, keys in stated(tree, origins).items():
            line = f"{section + ': ' if section else ''}{' '.join(keys)}"
            print(textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False))
    for difference in checked.differences:
        print(f"since the first attempt: {difference}")
    for warning in checked.warnings:
        print(f"warning: {warning}")


def stated(tree: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, list[str]]:
    """Return `key=value` of every key that is set, by section; "" holds the run's own keys."""
    found: dict[str, list[str]] = {}
    chosen = [leaf for leaf, where in origins.items() if where != str(DEFAULT)]

    def look(branch: Mapping[str, Any], prefix: str) -> None:
        for name, value in branch.items():
            key = prefix + name
            if isinstance(value, dict) and value:
                look(value, key + ".")
            elif any(leaf == key or leaf.startswith(f"{key}.") for leaf in chosen):
                section, _, rest = key.partition(".")
                shown = value if isinstance(value, str) else orjson.dumps(value).decode()
                found.setdefault(section if rest else "", []).append(f"{rest or section}={shown}")

    look(tree, "")
    return found


def annotated(tree: Mapping[str, Any], origins: Mapping[str, str], prefix: str = "", indent: str = "") -> list[str]:
    """Return the config as YAML, each value with its origin."""
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", *annotated(value, origins, f"{prefix}{name}.", indent + "  ")]
            continue
        text = dump_yaml({name: value}).rstrip("\n").replace("\n", "\n" + indent)
        key = prefix + name
        inside = [origin for leaf, origin in origins.items() if leaf == key or leaf.startswith(f"{key}.")]
        first, newline, rest = text.partition("\n")
        lines.append(f"{indent}{first}{f'  # {inside[0]}' if inside else ''}{newline}{rest}")
    return lines
