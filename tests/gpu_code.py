"""The Triton code that torch.compile would run on an H200, made without one: nothing of it is built or run."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _triton

from tests.ranks import run_on_ranks

H200 = SimpleNamespace(  # what torch.cuda.get_device_properties says of one
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
)


def triton_kernels(act: Callable[..., Any], make: Callable[[], tuple[Tensor, ...]]) -> list[str]:
    """Return the source of each kernel of `act(*make())`, in the order of the launches."""
    return run_on_ranks(lambda rank: _triton_kernels(act, make), 1)[0]  # in a process of its own: torch keeps answers


def _triton_kernels(act: Callable[..., Any], make: Callable[[], tuple[Tensor, ...]]) -> list[str]:
    facts: Any = CudaInterface
    owners: list[Any] = [torch.cuda, facts, facts.Worker]
    for owner in owners:
        owner.get_device_properties, owner.current_device = lambda *args: H200, lambda: 0
    facts.is_available, facts.get_compute_capability = lambda: True, lambda *args: 90
    _triton.triton_hash_with_backend = lambda: "none"
    _triton.has_triton.cache_clear()  # the process that forked this one may have asked, without a GPU
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode, torch.no_grad(), torch.device("cuda", 0):
        inputs = make()
        traced = make_fx(torch.func.functionalize(act), select_decomp_table(), tracing_mode="fake")(*inputs)
    graph = GraphLowering(traced, example_inputs=list(inputs), shape_env=shapes)
    with V.set_debug_handler(DebugContext()), V.set_graph_handler(graph), V.set_fake_mode(mode), torch.no_grad():
        graph.run(*inputs)
        code: Any = graph.codegen()[0]
    text = getattr(code, "value", code)
    sources = {source[: source.index("(")]: source for source in re.split(r"\ndef (?=triton_)", text)[1:]}
    assert "extern_kernels." not in text.partition("def call")[2]
    return [sources[name].partition("\n'''")[0] for name in re.findall(r"(triton_\w+)\.run\(", text)]
