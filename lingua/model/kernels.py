"""Recurrences with the kernels of other packages (`model.kernel`), called like ours in lingua/model/recurrence.py.

Not run on a GPU yet: the tests call stand-ins that compute the same in torch. The signatures were read from the sources
of mamba-ssm, flash-linear-attention and mlstm-kernels (which has its own license); no release of them was installed.

Letters as in lingua/model/recurrence.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lingua.config.base import ConfigError
from lingua.config.keys.model import DecoderArgs, KernelArgs
from lingua.model.context import ForwardContext


def kernel_of(args: KernelArgs, x: Tensor, ctx: ForwardContext) -> str:
    """Return the kernel that computes a block in this pass: the named one or the first that fits, else torch."""
    return _choose(args, x.device.type, documents=ctx.starts is not None)


def _choose(args: KernelArgs, device_type: str, *, documents: bool) -> str:
    deterministic = torch.are_deterministic_algorithms_enabled()
    named = args.kernels if args.kernel == "auto" else (args.kernel,)
    for kernel in named:
        if args.kernel_unfit(kernel, device_type, documents=documents, deterministic=deterministic) is None:
            return kernel
    return "torch"


def kernels_in_use(args: DecoderArgs, device_type: str, documents: bool) -> Iterator[str]:
    """Yield "<type> by <kernel>" for each family of the model. Raises ConfigError if a named kernel does not fit."""
    for layer in range(args.n_layers):
        own = args.of_layer(layer)
        if isinstance(own, KernelArgs):
            chosen = _choose(own, device_type, documents=documents)
            if own.kernel not in ("auto", chosen):
                here = {"documents": documents, "deterministic": torch.are_deterministic_algorithms_enabled()}
                raise ConfigError(own.kernel_refused(own.kernel_unfit(own.kernel, device_type, **here)))
            yield f"{own.type} by {chosen}"


def state_space_by_mamba_ssm(
    x: Tensor,  # (B, S, H, P)
    dt: Tensor,  # (B, S, H)
    a: Tensor,  # (H,), < 0
    keys: Tensor,  # (B, S, G, N)
    queries: Tensor,  # (B, S, G, N)
    starts: Tensor | None,
    state: Tensor | None,  # (B, H, N, P)
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Return the result of `decayed_attention` for v = dt x and log_decay = dt a."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    y, last = mamba_chunk_scan_combined(
        *(x, dt, a, keys, queries, chunk),
        initial_states=None if state is None else state.transpose(-1, -2).contiguous(),
        seq_idx=None if starts is None else starts.cumsum(1).int(),
        return_final_states=True,
    )
    return y.float(), last.transpose(-1, -2)


def decayed_attention_by_fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the result of `decayed_attention`."""
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    n_rows, n_heads = len(v), v.shape[2]
    q, k = (x.repeat_interleave(n_heads // x.shape[2], dim=2) for x in (q, k))
    inputs, bounds = [q, k, v.type_as(q), log_decay], None
    if starts is not None:  # documents of all rows, one after another
        inputs = [x.flatten(0, 1).unsqueeze(0) for x in inputs]
        bounds = functional.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
    y, last = chunk_simple_gla(*inputs, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=bounds)
    if starts is not None:
        y, last = y.unflatten(1, (n_rows, -1)).squeeze(0), last[starts.sum(1).cumsum(0) - 1]
    return y.float(), last


def linear_scan_by_fla(a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """Return the result of `linear_scan`; the kernel takes logs, so a factor of 0 becomes the smallest number."""
    from fla.ops.hgrn import chunk_hgrn  # pyright: ignore[reportMissingImports]

    log_a = a.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    return chunk_hgrn(b.float(), log_a, initial_state=state, output_final_state=False)[0]


def mlstm_by_kernels(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor, chunk: int
) -> Tensor:  # fmt: skip
    """Return the h of `mlstm`, (B, S, H, P), for rows that begin with an empty memory."""
    from mlstm_kernels.torch import get_mlstm_kernel  # pyright: ignore[reportMissingImports]

    n_pad = -q.shape[1] % chunk  # padding at the end does not change earlier positions
    by_head = [x.transpose(1, 2) for x in (q, k.type_as(q), v.type_as(q), input_gate, forget_gate)]
    q, k, v = (functional.pad(x, (0, 0, 0, n_pad)).contiguous() for x in by_head[:3])
    i, f = (functional.pad(x, (0, n_pad)).contiguous() for x in by_head[3:])
    kernel = get_mlstm_kernel("chunkwise--triton_xl_chunk")
    how = {"return_last_states": False, "eps": 1e-6, "chunk_size": chunk, "autocast_kernel_dtype": q.dtype}
    h = kernel(q=q, k=k, v=v, i=i, f=f, **how)
    return h.transpose(1, 2)[:, : input_gate.shape[1]].float()
