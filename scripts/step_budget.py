"""Predict the step time and MFU of a config on one GPU of a kind, part by part. Imports no torch.

    uv run python scripts/step_budget.py apps/main/configs/llama_1B_8H200.yaml data.batch_size=24 grad_acc_steps=1

For Llamas in bf16. What ranks send each other is not in it. `measured` rates come from one H200; what is `assumed` was
measured nowhere here: put your own figures in RATES once there is a GPU.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import lingua.config.interrupt  # noqa: F401 # isort: skip
from bench_common import make_parser, print_figures

from lingua.config.base import ConfigError
from lingua.config.command_line import parse_command_line, run_main
from lingua.config.keys.distributed import DistributedArgs
from lingua.config.keys.model import LlamaArgs
from lingua.run.throughput import find_peak
from lingua.train.check import load


@dataclass(frozen=True)
class Rates:
    """What one H200 does."""

    matmul: float = 788e12
    """FLOP/s of a large bf16 product, random data: measured, 8192^3, torch 2.11."""
    memory: float = 4.3e12
    """Bytes/s, read and written: measured, a copy of 8.6 GB (data sheet: 4.8e12)."""
    attention_forward: float = 450e12
    """FLOP/s of what causality leaves, at 2k to 4k positions with heads of 128: assumed. FlashAttention-3's abstract
    (arXiv 2407.08608) has up to 740e12 in fp16 on an H100."""
    attention_backward: float = 350e12
    """Likewise: assumed."""
    multiprocessors: int = 132
    """Data sheet of H100 and H200 (SXM)."""
    tile: tuple[int, int] = (128, 256)
    """Rows and columns that one multiprocessor computes at once: cuBLAS's usual choice on Hopper, assumed."""
    gaps: float = 0.03
    """Share of a step in which no kernel runs: assumed."""


RATES = Rates()


def product_s(rows: int, columns: int, inner: int, rates: Rates = RATES) -> float:
    """Seconds of (rows x inner) (inner x columns): whole waves of tiles, or its bytes, whichever takes longer."""
    tiles = math.ceil(rows / rates.tile[0]) * math.ceil(columns / rates.tile[1])
    filled = tiles / (math.ceil(tiles / rates.multiprocessors) * rates.multiprocessors)
    bytes_moved = 2 * (rows * inner + inner * columns + rows * columns)
    return max(2 * rows * columns * inner / (rates.matmul * filled), bytes_moved / rates.memory)


def linear_s(positions: int, out: int, inner: int, recomputed: bool, rates: Rates = RATES) -> float:
    """Forward, gradient of the input, gradient of the weight."""
    forward = product_s(positions, out, inner, rates)
    backward = product_s(positions, inner, out, rates) + product_s(out, inner, positions, rates)
    return forward * (2 if recomputed else 1) + backward


def step_parts(
    model: LlamaArgs, layout: DistributedArgs, vocab: int, rows: int, seq_len: int, n_micro: int, rates: Rates = RATES
) -> dict[str, float]:
    """Seconds of each part of a step of `n_micro` micro steps of `rows` rows."""
    again, positions = layout.full_activation_checkpointing, rows * seq_len
    dim, ffn, queries, keys = (
        model.dim,
        model.ffn_width,
        model.heads * model.head_width,
        model.kv_heads * model.head_width,
    )
    shapes = [(queries, dim), (keys, dim), (keys, dim), (dim, queries), (ffn, dim), (ffn, dim), (dim, ffn)]
    layers = model.n_layers * sum(linear_s(positions, out, inner, again, rates) for out, inner in shapes)
    # One pass of attention: two products of S x S x width, half of each left by causality.
    half = 2 * rows * seq_len**2 * queries
    attention = model.n_layers * half * ((2 if again else 1) / rates.attention_forward + 2.5 / rates.attention_backward)
    # Per position and layer in 2-byte types, forward: norms and residuals move 8 D, rotation 2 (Q + K), the gate 3 F.
    forward_bytes = 2 * (8 * dim + 2 * (queries + keys) + 3 * ffn)
    elementwise = model.n_layers * positions * forward_bytes * (4 if again else 3) / rates.memory
    # Logits in bf16 written and read, and fp32 values and gradients of them: 16 bytes each in all.
    n = model.model_copy(update={"vocab_size": vocab}).n_params()
    casts = (4 + 2 + 2 + 8) * n / rates.memory  # weights to bf16; gradients in bf16 added to fp32
    return {
        "layers' products": n_micro * layers,
        "head's products": n_micro * linear_s(positions, vocab, dim, False, rates),
        "attention": n_micro * attention,
        "norms, rotation, gates": n_micro * elementwise,
        "loss": n_micro * 16 * positions * vocab / rates.memory,
        "casts": n_micro * casts,
        "clipping and AdamW": (4 + 28) * n / (layout.dp_shard or 1) / rates.memory,  # norm; p, g, m, v and p, m, v
    }


def predict(line: list[str], gpu: str, rates: Rates = RATES) -> dict[str, Any]:
    """Figures of a config."""
    checked = load(parse_command_line(line), world_size=1)
    args, size = checked.args, checked.resolved
    peak = find_peak(gpu)
    if peak is None:
        raise ConfigError(f"command line: --gpu {gpu} has no known peak; write h200")
    if not isinstance(args.model, LlamaArgs):
        raise ConfigError(f"model.type is {args.model.type}; the budget knows Llamas only")
    parts = step_parts(
        args.model, args.distributed, size.vocab_size, size.batch_size, size.seq_len, size.grad_acc_steps, rates
    )
    step_s = sum(parts.values()) / (1 - rates.gaps)
    tokens = size.batch_size * size.seq_len * size.grad_acc_steps
    return {
        **{f"{name}, ms": 1000 * seconds for name, seconds in parts.items()},
        "gaps, ms": 1000 * rates.gaps * step_s,
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "mfu": tokens / step_s * size.flops_per_token / peak.flops_per_s,
    }


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--gpu", default="h200", help="whose peak MFU is stated against (h200); the rates are an H200's"
    )
    parser.add_argument("words", nargs="+", help="CONFIG KEY=VALUE ...")
    options = parser.parse_args(words)
    print_figures(predict(options.words, options.gpu), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
