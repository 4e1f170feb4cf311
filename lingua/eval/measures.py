"""What is measured of a model, by all ranks together: held-out text, and the tasks of the harness.

Promise: what is missing is told before a model is loaded; the same numbers on any number of ranks; a failure of one
rank is heard by all.
Cost: each rank holds the whole model once, and scores its share.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lingua.config.base import ConfigError
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.eval import EvalArgs
from lingua.config.keys.train import TrainArgs
from lingua.data.held_out import HeldOutText, held_out_texts
from lingua.distributed.parallelize import DTYPES
from lingua.distributed.process_group import (
    World,
    find_place,
    from_main,
    on_every_rank,
    pick_device,
    set_environment,
    start_world,
)
from lingua.distributed.same_config import code_of
from lingua.eval.evaluator import Beat
from lingua.eval.harness import make_lm, run_tasks
from lingua.eval.harness_tasks import be_offline, load_tasks
from lingua.eval.scorer import Loss, Scorer, Wording, score_documents
from lingua.logger import start_logging
from lingua.model.generate import Generator
from lingua.slurm import this_allocation
from lingua.tokenizer import Tokenizer
from lingua.train.load_model import load_model

T = TypeVar("T")
log = logging.getLogger(__name__)


class Measures:
    """What is measured of each checkpoint; all ranks take part."""

    def __init__(self, run_args: TrainArgs, args: EvalArgs, world: World) -> None:
        """Raises ConfigError for what is missing, before anything is loaded."""
        self.run_args, self.args, self.world = run_args, args, world
        self.texts = held_out_texts(run_args.data, args.validation) if args.validation is not None else []
        self.harness = args.harness if args.harness is not None and args.harness.tasks else None
        if self.harness is not None:
            load_tasks(self.harness)
        if not self.texts and self.harness is None:
            raise ConfigError("eval: nothing is measured; set eval.validation or eval.harness.tasks")

    def measure(self, ckpt: str | Path, beat: Beat) -> dict[str, Any]:
        """Metrics of a checkpoint. Collective; a failure of one rank is heard by all."""
        device, dtype = self.world.device, self.args.generator.dtype
        model, tokenizer, loaded = on_every_rank(lambda: load_model(self.run_args, ckpt, device, DTYPES[dtype]))
        log.info("%s, on %s in %s", loaded, device, dtype)
        return self.measure_model(model, tokenizer, beat)

    def measure_model(self, model: nn.Module, tokenizer: Tokenizer, beat: Beat) -> dict[str, Any]:
        """Metrics of a model that each rank holds whole. Collective; a failure of one rank is heard by all."""
        generator = self.args.generator
        scorer = Scorer(model, generator.max_tokens, beat)
        data = self.run_args.data
        wording = Wording(tokenizer, data.add_bos, data.add_eos)
        found: dict[str, Any] = self._held_out(scorer, wording)
        if self.harness is not None:
            lm = make_lm(scorer, Generator(model, tokenizer, generator, add_bos=data.add_bos), wording)
            found |= run_tasks(lm, self.harness, self.args.core_metrics)
        return found

    def _held_out(self, scorer: Scorer, wording: Wording) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for text in self.texts:
            loss = self._share_of(text, scorer, wording)
            metrics |= loss.metrics(f"validation/{text.name}")
        return metrics

    def _share_of(self, text: HeldOutText, scorer: Scorer, wording: Wording) -> Loss:
        """The loss over all ranks, of which each scores its share of the documents."""
        args, world = self.args.validation, self.world
        assert args is not None
        loss = on_every_rank(
            lambda: score_documents(
                scorer,
                text.file,
                wording,
                text_key=text.text_key,
                max_documents=args.max_steps,
                stride=args.stride,
                share=(world.place.rank, world.place.world_size),
            )
        )
        if not dist.is_initialized():
            return loss
        sums = torch.tensor([loss.nats, loss.n_tokens, loss.n_bytes, loss.n_documents], dtype=torch.float64)
        dist.all_reduce(sums)
        nats, *counts = sums.tolist()
        return Loss(nats, *map(int, counts))


@contextmanager
def started(run_args: TrainArgs, args: EvalArgs, app: str) -> Iterator[Measures]:
    """Join the other ranks of this command, and be ready to measure."""
    place = find_place()
    start_logging(place.rank, own_packages=("lingua", "apps", app))
    if this_allocation(os.environ) is not None:  # a compute node would wait in vain for what is not in the cache
        be_offline()
    device = pick_device(args.generator.device, place)
    set_environment(run_args.env, place, on_gpu=device.type == "cuda")
    timeout_s = int(3600 * args.timeout_hours) + 600  # ranks may wait for the slowest one's share
    same = {**run_args.model_dump(mode="json"), "eval": args.model_dump(mode="json")}
    same |= code_of(["lingua", run_args.app, *run_args.plugins])
    with start_world(DistributedArgs(timeout_s=timeout_s), place, device, same) as world:
        yield on_every_rank(lambda: Measures(run_args, args, world))


class Together:
    """Lets all ranks measure what rank 0 chooses, any number of times."""

    def __init__(self, measure: Callable[[str, Beat], dict[str, Any]]) -> None:
        """`measure`: collective; either all ranks return or all raise."""
        self._measure = measure

    def measure(self, source: str, beat: Beat) -> dict[str, Any]:
        """Measure `source` on all ranks. On rank 0 alone, within `led_by_main`."""
        return self._measure(from_main(lambda: source), beat)

    def keep_waiting(self) -> None:
        """Give the waiting ranks a sign of life. On rank 0 alone, within `led_by_main`."""
        from_main(lambda: "")

    def led_by_main(self, act: Callable[[], T], beat: Beat = lambda: None) -> T | None:
        """Call `act` on rank 0 and return its result there; the others measure what it does. Collective."""
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
