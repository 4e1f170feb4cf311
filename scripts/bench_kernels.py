"""Measure one device: a matrix product, and forward and backward of the attention kernels."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import lingua  # noqa: F401 # isort: skip (first of all: it sets what torch reads once)
import numpy as np
import torch
from bench_common import timed

from lingua.config.keys.model import LlamaArgs
from lingua.model.attention import ALL_IMPLS, RowDocuments, attend, build_mask, document_bounds, resolve_attn_impl
from lingua.run.throughput import find_peak

MEAN_DOCUMENT = 512  # positions; near web text's


def pick_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(act: Callable[[], object], device: torch.device, repeats: int, warm_up: int) -> list[float]:
    """Return the seconds of each of `repeats` calls, on a GPU by its own clock, so that the host does not wait."""
    for _ in range(warm_up):
        act()
    synchronize(device)
    if device.type != "cuda":
        return [timed(act)[0] for _ in range(repeats)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        act()
        mark.record()
    synchronize(device)
    return [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]  # ms


def device_facts(device: torch.device | None = None) -> dict[str, Any]:
    """Describe `device` (by default the GPU, if there is one) and the peaks to compare its rates with."""
    device = device or pick_device()
    on_gpu = device.type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "host_cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
    }
    peaks, source = {}, "not known"
    if on_gpu:
        size = 8192
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        peaks["matmul"] = 2 * size**3 / statistics.median(step_seconds(lambda: a @ b, device, 20, 5))
        if (peak := find_peak(machine["device"])) is not None:
            peaks["sheet"], source = peak.flops_per_s, peak.sheet
    return {"machine": machine, "peaks": peaks, "peak": source}


def some_documents(batch: int, seq_len: int, device: torch.device, seed: int) -> RowDocuments:
    """Return documents of random lengths, MEAN_DOCUMENT positions on average before rows cut them."""
    begins = np.random.default_rng(seed).random((batch, seq_len)) < 1 / MEAN_DOCUMENT
    doc_ids = begins.cumsum(axis=1).astype(np.int32)
    ids, bounds = (torch.from_numpy(array).to(device) for array in (doc_ids, document_bounds(doc_ids)))
    return RowDocuments(ids, bounds)


def measure_attention(
    packed: bool, seq_len: int, heads: int = 16, head_dim: int = 128, batch: int = 8
) -> dict[str, Any]:
    """Return TFLOP/s of forward and backward of each kernel, and the time of its mask, built once per step.

    Attention is causal, so half of each square counts: of rows, or of documents if they are `packed` into rows.
    """
    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (batch, seq_len, heads, head_dim)
    documents = some_documents(batch, seq_len, device, seed=0) if packed else None
    lengths = [seq_len] * batch if documents is None else documents.bounds.diff().tolist()
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    out_grad = torch.randn(shape, device=device, dtype=dtype)
    squares = sum(length**2 for length in lengths)
    flops = 3.5 * 4 * heads * squares * head_dim / 2  # backward has 5 products where forward has 2
    found: dict[str, Any] = {}
    for impl in ALL_IMPLS:
        model = LlamaArgs(dim=heads * head_dim, n_heads=heads, attn_impl=impl)
        try:
            resolve_attn_impl(model, device.type, dtype, doc_mask=packed)
            make_mask = partial(build_mask, impl, (batch, seq_len), None, documents, device)
            mask = make_mask()

            def step(impl: str = impl, mask: Any = mask) -> None:
                attend(impl, q, k, v, mask, None).backward(out_grad)
                q.grad = k.grad = v.grad = None

            found[impl] = {
                "tflops": flops / statistics.median(step_seconds(step, device, 10, 3)) / 1e12,
                "mask_ms": statistics.median(step_seconds(make_mask, device, 10, 3)) * 1e3,
            }
        except Exception as error:  # a kernel that fails here is a result, too
            found[impl] = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    return found
