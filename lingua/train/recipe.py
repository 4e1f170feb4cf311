"""`lingua recipe`: a complete config from a number of parameters, each value with the rule behind it. Torch-free.

All rules are here: `best_rate` and `best_batch` (Step Law), `WIDTH_PER_LAYER` for the shape. The law is a power law in
parameters and tokens, not µP: µP transfers a rate from one width to another, but needs a sweep first, changes initial
values and rates of single matrices, and says nothing about the batch or the length of the run.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from lingua.checkpoint.retention import kept_at_once
from lingua.config.base import ConfigError
from lingua.config.command_line import CommandLine, app_schema, choose_app
from lingua.config.compose import Composed, compose
from lingua.config.keys.launch import GPUS_PER_NODE
from lingua.config.keys.model import LlamaArgs
from lingua.config.keys.train import TrainArgs
from lingua.config.yaml_layers import COMMAND_LINE, Key
from lingua.console import show
from lingua.files import human_bytes
from lingua.masking import public_tree
from lingua.run.throughput import PEAKS, find_peak
from lingua.train.check import Checked, load
from lingua.train.check_report import Fact, annotated, facts
from lingua.train.sizes import Study, model_vocab_size

WIDTH_PER_LAYER = 96
LAW = "Step Law, arXiv 2503.04715"
_SHAPE = "about 96 of width per layer, GPT-3's 64 (125M) to 128 (6.7B), arXiv 2005.14165, table 2.1"
_CHINCHILLA = "20 tokens per parameter, Chinchilla, arXiv 2203.15556"
_FEWEST, _MOST = 19, 466
"""Range of tokens per parameter in which the law was measured, for 215M to 1.07B parameters without embeddings."""
_SMALLEST_BEST = 2.76e-3
"""The best rate of 215M with the fewest tokens: data/dense_lr_bs_loss.csv of github.com/step-law/steplaw."""
_FULL = 0.8
"""Share of a GPU's memory that the rough estimate may fill."""
_SAVE_S = 1800
_FREED = {
    **dict.fromkeys(("model.head_dim", "model.n_kv_heads", "model.hidden_dim", "grad_acc_steps", "epochs")),
    **dict.fromkeys(("total_flops", "distributed.dp_replicate", "distributed.dp_shard", "data.lanes")),
    "distributed.tp_size": 1,
    "distributed.selective_activation_checkpointing": False,
    "distributed.full_activation_checkpointing": False,
    "distributed.activation_memory_budget": None,
}
"""Keys that a config may set for another size, and their values here."""


class Choice(NamedTuple):
    """A value of the recipe and the rule behind it."""

    value: Any
    why: str


def best_rate(n_blocks: int, n_tokens: float) -> Choice:
    """Return AdamW's peak rate for `n_blocks` parameters without embeddings, trained on `n_tokens`.

    The rate is capped at the most tokens per parameter in which the law was measured, and for smaller models at the
    best rate of the smallest one measured.
    """
    law = 1.79 * n_blocks**-0.713 * min(n_tokens, _MOST * n_blocks) ** 0.307
    most = _SMALLEST_BEST * (min(max(n_tokens / n_blocks, _FEWEST), _MOST) / _FEWEST) ** 0.307
    why = f"1.79 N^-0.713 D^0.307, N {n_blocks:,} without embeddings, D {n_tokens:,.0f} tokens: {LAW}"
    return Choice(law, why) if law <= most else Choice(most, f"as 215M, {LAW}'s smallest model; the law says {law:.3g}")


def best_batch(n_tokens: float) -> float:
    """Return the tokens per step for a run of `n_tokens`."""
    return 0.58 * n_tokens**0.571


