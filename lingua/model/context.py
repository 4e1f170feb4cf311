"""What the blocks of one forward pass share, and what a model remembers between passes while it generates.

Letters: B rows, S positions, T cached positions, K key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lingua.model.attention import Mask


@dataclass(eq=False)
class Cache:
    """What each layer remembers of the positions seen so far; slot t of a row of attention holds its position t.

    Rows may differ in length and are padded on the right. What padding leaves in a slot of attention is never seen,
    since a query at position p sees slots up to p only, and the token of position p overwrites slot p before. A
    recurrent block passes over padding (`ForwardContext.real`).
    """

    n_slots: int
    end: int = 0
    """Slots in use: every query of the next pass has a position below it. The caller sets it."""
    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """Tensors (B, ...) by layer, made by its first pass: keys and values (B, n_slots, K, E) in the type it computes in,
    or the state of a recurrent block."""

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, S, K, E) at positions (B, S); returns all that is in use, (B, end, K, E) each."""
        if layer not in self.layers:
            shape = (len(k), self.n_slots, *k.shape[2:])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self.layers[layer]
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        keys[rows, positions], values[rows, positions] = k, v
        return keys[:, : self.end], values[:, : self.end]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, in this order."""
        self.layers = {layer: tuple(each[rows] for each in kept) for layer, kept in self.layers.items()}


@dataclass(eq=False)
class ForwardContext:
    """What all blocks of one forward pass share.

    One object and not loose tensors: FSDP2 casts tensor arguments of a block to bf16, and angles must stay fp32.
    """

    angles: tuple[Tensor, Tensor] | None = None  # cosines and sines, fp32 (S, E/2) or (B, S, E/2), with attention
    impl: str = "sdpa"
    causal: bool = True
    window: int | None = None
    mask: Mask = None
    starts: Tensor | None = None  # (B, S) bool, with documents: one begins here; True at position 0
    cache: Cache | None = None
    positions: Tensor | None = None  # (B, S), with a cache
    real: Tensor | None = None  # (B, S) bool, with a cache and padding: False where a row is padded

    def state(self, layer: int) -> tuple[Tensor, ...] | None:
        """Return what a recurrent layer kept after the pass before, or None at the begin of a row."""
        return None if self.cache is None else self.cache.layers.get(layer)

    def keep(self, layer: int, *state: Tensor) -> None:
        """Keep the state (B, ...) of a recurrent layer for the next pass, if there will be one."""
        if self.cache is not None:
            self.cache.layers[layer] = state
