"""Predict the step time of a Llama in bf16 on one H200, part by part. Torch-free.

Communication between ranks is not included, so MFU is an upper bound. `measured` rates come from one H200; `assumed`
ones were not measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.model import LlamaArgs
from lingua.config.keys.train import TrainArgs
from lingua.train.sizes import Resolved


@dataclass(frozen=True)
class Rates:
    """Rates of one H200."""

    matmul: float = 788e12
    """FLOP/s of a large bf16 product, random data: measured, 8192^3, torch 2.11."""
    memory: float = 4.3e12
    """Bytes/s, read and written: measured, a copy of 8.6 GB (data sheet: 4.8e12)."""
    attention_forward: float = 450e12
    """FLOP/s of causal attention, at 2k to 4k positions with heads of 128: assumed. FlashAttention-3's abstract (arXiv
    2407.08608) reports up to 740e12 in fp16 on an H100."""
    attention_backward: float = 350e12
    """Likewise: assumed."""
    multiprocessors: int = 132
    """Data sheet of H100 and H200 (SXM)."""
    tile: tuple[int, int] = (128, 256)
    """Rows and columns that one multiprocessor computes at once: cuBLAS's usual choice on Hopper, assumed."""
    to_host: float = 55e9
    """Bytes/s into pinned memory: assumed; PCIe 5.0 x16 has 63e9 each way."""
    gaps: float = 0.03
    """Share of a step in which no kernel runs: assumed."""


RATES = Rates()


def product_s(rows: int, columns: int, inner: int, rates: Rates = RATES) -> float:
    """Return the seconds of (rows x inner) (inner x columns): whole waves of tiles or its bytes, the longer one."""
    tiles = math.ceil(rows / rates.tile[0]) * math.ceil(columns / rates.tile[1])
    filled = tiles / (math.ceil(tiles / rates.multiprocessors) * rates.multiprocessors)
    bytes_moved = 2 * (rows * inner + inner * columns + rows * columns)
    return max(2 * rows * columns * inner / (rates.matmul * filled), bytes_moved / rates.memory)


def linear_s(positions: int, out: int, inner: int, recomputed: bool, rates: Rates = RATES) -> float:
    """Return the seconds of a linear layer: forward, gradient of the input, gradient of the weight."""
    forward = product_s(positions, out, inner, rates)
    backward = product_s(positions, inner, out, rates) + product_s(out, inner, positions, rates)
    return forward * (2 if recomputed else 1) + backward


def is_known(args: TrainArgs, gpu: str) -> bool:
    """Return whether the run can be predicted: a Llama with AdamW in bf16, without tensor parallelism, on H200s."""
    layout = args.distributed
    plain = layout.model_dtype == "bf16" and layout.tp_size == 1 and layout.float8_recipe is None
    plain = plain and layout.activation_memory_budget is None
    return gpu == "h200" and args.model.type == "llama" and args.optim.type == "adamw" and plain


def step_parts(model: LlamaArgs, layout: DistributedArgs, size: Resolved, rates: Rates = RATES) -> dict[str, float]:
    """Return the seconds of each part of a step."""
    rows, seq_len, n_micro, vocab = size.batch_size, size.seq_len, size.grad_acc_steps, size.vocab_size
    again, positions = layout.full_activation_checkpointing, rows * seq_len
    dim, ffn = model.dim, model.ffn_width
    queries, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    shapes = [(queries, dim), (keys, dim), (keys, dim), (dim, queries), (ffn, dim), (ffn, dim), (dim, ffn)]
    layers = model.n_layers * sum(linear_s(positions, out, inner, again, rates) for out, inner in shapes)
    # One pass of attention: two products of S x S x width, half of each because of causality.
    half = 2 * rows * seq_len**2 * queries
    attention = model.n_layers * half * ((2 if again else 1) / rates.attention_forward + 2.5 / rates.attention_backward)
    # Per position and layer in 2-byte types, forward: norms and residuals move 8 D, rotation 2 (Q + K), the gate 3 F.
    forward_bytes = 2 * (8 * dim + 2 * (queries + keys) + 3 * ffn)
    elementwise = model.n_layers * positions * forward_bytes * (4 if again else 3) / rates.memory
    # Logits in bf16 written and read, and fp32 values and gradients of them: 16 bytes each in all.
    n = model.model_copy(update={"vocab_size": vocab}).n_params()
    casts = (4 + 2 + 2 + 8) * n / rates.memory  # weights to bf16; gradients in bf16 added to fp32
    parts = {
        "layers' products": n_micro * layers,
        "head's products": n_micro * linear_s(positions, vocab, dim, False, rates),
        "attention": n_micro * attention,
        "norms, rotation, gates": n_micro * elementwise,
        "loss": n_micro * 16 * positions * vocab / rates.memory,
        "casts": n_micro * casts,
        "clipping and AdamW": (4 + 12) * n / size.dp_shard / rates.memory  # norm; parameters twice, gradients
        + 2 * (size.checkpoint_bytes - 4 * n) / size.dp_shard / rates.memory,  # moments, read and written
    }
    return {**parts, "gaps": sum(parts.values()) * rates.gaps / (1 - rates.gaps)}


def staging_s(state_bytes: float, n_ranks: int, parts: dict[str, float], rates: Rates = RATES) -> tuple[float, float]:
    """Return (seconds to copy a rank's share of the state to the host, seconds that the update waits for that).

    The copy begins before a forward pass and must be finished when the gradients are clipped.
    """
    copy_s = state_bytes / n_ranks / rates.to_host
    return copy_s, max(0.0, copy_s - sum(parts.values()) + parts["clipping and AdamW"])