@dataclass(frozen=True)
class Machine:
    """The machine that the recipe is for."""

    n_ranks: int
    gpu: str | None
    """A name in the table of peaks, or None for this machine's CPU."""

    @property
    def n_nodes(self) -> int:
        return -(-self.n_ranks // GPUS_PER_NODE)

    @property
    def limit_bytes(self) -> float:
        """Bytes that parameters and activations may take on a rank."""
        if self.gpu is None:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        peak = find_peak(self.gpu)
        assert peak is not None
        return _FULL * peak.memory_gib * 2**30

    def layouts(self) -> Iterator[dict[str, Choice]]:
        """Yield layouts of the run, the fastest first."""
        recomputed = {"distributed.full_activation_checkpointing": Choice(True, "or activations do not fit")}
        for more in ({}, recomputed):
            yield {"distributed.fsdp_type": Choice("no_shard", "a copy fits each GPU"), **more}
            shards = {min(self.n_ranks, GPUS_PER_NODE), self.n_ranks} - {1}
            for n_shards in sorted(shards):
                sharded = Choice("full_shard", "a copy does not fit one GPU")
                where = "a copy per node" if n_shards < self.n_ranks else "one copy on all GPUs"
                both = {"distributed.fsdp_type": sharded, "distributed.dp_shard": Choice(n_shards, where), **more}
                yield both | ({"distributed.accumulate_sharded": Choice(True, "saves memory")} if more else {})


@dataclass(frozen=True)
class Recipe:
    """A config that passed the check of every start, with the reason for each value."""

    checked: Checked
    tree: dict[str, Any]
    """The keys that are set."""
    sources: dict[str, str]
    """By key: the rule, or another origin of the value."""
    figures: list[Fact]

    def record(self) -> dict[str, Any]:
        shown = {"facts": {f.name: f.value for f in self.figures}, "formulas": {f.name: f.how for f in self.figures}}
        return {"config": self.tree, "sources": self.sources, **shown, "warnings": self.checked.warnings}

    def lines(self) -> Iterator[str]:
        """Yield the config as YAML; figures and warnings are comments above it."""
        width = max(len(f.shown) for f in self.figures)
        for figure in self.figures:
            yield f"# {figure.name.replace('_', ' '):<24} {figure.shown:>{width}}  {figure.how}"
        yield from (f"# warning: {warning}" for warning in self.checked.warnings)
        if not self.checked.args.data.sources:
            yield "# data: the embedded corpus, bytes of Python's standard library; name a config that has yours"
        yield from annotated(self.tree, self.sources)


def report(line: CommandLine, params: str, tokens: str, gpus: str, mfu: float, as_json: bool) -> None:
    """Print a recipe. Raises ConfigError with what is wrong or does not fit."""
    found = recipe(line, params, tokens, gpus, mfu)
    show(found.record(), as_json, found.lines())


def recipe(line: CommandLine, params: str, tokens: str = "20x", gpus: str = "h200", mfu: float = 0.4) -> Recipe:
    """Return the recipe for a number of parameters; the command line takes precedence over the rules."""
    wanted, machine = amount("--params", params, most=1e12), machine_of(gpus)
    per_parameter = tokens.lower().endswith("x")
    many = amount("--tokens", tokens[:-1], 0.001) if per_parameter else amount("--tokens", tokens)
    own = compose(line.config, line.overlays, line.overrides, app_schema(choose_app(line)))
    if own.args.optim.type != "adamw":
        what = f"optim.type is {own.args.optim.type}, but the rules were measured with adamw"
        raise ConfigError(f"{what}; leave out optim.type and its keys")
    model = shaped(own, wanted)
    n_tokens = many * model.n_params() if per_parameter else many
    fitted = _fit(line, own, model, n_tokens, machine, mfu)
    if fitted is None:
        larger = (replace(machine, n_ranks=GPUS_PER_NODE * 2**i) for i in range(8) if machine.gpu)
        fits = (m.n_ranks for m in larger if m.n_ranks > machine.n_ranks and _fit(line, own, model, n_tokens, m, mfu))
        found = next(fits, None)
        remedy = f"use --gpus {found}x{machine.gpu}" if found else "ask for fewer parameters"
        where = f"{machine.n_ranks} x {machine.gpu}" if machine.gpu else "this machine's memory"
        raise ConfigError(f"command line: --params {params} does not fit {where}; {remedy}")
    fitted["name"] = Choice(f"recipe_{params}", "--params")
    fitted["steps"] = fitted["steps"]._replace(why=_CHINCHILLA if tokens == "20x" else f"--tokens {tokens}")
    return _written(line, own, fitted, machine, mfu)


def machine_of(gpus: str) -> Machine:
    """Read `8xH200`, `h100` or `cpu`. Raises ConfigError."""
    text = gpus.lower().strip()
    many = re.match(r"\d+(?=x)", text)
    n_ranks, name = int(many[0]) if many else 1, text[many.end() + 1 :] if many else text
    if name == "cpu" and n_ranks == 1:
        return Machine(1, None)
    if name not in PEAKS:
        known = ", ".join(PEAKS)
        raise ConfigError(f"command line: --gpus {gpus} names no GPU in the table; write 8xh200 or cpu; known: {known}")
    if n_ranks < 1 or (n_ranks > GPUS_PER_NODE and n_ranks % GPUS_PER_NODE):
        near = max(1, n_ranks // GPUS_PER_NODE * GPUS_PER_NODE)
        raise ConfigError(
            f"command line: --gpus {gpus} is no number of whole nodes of {GPUS_PER_NODE}; write {near}x{name}, say"
        )
    return Machine(n_ranks, name)


def amount(option: str, text: str, least: float = 1, most: float = 1e15, such: str = "300M, 1B or 2e9") -> float:
    """Read `300M`, `1.5B` or `2e9`."""
    found = re.fullmatch(r"(\d+\.?\d*(?:e\d{1,2})?)([kmbt]?)", text.lower().strip())
    number = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2]] if found else 0.0
    if not least <= number <= most:
        more = ", or 20x for so many per parameter" if option == "--tokens" else ""
        raise ConfigError(
            f"command line: {option} {text} is not a number from {least:g} to {most:g}; write {such}{more}"
        )
    return number


