"""Multi-token prediction (arXiv 2404.19737): several heads on one decoder. Parameter names are Meta Lingua's.

Letters: B rows, S positions, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lingua.model.decoder import Decoder, Head, T, UseOfHead
from lingua.model.loss import Loss

from .args import MTPArgs


class MTP(Decoder):
    """tok_embeddings, layers, norm, heads. Generation, validation and evaluation use head 0."""

    def __init__(self, args: MTPArgs) -> None:
        super().__init__(args)
        self.heads = nn.ModuleList(Head(args.dim, args.vocab_rows, bias=False) for _ in range(args.n_future_head))

    def build_output(self) -> None:
        """Build nothing: `heads` take its place."""

    def head(self, x: Tensor, use: UseOfHead[T]) -> T:
        return self.heads[0](x, use)

    def loss_of(self, x: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Return the loss sum of each head, (heads,), for labels (heads, B, S); only head 0's for labels (B, S)."""
        if labels.ndim == 2:
            return super().loss_of(x, labels, loss)
        losses = [head(x, self.loss_with(own, loss)) for head, own in zip(self.heads, labels, strict=True)]
        return torch.stack([loss_sum for loss_sum, _ in losses]), losses[0][1]
