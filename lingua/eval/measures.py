"""Measure a model on all ranks together. `@register("measure", ...)` adds your own measure.

Missing data is reported before a model is loaded. The numbers are the same on any number of ranks, and an error on one
rank is raised on all. Each rank holds the whole model and does its share of the work.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lingua.checkpoint.lookup import EMA_SUFFIX, without_ema
from lingua.config.base import ConfigError, build_part, named
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.eval import EvalArgs, HeldOutArgs
from lingua.config.keys.model import CrossEntropyArgs, LossArgs
from lingua.config.keys.train import TrainArgs
from lingua.data.held_out import HeldOut, HeldOutText, Wording, by_document, held_out_texts, packed
from lingua.distributed.meeting import told_to_others
from lingua.distributed.place import find_rank_info
from lingua.distributed.process_group import World, from_main, on_every_rank, pick_device, set_environment, start_world
from lingua.distributed.same_config import code_of
from lingua.eval.evaluator import Beat
from lingua.eval.harness_tasks import be_offline
from lingua.eval.scorer import Scorer
from lingua.logger import start_logging
from lingua.model.generate import Generator
from lingua.scheduler import this_allocation
from lingua.tokenizer import Tokenizer
from lingua.train.describe import step_of
from lingua.train.load_model import chosen_dtype, load_model, stored_dtype
from lingua.train.validate import HeldOutLoss

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredModel:
    """A model to measure, whole on each rank, with all that a measure needs."""

    model: nn.Module
    tokenizer: Tokenizer
    generator: Generator
    """Answers prompts as the section `eval.generator` says."""
    wording: Wording
    """How documents become tokens."""
    world: World
    beat: Beat
    """Call it before each batch: it raises if the evaluation must end."""
    objective: LossArgs = field(default_factory=CrossEntropyArgs)
    """Training objective of the model."""

    @property
    def scorer(self) -> Scorer:
        """Scores rows of text."""
        return named(self.objective, "scorer")(self.model, self.max_tokens, self.beat, self.objective)

    @property
    def max_tokens(self) -> int:
        """Maximum tokens in a batch, including padding."""
        return self.generator.args.max_tokens


Measure = Callable[[MeasuredModel], Mapping[str, Any]]
"""Returns metrics by name, and more to keep under "details" and "samples". Called on all ranks at once; rank 0's result
counts."""


class Measures:
    """The measures of each checkpoint, on all ranks."""

    def __init__(
        self, run_args: TrainArgs, args: EvalArgs, world: World, phases: Sequence[tuple[int, EvalArgs]] = ()
    ) -> None:
        """Build the measures. Raises ConfigError if anything is missing, before a model is loaded.

        `phases`: (last step, section `eval`) of each phase; if empty, `args` holds for all checkpoints.
        """
        self.run_args, self.args, self.world = run_args, args, world
        sections = {each.model_dump_json(): each for _, each in phases or [(0, args)]}
        built = {
            key: [build_part(chosen, run_args, each) for chosen in each.chosen()] for key, each in sections.items()
        }
        self._measures: list[tuple[int, list[Measure]]] = [
            (last, built[each.model_dump_json()]) for last, each in phases or [(0, args)]
        ]
        if not all(built.values()):
            raise ConfigError("eval: nothing is measured; set eval.validation, eval.harness.tasks or eval.measures")

    def measure(self, ckpt: str | Path, beat: Beat) -> dict[str, Any]:
        """Return the metrics of a checkpoint. Collective; an error on one rank is raised on all."""
        device, step = self.world.device, step_of(ckpt)
        if self.args.ema and step is not None:
            ckpt = f"{without_ema(ckpt)[0]}{EMA_SUFFIX}"

        def load() -> tuple[nn.Module, Tokenizer, str]:
            dtype = chosen_dtype(self.args.generator.dtype, device, lambda: stored_dtype(ckpt))
            return load_model(self.run_args, ckpt, device, dtype)

        model, tokenizer, loaded = on_every_rank(load)
        log.info("%s, on %s in %s", loaded, device, next(model.parameters()).dtype)
        return self.measure_model(model, tokenizer, beat, step)

    def measure_model(
        self, model: nn.Module, tokenizer: Tokenizer, beat: Beat, step: int | None = None
    ) -> dict[str, Any]:
        """Return the metrics of a model that each rank holds whole. Collective, like `measure`.

        `step`: that of its checkpoint; if unknown, the measures of the last phase apply.
        """
        data = self.run_args.data
        objective = self.run_args.objective
        generator = named(objective, "generator")(model, tokenizer, self.args.generator, add_bos=data.add_bos)
        wording = Wording(tokenizer, data.add_bos, data.add_eos)
        measured = MeasuredModel(model, tokenizer, generator, wording, self.world, beat, objective)
        found: dict[str, Any] = {}
        in_phase = (measures for last, measures in self._measures if step is not None and step <= last)
        for measure in next(in_phase, self._measures[-1][1]):
            more = on_every_rank(lambda measure=measure: dict(measure(measured)))
            for name in ("details", "samples"):
                if name in more:
                    more[name] = {**found.pop(name, {}), **more[name]}
            if twice := found.keys() & more.keys():
                raise ConfigError(f"eval: two measures give {min(twice)}; remove one, or rename what it measures")
            found |= more
        return found


# -- held-out text -------------------------------------------------------------------------------------------------


def build_held_out(args: HeldOutArgs, run_args: TrainArgs, eval_args: EvalArgs) -> Measure:
    """Return the measure of the loss on held-out texts. Raises ConfigError if one is missing."""
    texts = held_out_texts(run_args.data, args)

    def measure(measured: MeasuredModel) -> dict[str, float]:
        prefix = "documents" if args.context == "document" else "validation"
        found: dict[str, float] = {}
        for text in texts:
            found |= _loss_of(text, args, run_args, measured).metrics(f"{prefix}/{text.name}")
        return found

    return measure


def _loss_of(text: HeldOutText, args: HeldOutArgs, run_args: TrainArgs, measured: MeasuredModel) -> HeldOutLoss:
    """Return the loss summed over all ranks, each of which scores its share."""
    rank, n_ranks = measured.world.rank_info.rank, measured.world.rank_info.world_size
    scorer = measured.scorer

    def parts() -> Iterator[HeldOut]:
        if args.context == "document":
            more = {"stride": args.stride, "max_documents": args.max_steps, "share": (rank, n_ranks)}
            yield from by_document(text, measured.wording, context=scorer.context, **more)
        else:
            whole = packed(text, measured.wording, **run_args.held_out_sizes())
            counts = (whole.n_bytes, whole.n_documents, whole.n_skipped) if rank == 0 else ()
            yield HeldOut(whole.name, whole.rows[rank::n_ranks], *counts)

    def score() -> torch.Tensor:
        sums = torch.zeros(7, dtype=torch.float64)
        for part in parts():
            sums[:4] += scorer.total(part.rows)
            sums[4:] += torch.tensor([part.n_bytes, part.n_documents, part.n_skipped], dtype=torch.float64)
        return sums

    was_training = measured.model.training
    measured.model.eval()
    try:
        sums = on_every_rank(score)
    finally:
        measured.model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    nats, n_tokens, variance, n_samples, *counts = sums.tolist()
    return HeldOutLoss(nats, int(n_tokens), *map(int, counts), variance=variance, n_samples=int(n_samples))


# -- ranks ---------------------------------------------------------------------------------------------------------


@contextmanager
def started(
    run_args: TrainArgs, args: EvalArgs, app: str, phases: Sequence[tuple[int, EvalArgs]] = ()
) -> Iterator[Measures]:
    """Join the other ranks of this command and yield its measures."""
    rank_info = find_rank_info()
    start_logging(rank_info.rank, own_packages=("lingua", "apps", app))
    if this_allocation(os.environ) is not None:  # a compute node would wait in vain for what is not in the cache
        be_offline()
    with told_to_others(rank_info):
        device = pick_device(args.generator.device, rank_info)
        set_environment(run_args.env, rank_info, device.type == "cuda", run_args.launcher.env.unset)
    timeout_s = int(3600 * args.timeout_hours) + 600  # ranks may wait for the slowest one
    same = {**run_args.model_dump(mode="json"), "eval": args.model_dump(mode="json")}
    same |= code_of(["lingua", run_args.app, *run_args.plugins, *args.plugins])
    with start_world(DistributedArgs(timeout_s=timeout_s), rank_info, device, same) as world:
        yield on_every_rank(lambda: Measures(run_args, args, world, phases))


class Together:
    """Measures on all ranks what rank 0 chooses, any number of times."""

    def __init__(self, measure: Callable[[str, Beat], dict[str, Any]]) -> None:
        """`measure` is collective: either all ranks return or all raise."""
        self._measure = measure

    def measure(self, source: str, beat: Beat) -> dict[str, Any]:
        """Measure `source` on all ranks. Only for rank 0, within `led_by_main`."""
        return self._measure(from_main(lambda: source), beat)

    def keep_waiting(self) -> None:
        """Keep the waiting ranks from timing out. Only for rank 0, within `led_by_main`."""
        from_main(lambda: "")

    def led_by_main(self, act: Callable[[], T], beat: Beat = lambda: None) -> T | None:
        """Call `act` on rank 0 and return its result there; the others join its measurements. Collective."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                return act()
            finally:
                from_main(_nothing)
        while (source := from_main(_nothing)) is not None:
            if source:
                try:
                    self._measure(source, beat)
                except Exception as error:  # rank 0 has seen it too, and records it
                    log.warning("leaving this evaluation: %s", error)
        return None


def _nothing() -> str | None:
    return None