def _freed(own: Composed[TrainArgs]) -> dict[str, Any]:
    """Return the keys that a config sets for another size, with their values here; typed keys stay."""
    marks = {key: own.marks.get(tuple(key.split("."))) for key in _FREED}
    return {key: value for key, value in _FREED.items() if marks[key] not in (None, COMMAND_LINE)}


def shaped(own: Composed[TrainArgs], wanted: float) -> LlamaArgs:
    """Return the model whose number of parameters, embeddings included, is closest to `wanted`."""
    model = own.args.model
    if not isinstance(model, LlamaArgs) or model.type != "llama":
        raise ConfigError(f"model.type is {model.type}, but the rules were measured on llama; leave model.type out")
    freed = {key.removeprefix("model."): value for key, value in _freed(own).items() if key.startswith("model.")}
    freed["vocab_size"] = model_vocab_size(own.args, Study())

    found: list[tuple[float, float, LlamaArgs]] = []
    for dim in (*range(32, 384, 32), *range(384, 1024, 64), *range(1024, 1 << 15, 128)):
        head_dim = 32 if dim < 384 else 64 if dim < 1024 else 128
        one = model.model_copy(update={**freed, "dim": dim, "n_heads": dim // head_dim, "n_layers": 1})
        block, size = one.block_params(), one.n_params()
        n_layers = max(2, round((wanted - size) / block) + 1)
        off = abs(math.log((size + (n_layers - 1) * block) / wanted))
        thin = abs(math.log(dim / (WIDTH_PER_LAYER * n_layers)))
        found.append((off + 0.1 * thin, off, one.model_copy(update={"n_layers": n_layers})))
    _, off, best = min(found, key=lambda each: each[0])
    if off > math.log(1.25):
        raise ConfigError(
            f"command line: --params {wanted:,.0f} has no shape with a vocabulary of {best.vocab_size:,}; the nearest, "
            f"{best.n_layers} layers of width {best.dim}, has {best.n_params():,}"
        )
    return best


# -- the rest of the config ----------------------------------------------------------------------------------------


def _fit(
    line: CommandLine, own: Composed[TrainArgs], model: LlamaArgs, n_tokens: float, machine: Machine, mfu: float
) -> dict[str, Choice] | None:
    """Return all choices, with the fastest layout that fits, or None if none does."""
    batch, rate = best_batch(n_tokens), best_rate(model.n_params_non_embedding(), n_tokens)
    stated = own.args.data.seq_len if own.marks.get(("data", "seq_len")) == COMMAND_LINE else None
    seq_len = stated or min(2048, max(128, 2 ** int(math.log2(batch / 4))))
    n_rows = max(1, round(batch / (seq_len * machine.n_ranks)))
    choices = {
        **{key: Choice(value, "what another size needed is taken back") for key, value in _freed(own).items()},
        "data.seq_len": Choice(seq_len, "2048, or less for four rows per step"),
        "model.dim": Choice(model.dim, _SHAPE),
        "model.n_layers": Choice(model.n_layers, "as many as the parameters leave"),
        "model.n_heads": Choice(model.n_heads, f"heads of {model.dim // (model.n_heads or 1)}"),
        "optim.type": Choice("adamw", f"the optimizer of {LAW}"),
        "optim.lr": rate._replace(value=float(f"{rate.value:.3g}")),
        "optim.scheduler": Choice("cosine", LAW),
        "optim.lr_min_ratio": Choice(0.01, f"{LAW}, ends at 1e-5, a hundredth of the rate of 1B"),
        "distributed.model_dtype": Choice({None: "fp32", "v100": "fp16"}.get(machine.gpu, "bf16"), "the device's"),
        "checkpoint.dump.keep": Choice(2, "the newest, and one before it"),
    }
    if machine.gpu is None:
        choices["device"] = Choice("cpu", "--gpus")
    else:
        choices |= {
            "distributed.compile": Choice(True, "faster on GPUs"),
            "checkpoint.async_save_mode": Choice("shm", "training goes on while a checkpoint is written"),
            "launcher.nodes": Choice(machine.n_nodes, "--gpus"),
            "launcher.gpus": Choice(machine.n_ranks // machine.n_nodes, "--gpus"),
        }
    one = {"data.batch_size": Choice(1, ""), "global_batch_size": Choice(n_rows * machine.n_ranks, "")}
    typed = [word for word in line.overrides if word.partition("=")[0] not in one]  # these are judged in the end
    for layout in machine.layouts():
        checked = load(_typed(replace(line, overrides=typed), {**choices, **layout, **one}), machine.n_ranks)

        def needed(rows: int, checked: Checked = checked) -> float:
            size = replace(checked.resolved, batch_size=rows, grad_acc_steps=-(-n_rows // rows))
            figures = facts(checked.args, size, mfu, machine.gpu or "h200")
            return next(figure.value for figure in figures if figure.name == "memory_bytes")

        if most := bisect_right(range(1, n_rows + 1), machine.limit_bytes, key=needed):
            n_micro_steps = -(-n_rows // most)
            rows = -(-n_rows // n_micro_steps)
            step_rows = rows * n_micro_steps * machine.n_ranks
            per_step = step_rows * seq_len
            n_steps = max(1, int(n_tokens / per_step))
            warmup = int(min(model.n_params(), n_tokens / 20) / per_step)
            flops_per_s = mfu * peak.flops_per_s * machine.n_ranks if (peak := find_peak(machine.gpu or "")) else None
            save = _SAVE_S * flops_per_s / checked.resolved.flops_per_token / per_step if flops_per_s else n_steps / 10
            return {
                **choices,
                **layout,
                "data.batch_size": Choice(rows, "as many as fit"),
                "global_batch_size": Choice(
                    step_rows, f"{per_step:,} tokens: 0.58 D^0.571 = {batch:,.0f} tokens, {LAW}"
                ),
                "steps": Choice(n_steps, "D over the tokens of a step"),
                "optim.warmup": Choice(warmup, "as many tokens as parameters, arXiv 2406.19146; at most a 20th of D"),
                "checkpoint.dump.every": Choice(
                    min(n_steps, max(1, round(save))), "half an hour" if flops_per_s else "a tenth of the run"
                ),
            }
    return None


def _typed(line: CommandLine, choices: Mapping[str, Choice]) -> CommandLine:
    """Return a command line with the choices first, so that typed keys override them.

    The run folder is one that does not exist, so that an existing run of that name does not bind the recipe.
    """
    nowhere = f"dump_dir=out/.recipe-{os.getpid()}"
    chosen = [f"{key}={orjson.dumps(choice.value).decode()}" for key, choice in choices.items()]
    return replace(line, overrides=[nowhere, *chosen, *line.overrides])


def _written(
    line: CommandLine, own: Composed[TrainArgs], choices: Mapping[str, Choice], machine: Machine, mfu: float
) -> Recipe:
    """Check the whole config and collect the keys that are set, their sources and the figures."""
    checked = load(_typed(line, choices), machine.n_ranks)
    chosen = {tuple(key.split(".")): choice.why for key, choice in choices.items()}
    origins = {key: str(origin) for key, origin in own.marks.items()}
    typed = {key: text for key, text in origins.items() if own.marks[key] == COMMAND_LINE}
    sources = {**origins, **chosen, **typed}
    tree = public_tree(_set_part(checked.args.model_dump(mode="json"), set(sources)))
    figures = list(facts(checked.args, checked.resolved, mfu, machine.gpu or "h200"))
    at_once = kept_at_once(checked.args.checkpoint, checked.resolved.n_steps)
    disk = (at_once or 1) * checked.resolved.checkpoint_bytes
    how = f"{at_once} checkpoints, the one being written included" if at_once else "each checkpoint; all are kept"
    figures.insert(-3, Fact("disk_bytes", disk, human_bytes(disk), how))
    if machine.gpu is None:
        figures = [figure for figure in figures if figure.name not in ("memory_bytes", "hours")]
    return Recipe(checked, tree, {".".join(map(str, key)): text for key, text in sources.items()}, figures)


def _set_part(tree: Mapping[str, Any], keys: set[Key], path: Key = ()) -> dict[str, Any]:
    """Return the part of a config that these keys, or keys below them, name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = (*path, name)
        if isinstance(value, dict) and value:
            if inner := _set_part(value, keys, key):
                found[name] = inner
        elif any(mark[: len(key)] == key for mark in keys):
            found[name] = value
    return found
