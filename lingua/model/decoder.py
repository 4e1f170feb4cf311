"""A language model from blocks of any family: embedding, blocks, norm and head, with its initial weights.

It is built on the meta device, then `to_empty`, then `init_weights(seed)`. Initial weights depend only on (seed,
parameter name, shape): they are the same on any number of ranks, sharded or not, but CPU and CUDA draw different ones.
Each rank draws whole tensors and keeps its shard. With weight tying there is one parameter with one name, so nothing
can untie it. With a loss, logits exist one chunk at a time.

Letters: B rows, S positions, D model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn import functional

from lingua.config.base import ConfigError, named
from lingua.config.keys.model import TIME_WAVES, DecoderArgs
from lingua.model.attention import RowDocuments, build_mask
from lingua.model.context import Cache, ForwardContext
from lingua.model.loss import Loss
from lingua.model.transformer import RotaryEmbedding, build_norm, cached_mask

T = TypeVar("T")

UseOfHead = Callable[[Tensor, Tensor], T]
"""(hidden states (B, S, D), weight of the head (V, D)) -> logits or losses."""


class Head(nn.Linear):
    """The output layer. All uses of its weight, including the loss, happen inside `forward`.

    So FSDP2, which hooks into calls of modules, gathers the weight just in time, and reduces its gradient during the
    blocks' backward.
    """

    def forward(self, x: Tensor, use: UseOfHead[T]) -> T:  # pyright: ignore[reportIncompatibleMethodOverride]
        return use(x, self.weight)


class Decoder(nn.Module):
    """tok_embeddings, layers, norm, output. A family changes the blocks; a subclass may change anything else."""

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        if args.vocab_size < 1:
            raise ValueError(f"model.vocab_size is {args.vocab_size}; set it to the tokenizer's number of tokens")
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_rows, args.dim)
        self.attention = args.attention  # only once: for a hybrid this validates the keys of its blocks
        self.rope_embeddings = None if self.attention is None else RotaryEmbedding(self.attention)
        self.time_input = nn.Linear(TIME_WAVES, args.dim, bias=False) if args.time_input else None
        self.layers = nn.ModuleList(build_block(args.of_layer(layer), layer) for layer in range(args.n_layers))
        self.norm = build_norm(args, args.dim)
        self.output = self.build_output()

    def build_output(self) -> Head | None:
        """Build the head, or return None if the embedding is the head too."""
        return None if self.args.weight_tying else Head(self.args.dim, self.args.vocab_rows, bias=False)

    def head(self, x: Tensor, use: UseOfHead[T]) -> T:
        """Return use(x, weight), with the weight (V, D), V padded, of the head or of the embedding."""
        return use(x, self.tok_embeddings.weight) if self.output is None else self.output(x, use)

    def forward(
        self,
        tokens: Tensor,  # (B, S) int
        *,
        labels: Tensor | None = None,  # (B, S) int, -100 for none
        documents: RowDocuments | None = None,
        loss: Loss | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,  # (B, S) int, with a cache
        select: Tensor | None = None,  # (B,) int: return logits of this position only; rows end there
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, S, V), or (B, 1, V) with `select`; with labels and a loss, the result of `loss_of`."""
        ctx = self.forward_context(tokens, documents, cache, positions, select)
        x = self.tok_embeddings(tokens)  # (B, S, D)
        if self.time_input is not None:
            x = x + self.time_input(self._time_waves(tokens).to(self.time_input.weight.dtype))
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))  # the type of the stream under FSDP2
        for layer in self.layers:
            x = layer(x, ctx)
        x = self.norm(x)
        if labels is not None:
            assert loss is not None, "labels without a loss"
            return self.loss_of(x, labels, loss)
        x = full_tensor(x)
        if select is not None:
            x = x[torch.arange(len(x), device=x.device), select].unsqueeze(1)
        found = self.head(x, logits)[..., : self.args.vocab_size]
        cap = self.args.logit_soft_cap
        return found if cap is None else cap * torch.tanh(found.float() / cap)

    def _time_waves(self, tokens: Tensor) -> Tensor:
        """Return cos(pi k t), (B, 1, waves), for the share t of masked tokens of each row."""
        share = (tokens == self.args.vocab_size).float().mean(1)[:, None, None]
        return torch.cos(torch.pi * share * torch.arange(TIME_WAVES, device=tokens.device))

    def loss_of(self, x: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Return (fp32 loss sum, number of labels) for the last hidden states (B, S, D).

        A model that predicts several labels per position returns a vector of loss sums; training adds them up.
        """
        return self.head(x, self.loss_with(labels, loss))

    def loss_with(self, labels: Tensor, loss: Loss) -> UseOfHead[tuple[Tensor, Tensor]]:
        """Return a function of hidden states and a head's weight that returns the loss sum and number of labels."""
        padded = {"vocab_size": self.args.vocab_size} if self.args.vocab_rows > self.args.vocab_size else {}
        capped = {} if self.args.logit_soft_cap is None else {"soft_cap": self.args.logit_soft_cap}
        return lambda x, weight: loss(x, weight, labels, **padded, **capped)

    def forward_context(
        self,
        tokens: Tensor,
        documents: RowDocuments | None,
        cache: Cache | None,
        positions: Tensor | None,
        select: Tensor | None,
    ) -> ForwardContext:
        """Return the context of this pass. With a cache, `select` says where rows end."""
        assert cache is None or (positions is not None and documents is None), "a cache needs positions, not documents"
        ctx = ForwardContext(cache=cache)
        if cache is not None:
            ctx.positions = positions
            if select is not None:
                ctx.real = torch.arange(tokens.shape[1], device=tokens.device) <= select[:, None]
        elif documents is not None:
            ctx.starts = starts_of(documents.ids)
        attention = self.attention
        if attention is not None and self.rope_embeddings is not None:
            ctx.angles = self.rope_embeddings(tokens.shape[1], positions)
            ctx.causal, ctx.window = attention.causal, attention.sliding_window
            assert ctx.causal or cache is None, "a cache is for models that look back only"
            # Training resolves `auto` before it builds the model. Cached passes are short and need an explicit mask,
            # which sdpa supports on every device.
            ctx.impl = "sdpa" if attention.attn_impl == "auto" or cache is not None else attention.attn_impl
            if cache is not None and positions is not None:
                ctx.mask = cached_mask(positions, cache.end, ctx.window)
            else:
                shape = (len(tokens), tokens.shape[1])
                ctx.mask = build_mask(ctx.impl, shape, ctx.window, documents, tokens.device, ctx.causal)
        return ctx

    def init_weights(self, seed: int) -> None:
        """Initialize all parameters, sharded or not, and all tables."""
        self.init_buffers()
        init_modules(self, self.args, seed)

    def init_buffers(self) -> None:
        """Fill the tables that no checkpoint holds; call it after `to_empty` if weights are loaded."""
        if self.rope_embeddings is not None:
            self.rope_embeddings.fill()


def build_block(args: DecoderArgs, layer: int) -> nn.Module:
    """Build the block of a layer. Raises ConfigError if it contradicts its Args."""
    block: nn.Module = named(args, "block")(args, layer)
    parameters = [name for name, _ in block.named_parameters()]
    for ending in args.residual_outputs:
        if not any(name.endswith(ending) for name in parameters):
            fact, known = f"{type(args).__name__}.residual_outputs", ", ".join(parameters)
            raise ConfigError(f"{fact} names {ending}, but the block has only {known}; correct it there")
    return block


def starts_of(doc_ids: Tensor) -> Tensor:
    """Return where documents begin, (B, S) bool, from document numbers (B, S); a row's first position begins one."""
    first = torch.ones_like(doc_ids[:, :1], dtype=torch.bool)
    return torch.cat((first, doc_ids[:, 1:] != doc_ids[:, :-1]), dim=1)


def full_tensor(x: Tensor) -> Tensor:
    """Gather all positions of a stream that tensor parallelism may have split. Collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (B, S, D) times the head's weight (V, D), which may be split by vocabulary: (B, S, V). Collective."""
    if not isinstance(weight, DTensor):
        return functional.linear(x, weight)
    spread = DTensor.from_local(x, weight.device_mesh, [Replicate()], run_check=False)
    return full_tensor(functional.linear(spread, weight))


# -- initial weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
def init_modules(model: nn.Module, args: DecoderArgs, seed: int) -> None:
    """Initialize every parameter, sharded or not, as a function of (seed, name, shape) alone.

    Weights of linear layers and embeddings are drawn and their biases are 0; any other module with parameters needs a
    method `reset_parameters`. Raises ValueError for one without.
    """
    done: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = {kind: p for kind, p in module.named_parameters(recurse=False) if p not in done}
        done |= set(own.values())
        if not own:
            continue
        if not isinstance(module, nn.Linear | nn.Embedding):
            _reset(module, own, seed, name)
            continue
        for kind, parameter in own.items():
            if kind == "bias":
                parameter.zero_()
            else:
                std = _args_of(name, args).initial_std(f"{prefix}{kind}", parameter.shape)
                init_parameter(parameter, std, seed, f"{prefix}{kind}")


def _args_of(name: str, args: DecoderArgs) -> DecoderArgs:
    """Return the Args of a module: those of its layer, if it is in one."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return args if layer is None else args.of_layer(int(layer[1]))


def _reset(module: nn.Module, own: Mapping[str, nn.Parameter], seed: int, name: str) -> None:
    """Let a module initialize whole tensors instead of its parameters, then copy each rank's shard."""
    if not hasattr(module, "reset_parameters"):
        raise ValueError(
            f"{name or 'the model'} ({type(module).__name__}) has parameters but no reset_parameters(); "
            "add this method and give them their initial values in it"
        )
    device = next(iter(own.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_seed_of(seed, name))
        try:
            drawn = {kind: nn.Parameter(_whole_like(p)) for kind, p in own.items()}
            module._parameters.update(drawn)
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
        finally:
            module._parameters.update(own)
    for kind, parameter in own.items():
        _fill(parameter, drawn[kind])


@torch.no_grad()
def init_parameter(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill a matrix, sharded or not, with values determined by (seed, name); with std 0, with zeros."""
    if std == 0:
        parameter.zero_()
        return
    generator = torch.Generator(parameter.device).manual_seed(_seed_of(seed, name))
    drawn = _whole_like(parameter)
    nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
    _fill(parameter, drawn)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed:d}/{name}".encode(), digest_size=7).digest(), "little")


def _whole_like(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)


def _fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, which every rank has, into a parameter or its shard. Nothing is sent."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)
