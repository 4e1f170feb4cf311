"""Compute held-out loss, in nats per token and bits per byte, in training and in evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lingua.config.base import named
from lingua.data.held_out import ScoredRow, equal_shares
from lingua.distributed.parallelize import forward_precision, reshard
from lingua.distributed.process_group import StepReduce
from lingua.run.watchdog import Watchdog
from lingua.train.learner import Run


@dataclass
class HeldOutLoss:
    """The summed loss of held-out text."""

    nats: float = 0.0
    n_tokens: int = 0
    n_bytes: int = 0
    """UTF-8 bytes of the text."""
    n_documents: int = 0
    n_skipped: int = 0
    """Lines without a document, and pieces of text on which the tokenizer failed."""
    variance: float = 0.0
    """Variance of `nats`, if they are an estimate."""
    n_samples: int = 0
    """Number of passes over rows that `nats` is estimated from. 0: it is exact."""

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return nats per token, perplexity, bits per byte and counts. Raises ValueError if there is no text."""
        if not self.n_bytes or not self.n_tokens:
            raise ValueError(f"{prefix}: there is no text to score")
        nll = self.nats / self.n_tokens
        found = {
            "nll": nll,
            "ppl": math.exp(min(nll, 700.0)),
            "bpb": self.nats / math.log(2) / self.n_bytes,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
            "n_documents": self.n_documents,
            "n_skipped": self.n_skipped,
        }
        if self.n_samples:
            found["bpb_stderr"] = math.sqrt(self.variance) / math.log(2) / self.n_bytes
            found["nll_stderr"] = math.sqrt(self.variance) / self.n_tokens
            found["n_samples"] = self.n_samples
        return {f"{prefix}/{name}": value for name, value in found.items()}


@torch.no_grad()
def sum_of_losses(
    model: nn.Module,
    loss: Any,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    device: torch.device,
    before_batch: Callable[[], None],
) -> torch.Tensor:
    """Return (nats, number of scored tokens) in fp64 of batches (tokens, labels)."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for tokens, labels in batches:
        before_batch()
        nats, n_tokens = model(
            torch.from_numpy(tokens).to(device), labels=torch.from_numpy(labels).to(device), loss=loss
        )
        total += torch.stack([nats.double(), torch.as_tensor(n_tokens, device=device).double()])
    return total


def next_token_loss(run: Run, rows: Sequence[ScoredRow], before_batch: Callable[[], None]) -> torch.Tensor:
    """Return (nats, scored tokens, variance 0, samples 0) of this rank's share of held-out rows, fp64. Collective."""
    world, data = run.world, run.args.data
    batches = equal_shares(rows, data.seq_len, world.dp_rank, world.dp_size, data.batch_size)
    total = sum_of_losses(run.model, run.validation_loss, batches, world.device, before_batch)
    return torch.cat([total, torch.zeros_like(total)])


class _AskedToStopError(Exception):
    """A rank was asked to stop; all ranks raise this before the same batch."""


def validate(run: Run, watchdog: Watchdog) -> dict[str, float] | None:
    """Score the packed held-out rows at the current step, or return None if a rank was asked to stop. Collective.

    Returns `{"<source>/nll": nats per token, "<source>/bpb": bits per byte, ..., "seconds": duration}`; losses do not
    depend on the number of ranks. Random states and the position in the training data do not change.
    """
    began_s = time.perf_counter()
    reduce: StepReduce[None] = StepReduce(run.world.device)

    def vote() -> None:
        before = reduce.submit(None, {"stop": float(watchdog.asked)})
        if before is not None and before[1]["stop"] > 0:
            raise _AskedToStopError

    run.model.eval()
    try:
        results = _measure(run, vote)
        return results and results | {"seconds": time.perf_counter() - began_s}
    except _AskedToStopError:
        return None
    finally:
        reshard(run.model)
        run.model.train()


def _measure(run: Run, vote: Callable[[], None]) -> dict[str, float]:
    world, loss_of = run.world, named(run.args.objective, "validation")
    results: dict[str, float] = {}
    for source in run.held_out:
        with torch.no_grad(), forward_precision(run.model, run.args.distributed, world.device):
            total: torch.Tensor = loss_of(run, source.rows, vote)
        if dist.is_initialized():
            if world.tp_rank:  # the ranks of a tensor-parallel group have scored the same rows
                total.zero_()
            dist.all_reduce(total)
        nats, n_tokens, variance, n_samples = total.tolist()
        whole = HeldOutLoss(nats, int(n_tokens), source.n_bytes, variance=variance, n_samples=int(n_samples))
        found, names = whole.metrics(source.name), ("nll", "bpb", "bpb_stderr", "n_samples")
        results |= {key: found[key] for name in names if (key := f"{source.name}/{name}") in found}
    return results
