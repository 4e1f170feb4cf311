"""Held-out loss inside training: nats per token and bits per byte of each source's `*.val.jsonl`.

Promise: the same number on any number of ranks (up to the order of a sum); neither the data order nor any random
state moves. A stop asked of any rank ends it on all after the same batch. Collective: all ranks take part.
Cost: one forward pass over `validation.max_rows` rows per source, shared among the ranks, and a vote per batch.
"""

from __future__ import annotations

import logging
import math
import time

import torch
import torch.distributed as dist

from lingua.distributed.parallelize import forward_precision, reshard
from lingua.distributed.process_group import StepReduce
from lingua.run.watchdog import Watchdog
from lingua.train.learner import Run

log = logging.getLogger(__name__)


def validate(run: Run, watchdog: Watchdog) -> dict[str, float] | None:
    """`{"<source>/nll": nats per token, "<source>/bpb": bits per byte, ..., "seconds": it took}` at the present step.

    None, on all ranks alike, when one of them was asked to stop; what was measured by then is thrown away.
    """
    began_s = time.perf_counter()
    run.model.eval()
    try:
        results = _measure(run, watchdog)
        return results and results | {"seconds": time.perf_counter() - began_s}
    finally:
        reshard(run.model)
        run.model.train()


@torch.no_grad()
def _measure(run: Run, watchdog: Watchdog) -> dict[str, float] | None:
    device, world = run.world.device, run.world
    precision = forward_precision(run.model, run.args.distributed, device)
    results: dict[str, float] = {}
    reduce: StepReduce[None] = StepReduce(device)
    for source in run.held_out:
        total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, scored tokens
        for tokens, labels in source.share(world.dp_rank, world.dp_size, run.args.data.batch_size):
            before = reduce.submit(None, {"stop": float(watchdog.asked)})
            if before is not None and before[1]["stop"] > 0:
                return None
            with precision:
                loss_sum, n_tokens = run.model(
                    torch.from_numpy(tokens).to(device).long(),
                    labels=torch.from_numpy(labels).to(device).long(),
                    loss=run.validation_loss,
                )
            total += torch.stack([loss_sum.double(), torch.as_tensor(n_tokens, device=device).double()])
        if dist.is_initialized():
            if world.tp_rank:  # a tensor-parallel group has scored the same rows: they count once
                total.zero_()
            dist.all_reduce(total)
        nats, n_tokens = total.tolist()
        results[f"{source.name}/nll"] = nats / n_tokens
        results[f"{source.name}/bpb"] = nats / math.log(2) / source.n_bytes
    return results
