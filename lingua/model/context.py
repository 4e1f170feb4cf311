"""State shared by the blocks of a forward pass, and the cache that generation keeps between passes.

Letters: B rows, S positions, T cached positions, K key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lingua.model.attention import Mask


@dataclass(eq=False)
class Cache:
    """The state of each layer after the positions so far; slot t of an attention row holds its position t.

    Rows may differ in length and are padded on the right. Padding in an attention slot is never seen, since a query at
    position p sees only slots up to p, and the token at position p overwrites slot p first. A recurrent block skips
    padding (`ForwardContext.real`).
    """

    n_slots: int
    end: int = 0
    """Slots in use: every query of the next pass has a lower position. Set by the caller."""
    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """Tensors (B, ...) by layer, created in its first pass: keys and values (B, n_slots, K, E) in the type of the
    computation, or the state of a recurrent block."""

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, S, K, E) at positions (B, S); return all slots in use, (B, end, K, E) each."""
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
    """State shared by all blocks of one forward pass.

    It is one object because FSDP2 casts tensor arguments of a block to bf16, and angles must stay fp32.
    """

    angles: tuple[Tensor, Tensor] | None = None  # cosines and sines, fp32 (S, E/2) or (B, S, E/2), with attention
    impl: str = "sdpa"
    causal: bool = True
    window: int | None = None
    mask: Mask = None
    starts: Tensor | None = None  # (B, S) bool, with documents: True where one begins, and at position 0
    cache: Cache | None = None
    positions: Tensor | None = None  # (B, S), with a cache
    real: Tensor | None = None  # (B, S) bool, with a cache and padding: False where a row is padded

    def state(self, layer: int) -> tuple[Tensor, ...] | None:
        """Return the state of a recurrent layer after the previous pass, or None at the start of a row."""
        return None if self.cache is None else self.cache.layers.get(layer)

    def keep(self, layer: int, *state: Tensor) -> None:
        """Keep the state (B, ...) of a recurrent layer for the next pass, if there is a cache."""
        if self.cache is not None:
            self.cache.layers[layer] = state
