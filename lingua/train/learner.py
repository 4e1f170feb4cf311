"""Take training steps: forward and backward of the micro batches, then one update with the gradient of all ranks.

The loss of a step is the mean over its labels, on all ranks and in all micro steps. Until these are counted, the loss
of a micro step is its sum divided by the positions of the step; the update divides the gradient by the share of
positions that have a label, together with the clip. So the count costs one all-reduce of one number per step, during
backward. If all positions have labels, every number is the same as without the count.

Letters: B rows, S positions, G rows of a step over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lingua.checkpoint.manager import CheckpointManager
from lingua.checkpoint.state import TrainState
from lingua.config.keys.train import TrainArgs
from lingua.data.blocked_source import Floor
from lingua.data.held_out import HeldOut
from lingua.data.loader import Batch, Loader
from lingua.distributed.compile import let_length_vary
from lingua.distributed.parallelize import begin_micro_step, forward_precision
from lingua.distributed.process_group import World
from lingua.model.attention import RowDocuments, document_bounds
from lingua.model.loss import Ask, Loss, Turn, next_tokens
from lingua.optim.spikes import limit_to_skip
from lingua.optim.update import Gradient, Updater
from lingua.profiling.probe import probe
from lingua.tokenizer import Tokenizer
from lingua.train.phases import number_of
from lingua.train.sizes import Phase, Resolved


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one micro step, on the device."""

    rows: np.ndarray
    """Row numbers."""
    tokens: Tensor  # (B, S)
    labels: Tensor  # (B, S), or (labels, B, S) for a model that predicts several
    documents: RowDocuments | None
    """None without data.doc_mask."""
    weights: Tensor | None = None  # (B, S): weight of each label in the loss

    def row(self, number: int) -> MicroBatch:
        """Return a micro batch of one row. Waits for the device."""
        one = slice(number, number + 1)
        return MicroBatch(
            self.rows[one],
            self.tokens[one],
            self.labels[..., one, :],
            None if self.documents is None else self.documents.row(number),
            None if self.weights is None else self.weights[one],
        )


class StepSums:
    """Sums over the micro steps of a step."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros((), device=device)
        """Sum of this rank's losses divided by the positions of its step; a vector if the model has several losses."""
        self.rows: list[int] = []
        """First and last row of each micro step."""
        self.n_micro_steps = 0
        self.last_batch: MicroBatch | None = None
        self._n_labels = torch.zeros((), dtype=torch.float64, device=device)
        self._counting: dist.Work | None = None

    @property
    def loss(self) -> Tensor:
        return self.losses.sum()

    def add(self, batch: MicroBatch, losses: Tensor, n_labels: Tensor) -> None:
        self.losses = self.losses + losses.detach()
        self._n_labels += n_labels
        self.rows += [int(batch.rows.min()), int(batch.rows.max())]
        self.n_micro_steps += 1
        self.last_batch = batch

    def start_counting(self) -> None:
        """Start summing the number of labels over all ranks. Collective."""
        if dist.is_initialized():
            self._counting = dist.all_reduce(self._n_labels, async_op=True)

    def n_labels(self) -> Tensor:
        """Return the number of labels, over all ranks once `start_counting` was called: fp64, at least 1."""
        if self._counting is not None:
            self._counting.wait()
            self._counting = None
        return self._n_labels.clamp(min=1)


@dataclass(frozen=True)
class StepDone:
    """A step after its update."""

    step: int
    lr: float
    rows: list[int]
    numbers: dict[str, Tensor]
    """Numbers to reduce over ranks. A name with a slash is a metric, whose mean over ranks is logged."""


