"""The app's language model: a Llama-type decoder from the blocks of lingua/model/transformer.py. Change it freely.

It is built on the meta device, then `to_empty`, then `init_weights(seed)`; the values are the same in any layout. With
weight tying there is one parameter with one name, so nothing can untie it. With a loss, logits exist a chunk at a time.

Letters: B rows, S positions, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lingua.distributed.tensor_parallel import full_tensor, logits
from lingua.model.attention import RowDocuments, build_mask
from lingua.model.loss import Loss
from lingua.model.transformer import (
    ForwardContext,
    KVCache,
    RotaryEmbedding,
    TransformerBlock,
    build_norm,
    cached_mask,
    init_modules,
)

from .args import LMTransformerArgs


class LMTransformer(nn.Module):
    """tok_embeddings, layers, norm, output."""

    def __init__(self, args: LMTransformerArgs) -> None:
        super().__init__()
        if args.vocab_size < 1:
            raise ValueError(f"model.vocab_size is {args.vocab_size}; set it to the tokenizer's number of tokens")
        self.args = args
        # sdpa runs everywhere. A trainer resolves `auto` for its machine before it builds the model.
        self.attn_impl = "sdpa" if args.attn_impl == "auto" else args.attn_impl
        self.tok_embeddings = nn.Embedding(args.vocab_rows, args.dim)
        self.rope_embeddings = RotaryEmbedding(args)
        self.layers = nn.ModuleList(TransformerBlock(args, layer) for layer in range(args.n_layers))
        self.norm = build_norm(args, args.dim)
        self.output = None if args.weight_tying else nn.Linear(args.dim, args.vocab_rows, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """(V, D), V padded: the head's own, or the embedding's."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def forward(
        self,
        tokens: Tensor,  # (B, S) int
        *,
        labels: Tensor | None = None,  # (B, S) int, -100 where nothing is asked
        documents: RowDocuments | None = None,
        loss: Loss | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,  # (B, S) int, with a cache
        select: Tensor | None = None,  # (B,) int: the one position of each row whose logits are wanted
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, S, V), or (B, 1, V) with `select`; with labels and a loss: (fp32 loss sum, number of labels)."""
        ctx = self._forward_context(tokens, documents, cache, positions)
        x = self.tok_embeddings(tokens)  # (B, S, D)
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))  # the stream has the type it would have under FSDP2
        for layer in self.layers:
            x = layer(x, ctx)
        x = self.norm(x)
        if labels is not None:
            assert loss is not None, "labels without a loss"
            padded = {"vocab_size": self.args.vocab_size} if self.args.vocab_rows > self.args.vocab_size else {}
            return loss(x, self.output_weight, labels, **padded)
        x = full_tensor(x)
        if select is not None:
            x = x[torch.arange(len(x), device=x.device), select].unsqueeze(1)
        return logits(x, self.output_weight)[..., : self.args.vocab_size]

    def _forward_context(
        self, tokens: Tensor, documents: RowDocuments | None, cache: KVCache | None, positions: Tensor | None
    ) -> ForwardContext:
        (n_rows, seq_len), window = tokens.shape, self.args.sliding_window
        if cache is None:
            cos, sin = self.rope_embeddings(seq_len, positions)
            mask = build_mask(self.attn_impl, (n_rows, seq_len), window, documents, tokens.device)
            return ForwardContext(self.attn_impl, window, cos, sin, mask)
        assert positions is not None, "a cache needs positions"
        assert documents is None, "a cache knows no documents"
        cos, sin = self.rope_embeddings(seq_len, positions)
        mask = cached_mask(positions, cache.end, window)
        # Cached passes are short or one token long and need an explicit mask, which sdpa takes everywhere.
        return ForwardContext("sdpa", window, cos, sin, mask, cache, positions)

    def init_weights(self, seed: int) -> None:
        """Initial values of all parameters and tables; also on sharded parameters."""
        self.init_buffers()
        init_modules(self, self.args, seed)

    def init_buffers(self) -> None:
        """Tables that no checkpoint holds; call it after `to_empty` if weights are loaded instead of initialised."""
        self.rope_embeddings.fill()
