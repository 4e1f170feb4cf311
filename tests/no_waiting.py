"""A GPU that is not there, on which an error says where the host would wait.

Numbers of tensors without content cannot be read (`item`, `bool`, `cpu`, `nonzero`, ...): of `meta` tensors, which have
gradients, and of fake ones, which say that they are on a GPU, but torch has no backward for a GPU that is not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostWaitError(AssertionError):
    """The host would wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses copies that torch waits for: between host and device without `non_blocking` (ATen, cuda/Copy.cu)."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ends, waits = ["cpu", "cpu"], not kwargs.get("non_blocking")
        if function is torch.ops.aten._to_copy.default:
            ends = [args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type]
        elif function is torch.ops.aten.copy_.default:
            ends, waits = [each.device.type for each in args[1::-1]], waits and not any(args[2:])
        if ends[0] != ends[1] and waits:
            raise HostWaitError(f"a copy from {ends[0]} to {ends[1]} without non_blocking")
        return function(*args, **kwargs)