@dataclass(kw_only=True)
class Learner:
    """Model, loss, optimizer, rows and state, and the methods that make a step."""

    phases: Sequence[Phase]
    phase: Phase
    """Phase of the next step; `lingua.train.build.enter` changes it."""
    world: World
    tokenizer: Tokenizer
    model: nn.Module
    loss: Loss
    updater: Updater
    loader: Loader
    state: TrainState
    """Everything that the next step depends on, as of the last snapshot; `shared` is always current."""
    resources: ExitStack
    """Closes the loader and local copies of the data."""

    def __post_init__(self) -> None:
        self.precision = forward_precision(self.model, self.args.distributed, self.world.device)
        self.begin_phase()

    @property
    def args(self) -> TrainArgs:
        return self.phase.args

    @property
    def size(self) -> Resolved:
        return self.phase.size

    def begin_phase(self) -> None:
        """Reset the sums for the sizes of the phase."""
        self.sums = StepSums(self.world.device)
        n_positions = self.world.rank_info.world_size * self.size.tokens_per_rank_step
        self._n_positions = torch.full((), n_positions, dtype=torch.float64, device=self.world.device)

    @property
    def step(self) -> int:
        """Number of optimizer steps done or skipped."""
        return self.shared["step"]

    @property
    def lr(self) -> float:
        """Learning rate of the next step. The schedule spans the phase, or the run from where the schedule began."""
        return self.phase.lr_at(self.step, self.shared.get("schedule_begin", 0))  # missing in older states

    @property
    def shared(self) -> dict[str, Any]:
        """State that is the same on all ranks and kept in checkpoints: step, tokens, tracking id."""
        return self.state.shared

    def tokens_left(self) -> int:
        """Return the number of tokens of the remaining steps."""
        now = self.phases[number_of(self.phases, self.step)]
        return self.phases[-1].tokens_at(self.size.n_steps) - now.tokens_at(self.step)

    # -- a step, in this order -------------------------------------------------------------------------------------

    def batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro batches, endlessly."""
        ask: Ask = getattr(self.loss, "ask", next_tokens)
        model = self.args.model.model_copy(update={"vocab_size": self.size.vocab_size})
        for batch in self.loader:
            turn = Turn(self.step, batch.rows, self.size.rows_per_step)
            question = ask(batch.views, model, turn)
            tokens, labels = (self._to_device(view).long() for view in (question.tokens, question.labels))
            weights = None if question.weights is None else self._to_device(question.weights)
            yield MicroBatch(batch.rows, tokens, labels, self._documents(batch), weights)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Return the sum of the batch's losses divided by the positions of a rank's step, and count its labels."""
        is_last = self.sums.n_micro_steps == self.size.grad_acc_steps - 1
        begin_micro_step(self.model, self.args.distributed, is_last=is_last)
        with self.precision:
            loss_sums, n_labels = self.losses_of(batch)
        losses = loss_sums / self.size.tokens_per_rank_step
        self.sums.add(batch, losses, n_labels)
        if is_last:
            self.sums.start_counting()
        return losses.sum()

    def losses_of(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return (sum of the weighted losses, a vector if there are several; number of labels)."""
        loss: Any = self.loss
        if batch.weights is not None:
            loss = partial(loss, weights=batch.weights)
        return self.model(batch.tokens, labels=batch.labels, documents=batch.documents, loss=loss)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of what `forward` returned."""
        self.updater.backward(loss)

    def label_share(self) -> Tensor:
        """Return labels per position, over all ranks and micro steps of the step, as fp32 on the device."""
        return (self.sums.n_labels() / self._n_positions).float()

    def gradient(self) -> Gradient:
        """Measure the step's gradient over all ranks. Collective."""
        return self.updater.gradient(self.label_share())

    def update(self, gradient: Gradient) -> StepDone:
        """Update the parameters, unless the step went wrong, and begin a new step."""
        lr, sums, share = self.lr, self.sums, self.label_share()
        loss, several = sums.loss / share, sums.losses / share
        heads = {f"loss/head_{i}": each for i, each in enumerate(several.unbind())} if several.ndim else {}
        limit = limit_to_skip(self.shared, self.step + 1, self.args.optim.on_spike, self.phase.first)
        report = self.updater.step(lr, gradient, loss, step=self.step + 1, limit=limit)
        self.sums = StepSums(self.world.device)
        self.advance()
        return StepDone(self.step, lr, sums.rows, {"loss/out": loss, **heads, **report})

    def advance(self) -> None:
        """Count one more step."""
        self.shared["step"] += 1
        self.shared["total_tokens"] += self.size.tokens_per_step

    def snapshot(self) -> TrainState:
        """Return the state, with the data position after the last batch used. With fp16, waits for the device."""
        self.state.per_rank = {"data": self.loader.state_dict()}
        if self.updater.loss_scale is not None:
            self.shared["loss_scale"] = self.updater.loss_scale.state()
        return self.state

    def _documents(self, batch: Batch) -> RowDocuments | None:
        if batch.doc_ids is None:
            return None
        bounds = self._to_device(document_bounds(batch.doc_ids))
        if self.args.distributed.compile:
            let_length_vary(bounds)
        return RowDocuments(self._to_device(batch.doc_ids), bounds)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.world.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.world.device, non_blocking=True)
        return tensor


@dataclass(kw_only=True)
class Run(Learner):
    """A built run, ready for its next step."""

    run_dir: Path
    validation_loss: Loss
    manager: CheckpointManager
    held_out: list[HeldOut]
    floor: Floor | None = None
    """The least loss that any model can have on this data, if it is known. None on other ranks than rank 0."""

    def probe(self) -> dict[str, float]:
        """Return statistics of the model on the last micro batch, and of the step's gradients. Collective."""
        batch = self.sums.last_batch
        assert batch is not None, "a probe follows a forward pass"

        def forward() -> None:
            with self.precision:
                self.model(batch.tokens, labels=batch.labels, documents=batch.documents, loss=self.validation_loss)

        found = probe(self.model, self.world.device, forward, None if batch.documents is None else batch.documents.ids)
        scale = self.updater.scale(self.label_share()).item()
        return {key: value / scale if "/grad/" in key else value for key, value in found.items()}
